/* bf16dot by VDPBF16PS: odd element first, subnormals flushed at each step whatever MXCSR says
 * (Intel SDM, VDPBF16PS; NUMERICS 10). Compiled with -mavx512bf16, used only where the CPU says
 * that it has it. */
#include "kernels/avx512/matmul.h"

ALWAYS_INLINE void bf16_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                             uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    Accs acc;
    accs_clear(&acc, P, R);
    for (uint32_t k = 0; k < n_records; k++, w += sizeof(RecordBF16), act += 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const __m512bh pairs = (__m512bh)load512(w + p * w_stride);
            _mm_prefetch((const char *)w + p * w_stride + PREFETCH_AHEAD, _MM_HINT_T0);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                acc.v[r][p] =
                    _mm512_dpbf16_ps(acc.v[r][p], pairs, (__m512bh)broadcast_i32(act + 4 * r));
            }
        }
    }
    accs_store(to, &acc, P, R);
}

MATMUL_SLOT(bf16, bf16_tile, 2)

void matmul_fill_avx512_bf16(Kernels *kernels)
{
    kernels->matmul[DTYPE_BF16] = matmul_bf16;
}
