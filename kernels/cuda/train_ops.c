/* DeviceTrainOps by the kernels of this folder and cuBLASLt: each op is some launches on the
 * stream. Needs no header of CUDA, so that the tests run it over the emulation of tests/kernels.
 * Class `exact`: every op has generic's bits, products by kernels/cuda/gemm_exact.cu. Class `fast`:
 * products have the library's order of sums, and attention with 16-bit operands rounds them. */
#include "kernels/device/train_ops.h"

#include "kernels/cuda/dense.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/module.h"

#define LIBRARY_BYTES ((size_t)32 << 20) /* for cuBLASLt to choose freely */
#define BACKWARD_BYTES                                                                             \
    ((size_t)1024 << 20)       /* of attention's backward pass, where that is enough               \
                                */
enum { LIBRARY_FAILED = 999 }; /* cudaErrorUnknown: the library has its own numbers */
enum { OPERAND_ALIGN = 8 };    /* elements: 16 bytes, which matrix instructions want */

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}
static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}
static size_t rounded_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static bool has_operands(Dtype type)
{
    return type == DTYPE_F32 || type == DTYPE_BF16 || type == DTYPE_F16;
}

static bool has_shape(uint32_t head_size, uint32_t heads_per_kv, uint32_t width)
{
    return head_size <= 256 && heads_per_kv <= 64 && width <= 8192;
}

/* ---- workspace: the library's, then two rounded operands; or attention's ---- */

static size_t page_bytes(uint32_t n_kv_heads, uint32_t head_size)
{
    return 2 * (size_t)n_kv_heads * KV_BLOCK * head_size * sizeof(float);
}

/* What attention rounds its operands to: the host's does not. */
static Dtype attention_operands(const DeviceTrainLimits *l)
{
    return l->exact ? DTYPE_F32 : l->operands;
}

static size_t forward_bytes(const DeviceTrainLimits *l)
{
    const CudaAttention args = {.n_heads = l->n_heads,
                                .head_size = l->head_size,
                                .heads_per_kv = 1,
                                .n_segments = l->max_documents,
                                .longest_segment = l->longest_document,
                                .max_keys = l->longest_document};
    return rounded_up(device_train_pages(l->max_rows, l->longest_document) *
                          page_bytes(l->n_kv_heads, l->head_size),
                      256) +
           weft_cuda_attention_bytes(&args);
}

static size_t backward_bytes(const DeviceTrainLimits *l)
{
    const uint32_t group = l->n_kv_heads > 0 ? (l->n_heads + l->n_kv_heads - 1) / l->n_kv_heads : 1;
    const CudaAttentionBackward args = {.n_rows = l->longest_document,
                                        .n_q = group,
                                        .head_size = l->head_size,
                                        .operands = attention_operands(l)};
    const size_t one = weft_cuda_attention_backward_bytes(&args),
                 items = (size_t)l->n_kv_heads * l->max_documents;
    return larger(one, smaller(one * items, BACKWARD_BYTES));
}

static size_t product_bytes(const DeviceTrainLimits *l)
{
    if (l->exact) {
        return weft_cuda_gemm_bytes(l->max_segments, l->longest_side, l->longest_side);
    }
    const size_t operand =
        l->operands == DTYPE_F32
            ? 0
            : rounded_up(2 * (l->operand_elements + (size_t)OPERAND_ALIGN * l->longest_side), 256);
    return LIBRARY_BYTES + 2 * operand;
}

static size_t workspace_bytes(const DeviceTrainLimits *l)
{
    return larger(product_bytes(l), larger(forward_bytes(l), backward_bytes(l)));
}

/* ---- products ---- */

/* Segments of one subtree that go on with each other: one product of the library. */
typedef struct Run {
    GemmSegment s; /* its length is the run's */
} Run;
enum { RUNS = 8 };

static bool goes_on(const GemmSegment *run, const GemmSegment *next)
{
    return run->a_row == next->a_row && run->a_step == next->a_step &&
           run->b_step == next->b_step && run->b_column == next->b_column &&
           run->a + run->length * run->a_step == next->a &&
           run->b + run->length * run->b_step == next->b;
}

/* An operand as the library gets it. */
typedef struct Operand {
    const void *data;
    size_t ld;
    bool by_in; /* [contraction][..] */
} Operand;

/* n rows or columns `outer` apart, with steps `step` apart; rounded into `room` unless it is there.
 */
static int operand(const DeviceProduct *p, const float *x, size_t outer, size_t step, uint32_t n,
                   uint32_t length, bool same, void *room, Operand *out, WeftCudaStream stream)
{
    const bool by_in = step != 1;
    const uint32_t rows = by_in ? length : n, columns = by_in ? n : length;
    const size_t ld = by_in ? step : outer;
    if (p->operands == DTYPE_F32) {
        *out = (Operand){x, ld, by_in};
        return 0;
    }
    *out = (Operand){room, rounded_up(columns, OPERAND_ALIGN), by_in};
    return same ? 0 : weft_cuda_round(x, ld, rows, columns, p->operands, room, out->ld, stream);
}

static DeviceStatus run_product(DeviceStream *stream, const DeviceProduct *p, const GemmSegment *s,
                                bool alone, float *c, bool accumulate)
{
    const size_t room =
        p->operands == DTYPE_F32 ? 0 : (p->workspace_bytes - LIBRARY_BYTES) / 2 / 256 * 256;
    uint8_t *a_room = (uint8_t *)p->workspace + LIBRARY_BYTES, *b_room = a_room + room;
    Operand a, b;
    int error = operand(p, s->a, s->a_row, s->a_step, p->m, s->length, alone && p->same_a, a_room,
                        &a, cuda_stream(stream));
    if (error == 0) {
        error = operand(p, s->b, s->b_column, s->b_step, p->n, s->length, alone && p->same_b,
                        b_room, &b, cuda_stream(stream));
    }
    if (error != 0) {
        return cuda_result(stream, error);
    }
    const CudaDenseProduct args = {.type = p->operands,
                                   .w = b.data,
                                   .w_ld = b.ld,
                                   .x = a.data,
                                   .x_ld = a.ld,
                                   .w_by_in = b.by_in,
                                   .x_by_in = a.by_in,
                                   .rows = p->m,
                                   .n_out = p->n,
                                   .n_in = s->length,
                                   .out = c,
                                   .ld = p->ld,
                                   .accumulate = accumulate,
                                   .workspace = p->workspace,
                                   .workspace_bytes = LIBRARY_BYTES};
    CudaDense *dense = cuda_dense(stream);
    if (dense == NULL) {
        return DEVICE_UNSUPPORTED;
    }
    return cuda_dense_product(dense, &args, cuda_stream(stream)) == 0
               ? DEVICE_OK
               : cuda_result(stream, LIBRARY_FAILED);
}

/* The runs of a subtree, one after the other into c. */
static DeviceStatus run_subtree(DeviceStream *stream, const DeviceProduct *p, const Run *runs,
                                uint32_t n, bool alone, float *c)
{
    DeviceStatus status = n > 0 ? DEVICE_OK : DEVICE_UNSUPPORTED;
    for (uint32_t i = 0; i < n && status == DEVICE_OK; i++) {
        status = run_product(stream, p, &runs[i].s, alone, c, i > 0 || p->accumulate);
    }
    return status;
}

static bool fits(const DeviceProduct *p, size_t length)
{
    const size_t most =
        2 * (OPERAND_ALIGN * larger(length, larger(p->m, p->n)) + length * larger(p->m, p->n));
    return p->workspace_bytes >= LIBRARY_BYTES &&
           (p->operands == DTYPE_F32 ||
            (p->workspace_bytes - LIBRARY_BYTES) / 2 / 256 * 256 >= most);
}

static DeviceStatus exact_product(DeviceStream *stream, const DeviceProduct *p)
{
    const CudaGemm args = {.operands = p->operands,
                           .m = p->m,
                           .n = p->n,
                           .segments = p->segments,
                           .n_segments = p->n_segments,
                           .accumulate = p->accumulate,
                           .c = p->c,
                           .ld = p->ld,
                           .subtree_stride = p->subtree_stride,
                           .workspace = p->workspace,
                           .workspace_bytes = p->workspace_bytes};
    return cuda_result(stream, weft_cuda_gemm(&args, cuda_stream(stream)));
}

static DeviceStatus fast_product(DeviceStream *stream, const DeviceProduct *p)
{
    Run runs[RUNS];
    uint32_t n = 0, subtree = 0;
    size_t length = 0;
    bool alone = true; /* one run in all: what it rounds is what the next product finds */
    for (uint32_t i = 0; i < p->n_segments; i++) {
        length += p->segments[i].length;
    }
    if (!fits(p, length)) {
        return DEVICE_UNSUPPORTED;
    }
    for (uint32_t i = 0; i < p->n_segments; i++) {
        const GemmSegment *s = &p->segments[i];
        uint32_t r = 0;
        while (r < n && !goes_on(&runs[r].s, s)) {
            r++;
        }
        if (r < n) {
            runs[r].s.length += s->length;
        } else if (s->length > 0) {
            if (n == RUNS) {
                return DEVICE_UNSUPPORTED;
            }
            runs[n++].s = *s;
        }
        if (!s->continues && s->step.emit) {
            alone = alone && n == 1 && subtree == 0 && i + 1 == p->n_segments;
            const DeviceStatus status =
                run_subtree(stream, p, runs, n, alone, p->c + subtree++ * p->subtree_stride);
            if (status != DEVICE_OK) {
                return status;
            }
            n = 0;
        }
    }
    return DEVICE_OK;
}

static DeviceStatus product(DeviceStream *stream, const DeviceProduct *p)
{
    return !has_operands(p->operands) ? DEVICE_UNSUPPORTED
           : p->exact                 ? exact_product(stream, p)
                                      : fast_product(stream, p);
}

/* ---- rows, norms, attention ---- */

static DeviceStatus gather(DeviceStream *stream, const DeviceGather *a)
{
    return cuda_result(stream,
                       weft_cuda_gather(a->table, a->index, a->first, a->n, a->rows, a->width,
                                        a->accumulate, a->out, cuda_stream(stream)));
}

static DeviceStatus scatter(DeviceStream *stream, const DeviceScatter *a)
{
    return cuda_result(stream, weft_cuda_scatter(a->dy, a->ids, a->starts, a->order, a->n_ids,
                                                 a->width, a->out, cuda_stream(stream)));
}

static DeviceStatus norm(DeviceStream *stream, const DeviceTrainNorm *a)
{
    WeftCudaStream s = cuda_stream(stream);
    float *x = (float *)a->x; /* read: no residual */
    return cuda_result(
        stream, a->bias != NULL ? weft_cuda_layer_norm(x, a->n, NULL, NULL, 0, a->weight, a->bias,
                                                       a->eps, a->rows, a->n, a->out, a->n, s)
                                : weft_cuda_rms_norm(x, a->n, NULL, NULL, 0, a->weight, a->eps,
                                                     a->rows, a->n, a->out, a->n, s));
}

static DeviceStatus norm_backward(DeviceStream *stream, const DeviceNormBackward *a)
{
    WeftCudaStream s = cuda_stream(stream);
    int error = (a->dbias != NULL ? weft_cuda_layer_norm_backward : weft_cuda_rms_norm_backward)(
        a->x, a->weight, a->dy, a->n, a->eps, a->rows, a->n, a->dx, a->stats, s);
    if (error == 0) {
        error = weft_cuda_norm_weight_backward(a->x, a->dy, a->n, a->stats, a->rows, a->n,
                                               a->dweight, a->dbias, s);
    }
    return cuda_result(stream, error);
}

static DeviceStatus turn(DeviceStream *stream, const DeviceTurn *a)
{
    return cuda_result(stream,
                       weft_cuda_rope(a->x, (size_t)a->n_heads * a->head_size, a->positions,
                                      a->rows, a->n_heads, a->head_size, a->dims, a->pairing,
                                      a->cos, a->sin, a->inverse, cuda_stream(stream)));
}

static DeviceStatus attention(DeviceStream *stream, const DeviceTrainAttention *a)
{
    const DeviceRows *rows = a->rows;
    const KvType type = a->operands == DTYPE_BF16  ? KV_BF16
                        : a->operands == DTYPE_F16 ? KV_F16
                                                   : KV_F32;
    const size_t block = kv_block_bytes(type, a->head_size),
                 pages = rounded_up(a->n_pages * page_bytes(a->n_kv_heads, a->head_size), 256),
                 first = a->first_row;
    const CudaKv kv = {.type = type,
                       .n_kv_heads = a->n_kv_heads,
                       .head_size = a->head_size,
                       .base = a->workspace,
                       .page_stride = 2 * block * a->n_kv_heads,
                       .head_stride = 2 * block,
                       .v_offset = block,
                       .tables = rows->pages,
                       .table_ld = rows->pages_ld};
    if (a->workspace_bytes < pages) {
        return DEVICE_UNSUPPORTED;
    }
    const CudaAttention args = {.q = a->q,
                                .q_ld = a->q_ld,
                                .out = a->out,
                                .out_ld = a->q_ld,
                                .n_heads = a->n_kv_heads * a->n_q,
                                .head_size = a->head_size,
                                .heads_per_kv = a->n_q,
                                .scale = a->scale,
                                .fast = a->operands != DTYPE_F32,
                                .kv = kv,
                                .segments = (const CudaSegment *)(const void *)rows->segments,
                                .n_segments = rows->n_segments,
                                .longest_segment = rows->longest_segment,
                                .max_keys = rows->max_keys,
                                .workspace = (uint8_t *)a->workspace + pages,
                                .workspace_bytes = a->workspace_bytes - pages};
    int error = weft_cuda_kv_write(&kv, a->k + first * a->kv_ld, a->v + first * a->kv_ld, a->kv_ld,
                                   rows->tables + first, rows->positions + first, rows->n_rows,
                                   cuda_stream(stream));
    if (error == 0) {
        error = weft_cuda_attention(&args, cuda_stream(stream));
    }
    return cuda_result(stream, error);
}

static DeviceStatus attention_backward(DeviceStream *stream, const DeviceTrainAttention *a)
{
    const DeviceRows *rows = a->rows;
    const CudaAttentionBackward args = {
        .q = a->q,
        .dout = a->dout,
        .k = a->k,
        .v = a->v,
        .q_ld = a->q_ld,
        .kv_ld = a->kv_ld,
        .dq = a->dq,
        .dk = a->dk,
        .dv = a->dv,
        .subtree_stride = a->subtree_stride,
        .n_rows = rows->longest_segment,
        .n_q = a->n_q,
        .head_size = a->head_size,
        .steps = a->steps,
        .scale = a->scale,
        .segments = (const CudaSegment *)(const void *)rows->segments,
        .n_segments = rows->n_segments,
        .n_kv_heads = a->n_kv_heads,
        .operands = a->operands,
        .workspace = a->workspace,
        .workspace_bytes = a->workspace_bytes,
    };
    if (a->workspace_bytes < weft_cuda_attention_backward_bytes(&args)) {
        return DEVICE_UNSUPPORTED;
    }
    return cuda_result(stream, weft_cuda_attention_backward(&args, cuda_stream(stream)));
}

/* ---- element-wise ---- */

static DeviceStatus dropout(DeviceStream *stream, const DeviceDropout *a)
{
    const CudaDropout args = {.dropout = a->dropout,
                              .site = a->site,
                              .first_sample = a->first_sample,
                              .length = a->length,
                              .rows = a->rows,
                              .width = a->width,
                              .x = a->x,
                              .bias = a->bias,
                              .residual = a->residual,
                              .out = a->out};
    return cuda_result(stream, weft_cuda_dropout(&args, cuda_stream(stream)));
}

static DeviceStatus bias(DeviceStream *stream, float *y, const float *bias, uint32_t rows,
                         uint32_t n)
{
    return cuda_result(stream, weft_cuda_add_bias(y, n, bias, rows, n, cuda_stream(stream)));
}

static DeviceStatus sum_rows(DeviceStream *stream, const float *dy, uint32_t rows, uint32_t n,
                             float *out)
{
    return cuda_result(stream, weft_cuda_sum_rows(dy, n, rows, n, out, cuda_stream(stream)));
}

/* Flat arrays as rows of at most ROW elements for kernels that know rows: whole rows, and a rest.
 */
enum { ROW = 1 << 16 };
typedef int (*FlatFn)(const float *a, const float *b, float *out, uint32_t rows, uint32_t n,
                      WeftCudaStream stream);

static DeviceStatus flat(DeviceStream *stream, FlatFn run, const float *a, const float *b,
                         float *out, size_t n)
{
    const uint32_t rows = (uint32_t)(n / ROW), rest = (uint32_t)(n % ROW);
    const size_t at = n - rest;
    int error = rows > 0 ? run(a, b, out, rows, ROW, cuda_stream(stream)) : 0;
    if (error == 0 && rest > 0) {
        error = run(a + at, b != NULL ? b + at : NULL, out + at, 1, rest, cuda_stream(stream));
    }
    return cuda_result(stream, error);
}

static int run_gelu(const float *x, const float *none, float *out, uint32_t rows, uint32_t n,
                    WeftCudaStream stream)
{
    (void)none;
    return weft_cuda_gelu(x, n, NULL, rows, n, out, n, stream);
}
static DeviceStatus gelu(DeviceStream *stream, const float *x, size_t n, float *out)
{
    return flat(stream, run_gelu, x, NULL, out, n);
}

static int run_swiglu(const float *gate, const float *up, float *out, uint32_t rows, uint32_t n,
                      WeftCudaStream stream)
{
    return weft_cuda_swiglu(gate, n, up, n, rows, n, out, n, stream);
}
static DeviceStatus swiglu(DeviceStream *stream, const float *gate, const float *up, size_t n,
                           float *out)
{
    return flat(stream, run_swiglu, gate, up, out, n);
}

static int run_add(const float *none, const float *y, float *x, uint32_t rows, uint32_t n,
                   WeftCudaStream stream)
{
    (void)none;
    return weft_cuda_add(x, n, y, n, rows, n, stream);
}
static DeviceStatus add(DeviceStream *stream, float *x, const float *y, size_t n)
{
    return flat(stream, run_add, x, y, x, n);
}

static DeviceStatus gelu_backward(DeviceStream *stream, const float *x, const float *dy, size_t n,
                                  float *dx)
{
    return cuda_result(stream, weft_cuda_gelu_backward(x, dy, n, dx, cuda_stream(stream)));
}

static DeviceStatus swiglu_backward(DeviceStream *stream, const float *gate, const float *up,
                                    const float *dy, size_t n, float *dgate, float *dup)
{
    return cuda_result(stream,
                       weft_cuda_swiglu_backward(gate, up, dy, n, dgate, dup, cuda_stream(stream)));
}

/* ---- the loss ---- */

static DeviceStatus row_stats(DeviceStream *stream, const DeviceRowStats *a)
{
    WeftCudaStream s = cuda_stream(stream);
    int error = weft_cuda_chunk_stats_of(a->logits, a->ld, a->rows, a->n, a->max + a->first_chunk,
                                         a->sum + a->first_chunk, a->n_chunks, s);
    if (error == 0) {
        error = weft_cuda_target_logits(a->logits, a->ld, a->targets, a->rows, a->target, s);
    }
    if (error == 0 && a->total != NULL) {
        error = weft_cuda_chunk_sums(a->logits, a->ld, a->rows, a->n, a->total + a->first_chunk,
                                     a->n_chunks, s);
    }
    return cuda_result(stream, error);
}

static DeviceStatus row_losses(DeviceStream *stream, const DeviceRowLosses *a)
{
    WeftCudaStream s = cuda_stream(stream);
    int error =
        weft_cuda_merge_stats(a->max, a->sum, a->rows, a->n_chunks, a->row_max, a->row_sum, s);
    if (error == 0) {
        error =
            weft_cuda_row_losses(a->row_max, a->row_sum, a->target, a->total, a->rows, a->n_chunks,
                                 a->learnt, a->smoothing, a->vocabulary, a->losses, s);
    }
    return cuda_result(stream, error);
}

static DeviceStatus loss_gradient(DeviceStream *stream, const DeviceLossGradient *a)
{
    return cuda_result(stream,
                       weft_cuda_loss_gradient(a->logits, a->ld, a->rows, a->n, a->row_max,
                                               a->row_sum, a->targets, a->learnt, a->factor,
                                               a->smoothing, a->vocabulary, cuda_stream(stream)));
}

/* ---- the owner of a gradient ---- */

static DeviceStatus finish(DeviceStream *stream, float *g, size_t n, float back, float tokens)
{
    return cuda_result(stream, weft_cuda_gradient_finish(g, n, back, tokens, cuda_stream(stream)));
}

_Static_assert(sizeof(CudaTile) == sizeof(DeviceTile) &&
                   offsetof(CudaTile, x) == offsetof(DeviceTile, x) &&
                   offsetof(CudaTile, ld) == offsetof(DeviceTile, ld) &&
                   offsetof(CudaTile, rows) == offsetof(DeviceTile, rows) &&
                   offsetof(CudaTile, columns) == offsetof(DeviceTile, columns),
               "one layout of tiles");

static DeviceStatus squares(DeviceStream *stream, const DeviceTile *tiles, uint32_t n_tiles,
                            float *out)
{
    return cuda_result(stream, weft_cuda_sum_squares((const CudaTile *)(const void *)tiles, n_tiles,
                                                     out, cuda_stream(stream)));
}

static DeviceStatus adamw(DeviceStream *stream, const AdamwScalars *scalars, size_t n,
                          const float *g, float *m, float *v, float *w)
{
    return cuda_result(stream, weft_cuda_adamw(scalars, n, g, m, v, w, cuda_stream(stream)));
}

static DeviceStatus sgd(DeviceStream *stream, const SgdScalars *scalars, size_t n, const float *g,
                        float *b, float *w)
{
    return cuda_result(stream, weft_cuda_sgd(scalars, n, g, b, w, cuda_stream(stream)));
}

const DeviceTrainOps cuda_train_ops = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceTrainOps),
    .has_operands = has_operands,
    .gives_exact = has_operands,
    .has_shape = has_shape,
    .workspace_bytes = workspace_bytes,
    .product = product,
    .gather = gather,
    .scatter = scatter,
    .norm = norm,
    .norm_backward = norm_backward,
    .turn = turn,
    .attention = attention,
    .attention_backward = attention_backward,
    .dropout = dropout,
    .bias = bias,
    .sum_rows = sum_rows,
    .gelu = gelu,
    .gelu_backward = gelu_backward,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .add = add,
    .row_stats = row_stats,
    .row_losses = row_losses,
    .loss_gradient = loss_gradient,
    .finish = finish,
    .squares = squares,
    .adamw = adamw,
    .sgd = sgd,
};
