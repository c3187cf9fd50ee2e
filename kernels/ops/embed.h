/* Dequantisation of rows in file format to f32 (ggml formats), for tests and unpacked uses;
 * packed_get_row() serves lookups. Off the hot path: one implementation. */
#pragma once
#include "proto/model/dtype.h"
#include <stddef.h>
#include <stdint.h>

/* n elements (a multiple of the block) of file format to f32; exactly ggml's formulas: Q4_0
 * d*(q-8), Q4_1 fmaf-free d*q + m (two roundings), ... */
void dequantise_row(Dtype type, const void *src, uint32_t n, float *out);
/* The reverse for tests and `weft quantize`: plain round-to-nearest quantisation of each type. */
void quantise_row(Dtype type, const float *x, uint32_t n, void *dst);
float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f); /* nearest even, subnormals kept */
float bf16_to_f32(uint16_t h);
uint16_t f32_to_bf16(float f); /* nearest even, NaN quiet */
