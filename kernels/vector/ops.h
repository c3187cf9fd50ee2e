/* What both instruction sets fill of the table with kernels/vector, in the lanes of the vec.h that
 * was included before. */
#pragma once

#include "kernels/kernels.h"

#include "kernels/vector/act.h"
#include "kernels/vector/attention.h"
#include "kernels/vector/kv.h"
#include "kernels/vector/norm.h"
#include "kernels/vector/rope.h"
#include "kernels/vector/sample.h"

/* kv_write of f32 and q8 stays generic: it copies, or is nothing beside the products of a row. */
static void ops_fill_vector(Kernels *kernels)
{
    kernels->rms_norm = rms_norm_vector;
    kernels->swiglu = swiglu_vector;
    kernels->add = add_vector;
    kernels->rope_apply = rope_apply_vector;
    kernels->kv_write[KV_F16] = kv_write_f16_vector;
    kernels->kv_write[KV_BF16] = kv_write_bf16_vector;
    kernels->attention[KV_F16] = attention_f16_vector;
    kernels->attention[KV_BF16] = attention_bf16_vector;
    kernels->attention[KV_F32] = attention_f32_vector;
    kernels->attention[KV_Q8] = attention_q8_vector;
    kernels->attention_combine = attention_combine_vector;
    kernels->chunk_stats = chunk_stats_vector;
    kernels->gumbel = gumbel_vector;
}
