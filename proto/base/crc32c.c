/* The remainder of the message polynomial modulo x^32 + ... (0x1EDC6F41), bits reflected, start and
 * end inverted.
 *
 * The SSE4.2 instruction takes 8 bytes in one cycle but answers after three, so long inputs run as
 * three streams of STREAM_BYTES side by side. The CRC is linear: crc(A|B) = shift(crc(A), |B|) ^
 * crc0(B), where shift multiplies by x^(8|B|); shift over STREAM_BYTES is a table of 4 x 256 words.
 */
#include "proto/base/crc32c.h"

#include <glib.h>
#include <pthread.h>
#include <string.h>

#ifdef __x86_64__
#include <nmmintrin.h>
#endif

#define POLYNOMIAL_REFLECTED 0x82F63B78u
#define STREAM_BYTES 512u

typedef struct CrcTables {
    uint32_t byte[8][256];  /* byte[k][v]: the value v followed by k zero bytes */
    uint32_t shift[4][256]; /* STREAM_BYTES zero bytes after a register whose byte k is v */
} CrcTables;

static uint32_t zeros(const CrcTables *t, uint32_t crc, size_t n)
{
    while (n-- > 0) {
        crc = t->byte[0][crc & 0xff] ^ (crc >> 8);
    }
    return crc;
}

static CrcTables the_tables; /* written under tables()'s once */

static void tables_fill(void)
{
    CrcTables *t = &the_tables;
    for (uint32_t v = 0; v < 256; v++) {
        uint32_t crc = v;
        for (unsigned bit = 0; bit < 8; bit++) {
            crc = (crc & 1) != 0 ? (crc >> 1) ^ POLYNOMIAL_REFLECTED : crc >> 1;
        }
        t->byte[0][v] = crc;
    }
    for (uint32_t v = 0; v < 256; v++) {
        for (unsigned k = 1; k < 8; k++) {
            t->byte[k][v] = zeros(t, t->byte[k - 1][v], 1);
        }
        for (unsigned k = 0; k < 4; k++) {
            t->shift[k][v] = zeros(t, v << (8 * k), STREAM_BYTES);
        }
    }
}

static const CrcTables *tables(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT; /* ThreadSanitizer sees it, and not GLib's */
    pthread_once(&once, tables_fill);
    return &the_tables;
}

uint32_t crc32c_generic(uint32_t crc, const void *data, size_t size)
{
    const CrcTables *t = tables();
    const uint8_t *p = data;
    crc = ~crc;
    for (; size >= 8; size -= 8, p += 8) {
        crc ^= (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        crc = t->byte[7][crc & 0xff] ^ t->byte[6][(crc >> 8) & 0xff] ^
              t->byte[5][(crc >> 16) & 0xff] ^ t->byte[4][crc >> 24] ^ t->byte[3][p[4]] ^
              t->byte[2][p[5]] ^ t->byte[1][p[6]] ^ t->byte[0][p[7]];
    }
    while (size-- > 0) {
        crc = t->byte[0][(crc ^ *p++) & 0xff] ^ (crc >> 8);
    }
    return ~crc;
}

#ifdef __x86_64__
static uint32_t shift_stream(const CrcTables *t, uint32_t crc)
{
    return t->shift[0][crc & 0xff] ^ t->shift[1][(crc >> 8) & 0xff] ^
           t->shift[2][(crc >> 16) & 0xff] ^ t->shift[3][crc >> 24];
}

static uint64_t word(const uint8_t *p)
{
    uint64_t w;
    memcpy(&w, p, sizeof w);
    return w;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t crc, const uint8_t *p,
                                                               size_t size)
{
    const CrcTables *t = tables();
    uint64_t a = (uint32_t)~crc;
    for (; size >= 3 * STREAM_BYTES; size -= 3 * STREAM_BYTES, p += 3 * STREAM_BYTES) {
        uint64_t b = 0, c = 0;
        for (size_t i = 0; i < STREAM_BYTES; i += 8) {
            a = _mm_crc32_u64(a, word(p + i));
            b = _mm_crc32_u64(b, word(p + STREAM_BYTES + i));
            c = _mm_crc32_u64(c, word(p + 2 * STREAM_BYTES + i));
        }
        a = shift_stream(t, (uint32_t)a) ^ (uint32_t)b;
        a = shift_stream(t, (uint32_t)a) ^ (uint32_t)c;
    }
    for (; size >= 8; size -= 8, p += 8) {
        a = _mm_crc32_u64(a, word(p));
    }
    uint32_t rest = (uint32_t)a;
    while (size-- > 0) {
        rest = _mm_crc32_u8(rest, *p++);
    }
    return ~rest;
}
#endif

uint32_t crc32c(uint32_t crc, const void *data, size_t size)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2")) {
        return crc32c_sse42(crc, data, size);
    }
#endif
    return crc32c_generic(crc, data, size);
}
