/* GGUF v2/v3 reader over bytes that nobody trusts (format: ggml docs/gguf.md). The file is mapped;
 * keys and tensors are views into the mapping. Every count, length, offset and product is checked
 * before use; caps: keys 65,536, tensors 1 M, dims 4, name 64 KiB, array nesting refused. */
#pragma once

#include "proto/model/dtype.h"
#include "proto/model/model_spec.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Gguf Gguf;

/* Opens one file, or the whole set when the name is NAME-00001-of-000NN.gguf. NULL +
 * WEFT_ERROR_NOT_FOUND / INVALID. */
Gguf *gguf_open(const char *path, GError **error);
/* Parses a buffer (borrowed, outlives the Gguf): tests, fuzzing. */
Gguf *gguf_parse(const void *data, size_t size, GError **error);
void gguf_free(Gguf *gguf);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Gguf, gguf_free)

/* Scalars by key: false if absent; error set (and false) if there with a type that cannot be read
 * as asked. */
bool gguf_get_u64(const Gguf *g, const char *key, uint64_t *out, GError **error);
bool gguf_get_f64(const Gguf *g, const char *key, double *out, GError **error);
bool gguf_get_bool(const Gguf *g, const char *key, bool *out, GError **error);
/* Bytes are borrowed from the mapping, not NUL-terminated, any bytes. */
bool gguf_get_string(const Gguf *g, const char *key, const char **out, size_t *length_out,
                     GError **error);
/* Arrays: element count, then elements. */
bool gguf_array_length(const Gguf *g, const char *key, uint64_t *n_out);
bool gguf_array_string(const Gguf *g, const char *key, uint64_t i, const char **out,
                       size_t *length_out);
bool gguf_array_f64(const Gguf *g, const char *key, uint64_t i, double *out);
bool gguf_array_i64(const Gguf *g, const char *key, uint64_t i, int64_t *out);

/* A tensor as the file describes it, checked: type known, size from the shape, bytes inside the
 * file, aligned and overlapping no other. */
typedef struct GgufTensor {
    const char *name; /* name_length bytes, borrowed, not NUL-terminated */
    size_t name_length;
    uint32_t n_dims;  /* 1..4 */
    uint64_t dims[4]; /* dims[0] runs fastest (columns); 1 beyond n_dims */
    Dtype type;
    uint32_t file;
    uint64_t offset; /* from the start of that file */
    uint64_t size_bytes;
} GgufTensor;
uint64_t gguf_n_tensors(const Gguf *g);
/* i < gguf_n_tensors(), in order of the file(s); borrowed. */
const GgufTensor *gguf_tensor(const Gguf *g, uint64_t i);
/* NULL if there is none of that name (NUL-terminated). */
const GgufTensor *gguf_find_tensor(const Gguf *g, const char *name);

uint32_t gguf_n_files(const Gguf *g);
/* The mapping of one file (borrowed) and its path. */
const uint8_t *gguf_file_data(const Gguf *g, uint32_t file, size_t *size_out);
const char *gguf_file_path(const Gguf *g, uint32_t file);

/* Builds the ModelSpec of a supported architecture ("llama", "gpt2"); NULL + INVALID naming architecture or
 * type otherwise. */
ModelSpec *gguf_model_spec(const Gguf *g, GError **error);
/* XXH3-128 over all files' bytes in order (reads everything). */
Hash128 gguf_hash(const Gguf *g);
/* Copies one slice's file bytes (model_spec_slice_bytes) into out. False, and out untouched, if the
 * tensor does not lie inside these files: the spec may have come from a peer. */
bool gguf_copy_slice(const Gguf *g, const ModelSpec *spec, const TensorSpec *tensor, uint32_t slice,
                     void *out);
