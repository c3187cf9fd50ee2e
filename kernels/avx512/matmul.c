/* The slots of matmul and activation quantisation that this variant fills: none. */
#include "kernels/fill.h"

void kernels_fill_avx512_matmul(Kernels *kernels, bool has_bf16)
{
}
