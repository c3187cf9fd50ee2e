/* Descriptors: what the embedded FileDescriptorSet says about services, for dispatch (streaming
 * flags) and reflection. Built once per process from weft_descriptor_set and immutable afterwards;
 * tests may add a set before first use. Any thread. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct MethodFlags {
    bool client_streaming, server_streaming;
} MethodFlags;

/* path: "/pkg.Service/Method". False when no set declares it. */
bool descriptors_method(const char *path, MethodFlags *out);

/* The serialised FileDescriptorProto of a file by its name, or of the file that declares a symbol
 * (message, enum, service or method), followed by those that it imports, each once: GBytes in a
 * returned array; NULL when unknown. */
GPtrArray *descriptors_file(const char *name);
GPtrArray *descriptors_symbol(const char *symbol);

/* Adds a further serialised set (borrowed for ever). Before any other thread uses descriptors. */
void descriptors_add(const uint8_t *set, size_t n_bytes);
