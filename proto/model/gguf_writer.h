/* Writes a model as a GGUF file that this reader and llama.cpp read (format: ggml docs/gguf.md). */
#pragma once

#include "proto/model/model_spec.h"
#include "proto/text/tokenizer_vocab.h"

#include <glib.h>
#include <stdbool.h>

/* Where the weights come from: rows [row0, row0 + n_rows) of tensor `tensor` of the spec, f32, one
 * after another. */
typedef bool (*ModelReadRows)(const void *user, uint32_t tensor, uint32_t row0, uint32_t n_rows,
                              float *out, GError **error);

typedef struct ModelContents {
    const ModelSpec *spec; /* borrowed, like all */
    ModelReadRows read;
    const void *user;
    const TokenizerVocab *vocab; /* NULL: the file has no tokenizer */
    const char *chat_template;   /* or NULL */
} ModelContents;

/* Matrices in `type` (F32, F16, BF16, Q8_0, Q4_0, Q4_1), vectors and positions in F32. Written
 * aside, synced and renamed. INVALID: rows do not hold whole blocks, or the vocabulary has more ids
 * than the model; IO. */
bool gguf_write(const char *path, const ModelContents *contents, Dtype type, GError **error);
/* "q8_0", "F16", ...: false for what gguf_write() does not write. */
bool gguf_write_type(const char *name, Dtype *out);
