/* What matmul tests share: random weights in file format, packed; activations; a call of a table's
 * kernel. Header-only, so that unit and parity tests can use it. */
#pragma once

#include "kernels/kernels.h"

#include <glib.h>
#include <stdlib.h>
#include <string.h>

/* Of GGUF files. */
static const Dtype weight_types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q4_0,
                                     DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1, DTYPE_Q8_0,
                                     DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
/* All that hosts multiply. */
static const Dtype host_types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q4_0,
                                   DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1, DTYPE_Q8_0,
                                   DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K, DTYPE_F8_E4M3};

static inline uint64_t case_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* About normal with deviation 1: a sum of four uniform numbers. */
static inline float case_normal(uint64_t *state)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += (float)(case_random(state) >> 40) * 0x1p-24f - 0.5f;
    }
    return sum * 1.7320508f;
}

static inline void *case_alloc(size_t n)
{
    void *p = aligned_alloc(64, (n + 63) / 64 * 64);
    memset(p, 0, (n + 63) / 64 * 64);
    return p;
}

typedef struct MatmulCase {
    Dtype type;
    uint32_t rows, n_out, n_in;
    size_t row_bytes;
    uint8_t *file; /* n_out rows in file format */
    PackedMatrix w;
    float *x; /* [rows][n_in] */
} MatmulCase;

typedef enum CaseValues {
    VALUES_NORMAL,
    VALUES_EXTREME,   /* random scale exponents in weights and activations, zero blocks */
    VALUES_SUBNORMAL, /* products around 2^-126 */
} CaseValues;

static inline float case_value(CaseValues values, uint64_t *state, uint32_t k)
{
    static const float extremes[] = {0,       1,         0x1p-20f, 0x1p10f,   0x1p-60f,
                                     0x1p30f, 0x1p-110f, -0.0f,    0x1p-130f, 0x1p60f};
    const float v = case_normal(state);
    if (values == VALUES_EXTREME) {
        return v * extremes[(case_random(state) >> 20 & 3) ? k / 32 % 2 : case_random(state) % 10];
    }
    if (values == VALUES_SUBNORMAL) {
        return v * 0x1p-62f;
    }
    return v;
}

/* An F8_E4M3 row of random bits: no NaN, scales of random exponents, now and then zero or tiny. */
static inline void case_wild_f8(uint8_t *row, uint32_t n_in, uint64_t *state)
{
    for (uint32_t b = 0; b < n_in / 128; b++, row += 132) {
        const uint32_t random = (uint32_t)case_random(state);
        const uint32_t scale = (random & 0x807fffffu) | (64u + random / 256 % 100) << 23;
        memcpy(row, &scale, 4);
        if (random % 8 == 0) {
            memset(row, 0, random % 16 ? 4 : 3);
        }
        for (unsigned i = 4; i < 132; i++) {
            row[i] = (row[i] & 0x7f) == 0x7f ? row[i] - 1 : row[i];
        }
    }
}

/* Overwrites every f16 scale of a file row by one with a random exponent, now and then zero. */
static inline void case_wild_scales(Dtype type, uint8_t *row, uint32_t n_in, uint64_t *state)
{
    const DtypeInfo *info = dtype_info(type);
    for (uint32_t b = 0; b < n_in / info->block; b++, row += info->block_bytes) {
        const uint16_t d = (uint16_t)(case_random(state) & 0xbbff),
                       m = (uint16_t)(case_random(state) & 0xbbff);
        uint8_t *at = row + (type == DTYPE_Q6_K ? 208 : 0);
        memcpy(at, &d, 2);
        if (type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K) {
            memcpy(row + 2, &m, 2);
        }
        if (case_random(state) % 8 == 0) {
            memset(at, 0, 2);
        }
    }
}

static inline void matmul_case_init(MatmulCase *c, Dtype type, uint32_t rows, uint32_t n_out,
                                    uint32_t n_in, CaseValues values, uint64_t seed)
{
    uint64_t state = seed;
    *c = (MatmulCase){.type = type, .rows = rows, .n_out = n_out, .n_in = n_in};
    dtype_row_bytes(type, n_in, &c->row_bytes);
    c->file = case_alloc(n_out * c->row_bytes);
    c->x = case_alloc((size_t)rows * n_in * 4);
    float *row = case_alloc((size_t)n_in * 4);
    const bool is_float = dtype_info(type)->block == 1;
    for (uint32_t n = 0; n < n_out; n++) {
        uint8_t *to = c->file + n * c->row_bytes;
        if (!is_float && values != VALUES_NORMAL) { /* every bit pattern of the quants */
            for (size_t i = 0; i < c->row_bytes; i++) {
                to[i] = (uint8_t)case_random(&state);
            }
            if (type == DTYPE_F8_E4M3) {
                case_wild_f8(to, n_in, &state);
            } else {
                case_wild_scales(type, to, n_in, &state);
            }
            continue;
        }
        for (uint32_t k = 0; k < n_in; k++) {
            row[k] = case_value(type == DTYPE_F16 ? VALUES_NORMAL : values, &state, k);
        }
        quantise_row(type, row, n_in, to);
    }
    for (size_t i = 0; i < (size_t)rows * n_in; i++) {
        c->x[i] = case_value(values, &state, (uint32_t)i);
    }
    free(row);
    c->w = (PackedMatrix){
        .type = type, .n_out = n_out, .n_in = n_in, .panel_bytes = packed_panel_bytes(type, n_in)};
    c->w.data = case_alloc((n_out + 15) / 16 * c->w.panel_bytes);
    packed_put(&c->w, c->file, c->row_bytes, 0, n_out, 0, n_in);
}

static inline void matmul_case_free(MatmulCase *c)
{
    free(c->file);
    free(c->x);
    free(c->w.data);
}

/* out: [n_subtrees][rows][n_out], `units` as in MatmulArgs. */
static inline void matmul_case_run(const Kernels *k, const MatmulCase *c, const MatmulUnit *units,
                                   uint32_t n_units, float *out)
{
    const ActKind kind = act_kind_of(c->type);
    void *act = case_alloc(act_bytes(kind, c->rows, c->n_in));
    k->act_quantise[kind](c->x, c->n_in, c->rows, 0, c->rows, c->n_in, act);
    const MatmulUnit whole = {c->n_in, {0, 1}};
    const MatmulArgs args = {.w = &c->w,
                             .act = act,
                             .rows = c->rows,
                             .units = units ? units : &whole,
                             .n_units = units ? n_units : 1,
                             .out = out,
                             .ld = c->n_out,
                             .subtree_stride = (size_t)c->rows * c->n_out,
                             .panel0 = 0,
                             .panel1 = (c->n_out + 15) / 16};
    k->matmul[c->type](&args);
    free(act);
}
