#include "worker/model/holding.h"

#include "proto/plan/rank_span.h"

enum { ALIGN_FLOATS = 16 };

static void fill_chunks(Holding *h, const PlanStage *stage)
{
    h->n_chunks = stage->n_more + 1;
    h->chunks[0] =
        (struct HoldingChunk){stage->layer_first, stage->layer_last + 1 - stage->layer_first};
    for (uint32_t c = 1; c < h->n_chunks; c++) {
        const PlanLayers *more = &stage->more[c - 1];
        h->chunks[c] = (struct HoldingChunk){more->first, more->last + 1 - more->first};
    }
}

static void fill_cuts(Holding *h, const PlanStage *stage)
{
    for (uint32_t r = 0; r <= h->tp; r++) {
        const bool end = r == h->tp;
        h->attn_cuts[r] = end ? h->spec->n_attn_units : stage->ranks[r].attn_first;
        h->ffn_cuts[r] = end ? h->spec->n_ffn_units : stage->ranks[r].ffn_first;
        h->vocab_cuts[r] = end ? h->spec->n_vocab_chunks : stage->ranks[r].vocab_first;
    }
}

static void fill_own(Holding *h)
{
    const ModelSpec *spec = h->spec;
    const uint32_t r = h->rank, head_end = h->attn_cuts[r + 1] * spec->attn_unit_heads,
                   ffn_end = h->ffn_cuts[r + 1] * spec->ffn_unit_width,
                   vocab_end = h->vocab_cuts[r + 1] * VOCAB_CHUNK;
    h->head_first = h->attn_cuts[r] * spec->attn_unit_heads;
    h->n_heads = MIN(head_end, spec->n_heads) - h->head_first;
    model_spec_kv_heads_of(spec, h->head_first, h->n_heads, &h->kv_first, &h->n_kv_heads);
    h->ffn_first = h->ffn_cuts[r] * spec->ffn_unit_width;
    h->ffn_width = MIN(ffn_end, spec->ffn_width) - h->ffn_first;
    h->vocab_first = MIN(h->vocab_cuts[r] * VOCAB_CHUNK, spec->vocab_size);
    h->vocab = MIN(vocab_end, spec->vocab_size) - h->vocab_first;
}

static SliceRect part_of(const Holding *h, const TensorSpec *t, SliceSpan span)
{
    if (span.count == 0) {
        return (SliceRect){0};
    }
    if (t->rows == 1) {
        return (SliceRect){0, 1, 0, t->columns};
    }
    const SliceRect a = model_spec_slice(h->spec, t, span.first),
                    b = model_spec_slice(h->spec, t, span.first + span.count - 1);
    return (SliceRect){a.row0, b.row0 + b.n_rows - a.row0, a.col0, b.col0 + b.n_cols - a.col0};
}

/* Tensors one after another. */
static void lay_out(Holding *h)
{
    for (uint32_t i = 0; i < h->spec->n_tensors; i++) {
        const size_t n = (size_t)h->rects[i].n_rows * h->rects[i].n_cols;
        h->offsets[i] = h->n_floats;
        h->n_floats += (n + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    }
}

Holding *holding_new(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                     uint32_t rank)
{
    const PlanReplica *in = &plan->replicas[replica];
    const PlanStage *of = &in->stages[stage];
    Holding *h = g_new0(Holding, 1);
    h->spec = spec;
    fill_chunks(h, of);
    h->is_first = stage == 0;
    h->is_last = stage + 1 == in->n_stages;
    h->tp = of->n_ranks;
    h->rank = rank;
    h->rects = g_new0(SliceRect, spec->n_tensors);
    h->offsets = g_new0(size_t, spec->n_tensors);
    fill_cuts(h, of);
    fill_own(h);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        h->rects[i] = part_of(h, t, rank_span(spec, in, of, &of->ranks[rank], t));
    }
    lay_out(h);
    return h;
}

Holding *holding_whole(const ModelSpec *spec)
{
    PlanRank rank = {.attn_count = spec->n_attn_units,
                     .ffn_count = spec->n_ffn_units,
                     .vocab_count = spec->n_vocab_chunks};
    PlanStage stage = {.layer_last = spec->n_layers - 1, .n_ranks = 1, .ranks = &rank};
    PlanReplica replica = {1, &stage};
    const Plan plan = {.n_replicas = 1, .replicas = &replica};
    return holding_new(spec, &plan, 0, 0, 0);
}

void holding_free(Holding *h)
{
    if (h != NULL) {
        g_free(h->rects);
        g_free(h->offsets);
        g_free(h);
    }
}

bool holding_covers(const Holding *h, uint32_t tensor, const SliceRect *rect)
{
    const SliceRect *part = &h->rects[tensor];
    return rect->row0 >= part->row0 && rect->row0 + rect->n_rows <= part->row0 + part->n_rows &&
           rect->col0 >= part->col0 && rect->col0 + rect->n_cols <= part->col0 + part->n_cols;
}

size_t holding_at(const Holding *h, uint32_t tensor, uint32_t row, uint32_t column)
{
    const SliceRect *part = &h->rects[tensor];
    return h->offsets[tensor] + (size_t)(row - part->row0) * part->n_cols + (column - part->col0);
}

size_t holding_own_part(const Holding *h, uint32_t tensor)
{
    const TensorSpec *t = &h->spec->tensors[tensor];
    const uint32_t head = h->spec->head_size;
    const size_t skip = t->rows > 1              ? 0
                        : t->cut == CUT_Q_UNITS  ? (size_t)h->head_first * head
                        : t->cut == CUT_KV_HEADS ? (size_t)h->kv_first * head
                        : t->cut == CUT_FFN_ROWS ? h->ffn_first
                                                 : 0;
    return h->offsets[tensor] + skip;
}
