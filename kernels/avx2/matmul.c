/* The slots of matmul and activation quantisation that this variant fills: none. */
#include "kernels/fill.h"

void kernels_fill_avx2_matmul(Kernels *kernels)
{
}
