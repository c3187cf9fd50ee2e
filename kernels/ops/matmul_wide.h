/* The walk of products of many rows: a block of rows at a time, so that its activations stay in the
 * second-level cache, and for each WIDE_PANELS panels a chunk of k unpacked once for all rows of
 * the block. The order of every sum is that of matmul_drive.h: the same bits. Internal to kernels/.
 * A variant says before it includes this how many panels its tiles take at once (WIDE_PANELS) and
 * what an unpacked chunk of one of them may take of the first-level cache (WIDE_SCRATCH_BYTES). */
#pragma once

#include "kernels/ops/matmul_drive.h"

#define WIDE_ROWS_LIMIT 128u /* rows of a block */
#ifndef WIDE_ACT_BYTES
#define WIDE_ACT_BYTES (512u * 1024u) /* what its activations may take of the cache */
#endif
#ifndef WIDE_PANELS
#define WIDE_PANELS 1u
#define WIDE_SCRATCH_BYTES (12u * 1024u)
#endif
#ifndef WIDE_AHEAD_LOCALITY
#define WIDE_AHEAD_LOCALITY 2
#endif
#define WIDE_TILE_FLOATS (WIDE_PANELS * ACT_ROW_GROUP * PANEL_ROWS) /* of a group */

/* Records of a row of units: what is unpacked at once. A unit that does not fit is several chunks
 * of one run each. */
#define WIDE_RUNS_LIMIT 24u

typedef struct WideRun {
    uint16_t n_records;
    uint16_t n_merges; /* so often the level below is then added from the left */
} WideRun;

typedef struct WideChunk {
    uint32_t n_records, n_runs;
    bool fresh; /* the first run begins at +0, not at what stands on its level; the others do */
    WideRun runs[WIDE_RUNS_LIMIT];
} WideChunk;

/* n_records of one panel into the type's own form. */
typedef void (*UnpackFn)(const uint8_t *w, uint32_t n_records, uint8_t *scratch);
/* The runs of a chunk, from the scratches (WIDE_SCRATCH_BYTES apart, a panel each) times the R rows
 * of the group, record by record: the first one's sums, [panel][row][lane], go to `level`, each
 * other's to the level above where the one before ended up. */
typedef void (*WideTileFn)(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                           float *level);

/* The lines of memory that follow a chunk of each panel, for the one that is unpacked next: asked
 * for beside the products, a group's share at a time, for unpacking alone waits for memory as long
 * as reading takes. Past the end of the matrix a prefetch does nothing. */
typedef struct WideAhead {
    const uint8_t *at, *end; /* of the first panel */
    uint32_t share;          /* bytes, of whole lines */
} WideAhead;

static inline WideAhead wide_ahead_of(const uint8_t *chunk, size_t bytes, uint32_t n_groups)
{
    const uint32_t n_lines = (uint32_t)(bytes + 63) / 64;
    return (WideAhead){.at = chunk + bytes,
                       .end = chunk + bytes + (size_t)n_lines * 64,
                       .share = (n_lines + n_groups - 1) / n_groups * 64};
}

/* The next group's share. */
static inline void wide_ahead(WideAhead *ahead, size_t panel_bytes, uint32_t n_panels)
{
    const uint8_t *end = ahead->at + ahead->share;
    for (; ahead->at < end && ahead->at < ahead->end; ahead->at += 64) {
        for (uint32_t p = 0; p < (WIDE_PANELS == 1 ? 1 : n_panels); p++) {
            __builtin_prefetch(ahead->at + p * panel_bytes, 0, WIDE_AHEAD_LOCALITY);
        }
    }
}

/* unpack, and four rows of the first group meanwhile (one panel): storing quants and multiplying
 * them go to different ports. */
typedef void (*WideFirstFn)(const uint8_t *w, uint8_t *scratch, const uint8_t *act,
                            const WideChunk *chunk, float *level);

/* Two groups of four rows at once, the second's activations and levels so many bytes and floats
 * behind the first's. */
typedef void (*WidePairFn)(const uint8_t *scratch, const uint8_t *act, size_t act_apart,
                           const WideChunk *chunk, float *level, size_t level_apart);

typedef struct WideKernel {
    UnpackFn unpack;
    WideTileFn row1[WIDE_PANELS], row4[WIDE_PANELS]; /* [panels - 1] */
    WideFirstFn first4;                              /* NULL: it does not pay */
    WidePairFn row8[WIDE_PANELS];                    /* NULL: as two groups */
    uint32_t scratch_record_bytes;
    uint32_t rows_from; /* fewer rows go the other way */
} WideKernel;

/* Where a walk along the units stands. */
typedef struct WideWalk {
    uint32_t unit, done; /* records of the unit that are behind */
    uint32_t level;      /* of the stack, for the next run */
} WideWalk;

/* The next chunk, which ends with the unit that ends a subtree. Parts of a unit are alike: each
 * asks for as many lines as the next one has. Returns whether a subtree is to be handed over. */
static inline bool wide_next(const MatmulArgs *a, uint32_t most, WideWalk *walk, WideChunk *chunk)
{
    const uint32_t k = record_shape(a->w->type).k;
    chunk->n_records = chunk->n_runs = 0;
    chunk->fresh = walk->done == 0;
    while (walk->unit < a->n_units) {
        const MatmulUnit *unit = &a->units[walk->unit];
        const uint32_t all = (unit->n_in + k - 1) / k, left = all - walk->done;
        WideRun *run = &chunk->runs[chunk->n_runs];
        if (chunk->n_runs > 0 &&
            (left > most - chunk->n_records || chunk->n_runs == WIDE_RUNS_LIMIT)) {
            return false;
        }
        const uint32_t parts = (left + most - 1) / most;
        *run = (WideRun){(uint16_t)((left + parts - 1) / parts), 0};
        chunk->n_records += run->n_records;
        chunk->n_runs++;
        if (parts > 1) {
            walk->done += run->n_records;
            return false;
        }
        run->n_merges = unit->step.n_merges;
        assert(walk->level < TREE_STACK && walk->level >= run->n_merges);
        walk->level += 1 - run->n_merges;
        walk->unit++;
        walk->done = 0;
        if (unit->step.emit) {
            walk->level--;
            return true;
        }
    }
    return false;
}

/* The panels of a tile: where the first one's records are, and how many. */
typedef struct WidePanels {
    const uint8_t *w;
    size_t panel_bytes;
    uint32_t n;
} WidePanels;

/* Of a group: what waits, level by level. */
typedef float WideStack[TREE_STACK][WIDE_TILE_FLOATS];

static inline void wide_unpack(const WideKernel *kernel, const WidePanels *from,
                               const WideChunk *chunk, uint8_t *scratch)
{
    for (uint32_t p = 0; p < from->n; p++) {
        kernel->unpack(from->w + p * from->panel_bytes, chunk->n_records,
                       scratch + p * WIDE_SCRATCH_BYTES);
    }
}

/* A chunk of `from` times the groups of a block of rows. */
typedef struct WideStep {
    WidePanels from;
    WideChunk chunk;
    uint32_t panel; /* the first one's number */
    size_t chunk_bytes, act_row_bytes;
    size_t act_k_bytes;  /* of a row's activations that lie before the chunk */
    uint32_t level;      /* where its first run's sums go */
    uint32_t emit_level; /* where the sums of a subtree end up, which go to `out` */
    float *out;          /* NULL: none ends here */
} WideStep;

/* The lines that a group's sums will be written to: with several panels they are many at once. */
static inline void wide_out_ahead(const MatmulArgs *a, const WideStep *step, uint32_t g)
{
    const uint32_t row0 = g * ACT_ROW_GROUP, left = a->rows - row0;
    for (uint32_t r = 0; r < ACT_ROW_GROUP && r < left; r++) {
        const float *row = step->out + (row0 + r) * a->ld + step->panel * PANEL_ROWS;
        for (uint32_t p = 0; p < step->from.n; p++) {
            __builtin_prefetch(row + p * PANEL_ROWS, 1);
        }
    }
}

static inline void wide_step(const MatmulArgs *a, const WideKernel *kernel, const WideStep *step,
                             uint8_t *scratch, uint32_t group0, uint32_t group1, WideStack *stacks)
{
    const WidePanels *from = &step->from;
    const WideChunk *chunk = &step->chunk;
    const WidePairFn row8 = kernel->row8[from->n - 1];
    WideAhead ahead = wide_ahead_of(from->w, step->chunk_bytes, group1 - group0);
    for (uint32_t g = group0, n; g < group1; g += n) {
        const uint32_t R = act_group_rows(a->rows, g), row0 = g * ACT_ROW_GROUP;
        const uint8_t *act =
            (const uint8_t *)a->act + row0 * step->act_row_bytes + step->act_k_bytes * R;
        float(*stack)[WIDE_TILE_FLOATS] = stacks[g - group0];
        n = row8 && R != 1 && g + 1 < group1 && act_group_rows(a->rows, g + 1) != 1 ? 2 : 1;
        for (uint32_t i = 0; i < n; i++) {
            wide_ahead(&ahead, from->panel_bytes, from->n);
            if (WIDE_PANELS > 1 && step->out) {
                wide_out_ahead(a, step, g + i);
            }
        }
        if (g == group0 && n == 1 && R != 1 && kernel->first4 != NULL) {
            kernel->first4(from->w, scratch, act, chunk, stack[step->level]);
        } else {
            if (g == group0) {
                wide_unpack(kernel, from, chunk, scratch);
            }
            if (n == 2) {
                row8(scratch, act, ACT_ROW_GROUP * step->act_row_bytes, chunk, stack[step->level],
                     sizeof(WideStack) / sizeof(float));
            } else {
                (R == 1 ? kernel->row1 : kernel->row4)[from->n - 1](scratch, act, chunk,
                                                                    stack[step->level]);
            }
        }
        if (step->out) {
            for (uint32_t i = 0; i < n; i++, stack += TREE_STACK) {
                const uint32_t at = row0 + i * ACT_ROW_GROUP;
                tile_write(a, stack[step->emit_level], R, step->panel, from->n, at,
                           a->rows - at < R ? a->rows - at : R, step->out);
            }
        }
    }
}

/* n panels x the groups [group0, group1): all units, folded. */
static inline void wide_panels(const MatmulArgs *a, const WideKernel *kernel, uint32_t panel,
                               uint32_t n, uint32_t group0, uint32_t group1, WideStack *stacks)
{
    _Alignas(64) uint8_t scratch[WIDE_PANELS * WIDE_SCRATCH_BYTES];
    const RecordShape record = record_shape(a->w->type);
    const ActKind kind = act_kind_of(a->w->type);
    const size_t record_act_bytes = record.k / act_tile_k(kind) * act_tile_row_bytes(kind);
    const uint32_t most = WIDE_SCRATCH_BYTES / kernel->scratch_record_bytes;
    float *out = a->out;
    WideWalk walk = {0};
    WideStep step;
    step.from = (WidePanels){a->w->data + (size_t)panel * a->w->panel_bytes, a->w->panel_bytes, n};
    step.panel = panel;
    step.act_row_bytes = act_row_bytes(kind, a->w->n_in);
    step.act_k_bytes = 0;
    while (walk.unit < a->n_units) {
        step.level = walk.level;
        step.out = wide_next(a, most, &walk, &step.chunk) ? out : NULL;
        step.emit_level = walk.level;
        step.chunk_bytes = (size_t)step.chunk.n_records * record.bytes;
        wide_step(a, kernel, &step, scratch, group0, group1, stacks);
        out += step.out ? a->subtree_stride : 0;
        step.act_k_bytes += step.chunk.n_records * record_act_bytes;
        step.from.w += step.chunk_bytes;
    }
}

/* Groups of a block: as many as the cache holds, between 8 and the limit. */
static inline uint32_t wide_groups(const MatmulArgs *a)
{
    const size_t group_bytes = ACT_ROW_GROUP * act_row_bytes(act_kind_of(a->w->type), a->w->n_in);
    const uint32_t most = WIDE_ROWS_LIMIT / ACT_ROW_GROUP;
    const size_t fit = WIDE_ACT_BYTES / group_bytes;
    return fit > most ? most : fit < 8 ? 8 : (uint32_t)fit;
}

/* Of so many panels, those of the next tile: none is left alone. */
static inline uint32_t wide_at_once(uint32_t left)
{
    return left == WIDE_PANELS + 1 && WIDE_PANELS > 2 ? 2 : left < WIDE_PANELS ? left : WIDE_PANELS;
}

static inline void matmul_drive_wide(const MatmulArgs *a, const WideKernel *kernel)
{
    _Alignas(64) WideStack stacks[WIDE_ROWS_LIMIT / ACT_ROW_GROUP];
    const uint32_t n_groups = act_groups(a->rows), step = wide_groups(a);
    for (uint32_t g = 0; g < n_groups; g += step) {
        const uint32_t end = n_groups - g < step ? n_groups : g + step;
        for (uint32_t panel = a->panel0, n; panel < a->panel1; panel += n) {
            n = wide_at_once(a->panel1 - panel);
            wide_panels(a, kernel, panel, n, g, end, stacks);
        }
    }
}
