#include "worker/train/gradient_exchange.h"

#include <string.h>

LeafCuts leaf_cuts(uint32_t sequences, uint32_t n_leaves, uint32_t dp)
{
    LeafCuts c = {.n_leaves = n_leaves};
    for (uint64_t i = 0; i < n_leaves; i++) {
        const bool empty = i * sequences / n_leaves == (i + 1) * sequences / n_leaves;
        c.missing |= (uint64_t)empty << i;
    }
    for (uint32_t d = 0; d <= dp; d++) {
        c.cuts[d] = (uint32_t)((uint64_t)n_leaves * d / dp);
    }
    return c;
}

bool exchange_share(TrainLinks *l, const Ownership *o, Parameters *x, GError **error)
{
    TrainGroup *g = &l->data;
    for (uint32_t b = 0; g->turns.group != NULL && b < o->buckets->len; b++) {
        const Bucket *bucket = &g_array_index(o->buckets, Bucket, b);
        size_t sizes[PLAN_RANKS_LIMIT];
        void *out[PLAN_RANKS_LIMIT];
        for (uint32_t d = 0; d < g->n; d++) {
            sizes[d] = (bucket->first[d + 1] - bucket->first[d]) * sizeof(float);
            out[d] = x->floats + bucket->first[d];
        }
        const GroupWait wait = group_turn(&g->turns, "sharing what the owners updated");
        if (!train_links_check(
                l, g, group_all_gather(g->turns.group, &wait, out[g->rank], sizes, out), error)) {
            return false;
        }
    }
    return true;
}

/* ---- vectors of cut matrices ---- */

/* Elements of the vector that tensor rank r has the gradient of: of a KV head that several ranks
 * have, the one with its first query head. */
static uint32_t vector_begin(const Holding *h, TensorCut cut, uint32_t r)
{
    const ModelSpec *spec = h->spec;
    const uint32_t group = spec->n_heads / spec->n_kv_heads,
                   head = MIN(h->attn_cuts[r] * spec->attn_unit_heads, spec->n_heads);
    switch (cut) {
    case CUT_Q_UNITS:
        return head * spec->head_size;
    case CUT_KV_HEADS:
        return (head + group - 1) / group * spec->head_size;
    case CUT_FFN_ROWS:
        return MIN(h->ffn_cuts[r] * spec->ffn_unit_width, spec->ffn_width);
    default:
        return 0;
    }
}

bool exchange_has_vector(const Holding *h, uint32_t i, uint32_t r, uint32_t *first, uint32_t *last)
{
    const TensorSpec *t = &h->spec->tensors[i];
    if (t->rows > 1 || !holding_has(h, i)) {
        return false;
    }
    *first = vector_begin(h, t->cut, r);
    *last = vector_begin(h, t->cut, r + 1);
    return *first < *last;
}

size_t exchange_vector_floats(const Holding *h, uint32_t r)
{
    size_t n = 0;
    for (uint32_t i = 0; i < h->spec->n_tensors; i++) {
        uint32_t first, last;
        n += exchange_has_vector(h, i, r, &first, &last) ? last - first : 0;
    }
    return n;
}

/* Rank r's parts of all such vectors, packed, or back. */
static void pack_vectors(const Parameters *g, uint32_t r, float *packed, bool unpack)
{
    for (uint32_t i = 0; i < g->holding->spec->n_tensors; i++) {
        uint32_t first, last;
        if (exchange_has_vector(g->holding, i, r, &first, &last)) {
            float *at = g->tensors[i] + first;
            memcpy(unpack ? at : packed, unpack ? packed : at, (last - first) * sizeof *at);
            packed += last - first;
        }
    }
}

bool exchange_vectors(TrainLinks *l, Parameters *gradients, GError **error)
{
    TrainGroup *g = &l->tensor;
    size_t sizes[PLAN_RANKS_LIMIT], total = 0;
    float *parts[PLAN_RANKS_LIMIT];
    for (uint32_t r = 0; r < g->n; r++) {
        sizes[r] = exchange_vector_floats(gradients->holding, r) * sizeof(float);
        total += sizes[r];
    }
    g_autofree float *packed = g_malloc(MAX(total, 1));
    for (size_t r = 0, at = 0; r < g->n; at += sizes[r++] / sizeof(float)) {
        parts[r] = packed + at;
    }
    pack_vectors(gradients, g->rank, parts[g->rank], false);
    const GroupWait wait = group_turn(&g->turns, "gradients of biases");
    if (!train_links_check(
            l, g,
            group_all_gather(g->turns.group, &wait, parts[g->rank], sizes, (void *const *)parts),
            error)) {
        return false;
    }
    for (uint32_t r = 0; r < g->n; r++) {
        pack_vectors(gradients, r, parts[r], true);
    }
    return true;
}

/* ---- a tied embedding on two stages ---- */

bool exchange_tied(TrainLinks *l, const float *mine, size_t n, float *theirs, GError **error)
{
    TrainChannel *c = &l->tied;
    const uint32_t other = 1 - c->rank;
    const void *send[2] = {NULL, NULL};
    void *receive[2] = {NULL, NULL};
    size_t sizes[2] = {0, 0};
    send[other] = mine;
    receive[other] = theirs;
    sizes[other] = n * sizeof *mine;
    const GroupWait wait = group_turn(&c->turns, "gradients of the tied embedding");
    return train_links_check(
        l, c, group_all_to_all(c->turns.group, &wait, send, sizes, receive, sizes), error);
}

/* ---- of tiles ---- */

/* Packed by rank, in each in order of tiles; and back. */
static void pack_tiles(const Ownership *o, uint8_t *by_tile, size_t size, uint8_t *const *by_rank,
                       int only, bool unpack)
{
    size_t used[PLAN_RANKS_LIMIT] = {0};
    for (uint32_t t = 0; t < o->tiles->len; t++) {
        const uint16_t r = o->counted_by[t];
        uint8_t *packed = by_rank[r] + used[r], *plain = by_tile + t * size;
        used[r] += size;
        if (unpack) {
            memcpy(plain, packed, size);
        } else if (r == only) {
            memcpy(packed, plain, size);
        }
    }
}

bool exchange_tiles(TrainLinks *l, const Ownership *o, void *by_tile, size_t size, GError **error)
{
    if (l == NULL || l->world.turns.group == NULL) {
        return true;
    }
    TrainGroup *g = &l->world;
    g_autofree uint8_t *packed = g_malloc(o->tiles->len * size);
    size_t sizes[PLAN_RANKS_LIMIT] = {0}, at = 0;
    uint8_t *parts[PLAN_RANKS_LIMIT];
    for (uint32_t t = 0; t < o->tiles->len; t++) {
        sizes[o->counted_by[t]] += size;
    }
    for (uint32_t r = 0; r < g->n; at += sizes[r++]) {
        parts[r] = packed + at;
    }
    pack_tiles(o, by_tile, size, parts, (int)g->rank, false);
    const GroupWait wait = group_turn(&g->turns, "gathering what is known of tiles");
    if (!train_links_check(
            l, g,
            group_all_gather(g->turns.group, &wait, parts[g->rank], sizes, (void *const *)parts),
            error)) {
        return false;
    }
    pack_tiles(o, by_tile, size, parts, -1, true);
    return true;
}
