/* Ops of a device: the forward path's families over device memory, enqueued on a stream. Each may
 * be part of a graph: no allocation, no wait, and whatever changes between launches is read from
 * device memory.
 *
 * Weights are the packed panels of kernels/README.md: the same bytes on every device, so that they
 * stream from the slice cache unchanged. Activations are f32 [rows][ld], row-major; pointers are
 * device addresses unless a line says otherwise. Values: the CPU's up to rounding; what
 * an op's fill gives is held to `generic` by the parity tests. Structs are read before the function
 * returns. */
#pragma once

#include "kernels/device/device.h"
#include "kernels/device/sample.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/matmul.h"
#include "proto/model/model_spec.h"
#include "proto/plan/device_memory.h"

/* A run of consecutive positions of one sequence among the rows; single ones when decoding. */
typedef struct DeviceSegment {
    uint32_t row0, n_rows;
    uint32_t position; /* of row0 */
    uint32_t table;    /* row of `pages` */
} DeviceSegment;
_Static_assert(sizeof(DeviceSegment) == DEVICE_SEGMENT_BYTES &&
                   sizeof(DeviceDraw) == DEVICE_DRAW_BYTES &&
                   sizeof(DeviceChunk) == DEVICE_CHUNK_BYTES &&
                   sizeof(DeviceCandidate) == DEVICE_CANDIDATE_BYTES,
               "plans count these");

/* The rows of a step. The counts bound grids and are fixed in a graph; arrays are read anew. */
typedef struct DeviceRows {
    uint32_t n_rows, n_segments;
    uint32_t longest_segment;      /* no segment has more rows */
    uint32_t max_keys;             /* no row sees more keys: position + 1 */
    const uint32_t *tokens;        /* [n_rows] */
    const uint32_t *positions;     /* [n_rows] */
    const uint32_t *tables;        /* [n_rows]: row of `pages` */
    const DeviceSegment *segments; /* [n_segments] */
    const uint32_t *pages;         /* [..][pages_ld]: page numbers by position / KV_BLOCK */
    uint32_t pages_ld;
} DeviceRows;

/* KV pages as in worker/serve/kv_pages.h: page p, layer l, head h: K block at memory +
 * p * page_bytes + (l * n_heads + h) * 2 * block_bytes, V block block_bytes behind it, each as in
 * kernels/ops/attention.h. */
typedef struct DeviceKv {
    uint8_t *memory;
    size_t page_bytes, block_bytes;
    uint32_t n_heads;
    KvType type;
} DeviceKv;

/* out[r] = norm(x[index[r]]) * weight (+ bias). */
typedef struct DeviceNorm {
    const float *x;        /* [..][width] */
    const uint32_t *index; /* [n_rows], or NULL: x[r] */
    const float *weight;   /* [width] */
    const float *bias;     /* [width]: layer norm; NULL: RMS norm */
    float eps;
    uint32_t width, n_rows;
    float *out; /* [n_rows][width] */
} DeviceNorm;

/* out (+)= W x. */
typedef struct DeviceMatmul {
    const PackedMatrix *w; /* the struct in host memory, its data on the device */
    const float *x;        /* [rows][x_ld] */
    size_t x_ld;
    uint32_t rows;
    float *out; /* [rows][out_ld]; overlaps neither x nor w */
    size_t out_ld;
    bool accumulate;   /* out += */
    const float *bias; /* [n_out] added, or NULL */
    bool gelu;         /* out = gelu(W x + bias); without accumulate and units */
    bool same_x;       /* the workspace is as the product before this one left it, of the same x,
                          rows, weight type and class: what was made of x there may be used again */
    bool fast;         /* class fast: bits may depend on the number of rows; else a row's depend on
                          the row, the weights and the units alone */
    /* A contraction that is cut (NUMERICS 3), in host memory: subtree s of its tree goes to out + s
     * * subtree_stride. bias and accumulate with one subtree only. n_units = 0: one whole unit. */
    const MatmulUnit *units;
    uint32_t n_units; /* <= TREE_LEAVES_LIMIT */
    size_t subtree_stride;
    void *workspace; /* device_workspace_bytes() for these limits or larger ones */
    size_t workspace_bytes;
} DeviceMatmul;

/* Rotates q and k of each row by its position (dims = 0: no rotation) and stores k and v, rounded
 * to the cache's type. */
typedef struct DeviceRope {
    float *q;               /* [n_rows][n_heads * head_size], in place */
    float *k;               /* [n_rows][kv.n_heads * head_size], in place */
    const float *v;         /* the same shape */
    const float *cos, *sin; /* [context][dims/2] */
    uint32_t n_heads, head_size, dims;
    RopePairing pairing;
    DeviceKv kv;
    uint32_t layer;
} DeviceRope;

/* Paged attention of every row over its sequence's keys so far, its own included. */
typedef struct DeviceAttention {
    const float *q; /* [n_rows][n_heads * head_size] */
    float *out;     /* the same shape */
    uint32_t n_heads, head_size;
    uint32_t head_first, kv_first, heads_per_kv; /* query head h (of this rank) reads KV head
                                                    (head_first + h) / heads_per_kv - kv_first */
    float scale;
    uint32_t window; /* 0 = none */
    bool fast;       /* class fast, as in DeviceMatmul */
    DeviceKv kv;
    uint32_t layer;
    void *workspace;
    size_t workspace_bytes;
} DeviceAttention;

/* What the sampler needs of rows of logits: chunks and best ids. */
typedef struct DeviceSample {
    const float *logits; /* [n_rows][n], raw: ids first_id, first_id + 1, ... */
    uint32_t n_rows, n, first_id;
    const DeviceDraw *draws; /* [n_rows] */
    uint32_t keep, n_top;    /* <= DEVICE_KEEP_LIMIT; beyond n: undefined */
    DeviceChunk *chunks;     /* [n_rows][ceil(n / VOCAB_CHUNK)] */
    DeviceCandidate *best;   /* [n_rows][keep]: by value descending, then by id */
    DeviceCandidate *top;    /* [n_rows][n_top]: by logit, likewise; its value is the logit */
    void *workspace;
    size_t workspace_bytes;
} DeviceSample;

typedef struct DeviceOps {
    uint32_t abi, bytes; /* DEVICE_ABI, sizeof(DeviceOps) */
    /* Whether the type is served on this device. */
    bool (*has_weight)(Dtype type);
    bool (*has_kv)(KvType type, uint32_t head_size);

    /* x[r] = (x[r] +) row ids[r] - first_id of w; ids outside of it are rows of zeros. */
    DeviceStatus (*embed)(DeviceStream *stream, const PackedMatrix *w, const uint32_t *ids,
                          uint32_t first_id, uint32_t n_rows, bool accumulate, float *x);
    DeviceStatus (*norm)(DeviceStream *stream, const DeviceNorm *args);
    DeviceStatus (*matmul)(DeviceStream *stream, const DeviceMatmul *args);
    DeviceStatus (*rope_store)(DeviceStream *stream, const DeviceRows *rows,
                               const DeviceRope *args);
    DeviceStatus (*attention)(DeviceStream *stream, const DeviceRows *rows,
                              const DeviceAttention *args);
    /* out[i] = silu(gate[i]) * up[i] of rows x n elements without gaps; out may be gate. */
    DeviceStatus (*swiglu)(DeviceStream *stream, const float *gate, const float *up, uint32_t rows,
                           uint32_t n, float *out);
    /* x[i] += y[i], likewise. */
    DeviceStatus (*add)(DeviceStream *stream, float *x, const float *y, uint32_t rows, uint32_t n);
    /* x[r][i] += bias[i], likewise. */
    DeviceStatus (*add_bias)(DeviceStream *stream, float *x, const float *bias, uint32_t rows,
                             uint32_t n);
    DeviceStatus (*sample)(DeviceStream *stream, const DeviceSample *args);
    /* *out = the CRC32C (proto/base/crc32c.h) of n_words words of 4 bytes, as they lie in memory;
     * workspace: DEVICE_CHECKSUM_BYTES. */
    DeviceStatus (*checksum)(DeviceStream *stream, const void *data, size_t n_words, uint32_t *out,
                             void *workspace, size_t workspace_bytes);
} DeviceOps;
