/* DeviceOps by the kernels of this folder: each op is one to four launches on the stream. Needs no
 * header of CUDA, so that the tests run it over the emulation of tests/kernels. */
#include "kernels/device/ops.h"

#include "kernels/cuda/dense.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/module.h"

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t aligned(size_t bytes)
{
    return (bytes + 255) & ~(size_t)255;
}

static bool has_weight(Dtype type)
{
    switch (type) {
    case DTYPE_F32:
    case DTYPE_F16:
    case DTYPE_BF16:
    case DTYPE_Q4_0:
    case DTYPE_Q4_1:
    case DTYPE_Q5_0:
    case DTYPE_Q5_1:
    case DTYPE_Q8_0:
    case DTYPE_Q4_K:
    case DTYPE_Q5_K:
    case DTYPE_Q6_K:
    case DTYPE_F8_E4M3:
        return true;
    default:
        return false;
    }
}

static bool has_kv(KvType type, uint32_t head_size)
{
    return (uint32_t)type < KV_TYPE_LIMIT && head_size <= 256;
}

/* ---- workspace (device_workspace_bytes()): activations of a product and what the library needs,
 * or partial results of attention, or of sampling ---- */

/* Products of as many rows are the library's in class fast. It reads plain rows of bf16: a strip of
 * outputs at a time is unpacked, small enough to stay in the last cache, so that the weights come
 * from memory once, as they are stored. */
#ifndef DENSE_STRIP_BYTES /* a test has smaller ones */
#define DENSE_STRIP_BYTES ((size_t)DEVICE_STRIP_BYTES)
#endif

static uint32_t strip_outputs(uint32_t n_in, uint32_t n_out)
{
    const size_t row = weft_cuda_row_elements(n_in) * sizeof(uint16_t);
    const size_t fit = DENSE_STRIP_BYTES / row / PANEL_ROWS * PANEL_ROWS;
    return fit >= n_out ? n_out : fit > 0 ? (uint32_t)fit : PANEL_ROWS;
}

/* A strip of a matrix of any size up to these. */
static size_t strip_bytes(uint32_t n_in, uint32_t n_out)
{
    const size_t row = weft_cuda_row_elements(n_in) * sizeof(uint16_t);
    const size_t all = row * n_out, least = row * PANEL_ROWS;
    const size_t bytes = all < DENSE_STRIP_BYTES ? all : larger(DENSE_STRIP_BYTES, least);
    return aligned(bytes);
}

static size_t dense_act_bytes(uint32_t rows, uint32_t n_in)
{
    return aligned(weft_cuda_activation_bytes(DTYPE_BF16, rows, n_in));
}

static size_t dense_bytes(uint32_t rows, uint32_t n_in, uint32_t n_out)
{
    return dense_act_bytes(rows, n_in) + strip_bytes(n_in, n_out) + DEVICE_LIBRARY_BYTES;
}

/* ---- the ops ---- */

static DeviceStatus embed(DeviceStream *stream, const PackedMatrix *w, const uint32_t *ids,
                          uint32_t first_id, uint32_t n_rows, bool accumulate, float *x)
{
    return cuda_result(stream, weft_cuda_embed(w, ids, first_id, n_rows, accumulate, x, w->n_in,
                                               cuda_stream(stream)));
}

static DeviceStatus norm(DeviceStream *stream, const DeviceNorm *a)
{
    float *x = (float *)a->x; /* read: no residual */
    WeftCudaStream s = cuda_stream(stream);
    const int error = a->bias != NULL
                          ? weft_cuda_layer_norm(x, a->width, a->index, NULL, 0, a->weight, a->bias,
                                                 a->eps, a->n_rows, a->width, a->out, a->width, s)
                          : weft_cuda_rms_norm(x, a->width, a->index, NULL, 0, a->weight, a->eps,
                                               a->n_rows, a->width, a->out, a->width, s);
    return cuda_result(stream, error);
}

/* The product of w's outputs from `first` on, `w` those alone, by a kernel of ours. */
static int own_product(WeftCudaStream stream, const DeviceMatmul *m, const PackedMatrix *w,
                       uint32_t first)
{
    const float *bias = m->bias != NULL ? m->bias + first : NULL;
    const CudaMatmul args = {.w = w,
                             .fast = m->fast && m->n_units == 0,
                             .activations = m->workspace,
                             .x = m->x,
                             .x_ld = m->x_ld,
                             .rows = m->rows,
                             .out = m->out + first,
                             .ld = m->out_ld,
                             .subtree_stride = m->subtree_stride,
                             .bias = m->gelu ? NULL : bias,
                             .accumulate = m->accumulate,
                             .units = m->units,
                             .n_units = m->n_units};
    int error = weft_cuda_matmul(&args, stream);
    if (error == 0 && m->gelu) {
        error = weft_cuda_gelu(args.out, m->out_ld, bias, m->rows, w->n_out, args.out, m->out_ld,
                               stream);
    }
    return error;
}

/* w's outputs from `first` on, at most n of them. */
static PackedMatrix outputs_of(const PackedMatrix *w, uint32_t first, uint32_t n)
{
    PackedMatrix part = *w;
    part.n_out = w->n_out - first < n ? w->n_out - first : n;
    part.data += (size_t)(first / PANEL_ROWS) * w->panel_bytes;
    return part;
}

/* Strip by strip through the library; what it does not take is done by a kernel of ours, which
 * reads the same activations. */
static int dense_product(WeftCudaStream stream, CudaDense *dense, const DeviceMatmul *m)
{
    const PackedMatrix *w = m->w;
    const uint32_t outputs = strip_outputs(w->n_in, w->n_out);
    uint8_t *strip = (uint8_t *)m->workspace + dense_act_bytes(m->rows, w->n_in);
    int error = 0;
    for (uint32_t first = 0; first < w->n_out && error == 0; first += outputs) {
        const PackedMatrix part = outputs_of(w, first, outputs);
        const CudaDenseProduct args = {
            .type = DTYPE_BF16,
            .w = strip,
            .w_ld = weft_cuda_row_elements(w->n_in),
            .x = m->workspace,
            .x_ld = weft_cuda_bf16_row(w->n_in),
            .rows = m->rows,
            .n_out = part.n_out,
            .n_in = (uint32_t)weft_cuda_bf16_row(w->n_in), /* zeros on both sides */
            .out = m->out + first,
            .ld = m->out_ld,
            .bias = m->bias != NULL ? m->bias + first : NULL,
            .gelu = m->gelu,
            .accumulate = m->accumulate,
            .workspace = strip + strip_bytes(w->n_in, w->n_out),
            .workspace_bytes = DEVICE_LIBRARY_BYTES};
        error = weft_cuda_unpack(&part, (uint16_t *)(void *)strip, args.w_ld, stream);
        if (error == 0 && cuda_dense_product(dense, &args, stream) != 0) {
            error = own_product(stream, m, &part, first);
        }
    }
    return error;
}

/* ---- e4m3 with e4m3, where the host asked for it (dense.h) ---- */

typedef struct F8Operands {
    uint8_t *x, *w;
    float *x_scales, *w_scales;
    uint32_t rows; /* the library's: a multiple of 4 */
} F8Operands;

/* Half of what bf16 takes, and 4 bytes for each 128. */
static F8Operands f8_operands(const DeviceMatmul *m)
{
    const PackedMatrix *w = m->w;
    const uint32_t rows = m->rows / 4 * 4;
    uint8_t *x = m->workspace, *strip = x + dense_act_bytes(m->rows, w->n_in);
    return (F8Operands){
        .x = x,
        .w = strip,
        .x_scales = (float *)(void *)(x + aligned((size_t)rows * w->n_in)),
        .w_scales =
            (float *)(void *)(strip + aligned((size_t)strip_outputs(w->n_in, w->n_out) * w->n_in)),
        .rows = rows};
}

/* Strips until one is refused; *done: the outputs that are finished. */
static int f8_strips(WeftCudaStream stream, CudaDense *dense, const DeviceMatmul *m,
                     const F8Operands *f8, uint32_t *done)
{
    const uint32_t n_in = m->w->n_in, outputs = strip_outputs(n_in, m->w->n_out);
    int error = 0;
    for (*done = 0; *done < m->w->n_out && error == 0;) {
        const PackedMatrix part = outputs_of(m->w, *done, outputs);
        float *out = m->out + *done;
        const float *bias = m->bias != NULL ? m->bias + *done : NULL;
        const CudaDenseProduct args = {.type = DTYPE_F8_E4M3,
                                       .w = f8->w,
                                       .w_ld = n_in,
                                       .w_scales = f8->w_scales,
                                       .x = f8->x,
                                       .x_ld = n_in,
                                       .x_scales = f8->x_scales,
                                       .rows = f8->rows,
                                       .n_out = part.n_out,
                                       .n_in = n_in,
                                       .out = out,
                                       .ld = m->out_ld,
                                       .accumulate = m->accumulate,
                                       .workspace = f8->w + strip_bytes(n_in, m->w->n_out),
                                       .workspace_bytes = DEVICE_LIBRARY_BYTES};
        error = weft_cuda_unpack_f8(&part, f8->w, f8->w_scales, stream);
        if (error != 0 || cuda_dense_product(dense, &args, stream) != 0) {
            break;
        }
        if (m->gelu) {
            error =
                weft_cuda_gelu(out, m->out_ld, bias, f8->rows, part.n_out, out, m->out_ld, stream);
        } else if (bias != NULL) {
            error = weft_cuda_add_bias(out, m->out_ld, bias, f8->rows, part.n_out, stream);
        }
        *done += part.n_out;
    }
    return error;
}

/* The last one to three rows, which the library does not take, of the first `outputs` outputs. */
static int f8_last_rows(WeftCudaStream stream, const DeviceMatmul *m, const F8Operands *f8,
                        uint32_t outputs)
{
    const PackedMatrix w = outputs_of(m->w, 0, outputs);
    DeviceMatmul last = *m;
    last.rows = m->rows - f8->rows;
    last.x += f8->rows * m->x_ld;
    last.out += f8->rows * m->out_ld;
    last.workspace = f8->w;
    if (last.rows == 0 || outputs == 0) {
        return 0;
    }
    const int error = weft_cuda_quantise(DTYPE_F8_E4M3, last.x, last.x_ld, last.rows, w.n_in,
                                         last.workspace, stream);
    return error != 0 ? error : own_product(stream, &last, &w, 0);
}

/* What the library refuses is done in bf16, this time and from now on. */
static int f8_product(WeftCudaStream stream, CudaDense *dense, const DeviceMatmul *m)
{
    CudaDenseF8 *state = cuda_dense_f8(dense);
    const F8Operands f8 = f8_operands(m);
    uint32_t done = 0;
    int error = 0;
    if (!m->same_x || !state->left) {
        error =
            weft_cuda_quantise_f8(m->x, m->x_ld, f8.rows, m->w->n_in, f8.x, f8.x_scales, stream);
        state->left = true;
    }
    if (error == 0) {
        error = f8_strips(stream, dense, m, &f8, &done);
    }
    if (error == 0) {
        error = f8_last_rows(stream, m, &f8, done);
    }
    if (error != 0 || done == m->w->n_out) {
        return error;
    }
    const PackedMatrix w = outputs_of(m->w, done, m->w->n_out);
    DeviceMatmul rest = *m;
    rest.w = &w;
    rest.out += done;
    rest.bias = m->bias != NULL ? m->bias + done : NULL;
    state->wanted = state->left = false;
    error = weft_cuda_quantise(DTYPE_BF16, m->x, m->x_ld, m->rows, w.n_in, m->workspace, stream);
    return error != 0 ? error : dense_product(stream, dense, &rest);
}

static bool is_f8(CudaDense *dense, const DeviceMatmul *m)
{
    return dense != NULL && cuda_dense_f8(dense)->wanted && m->w->type == DTYPE_F8_E4M3 &&
           m->w->n_out % 4 == 0;
}

/* Whether the last product left e4m3 there; this one leaves bf16. */
static bool left_f8(CudaDense *dense)
{
    const bool left = dense != NULL && cuda_dense_f8(dense)->left;
    if (left) {
        cuda_dense_f8(dense)->left = false;
    }
    return left;
}

static bool is_dense(const DeviceMatmul *m)
{
    return m->fast && m->n_units == 0 && m->rows >= DEVICE_LIBRARY_ROWS &&
           m->w->type != DTYPE_F32 &&
           m->workspace_bytes >= dense_bytes(m->rows, m->w->n_in, m->w->n_out);
}

static DeviceStatus matmul(DeviceStream *stream, const DeviceMatmul *m)
{
    const Dtype type = weft_cuda_activation_type(m->w->type, m->rows, m->fast && m->n_units == 0);
    CudaDense *dense = is_dense(m) ? cuda_dense(stream) : NULL;
    WeftCudaStream s = cuda_stream(stream);
    int error = 0;
    if (!has_weight(m->w->type) ||
        m->workspace_bytes < weft_cuda_activation_bytes(type, m->rows, m->w->n_in)) {
        return DEVICE_UNSUPPORTED;
    }
    if (is_f8(dense, m)) {
        return cuda_result(stream, f8_product(s, dense, m));
    }
    const bool was_f8 = left_f8(dense);
    const bool there = m->same_x && !was_f8;
    if (type != DTYPE_F32 && !there) {
        error = weft_cuda_quantise(type, m->x, m->x_ld, m->rows, m->w->n_in, m->workspace, s);
    }
    if (error == 0) {
        error = dense != NULL ? dense_product(s, dense, m) : own_product(s, m, m->w, 0);
    }
    return cuda_result(stream, error);
}

static CudaKv layer_of(const DeviceKv *kv, uint32_t layer, uint32_t head_size,
                       const DeviceRows *rows)
{
    return (CudaKv){.type = kv->type,
                    .n_kv_heads = kv->n_heads,
                    .head_size = head_size,
                    .base = kv->memory + (size_t)layer * kv->n_heads * 2 * kv->block_bytes,
                    .page_stride = kv->page_bytes,
                    .head_stride = 2 * kv->block_bytes,
                    .v_offset = kv->block_bytes,
                    .tables = rows->pages,
                    .table_ld = rows->pages_ld};
}

static DeviceStatus rope_store(DeviceStream *stream, const DeviceRows *rows, const DeviceRope *a)
{
    const CudaKv kv = layer_of(&a->kv, a->layer, a->head_size, rows);
    const size_t q_ld = (size_t)a->n_heads * a->head_size,
                 k_ld = (size_t)a->kv.n_heads * a->head_size;
    WeftCudaStream s = cuda_stream(stream);
    int error = 0;
    if (a->dims > 0) {
        error = weft_cuda_rope(a->q, q_ld, rows->positions, rows->n_rows, a->n_heads, a->head_size,
                               a->dims, a->pairing, a->cos, a->sin, false, s);
    }
    if (error == 0 && a->dims > 0) {
        error = weft_cuda_rope(a->k, k_ld, rows->positions, rows->n_rows, a->kv.n_heads,
                               a->head_size, a->dims, a->pairing, a->cos, a->sin, false, s);
    }
    if (error == 0) {
        error = weft_cuda_kv_write(&kv, a->k, a->v, k_ld, rows->tables, rows->positions,
                                   rows->n_rows, s);
    }
    return cuda_result(stream, error);
}

_Static_assert(sizeof(CudaSegment) == sizeof(DeviceSegment) &&
                   offsetof(CudaSegment, row0) == offsetof(DeviceSegment, row0) &&
                   offsetof(CudaSegment, n_rows) == offsetof(DeviceSegment, n_rows) &&
                   offsetof(CudaSegment, position) == offsetof(DeviceSegment, position) &&
                   offsetof(CudaSegment, table) == offsetof(DeviceSegment, table),
               "one layout of segments");

static DeviceStatus attention(DeviceStream *stream, const DeviceRows *rows,
                              const DeviceAttention *a)
{
    const size_t ld = (size_t)a->n_heads * a->head_size;
    const CudaAttention args = {.q = a->q,
                                .q_ld = ld,
                                .out = a->out,
                                .out_ld = ld,
                                .n_heads = a->n_heads,
                                .head_size = a->head_size,
                                .head_first = a->head_first,
                                .kv_first = a->kv_first,
                                .heads_per_kv = a->heads_per_kv,
                                .scale = a->scale,
                                .window = a->window,
                                .fast = a->fast,
                                .kv = layer_of(&a->kv, a->layer, a->head_size, rows),
                                .segments = (const CudaSegment *)(const void *)rows->segments,
                                .n_segments = rows->n_segments,
                                .longest_segment = rows->longest_segment,
                                .max_keys = rows->max_keys,
                                .workspace = a->workspace,
                                .workspace_bytes = a->workspace_bytes};
    return cuda_result(stream, weft_cuda_attention(&args, cuda_stream(stream)));
}

/* One row: flat arrays. */
static DeviceStatus swiglu(DeviceStream *stream, const float *gate, const float *up, uint32_t rows,
                           uint32_t n, float *out)
{
    return cuda_result(stream,
                       weft_cuda_swiglu(gate, n, up, n, rows, n, out, n, cuda_stream(stream)));
}

static DeviceStatus add(DeviceStream *stream, float *x, const float *y, uint32_t rows, uint32_t n)
{
    return cuda_result(stream, weft_cuda_add(x, n, y, n, rows, n, cuda_stream(stream)));
}

static DeviceStatus add_bias(DeviceStream *stream, float *x, const float *bias, uint32_t rows,
                             uint32_t n)
{
    return cuda_result(stream, weft_cuda_add_bias(x, n, bias, rows, n, cuda_stream(stream)));
}

static DeviceStatus sample(DeviceStream *stream, const DeviceSample *a)
{
    WeftCudaStream s = cuda_stream(stream);
    if (a->workspace_bytes <
        weft_cuda_candidates_bytes(a->n_rows, a->n, (uint32_t)larger(a->keep, a->n_top))) {
        return DEVICE_UNSUPPORTED;
    }
    int error = weft_cuda_chunk_parts(a->logits, a->n, a->draws, a->n_rows, a->n, a->chunks, s);
    if (error == 0) {
        error = weft_cuda_candidates(a->logits, a->n, a->draws, a->first_id, a->n_rows, a->n,
                                     a->keep, a->best, a->workspace, s);
    }
    if (error == 0 && a->n_top > 0) {
        error = weft_cuda_candidates(a->logits, a->n, NULL, a->first_id, a->n_rows, a->n, a->n_top,
                                     a->top, a->workspace, s);
    }
    return cuda_result(stream, error);
}

_Static_assert(WEFT_CUDA_CHECKSUM_BYTES <= DEVICE_CHECKSUM_BYTES, "a workspace has room");

static DeviceStatus checksum(DeviceStream *stream, const void *data, size_t n_words, uint32_t *out,
                             void *workspace, size_t workspace_bytes)
{
    if (workspace_bytes < WEFT_CUDA_CHECKSUM_BYTES) {
        return DEVICE_UNSUPPORTED;
    }
    return cuda_result(stream,
                       weft_cuda_checksum(data, n_words, out, workspace, cuda_stream(stream)));
}

const DeviceOps cuda_ops = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceOps),
    .has_weight = has_weight,
    .has_kv = has_kv,
    .embed = embed,
    .norm = norm,
    .matmul = matmul,
    .rope_store = rope_store,
    .attention = attention,
    .swiglu = swiglu,
    .add = add,
    .add_bias = add_bias,
    .sample = sample,
    .checksum = checksum,
};
