/* ByteReader: a cursor over bytes that nobody trusts. Once a read runs past the end, `failed` is
 * set, every later read returns 0/NULL and the cursor stays: check once at the end of a group. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ByteReader {
    const uint8_t *data; /* borrowed */
    size_t size, offset;
    bool failed;
} ByteReader;

static inline ByteReader byte_reader(const void *data, size_t size)
{
    return (ByteReader){.data = data, .size = size};
}
/* n bytes at the cursor (borrowed from the buffer) or NULL. */
const uint8_t *byte_reader_take(ByteReader *r, size_t n);
uint8_t byte_reader_u8(ByteReader *r);
uint16_t byte_reader_u16le(ByteReader *r);
uint32_t byte_reader_u32le(ByteReader *r);
uint64_t byte_reader_u64le(ByteReader *r);
float byte_reader_f32le(ByteReader *r);
double byte_reader_f64le(ByteReader *r);
