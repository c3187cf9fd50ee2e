#include "proto/base/bytes.h"

#include <string.h>

const uint8_t *byte_reader_take(ByteReader *r, size_t n)
{
    if (r->failed || n > r->size - r->offset) {
        r->failed = true;
        return NULL;
    }
    const uint8_t *p = r->data + r->offset;
    r->offset += n;
    return p;
}

/* n <= 8 little-endian bytes as a number; 0 once failed. */
static uint64_t read_le(ByteReader *r, size_t n)
{
    const uint8_t *p = byte_reader_take(r, n);
    uint64_t v = 0;
    for (size_t i = 0; p != NULL && i < n; i++) {
        v |= (uint64_t)p[i] << (8 * i);
    }
    return v;
}

uint8_t byte_reader_u8(ByteReader *r)
{
    return (uint8_t)read_le(r, 1);
}

uint16_t byte_reader_u16le(ByteReader *r)
{
    return (uint16_t)read_le(r, 2);
}

uint32_t byte_reader_u32le(ByteReader *r)
{
    return (uint32_t)read_le(r, 4);
}

uint64_t byte_reader_u64le(ByteReader *r)
{
    return read_le(r, 8);
}

float byte_reader_f32le(ByteReader *r)
{
    uint32_t bits = byte_reader_u32le(r);
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

double byte_reader_f64le(ByteReader *r)
{
    uint64_t bits = byte_reader_u64le(r);
    double v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
