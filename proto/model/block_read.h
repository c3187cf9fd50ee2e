/* block_read() of blocks.h for loops over blocks of one type: with a constant type its switch falls
 * away. */
#pragma once

#include "proto/model/blocks.h"

#include <assert.h>
#include <string.h>

static inline uint16_t block_load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* n bytes hold 2n nibbles: the low ones come first, then the high ones. */
static inline void block_nibbles_read(const uint8_t *src, unsigned n, uint8_t *q)
{
    for (unsigned i = 0; i < n; i++) {
        q[i] = src[i] & 15;
        q[i + n] = src[i] >> 4;
    }
}

/* Q5_0, Q5_1: bit i of a little-endian word is the fifth bit of quant i. */
static inline void block_fifth_bits_read(const uint8_t *src, uint8_t *q)
{
    uint32_t bits;
    memcpy(&bits, src, sizeof bits);
    for (unsigned i = 0; i < 32; i += 4) {
        /* The product puts bit j of the four at bit 8j, the sums of the others do not meet there.
         */
        const uint32_t spread = (bits >> i & 15u) * 0x00204081u & 0x01010101u;
        uint32_t word;
        memcpy(&word, q + i, sizeof word);
        word |= spread << 4;
        memcpy(q + i, &word, sizeof word);
    }
}

/* Q4_K, Q5_K: eight 6-bit scales and minima in 12 bytes. */
static inline void block_scales_read(const uint8_t *src, uint8_t *sc, uint8_t *mins)
{
    for (unsigned b = 0; b < 4; b++) {
        sc[b] = src[b] & 63;
        mins[b] = src[b + 4] & 63;
        sc[b + 4] = (uint8_t)((src[b + 8] & 15) | (src[b] >> 6) << 4);
        mins[b + 4] = (uint8_t)((src[b + 8] >> 4) | (src[b + 4] >> 6) << 4);
    }
}

/* File layouts: Q4_0 {d, 16}, Q4_1 {d, m, 16}, Q5_0 {d, 4, 16}, Q5_1 {d, m, 4, 16}, Q8_0 {d, 32},
 * Q4_K {d, dmin, 12, 128}, Q5_K {d, dmin, 12, 32, 128}, Q6_K {128 low, 64 high, 16 scales, d},
 * F8_E4M3 {scale, 128}; numbers are bytes. */
static inline __attribute__((always_inline)) void block_read_inline(Dtype type, const uint8_t *src,
                                                                    BlockValues *out)
{
    switch (type) {
    case DTYPE_Q4_0:
        out->d = block_load16(src);
        block_nibbles_read(src + 2, 16, out->q);
        break;
    case DTYPE_Q4_1:
        out->d = block_load16(src);
        out->m = block_load16(src + 2);
        block_nibbles_read(src + 4, 16, out->q);
        break;
    case DTYPE_Q5_0:
        out->d = block_load16(src);
        block_nibbles_read(src + 6, 16, out->q);
        block_fifth_bits_read(src + 2, out->q);
        break;
    case DTYPE_Q5_1:
        out->d = block_load16(src);
        out->m = block_load16(src + 2);
        block_nibbles_read(src + 8, 16, out->q);
        block_fifth_bits_read(src + 4, out->q);
        break;
    case DTYPE_Q8_0:
        out->d = block_load16(src);
        for (unsigned i = 0; i < 32; i++) {
            out->q[i] = src[2 + i] ^ 0x80;
        }
        break;
    case DTYPE_Q4_K:
    case DTYPE_Q5_K: {
        const uint8_t *low = src + (type == DTYPE_Q4_K ? 16 : 48);
        out->d = block_load16(src);
        out->m = block_load16(src + 2);
        block_scales_read(src + 4, out->sc, out->mins);
        for (unsigned c = 0; c < 4; c++) {
            block_nibbles_read(low + 32 * c, 32, out->q + 64 * c);
        }
        if (type == DTYPE_Q5_K) {
            for (unsigned b = 0; b < 8; b++) {
                for (unsigned i = 0; i < 32; i++) {
                    out->q[32 * b + i] =
                        (uint8_t)(out->q[32 * b + i] | (src[16 + i] >> b & 1) << 4);
                }
            }
        }
        break;
    }
    case DTYPE_Q6_K:
        for (unsigned half = 0; half < 2; half++) {
            uint8_t *q = out->q + 128 * half;
            block_nibbles_read(src + 64 * half, 64, q);
            for (unsigned c = 0; c < 4; c++) {
                for (unsigned i = 0; i < 32; i++) {
                    q[32 * c + i] =
                        (uint8_t)(q[32 * c + i] | (src[128 + 32 * half + i] >> 2 * c & 3) << 4);
                }
            }
        }
        memcpy(out->sc, src + 192, 16);
        out->d = block_load16(src + 208);
        break;
    case DTYPE_F8_E4M3:
        memcpy(&out->scale, src, sizeof out->scale);
        memcpy(out->q, src + sizeof out->scale, 128);
        break;
    default:
        assert(!"a quantised type");
    }
}
