/* A model from a few numbers, without a file: the ModelSpec of a model that is to be trained from
 * scratch (CONTRACT, job file: model.config). */
#pragma once

#include "proto/model/model_spec.h"

typedef struct ModelConfig {
    ModelFamily family;
    uint32_t layers, width, heads;
    uint32_t kv_heads;  /* 0: heads */
    uint32_t head_size; /* 0: width / heads */
    uint32_t ffn_width; /* 0: 4 x width (gpt2); 8/3 x width rounded up to 32 (llama) */
    uint32_t vocabulary, context;
    bool untied;           /* an output projection of its own */
    bool qkv_bias;         /* llama: biases of Q, K and V; gpt2 has all */
    float norm_eps;        /* 0: 1e-5 */
    float attention_scale; /* 0: 1 / sqrt(head size) */
    double rope_base;      /* 0: 10000; llama */
    RopeSpec rope;         /* dims 0: the whole head, adjacent pairs, unscaled, rope_base */
    const char *name;      /* borrowed; NULL: the family's */
} ModelConfig;

/* All tensors f32, with the names that GGUF files use; NUMERICS 3 fills the units. INVALID names
 * the number that is wrong. Returned. */
ModelSpec *model_spec_from_config(const ModelConfig *config, GError **error);
