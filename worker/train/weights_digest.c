#include "worker/train/weights_digest.h"

static Hash128 tile_hash(const Parameters *weights, const Tile *tile)
{
    const size_t ld = weights->holding->rects[tile->tensor].n_cols;
    const float *x = weights->floats +
                     holding_at(weights->holding, tile->tensor, tile->rect.row0, tile->rect.col0);
    Hasher *h = hasher_new();
    for (uint32_t r = 0; r < tile->rect.n_rows; r++) { /* x86: little-endian already */
        hasher_update(h, x + r * ld, tile->rect.n_cols * sizeof(float));
    }
    const Hash128 hash = hasher_finish(h);
    hasher_free(h);
    return hash;
}

static Hash128 fold(const GArray *tiles, const Hash128 *hashes)
{
    Hasher *all = hasher_new(), *tensor = hasher_new();
    for (uint32_t i = 0; i < tiles->len; i++) {
        const Tile *tile = &g_array_index(tiles, Tile, i);
        hasher_update(tensor, hashes[i].bytes, sizeof hashes[i].bytes);
        if (i + 1 == tiles->len || tile[1].tensor != tile->tensor) {
            const Hash128 whole = hasher_finish(tensor);
            hasher_update(all, whole.bytes, sizeof whole.bytes);
            hasher_free(tensor);
            tensor = hasher_new();
        }
    }
    const Hash128 digest = hasher_finish(all);
    hasher_free(tensor);
    hasher_free(all);
    return digest;
}

bool weights_digest(TrainLinks *l, const Ownership *o, const Parameters *weights, Hash128 *out,
                    GError **error)
{
    g_autofree Hash128 *hashes = g_new0(Hash128, o->tiles->len);
    for (uint32_t t = 0; t < o->tiles->len; t++) {
        if (ownership_counts(o, t)) {
            hashes[t] = tile_hash(weights, &g_array_index(o->tiles, Tile, t));
        }
    }
    if (!exchange_tiles(l, o, hashes, sizeof *hashes, error)) {
        return false;
    }
    *out = fold(o->tiles, hashes);
    return true;
}
