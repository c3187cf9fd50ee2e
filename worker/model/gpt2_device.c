/* A layer of GPT-2 on a device: the order of gpt2_serving.c. */
#include "worker/model/device_run.h"

bool gpt2_device_layer(DeviceRun *p, uint32_t l)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const LayerWeights *w = &s->o.shard->layers[l];
    const uint32_t rows = p->shape.n_rows, number = s->o.shard->layer_first + l;
    const uint16_t site = (uint16_t)(2 * number);

    device_run_norm(d, NULL, w->attn_norm, w->attn_norm_bias, rows);
    device_run_products(d, d->h, rows,
                        (const DeviceProduct[]){{&w->q, d->q, w->q_bias},
                                                {&w->k, d->k, w->k_bias},
                                                {&w->v, d->v, w->v_bias}},
                        3, "projections of attention");
    device_run_store_keys(p, l);
    device_run_attend(p, l);
    device_run_add_product(p, &w->attn_out, d->attn, &s->attn_units, w->attn_out_bias,
                           (uint16_t)(site + 1), "all-reduce of attention");
    if (!device_run_well(p)) {
        return false;
    }
    device_run_trace(p, trace_site_attention(number));
    device_run_norm(d, NULL, w->ffn_norm, w->ffn_norm_bias, rows);
    device_run_gelu_product(d, d->h, rows, &w->up, w->up_bias, d->gate,
                            "projection of feed-forward");
    device_run_add_product(p, &w->down, d->gate, &s->ffn_units, w->down_bias, (uint16_t)(site + 2),
                           "all-reduce of feed-forward");
    device_run_flip_bit(p, number);
    device_run_trace(p, trace_site_ffn(number));
    return device_run_well(p);
}
