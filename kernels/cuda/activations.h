/* Where quantised activations lie. Internal to this room: weft_cuda_quantise() writes them, the
 * products read them. */
#pragma once

#include "kernels/cuda/quant.h"

enum ActivationKind {
    ACTIVATIONS_F32,      /* F32 weights: the f32 rows themselves */
    ACTIVATIONS_F16_PAIR, /* F16 weights: high, low: [rows][ld] f16, d: [rows] the row's scale */
    ACTIVATIONS_F8,       /* F8_E4M3 weights: the same, each 32 in the order of f8_position() */
    ACTIVATIONS_BF16,     /* BF16 weights: bf16: [rows][ld] */
    ACTIVATIONS_Q8_32,    /* q: [rows][n_in]; d, ds = d * (float)sum, sum: [rows][n_in / 32] */
    ACTIVATIONS_Q8_256,   /* q; d: [rows][n_in / 256]; sum of each 16: [rows][n_in / 16] */
};

struct Activations {
    ActivationKind kind;
    int8_t *q;
    float *d, *ds;
    int32_t *sum;
    uint16_t *bf16, *high, *low;
    size_t bytes; /* of the buffer */
};

/* 16-bit rows: a multiple of 16 elements, those from n_in on zero. */
static inline size_t activation_row_elements(uint32_t n_in)
{
    return weft_cuda_bf16_row(n_in);
}

/* The parts of a buffer of `rows` rows; each starts at a multiple of 128 bytes. */
static inline Activations activations_at(Dtype weight, const void *buffer, uint32_t rows,
                                         uint32_t n_in)
{
    Activations a = {};
    uint8_t *base = static_cast<uint8_t *>(const_cast<void *>(buffer));
    const auto take = [&](size_t bytes) {
        uint8_t *at = base == nullptr ? nullptr : base + a.bytes;
        a.bytes += (bytes + 127) / 128 * 128;
        return static_cast<void *>(at);
    };
    const size_t elements = (size_t)rows * activation_row_elements(n_in);
    switch (weight) {
    case DTYPE_F32:
        a.kind = ACTIVATIONS_F32;
        break;
    case DTYPE_F16:
    case DTYPE_F8_E4M3:
        a.kind = weight == DTYPE_F16 ? ACTIVATIONS_F16_PAIR : ACTIVATIONS_F8;
        a.high = static_cast<uint16_t *>(take(elements * 2));
        a.low = static_cast<uint16_t *>(take(elements * 2));
        a.d = static_cast<float *>(take((size_t)rows * 4));
        break;
    case DTYPE_BF16:
        a.kind = ACTIVATIONS_BF16;
        a.bf16 = static_cast<uint16_t *>(take(elements * 2));
        break;
    case DTYPE_Q4_K:
    case DTYPE_Q5_K:
    case DTYPE_Q6_K:
        a.kind = ACTIVATIONS_Q8_256;
        a.q = static_cast<int8_t *>(take((size_t)rows * n_in));
        a.d = static_cast<float *>(take((size_t)rows * (n_in / 256) * 4));
        a.sum = static_cast<int32_t *>(take((size_t)rows * (n_in / 16) * 4));
        break;
    default:
        a.kind = ACTIVATIONS_Q8_32;
        a.q = static_cast<int8_t *>(take((size_t)rows * n_in));
        a.d = static_cast<float *>(take((size_t)rows * (n_in / 32) * 4));
        a.ds = static_cast<float *>(take((size_t)rows * (n_in / 32) * 4));
        a.sum = static_cast<int32_t *>(take((size_t)rows * (n_in / 32) * 4));
        break;
    }
    return a;
}
