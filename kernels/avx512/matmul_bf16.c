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

/* ---- many rows ---- */

static void bf16_dots_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    __builtin_memcpy(scratch, w, n_records * sizeof(RecordBF16));
}

ALWAYS_INLINE void dots_rows(const uint8_t *scratch, WideRows rows, const WideChunk *chunk,
                             unsigned P, unsigned R, unsigned G)
{
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        Accs acc[2];
        rows_load(acc, &rows, chunk->fresh || u > 0, P, R, G);
        for (uint32_t i = chunk->runs[u].n_records; i > 0;
             i--, scratch += sizeof(RecordBF16), rows.act += 4 * R) {
            __m512bh pairs[WIDE_PANELS];
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                pairs[p] = (__m512bh)load512(scratch + p * WIDE_SCRATCH_BYTES);
            }
            UNROLL
            for (unsigned j = 0; j < G * R; j++) {
                const __m512bh x =
                    (__m512bh)broadcast_i32(rows.act + j / R * rows.apart + 4 * (j % R));
                UNROLL
                for (unsigned p = 0; p < P; p++) {
                    acc[j / R].v[j % R][p] = _mm512_dpbf16_ps(acc[j / R].v[j % R][p], pairs[p], x);
                }
            }
        }
        rows_store(acc, &rows, chunk->runs[u].n_merges, P, R, G);
    }
}

ROWS_WIDE(dots, dots_rows)
WIDE_KERNEL_PAIRS(bf16_dots, dots, sizeof(RecordBF16), 20)

MATMUL_SLOT_WIDE(bf16_dots, bf16_tile, 2)

void matmul_fill_avx512_bf16(Kernels *kernels)
{
    kernels->matmul[DTYPE_BF16] = matmul_bf16_dots;
}
