#include "worker/model/training_pass.h"

#include <string.h>

enum { COLUMN_GRAIN = 48, ROW_GRAIN = 8 };

/* The rows of this thread. */
static void own_rows(const Pass *p, uint32_t *first, uint32_t *last)
{
    pool_share(p->last_row - p->first_row, 1, p->t, p->n_threads, first, last);
    *first += p->first_row;
    *last += p->first_row;
}

size_t pass_own_rows(const Pass *p, uint32_t n, size_t *count)
{
    uint32_t first, last;
    own_rows(p, &first, &last);
    *count = (size_t)(last - first) * n;
    return (size_t)first * n;
}

static void host_multiply(Pass *p, GemmArgs *args)
{
    args->scratch = p->m->scratch[p->t];
    precision_gemm(p->m->o.kernels, p->m->o.precision)(args);
}

static const TreeStep whole = {.n_merges = 0, .emit = 1};

/* ---- forward ---- */

void pass_linear(Pass *p, const float *x, uint32_t n_in, const Linear *list, unsigned n)
{
    uint32_t total = 0, first, last, base = 0;
    for (unsigned i = 0; i < n; i++) {
        total += list[i].n_out;
    }
    pool_share(total, COLUMN_GRAIN, p->t, p->n_threads, &first, &last);
    for (unsigned i = 0; i < n; base += list[i++].n_out) {
        const uint32_t a = MAX(first, base), b = MIN(last, base + list[i].n_out);
        if (a < b) {
            const GemmSegment segment = {.a = x,
                                         .a_row = n_in,
                                         .a_step = 1,
                                         .b = list[i].w + (size_t)(a - base) * n_in,
                                         .b_step = 1,
                                         .b_column = n_in,
                                         .length = n_in,
                                         .step = whole};
            pass_multiply(p, &(GemmArgs){.m = p->rows,
                                         .n = b - a,
                                         .segments = &segment,
                                         .n_segments = 1,
                                         .c = list[i].y + (a - base),
                                         .ld = list[i].ld > 0 ? list[i].ld : list[i].n_out});
        }
    }
    mark_product(p, TRAIN_OP_FORWARD);
}

void pass_linear_units(Pass *p, const float *x, const float *w, uint32_t n_in, const Units *units)
{
    GemmSegment *segments = p->m->segments[p->t];
    uint32_t first, last;
    size_t stride;
    float *c = pass_fold_target(p, p->m->sum, &stride);
    pool_share(p->m->width, COLUMN_GRAIN, p->t, p->n_threads, &first, &last);
    for (uint32_t u = 0; u < units->n; u++) {
        segments[u] = (GemmSegment){.a = x + units->first[u],
                                    .a_row = n_in,
                                    .a_step = 1,
                                    .b = w + (size_t)first * n_in + units->first[u],
                                    .b_step = 1,
                                    .b_column = n_in,
                                    .length = units->first[u + 1] - units->first[u],
                                    .step = units->steps[u]};
    }
    pass_fold_product(p, &(Fold){units, p->m->sum, "partial sums of a sub-layer"},
                      &(GemmArgs){.n = last - first,
                                  .segments = segments,
                                  .n_segments = units->n,
                                  .c = c + first,
                                  .ld = p->m->width,
                                  .subtree_stride = stride},
                      segments, TRAIN_OP_FORWARD);
}

static void host_bias(Pass *p, float *y, const float *bias, uint32_t n)
{
    uint32_t first, last;
    own_rows(p, &first, &last);
    for (uint32_t r = first; bias != NULL && r < last; r++) {
        p->m->o.kernels->add(y + (size_t)r * n, bias, n);
    }
    mark(p, TRAIN_OP_NORM);
}

void host_dropout(Pass *p, uint32_t site, const float *x, float *out)
{
    const TrainBatch *batch = p->batch;
    const uint32_t width = p->m->width;
    size_t n;
    const size_t own = pass_own_rows(p, width, &n);
    if (out != x) {
        memcpy(out + own, x + own, n * sizeof *out);
    }
    for (size_t at = own; batch->dropout.rate > 0.0f && at < own + n; at += width) {
        const uint32_t r = (uint32_t)(at / width);
        dropout_row(&batch->dropout, site, batch->first_sample + r / batch->length,
                    r % batch->length, out + at, width);
    }
}

static void host_residual(Pass *p, const float *x, const float *bias, uint32_t site, float *out)
{
    const uint32_t width = p->m->width;
    size_t n;
    host_bias(p, p->m->sum, bias, width);
    host_dropout(p, site, p->m->sum, p->m->sum);
    const size_t own = pass_own_rows(p, width, &n);
    memcpy(out + own, x + own, n * sizeof(float));
    p->m->o.kernels->add(out + own, p->m->sum + own, n);
    mark(p, TRAIN_OP_NORM);
}

static void host_norm(Pass *p, const float *x, const float *w, const float *bias, float *out)
{
    const uint32_t width = p->m->width;
    const Kernels *k = p->m->o.kernels;
    const float eps = p->m->spec->norm_eps;
    uint32_t first, last;
    own_rows(p, &first, &last);
    for (size_t at = (size_t)first * width; at < (size_t)last * width; at += width) {
        if (bias != NULL) {
            k->train.layer_norm(x + at, w, bias, eps, width, out + at);
        } else {
            k->rms_norm(x + at, w, eps, width, out + at);
        }
    }
    mark(p, TRAIN_OP_NORM);
}

static void host_rope(Pass *p, float *q, float *k, bool back)
{
    const Training *m = p->m;
    const ModelSpec *spec = m->spec;
    const float *sin = back ? m->sin_back : m->sin;
    const RopeApplyFn rotate = m->o.kernels->rope_apply;
    const uint32_t half = spec->rope.dims / 2;
    uint32_t first, last;
    own_rows(p, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        const size_t at = (size_t)position_of(p, r) * half;
        rotate(q + (size_t)r * m->q_width, m->h->n_heads, spec->head_size, spec->rope.dims,
               spec->rope.pairing, m->cos + at, sin + at);
        rotate(k + (size_t)r * m->kv_width, m->h->n_kv_heads, spec->head_size, spec->rope.dims,
               spec->rope.pairing, m->cos + at, sin + at);
    }
    mark(p, TRAIN_OP_ATTENTION);
}

uint32_t training_query_heads(const Training *m, uint32_t kv, uint32_t *n)
{
    const Holding *h = m->h;
    const uint32_t group = m->spec->n_heads / m->spec->n_kv_heads,
                   first = MAX((h->kv_first + kv) * group, h->head_first),
                   last = MIN((h->kv_first + kv + 1) * group, h->head_first + h->n_heads);
    *n = last - first;
    return first - h->head_first;
}

Document pass_document_at(const TrainBatch *b, uint32_t sequence, uint32_t first)
{
    const size_t row = (size_t)sequence * b->length;
    uint32_t end = b->begins != NULL ? first + 1 : b->length;
    while (end < b->length && b->begins[row + end] == first) {
        end++;
    }
    return (Document){row + first, end - first};
}

/* One document, one KV head. */
static void attend(Pass *p, Tape *tape, Document document, uint32_t kv)
{
    Training *m = p->m;
    const ModelSpec *spec = m->spec;
    const uint32_t hd = spec->head_size, length = document.length;
    uint32_t n_q;
    const uint32_t head = training_query_heads(m, kv, &n_q);
    const uint32_t n_blocks = (length + KV_BLOCK - 1) / KV_BLOCK;
    const size_t row = document.row, block = (size_t)KV_BLOCK * hd;
    float *k_blocks = m->scratch[p->t], *v_blocks = k_blocks + n_blocks * block;
    const uint8_t **pages = m->pages[p->t];
    for (uint32_t b = 0; b < n_blocks; b++) {
        pages[b] = (const uint8_t *)(k_blocks + b * block);
        pages[n_blocks + b] = (const uint8_t *)(v_blocks + b * block);
    }
    for (uint32_t i = 0; i < length; i++) {
        const size_t at = (row + i) * m->kv_width + (size_t)kv * hd, b = i / KV_BLOCK * block;
        m->o.kernels->kv_write[KV_F32](tape->k + at, tape->v + at, hd, i % KV_BLOCK, k_blocks + b,
                                       v_blocks + b);
    }
    const size_t at = row * m->q_width + (size_t)head * hd;
    const AttentionArgs args = {.q = tape->q + at,
                                .q_ld = m->q_width,
                                .out = tape->attn + at,
                                .out_ld = m->q_width,
                                .n_rows = length,
                                .n_q = n_q,
                                .head_size = hd,
                                .scale = spec->attention_scale,
                                .causal = true,
                                .n_keys = length,
                                .k_blocks = pages,
                                .v_blocks = pages + n_blocks,
                                .scratch = v_blocks + n_blocks * block};
    m->o.kernels->attention[KV_F32](&args);
}

static void host_attention(Pass *p, Tape *tape)
{
    const uint32_t n_kv = p->m->h->n_kv_heads;
    for (uint32_t i = p->t; i < p->batch->n_sequences * n_kv; i += p->n_threads) {
        for (uint32_t first = 0; first < p->batch->length;) {
            const Document document = pass_document_at(p->batch, i / n_kv, first);
            attend(p, tape, document, i % n_kv);
            first += document.length;
        }
    }
    mark(p, TRAIN_OP_ATTENTION);
}

/* ---- activations ---- */

static void host_gelu(Pass *p, const float *x, uint32_t n, float *out)
{
    size_t own_n;
    const size_t own = pass_own_rows(p, n, &own_n);
    p->m->o.kernels->train.gelu(x + own, (uint32_t)own_n, out + own);
    mark(p, TRAIN_OP_ACTIVATION);
}

static void host_gelu_backward(Pass *p, const float *x, uint32_t n, float *dx)
{
    size_t own_n;
    const size_t own = pass_own_rows(p, n, &own_n);
    p->m->o.kernels->train.gelu_backward(x + own, dx + own, (uint32_t)own_n, dx + own);
    mark(p, TRAIN_OP_ACTIVATION_BACKWARD);
}

static void host_swiglu(Pass *p, const float *gate, const float *up, uint32_t n, float *out)
{
    size_t own_n;
    const size_t own = pass_own_rows(p, n, &own_n);
    p->m->o.kernels->swiglu(gate + own, up + own, (uint32_t)own_n, out + own);
    mark(p, TRAIN_OP_ACTIVATION);
}

static void host_swiglu_backward(Pass *p, float *gate, float *up, uint32_t n, const float *dy)
{
    size_t own_n;
    const size_t own = pass_own_rows(p, n, &own_n);
    p->m->o.kernels->train.swiglu_backward(gate + own, up + own, dy + own, (uint32_t)own_n,
                                           gate + own, up + own);
    mark(p, TRAIN_OP_ACTIVATION_BACKWARD);
}

/* ---- backward ---- */

const float *pass_result_gradient(Pass *p, uint32_t site, float *keep)
{
    Training *m = p->m;
    if (keep == NULL && !(p->batch->dropout.rate > 0.0f)) {
        return m->dx;
    }
    float *to = keep != NULL ? keep : m->sum;
    m->ops->dropout(p, site, m->dx, to);
    mark(p, TRAIN_OP_NORM_BACKWARD);
    meet(p);
    return to;
}

void pass_linear_dx(Pass *p, const float *dy, uint32_t n_out, const float *w, uint32_t n_in,
                    float *dx)
{
    uint32_t first, last;
    pool_share(n_in, COLUMN_GRAIN, p->t, p->n_threads, &first, &last);
    const GemmSegment segment = {.a = dy,
                                 .a_row = n_out,
                                 .a_step = 1,
                                 .b = w + first,
                                 .b_step = n_in,
                                 .b_column = 1,
                                 .length = n_out,
                                 .step = whole};
    if (first < last) {
        pass_multiply(p, &(GemmArgs){.m = p->rows,
                                     .n = last - first,
                                     .segments = &segment,
                                     .n_segments = 1,
                                     .c = dx + first,
                                     .ld = n_in});
    }
    mark_product(p, TRAIN_OP_DX);
}

void pass_units_dx(Pass *p, const SpanDx *spans, unsigned n_spans, const Units *units)
{
    GemmSegment *segments = p->m->segments[p->t];
    const uint32_t width = p->m->width;
    uint32_t first, last, n = 0;
    size_t stride;
    float *c = pass_fold_target(p, p->m->dh, &stride);
    pool_share(width, COLUMN_GRAIN, p->t, p->n_threads, &first, &last);
    for (uint32_t u = 0; u < units->n; u++) {
        for (unsigned i = 0; i < n_spans; i++) {
            const SpanDx *s = &spans[i];
            segments[n++] = (GemmSegment){.a = s->dy + s->first[u],
                                          .a_row = s->n_out,
                                          .a_step = 1,
                                          .b = s->w + (size_t)s->first[u] * width + first,
                                          .b_step = width,
                                          .b_column = 1,
                                          .length = s->first[u + 1] - s->first[u],
                                          .continues = i + 1 < n_spans,
                                          .step = units->steps[u]};
        }
    }
    pass_fold_product(p, &(Fold){units, p->m->dh, "gradients through a sub-layer"},
                      &(GemmArgs){.n = last - first,
                                  .segments = segments,
                                  .n_segments = n,
                                  .c = c + first,
                                  .ld = width,
                                  .subtree_stride = stride},
                      segments, TRAIN_OP_DX);
}

void pass_qkv_dx(Pass *p, uint32_t layer)
{
    const Training *m = p->m;
    const ModelSpec *spec = m->spec;
    const uint32_t group = spec->n_heads / spec->n_kv_heads;
    uint32_t kv_first[TREE_LEAVES_LIMIT + 1];
    for (uint32_t u = 0; u <= m->attn_units.n; u++) {
        /* own KV heads whose first query head lies before the unit */
        const uint32_t head = m->h->head_first + m->attn_units.first[u] / spec->head_size;
        kv_first[u] = ((head + group - 1) / group - m->h->kv_first) * spec->head_size;
    }
    const SpanDx spans[] = {
        {p->d->dq, weight(p, ROLE_ATTN_Q, layer), m->q_width, m->attn_units.first},
        {p->d->dk, weight(p, ROLE_ATTN_K, layer), m->kv_width, kv_first},
        {p->d->dv, weight(p, ROLE_ATTN_V, layer), m->kv_width, kv_first},
    };
    pass_units_dx(p, spans, 3, &m->attn_units);
}

/* This thread's segments, from output row `row` on: a leaf each, or a sample where pairs would span
 * two. Returns how many. */
static uint32_t leaf_segments(Pass *p, const LinearGradient *g, uint32_t row)
{
    const uint32_t length = p->batch->length;
    const size_t ld = g->ld > 0 ? g->ld : g->n_out;
    const bool by_sample = p->m->o.precision == PRECISION_BF16 && length % 2 != 0;
    uint32_t begin = 0, n = 0;
    for (uint32_t leaf = 0; leaf < leaves_of(p); leaf++) {
        const uint32_t end = leaf_end(p, leaf);
        while (begin < end) {
            const uint32_t to = by_sample ? begin + length : end;
            const bool continues = to < end;
            p->m->segments[p->t][n++] =
                (GemmSegment){.a = g->dy + begin * ld + row,
                              .a_row = 1,
                              .a_step = ld,
                              .b = g->x + (size_t)begin * g->n_in,
                              .b_step = g->n_in,
                              .b_column = 1,
                              .length = to - begin,
                              .continues = continues,
                              .step = leaves_of(p) > 1 ? p->batch->leaves->steps[leaf] : whole};
            begin = to;
        }
    }
    return n;
}

/* The row of a gradient at which thread t begins, where threads share `total` products of all
 * gradients, `before` of them before this one. */
static uint32_t gradient_cut(const LinearGradient *g, uint64_t total, uint64_t before, unsigned t,
                             unsigned n_threads)
{
    const uint64_t at = total * t / n_threads, row = at > before ? (at - before) / g->n_in : 0;
    return (uint32_t)MIN((row + ROW_GRAIN - 1) / ROW_GRAIN * ROW_GRAIN, g->n_out);
}

void pass_linear_dw(Pass *p, const LinearGradient *list, unsigned n)
{
    const Training *m = p->m;
    /* links go on between blocks that products take at once */
    const uint32_t most = m->o.progress != NULL && m->device == NULL ? FOLD_ROWS : UINT32_MAX;
    uint64_t total = 0, before = 0;
    for (unsigned i = 0; i < n; i++) {
        total += (uint64_t)list[i].n_out * list[i].n_in;
    }
    for (unsigned i = 0; i < n; before += (uint64_t)list[i].n_out * list[i].n_in, i++) {
        const LinearGradient *g = &list[i];
        const uint32_t a = gradient_cut(g, total, before, p->t, p->n_threads),
                       b = gradient_cut(g, total, before, p->t + 1, p->n_threads);
        for (uint32_t row = a, rows; row < b; row += rows) {
            rows = MIN(b - row, most);
            const uint32_t n_segments = leaf_segments(p, g, row);
            pass_multiply(p, &(GemmArgs){.m = rows,
                                         .n = g->n_in,
                                         .segments = m->segments[p->t],
                                         .n_segments = n_segments,
                                         .accumulate = leaf_begun(p),
                                         .leaves = true,
                                         .c = g->dw + (size_t)row * g->n_in,
                                         .ld = g->n_in});
            mark_product(p, TRAIN_OP_DW);
            progress(p);
        }
    }
}

/* Adds rows of a leaf to out [parts][n], for columns [column, column + n). */
typedef void (*LeafSums)(void *user, uint32_t row, uint32_t n_rows, uint32_t column, uint32_t n,
                         float *out);

/* By this thread; the leaves' folded sums come to to[part] + column. */
static void fold_leaves(Pass *p, uint32_t first, uint32_t last, unsigned parts, LeafSums sums,
                        void *user, float *const *to)
{
    const AddFn add = p->m->o.kernels->add;
    float *stack = p->m->scratch[p->t];
    for (uint32_t column = first; column < last; column += FOLD_COLUMNS) {
        const uint32_t n = MIN(FOLD_COLUMNS, last - column);
        const size_t level = (size_t)parts * n;
        uint32_t depth = 0, row = 0;
        for (uint32_t leaf = 0; leaf < leaves_of(p); leaf++) {
            memset(stack + depth * level, 0, level * sizeof *stack);
            sums(user, row, leaf_end(p, leaf) - row, column, n, stack + depth * level);
            row = leaf_end(p, leaf);
            depth++;
            for (uint32_t k = 0; k < p->batch->leaves->steps[leaf].n_merges; k++) {
                depth--;
                add(stack + (depth - 1) * level, stack + depth * level, level);
            }
        }
        for (unsigned part = 0; part < parts; part++) {
            memcpy(to[part] + column, stack + (size_t)part * n, n * sizeof *stack);
        }
    }
}

typedef struct BiasSums {
    SumRowsFn sum_rows;
    const float *dy;
    uint32_t ld;
} BiasSums;

static void bias_sums(void *user, uint32_t row, uint32_t n_rows, uint32_t column, uint32_t n,
                      float *out)
{
    const BiasSums *s = user;
    s->sum_rows(s->dy + (size_t)row * s->ld + column, s->ld, n_rows, n, out);
}

static void host_bias_gradient(Pass *p, const float *dy, uint32_t n, float *dbias)
{
    BiasSums s = {p->m->o.kernels->train.sum_rows, dy, n};
    uint32_t first, last;
    pool_share(n, COLUMN_GRAIN, p->t, p->n_threads, &first, &last);
    if (dbias == NULL || first == last) {
        return;
    }
    if (leaves_of(p) > 1) {
        fold_leaves(p, first, last, 1, bias_sums, &s, (float *const[]){dbias});
    } else {
        s.sum_rows(dy + first, n, p->rows, last - first, dbias + first);
    }
    mark(p, TRAIN_OP_BIAS_BACKWARD);
}

typedef struct NormSums {
    const Training *m;
    const float *x;
    bool has_bias;
} NormSums;

static void norm_sums(void *user, uint32_t row, uint32_t n_rows, uint32_t column, uint32_t n,
                      float *out)
{
    const NormSums *s = user;
    const size_t width = s->m->width, at = row * width + column;
    s->m->o.kernels->train.norm_weight_backward(s->x + at, s->m->dh + at, width,
                                                s->m->stats + 2 * (size_t)row, n_rows, n, out,
                                                s->has_bias ? out + n : NULL);
}

static void host_norm_backward(Pass *p, const float *x, const float *w, float *dw, float *dbias)
{
    Training *m = p->m;
    const TrainKernels *k = &m->o.kernels->train;
    const uint32_t width = m->width;
    const NormBackwardFn backward = dbias != NULL ? k->layer_norm_backward : k->rms_norm_backward;
    uint32_t first, last;
    own_rows(p, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        const size_t at = (size_t)r * width;
        backward(x + at, w, m->dh + at, m->spec->norm_eps, width, m->dx + at,
                 m->stats + 2 * (size_t)r);
    }
    mark(p, TRAIN_OP_NORM_BACKWARD);
    meet(p);
    pool_share(width, COLUMN_GRAIN, p->t, p->n_threads, &first, &last);
    if (first < last && leaves_of(p) > 1) {
        NormSums s = {m, x, dbias != NULL};
        fold_leaves(p, first, last, dbias != NULL ? 2 : 1, norm_sums, &s,
                    (float *const[]){dw, dbias});
    } else if (first < last) {
        k->norm_weight_backward(x + first, m->dh + first, width, m->stats, p->rows, last - first,
                                dw + first, dbias != NULL ? dbias + first : NULL);
    }
    mark(p, TRAIN_OP_NORM_BACKWARD);
}

/* One document, one own KV head. */
static void attend_backward(Pass *p, const Tape *tape, Document document, uint32_t kv)
{
    Training *m = p->m;
    const uint32_t hd = m->spec->head_size;
    uint32_t n_q;
    const size_t row = document.row,
                 q = row * m->q_width + (size_t)training_query_heads(m, kv, &n_q) * hd,
                 at = row * m->kv_width + (size_t)kv * hd;
    const AttentionBackwardArgs args = {.q = tape->q + q,
                                        .dout = p->d->dq + q,
                                        .k = tape->k + at,
                                        .v = tape->v + at,
                                        .q_ld = m->q_width,
                                        .kv_ld = m->kv_width,
                                        .dq = p->d->dq + q,
                                        .dk = p->d->dk + at,
                                        .dv = p->d->dv + at,
                                        .subtree_stride = (size_t)m->max_rows * m->kv_width,
                                        .n_rows = document.length,
                                        .n_q = n_q,
                                        .head_size = hd,
                                        .steps = m->head_steps[kv],
                                        .scale = m->spec->attention_scale,
                                        .scratch = m->scratch[p->t]};
    m->o.kernels->train.attention_backward(&args);
}

static void host_attention_backward(Pass *p, const Tape *tape)
{
    const uint32_t n_kv = p->m->h->n_kv_heads;
    for (uint32_t i = p->t; i < p->batch->n_sequences * n_kv; i += p->n_threads) {
        for (uint32_t first = 0; first < p->batch->length;) {
            const Document document = pass_document_at(p->batch, i / n_kv, first);
            attend_backward(p, tape, document, i % n_kv);
            first += document.length;
        }
    }
    mark(p, TRAIN_OP_ATTENTION_BACKWARD);
    meet(p);
    if (p->m->n_shared > 0) {
        if (p->t == 0) {
            exchange_shared_heads(p);
        }
        meet(p);
    }
}

const PassOps training_host_ops = {
    .multiply = host_multiply,
    .bias = host_bias,
    .residual = host_residual,
    .dropout = host_dropout,
    .norm = host_norm,
    .rope = host_rope,
    .gelu = host_gelu,
    .gelu_backward = host_gelu_backward,
    .swiglu = host_swiglu,
    .swiglu_backward = host_swiglu_backward,
    .attention = host_attention,
    .attention_backward = host_attention_backward,
    .bias_gradient = host_bias_gradient,
    .norm_backward = host_norm_backward,
    .embed = host_embed,
    .embed_backward = host_embed_backward,
    .losses = host_losses,
    .loss_gradient = host_loss_gradient,
};
