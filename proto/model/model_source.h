/* ModelSource: weights and tokenizer of a model, wherever they come from: a GGUF file, a Hugging
 * Face directory, a checkpoint (its folder, or the folder of a job's checkpoints: the newest whole
 * one). What training starts from and what is exported. Immutable; any thread. */
#pragma once

#include "proto/model/gguf_writer.h"

typedef struct ModelSource ModelSource;

/* NOT_FOUND, INVALID. Returned. */
ModelSource *model_source_open(const char *path, GError **error);
void model_source_free(ModelSource *s); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(ModelSource, model_source_free)

/* Borrowed. */
const ModelSpec *model_source_spec(const ModelSource *s);
/* Rows [row0, row0 + n_rows) of a tensor of the spec as f32, one after another. INVALID if they do
 * not lie in it. */
bool model_source_read(const ModelSource *s, uint32_t tensor, uint32_t row0, uint32_t n_rows,
                       float *out, GError **error);
/* NULL if there is none. Borrowed. */
const TokenizerVocab *model_source_vocab(const ModelSource *s);
/* For the writers; borrows everything. */
ModelContents model_source_contents(const ModelSource *s);
/* Hex digest of a checkpoint's weights (NUMERICS 13); NULL for what is none. Borrowed. */
const char *model_source_digest(const ModelSource *s);
