/* A Hugging Face directory of a GPT-2 or Llama model: config.json and model.safetensors, or several
 * files named by model.safetensors.index.json; weights F32, F16, BF16, and F8_E4M3 with their
 * scales (hf_fp8.h); rotations plain, linear or llama3 (hf_rope.h). What is not understood (another
 * architecture, activation, rope scaling or way of quantising) is refused by name. */
#pragma once

#include "proto/model/gguf_writer.h"

typedef struct HfModel HfModel;

/* NOT_FOUND; INVALID. Returned. */
HfModel *hf_model_open(const char *directory, GError **error);
void hf_model_free(HfModel *m); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(HfModel, hf_model_free)
/* All tensors F32, with the names that GGUF files use. Borrowed. */
const ModelSpec *hf_model_spec(const HfModel *m);
/* The same model with its matrices in the types that the files have, vectors F32: what is served.
 * Same tensors in the same order; offsets are those of an imagined file. INVALID names an fp8
 * weight whose rows are no whole blocks. Returned. */
ModelSpec *hf_model_serving_spec(const HfModel *m, GError **error);
/* Bytes of a slice of a tensor of that spec (model_spec_slice_bytes): f32, f16 and bf16 as in the
 * file, fp8 as F8_E4M3 blocks. INVALID for what is no number; out is then undefined. */
bool hf_model_copy_slice(const HfModel *m, const ModelSpec *spec, uint32_t tensor, uint32_t slice,
                         uint8_t *out, GError **error);
/* The files that were read, in order: config.json first, weights last. Paths are borrowed. */
uint32_t hf_model_n_files(const HfModel *m);
const char *hf_model_file_path(const HfModel *m, uint32_t file);
/* XXH3-128 over their bytes, as they were opened, in order (reads everything). */
Hash128 hf_model_hash(const HfModel *m);
/* Rows of a tensor of hf_model_spec(), fp8 ones widened; as ModelReadRows. */
bool hf_model_read(const void *model, uint32_t tensor, uint32_t row0, uint32_t n_rows, float *out,
                   GError **error);

/* Writes config.json, model.safetensors and, where there is a vocabulary, tokenizer.json and
 * tokenizer_config.json into a directory that is made as needed. type: F32, F16 or BF16. INVALID
 * for what such a directory cannot say (rope scaling, a SentencePiece vocabulary); IO. */
bool hf_model_write(const char *directory, const ModelContents *contents, Dtype type,
                    GError **error);
