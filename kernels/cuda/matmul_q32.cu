/* Products of weights in blocks of 32. */
#include "kernels/cuda/matmul_narrow.h"
#include "kernels/cuda/matmul_wide.h"

template <Dtype T> static int product(const ProductArgs &args, WeftCudaStream stream)
{
    if (args.rows <= 8) {
        return start_narrow<T, 1, 1>(args, stream);
    }
    return args.rows <= 32 ? start_narrow<T, 4, 2>(args, stream) : start_wide<T>(args, stream);
}

int product_q32(const ProductArgs &args, WeftCudaStream stream)
{
    switch (args.w.type) {
    case DTYPE_Q4_0:
        return product<DTYPE_Q4_0>(args, stream);
    case DTYPE_Q4_1:
        return product<DTYPE_Q4_1>(args, stream);
    case DTYPE_Q5_0:
        return product<DTYPE_Q5_0>(args, stream);
    case DTYPE_Q5_1:
        return product<DTYPE_Q5_1>(args, stream);
    case DTYPE_Q8_0:
        return product<DTYPE_Q8_0>(args, stream);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
