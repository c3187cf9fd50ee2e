/* The bytes of stored tensors: blocks of the ggml file types, and rows of any type to and from f32.
 * Off the hot path: one implementation. */
#pragma once

#include "proto/model/dtype.h"

#include <stdint.h>

float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f); /* nearest even, subnormals kept */
float bf16_to_f32(uint16_t h);
uint16_t f32_to_bf16(float f); /* nearest even, NaN quiet */
float e4m3_to_f32(uint8_t q);  /* E4M3FN: 0x7f and 0xff are NaN */
uint8_t f32_to_e4m3(float f);  /* nearest even, subnormals kept, beyond 448 the nearest: +-448 */

/* n elements (a multiple of the block) of file format to f32; exactly ggml's formulas: Q4_0
 * d*(q-8), Q4_1 fmaf-free d*q + m (two roundings), ...; F8_E4M3 scale * e4m3(q), one rounding. */
void dequantise_row(Dtype type, const void *src, uint32_t n, float *out);
/* The reverse: plain round-to-nearest quantisation of each type. */
void quantise_row(Dtype type, const float *x, uint32_t n, void *dst);

/* What is subtracted from a stored quant to get its value. */
static inline int32_t block_quant_offset(Dtype type)
{
    switch (type) {
    case DTYPE_Q4_0:
        return 8;
    case DTYPE_Q5_0:
        return 16;
    case DTYPE_Q6_K:
        return 32;
    case DTYPE_Q8_0:
        return 128;
    default:
        return 0;
    }
}

/* One block of a quantised type, out of any container (file or packed record). Quants are unsigned:
 * Q8_0 is stored + 128, the others as in the file. */
typedef struct BlockValues {
    uint8_t q[256];  /* stored quants, see block_quant_offset() */
    uint16_t d, m;   /* f16: scale; minimum or dmin */
    float scale;     /* F8_E4M3 */
    uint8_t sc[16];  /* K: scales of 32-blocks (Q4_K, Q5_K) or, as int8, of 16-blocks (Q6_K) */
    uint8_t mins[8]; /* Q4_K, Q5_K: minima of 32-blocks */
} BlockValues;

/* Quantised types only. */
void block_dequantise(Dtype type, const BlockValues *values, float *out);
