/* gemm_bf16 by VDPBF16PS, which flushes whatever MXCSR says (Intel SDM; NUMERICS 10). Compiled with
 * -mavx512bf16, used only where the CPU has it and it was measured to be faster than two fmas. */
#include "kernels/fill.h"

#include "kernels/avx512/vec.h"

#define GEMM_DOT
VEC_FN Vec gemm_dot(Vec a, Vec b, Vec acc)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a),
                            (__m512bh)_mm512_castps_si512(b));
}

#include "kernels/vector/gemm.h"

void train_fill_avx512_bf16(Kernels *kernels)
{
    kernels->train.gemm_bf16 = gemm_bf16_vector;
}
