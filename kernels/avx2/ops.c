/* The slots of attention, norm, act, rope and sample that this variant fills: none. */
#include "kernels/fill.h"

void kernels_fill_avx2_ops(Kernels *kernels)
{
}
