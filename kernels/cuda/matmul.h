/* What the products of this room share: the arguments, and how a contraction is cut.
 *
 * Spans: the contraction of a unit is cut into spans of 256 elements (the last may be shorter).
 * Each is a chain from +0; the spans of a unit are added in order, first + second, + third, ...;
 * units fold by their tree program. So the result is a function of the weights and of the row
 * alone: which warps and blocks do the spans, how many rows there are, and which kernel is chosen
 * for them changes no bit. Quantised types: inside a span everything is as ops/matmul.h says, so
 * generic with units of 256, added in order, gives the same bits. */
#pragma once

#include "kernels/cuda/activations.h"

enum { SPAN = 256, MATMUL_UNITS_LIMIT = 64, UNIT_LEVELS = 8 };

/* Unit u: spans [span_begin, span_begin of u + 1), its first element of k. */
struct MatmulCut {
    uint32_t n_units, n_spans;
    uint16_t span_begin[MATMUL_UNITS_LIMIT + 1];
    uint32_t k_begin[MATMUL_UNITS_LIMIT + 1];
    TreeStep step[MATMUL_UNITS_LIMIT];
};

struct ProductArgs {
    PackedMatrix w;
    Activations act;
    const float *x; /* F32 weights */
    size_t x_ld, act_ld;
    uint32_t rows;
    float *out;
    size_t ld, subtree_stride;
    const float *bias;
    bool accumulate;
    MatmulCut cut;
};

/* Elements [k, k + n) of a span. `unit` is where the search starts and what it finds. */
struct SpanRange {
    uint32_t k, n;
};
__device__ __forceinline__ SpanRange span_range(const MatmulCut &cut, uint32_t span, uint32_t *unit)
{
    while (span >= cut.span_begin[*unit + 1]) {
        ++*unit;
    }
    const uint32_t k = cut.k_begin[*unit] + (span - cut.span_begin[*unit]) * SPAN;
    const uint32_t rest = cut.k_begin[*unit + 1] - k;
    return {k, rest < SPAN ? rest : (uint32_t)SPAN};
}

/* Adds spans up and folds units, for COUNT elements of one thread that go through the same spans.
 * emit(i, subtree, value) is called for each finished subtree. */
template <int COUNT> struct SpanFold {
    float total[COUNT];
    uint32_t unit, span, depth, emitted;
    float stack[UNIT_LEVELS][COUNT];

    __device__ __forceinline__ SpanFold() : total(), unit(0), span(0), depth(0), emitted(0) {}

    /* The next span's value of each element: value(i). */
    template <typename Value, typename Emit>
    __device__ __forceinline__ void add(const MatmulCut &cut, const Value &value, const Emit &emit)
    {
        const bool first = span == cut.span_begin[unit];
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const float v = value(i);
            total[i] = first ? v : total[i] + v;
        }
        if (++span < cut.span_begin[unit + 1]) {
            return;
        }
        if (cut.n_units == 1) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                emit(i, 0u, total[i]);
            }
            return;
        }
        end_unit(cut, emit);
    }

    template <typename Emit> __device__ void end_unit(const MatmulCut &cut, const Emit &emit)
    {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            stack[depth][i] = total[i];
        }
        depth++;
        for (uint32_t m = cut.step[unit].n_merges; m > 0; m--, depth--) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                stack[depth - 2][i] += stack[depth - 1][i];
            }
        }
        if (cut.step[unit].emit) {
            depth--;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                emit(i, emitted, stack[depth][i]);
            }
            emitted++;
        }
        unit++;
    }
};

/* A finished value into out. */
__device__ __forceinline__ void put_product(const ProductArgs &a, uint32_t row, uint32_t n,
                                            uint32_t subtree, float value)
{
    if (row < a.rows && n < a.w.n_out) {
        float *to = a.out + subtree * a.subtree_stride + row * a.ld + n;
        if (a.bias != nullptr) {
            value += a.bias[n];
        }
        *to = a.accumulate ? *to + value : value;
    }
}

int product_q32(const ProductArgs &args, WeftCudaStream stream);
int product_k(const ProductArgs &args, WeftCudaStream stream);
int product_f8(const ProductArgs &args, WeftCudaStream stream);
int product_float(const ProductArgs &args, WeftCudaStream stream);
int product_half(const ProductArgs &args, WeftCudaStream stream);
