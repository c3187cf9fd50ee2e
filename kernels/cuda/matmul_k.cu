/* Products of weights in super-blocks of 256. */
#include "kernels/cuda/matmul_narrow.h"
#include "kernels/cuda/matmul_wide.h"

template <Dtype T> static int product(const ProductArgs &args, WeftCudaStream stream)
{
    if (args.rows <= 8) {
        return start_narrow<T, 1, 1>(args, stream);
    }
    return args.rows <= 32 ? start_narrow<T, 4, 1>(args, stream) : start_wide<T>(args, stream);
}

int product_k(const ProductArgs &args, WeftCudaStream stream)
{
    switch (args.w.type) {
    case DTYPE_Q4_K:
        return product<DTYPE_Q4_K>(args, stream);
    case DTYPE_Q5_K:
        return product<DTYPE_Q5_K>(args, stream);
    case DTYPE_Q6_K:
        return product<DTYPE_Q6_K>(args, stream);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
