/* The device kernels' C face: each function puts one kernel on a stream and returns at once.
 *
 * Every pointer is device memory unless it says host; borrowed until the stream has passed the
 * kernel. Result: 0, or CUDA's error number (cudaError_t; cudaErrorInvalidValue = 1 for a shape
 * that the kernel does not take, and then nothing was started). Nothing here allocates, waits or
 * reads device memory on the host, so all of it can be captured in a graph; what changes from step
 * to step (ids, positions, page tables) is device memory. Any thread, one stream at a time.
 *
 * Bits: "specified" below means that the result has the bits of kernels/generic for the op's
 * contract in kernels/ops (NaN payloads aside), whatever else is in the batch. The others state
 * their own order of operations, which depends on the shape of one row alone.
 *
 * Floats are f32 unless said otherwise; rows of a matrix are `ld` elements apart. */
#pragma once

#include "kernels/device/sample.h"
#include "kernels/ops/dropout.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/optimizer.h"
#include "proto/model/fixed_shapes.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cudaStream_t, without its header. */
typedef struct CUstream_st *WeftCudaStream;

/* ---- matrices of weights ---- */

/* Weights are the packed panels of kernels/README.md, as on every device: a PackedMatrix is a
 * struct of the host whose data lies on the device, aligned to 64 bytes; all of its panels are
 * there, also where n_out is no multiple of 16. */

/* Elements between rows of a plain bf16 matrix: n_in rounded up to 64 bytes. */
size_t weft_cuda_row_elements(uint32_t n_in);
/* Panels of any type but F32 to plain rows of bf16: dequantised in f32 exactly as the file's
 * formula says, then rounded to nearest even. Columns from n_in on become zero, up to the next
 * multiple of 32. rows: [w->n_out][ld], aligned to 16 bytes, ld a multiple of 8. */
int weft_cuda_unpack(const PackedMatrix *w, uint16_t *rows, size_t ld, WeftCudaStream stream);

/* Panels of F8_E4M3 to plain rows of their codes, and their scales with outputs adjacent. rows:
 * [w->n_out][w->n_in], aligned to 16 bytes; scales: [w->n_in / 128][w->n_out]. */
int weft_cuda_unpack_f8(const PackedMatrix *w, uint8_t *rows, float *scales, WeftCudaStream stream);

/* out[i] = the dequantised row ids[i] - first_id of table (specified: packed_get_row), or out[i] +=
 * it. An id that is not there is a row of zeros: a rank holds some of the vocabulary only. out:
 * [n][ld]. */
int weft_cuda_embed(const PackedMatrix *table, const uint32_t *ids, uint32_t first_id, uint32_t n,
                    bool accumulate, float *out, size_t ld, WeftCudaStream stream);

/* ---- products ---- */

/* Elements between rows of bf16 activations; those from n_in on are zero. */
static inline size_t weft_cuda_bf16_row(uint32_t n_in)
{
    return ((size_t)n_in + 15) / 16 * 16;
}

/* Bytes of the activations of `rows` rows for weights of this type, and their making from f32 rows:
 * Q8_32 and Q8_256 with the numbers of act_quantise; bf16 rounded to nearest even; for F16 and
 * F8_E4M3 weights two f16 a value; F32 weights read x itself and need no call. The buffer is
 * aligned to 128 bytes and serves every product with that (type, rows, n_in). rows <= 65535. */
size_t weft_cuda_activation_bytes(Dtype weight, uint32_t rows, uint32_t n_in);
/* For which type a product of `rows` rows reads its activations: `weight`, or BF16 where class fast
 * has its 16-bit kernel (kernels/cuda/matmul_half.cu). */
Dtype weft_cuda_activation_type(Dtype weight, uint32_t rows, bool fast);
int weft_cuda_quantise(Dtype weight, const float *x, size_t x_ld, uint32_t rows, uint32_t n_in,
                       void *activations, WeftCudaStream stream);

/* f32 rows rounded to e4m3 in blocks of 128, as a library's product with such weights wants them:
 * scale = amax / 448, code = the nearest of x * (448 / amax), even on ties; a block below 2^-100 is
 * zeros, one with a value that is not finite has the scale NaN. codes: [rows][n_in], aligned to 4
 * bytes; scales: [n_in / 128][rows]. n_in is a multiple of 128. */
int weft_cuda_quantise_f8(const float *x, size_t x_ld, uint32_t rows, uint32_t n_in, uint8_t *codes,
                          float *scales, WeftCudaStream stream);

/* out = W x, or out = out + (W x + bias). The contraction of a unit is cut into spans of 256, each
 * a chain from +0, added in order (kernels/cuda/matmul.h): a row's bits depend on nothing but the
 * row, the weights and the units. Quantised types: the bits of the specified matmul with units of
 * 256, added in order. Float types: kernels/cuda/matmul_float.cu tells, class fast matmul_half.cu.
 */
typedef struct CudaMatmul {
    const PackedMatrix *w;   /* host */
    bool fast;               /* with one unit: the 16-bit kernel where rows are many */
    const void *activations; /* for weft_cuda_activation_type() */
    const float *x;          /* F32 weights only: [rows][x_ld] */
    size_t x_ld;
    uint32_t rows;
    float *out; /* subtree s, row r, output n at s * subtree_stride + r * ld + n */
    size_t ld, subtree_stride;
    const float *bias;       /* [n_out] added to what is written, or NULL */
    bool accumulate;         /* out's old values are added, too */
    const MatmulUnit *units; /* host, at most 64; bias and accumulate with one subtree only */
    uint32_t n_units;        /* 0: one unit */
} CudaMatmul;
int weft_cuda_matmul(const CudaMatmul *args, WeftCudaStream stream);

/* ---- sums over ranks ---- */

/* out[i] = the tree's sum of gathered[operand[k] * n + i] over k < n_operands (at most 64), i < n:
 * after operand k was pushed, merges[k] times the two topmost are added (specified: the tree of
 * proto/plan/tree.h); flushes: subnormals to zero, as units of bf16dot fold. operand and merges:
 * host. */
int weft_cuda_fold(const uint16_t *operand, const uint8_t *merges, uint32_t n_operands,
                   bool flushes, const float *gathered, size_t n, float *out,
                   WeftCudaStream stream);

/* ---- checksums ---- */

/* *out = the CRC32C of n_words words (specified: crc32c(0, data, 4 * n_words)), for any grid.
 * workspace: WEFT_CUDA_CHECKSUM_BYTES. */
#define WEFT_CUDA_CHECKSUM_BYTES 1024u
int weft_cuda_checksum(const void *data, size_t n_words, uint32_t *out, void *workspace,
                       WeftCudaStream stream);

/* ---- element-wise and norms ---- */

/* x[r][i] += y[r][i] (specified: add). */
int weft_cuda_add(float *x, size_t x_ld, const float *y, size_t y_ld, uint32_t rows, uint32_t n,
                  WeftCudaStream stream);
/* x[r][i] += bias[i]. */
int weft_cuda_add_bias(float *x, size_t ld, const float *bias, uint32_t rows, uint32_t n,
                       WeftCudaStream stream);
/* out = silu(gate) * up (specified: swiglu); out may be gate or up. */
int weft_cuda_swiglu(const float *gate, size_t gate_ld, const float *up, size_t up_ld,
                     uint32_t rows, uint32_t n, float *out, size_t out_ld, WeftCudaStream stream);
/* out = gelu(x + bias), the sum rounded first (specified: gelu); bias NULL: gelu(x). In place
 * allowed. */
int weft_cuda_gelu(const float *x, size_t x_ld, const float *bias, uint32_t rows, uint32_t n,
                   float *out, size_t out_ld, WeftCudaStream stream);

/* RMS norm (specified: rms_norm): out[r] = norm(x[index[r]]) * weight, index NULL: x[r]. residual,
 * unless NULL, is first added to x in place, at the same rows (then no row comes twice). out may be
 * x when residual and index are NULL. n <= 16384. */
int weft_cuda_rms_norm(float *x, size_t x_ld, const uint32_t *index, const float *residual,
                       size_t residual_ld, const float *weight, float eps, uint32_t rows,
                       uint32_t n, float *out, size_t out_ld, WeftCudaStream stream);
/* The same for layer norm (specified: layer_norm). */
int weft_cuda_layer_norm(float *x, size_t x_ld, const uint32_t *index, const float *residual,
                         size_t residual_ld, const float *weight, const float *bias, float eps,
                         uint32_t rows, uint32_t n, float *out, size_t out_ld,
                         WeftCudaStream stream);

/* Rotates n_heads heads of each row in place (specified: rope_apply). Row r turns by
 * positions[r]; cos, sin: [context][dims/2], the whole rope_table() of the deployment. inverse:
 * the rotation back (the gradient). */
int weft_cuda_rope(float *x, size_t ld, const uint32_t *positions, uint32_t rows, uint32_t n_heads,
                   uint32_t head_size, uint32_t dims, RopePairing pairing, const float *cos,
                   const float *sin, bool inverse, WeftCudaStream stream);

/* ---- the cache of keys and values ---- */

/* One layer's pages: K block of page p and KV head h at base + p * page_stride + h * head_stride,
 * its V block v_offset behind (kernels/ops/attention.h has the blocks, worker/serve/kv_pages.h the
 * order that a rank uses). Strides are multiples of 16. tables[s * table_ld + b] is the page of
 * block b of sequence s. */
typedef struct CudaKv {
    KvType type;
    uint32_t n_kv_heads, head_size;
    uint8_t *base;
    size_t page_stride, head_stride, v_offset; /* bytes */
    const uint32_t *tables;
    size_t table_ld;
} CudaKv;

/* Writes row r's keys and values of all KV heads at positions[r] of sequence sequences[r]
 * (specified: kv_write). k, v: [rows][ld], heads adjacent. */
int weft_cuda_kv_write(const CudaKv *kv, const float *k, const float *v, size_t ld,
                       const uint32_t *sequences, const uint32_t *positions, uint32_t rows,
                       WeftCudaStream stream);

/* ---- attention ---- */

/* A run of consecutive positions of one sequence among the rows; a single one when decoding. */
typedef struct CudaSegment {
    uint32_t row0, n_rows;
    uint32_t position; /* of row0 */
    uint32_t table;    /* row of kv.tables */
} CudaSegment;

/* Causal attention of every row over its sequence's keys so far, its own included (specified:
 * attention; `fast` is close to it). Query head h of this rank reads KV head (head_first + h) /
 * heads_per_kv - kv_first. The counts bound the grid and are the host's; segments and tables are
 * read by the kernel. */
typedef struct CudaAttention {
    const float *q; /* [rows][q_ld], heads adjacent */
    size_t q_ld;
    float *out; /* the same shape; not q */
    size_t out_ld;
    uint32_t n_heads, head_size; /* head_size <= 256 */
    uint32_t head_first, kv_first, heads_per_kv;
    float scale;
    uint32_t window; /* 0 = none */
    bool fast;       /* long segments by matrix instructions: kernels/cuda/attention_prefill.cu */
    CudaKv kv;
    const CudaSegment *segments; /* [n_segments] */
    uint32_t n_segments;
    uint32_t longest_segment; /* no segment has more rows */
    uint32_t max_keys;        /* no row sees more keys: position + 1 */
    void *workspace;          /* weft_cuda_attention_bytes(); fewer mean more launches */
    size_t workspace_bytes;
} CudaAttention;
/* 0 where max_keys <= 256; never above the larger of 64 MiB and one tile's. */
size_t weft_cuda_attention_bytes(const CudaAttention *args);
int weft_cuda_attention(const CudaAttention *args, WeftCudaStream stream);

/* ---- logits ---- */

/* (m, l) of each 1,024 logits of each row (specified: chunk_stats of logit / divisors[row], NULL:
 * 1; a chunk with a logit that is not finite gets NaN for both). m, l: [rows][ceil(n / 1024)]. */
int weft_cuda_chunk_stats(const float *logits, size_t ld, const float *divisors, uint32_t rows,
                          uint32_t n, float *m, float *l, WeftCudaStream stream);
/* The same without divisors, a row's pairs stats_ld apart; and sums of the logits of each chunk
 * over 32 lanes, likewise. */
int weft_cuda_chunk_stats_of(const float *logits, size_t ld, uint32_t rows, uint32_t n, float *m,
                             float *l, size_t stats_ld, WeftCudaStream stream);
int weft_cuda_chunk_sums(const float *logits, size_t ld, uint32_t rows, uint32_t n, float *sums,
                         size_t sums_ld, WeftCudaStream stream);
/* node(0, n_chunks) of each row's pairs (specified: chunk_stats_merge). n_chunks <= 1024;
 * m_out, l_out: [rows]. */
int weft_cuda_merge_stats(const float *m, const float *l, uint32_t rows, uint32_t n_chunks,
                          float *m_out, float *l_out, WeftCudaStream stream);

/* Digest and statistics of each chunk of each row (specified: hash128, chunk_stats of the logits
 * and of logit / draws[row].temperature; as DeviceChunk says). A last chunk of fewer than
 * DEVICE_SHORTEST_CHUNK ids is an invalid shape. chunks: [rows][ceil(n / 1024)]. */
int weft_cuda_chunk_parts(const float *logits, size_t ld, const DeviceDraw *draws, uint32_t rows,
                          uint32_t n, DeviceChunk *chunks, WeftCudaStream stream);
/* The best `keep` ids of each row: larger value first, then lower id, with the values and the noise
 * of worker/serve/sample.c (specified: gumbel); draws NULL: the logits themselves. logits:
 * [rows][ld], ids first_id..first_id+n-1, already penalised. out: [rows][keep], value -inf where
 * there are fewer ids. keep <= DEVICE_KEEP_LIMIT. workspace: weft_cuda_candidates_bytes(). */
size_t weft_cuda_candidates_bytes(uint32_t rows, uint32_t n, uint32_t keep);
int weft_cuda_candidates(const float *logits, size_t ld, const DeviceDraw *draws, uint32_t first_id,
                         uint32_t rows, uint32_t n, uint32_t keep, DeviceCandidate *out,
                         void *workspace, WeftCudaStream stream);

/* ---- training ---- */

/* loss[r] = (m - target_logit) + log l (specified: xent_loss). */
int weft_cuda_xent_loss(const float *m, const float *l, const float *target_logit, uint32_t rows,
                        float *loss, WeftCudaStream stream);
/* dz of n logits a row (specified: xent_backward); targets[r] is an index into the row or
 * XENT_NO_TARGET; dz has z's ld and may be z. rows <= 65535. */
int weft_cuda_xent_backward(const float *z, size_t ld, uint32_t rows, uint32_t n, const float *m,
                            const float *l, const uint32_t *targets, float factor, float *dz,
                            WeftCudaStream stream);

/* The loss of a row and its gradient with smoothed labels (specified: xent_row_loss after the
 * merge, xent_row_gradient; fields as in kernels/device/train_ops.h). totals: [rows][n_chunks], not
 * read where smoothing is 0; n_chunks <= 1024. */
int weft_cuda_row_losses(const float *m, const float *l, const float *target, const float *totals,
                         uint32_t rows, uint32_t n_chunks, const uint32_t *learnt, float smoothing,
                         uint32_t vocabulary, float *losses, WeftCudaStream stream);
/* target[r] = z[r][targets[r]], 0 for XENT_NO_TARGET. */
int weft_cuda_target_logits(const float *z, size_t ld, const uint32_t *targets, uint32_t rows,
                            float *target, WeftCudaStream stream);
int weft_cuda_loss_gradient(float *z, size_t ld, uint32_t rows, uint32_t n, const float *m,
                            const float *l, const uint32_t *targets, const uint32_t *learnt,
                            float factor, float smoothing, uint32_t vocabulary,
                            WeftCudaStream stream);

/* out[r] (+)= table[index[r] - first], n rows of the table, zeros for others; and out[ids[i]] +=
 * rows order[starts[i]..starts[i + 1]) of dy in order, an owner a row. */
int weft_cuda_gather(const float *table, const uint32_t *index, uint32_t first, uint32_t n,
                     uint32_t rows, uint32_t width, bool accumulate, float *out,
                     WeftCudaStream stream);
int weft_cuda_scatter(const float *dy, const uint32_t *ids, const uint32_t *starts,
                      const uint32_t *order, uint32_t n_ids, uint32_t width, float *out,
                      WeftCudaStream stream);
/* out = residual + dropout(x + bias), each rounded (specified: dropout_row); bias, residual and the
 * dropout (rate 0) may be none. All [rows][width]. */
typedef struct CudaDropout {
    Dropout dropout;
    uint32_t site;
    uint64_t first_sample;
    uint32_t length, rows, width;
    const float *x, *bias, *residual;
    float *out;
} CudaDropout;
int weft_cuda_dropout(const CudaDropout *args, WeftCudaStream stream);
/* A product for training (specified: gemm, gemm_bf16, gemm_f16; fields as in kernels/ops/gemm.h,
 * strides below 2^32). m * n tiles of 64 are at most 2^31. */
typedef struct CudaGemm {
    Dtype operands; /* F32, BF16 or F16 */
    uint32_t m, n;
    const GemmSegment *segments; /* host, what they point to device memory */
    uint32_t n_segments;
    bool accumulate;
    float *c;
    size_t ld, subtree_stride;
    uint32_t tile;   /* outputs along a side of a block's, 64 or 128 (bf16: 64); 0: by shape. No bit
                        changes */
    void *workspace; /* aligned to 256 bytes */
    size_t workspace_bytes; /* weft_cuda_gemm_bytes(); less may do */
} CudaGemm;
/* For any product of at most so many segments, rows and columns. */
size_t weft_cuda_gemm_bytes(uint32_t n_segments, uint32_t rows, uint32_t columns);
int weft_cuda_gemm(const CudaGemm *args, WeftCudaStream stream);
/* f32 rows rounded to nearest even, `to` BF16 or F16; columns n..out_ld-1 become zero. */
int weft_cuda_round(const float *x, size_t ld, uint32_t rows, uint32_t n, Dtype to, void *out,
                    size_t out_ld, WeftCudaStream stream);

/* Element-wise gradients over flat arrays of n (specified: gelu_backward, swiglu_backward;
 * their aliasing, too). */
int weft_cuda_gelu_backward(const float *x, const float *dy, size_t n, float *dx,
                            WeftCudaStream stream);
int weft_cuda_swiglu_backward(const float *gate, const float *up, const float *dy, size_t n,
                              float *dgate, float *dup, WeftCudaStream stream);
/* Optimizer steps and the gradient's finish, flat arrays of n (specified: adamw, sgd,
 * gradient_finish). Scalars are of the host. */
int weft_cuda_adamw(const AdamwScalars *scalars, size_t n, const float *g, float *m, float *v,
                    float *w, WeftCudaStream stream);
int weft_cuda_sgd(const SgdScalars *scalars, size_t n, const float *g, float *b, float *w,
                  WeftCudaStream stream);
int weft_cuda_gradient_finish(float *g, size_t n, float back, float tokens, WeftCudaStream stream);

/* Squares of tiles (specified: sum_squares): out[i] of tile i. tiles: device memory. */
typedef struct CudaTile {
    const float *x; /* [rows][ld] */
    size_t ld;
    uint32_t rows, columns;
} CudaTile;
int weft_cuda_sum_squares(const CudaTile *tiles, uint32_t n_tiles, float *out,
                          WeftCudaStream stream);

/* Backward of the norms, one row a row (specified: rms_norm_backward, layer_norm_backward): dx +=;
 * stats: [rows][2]. n <= 8192. */
int weft_cuda_rms_norm_backward(const float *x, const float *weight, const float *dy, size_t ld,
                                float eps, uint32_t rows, uint32_t n, float *dx, float *stats,
                                WeftCudaStream stream);
int weft_cuda_layer_norm_backward(const float *x, const float *weight, const float *dy, size_t ld,
                                  float eps, uint32_t rows, uint32_t n, float *dx, float *stats,
                                  WeftCudaStream stream);
/* Rows in order into dweight and dbias (specified: norm_weight_backward; dbias may be NULL), and
 * into out (specified: sum_rows). A thread a channel. */
int weft_cuda_norm_weight_backward(const float *x, const float *dy, size_t ld, const float *stats,
                                   uint32_t rows, uint32_t n, float *dweight, float *dbias,
                                   WeftCudaStream stream);
int weft_cuda_sum_rows(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out,
                       WeftCudaStream stream);

/* Backward of causal attention over one sequence, one KV head and its n_q query heads (specified:
 * attention_backward; fields as in kernels/ops/attention_backward.h, device memory but for steps).
 * head_size <= 256, n_q <= 64. With segments: of each of them (row0 and n_rows, n_rows here being
 * the longest) and of n_kv_heads KV heads beside each other, as many at once as the workspace has
 * room for. */
typedef struct CudaAttentionBackward {
    const float *q, *dout; /* [n_rows][q_ld], heads adjacent */
    const float *k, *v;    /* [n_rows][kv_ld] */
    size_t q_ld, kv_ld;
    float *dq;      /* [n_rows][q_ld]; may be dout */
    float *dk, *dv; /* subtree s at s * subtree_stride, [n_rows][kv_ld] */
    size_t subtree_stride;
    uint32_t n_rows, n_q, head_size;
    const TreeStep *steps; /* host, [n_q] */
    float scale;
    const CudaSegment *segments;     /* NULL: one sequence */
    uint32_t n_segments, n_kv_heads; /* 0 heads: one */
    Dtype operands;  /* DTYPE_F32: as specified; 16 bits: by matrix instructions, close to it */
    void *workspace; /* weft_cuda_attention_backward_bytes(), or more for several at once */
    size_t workspace_bytes; /* 0: for one */
} CudaAttentionBackward;
/* For one item, by n_rows, n_q, head_size and operands. */
size_t weft_cuda_attention_backward_bytes(const CudaAttentionBackward *args);
int weft_cuda_attention_backward(const CudaAttentionBackward *args, WeftCudaStream stream);

#ifdef __cplusplus
}
#endif
