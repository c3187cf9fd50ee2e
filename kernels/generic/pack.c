/* Packing: file rows to panels of 16 outputs and back. One implementation for every ISA; the bytes
 * are documented in ops/packed.h. */
#include "proto/model/block_read.h"
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

/* ---- quants of one lane, 32 at a time, as groups of 4 in 32-bit words ---- */

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

static inline void nibble_rows_put(uint8_t (*rows)[64], unsigned lane, const uint8_t *q)
{
    for (unsigned j = 0; j < 4; j++) {
        store32(rows[j] + 4 * lane,
                (load32(q + 8 * j) & 0x0f0f0f0fu) | (load32(q + 8 * j + 4) & 0x0f0f0f0fu) << 4);
    }
}

static inline void nibble_rows_get(const uint8_t (*rows)[64], unsigned lane, uint8_t *q)
{
    for (unsigned j = 0; j < 4; j++) {
        uint32_t word = load32(rows[j] + 4 * lane);
        store32(q + 8 * j, word & 0x0f0f0f0fu);
        store32(q + 8 * j + 4, word >> 4 & 0x0f0f0f0fu);
    }
}

static inline void fifth_row_put(uint8_t *row, unsigned lane, const uint8_t *q)
{
    uint32_t word = 0;
    for (unsigned g = 0; g < 8; g++) {
        word |= (load32(q + 4 * g) >> 4 & 0x01010101u) << g;
    }
    store32(row + 4 * lane, word);
}

static inline void fifth_row_get(const uint8_t *row, unsigned lane, uint8_t *q)
{
    uint32_t word = load32(row + 4 * lane);
    for (unsigned g = 0; g < 8; g++) {
        store32(q + 4 * g, load32(q + 4 * g) | (word >> g & 0x01010101u) << 4);
    }
}

static inline void two_bit_row_put(uint8_t *row, unsigned lane, const uint8_t *q)
{
    uint32_t word = 0;
    for (unsigned g = 0; g < 4; g++) {
        word |= (load32(q + 4 * g) >> 4 & 0x03030303u) << 2 * g;
    }
    store32(row + 4 * lane, word);
}

static inline void two_bit_row_get(const uint8_t *row, unsigned lane, uint8_t *q)
{
    uint32_t word = load32(row + 4 * lane);
    for (unsigned g = 0; g < 4; g++) {
        store32(q + 4 * g, load32(q + 4 * g) | (word >> 2 * g & 0x03030303u) << 4);
    }
}

/* ---- records ---- */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE void lane_put(Dtype type, uint8_t *record, unsigned lane, const BlockValues *v)
{
    switch (type) {
    case DTYPE_Q4_0: {
        RecordQ40 *r = (RecordQ40 *)record;
        r->d[lane] = v->d;
        nibble_rows_put(r->q, lane, v->q);
        break;
    }
    case DTYPE_Q4_1: {
        RecordQ41 *r = (RecordQ41 *)record;
        r->d[lane] = v->d;
        r->m[lane] = v->m;
        nibble_rows_put(r->q, lane, v->q);
        break;
    }
    case DTYPE_Q5_0: {
        RecordQ50 *r = (RecordQ50 *)record;
        r->d[lane] = v->d;
        nibble_rows_put(r->q, lane, v->q);
        fifth_row_put(r->qh, lane, v->q);
        break;
    }
    case DTYPE_Q5_1: {
        RecordQ51 *r = (RecordQ51 *)record;
        r->d[lane] = v->d;
        r->m[lane] = v->m;
        nibble_rows_put(r->q, lane, v->q);
        fifth_row_put(r->qh, lane, v->q);
        break;
    }
    case DTYPE_Q8_0: {
        RecordQ80 *r = (RecordQ80 *)record;
        r->d[lane] = v->d;
        for (unsigned g = 0; g < 8; g++) {
            memcpy(r->q[g] + 4 * lane, v->q + 4 * g, 4);
        }
        break;
    }
    case DTYPE_Q4_K: {
        RecordQ4K *r = (RecordQ4K *)record;
        r->d[lane] = v->d;
        r->dmin[lane] = v->m;
        for (unsigned b = 0; b < 8; b++) {
            r->sc[b][lane] = v->sc[b];
            r->m[b / 2][lane][b % 2] = v->mins[b];
            nibble_rows_put(r->q[b], lane, v->q + 32 * b);
        }
        break;
    }
    case DTYPE_Q5_K: {
        RecordQ5K *r = (RecordQ5K *)record;
        r->d[lane] = v->d;
        r->dmin[lane] = v->m;
        for (unsigned b = 0; b < 8; b++) {
            r->sc[b][lane] = v->sc[b];
            r->m[b / 2][lane][b % 2] = v->mins[b];
            nibble_rows_put(r->q[b], lane, v->q + 32 * b);
            fifth_row_put(r->qh[b], lane, v->q + 32 * b);
        }
        break;
    }
    case DTYPE_Q6_K: {
        RecordQ6K *r = (RecordQ6K *)record;
        r->d[lane] = v->d;
        for (unsigned b = 0; b < 8; b++) {
            memcpy(r->sc[b][lane], v->sc + 2 * b, 2);
            nibble_rows_put(r->q[b], lane, v->q + 32 * b);
            two_bit_row_put(r->qh[b][0], lane, v->q + 32 * b);
            two_bit_row_put(r->qh[b][1], lane, v->q + 32 * b + 16);
        }
        break;
    }
    case DTYPE_F8_E4M3: {
        RecordF8 *r = (RecordF8 *)record;
        r->scale[lane] = v->scale;
        for (unsigned p = 0; p < 64; p++) {
            memcpy(r->q[p][lane], v->q + 2 * p, 2);
        }
        break;
    }
    default:
        assert(!"a quantised type");
    }
}

void record_put(Dtype type, uint8_t *record, unsigned lane, const BlockValues *v)
{
    lane_put(type, record, lane, v);
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

static bool is_float_type(Dtype type)
{
    return type == DTYPE_F32 || type == DTYPE_F16 || type == DTYPE_BF16;
}

static void put_floats(PackedMatrix *m, const uint8_t *src, uint32_t row, uint32_t col0,
                       uint32_t n_cols)
{
    uint8_t *panel = m->data + row / PANEL_ROWS * m->panel_bytes;
    const unsigned lane = row % PANEL_ROWS;
    for (uint32_t c = 0; c < n_cols; c++) {
        const uint32_t k = col0 + c;
        if (m->type == DTYPE_F32) {
            memcpy(&((RecordF32 *)panel)[k].w[lane], src + 4 * (size_t)c, 4);
        } else if (m->type == DTYPE_F16) {
            memcpy(&((RecordF16 *)panel)[k].w[lane], src + 2 * (size_t)c, 2);
        } else {
            memcpy(&((RecordBF16 *)panel)[k / 2].w[lane][k % 2], src + 2 * (size_t)c, 2);
        }
    }
}

/* Inlined per type, so that the switches fall away. */
ALWAYS_INLINE void put_blocks(Dtype type, PackedMatrix *m, const uint8_t *src, size_t row_bytes,
                              uint32_t row0, uint32_t n_rows, uint32_t col0, uint32_t n_cols)
{
    const DtypeInfo *info = dtype_info(type);
    const size_t record_bytes = record_shape(type).bytes;
    BlockValues values;
    /* Up to 16 rows of a panel advance together, so that the panel is written as one stream. */
    for (uint32_t r = 0; r < n_rows;) {
        const unsigned lane = (row0 + r) % PANEL_ROWS;
        const uint32_t n = n_rows - r < PANEL_ROWS - lane ? n_rows - r : PANEL_ROWS - lane;
        uint8_t *record =
            m->data + (row0 + r) / PANEL_ROWS * m->panel_bytes + col0 / info->block * record_bytes;
        const uint8_t *from = src + r * row_bytes;
        for (uint32_t c = 0; c < n_cols / info->block; c++) {
            for (uint32_t i = 0; i < n; i++) {
                block_read_inline(type, from + i * row_bytes + c * info->block_bytes, &values);
                lane_put(type, record, lane + i, &values);
            }
            record += record_bytes;
        }
        r += n;
    }
}

void packed_put(PackedMatrix *m, const void *src, size_t row_bytes, uint32_t row0, uint32_t n_rows,
                uint32_t col0, uint32_t n_cols)
{
    const uint8_t *from = src;
    if (is_float_type(m->type)) {
        for (uint32_t r = 0; r < n_rows; r++) {
            put_floats(m, from + r * row_bytes, row0 + r, col0, n_cols);
        }
        return;
    }
    switch (m->type) {
#define TYPE(type)                                                                                 \
    case type:                                                                                     \
        put_blocks(type, m, from, row_bytes, row0, n_rows, col0, n_cols);                          \
        break
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
        assert(!"a quantised type");
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
