#pragma once

#include "kernels/ops/gemm.h"
#include "kernels/vector/flush.h"
#include "kernels/vector/rows.h"
#include "kernels/vector/turn.h"

#include <string.h>

/* The contraction goes by in chunks of up to GEMM_K steps, of one segment or several. For each, a
 * block's rows of a are packed into [rows/4][k][4] once, its columns of b into [columns/NR][k][NR]
 * some at a time, and every tile of c runs through the chunk: a *run* is what the chunk has of one
 * unit. A tile's sums are in registers during a run; between runs those of a product of one unit
 * are in c, others in the *slots* of the partial sums that the tree wants, a tile's side by side.
 * Where they are kept, changes no bit. Merges of the tree happen as a run ends, in registers. Where
 * one chunk is all, b is packed once for all rows, and the slots of one tile serve all (they stay
 * in the first-level cache). The sizes fit gemm_scratch_floats().
 *
 * Narrow operands are rounded where they have been packed. bf16dot is two fmas, the odd step first,
 * with the flush modes on: so the steps of a pair are exchanged, and the products are those of f32.
 * Where the includer defines gemm_dot(acc, a, b) (VDPBF16PS), two steps become one row of pairs. */
#ifdef GEMM_DOT
enum { GEMM_STEPS_A_ROW = 2 };
#else
enum { GEMM_STEPS_A_ROW = 1 };
#endif
typedef enum GemmKind { GEMM_F32, GEMM_BF16, GEMM_F16 } GemmKind;
enum {
    GEMM_NR = 3 * VEC_LANES,
    GEMM_MR = VEC_LANES == 16 ? 8 : 4, /* 24 or 12 sums in registers */
    GEMM_K = 256,
    GEMM_M = 264,
    GEMM_N_PACKED = 192,
    GEMM_N_WHOLE = 1536, /* columns for which a is packed once */
    GEMM_N_CUT = 384,    /* the same where every tile has slots */
    GEMM_TILE = GEMM_MR * GEMM_NR,
    GEMM_PIECES = 64,
    GEMM_LINES_A_TILE = 8, /* asked for ahead */
};

/* Steps [t, t + length) of a segment, at step `at` of the chunk; in bf16 a step of zeros follows an
 * odd length. */
typedef struct GemmPiece {
    const GemmSegment *g;
    uint32_t t, length, at;
} GemmPiece;

typedef struct GemmRun {
    uint32_t at, length; /* packed rows */
    bool from_zero;      /* else from c or its slot */
    bool reads_c, writes_c;
    uint8_t level;    /* of the unit's own sums */
    uint8_t n_merges; /* when it ends: levels above come to it, one after another */
    float *c;         /* the subtree that it belongs to */
} GemmRun;

typedef struct GemmWalk {
    const GemmArgs *args;
    GemmKind kind;
    unsigned modes;        /* bf16: without flushing */
    uint32_t i0, m, j0, n; /* the block */
    float *pack_a, *pack_b, *slots;
    bool is_cut;         /* into units */
    bool is_one;         /* chunk is all */
    bool is_packed;      /* b is, from the rows before */
    size_t level_floats; /* from a level's slots to the next one's */
    /* where the walk over segments is */
    uint32_t segment, t, depth, emitted;
    bool begun; /* the unit has sums in its level */
    /* the chunk */
    uint32_t n_pieces, n_runs, steps, rows; /* rows of packed operands */
    GemmPiece pieces[GEMM_PIECES];
    GemmRun runs[GEMM_PIECES];
} GemmWalk;

/* ---- packing ---- */

/* out[q][t][r], q < n_fours, `fours` apart: element 4q + r of row t of src. */
VEC_FN void gemm_copy_fours(const float *src, size_t row, uint32_t length, float *out, size_t fours,
                            const unsigned n_fours)
{
    for (uint32_t t = 0; t < length; t++) {
#pragma GCC unroll 4
        for (unsigned q = 0; q < n_fours; q++) {
            memcpy(out + q * fours + (size_t)t * 4, src + t * row + q * 4, 4 * sizeof(float));
        }
    }
}

/* Rows [i, i + n), n <= 4, missing rows are zeros. */
static void gemm_pack_some(const GemmSegment *g, const float *a, uint32_t n, uint32_t length,
                           float *out)
{
    for (uint32_t t = 0; t < length; t++) {
        for (uint32_t r = 0; r < 4; r++) {
            out[(size_t)t * 4 + r] = r < n ? a[r * g->a_row + t * g->a_step] : 0.0f;
        }
    }
}

/* Rows [0, m) of a, as [m/4][steps][4]; there is a whole number of tiles. */
static void gemm_pack_a(const GemmWalk *w, const GemmPiece *piece)
{
    const GemmSegment *g = piece->g;
    const float *a = g->a + w->i0 * g->a_row + piece->t * g->a_step;
    const uint32_t tiles = (w->m + GEMM_MR - 1) / GEMM_MR * GEMM_MR, length = piece->length;
    const size_t fours = (size_t)w->steps * 4;
    float *out = w->pack_a + (size_t)piece->at * 4;
    uint32_t i = 0;
    for (; g->a_step != 1 && g->a_row == 1 && i + 16 <= w->m; i += 16, out += 4 * fours) {
        gemm_copy_fours(a + i, g->a_step, length, out, fours, 4); /* a whole line at a time */
    }
    for (; i + 4 <= w->m; i += 4, out += fours) {
        const float *src = a + i * g->a_row;
        if (g->a_step == 1) {
            turn_rows_4(src, g->a_row, length, out);
        } else if (g->a_row == 1) {
            gemm_copy_fours(src, g->a_step, length, out, fours, 1);
        } else {
            gemm_pack_some(g, src, 4, length, out);
        }
    }
    for (; i < tiles; i += 4, out += fours) {
        gemm_pack_some(g, a + i * g->a_row, i < w->m ? w->m - i : 0, length, out);
    }
}

/* Columns [j, j + n) of the block of b, as [n/NR][steps][NR]; missing columns are zeros. */
static void gemm_pack_b(const GemmWalk *w, const GemmPiece *piece, uint32_t j, uint32_t n,
                        float *to_b)
{
    const GemmSegment *g = piece->g;
    const float *b = g->b + (w->j0 + j) * g->b_column + piece->t * g->b_step;
    const uint32_t length = piece->length;
    const size_t panel = (size_t)w->steps * GEMM_NR;
    float *out = to_b + (size_t)piece->at * GEMM_NR;
    if (g->b_column != 1) {
        for (uint32_t c = 0; c < n; c += 8) {
            turn_columns_8(b + c * g->b_column, g->b_column, n - c < 8 ? n - c : 8, length,
                           out + c / GEMM_NR * panel + c % GEMM_NR, GEMM_NR);
        }
        for (uint32_t c = (n + 7) / 8 * 8; c % GEMM_NR != 0; c += 8) {
            turn_columns_8(NULL, 0, 0, length, out + c / GEMM_NR * panel + c % GEMM_NR, GEMM_NR);
        }
        return;
    }
    for (uint32_t t = 0; t < length; t++) {
        const float *row = b + t * g->b_step;
        float *to = out + (size_t)t * GEMM_NR;
        uint32_t c = 0;
        for (; c + GEMM_NR <= n; c += GEMM_NR, to += panel) {
            for (unsigned v = 0; v < 3; v++) {
                vec_store(to + v * VEC_LANES, vec_load(row + c + v * VEC_LANES));
            }
        }
        if (c < n) {
            memset(to, 0, GEMM_NR * sizeof(float));
            memcpy(to, row + c, (n - c) * sizeof(float));
        }
    }
}

/* ---- narrow operands ---- */

/* The zeros behind pieces of an odd length; packed: groups of `width` rows or columns. */
static void gemm_pad(const GemmWalk *w, float *packed, uint32_t n_groups, uint32_t width)
{
    for (uint32_t i = 0; i < w->n_pieces; i++) {
        const GemmPiece *piece = &w->pieces[i];
        for (uint32_t g = 0; piece->length % 2 != 0 && g < n_groups; g++) {
            const size_t step = (size_t)g * w->steps + piece->at + piece->length;
            memset(packed + step * width, 0, width * sizeof(float));
        }
    }
}

#ifdef GEMM_DOT
/* Bits of an even and an odd step as pairs. */
VEC_FN Vec gemm_pairs(Vec even, Vec odd)
{
    return vec_pairs_bf16(vec_bf16_bits(even), vec_bf16_bits(odd));
}
#endif

/* Groups of 4, [pairs][2][4]: in place, rounded. */
static void gemm_round_fours(float *x, size_t n_pairs)
{
    for (size_t i = 0; i < 8 * n_pairs; i += VEC_LANES) {
        const Vec v = vec_load(x + i);
#ifdef GEMM_DOT
        vec_store_even_fours(x + i / 2, gemm_pairs(v, vec_swap_fours(v)));
#else
        vec_store(x + i, vec_swap_fours(vec_round_bf16(v)));
#endif
    }
}

/* Panels, [pairs][2][GEMM_NR]. */
static void gemm_round_panels(float *x, size_t n_pairs)
{
    for (size_t i = 0; i < n_pairs; i++) {
        float *even = x + i * 2 * GEMM_NR, *odd = even + GEMM_NR;
        for (unsigned v = 0; v < GEMM_NR; v += VEC_LANES) {
            const Vec a = vec_load(even + v), b = vec_load(odd + v);
#ifdef GEMM_DOT
            vec_store(x + i * GEMM_NR + v, gemm_pairs(a, b));
#else
            vec_store(even + v, vec_round_bf16(b));
            vec_store(odd + v, vec_round_bf16(a));
#endif
        }
    }
}

static void gemm_round_f16(float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        row_store(x, i, n, vec_round_f16(row_load(x, i, n)));
    }
}

static void gemm_narrow(const GemmWalk *w, float *packed, uint32_t n_groups, uint32_t width)
{
    const uint32_t steps = n_groups * w->steps;
    if (w->kind == GEMM_F16) {
        gemm_round_f16(packed, steps * width);
    } else if (w->kind == GEMM_BF16) {
        gemm_pad(w, packed, n_groups, width);
        if (width == 4) {
            gemm_round_fours(packed, steps / 2);
        } else {
            gemm_round_panels(packed, steps / 2);
        }
    }
}

/* ---- tiles ---- */

/* Sums of a tile, rows ld apart. */
typedef struct GemmPlace {
    float *at;
    size_t ld;
} GemmPlace;

#define GEMM_EACH                                                                                  \
    _Pragma("GCC unroll 8") for (unsigned r = 0; r < GEMM_MR; r++)                                 \
        _Pragma("GCC unroll 3") for (unsigned v = 0; v < 3; v++)

#ifdef GEMM_DOT
#define GEMM_STEP gemm_dot
#else
#define GEMM_STEP vec_fma
#endif

/* A whole tile through a run: from a place or from +0; rows packed ones. */
VEC_FN void gemm_sums(const float *a, size_t a_four, const float *b, uint32_t length,
                      Vec acc[GEMM_MR][3])
{
    for (uint32_t t = 0; t < length; t++) {
        const Vec b0 = vec_load(b), b1 = vec_load(b + VEC_LANES), b2 = vec_load(b + 2 * VEC_LANES);
#pragma GCC unroll 8
        for (unsigned r = 0; r < GEMM_MR; r++) {
            const Vec x = vec_all(a[r / 4 * a_four + r % 4]);
            acc[r][0] = GEMM_STEP(x, b0, acc[r][0]);
            acc[r][1] = GEMM_STEP(x, b1, acc[r][1]);
            acc[r][2] = GEMM_STEP(x, b2, acc[r][2]);
        }
        a += 4;
        b += GEMM_NR;
    }
}

/* ---- flush modes (NUMERICS 10) ---- */

/* Leaves fold without flushing, their chains and units with it. */
VEC_FN bool gemm_folds_apart(const GemmWalk *w, const GemmRun *run)
{
    return w->kind == GEMM_BF16 && w->args->leaves && run->n_merges > 0;
}

/* The next tile's rows of c. */
VEC_FN void gemm_ask_rows(const float *row, size_t ld)
{
#pragma GCC unroll 8
    for (unsigned r = 0; r < GEMM_MR; r++, row += ld) {
        _mm_prefetch((const char *)row, _MM_HINT_T0);
        _mm_prefetch((const char *)(row + GEMM_NR - 1), _MM_HINT_T0);
    }
}

/* A tile through a run; slot: its first level's; below: where c goes on. */
static void gemm_tile(const GemmWalk *w, const GemmRun *run, const float *a, const float *b,
                      GemmPlace c, float *slot, const float *below)
{
    Vec acc[GEMM_MR][3];
    slot += run->level * w->level_floats;
    if (run->from_zero) {
        GEMM_EACH
        {
            acc[r][v] = vec_zero();
        }
    } else {
        const GemmPlace own = run->reads_c ? c : (GemmPlace){slot, GEMM_NR};
        GEMM_EACH
        {
            acc[r][v] = vec_load(own.at + r * own.ld + v * VEC_LANES);
        }
    }
    if (run->writes_c) {
        gemm_ask_rows(below, w->args->ld);
    }
    gemm_sums(a, (size_t)w->rows * 4, b, run->length, acc);
    const bool apart = gemm_folds_apart(w, run);
    if (apart) {
        GEMM_EACH
        {
            vec_done(&acc[r][v]);
        }
        flush_set_modes(w->modes);
    }
    for (uint32_t k = 0; k < run->n_merges; k++) {
        slot -= w->level_floats;
        GEMM_EACH
        {
            acc[r][v] = vec_add(vec_load(slot + r * GEMM_NR + v * VEC_LANES), acc[r][v]);
        }
    }
    const GemmPlace to = run->writes_c ? c : (GemmPlace){slot, GEMM_NR};
    GEMM_EACH
    {
        vec_store(to.at + r * to.ld + v * VEC_LANES, acc[r][v]);
    }
    if (apart) {
        flush_set_modes(w->modes | FLUSH_MODES);
    }
}

/* A tile that c has only a part of meets c by way of a whole one. */
static void gemm_edge(const GemmWalk *w, const GemmRun *run, const float *a, const float *b,
                      GemmPlace c, float *slot, uint32_t rows, uint32_t columns)
{
    float whole[GEMM_MR][GEMM_NR] = {{0}};
    for (uint32_t r = 0; run->reads_c && r < rows; r++) {
        memcpy(whole[r], c.at + r * c.ld, columns * sizeof(float));
    }
    gemm_tile(w, run, a, b, (GemmPlace){whole[0], GEMM_NR}, slot, c.at);
    for (uint32_t r = 0; run->writes_c && r < rows; r++) {
        memcpy(c.at + r * c.ld, whole[r], columns * sizeof(float));
    }
}

/* ---- the walk ---- */

static void gemm_end_unit(GemmWalk *w, GemmRun *run, TreeStep step)
{
    run->n_merges = step.n_merges;
    run->writes_c |= step.emit != 0;
    w->depth += 1u - step.n_merges;
    if (step.emit) {
        w->depth--;
        w->emitted++;
    }
    w->begun = false;
}

/* Steps of a piece with its padding. */
VEC_FN uint32_t gemm_padded(const GemmWalk *w, uint32_t length)
{
    return w->kind == GEMM_BF16 ? (length + 1) / 2 * 2 : length;
}

/* The next chunk; false at the end. */
static bool gemm_next_chunk(GemmWalk *w)
{
    const GemmArgs *args = w->args;
    GemmRun *run = NULL; /* that has not ended */
    w->n_pieces = w->n_runs = w->steps = 0;
    while (w->segment < args->n_segments && w->n_pieces < GEMM_PIECES) {
        const GemmSegment *g = &args->segments[w->segment];
        const uint32_t rest = g->length - w->t, room = GEMM_K - w->steps,
                       take = rest < room ? rest : room;
        if (rest > 0 && room == 0) {
            break;
        }
        if (run == NULL) {
            run = &w->runs[w->n_runs++];
            *run = (GemmRun){.at = w->steps / GEMM_STEPS_A_ROW,
                             .from_zero = !w->begun,
                             .reads_c = !w->is_cut,
                             .writes_c = !w->is_cut,
                             .level = (uint8_t)w->depth,
                             .c = args->c + args->subtree_stride * w->emitted};
        }
        w->pieces[w->n_pieces++] = (GemmPiece){g, w->t, take, w->steps};
        run->length += gemm_padded(w, take) / GEMM_STEPS_A_ROW;
        w->steps += gemm_padded(w, take);
        w->t += take;
        w->begun = true;
        if (take == rest) {
            w->segment++;
            w->t = 0;
            if (!g->continues) {
                gemm_end_unit(w, run, g->step);
                run = NULL;
            }
        }
    }
    w->rows = w->steps / GEMM_STEPS_A_ROW;
    return w->n_runs > 0;
}

/* What is packed next, asked for while tiles are computed: rows of lines, some at each tile. */
typedef struct GemmAhead {
    const char *row;
    size_t stride;
    uint32_t n_rows, lines, line;
} GemmAhead;

/* n rows or columns of an operand, `outer` apart, of `steps` steps. */
VEC_FN GemmAhead gemm_ahead_of(const float *x, size_t outer, size_t step, uint32_t n,
                               uint32_t steps)
{
    const bool along = outer != 1; /* a row of memory is one of them */
    return (GemmAhead){.row = (const char *)x,
                       .stride = (along ? outer : step) * sizeof(float),
                       .n_rows = along ? n : steps,
                       .lines = ((along ? steps : n) * (uint32_t)sizeof(float) + 63) / 64};
}

/* Columns from j on, of this chunk; at the block's end the next chunk's first ones, or, where one
 * chunk is all, the next rows of a. */
static GemmAhead gemm_ahead(const GemmWalk *w, uint32_t j)
{
    const bool same = j < w->n && !w->is_packed;
    if (!same && w->is_one) {
        const GemmSegment *g = w->pieces[0].g;
        const uint32_t i = w->i0 + GEMM_M, some = w->args->m - i;
        return i >= w->args->m || w->n_pieces > 1
                   ? (GemmAhead){0}
                   : gemm_ahead_of(g->a + i * g->a_row, g->a_row, g->a_step,
                                   some < GEMM_M ? some : GEMM_M, g->length);
    }
    if (!same && w->segment == w->args->n_segments) {
        return (GemmAhead){0};
    }
    const GemmSegment *g = same ? w->pieces[0].g : &w->args->segments[w->segment];
    const uint32_t t = same ? w->pieces[0].t : w->t, rest = g->length - t, first = same ? j : 0,
                   some = w->n - first;
    return gemm_ahead_of(g->b + (w->j0 + first) * g->b_column + t * g->b_step, g->b_column,
                         g->b_step, some < GEMM_N_PACKED ? some : GEMM_N_PACKED,
                         rest < GEMM_K ? rest : GEMM_K);
}

VEC_FN void gemm_ask(GemmAhead *ahead)
{
    for (unsigned i = 0; i < GEMM_LINES_A_TILE && ahead->n_rows > 0; i++) {
        _mm_prefetch(ahead->row + (size_t)ahead->line * 64, _MM_HINT_T1);
        if (++ahead->line == ahead->lines) {
            ahead->line = 0;
            ahead->row += ahead->stride;
            ahead->n_rows--;
        }
    }
}

/* A tile through all runs of the chunk. */
static void gemm_runs(const GemmWalk *w, const float *tile, const float *panel, uint32_t i,
                      uint32_t j, uint32_t columns)
{
    const uint32_t rows = w->m - i < GEMM_MR ? w->m - i : GEMM_MR;
    const size_t number = (size_t)(j / GEMM_NR) * (GEMM_M / GEMM_MR) + i / GEMM_MR;
    float *slot = w->slots + (w->is_one ? 0 : number * GEMM_TILE);
    for (uint32_t k = 0; k < w->n_runs; k++) {
        const GemmRun *run = &w->runs[k];
        const float *a = tile + (size_t)run->at * 4, *b = panel + (size_t)run->at * GEMM_NR;
        const GemmPlace c = {run->c + (w->i0 + i) * w->args->ld + w->j0 + j, w->args->ld};
        if (rows == GEMM_MR && columns == GEMM_NR) {
            gemm_tile(w, run, a, b, c, slot, c.at + GEMM_MR * c.ld);
        } else {
            gemm_edge(w, run, a, b, c, slot, rows, columns);
        }
    }
}

/* Columns [j, j + n) of the block; b: packed. */
static void gemm_multiply(const GemmWalk *w, const float *b, uint32_t j, uint32_t n)
{
    GemmAhead ahead = gemm_ahead(w, j + n);
    for (uint32_t c = 0; c < n; c += GEMM_NR) {
        const float *panel = b + (size_t)c * w->rows;
        for (uint32_t i = 0; i < w->m; i += GEMM_MR) {
            gemm_ask(&ahead);
            gemm_runs(w, w->pack_a + (size_t)i * w->rows, panel, i, j + c,
                      n - c < GEMM_NR ? n - c : GEMM_NR);
        }
    }
}

static void gemm_block(GemmWalk *w)
{
    w->segment = w->t = w->depth = w->emitted = 0;
    w->begun = w->args->accumulate;
    while (gemm_next_chunk(w)) {
        for (uint32_t k = 0; k < w->n_pieces; k++) {
            gemm_pack_a(w, &w->pieces[k]);
        }
        gemm_narrow(w, w->pack_a, (w->m + GEMM_MR - 1) / GEMM_MR * (GEMM_MR / 4), 4);
        for (uint32_t j = 0; j < w->n; j += GEMM_N_PACKED) {
            const uint32_t n = w->n - j < GEMM_N_PACKED ? w->n - j : GEMM_N_PACKED;
            float *b = w->pack_b + (w->is_one ? (size_t)j * GEMM_K : 0);
            for (uint32_t k = 0; k < w->n_pieces && !w->is_packed; k++) {
                gemm_pack_b(w, &w->pieces[k], j, n, b);
            }
            if (!w->is_packed) {
                gemm_narrow(w, b, (n + GEMM_NR - 1) / GEMM_NR, GEMM_NR);
            }
            gemm_multiply(w, b, j, n);
        }
    }
}

/* Whether units fold, and whether the first chunk will be the last. */
static void gemm_survey(GemmWalk *w)
{
    uint32_t n_units = 0, steps = 0;
    for (uint32_t s = 0; s < w->args->n_segments; s++) {
        const GemmSegment *g = &w->args->segments[s];
        n_units += !g->continues;
        steps += g->length <= GEMM_K ? gemm_padded(w, g->length) : GEMM_K + 1;
    }
    w->is_cut = n_units > 1;
    w->is_one = steps <= GEMM_K && w->args->n_segments <= GEMM_PIECES;
}

static void gemm_all(const GemmArgs *args, GemmKind kind, unsigned modes)
{
    GemmWalk w = {.args = args,
                  .kind = kind,
                  .modes = modes,
                  .pack_a = args->scratch,
                  .pack_b = args->scratch + (size_t)GEMM_M * GEMM_K};
    gemm_survey(&w);
    const uint32_t most = w.is_cut && !w.is_one ? GEMM_N_CUT : GEMM_N_WHOLE;
    w.slots = w.pack_b + (size_t)(w.is_one ? GEMM_N_WHOLE : GEMM_N_PACKED) * GEMM_K;
    w.level_floats = w.is_one ? GEMM_TILE : (size_t)GEMM_M * GEMM_N_CUT;
    for (w.j0 = 0; w.j0 < args->n; w.j0 += most) {
        w.n = args->n - w.j0 < most ? args->n - w.j0 : most;
        w.is_packed = false;
        for (w.i0 = 0; w.i0 < args->m; w.i0 += GEMM_M) {
            w.m = args->m - w.i0 < GEMM_M ? args->m - w.i0 : GEMM_M;
            gemm_block(&w);
            w.is_packed = w.is_one;
        }
    }
}

static void gemm_bf16_vector(const GemmArgs *args)
{
    const unsigned modes = _mm_getcsr();
    flush_set_modes(modes | FLUSH_MODES);
    gemm_all(args, GEMM_BF16, modes);
    flush_set_modes(modes);
}

#ifndef GEMM_DOT
static void gemm_vector(const GemmArgs *args)
{
    gemm_all(args, GEMM_F32, 0);
}

static void gemm_f16_vector(const GemmArgs *args)
{
    gemm_all(args, GEMM_F16, 0);
}
#endif
