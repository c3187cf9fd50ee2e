/* The walk of products of many rows: a block of rows at a time, so that its activations stay in the
 * second-level cache, and for each panel a chunk of k unpacked once for all rows of the block. The
 * order of every sum is that of matmul_drive.h: the same bits. Internal to kernels/. */
#pragma once

#include "kernels/ops/matmul_drive.h"

#define WIDE_ROWS_LIMIT 128u             /* rows of a block */
#define WIDE_ACT_BYTES (512u * 1024u)    /* what its activations may take of the cache */
#define WIDE_SCRATCH_BYTES (12u * 1024u) /* an unpacked chunk */
#ifndef WIDE_AHEAD_LOCALITY
#define WIDE_AHEAD_LOCALITY 2
#endif
#define WIDE_TILE_FLOATS (WIDE_ROWS_LIMIT * PANEL_ROWS)

/* n_records of one panel into the type's own form. */
typedef void (*UnpackFn)(const uint8_t *w, uint32_t n_records, uint8_t *scratch);

/* Where a group's sums begin and end. */
typedef struct WideTile {
    float *at;         /* [row][lane], a level of the stack */
    bool fresh;        /* they begin at +0, not at what stands there */
    unsigned n_merges; /* so often the level below is added from the left; the sum ends up there */
} WideTile;

/* tile += records of the scratch times the R rows of the group, record by record. */
typedef void (*WideTileFn)(const uint8_t *scratch, const uint8_t *act, uint32_t n_records,
                           WideTile tile);

/* The lines of memory that follow a chunk, for the one that is unpacked next: asked for beside the
 * products, a group's share at a time, for unpacking alone waits for memory as long as reading
 * takes. Past the end of the matrix a prefetch does nothing. */
typedef struct WideAhead {
    const uint8_t *at, *end;
    uint32_t share; /* bytes, of whole lines */
} WideAhead;

static inline WideAhead wide_ahead_of(const uint8_t *chunk, size_t bytes, uint32_t n_groups)
{
    const uint32_t n_lines = (uint32_t)(bytes + 63) / 64;
    return (WideAhead){.at = chunk + bytes,
                       .end = chunk + bytes + (size_t)n_lines * 64,
                       .share = (n_lines + n_groups - 1) / n_groups * 64};
}

/* The next group's share. */
static inline void wide_ahead(WideAhead *ahead)
{
    const uint8_t *end = ahead->at + ahead->share;
    for (; ahead->at < end && ahead->at < ahead->end; ahead->at += 64) {
        __builtin_prefetch(ahead->at, 0, WIDE_AHEAD_LOCALITY);
    }
}

/* unpack, and row4 of the first group meanwhile: storing quants and multiplying them go to
 * different ports. */
typedef void (*WideFirstFn)(const uint8_t *w, uint8_t *scratch, const uint8_t *act,
                            uint32_t n_records, WideTile tile);

typedef struct WideKernel {
    UnpackFn unpack;
    WideTileFn row1, row4;
    WideFirstFn first4; /* NULL: it does not pay */
    uint32_t scratch_record_bytes;
    uint32_t rows_from; /* fewer rows go the other way */
} WideKernel;

/* One group x a chunk, which the first one unpacks. */
static inline void wide_group(const WideKernel *kernel, const uint8_t *chunk, uint8_t *scratch,
                              const uint8_t *act, uint32_t n, WideTile tile, bool unpacks,
                              uint32_t R)
{
    if (unpacks && R != 1 && kernel->first4 != NULL) {
        kernel->first4(chunk, scratch, act, n, tile);
        return;
    }
    if (unpacks) {
        kernel->unpack(chunk, n, scratch);
    }
    (R == 1 ? kernel->row1 : kernel->row4)(scratch, act, n, tile);
}

/* One panel x the groups [group0, group1): one unit into the level `tile`, then its merges. */
static inline void wide_unit(const MatmulArgs *a, const WideKernel *kernel, const uint8_t *w,
                             uint32_t k_record, uint32_t n_records, uint32_t group0,
                             uint32_t group1, float *tile, unsigned n_merges)
{
    _Alignas(64) uint8_t scratch[WIDE_SCRATCH_BYTES];
    const RecordShape record = record_shape(a->w->type);
    const ActKind kind = act_kind_of(a->w->type);
    const size_t row_bytes = act_row_bytes(kind, a->w->n_in), tile_bytes = act_tile_row_bytes(kind);
    const uint32_t most = WIDE_SCRATCH_BYTES / kernel->scratch_record_bytes;
    /* Equal chunks: each asks for as many lines as the next one has. */
    const uint32_t n_chunks = (n_records + most - 1) / most;
    for (uint32_t c = 0; c < n_chunks; c++) {
        const uint32_t at = n_records * c / n_chunks, n = n_records * (c + 1) / n_chunks - at;
        const size_t chunk_bytes = (size_t)n * record.bytes;
        const uint8_t *chunk = w + (size_t)at * record.bytes;
        WideAhead ahead = wide_ahead_of(chunk, chunk_bytes, group1 - group0);
        for (uint32_t g = group0; g < group1; g++) {
            const uint32_t R = act_group_rows(a->rows, g);
            const uint8_t *act = (const uint8_t *)a->act + g * ACT_ROW_GROUP * row_bytes +
                                 (k_record + at) * tile_bytes * R;
            const WideTile to = {.at = tile + (g - group0) * ACT_ROW_GROUP * PANEL_ROWS,
                                 .fresh = c == 0,
                                 .n_merges = c + 1 == n_chunks ? n_merges : 0};
            wide_ahead(&ahead);
            wide_group(kernel, chunk, scratch, act, n, to, g == group0, R);
        }
    }
}

/* One panel x the groups [group0, group1): all units, folded. */
static inline void wide_panel(const MatmulArgs *a, const WideKernel *kernel, uint32_t panel,
                              uint32_t group0, uint32_t group1,
                              float stack[TREE_STACK][WIDE_TILE_FLOATS])
{
    const RecordShape record = record_shape(a->w->type);
    const uint8_t *w = a->w->data + (size_t)panel * a->w->panel_bytes;
    const uint32_t row0 = group0 * ACT_ROW_GROUP, end = group1 * ACT_ROW_GROUP;
    const uint32_t n_rows = (a->rows < end ? a->rows : end) - row0;
    uint32_t top = 0, k_record = 0;
    float *out = a->out;
    for (uint32_t u = 0; u < a->n_units; u++) {
        const uint32_t n_records = a->units[u].n_in / record.k;
        const unsigned n_merges = a->units[u].step.n_merges;
        assert(top < TREE_STACK && top >= n_merges);
        wide_unit(a, kernel, w, k_record, n_records, group0, group1, stack[top], n_merges);
        w += (size_t)n_records * record.bytes;
        k_record += n_records;
        top += 1 - n_merges;
        if (a->units[u].step.emit) {
            tile_write(a, stack[--top], n_rows, panel, 1, row0, n_rows, out);
            out += a->subtree_stride;
        }
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

static inline void matmul_drive_wide(const MatmulArgs *a, const WideKernel *kernel)
{
    _Alignas(64) float stack[TREE_STACK][WIDE_TILE_FLOATS];
    const uint32_t n_groups = act_groups(a->rows), step = wide_groups(a);
    for (uint32_t g = 0; g < n_groups; g += step) {
        for (uint32_t panel = a->panel0; panel < a->panel1; panel++) {
            wide_panel(a, kernel, panel, g, n_groups - g < step ? n_groups : g + step, stack);
        }
    }
}
