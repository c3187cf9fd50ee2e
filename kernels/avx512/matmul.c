/* The slots of matmul that AVX-512 (F, BW, VL, DQ, VNNI) fills. Activations are quantised by the
 * AVX2 functions, which the table has already: that is a small part of a product. */
#include "kernels/avx512/matmul.h"

void kernels_fill_avx512_matmul(Kernels *kernels, bool has_bf16)
{
    matmul_fill_avx512_float(kernels);
    matmul_fill_avx512_f8(kernels);
    matmul_fill_avx512_q32(kernels);
    matmul_fill_avx512_k(kernels);
    if (has_bf16) {
        matmul_fill_avx512_bf16(kernels);
    }
}
