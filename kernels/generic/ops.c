/* Every slot of norm, act, rope, attention, kv and sample: generic has them all. */
#include "kernels/generic/ops.h"

#include "kernels/fill.h"

void kernels_fill_generic_ops(Kernels *table)
{
    table->rms_norm = rms_norm_generic;
    table->swiglu = swiglu_generic;
    table->add = add_generic;
    table->rope_apply = rope_apply_generic;
    table->kv_write[KV_F16] = kv_write_f16_generic;
    table->kv_write[KV_BF16] = kv_write_bf16_generic;
    table->kv_write[KV_F32] = kv_write_f32_generic;
    table->kv_write[KV_Q8] = kv_write_q8_generic;
    table->attention[KV_F16] = attention_f16_generic;
    table->attention[KV_BF16] = attention_bf16_generic;
    table->attention[KV_F32] = attention_f32_generic;
    table->attention[KV_Q8] = attention_q8_generic;
    table->attention_combine = attention_combine_generic;
    table->chunk_stats = chunk_stats_generic;
    table->gumbel = gumbel_generic;
}
