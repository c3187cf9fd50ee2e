/* A Hugging Face directory of a GPT-2 or Llama model: config.json and model.safetensors, or several
 * files named by model.safetensors.index.json; weights F32, F16 or BF16. What is not understood
 * (another architecture, activation or rope scaling) is refused by name. */
#pragma once

#include "proto/model/gguf_writer.h"

typedef struct HfModel HfModel;

/* NOT_FOUND; INVALID. Returned. */
HfModel *hf_model_open(const char *directory, GError **error);
void hf_model_free(HfModel *m); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(HfModel, hf_model_free)
/* All tensors F32, with the names that GGUF files use. Borrowed. */
const ModelSpec *hf_model_spec(const HfModel *m);
/* Rows of a tensor of the spec; as ModelReadRows. */
bool hf_model_read(const void *model, uint32_t tensor, uint32_t row0, uint32_t n_rows, float *out,
                   GError **error);

/* Writes config.json, model.safetensors and, where there is a vocabulary, tokenizer.json and
 * tokenizer_config.json into a directory that is made as needed. type: F32, F16 or BF16. INVALID
 * for what such a directory cannot say (rope scaling, a SentencePiece vocabulary); IO. */
bool hf_model_write(const char *directory, const ModelContents *contents, Dtype type,
                    GError **error);
