/* kernels/vector in the lanes of this instruction set. */
#include "kernels/fill.h"

#include "kernels/avx512/vec.h"

#include "kernels/vector/ops.h"

void kernels_fill_avx512_ops(Kernels *kernels)
{
    ops_fill_vector(kernels);
}
