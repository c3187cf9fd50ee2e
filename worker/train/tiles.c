#include "worker/train/tiles.h"

enum { TILE_ROWS = 32, TILE_ELEMENTS = 1024 };

/* Rows that a tile must not cross the multiples of; 0 = none. */
static uint32_t row_edge(const ModelSpec *spec, TensorCut cut)
{
    switch (cut) {
    case CUT_Q_UNITS:
    case CUT_KV_HEADS:
        return spec->head_size;
    case CUT_FFN_ROWS:
        return spec->ffn_unit_width;
    case CUT_VOCAB:
        return VOCAB_CHUNK;
    default:
        return 0;
    }
}

static uint32_t column_step(const ModelSpec *spec, const TensorSpec *t)
{
    return t->rows == 1               ? TILE_ELEMENTS
           : t->cut == CUT_ATTN_UNITS ? spec->attn_unit_heads * spec->head_size
           : t->cut == CUT_FFN_COLS   ? spec->ffn_unit_width
                                      : t->columns;
}

static void add_tensor(const ModelSpec *spec, uint32_t index, GArray *tiles)
{
    const TensorSpec *t = &spec->tensors[index];
    const uint32_t edge = t->rows == 1 ? 0 : row_edge(spec, t->cut), step = column_step(spec, t);
    for (uint32_t row = 0; row < t->rows;) {
        uint32_t n_rows = MIN((uint32_t)TILE_ROWS, t->rows - row);
        if (edge != 0) {
            n_rows = MIN(n_rows, edge - row % edge);
        }
        for (uint32_t column = 0; column < t->columns; column += step) {
            const Tile tile = {index, {row, n_rows, column, MIN(step, t->columns - column)}};
            g_array_append_val(tiles, tile);
        }
        row += n_rows;
    }
}

GArray *tiles_of(const ModelSpec *spec)
{
    GArray *tiles = g_array_new(FALSE, FALSE, sizeof(Tile));
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        add_tensor(spec, i, tiles);
    }
    return tiles;
}
