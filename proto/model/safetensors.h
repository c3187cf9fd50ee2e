/* Safetensors: tensors in files that nobody trusts (format: huggingface/safetensors, "Format"): u64
 * length, a JSON header, then the tensors' bytes. Once a Safetensors exists, every tensor's size is
 * what its shape and type say, and its bytes lie inside the file, apart from all others. The file
 * is mapped. Caps: header 32 MiB, tensors 262,144, dims 8. */
#pragma once

#include "proto/model/dtype.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SAFETENSORS_DIMS 8

typedef struct SafetensorsTensor {
    char *name;       /* UTF-8; owned by the file's table */
    const char *kind; /* as in the file: "F32", "I64", ...; static */
    Dtype type;       /* DTYPE_LIMIT: of no kind that weft computes with as it lies there */
    uint32_t n_dims;
    uint64_t dims[SAFETENSORS_DIMS]; /* the last runs fastest; 1 beyond n_dims */
    uint64_t size_bytes;
    const uint8_t *data; /* borrowed from the mapping; any alignment */
} SafetensorsTensor;

typedef struct Safetensors Safetensors;

/* NOT_FOUND; INVALID with the tensor and its values. Returned. */
Safetensors *safetensors_open(const char *path, GError **error);
/* A buffer (borrowed, outlives the result): tests, fuzzing. */
Safetensors *safetensors_parse(const void *data, size_t size, GError **error);
void safetensors_free(Safetensors *s); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Safetensors, safetensors_free)

/* The whole file as it is mapped. Borrowed. */
const uint8_t *safetensors_bytes(const Safetensors *s, size_t *size_out);
size_t safetensors_n(const Safetensors *s);
/* In order of names. */
const SafetensorsTensor *safetensors_at(const Safetensors *s, size_t i);
/* NULL if there is none. */
const SafetensorsTensor *safetensors_find(const Safetensors *s, const char *name);

/* The header of a file to be written: tensors in order, each after the one before. */
typedef struct SafetensorsEntry {
    const char *name; /* unique, UTF-8; borrowed */
    Dtype type;       /* F32, F16 or BF16 */
    uint32_t n_dims;
    uint64_t dims[SAFETENSORS_DIMS];
} SafetensorsEntry;
/* Length, JSON and padding to 64 bytes: the data of the first tensor begin behind it. metadata:
 * NULL-ended pairs of key and text, or NULL. Returned; NULL + INVALID for sizes beyond 64 bits. */
GBytes *safetensors_header(const SafetensorsEntry *entries, size_t n, const char *const *metadata,
                           GError **error);
