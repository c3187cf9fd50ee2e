/* kernels/vector in the lanes of this instruction set: what only training has. */
#include "kernels/fill.h"

#include "kernels/avx2/vec.h"

#include "kernels/vector/train.h"

void kernels_fill_avx2_train(Kernels *kernels)
{
    train_fill_vector(kernels);
}
