/* The walk that every matmul shares: panels, row groups, units and the tree. A type's kernel is two
 * tile functions, which do one unit of one tile. Internal to kernels/; included by each variant, so
 * that it is compiled with that variant's flags. */
#pragma once

#include "kernels/ops/packed.h"

#include <assert.h>

#define TILE_PANELS_LIMIT 2u
#define TILE_FLOATS (TILE_PANELS_LIMIT * ACT_ROW_GROUP * PANEL_ROWS)
/* log2(TREE_LEAVES_LIMIT) + 1 waiting sums, and the one that is being made. */
#define TREE_STACK 8u

/* Where the sums of a unit go: a level of the stack of waiting ones, [p][row][lane]. n_merges
 * levels below, TILE_FLOATS apart, are added from the left, one after the other; what comes out
 * stands on the lowest of them. */
typedef struct TileTo {
    float *at;
    unsigned n_merges;
} TileTo;

/* Of `panels` panels (w + p * w_stride) and the R rows of the group, over n_records of k. */
typedef void (*TileFn)(const uint8_t *w, size_t w_stride, const uint8_t *act, uint32_t n_records,
                       TileTo to);

typedef struct TileKernel {
    TileFn row1, row4;
    uint8_t panels1, panels4; /* panels that each takes at once: 1 or 2 */
} TileKernel;

/* The merges of a tile function that stored its n sums at to.at. */
static inline void tile_merge(TileTo to, unsigned n)
{
    for (; to.n_merges > 0; to.n_merges--, to.at -= TILE_FLOATS) {
        float *left = to.at - TILE_FLOATS;
        for (unsigned i = 0; i < n; i++) {
            left[i] = left[i] + to.at[i];
        }
    }
}

/* What is adjacent in memory is written together. */
static inline void tile_write(const MatmulArgs *a, const float *tile, uint32_t tile_rows,
                              uint32_t panel, uint32_t n_panels, uint32_t row0, uint32_t n_rows,
                              float *out)
{
    const uint32_t n0 = panel * PANEL_ROWS, before = (n_panels - 1) * PANEL_ROWS;
    const uint32_t left = a->w->n_out - n0 - before; /* outputs of the last panel */
    const float *last = tile + before * tile_rows;
    float *to = out + row0 * a->ld + n0;
    for (uint32_t r = 0; r < n_rows; r++, to += a->ld) {
        for (uint32_t p = 0; p < n_panels - 1; p++) {
            __builtin_memcpy(to + p * PANEL_ROWS, tile + (p * tile_rows + r) * PANEL_ROWS,
                             PANEL_ROWS * sizeof(float));
        }
        if (left >= PANEL_ROWS) {
            __builtin_memcpy(to + before, last + r * PANEL_ROWS, PANEL_ROWS * sizeof(float));
        } else {
            __builtin_memcpy(to + before, last + r * PANEL_ROWS, left * sizeof(float));
        }
    }
}

/* One tile: n panels from `panel` on (n <= at_once) and the rows of group g, all units, folded. */
static inline void matmul_tile(const MatmulArgs *a, TileFn kernel, uint32_t at_once, uint32_t panel,
                               uint32_t n, uint32_t g, float stack[TREE_STACK][TILE_FLOATS])
{
    const RecordShape record = record_shape(a->w->type);
    const ActKind kind = act_kind_of(a->w->type);
    const uint32_t R = act_group_rows(a->rows, g);
    const size_t record_act_bytes = record.k / act_tile_k(kind) * act_tile_row_bytes(kind);
    const uint32_t row0 = g * ACT_ROW_GROUP;
    const uint32_t n_rows = a->rows - row0 < R ? a->rows - row0 : R;
    /* A second panel that is not there aliases the first; what it gives is not written. */
    const size_t stride = n == at_once ? a->w->panel_bytes : 0;
    const uint8_t *w = a->w->data + (size_t)panel * a->w->panel_bytes;
    const uint8_t *act = (const uint8_t *)a->act + row0 * act_row_bytes(kind, a->w->n_in);
    float *out = a->out;
    uint32_t top = 0;

    for (uint32_t u = 0; u < a->n_units; u++) {
        const uint32_t n_records = (a->units[u].n_in + record.k - 1) / record.k;
        const unsigned n_merges = a->units[u].step.n_merges;
        assert(top < TREE_STACK && top >= n_merges);
        kernel(w, stride, act, n_records, (TileTo){stack[top], n_merges});
        top += 1 - n_merges;
        w += (size_t)n_records * record.bytes;
        act += n_records * record_act_bytes * R;
        if (a->units[u].step.emit) {
            tile_write(a, stack[--top], R, panel, n, row0, n_rows, out);
            out += a->subtree_stride;
        }
    }
}

static inline void matmul_drive(const MatmulArgs *a, TileKernel kernel)
{
    _Alignas(64) float stack[TREE_STACK][TILE_FLOATS];
    const uint32_t n_groups = act_groups(a->rows);
    const uint32_t step = a->rows == 1 ? kernel.panels1 : kernel.panels4;

    for (uint32_t panel = a->panel0; panel < a->panel1; panel += step) {
        const uint32_t end = a->panel1 - panel < step ? a->panel1 : panel + step;
        for (uint32_t g = 0; g < n_groups; g++) {
            const bool single = act_group_rows(a->rows, g) == 1;
            const uint32_t at_once = single ? kernel.panels1 : kernel.panels4;
            for (uint32_t p = panel; p < end; p += at_once) {
                matmul_tile(a, single ? kernel.row1 : kernel.row4, at_once, p,
                            end - p < at_once ? end - p : at_once, g, stack);
            }
        }
    }
}
