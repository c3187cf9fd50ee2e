/* Holding: which part of a model's tensors one rank of a training layout has, and where it lies in
 * the rank's arena of floats: tensors in canonical order (NUMERICS 17), each part row-major, from a
 * multiple of 16 floats on. Immutable; any thread.
 *
 * Matrices are cut at units, KV heads and vocabulary chunks as the plan says (a KV head that
 * several ranks need is held by each); vectors are held whole, also where what they belong to is
 * cut: a tile of theirs (1,024 elements) may cross the cuts. */
#pragma once

#include "proto/plan/plan.h"

typedef struct Holding {
    const ModelSpec *spec; /* borrowed */
    uint32_t n_chunks;     /* of the stage's layers; one unless it is interleaved */
    struct HoldingChunk {
        uint32_t layer_first, n_layers;
    } chunks[PLAN_CHUNKS_LIMIT];
    bool is_first, is_last; /* stage: has the embedding (first chunk); head and loss (last) */
    uint32_t tp, rank;
    /* cuts among the stage's ranks: [tp + 1], attention and FFN units, vocabulary chunks */
    uint32_t attn_cuts[PLAN_RANKS_LIMIT + 1], ffn_cuts[PLAN_RANKS_LIMIT + 1],
        vocab_cuts[PLAN_RANKS_LIMIT + 1];
    /* own: heads, FFN columns, ids */
    uint32_t head_first, n_heads, kv_first, n_kv_heads, ffn_first, ffn_width, vocab_first, vocab;
    SliceRect *rects; /* by tensor; n_rows 0: nothing of it */
    size_t *offsets;  /* by tensor: of the part's first float in the arena */
    size_t n_floats;
} Holding;

/* One rank of a plan. Returned. */
Holding *holding_new(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                     uint32_t rank);
/* All of it. */
Holding *holding_whole(const ModelSpec *spec);
void holding_free(Holding *h); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Holding, holding_free)

/* Whether tensor `tensor` is here, and a rectangle of it wholly. */
static inline bool holding_has(const Holding *h, uint32_t tensor)
{
    return h->rects[tensor].n_rows > 0;
}
bool holding_covers(const Holding *h, uint32_t tensor, const SliceRect *rect);
/* Where element (row, column) of the tensor lies in the arena; it is held. */
size_t holding_at(const Holding *h, uint32_t tensor, uint32_t row, uint32_t column);
/* The first element that this rank computes with: of a vector whose matrix is cut, not its first.
 */
size_t holding_own_part(const Holding *h, uint32_t tensor);
