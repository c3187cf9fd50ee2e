/* Activations into the four kinds of buffer: the specification (ops/matmul.h, layouts in
 * ops/packed.h). */
#include "kernels/fill.h"
#include "kernels/ops/packed.h"

#include <math.h>
#include <string.h>

size_t act_bytes(ActKind kind, uint32_t rows, uint32_t n_in)
{
    const uint32_t tail = rows % ACT_ROW_GROUP;
    const size_t padded = (size_t)rows + (tail > 1 ? ACT_ROW_GROUP - tail : 0);
    return (padded * act_row_bytes(kind, n_in) + 63) / 64 * 64;
}

/* amax / 127 and 127 / amax; a block with an element that is not finite has scale NaN and quants 0,
 * so that every output that depends on it is NaN. */
static void block_scale(const float *x, unsigned n, float *d, float *inverse)
{
    float amax = 0;
    bool finite = true;
    for (unsigned i = 0; i < n; i++) {
        const float magnitude = fabsf(x[i]);
        finite = finite && isfinite(x[i]);
        amax = magnitude > amax ? magnitude : amax;
    }
    *d = finite ? amax / 127.0f : NAN;
    *inverse = finite && amax >= ACT_AMAX_MIN ? 127.0f / amax : 0;
}

static int8_t quant(float x, float inverse)
{
    return inverse != 0 ? (int8_t)rintf(x * inverse) : 0;
}

static void store_f32(uint8_t *p, float v)
{
    memcpy(p, &v, sizeof v);
}

static void store_i32(uint8_t *p, int32_t v)
{
    memcpy(p, &v, sizeof v);
}

static void store_i16(uint8_t *p, int v)
{
    const int16_t narrow = (int16_t)v;
    memcpy(p, &narrow, sizeof narrow);
}

/* One row of one tile; x is NULL for a row that is not there. */
static void tile_q8_32(const float *x, unsigned R, unsigned r, uint8_t *tile)
{
    static const float zeros[32];
    float d, inverse;
    int sum = 0;
    x = x ? x : zeros;
    block_scale(x, 32, &d, &inverse);
    for (unsigned k = 0; k < 32; k++) {
        const int8_t q = quant(x[k], inverse);
        tile[(k / 4 * R + r) * 4 + k % 4] = (uint8_t)q;
        sum += q;
    }
    store_f32(tile + ACT_Q8_32_D(R) + 4 * r, d);
    store_f32(tile + ACT_Q8_32_DS(R) + 4 * r, d * (float)sum);
    store_i32(tile + ACT_Q8_32_START8(R) + 4 * r, -8 * sum);
    store_i32(tile + ACT_Q8_32_START16(R) + 4 * r, -16 * sum);
    store_i32(tile + ACT_Q8_32_START128(R) + 4 * r, -128 * sum);
}

static void tile_q8_256(const float *x, unsigned R, unsigned r, uint8_t *tile)
{
    static const float zeros[256];
    float d, inverse;
    int sums[16] = {0};
    x = x ? x : zeros;
    block_scale(x, 256, &d, &inverse);
    for (unsigned k = 0; k < 256; k++) {
        const int8_t q = quant(x[k], inverse);
        tile[(k / 4 * R + r) * 4 + k % 4] = (uint8_t)q;
        sums[k / 16] += q;
    }
    for (unsigned b = 0; b < 8; b++) {
        store_i16(tile + ACT_Q8_256_SUM32(R) + (b / 2 * R + r) * 4 + b % 2 * 2,
                  sums[2 * b] + sums[2 * b + 1]);
        store_i16(tile + ACT_Q8_256_SUM16(R) + (b * R + r) * 4, sums[2 * b]);
        store_i16(tile + ACT_Q8_256_SUM16(R) + (b * R + r) * 4 + 2, sums[2 * b + 1]);
    }
    store_f32(tile + ACT_Q8_256_D(R) + 4 * r, d);
}

/* x: n <= 2 elements. */
static void tile_bf16(const float *x, unsigned n, unsigned R, unsigned r, uint8_t *tile)
{
    const uint16_t pair[2] = {x ? f32_to_bf16(x[0]) : 0, x && n > 1 ? f32_to_bf16(x[1]) : 0};
    memcpy(tile + 4 * r, pair, sizeof pair);
}

static void tile_f32(const float *x, unsigned R, unsigned r, uint8_t *tile)
{
    store_f32(tile + 4 * r, x ? *x : 0);
}

static void act_quantise(ActKind kind, const float *x, size_t ld, uint32_t rows, uint32_t row0,
                         uint32_t row1, uint32_t n_in, uint8_t *buffer)
{
    const size_t row_bytes = act_row_bytes(kind, n_in);
    const uint32_t k_step = act_tile_k(kind);
    for (uint32_t group = row0 / ACT_ROW_GROUP; group * ACT_ROW_GROUP < row1; group++) {
        const uint32_t R = act_group_rows(rows, group);
        for (uint32_t r = 0; r < R; r++) {
            const uint32_t row = group * ACT_ROW_GROUP + r;
            uint8_t *tile = buffer + group * ACT_ROW_GROUP * row_bytes;
            for (uint32_t k = 0; k < n_in; k += k_step, tile += act_tile_row_bytes(kind) * R) {
                const float *from = row < rows ? x + row * ld + k : NULL;
                switch (kind) {
                case ACT_Q8_32:
                    tile_q8_32(from, R, r, tile);
                    break;
                case ACT_Q8_256:
                    tile_q8_256(from, R, r, tile);
                    break;
                case ACT_BF16:
                    tile_bf16(from, n_in - k, R, r, tile);
                    break;
                default:
                    tile_f32(from, R, r, tile);
                }
            }
        }
    }
}

static void act_quantise_f32(const float *x, size_t ld, uint32_t rows, uint32_t row0, uint32_t row1,
                             uint32_t n_in, void *buffer)
{
    act_quantise(ACT_F32, x, ld, rows, row0, row1, n_in, buffer);
}

static void act_quantise_bf16(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                              uint32_t row1, uint32_t n_in, void *buffer)
{
    act_quantise(ACT_BF16, x, ld, rows, row0, row1, n_in, buffer);
}

static void act_quantise_q8_32(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                               uint32_t row1, uint32_t n_in, void *buffer)
{
    act_quantise(ACT_Q8_32, x, ld, rows, row0, row1, n_in, buffer);
}

static void act_quantise_q8_256(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                                uint32_t row1, uint32_t n_in, void *buffer)
{
    act_quantise(ACT_Q8_256, x, ld, rows, row0, row1, n_in, buffer);
}

void quant_fill_generic(Kernels *kernels)
{
    kernels->act_quantise[ACT_F32] = act_quantise_f32;
    kernels->act_quantise[ACT_BF16] = act_quantise_bf16;
    kernels->act_quantise[ACT_Q8_32] = act_quantise_q8_32;
    kernels->act_quantise[ACT_Q8_256] = act_quantise_q8_256;
}
