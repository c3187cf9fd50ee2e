/* Block formats of the ggml file types: reading, writing, dequantising, quantising; and the 16-bit
 * float conversions. */
#include "proto/model/blocks.h"

#include <assert.h>
#include <math.h>
#include <string.h>

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u,
             mantissa = h & 0x3ffu, bits;
    float f;
    if (exponent == 0) { /* zero, subnormal: an exact multiple of 2^-24 */
        f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    if (exponent == 31) { /* a NaN becomes quiet, as vcvtph2ps does */
        bits = sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0);
    } else {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    memcpy(&f, &bits, sizeof f);
    return f;
}

uint16_t f32_to_f16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    }
    if (bits >= 0x477ff000u) { /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (bits < 0x38800000u) { /* below 2^-14: the sum with 0.5 rounds at 2^-24 */
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u) - (112u << 23);
    return (uint16_t)(sign | bits >> 13);
}

float bf16_to_f32(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

uint16_t f32_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Sign, 4 bits of exponent (bias 7), 3 of mantissa. As f16 bits the same value is 2^8 too small,
 * subnormals included, because both formats scale them by their least exponent. */
float e4m3_to_f32(uint8_t q)
{
    if ((q & 0x7f) == 0x7f) {
        return f16_to_f32((uint16_t)((q & 0x80) << 8 | 0x7e00));
    }
    return f16_to_f32((uint16_t)((q & 0x80) << 8 | (q & 0x7f) << 7)) * 0x1p8f;
}

uint8_t f32_to_e4m3(float f)
{
    const uint8_t sign = signbit(f) ? 0x80 : 0;
    const float magnitude = fabsf(f);
    int exponent;
    if (isnan(f)) {
        return sign | 0x7f;
    }
    if (magnitude >= 448.0f) {
        return sign | 0x7e;
    }
    frexpf(magnitude, &exponent); /* magnitude < 2^exponent */
    exponent = magnitude < 0x1p-6f ? -5 : exponent;
    /* Steps of 2^(exponent - 4); eight of them are the next power of two, whose bits follow. */
    const uint32_t steps = (uint32_t)rintf(ldexpf(magnitude, 4 - exponent));
    return (uint8_t)(sign | ((uint32_t)(exponent + 5) * 8 + steps));
}

/* ---- containers ---- */

static uint16_t load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static void store16(uint8_t *p, uint16_t v)
{
    memcpy(p, &v, sizeof v);
}

/* n bytes hold 2n nibbles: the low ones come first, then the high ones. */
static void nibbles_read(const uint8_t *src, unsigned n, uint8_t *q)
{
    for (unsigned i = 0; i < n; i++) {
        q[i] = src[i] & 15;
        q[i + n] = src[i] >> 4;
    }
}

/* Q5_0, Q5_1: bit i of a little-endian word is the fifth bit of quant i. */
static void fifth_bits_read(const uint8_t *src, uint8_t *q)
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
static void scales_read(const uint8_t *src, uint8_t *sc, uint8_t *mins)
{
    for (unsigned b = 0; b < 4; b++) {
        sc[b] = src[b] & 63;
        mins[b] = src[b + 4] & 63;
        sc[b + 4] = (uint8_t)((src[b + 8] & 15) | (src[b] >> 6) << 4);
        mins[b + 4] = (uint8_t)((src[b + 8] >> 4) | (src[b + 4] >> 6) << 4);
    }
}

static void nibbles_write(const uint8_t *q, unsigned n, uint8_t *dst)
{
    for (unsigned i = 0; i < n; i++) {
        dst[i] = (uint8_t)((q[i] & 15) | q[i + n] << 4);
    }
}

static void fifth_bits_write(const uint8_t *q, uint8_t *dst)
{
    uint32_t bits = 0;
    for (unsigned i = 0; i < 32; i++) {
        bits |= (uint32_t)(q[i] >> 4 & 1u) << i;
    }
    memcpy(dst, &bits, sizeof bits);
}

static void scales_write(const uint8_t *sc, const uint8_t *mins, uint8_t *dst)
{
    for (unsigned b = 0; b < 4; b++) {
        dst[b] = (uint8_t)(sc[b] | (sc[b + 4] >> 4) << 6);
        dst[b + 4] = (uint8_t)(mins[b] | (mins[b + 4] >> 4) << 6);
        dst[b + 8] = (uint8_t)((sc[b + 4] & 15) | mins[b + 4] << 4);
    }
}

/* File layouts: Q4_0 {d, 16}, Q4_1 {d, m, 16}, Q5_0 {d, 4, 16}, Q5_1 {d, m, 4, 16}, Q8_0 {d, 32},
 * Q4_K {d, dmin, 12, 128}, Q5_K {d, dmin, 12, 32, 128}, Q6_K {128 low, 64 high, 16 scales, d},
 * F8_E4M3 {scale, 128}; numbers are bytes. */
static void block_read(Dtype type, const uint8_t *src, BlockValues *out)
{
    switch (type) {
    case DTYPE_Q4_0:
        out->d = load16(src);
        nibbles_read(src + 2, 16, out->q);
        break;
    case DTYPE_Q4_1:
        out->d = load16(src);
        out->m = load16(src + 2);
        nibbles_read(src + 4, 16, out->q);
        break;
    case DTYPE_Q5_0:
        out->d = load16(src);
        nibbles_read(src + 6, 16, out->q);
        fifth_bits_read(src + 2, out->q);
        break;
    case DTYPE_Q5_1:
        out->d = load16(src);
        out->m = load16(src + 2);
        nibbles_read(src + 8, 16, out->q);
        fifth_bits_read(src + 4, out->q);
        break;
    case DTYPE_Q8_0:
        out->d = load16(src);
        for (unsigned i = 0; i < 32; i++) {
            out->q[i] = src[2 + i] ^ 0x80;
        }
        break;
    case DTYPE_Q4_K:
    case DTYPE_Q5_K: {
        const uint8_t *low = src + (type == DTYPE_Q4_K ? 16 : 48);
        out->d = load16(src);
        out->m = load16(src + 2);
        scales_read(src + 4, out->sc, out->mins);
        for (unsigned c = 0; c < 4; c++) {
            nibbles_read(low + 32 * c, 32, out->q + 64 * c);
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
            nibbles_read(src + 64 * half, 64, q);
            for (unsigned c = 0; c < 4; c++) {
                for (unsigned i = 0; i < 32; i++) {
                    q[32 * c + i] =
                        (uint8_t)(q[32 * c + i] | (src[128 + 32 * half + i] >> 2 * c & 3) << 4);
                }
            }
        }
        memcpy(out->sc, src + 192, 16);
        out->d = load16(src + 208);
        break;
    case DTYPE_F8_E4M3:
        memcpy(&out->scale, src, sizeof out->scale);
        memcpy(out->q, src + sizeof out->scale, 128);
        break;
    default:
        assert(!"a quantised type");
    }
}

static void block_write(Dtype type, const BlockValues *v, uint8_t *dst)
{
    switch (type) {
    case DTYPE_Q4_0:
        store16(dst, v->d);
        nibbles_write(v->q, 16, dst + 2);
        break;
    case DTYPE_Q4_1:
        store16(dst, v->d);
        store16(dst + 2, v->m);
        nibbles_write(v->q, 16, dst + 4);
        break;
    case DTYPE_Q5_0:
        store16(dst, v->d);
        fifth_bits_write(v->q, dst + 2);
        nibbles_write(v->q, 16, dst + 6);
        break;
    case DTYPE_Q5_1:
        store16(dst, v->d);
        store16(dst + 2, v->m);
        fifth_bits_write(v->q, dst + 4);
        nibbles_write(v->q, 16, dst + 8);
        break;
    case DTYPE_Q8_0:
        store16(dst, v->d);
        for (unsigned i = 0; i < 32; i++) {
            dst[2 + i] = v->q[i] ^ 0x80;
        }
        break;
    case DTYPE_Q4_K:
    case DTYPE_Q5_K: {
        uint8_t *low = dst + (type == DTYPE_Q4_K ? 16 : 48);
        store16(dst, v->d);
        store16(dst + 2, v->m);
        scales_write(v->sc, v->mins, dst + 4);
        for (unsigned c = 0; c < 4; c++) {
            nibbles_write(v->q + 64 * c, 32, low + 32 * c);
        }
        for (unsigned i = 0; type == DTYPE_Q5_K && i < 32; i++) {
            uint8_t bits = 0;
            for (unsigned b = 0; b < 8; b++) {
                bits = (uint8_t)(bits | (v->q[32 * b + i] >> 4 & 1) << b);
            }
            dst[16 + i] = bits;
        }
        break;
    }
    case DTYPE_Q6_K:
        for (unsigned half = 0; half < 2; half++) {
            const uint8_t *q = v->q + 128 * half;
            nibbles_write(q, 64, dst + 64 * half);
            for (unsigned i = 0; i < 32; i++) {
                dst[128 + 32 * half + i] = (uint8_t)(q[i] >> 4 | q[32 + i] >> 4 << 2 |
                                                     q[64 + i] >> 4 << 4 | q[96 + i] >> 4 << 6);
            }
        }
        memcpy(dst + 192, v->sc, 16);
        store16(dst + 208, v->d);
        break;
    case DTYPE_F8_E4M3:
        memcpy(dst, &v->scale, sizeof v->scale);
        memcpy(dst + sizeof v->scale, v->q, 128);
        break;
    default:
        assert(!"a quantised type");
    }
}

/* ---- values ---- */

void block_dequantise(Dtype type, const BlockValues *v, float *out)
{
    const float d = f16_to_f32(v->d), m = f16_to_f32(v->m);
    const int offset = block_quant_offset(type);
    switch (type) {
    case DTYPE_Q4_0:
    case DTYPE_Q5_0:
    case DTYPE_Q8_0:
        for (unsigned i = 0; i < 32; i++) {
            out[i] = d * (float)(v->q[i] - offset);
        }
        break;
    case DTYPE_Q4_1:
    case DTYPE_Q5_1:
        for (unsigned i = 0; i < 32; i++) {
            out[i] = d * (float)v->q[i] + m;
        }
        break;
    case DTYPE_Q4_K:
    case DTYPE_Q5_K:
        for (unsigned b = 0; b < 8; b++) {
            const float scale = d * (float)v->sc[b], min = m * (float)v->mins[b];
            for (unsigned i = 0; i < 32; i++) {
                out[32 * b + i] = scale * (float)v->q[32 * b + i] - min;
            }
        }
        break;
    case DTYPE_Q6_K:
        for (unsigned b = 0; b < 16; b++) {
            const float scale = d * (float)(int8_t)v->sc[b];
            for (unsigned i = 0; i < 16; i++) {
                out[16 * b + i] = scale * (float)(v->q[16 * b + i] - offset);
            }
        }
        break;
    case DTYPE_F8_E4M3:
        for (unsigned i = 0; i < 128; i++) {
            out[i] = v->scale * e4m3_to_f32(v->q[i]);
        }
        break;
    default:
        assert(!"a quantised type");
    }
}

void dequantise_row(Dtype type, const void *src, uint32_t n, float *out)
{
    const DtypeInfo *info = dtype_info(type);
    const uint8_t *from = src;
    for (uint32_t i = 0; i < n; i += info->block, from += info->block_bytes) {
        BlockValues values = {0};
        if (type == DTYPE_F32) {
            memcpy(out + i, from, sizeof(float));
        } else if (type == DTYPE_F16) {
            out[i] = f16_to_f32(load16(from));
        } else if (type == DTYPE_BF16) {
            out[i] = bf16_to_f32(load16(from));
        } else {
            block_read(type, from, &values);
            block_dequantise(type, &values, out + i);
        }
    }
}

/* ---- quantising ---- */

static uint8_t quant(float x, float inverse, int offset, int low, int high)
{
    int q = (int)rintf(x * inverse);
    return (uint8_t)((q < low ? low : q > high ? high : q) + offset);
}

static void range(const float *x, unsigned n, float *min, float *max)
{
    *min = *max = x[0];
    for (unsigned i = 1; i < n; i++) {
        *min = x[i] < *min ? x[i] : *min;
        *max = x[i] > *max ? x[i] : *max;
    }
}

/* Symmetric: the element of largest magnitude is the negative end for 4 and 5 bits, which has one
 * step more. */
static void quantise_symmetric(const float *x, int offset, BlockValues *v)
{
    float min, max, d;
    range(x, 32, &min, &max);
    if (offset == 128) {
        d = (max > -min ? max : -min) / 127.0f;
    } else {
        d = (max > -min ? max : min) / (float)-offset;
    }
    v->d = f32_to_f16(d);
    for (unsigned i = 0; i < 32; i++) {
        v->q[i] =
            quant(x[i], d != 0 ? 1.0f / d : 0, offset, offset == 128 ? -127 : -offset, offset - 1);
    }
}

static void quantise_affine(const float *x, int levels, BlockValues *v)
{
    float min, max;
    range(x, 32, &min, &max);
    float d = (max - min) / (float)levels;
    v->d = f32_to_f16(d);
    v->m = f32_to_f16(min);
    for (unsigned i = 0; i < 32; i++) {
        v->q[i] = quant(x[i] - min, d != 0 ? 1.0f / d : 0, 0, 0, levels);
    }
}

/* Q4_K, Q5_K: w = d sc q - dmin m, with m >= 0, so a block's minimum above zero is taken as zero.
 */
static void quantise_affine_k(const float *x, int levels, BlockValues *v)
{
    float scale[8], min[8], scale_max = 0, min_max = 0;
    for (unsigned b = 0; b < 8; b++) {
        float low, high;
        range(x + 32 * b, 32, &low, &high);
        min[b] = low < 0 ? -low : 0;
        scale[b] = (high + min[b]) / (float)levels;
        scale[b] = scale[b] > 0 ? scale[b] : 0;
        scale_max = scale[b] > scale_max ? scale[b] : scale_max;
        min_max = min[b] > min_max ? min[b] : min_max;
    }
    v->d = f32_to_f16(scale_max / 63.0f);
    v->m = f32_to_f16(min_max / 63.0f);
    const float d = f16_to_f32(v->d), dmin = f16_to_f32(v->m);
    for (unsigned b = 0; b < 8; b++) {
        v->sc[b] = quant(scale[b], d != 0 ? 1.0f / d : 0, 0, 0, 63);
        v->mins[b] = quant(min[b], dmin != 0 ? 1.0f / dmin : 0, 0, 0, 63);
        const float step = d * (float)v->sc[b], low = dmin * (float)v->mins[b];
        for (unsigned i = 0; i < 32; i++) {
            v->q[32 * b + i] =
                quant(x[32 * b + i] + low, step != 0 ? 1.0f / step : 0, 0, 0, levels);
        }
    }
}

static void quantise_q6_k(const float *x, BlockValues *v)
{
    float scale[16], scale_max = 0;
    for (unsigned b = 0; b < 16; b++) {
        float min, max;
        range(x + 16 * b, 16, &min, &max);
        scale[b] = (max > -min ? max : -min) / 31.0f;
        scale_max = scale[b] > scale_max ? scale[b] : scale_max;
    }
    v->d = f32_to_f16(scale_max / 127.0f);
    const float d = f16_to_f32(v->d);
    for (unsigned b = 0; b < 16; b++) {
        v->sc[b] = quant(scale[b], d != 0 ? 1.0f / d : 0, 0, 0, 127);
        const float step = d * (float)v->sc[b];
        for (unsigned i = 0; i < 16; i++) {
            v->q[16 * b + i] = quant(x[16 * b + i], step != 0 ? 1.0f / step : 0, 32, -32, 31);
        }
    }
}

static void quantise_f8(const float *x, BlockValues *v)
{
    float min, max;
    range(x, 128, &min, &max);
    v->scale = (max > -min ? max : -min) / 448.0f;
    for (unsigned i = 0; i < 128; i++) {
        v->q[i] = f32_to_e4m3(v->scale != 0 ? x[i] / v->scale : 0);
    }
}

static void quantise_block(Dtype type, const float *x, BlockValues *v)
{
    switch (type) {
    case DTYPE_Q4_0:
    case DTYPE_Q5_0:
    case DTYPE_Q8_0:
        quantise_symmetric(x, block_quant_offset(type), v);
        break;
    case DTYPE_Q4_1:
        quantise_affine(x, 15, v);
        break;
    case DTYPE_Q5_1:
        quantise_affine(x, 31, v);
        break;
    case DTYPE_Q4_K:
        quantise_affine_k(x, 15, v);
        break;
    case DTYPE_Q5_K:
        quantise_affine_k(x, 31, v);
        break;
    case DTYPE_Q6_K:
        quantise_q6_k(x, v);
        break;
    case DTYPE_F8_E4M3:
        quantise_f8(x, v);
        break;
    default:
        assert(!"a quantised type");
    }
}

void quantise_row(Dtype type, const float *x, uint32_t n, void *dst)
{
    const DtypeInfo *info = dtype_info(type);
    uint8_t *to = dst;
    for (uint32_t i = 0; i < n; i += info->block, to += info->block_bytes) {
        BlockValues values = {0};
        if (type == DTYPE_F32) {
            memcpy(to, x + i, sizeof(float));
        } else if (type == DTYPE_F16) {
            store16(to, f32_to_f16(x[i]));
        } else if (type == DTYPE_BF16) {
            store16(to, f32_to_bf16(x[i]));
        } else {
            quantise_block(type, x + i, &values);
            block_write(type, &values, to);
        }
    }
}
