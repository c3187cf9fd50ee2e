/* Writes tiny GGUF models of both families for tests: random weights of sane size in any weight
 * type that weft reads, with a byte-level BPE vocabulary, reproducible from (configuration, seed).
 * Blocks of quantised types are drawn directly (random quants, scales that give the wanted spread),
 * so that every bit pattern of a block occurs. */
#pragma once

#include "proto/model/dtype.h"
#include "proto/model/model_spec.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct GgufBuilderConfig {
    const char *name; /* general.name, borrowed */
    ModelFamily
        family; /* gpt2: as many KV heads as heads; what is of rope or qkv_bias is not read
                   (attn_qkv is one tensor with a bias, as llama.cpp's converter writes it) */
    uint32_t n_layers, width, n_heads, n_kv_heads;
    uint32_t head_size; /* 0 = width / n_heads; else written as key_length and value_length */
    uint32_t ffn_width;
    uint32_t vocab_size; /* at least 259: 3 control tokens and 256 bytes; beyond those merges of
                            letters, then unused tokens */
    uint32_t context;
    bool tied; /* no output.weight */
    bool qkv_bias;
    bool rope_factors;              /* rope_freqs.weight */
    const char *rope_scaling;       /* "linear", "yarn", ...; NULL = no key */
    double rope_factor;             /* written when rope_scaling is set */
    uint32_t rope_original_context; /* 0 = no key */
    double rope_base;
    Dtype type[ROLE_LIMIT]; /* by role; 1-D tensors are F32 whatever stands here */
    const char *extra_key;  /* one more u32 key, borrowed; NULL = none */
    uint32_t extra_value;
    uint64_t seed;
    uint32_t version;   /* 2 or 3 */
    uint32_t alignment; /* 32 = no key */
} GgufBuilderConfig;

/* 2 layers, width 64, 4 heads, 2 KV heads, FFN 128, vocabulary 1500, context 256, tied, Q8_0
 * matrices, seed 1. */
void gguf_builder_defaults(GgufBuilderConfig *config);
/* Sets the type of every matrix. */
void gguf_builder_set_type(GgufBuilderConfig *config, Dtype type);

/* The whole file; returned. NULL + INVALID if a row does not hold whole blocks. */
GBytes *gguf_builder_bytes(const GgufBuilderConfig *config, GError **error);
/* The ModelSpec of the same model, of the llama family, without any weights (offsets as if the data
 * began at 0): also for sizes that no test writes. Returned. */
ModelSpec *gguf_builder_spec(const GgufBuilderConfig *config, GError **error);
/* To a file. A path that ends in -00001-of-0000N.gguf writes all N parts. */
bool gguf_builder_write(const GgufBuilderConfig *config, const char *path, GError **error);
