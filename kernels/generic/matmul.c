/* The product, one output and row at a time: the specification of ops/matmul.h. Readable before
 * fast. */
#include "kernels/fill.h"
#include "kernels/generic/bf16dot.h"
#include "kernels/ops/matmul_drive.h"

#include <math.h>
#include <string.h>

static float load_f32(const uint8_t *p)
{
    float v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int16_t load_i16(const uint8_t *p)
{
    int16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint16_t load_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int32_t act_q(const uint8_t *tile, unsigned R, unsigned r, unsigned k)
{
    return (int8_t)tile[(k / 4 * R + r) * 4 + k % 4];
}

/* ---- float types ---- */

static inline void tile_float(Dtype type, const uint8_t *w, const uint8_t *act, uint32_t n_records,
                              unsigned R, float *tile)
{
    for (unsigned r = 0; r < R; r++) {
        for (unsigned lane = 0; lane < PANEL_ROWS; lane++) {
            float acc = 0;
            for (uint32_t k = 0; k < n_records; k++) {
                const float weight = type == DTYPE_F32
                                         ? ((const RecordF32 *)w)[k].w[lane]
                                         : f16_to_f32(((const RecordF16 *)w)[k].w[lane]);
                acc = fmaf(weight, load_f32(act + 4 * ((size_t)k * R + r)), acc);
            }
            tile[r * PANEL_ROWS + lane] = acc;
        }
    }
}

static inline void tile_bf16(const uint8_t *w, const uint8_t *act, uint32_t n_records, unsigned R,
                             float *tile)
{
    const RecordBF16 *record = (const RecordBF16 *)w;
    for (unsigned r = 0; r < R; r++) {
        for (unsigned lane = 0; lane < PANEL_ROWS; lane++) {
            float acc = 0;
            for (uint32_t i = 0; i < n_records; i++) {
                const uint8_t *x = act + 4 * ((size_t)i * R + r);
                acc = fma_flushed(bf16_to_f32(load_u16(x + 2)), bf16_to_f32(record[i].w[lane][1]),
                                  acc);
                acc = fma_flushed(bf16_to_f32(load_u16(x)), bf16_to_f32(record[i].w[lane][0]), acc);
            }
            tile[r * PANEL_ROWS + lane] = acc;
        }
    }
}

/* ---- F8_E4M3 ---- */

static inline void tile_f8(const uint8_t *w, const uint8_t *act, uint32_t n_records, unsigned R,
                           float *tile)
{
    memset(tile, 0, R * PANEL_ROWS * sizeof *tile);
    for (uint32_t i = 0; i < n_records; i++, w += sizeof(RecordF8), act += 128 * 4 * R) {
        const RecordF8 *record = (const RecordF8 *)w;
        for (unsigned lane = 0; lane < PANEL_ROWS; lane++) {
            for (unsigned r = 0; r < R; r++) {
                float acc = 0, *out = tile + r * PANEL_ROWS + lane;
                for (unsigned k = 0; k < 128; k++) {
                    acc = fmaf(e4m3_to_f32(record->q[k / 2][lane][k % 2]),
                               load_f32(act + 4 * (k * R + r)), acc);
                }
                *out = fmaf(record->scale[lane], acc, *out);
            }
        }
    }
}

/* ---- blocks of 32 ---- */

static inline float block32(Dtype type, const BlockValues *v, const uint8_t *tile, unsigned R,
                            unsigned r, float acc)
{
    const float d = load_f32(tile + ACT_Q8_32_D(R) + 4 * r);
    int32_t s = 0, sum = 0;
    for (unsigned k = 0; k < 32; k++) {
        const int32_t q = act_q(tile, R, r, k);
        s += ((int32_t)v->q[k] - block_quant_offset(type)) * q;
        sum += q;
    }
    acc = fmaf((float)s, f16_to_f32(v->d) * d, acc);
    if (type == DTYPE_Q4_1 || type == DTYPE_Q5_1) {
        acc = fmaf(f16_to_f32(v->m), d * (float)sum, acc);
    }
    return acc;
}

/* ---- blocks of 256 ---- */

static inline float block256(Dtype type, const BlockValues *v, const uint8_t *tile, unsigned R,
                             unsigned r, float acc)
{
    const float d = load_f32(tile + ACT_Q8_256_D(R) + 4 * r);
    int32_t total = 0, mins = 0;
    for (unsigned k = 0; k < 256; k++) {
        const int32_t scale = type == DTYPE_Q6_K ? (int8_t)v->sc[k / 16] : v->sc[k / 32];
        total += scale * ((int32_t)v->q[k] - block_quant_offset(type)) * act_q(tile, R, r, k);
    }
    acc = fmaf((float)total, f16_to_f32(v->d) * d, acc);
    if (type == DTYPE_Q6_K) {
        return acc;
    }
    for (unsigned b = 0; b < 8; b++) {
        mins += v->mins[b] * load_i16(tile + ACT_Q8_256_SUM32(R) + (b / 2 * R + r) * 4 + b % 2 * 2);
    }
    return fmaf(-(float)mins, f16_to_f32(v->m) * d, acc);
}

static inline void tile_blocks(Dtype type, const uint8_t *w, const uint8_t *act, uint32_t n_records,
                               unsigned R, float *tile)
{
    const RecordShape shape = record_shape(type);
    const size_t act_tile = (size_t)R * (shape.k == 256 ? ACT_Q8_256_TILE(1) : ACT_Q8_32_TILE(1));
    memset(tile, 0, R * PANEL_ROWS * sizeof *tile);
    for (uint32_t i = 0; i < n_records; i++, w += shape.bytes, act += act_tile) {
        for (unsigned lane = 0; lane < PANEL_ROWS; lane++) {
            BlockValues values;
            record_get(type, w, lane, &values);
            for (unsigned r = 0; r < R; r++) {
                float *acc = tile + r * PANEL_ROWS + lane;
                *acc = shape.k == 256 ? block256(type, &values, act, R, r, *acc)
                                      : block32(type, &values, act, R, r, *acc);
            }
        }
    }
}

/* ---- the table ---- */

#define MATMUL(name, tile_call_1, tile_call_4)                                                     \
    static void tile1_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        float *tile = to.at;                                                                       \
        tile_call_1;                                                                               \
        tile_merge(to, 1 * PANEL_ROWS);                                                            \
    }                                                                                              \
    static void tile4_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        float *tile = to.at;                                                                       \
        tile_call_4;                                                                               \
        tile_merge(to, 4 * PANEL_ROWS);                                                            \
    }                                                                                              \
    static void matmul_##name(const MatmulArgs *args)                                              \
    {                                                                                              \
        matmul_drive(args, (TileKernel){tile1_##name, tile4_##name, 1, 1});                        \
    }
#define MATMUL_BLOCKS(name, type)                                                                  \
    MATMUL(name, tile_blocks(type, w, act, n_records, 1, tile),                                    \
           tile_blocks(type, w, act, n_records, 4, tile))

MATMUL(f32, tile_float(DTYPE_F32, w, act, n_records, 1, tile),
       tile_float(DTYPE_F32, w, act, n_records, 4, tile))
MATMUL(f16, tile_float(DTYPE_F16, w, act, n_records, 1, tile),
       tile_float(DTYPE_F16, w, act, n_records, 4, tile))
MATMUL(bf16, tile_bf16(w, act, n_records, 1, tile), tile_bf16(w, act, n_records, 4, tile))
MATMUL(f8, tile_f8(w, act, n_records, 1, tile), tile_f8(w, act, n_records, 4, tile))
MATMUL_BLOCKS(q4_0, DTYPE_Q4_0)
MATMUL_BLOCKS(q4_1, DTYPE_Q4_1)
MATMUL_BLOCKS(q5_0, DTYPE_Q5_0)
MATMUL_BLOCKS(q5_1, DTYPE_Q5_1)
MATMUL_BLOCKS(q8_0, DTYPE_Q8_0)
MATMUL_BLOCKS(q4_k, DTYPE_Q4_K)
MATMUL_BLOCKS(q5_k, DTYPE_Q5_K)
MATMUL_BLOCKS(q6_k, DTYPE_Q6_K)

void kernels_fill_generic_matmul(Kernels *kernels)
{
    quant_fill_generic(kernels);
    kernels->matmul[DTYPE_F32] = matmul_f32;
    kernels->matmul[DTYPE_F16] = matmul_f16;
    kernels->matmul[DTYPE_BF16] = matmul_bf16;
    kernels->matmul[DTYPE_Q4_0] = matmul_q4_0;
    kernels->matmul[DTYPE_Q4_1] = matmul_q4_1;
    kernels->matmul[DTYPE_Q5_0] = matmul_q5_0;
    kernels->matmul[DTYPE_Q5_1] = matmul_q5_1;
    kernels->matmul[DTYPE_Q8_0] = matmul_q8_0;
    kernels->matmul[DTYPE_Q4_K] = matmul_q4_k;
    kernels->matmul[DTYPE_Q5_K] = matmul_q5_k;
    kernels->matmul[DTYPE_Q6_K] = matmul_q6_k;
    kernels->matmul[DTYPE_F8_E4M3] = matmul_f8;
}
