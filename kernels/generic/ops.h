/* The generic (specifying) implementations of norm, act, rope, attention, kv and sample; contracts:
 * kernels/ops. */
#pragma once

#include "kernels/ops/act.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/rope.h"
#include "kernels/ops/sample.h"

void rms_norm_generic(const float *x, const float *weight, float eps, uint32_t n, float *out);
void swiglu_generic(const float *gate, const float *up, uint32_t n, float *out);
void add_generic(float *x, const float *y, size_t n);
void rope_apply_generic(float *x, uint32_t n_heads, uint32_t head_size, uint32_t dims,
                        RopePairing pairing, const float *cos, const float *sin);
void kv_write_f16_generic(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                          void *k_block, void *v_block);
void kv_write_bf16_generic(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                           void *k_block, void *v_block);
void kv_write_q8_generic(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                         void *k_block, void *v_block);
void kv_write_f32_generic(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                          void *k_block, void *v_block);
void attention_f16_generic(const AttentionArgs *args);
void attention_bf16_generic(const AttentionArgs *args);
void attention_f32_generic(const AttentionArgs *args);
void attention_q8_generic(const AttentionArgs *args);
void attention_combine_generic(float *partials, size_t stride, uint32_t n_runs, uint32_t head_size,
                               float *out);
bool chunk_stats_generic(const float *logits, uint32_t n, float *m_out, float *l_out);
void gumbel_generic(const GumbelKey *key, uint32_t first_id, uint32_t n, float *noise);
