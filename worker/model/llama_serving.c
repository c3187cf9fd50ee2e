/* A layer of the Llama family as it is served: RMS norm, grouped-query attention with RoPE, SwiGLU
 * feed-forward (Touvron et al. 2023, arXiv 2302.13971), on one tensor rank of one stage. */
#include "worker/model/stage_ops.h"

bool llama_serving_layer(StagePass *p, uint32_t l)
{
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const LayerWeights *w = &shard->layers[l];
    const uint32_t width = s->o.spec->width, hd = s->o.spec->head_size;
    const uint32_t nq = shard->n_heads * hd, nk = shard->n_kv_heads * hd, nf = w->gate.n_out;
    const uint32_t layer = shard->layer_first + l;
    const uint16_t site = (uint16_t)(2 * layer);
    uint32_t first, last;

    stage_norm(p, w->attn_norm, NULL);
    stage_quantise(p, s->h, width, (const PackedMatrix *const[]){&w->q, &w->k, &w->v}, 3);
    stage_end(p, STAGE_OP_NORM);
    stage_products(p, (const Product[]){{&w->q, s->q, nq}, {&w->k, s->k, nk}, {&w->v, s->v, nk}},
                   3);
    stage_end(p, STAGE_OP_QKV);
    stage_progress(p);
    stage_store_keys(p, l);
    stage_end(p, STAGE_OP_ROPE);
    stage_attend(p, l);
    stage_end(p, STAGE_OP_ATTENTION);
    stage_quantise(p, s->attn, nq, (const PackedMatrix *const[]){&w->attn_out}, 1);
    stage_end(p, STAGE_OP_NORM);
    stage_product_units(p, &w->attn_out, &s->attn_units);
    stage_end(p, STAGE_OP_ATTN_OUT);
    if (!stage_reduce(p, &s->attn_units, (uint16_t)(site + 1), "all-reduce of attention")) {
        return false;
    }
    stage_add_residual(p, NULL);
    stage_trace(p, trace_site_attention(layer));
    stage_norm(p, w->ffn_norm, NULL);
    stage_quantise(p, s->h, width, (const PackedMatrix *const[]){&w->gate, &w->up}, 2);
    stage_end(p, STAGE_OP_NORM);
    stage_products(p, (const Product[]){{&w->gate, s->gate, nf}, {&w->up, s->up, nf}}, 2);
    stage_end(p, STAGE_OP_GATE_UP);
    stage_progress(p);
    stage_own_rows(p, &first, &last);
    if (first < last) {
        const size_t own = (size_t)first * nf;
        s->o.kernels->swiglu(s->gate + own, s->up + own, (last - first) * nf, s->gate + own);
    }
    stage_quantise(p, s->gate, nf, (const PackedMatrix *const[]){&w->down}, 1);
    stage_end(p, STAGE_OP_ACTIVATION);
    stage_product_units(p, &w->down, &s->ffn_units);
    stage_end(p, STAGE_OP_DOWN);
    if (!stage_reduce(p, &s->ffn_units, (uint16_t)(site + 2), "all-reduce of feed-forward")) {
        return false;
    }
    stage_add_residual(p, NULL);
    stage_flip_bit(p, layer);
    stage_trace(p, trace_site_ffn(layer));
    return true;
}
