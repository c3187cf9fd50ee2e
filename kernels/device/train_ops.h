/* Ops of a device for training: what a forward and backward pass on f32 master weights and the
 * owner of a gradient need, over device memory, enqueued on a stream. Nothing allocates or waits.
 *
 * Matrices are plain (row-major) f32; pointers are device addresses unless a line says host, and
 * structs are read before the function returns. Rows are tokens, sequence after sequence. What an
 * op computes is specified where its host kernel is (kernels/ops). In class `exact` it gives those
 * bits, on every device that says so (gives_exact()); in class `fast` the CPU's fill does, other
 * devices give those values up to rounding. No sum depends on how work is spread on a device:
 * there are no atomics. */
#pragma once

#include "kernels/device/ops.h"
#include "kernels/ops/dropout.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/optimizer.h"
#include "kernels/ops/xent.h"
#include "proto/plan/tree.h"

/* What a rank will ask for at most, for its workspace. */
typedef struct DeviceTrainLimits {
    Dtype operands;
    bool exact;              /* class exact */
    size_t operand_elements; /* of one operand of any product, all its segments */
    uint32_t longest_side;   /* of any operand */
    uint32_t max_segments;   /* of any product */
    uint32_t max_rows;
    uint32_t max_documents, longest_document; /* of attention */
    uint32_t n_heads, n_kv_heads, head_size;
} DeviceTrainLimits;
/* Pages of keys and values that attention has at once. */
static inline uint32_t device_train_pages(uint32_t max_rows, uint32_t longest_document)
{
    return max_rows / (KV_BLOCK / 2) + longest_document / KV_BLOCK + 2;
}

/* kernels/ops/gemm.h with operands of a type: f32 as they are, bf16 and f16 rounded to nearest even
 * as they are read; sums f32. Several units are never leaves (GemmArgs.leaves). */
typedef struct DeviceProduct {
    Dtype operands; /* F32, BF16 or F16 */
    bool exact;     /* the bits of gemm, gemm_bf16 or gemm_f16, where gives_exact(operands) */
    uint32_t m, n;
    const GemmSegment *segments; /* host, what they point to on the device */
    uint32_t n_segments;
    bool accumulate;
    float *c;
    size_t ld, subtree_stride;
    bool same_a, same_b; /* the workspace is as the product before this one left it, and the operand
                            is that product's: what was made of it may be used again */
    void *workspace;
    size_t workspace_bytes;
} DeviceProduct;

/* out[r] = row index[r] - first of the table, zeros where there is none; accumulate: out[r] +=. */
typedef struct DeviceGather {
    const float *table; /* [n][width] */
    const uint32_t *index;
    uint32_t first, n;
    uint32_t rows, width;
    bool accumulate;
    float *out; /* [rows][width] */
} DeviceGather;

/* The gradient of a gather: out[ids[i]] += rows order[starts[i]] .. order[starts[i + 1] - 1] of dy,
 * one after the other. Each id comes once, so every sum has one owner. */
typedef struct DeviceScatter {
    const float *dy; /* [..][width] */
    const uint32_t *ids, *starts, *order;
    uint32_t n_ids, width;
    float *out; /* [..][width] */
} DeviceScatter;

/* kernels/ops/norm.h of `rows` rows of `n`; bias NULL: RMS norm. */
typedef struct DeviceTrainNorm {
    const float *x, *weight, *bias;
    float eps;
    uint32_t rows, n;
    float *out;
} DeviceTrainNorm;

/* Its backward pass: dx += the gradient of x, then dweight and dbias += theirs, rows in order. */
typedef struct DeviceNormBackward {
    const float *x, *weight, *dy;
    float eps;
    uint32_t rows, n;
    float *dx, *dweight, *dbias; /* dbias NULL: RMS norm */
    float *stats;                /* [rows][2]: scratch */
} DeviceNormBackward;

/* Rows turn by positions[r]; inverse: back. */
typedef struct DeviceTurn {
    float *x; /* [rows][n_heads * head_size], in place */
    const uint32_t *positions;
    uint32_t rows, n_heads, head_size, dims;
    RopePairing pairing;
    const float *cos, *sin; /* [..][dims/2] */
    bool inverse;
} DeviceTurn;

/* Causal attention inside documents, which are runs of rows behind each other: rows->segments are
 * the documents (position 0 each) and cover rows [first_row, first_row + rows->n_rows); tables[r]
 * is the document of row r, positions[r] its place in it, both by the row's number; pages
 * [..][pages_ld] by document: numbers of pages that no two share, below device_train_pages(). Query
 * heads h * n_q .. (h + 1) * n_q - 1 of q read KV head h. */
typedef struct DeviceTrainAttention {
    Dtype operands; /* what a device may round q, k, v and probabilities to; class exact: F32 */
    const float *q, *k, *v; /* [..][q_ld], [..][kv_ld], from row 0 on */
    size_t q_ld, kv_ld;
    uint32_t n_kv_heads, n_q, head_size;
    float scale;
    const DeviceRows *rows; /* the struct is the host's; backward reads its segments alone */
    uint32_t first_row, n_pages;
    float *out; /* forward: [..][q_ld] */
    /* backward, as in kernels/ops/attention_backward.h, for every KV head alike */
    const float *dout;
    float *dq, *dk, *dv; /* dq may be dout */
    size_t subtree_stride;
    const TreeStep *steps; /* host, [n_q] */
    void *workspace;
    size_t workspace_bytes;
} DeviceTrainAttention;

/* x and out [rows][width]; rows are positions of samples of `length`, the first one `first_sample`.
 * Dropout of rate 0 is none. */
typedef struct DeviceDropout {
    Dropout dropout;
    uint32_t site;
    uint64_t first_sample;
    uint32_t length, rows, width;
    const float *x, *bias; /* bias NULL: none */
    const float *residual; /* NULL: none */
    float *out;            /* residual + dropout(x + bias), each rounded; may be x */
} DeviceDropout;

/* What cross-entropy needs of a row's own logits: chunks [first_chunk, ..) of those that a row of
 * the arrays has, and the target's logit where it is among them. Chunks with a logit that is not
 * finite have NaN in `sum`. */
typedef struct DeviceRowStats {
    const float *logits; /* [rows][ld], n of them own */
    size_t ld;
    uint32_t rows, n;
    const uint32_t *targets; /* [rows]: own index, or XENT_NO_TARGET */
    uint32_t first_chunk, n_chunks;
    float *max, *sum; /* [rows][n_chunks] */
    float *total;     /* the same: sums of logits over 32 lanes; NULL: not wanted */
    float *target;    /* [rows]: 0 where the target is not here */
} DeviceRowStats;

/* Losses from the statistics of all chunks, which are used up, and (m, l) of the rows. smoothing: z
 * is fmaf(smoothing, mean - z, z), mean = node(total) / vocabulary. */
typedef struct DeviceRowLosses {
    float *max, *sum;   /* [rows][n_chunks] */
    const float *total; /* the same; not read where smoothing is 0 */
    const float *target;
    float *row_max, *row_sum; /* [rows] */
    uint32_t rows, n_chunks;
    float smoothing;
    uint32_t vocabulary;
    const uint32_t *learnt; /* [rows]: 0 where there is no target: loss 0, or NaN */
    float *losses;          /* [rows]: NaN where a logit is not finite */
} DeviceRowLosses;

/* Logits become their loss's gradient times the factor; 0 where nothing is learnt. */
typedef struct DeviceLossGradient {
    float *logits;
    size_t ld;
    uint32_t rows, n;
    const uint32_t *targets, *learnt;
    const float *row_max, *row_sum; /* [rows] */
    float factor, smoothing;
    uint32_t vocabulary;
} DeviceLossGradient;

/* A tile of a gradient (NUMERICS 17). */
typedef struct DeviceTile {
    const float *x; /* [rows][ld] */
    size_t ld;
    uint32_t rows, columns;
} DeviceTile;

typedef struct DeviceTrainOps {
    uint32_t abi, bytes; /* DEVICE_ABI, sizeof(DeviceTrainOps) */
    bool (*has_operands)(Dtype type);
    /* Class exact: with products of such operands every op gives the host's bits. */
    bool (*gives_exact)(Dtype operands);
    /* head_size and sharing of attention, width of norms */
    bool (*has_shape)(uint32_t head_size, uint32_t heads_per_kv, uint32_t width);
    size_t (*workspace_bytes)(const DeviceTrainLimits *limits);

    DeviceStatus (*product)(DeviceStream *stream, const DeviceProduct *args);
    DeviceStatus (*gather)(DeviceStream *stream, const DeviceGather *args);
    DeviceStatus (*scatter)(DeviceStream *stream, const DeviceScatter *args);
    DeviceStatus (*norm)(DeviceStream *stream, const DeviceTrainNorm *args);
    DeviceStatus (*norm_backward)(DeviceStream *stream, const DeviceNormBackward *args);
    DeviceStatus (*turn)(DeviceStream *stream, const DeviceTurn *args);
    DeviceStatus (*attention)(DeviceStream *stream, const DeviceTrainAttention *args);
    DeviceStatus (*attention_backward)(DeviceStream *stream, const DeviceTrainAttention *args);
    DeviceStatus (*dropout)(DeviceStream *stream, const DeviceDropout *args);
    /* y[r] += bias; out += rows of dy in order. */
    DeviceStatus (*bias)(DeviceStream *stream, float *y, const float *bias, uint32_t rows,
                         uint32_t n);
    DeviceStatus (*sum_rows)(DeviceStream *stream, const float *dy, uint32_t rows, uint32_t n,
                             float *out);
    /* Flat arrays (kernels/ops/act.h has their aliasing, too). */
    DeviceStatus (*gelu)(DeviceStream *stream, const float *x, size_t n, float *out);
    DeviceStatus (*gelu_backward)(DeviceStream *stream, const float *x, const float *dy, size_t n,
                                  float *dx);
    DeviceStatus (*swiglu)(DeviceStream *stream, const float *gate, const float *up, size_t n,
                           float *out);
    DeviceStatus (*swiglu_backward)(DeviceStream *stream, const float *gate, const float *up,
                                    const float *dy, size_t n, float *dgate, float *dup);
    DeviceStatus (*add)(DeviceStream *stream, float *x, const float *y, size_t n);

    DeviceStatus (*row_stats)(DeviceStream *stream, const DeviceRowStats *args);
    DeviceStatus (*row_losses)(DeviceStream *stream, const DeviceRowLosses *args);
    DeviceStatus (*loss_gradient)(DeviceStream *stream, const DeviceLossGradient *args);

    /* kernels/ops/optimizer.h, flat arrays; tiles on the device, squares[i] of tile i. */
    DeviceStatus (*finish)(DeviceStream *stream, float *g, size_t n, float back, float tokens);
    DeviceStatus (*squares)(DeviceStream *stream, const DeviceTile *tiles, uint32_t n_tiles,
                            float *squares);
    DeviceStatus (*adamw)(DeviceStream *stream, const AdamwScalars *scalars, size_t n,
                          const float *g, float *m, float *v, float *w);
    DeviceStatus (*sgd)(DeviceStream *stream, const SgdScalars *scalars, size_t n, const float *g,
                        float *b, float *w);
} DeviceTrainOps;
