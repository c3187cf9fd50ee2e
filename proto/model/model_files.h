/* ModelFiles: the files of a model that is served, a GGUF file (also split) or a Hugging Face
 * directory: its tensors in the types that they have there, their bytes as workers get them, and
 * its texts. model_source.h has the same models as f32. Immutable; any thread. */
#pragma once

#include "proto/model/model_spec.h"
#include "proto/text/tokenizer.h"

typedef struct ModelFiles ModelFiles;

/* path: a GGUF file or a directory. NOT_FOUND, INVALID. Returned. */
ModelFiles *model_files_open(const char *path, GError **error);
void model_files_free(ModelFiles *f); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(ModelFiles, model_files_free)

/* file_hash is not filled. INVALID. Returned. */
ModelSpec *model_files_spec(const ModelFiles *f, GError **error);
/* All files that say what the model is, its tokenizer among them. Paths are borrowed. */
uint32_t model_files_n(const ModelFiles *f);
const char *model_files_path(const ModelFiles *f, uint32_t file);
/* Whether tensors lie in the files as the spec says (GGUF): who has the same files can read them
 * there. In a directory they have other types, orders and scales beside them. */
bool model_files_are_raw(const ModelFiles *f);
/* XXH3-128 over the bytes of the files in order (reads everything). NOT_FOUND if one is gone. */
bool model_files_hash(const ModelFiles *f, Hash128 *out, GError **error);
/* model_spec_slice_bytes() of tensor number `tensor` of the spec. INVALID for a weight that is no
 * number; out is then undefined. */
bool model_files_copy_slice(const ModelFiles *f, const ModelSpec *spec, uint32_t tensor,
                            uint32_t slice, void *out, GError **error);

/* INVALID says what is missing or not supported. Returned. */
Tokenizer *model_files_tokenizer(const ModelFiles *f, GError **error);
/* The chat template, not NUL-terminated. False without an error if there is none; INVALID.
 * Borrowed. */
bool model_files_chat_template(const ModelFiles *f, const char **text, size_t *length,
                               GError **error);
