#include "tests/fuzz/seeds.h"

#include "tests/fuzz/calls.h"

#include <glib/gstdio.h>

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

static GByteArray *seed; /* NULL: none is begun */

static GByteArray *begun(void)
{
    if (seed == NULL) {
        seed = g_byte_array_new();
    }
    return seed;
}

void seed_add(uint8_t kind, const void *message)
{
    const ProtobufCMessage *base = message;
    const size_t size = protobuf_c_message_get_packed_size(base);
    g_autofree uint8_t *bytes = g_malloc(size + 1);
    protobuf_c_message_pack(base, bytes);
    records_append(begun(), kind, bytes, size);
}

void seed_add_byte(uint8_t kind, uint8_t byte)
{
    records_append(begun(), kind, &byte, 1);
}

void seed_add_empty(uint8_t kind)
{
    records_append(begun(), kind, NULL, 0);
}

void seed_write(const char *dir, const char *target, const char *name)
{
    g_autofree char *folder = g_build_filename(dir, target, NULL);
    g_autofree char *path = g_build_filename(folder, name, NULL);
    g_autoptr(GError) error = NULL;
    g_mkdir_with_parents(folder, 0755);
    if (!g_file_set_contents(path, (const char *)begun()->data, seed->len, &error)) {
        g_error("%s", error->message);
    }
    g_clear_pointer(&seed, g_byte_array_unref);
}

ProtobufCBinaryData binary(const void *data, size_t size)
{
    return (ProtobufCBinaryData){size, (uint8_t *)data};
}

const uint8_t SIXTEEN[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
