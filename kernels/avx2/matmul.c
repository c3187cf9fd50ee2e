/* The slots of matmul and activation quantisation that AVX2 fills. */
#include "kernels/avx2/matmul.h"

void kernels_fill_avx2_matmul(Kernels *kernels)
{
    quant_fill_avx2(kernels);
    matmul_fill_avx2_float(kernels);
    matmul_fill_avx2_f8(kernels);
    matmul_fill_avx2_q32(kernels);
    matmul_fill_avx2_k(kernels);
}
