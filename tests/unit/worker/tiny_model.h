/* A small llama model with random weights, its file bytes in memory, and plans over it. */
#pragma once

#include "proto/model/model_spec.h"
#include "proto/plan/plan.h"
#include "weft/v1/plan.pb-c.h"

typedef struct TinyModel {
    ModelSpec *spec;
    uint8_t **bytes; /* by tensor: rows one after another in file format */
    size_t file_bytes;
} TinyModel;

typedef struct TinyShape {
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn_width, vocab_size;
    Dtype matrices, down, embedding;
    bool tied, biases, rope_factors;
} TinyShape;

TinyModel *tiny_model_new(const TinyShape *shape, uint64_t seed);
void tiny_model_free(TinyModel *model);
/* File bytes of one slice; returned, g_free. */
void *tiny_model_slice(const TinyModel *model, uint32_t tensor, uint32_t slice, size_t *size_out);
/* One f32 row of a tensor. */
void tiny_model_row(const TinyModel *model, const TensorSpec *tensor, uint32_t row, float *out);
/* model_to_message() with every slice's hash and the file name; returned. */
Weft__V1__Model *tiny_model_message(const TinyModel *model, const char *file_name);
/* Writes the whole model file (tensors at their offsets). */
void tiny_model_write(const TinyModel *model, const char *path);

/* One replica; layers cut evenly, units and chunks in proportion to weight[rank]. ranks[stage]
 * each. Workers are named "w0", "w1", ... */
Plan *tiny_plan(const ModelSpec *spec, uint32_t n_stages, const uint32_t *n_ranks,
                const double *weight);
