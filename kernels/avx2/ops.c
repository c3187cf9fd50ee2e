/* kernels/vector in the lanes of this instruction set. */
#include "kernels/fill.h"

#include "kernels/avx2/vec.h"

#include "kernels/vector/ops.h"

void kernels_fill_avx2_ops(Kernels *kernels)
{
    ops_fill_vector(kernels);
}
