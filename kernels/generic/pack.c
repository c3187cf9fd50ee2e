/* Packing: file rows to panels of 16 outputs and back. One implementation for every ISA; the bytes
 * are documented in ops/packed.h, those of the file in proto/model/blocks.c. */
#include "kernels/ops/packed.h"

#include <assert.h>
#include <string.h>

RecordShape record_shape(Dtype type)
{
    switch (type) {
    case DTYPE_F32:
        return (RecordShape){1, sizeof(RecordF32)};
    case DTYPE_F16:
        return (RecordShape){1, sizeof(RecordF16)};
    case DTYPE_BF16:
        return (RecordShape){2, sizeof(RecordBF16)};
    case DTYPE_Q4_0:
        return (RecordShape){32, sizeof(RecordQ40)};
    case DTYPE_Q4_1:
        return (RecordShape){32, sizeof(RecordQ41)};
    case DTYPE_Q5_0:
        return (RecordShape){32, sizeof(RecordQ50)};
    case DTYPE_Q5_1:
        return (RecordShape){32, sizeof(RecordQ51)};
    case DTYPE_Q8_0:
        return (RecordShape){32, sizeof(RecordQ80)};
    case DTYPE_Q4_K:
        return (RecordShape){256, sizeof(RecordQ4K)};
    case DTYPE_Q5_K:
        return (RecordShape){256, sizeof(RecordQ5K)};
    case DTYPE_Q6_K:
        return (RecordShape){256, sizeof(RecordQ6K)};
    case DTYPE_F8_E4M3:
        return (RecordShape){128, sizeof(RecordF8)};
    default:
        return (RecordShape){0, 0};
    }
}

size_t packed_panel_bytes(Dtype type, uint32_t n_in)
{
    const RecordShape shape = record_shape(type);
    if (shape.k == 0 || n_in == 0 || n_in % dtype_info(type)->block != 0) {
        return 0;
    }
    return ((size_t)n_in + shape.k - 1) / shape.k * shape.bytes;
}

uint32_t packed_block_bytes(Dtype type)
{
    const RecordShape shape = record_shape(type);
    if (shape.k == 0) {
        return 0;
    }
    const uint32_t blocks = PANEL_ROWS * shape.k / dtype_info(type)->block;
    return (shape.bytes + blocks - 1) / blocks;
}

ActKind act_kind_of(Dtype weight)
{
    switch (weight) {
    case DTYPE_F32:
    case DTYPE_F16:
    case DTYPE_F8_E4M3:
        return ACT_F32;
    case DTYPE_BF16:
        return ACT_BF16;
    case DTYPE_Q4_K:
    case DTYPE_Q5_K:
    case DTYPE_Q6_K:
        return ACT_Q8_256;
    default:
        return ACT_Q8_32;
    }
}

#define ALWAYS_INLINE static inline __attribute__((always_inline))

static inline uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, sizeof v);
}

/* ---- four lanes at a time ----
 * A row of a record is a 32-bit word (4 quants of one group) or half of one for each lane, so four
 * lanes of it are one vector, and what is done to the bits of quants is done to four lanes at once.
 * Baseline instructions of any CPU do. n < 4 lanes: src repeats a row, only n are stored. */

#define QUAD 4u
typedef uint32_t Words __attribute__((vector_size(4 * QUAD)));
typedef uint16_t Halves __attribute__((vector_size(4 * QUAD)));

typedef struct Lanes {
    const uint8_t *src[QUAD]; /* the block of each in its row of the file */
    unsigned first, n;        /* lanes of the panel */
} Lanes;

/* 4 * QUAD bytes of each lane: word i of lane l to out[i][l]. */
ALWAYS_INLINE void words_read(const Lanes *l, size_t at, Words *out)
{
    Words row[QUAD];
    for (unsigned i = 0; i < QUAD; i++) {
        memcpy(&row[i], l->src[i] + at, sizeof row[i]);
    }
    const Words a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
    const Words b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const Words c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const Words d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    out[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    out[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    out[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    out[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

ALWAYS_INLINE Words word_read(const Lanes *l, size_t at)
{
    return (Words){load32(l->src[0] + at), load32(l->src[1] + at), load32(l->src[2] + at),
                   load32(l->src[3] + at)};
}

/* A word of each lane to a row of 64 bytes. */
ALWAYS_INLINE void words_put(const Lanes *l, void *row, Words w)
{
    uint8_t *to = (uint8_t *)row + 4 * l->first;
    if (l->n == QUAD) {
        memcpy(to, &w, sizeof w);
        return;
    }
    for (unsigned i = 0; i < l->n; i++) {
        store32(to + 4 * i, w[i]);
    }
}

/* The lower halves to a row of 32 bytes, the upper ones to another. Two shuffles: gcc 12 takes one
 * of all eight apart. */
ALWAYS_INLINE void halves_put(const Lanes *l, void *low, void *high, Words w)
{
    Halves h = (Halves)w;
    h = __builtin_shufflevector(h, h, 0, 2, 1, 3, 4, 6, 5, 7);
    const Words pairs = __builtin_shufflevector((Words)h, (Words)h, 0, 2, 1, 3);
    memcpy((uint8_t *)low + 2 * l->first, &pairs, 2 * (size_t)l->n);
    memcpy((uint8_t *)high + 2 * l->first, (const uint8_t *)&pairs + 2 * QUAD, 2 * (size_t)l->n);
}

ALWAYS_INLINE void half_put(const Lanes *l, size_t at, uint16_t *row)
{
    for (unsigned i = 0; i < l->n; i++) {
        memcpy(row + l->first + i, l->src[i] + at, sizeof *row);
    }
}

/* Quants of 32 k, a word for each group: low four bits of each byte. */
ALWAYS_INLINE void nibble_rows_put(const Lanes *l, uint8_t (*rows)[64], const Words *q)
{
    for (unsigned j = 0; j < 4; j++) {
        words_put(l, rows[j], (q[2 * j] & 0x0f0f0f0fu) | (q[2 * j + 1] & 0x0f0f0f0fu) << 4);
    }
}

/* The same of the high four bits. */
ALWAYS_INLINE void high_nibble_rows_put(const Lanes *l, uint8_t (*rows)[64], const Words *q)
{
    for (unsigned j = 0; j < 4; j++) {
        words_put(l, rows[j], (q[2 * j] >> 4 & 0x0f0f0f0fu) | (q[2 * j + 1] & 0xf0f0f0f0u));
    }
}

/* Q4_0 ... Q5_1: 16 bytes, k 0-15 in low nibbles, 16-31 in high ones. */
ALWAYS_INLINE void nibbles_put(const Lanes *l, size_t at, uint8_t (*rows)[64])
{
    Words w[8];
    words_read(l, at, w);
    for (unsigned g = 0; g < 4; g++) {
        w[4 + g] = w[g] >> 4;
    }
    nibble_rows_put(l, rows, w);
}

/* Swaps the bits that `mask` names with those `shift` above them. */
ALWAYS_INLINE Words bits_swap(Words w, unsigned shift, uint32_t mask)
{
    const Words t = (w ^ w >> shift) & mask;
    return w ^ t ^ t << shift;
}

/* Q5_0, Q5_1: bit 4 g + b, the fifth of element b of group g, goes to bit g of byte b: an index of
 * bits (g2 g1 g0 b1 b0) becomes (b1 b0 g2 g1 g0), two of its five digits swapped at a time. */
ALWAYS_INLINE Words fifth_bits(Words w)
{
    w = bits_swap(w, 14, 0x0000ccccu);
    w = bits_swap(w, 7, 0x00aa00aau);
    w = bits_swap(w, 2, 0x0c0c0c0cu);
    return bits_swap(w, 1, 0x22222222u);
}

/* Swaps the fields of `low` that `mask << shift` names with those of `high` under `mask`. */
ALWAYS_INLINE void fields_swap(Words *low, Words *high, unsigned shift, uint32_t mask)
{
    const Words t = (*low >> shift ^ *high) & mask;
    *high ^= t;
    *low ^= t << shift;
}

/* Q4_K, Q5_K: 6-bit scales and minima of eight 32-blocks in 12 bytes. */
ALWAYS_INLINE void scales_put(const Lanes *l, size_t at, uint8_t (*sc)[16], uint8_t (*mins)[16][2])
{
    const Words a = word_read(l, at), b = word_read(l, at + 4), c = word_read(l, at + 8);
    const Words s[2] = {a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u)};
    const Words m[2] = {b & 0x3f3f3f3fu, (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u)};
    for (unsigned h = 0; h < 2; h++) {
        for (unsigned i = 0; i < l->n; i++) {
            for (unsigned j = 0; j < 4; j++) {
                sc[4 * h + j][l->first + i] = (uint8_t)(s[h][i] >> 8 * j);
            }
        }
        halves_put(l, mins[2 * h], mins[2 * h + 1], m[h]);
    }
}

/* Q4_K, Q5_K: 32 bytes a pair of 32-blocks, the first in low nibbles. */
ALWAYS_INLINE void nibbles_k_put(const Lanes *l, size_t at, uint8_t (*q)[4][64])
{
    for (unsigned c = 0; c < 4; c++) {
        Words w[8];
        words_read(l, at + 32 * c, w);
        words_read(l, at + 32 * c + 16, w + 4);
        nibble_rows_put(l, q[2 * c], w);
        high_nibble_rows_put(l, q[2 * c + 1], w);
    }
}

/* Q5_K: bit b of byte i is the fifth of element i of 32-block b; word g holds group g of all
 * blocks, a row of the record all groups of block b: in each byte the 8 x 8 bits are transposed. */
ALWAYS_INLINE void fifth_rows_put(const Lanes *l, size_t at, uint8_t (*qh)[64])
{
    Words w[8];
    words_read(l, at, w);
    words_read(l, at + 16, w + 4);
    for (unsigned g = 0; g < 4; g++) {
        fields_swap(&w[g], &w[g + 4], 4, 0x0f0f0f0fu);
    }
    for (unsigned g = 0; g < 8; g += 4) {
        fields_swap(&w[g], &w[g + 2], 2, 0x33333333u);
        fields_swap(&w[g + 1], &w[g + 3], 2, 0x33333333u);
        fields_swap(&w[g], &w[g + 1], 1, 0x55555555u);
        fields_swap(&w[g + 2], &w[g + 3], 1, 0x55555555u);
    }
    for (unsigned b = 0; b < 8; b++) {
        words_put(l, qh[b], w[b]);
    }
}

/* Q6_K: in each half of 128 k, low nibbles of 64 bytes are 32-blocks 0 and 1, high ones 2 and 3;
 * bits 2 c of byte i of the next 32 are the upper two of element i of block c. */
ALWAYS_INLINE void six_bits_put(const Lanes *l, RecordQ6K *r)
{
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned b = 0; b < 2; b++) {
            Words w[8];
            words_read(l, 64 * half + 32 * b, w);
            words_read(l, 64 * half + 32 * b + 16, w + 4);
            nibble_rows_put(l, r->q[4 * half + b], w);
            high_nibble_rows_put(l, r->q[4 * half + b + 2], w);
        }
        for (unsigned k = 0; k < 2; k++) {
            Words w[4];
            words_read(l, 128 + 32 * half + 16 * k, w);
            fields_swap(&w[0], &w[2], 4, 0x0f0f0f0fu);
            fields_swap(&w[1], &w[3], 4, 0x0f0f0f0fu);
            fields_swap(&w[0], &w[1], 2, 0x33333333u);
            fields_swap(&w[2], &w[3], 2, 0x33333333u);
            for (unsigned c = 0; c < 4; c++) {
                words_put(l, r->qh[4 * half + c][k], w[c]);
            }
        }
    }
}

/* ---- records ---- */

ALWAYS_INLINE void block_put(Dtype type, uint8_t *record, const Lanes *l)
{
    Words w[4];
    switch (type) {
    case DTYPE_Q4_0: {
        RecordQ40 *r = (RecordQ40 *)record;
        half_put(l, 0, r->d);
        nibbles_put(l, 2, r->q);
        break;
    }
    case DTYPE_Q4_1: {
        RecordQ41 *r = (RecordQ41 *)record;
        half_put(l, 0, r->d);
        half_put(l, 2, r->m);
        nibbles_put(l, 4, r->q);
        break;
    }
    case DTYPE_Q5_0: {
        RecordQ50 *r = (RecordQ50 *)record;
        half_put(l, 0, r->d);
        words_put(l, r->qh, fifth_bits(word_read(l, 2)));
        nibbles_put(l, 6, r->q);
        break;
    }
    case DTYPE_Q5_1: {
        RecordQ51 *r = (RecordQ51 *)record;
        half_put(l, 0, r->d);
        half_put(l, 2, r->m);
        words_put(l, r->qh, fifth_bits(word_read(l, 4)));
        nibbles_put(l, 8, r->q);
        break;
    }
    case DTYPE_Q8_0: {
        RecordQ80 *r = (RecordQ80 *)record;
        half_put(l, 0, r->d);
        for (unsigned g = 0; g < 8; g += 4) {
            words_read(l, 2 + 4 * g, w);
            for (unsigned i = 0; i < 4; i++) {
                words_put(l, r->q[g + i], w[i] ^ 0x80808080u);
            }
        }
        break;
    }
    case DTYPE_Q4_K: {
        RecordQ4K *r = (RecordQ4K *)record;
        half_put(l, 0, r->d);
        half_put(l, 2, r->dmin);
        scales_put(l, 4, r->sc, r->m);
        nibbles_k_put(l, 16, r->q);
        break;
    }
    case DTYPE_Q5_K: {
        RecordQ5K *r = (RecordQ5K *)record;
        half_put(l, 0, r->d);
        half_put(l, 2, r->dmin);
        scales_put(l, 4, r->sc, r->m);
        fifth_rows_put(l, 16, r->qh);
        nibbles_k_put(l, 48, r->q);
        break;
    }
    case DTYPE_Q6_K: {
        RecordQ6K *r = (RecordQ6K *)record;
        half_put(l, 208, r->d);
        for (unsigned b = 0; b < 8; b += 2) {
            halves_put(l, r->sc[b], r->sc[b + 1], word_read(l, 192 + 2 * b));
        }
        six_bits_put(l, r);
        break;
    }
    case DTYPE_F8_E4M3: {
        RecordF8 *r = (RecordF8 *)record;
        words_put(l, r->scale, word_read(l, 0));
        for (unsigned k = 0; k < 128; k += 16) {
            words_read(l, 4 + k, w);
            for (unsigned i = 0; i < 4; i++) {
                halves_put(l, r->q[k / 2 + 2 * i], r->q[k / 2 + 2 * i + 1], w[i]);
            }
        }
        break;
    }
    default:
        assert(!"a quantised type");
    }
}

/* Quants of one lane, 32 at a time, as groups of 4 in 32-bit words. */

static inline void nibble_rows_get(const uint8_t (*rows)[64], unsigned lane, uint8_t *q)
{
    for (unsigned j = 0; j < 4; j++) {
        uint32_t word = load32(rows[j] + 4 * lane);
        store32(q + 8 * j, word & 0x0f0f0f0fu);
        store32(q + 8 * j + 4, word >> 4 & 0x0f0f0f0fu);
    }
}

static inline void fifth_row_get(const uint8_t *row, unsigned lane, uint8_t *q)
{
    uint32_t word = load32(row + 4 * lane);
    for (unsigned g = 0; g < 8; g++) {
        store32(q + 4 * g, load32(q + 4 * g) | (word >> g & 0x01010101u) << 4);
    }
}

static inline void two_bit_row_get(const uint8_t *row, unsigned lane, uint8_t *q)
{
    uint32_t word = load32(row + 4 * lane);
    for (unsigned g = 0; g < 4; g++) {
        store32(q + 4 * g, load32(q + 4 * g) | (word >> 2 * g & 0x03030303u) << 4);
    }
}

void record_get(Dtype type, const uint8_t *record, unsigned lane, BlockValues *v)
{
    switch (type) {
    case DTYPE_Q4_0: {
        const RecordQ40 *r = (const RecordQ40 *)record;
        v->d = r->d[lane];
        nibble_rows_get(r->q, lane, v->q);
        break;
    }
    case DTYPE_Q4_1: {
        const RecordQ41 *r = (const RecordQ41 *)record;
        v->d = r->d[lane];
        v->m = r->m[lane];
        nibble_rows_get(r->q, lane, v->q);
        break;
    }
    case DTYPE_Q5_0: {
        const RecordQ50 *r = (const RecordQ50 *)record;
        v->d = r->d[lane];
        nibble_rows_get(r->q, lane, v->q);
        fifth_row_get(r->qh, lane, v->q);
        break;
    }
    case DTYPE_Q5_1: {
        const RecordQ51 *r = (const RecordQ51 *)record;
        v->d = r->d[lane];
        v->m = r->m[lane];
        nibble_rows_get(r->q, lane, v->q);
        fifth_row_get(r->qh, lane, v->q);
        break;
    }
    case DTYPE_Q8_0: {
        const RecordQ80 *r = (const RecordQ80 *)record;
        v->d = r->d[lane];
        for (unsigned g = 0; g < 8; g++) {
            memcpy(v->q + 4 * g, r->q[g] + 4 * lane, 4);
        }
        break;
    }
    case DTYPE_Q4_K: {
        const RecordQ4K *r = (const RecordQ4K *)record;
        v->d = r->d[lane];
        v->m = r->dmin[lane];
        for (unsigned b = 0; b < 8; b++) {
            v->sc[b] = r->sc[b][lane];
            v->mins[b] = r->m[b / 2][lane][b % 2];
            nibble_rows_get(r->q[b], lane, v->q + 32 * b);
        }
        break;
    }
    case DTYPE_Q5_K: {
        const RecordQ5K *r = (const RecordQ5K *)record;
        v->d = r->d[lane];
        v->m = r->dmin[lane];
        for (unsigned b = 0; b < 8; b++) {
            v->sc[b] = r->sc[b][lane];
            v->mins[b] = r->m[b / 2][lane][b % 2];
            nibble_rows_get(r->q[b], lane, v->q + 32 * b);
            fifth_row_get(r->qh[b], lane, v->q + 32 * b);
        }
        break;
    }
    case DTYPE_Q6_K: {
        const RecordQ6K *r = (const RecordQ6K *)record;
        v->d = r->d[lane];
        for (unsigned b = 0; b < 8; b++) {
            memcpy(v->sc + 2 * b, r->sc[b][lane], 2);
            nibble_rows_get(r->q[b], lane, v->q + 32 * b);
            two_bit_row_get(r->qh[b][0], lane, v->q + 32 * b);
            two_bit_row_get(r->qh[b][1], lane, v->q + 32 * b + 16);
        }
        break;
    }
    case DTYPE_F8_E4M3: {
        const RecordF8 *r = (const RecordF8 *)record;
        v->scale = r->scale[lane];
        for (unsigned p = 0; p < 64; p++) {
            memcpy(v->q + 2 * p, r->q[p][lane], 2);
        }
        break;
    }
    default:
        assert(!"a quantised type");
    }
}

/* ---- rectangles ---- */

static void put_float(Dtype type, uint8_t *panel, unsigned lane, uint32_t k, const uint8_t *src)
{
    if (type == DTYPE_F32) {
        memcpy(&((RecordF32 *)panel)[k].w[lane], src, 4);
    } else if (type == DTYPE_F16) {
        memcpy(&((RecordF16 *)panel)[k].w[lane], src, 2);
    } else {
        memcpy(&((RecordBF16 *)panel)[k / 2].w[lane][k % 2], src, 2);
    }
}

/* 4 * QUAD bytes of each lane, beginning with element k of their rows (BF16: an even one). */
ALWAYS_INLINE void float_words_put(Dtype type, uint8_t *panel, uint32_t k, const Lanes *l,
                                   size_t at)
{
    Words w[4];
    words_read(l, at, w);
    for (unsigned i = 0; i < 4; i++) {
        if (type == DTYPE_F32) {
            words_put(l, ((RecordF32 *)panel)[k + i].w, w[i]);
        } else if (type == DTYPE_F16) {
            RecordF16 *r = (RecordF16 *)panel + k + 2 * i;
            halves_put(l, r[0].w, r[1].w, w[i]);
        } else {
            words_put(l, ((RecordBF16 *)panel)[k / 2 + i].w, w[i]);
        }
    }
}

/* Lanes `first` and following of a panel from `src`, n > 0 rows of row_bytes; at most QUAD. */
ALWAYS_INLINE Lanes lanes_of(const uint8_t *src, size_t row_bytes, unsigned first, uint32_t n)
{
    Lanes l = {.first = first, .n = n < QUAD ? n : QUAD};
    for (uint32_t i = 0; i < QUAD; i++) {
        l.src[i] = src + (i < l.n ? i : l.n - 1) * row_bytes;
    }
    return l;
}

/* The rows of a panel advance together, so that it is written as one stream; `src` is theirs, the
 * first one's is `lane`. */
ALWAYS_INLINE void put_blocks(Dtype type, uint8_t *panel, unsigned lane, uint32_t n_rows,
                              const uint8_t *src, size_t row_bytes, uint32_t col0, uint32_t n_cols)
{
    const DtypeInfo *info = dtype_info(type);
    const size_t record_bytes = record_shape(type).bytes;
    uint8_t *record = panel + col0 / info->block * record_bytes;
    for (uint32_t c = 0; c < n_cols / info->block; c++) {
        for (uint32_t r = 0; r < n_rows; r += QUAD) {
            Lanes l = lanes_of(src + r * row_bytes, row_bytes, lane + r, n_rows - r);
            if (l.n == QUAD) {
                l.n = QUAD; /* a constant from here on */
                block_put(type, record, &l);
            } else {
                block_put(type, record, &l);
            }
        }
        record += record_bytes;
        src += info->block_bytes;
    }
}

ALWAYS_INLINE void put_floats(Dtype type, uint8_t *panel, unsigned lane, uint32_t n_rows,
                              const uint8_t *src, size_t row_bytes, uint32_t col0, uint32_t n_cols)
{
    const uint32_t size = type == DTYPE_F32 ? 4 : 2, step = 4 * QUAD / size;
    const uint32_t edge = type == DTYPE_BF16 ? col0 % 2 : 0; /* half of a pair */
    for (uint32_t c = 0, n; c < n_cols; c += n) {
        const bool whole = c >= edge && c + step <= n_cols;
        n = whole ? step : 1;
        for (uint32_t r = 0; whole && r < n_rows; r += QUAD) {
            Lanes l = lanes_of(src + r * row_bytes, row_bytes, lane + r, n_rows - r);
            if (l.n == QUAD) {
                l.n = QUAD;
                float_words_put(type, panel, col0 + c, &l, (size_t)size * c);
            } else {
                float_words_put(type, panel, col0 + c, &l, (size_t)size * c);
            }
        }
        for (uint32_t r = 0; !whole && r < n_rows; r++) {
            put_float(type, panel, lane + r, col0 + c, src + r * row_bytes + (size_t)size * c);
        }
    }
}

/* Inlined per type, so that the switches fall away. */
ALWAYS_INLINE void put_rows(Dtype type, PackedMatrix *m, const uint8_t *src, size_t row_bytes,
                            uint32_t row0, uint32_t n_rows, uint32_t col0, uint32_t n_cols)
{
    for (uint32_t r = 0, n; r < n_rows; r += n) {
        uint8_t *panel = m->data + (row0 + r) / PANEL_ROWS * m->panel_bytes;
        const unsigned lane = (row0 + r) % PANEL_ROWS;
        n = n_rows - r < PANEL_ROWS - lane ? n_rows - r : PANEL_ROWS - lane;
        if (type == DTYPE_F32 || type == DTYPE_F16 || type == DTYPE_BF16) {
            put_floats(type, panel, lane, n, src + r * row_bytes, row_bytes, col0, n_cols);
        } else {
            put_blocks(type, panel, lane, n, src + r * row_bytes, row_bytes, col0, n_cols);
        }
    }
}

void packed_put(PackedMatrix *m, const void *src, size_t row_bytes, uint32_t row0, uint32_t n_rows,
                uint32_t col0, uint32_t n_cols)
{
    switch (m->type) {
#define TYPE(type)                                                                                 \
    case type:                                                                                     \
        put_rows(type, m, src, row_bytes, row0, n_rows, col0, n_cols);                             \
        break
        TYPE(DTYPE_F32);
        TYPE(DTYPE_F16);
        TYPE(DTYPE_BF16);
        TYPE(DTYPE_Q4_0);
        TYPE(DTYPE_Q4_1);
        TYPE(DTYPE_Q5_0);
        TYPE(DTYPE_Q5_1);
        TYPE(DTYPE_Q8_0);
        TYPE(DTYPE_Q4_K);
        TYPE(DTYPE_Q5_K);
        TYPE(DTYPE_Q6_K);
        TYPE(DTYPE_F8_E4M3);
#undef TYPE
    default:
        assert(!"a type of weights");
    }
}

void packed_get_row(const PackedMatrix *m, uint32_t row, float *out)
{
    const uint8_t *panel = m->data + row / PANEL_ROWS * m->panel_bytes;
    const unsigned lane = row % PANEL_ROWS;
    const RecordShape shape = record_shape(m->type);
    BlockValues values = {0};
    for (uint32_t k = 0; k < m->n_in; k += shape.k, panel += shape.bytes) {
        if (m->type == DTYPE_F32) {
            out[k] = ((const RecordF32 *)panel)->w[lane];
        } else if (m->type == DTYPE_F16) {
            out[k] = f16_to_f32(((const RecordF16 *)panel)->w[lane]);
        } else if (m->type == DTYPE_BF16) {
            const uint16_t *pair = ((const RecordBF16 *)panel)->w[lane];
            out[k] = bf16_to_f32(pair[0]);
            if (k + 1 < m->n_in) {
                out[k + 1] = bf16_to_f32(pair[1]);
            }
        } else {
            record_get(m->type, panel, lane, &values);
            block_dequantise(m->type, &values, out + k);
        }
    }
}
