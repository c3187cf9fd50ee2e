#pragma once

#include "kernels/ops/gemm.h"

#include <string.h>

/* Blocks of c are computed one after another: operands are packed, k chunk by k chunk, into
 * A [rows/4][k][4] and B [columns/NR][k][NR], and each tile of c is loaded, continued and stored,
 * which changes no bit. A block of a cut product is a stack of partial sums in the scratch, of
 * smaller blocks so that the stack stays in the second-level cache. The sizes fit
 * gemm_scratch_floats(). */
enum {
    GEMM_NR = 3 * VEC_LANES,
    GEMM_MR = VEC_LANES == 16 ? 8 : 4, /* 24 or 12 sums in registers */
    GEMM_K = 256,
    GEMM_M_WHOLE = 264,
    GEMM_N_WHOLE = 384,
    GEMM_M_CUT = 96,
    GEMM_N_CUT = 192,
};

/* out[t][r], r < 4: row r of src for steps t, rows `row` floats apart. */
VEC_FN void gemm_pack_rows(const float *src, size_t row, uint32_t n_rows, uint32_t length,
                           float *out, size_t out_step)
{
    uint32_t t = 0;
    for (; n_rows == 4 && t + VEC_LANES <= length; t += VEC_LANES) {
        float turned[4 * VEC_LANES];
        const Vec w[4] = {vec_load(src + t), vec_load(src + row + t), vec_load(src + 2 * row + t),
                          vec_load(src + 3 * row + t)};
        vec_store_interleaved(turned, w);
        for (unsigned lane = 0; lane < VEC_LANES; lane++) {
            memcpy(out + (t + lane) * out_step, turned + 4 * lane, 4 * sizeof(float));
        }
    }
    for (; t < length; t++) {
        for (uint32_t r = 0; r < 4; r++) {
            out[t * out_step + r] = r < n_rows ? src[r * row + t] : 0.0f;
        }
    }
}

/* Rows [0, m) of a, steps [0, length), as [m/4][length][4]; missing rows are zeros, and there is a
 * whole number of tiles. */
static void gemm_pack_a(const GemmSegment *g, const float *a, uint32_t m, uint32_t length,
                        float *out)
{
    const uint32_t tiles = (m + GEMM_MR - 1) / GEMM_MR * GEMM_MR;
    for (uint32_t i = 0; i < tiles; i += 4, out += (size_t)length * 4) {
        const uint32_t rows = i >= m ? 0 : m - i < 4 ? m - i : 4;
        if (rows == 0) {
            memset(out, 0, (size_t)length * 4 * sizeof(float));
        } else if (g->a_step == 1) {
            gemm_pack_rows(a + i * g->a_row, g->a_row, rows, length, out, 4);
        } else {
            for (uint32_t t = 0; t < length; t++) {
                for (uint32_t r = 0; r < 4; r++) {
                    out[(size_t)t * 4 + r] =
                        r < rows ? a[(i + r) * g->a_row + t * g->a_step] : 0.0f;
                }
            }
        }
    }
}

/* Columns [0, n) of b, steps [0, length), as [n/NR][length][NR]; missing columns are zeros. */
static void gemm_pack_b(const GemmSegment *g, const float *b, uint32_t n, uint32_t length,
                        float *out)
{
    for (uint32_t j = 0; j < n; j += GEMM_NR, out += (size_t)length * GEMM_NR) {
        const uint32_t columns = n - j < GEMM_NR ? n - j : GEMM_NR;
        const float *src = b + j * g->b_column;
        if (g->b_column != 1) {
            for (uint32_t c = 0; c < GEMM_NR; c += 4) {
                const uint32_t some = c >= columns ? 0 : columns - c < 4 ? columns - c : 4;
                gemm_pack_rows(src + (some == 0 ? 0 : c * g->b_column), g->b_column, some, length,
                               out + c, GEMM_NR);
            }
        } else if (columns == GEMM_NR) {
            for (uint32_t t = 0; t < length; t++) {
                for (unsigned v = 0; v < 3; v++) {
                    vec_store(out + (size_t)t * GEMM_NR + v * VEC_LANES,
                              vec_load(src + t * g->b_step + v * VEC_LANES));
                }
            }
        } else {
            for (uint32_t t = 0; t < length; t++) {
                memset(out + (size_t)t * GEMM_NR, 0, GEMM_NR * sizeof(float));
                memcpy(out + (size_t)t * GEMM_NR, src + t * g->b_step, columns * sizeof(float));
            }
        }
    }
}

/* A whole tile: c rows ld apart, from c or from +0. */
VEC_FN void gemm_tile(const float *a, const float *b, uint32_t length, float *c, size_t ld,
                      bool from_c)
{
    Vec acc[GEMM_MR][3];
    const float *a4[GEMM_MR / 4];
    for (unsigned q = 0; q < GEMM_MR / 4; q++) {
        a4[q] = a + (size_t)q * length * 4;
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < GEMM_MR; r++) {
#pragma GCC unroll 3
        for (unsigned v = 0; v < 3; v++) {
            acc[r][v] = from_c ? vec_load(c + r * ld + v * VEC_LANES) : vec_zero();
        }
    }
    for (uint32_t t = 0; t < length; t++) {
        const Vec b0 = vec_load(b), b1 = vec_load(b + VEC_LANES), b2 = vec_load(b + 2 * VEC_LANES);
#pragma GCC unroll 8
        for (unsigned r = 0; r < GEMM_MR; r++) {
            const Vec x = vec_all(a4[r / 4][t * 4 + r % 4]);
            acc[r][0] = vec_fma(x, b0, acc[r][0]);
            acc[r][1] = vec_fma(x, b1, acc[r][1]);
            acc[r][2] = vec_fma(x, b2, acc[r][2]);
        }
        b += GEMM_NR;
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < GEMM_MR; r++) {
#pragma GCC unroll 3
        for (unsigned v = 0; v < 3; v++) {
            vec_store(c + r * ld + v * VEC_LANES, acc[r][v]);
        }
    }
}

/* A tile that c has only a part of goes through a whole one on the stack. */
static void gemm_edge(const float *a, const float *b, uint32_t length, float *c, size_t ld,
                      uint32_t rows, uint32_t columns, bool from_c)
{
    float whole[GEMM_MR * GEMM_NR] = {0};
    for (uint32_t r = 0; from_c && r < rows; r++) {
        memcpy(whole + r * GEMM_NR, c + r * ld, columns * sizeof(float));
    }
    gemm_tile(a, b, length, whole, GEMM_NR, true);
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(c + r * ld, whole + r * GEMM_NR, columns * sizeof(float));
    }
}

typedef struct GemmBlock {
    uint32_t i0, m, j0, n;
    float *pack_a, *pack_b;
} GemmBlock;

/* c = (from_c ? c : +0), then the chain of one segment. */
static void gemm_segment(const GemmSegment *g, const GemmBlock *block, float *c, size_t ld,
                         bool from_c)
{
    const float *a = g->a + block->i0 * g->a_row, *b = g->b + block->j0 * g->b_column;
    uint32_t t = 0;
    do {
        const uint32_t length = g->length - t < GEMM_K ? g->length - t : GEMM_K;
        gemm_pack_a(g, a + t * g->a_step, block->m, length, block->pack_a);
        gemm_pack_b(g, b + t * g->b_step, block->n, length, block->pack_b);
        for (uint32_t j = 0; j < block->n; j += GEMM_NR) {
            const float *panel = block->pack_b + (size_t)j * length;
            const uint32_t columns = block->n - j < GEMM_NR ? block->n - j : GEMM_NR;
            for (uint32_t i = 0; i < block->m; i += GEMM_MR) {
                const float *tile = block->pack_a + (size_t)i * length;
                const uint32_t rows = block->m - i < GEMM_MR ? block->m - i : GEMM_MR;
                float *to = c + i * ld + j;
                if (rows == GEMM_MR && columns == GEMM_NR) {
                    gemm_tile(tile, panel, length, to, ld, from_c);
                } else {
                    gemm_edge(tile, panel, length, to, ld, rows, columns, from_c);
                }
            }
        }
        from_c = true;
        t += length;
    } while (t < g->length);
}

static void gemm_block_add(float *to, const float *from, const GemmBlock *block)
{
    for (uint32_t i = 0; i < block->m; i++) {
        for (uint32_t j = 0; j < block->n; j += VEC_LANES) { /* GEMM_N_CUT is whole vectors */
            float *x = to + (size_t)i * GEMM_N_CUT + j;
            vec_store(x, vec_add(vec_load(x), vec_load(from + (size_t)i * GEMM_N_CUT + j)));
        }
    }
}

static void gemm_block_cut(const GemmArgs *args, const GemmBlock *block, float *stack)
{
    const size_t level = (size_t)GEMM_M_CUT * GEMM_N_CUT;
    uint32_t depth = 0, emitted = 0;
    bool open = false;
    for (uint32_t s = 0; s < args->n_segments; s++) {
        const GemmSegment *g = &args->segments[s];
        gemm_segment(g, block, stack + depth * level, GEMM_N_CUT, open);
        open = g->continues;
        if (open) {
            continue;
        }
        depth++;
        for (uint32_t k = 0; k < g->step.n_merges; k++) {
            depth--;
            gemm_block_add(stack + (depth - 1) * level, stack + depth * level, block);
        }
        if (g->step.emit) {
            depth--;
            float *c =
                args->c + args->subtree_stride * emitted++ + block->i0 * args->ld + block->j0;
            for (uint32_t i = 0; i < block->m; i++) {
                memcpy(c + i * args->ld, stack + depth * level + (size_t)i * GEMM_N_CUT,
                       block->n * sizeof(float));
            }
        }
    }
}

static void gemm_block_whole(const GemmArgs *args, const GemmBlock *block)
{
    float *c = args->c + block->i0 * args->ld + block->j0;
    bool from_c = args->accumulate;
    for (uint32_t s = 0; s < args->n_segments; s++) {
        gemm_segment(&args->segments[s], block, c, args->ld, from_c);
        from_c = true;
    }
}

static bool gemm_is_cut(const GemmArgs *args)
{
    uint32_t units = 0;
    for (uint32_t s = 0; s < args->n_segments; s++) {
        units += !args->segments[s].continues;
    }
    return units > 1;
}

static void gemm_vector(const GemmArgs *args)
{
    const bool cut = gemm_is_cut(args);
    const uint32_t m_most = cut ? GEMM_M_CUT : GEMM_M_WHOLE,
                   n_most = cut ? GEMM_N_CUT : GEMM_N_WHOLE;
    GemmBlock block = {.pack_a = args->scratch,
                       .pack_b = args->scratch + (size_t)GEMM_M_WHOLE * GEMM_K};
    float *stack = block.pack_b + (size_t)GEMM_N_WHOLE * GEMM_K;
    for (block.j0 = 0; block.j0 < args->n; block.j0 += n_most) {
        block.n = args->n - block.j0 < n_most ? args->n - block.j0 : n_most;
        for (block.i0 = 0; block.i0 < args->m; block.i0 += m_most) {
            block.m = args->m - block.i0 < m_most ? args->m - block.i0 : m_most;
            if (cut) {
                gemm_block_cut(args, &block, stack);
            } else {
                gemm_block_whole(args, &block);
            }
        }
    }
}
