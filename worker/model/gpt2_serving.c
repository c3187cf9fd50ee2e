/* A layer of GPT-2 as it is served (Radford et al. 2019): layer norm, as many KV heads as heads,
 * GELU feed-forward, a bias behind every matrix, on one tensor rank of one stage. Positions are in
 * x since the embedding. Row for row the bits of training's forward pass (gpt2_training.c) with f32
 * keys and values. */
#include "worker/model/stage_ops.h"

bool gpt2_serving_layer(StagePass *p, uint32_t l)
{
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const LayerWeights *w = &shard->layers[l];
    const uint32_t width = s->o.spec->width, nf = w->up.n_out;
    const uint32_t n = shard->n_heads * s->o.spec->head_size;
    const uint32_t layer = shard->layer_first + l;
    const uint16_t site = (uint16_t)(2 * layer);
    uint32_t first, last;

    stage_norm(p, w->attn_norm, w->attn_norm_bias);
    stage_quantise(p, s->h, width, (const PackedMatrix *const[]){&w->q, &w->k, &w->v}, 3);
    stage_end(p, STAGE_OP_NORM);
    stage_products(p, (const Product[]){{&w->q, s->q, n}, {&w->k, s->k, n}, {&w->v, s->v, n}}, 3);
    stage_end(p, STAGE_OP_QKV);
    stage_progress(p);
    stage_store_keys(p, l);
    stage_end(p, STAGE_OP_ROPE);
    stage_attend(p, l);
    stage_end(p, STAGE_OP_ATTENTION);
    stage_quantise(p, s->attn, n, (const PackedMatrix *const[]){&w->attn_out}, 1);
    stage_end(p, STAGE_OP_NORM);
    stage_product_units(p, &w->attn_out, &s->attn_units);
    stage_end(p, STAGE_OP_ATTN_OUT);
    if (!stage_reduce(p, &s->attn_units, (uint16_t)(site + 1), "all-reduce of attention")) {
        return false;
    }
    stage_add_residual(p, w->attn_out_bias);
    stage_trace(p, trace_site_attention(layer));
    stage_norm(p, w->ffn_norm, w->ffn_norm_bias);
    stage_quantise(p, s->h, width, (const PackedMatrix *const[]){&w->up}, 1);
    stage_end(p, STAGE_OP_NORM);
    stage_products(p, (const Product[]){{&w->up, s->up, nf}}, 1);
    stage_end(p, STAGE_OP_GATE_UP);
    stage_progress(p);
    stage_own_rows(p, &first, &last);
    if (first < last) {
        const size_t own = (size_t)first * nf;
        stage_add_bias(p, s->up + own, w->up_bias, nf, last - first);
        s->o.kernels->train.gelu(s->up + own, (last - first) * nf, s->gate + own);
    }
    stage_quantise(p, s->gate, nf, (const PackedMatrix *const[]){&w->down}, 1);
    stage_end(p, STAGE_OP_ACTIVATION);
    stage_product_units(p, &w->down, &s->ffn_units);
    stage_end(p, STAGE_OP_DOWN);
    if (!stage_reduce(p, &s->ffn_units, (uint16_t)(site + 2), "all-reduce of feed-forward")) {
        return false;
    }
    stage_add_residual(p, w->down_bias);
    stage_flip_bit(p, layer);
    stage_trace(p, trace_site_ffn(layer));
    return true;
}
