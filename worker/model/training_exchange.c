/* What tensor ranks of a stage exchange inside a training pass. Thread 0 talks; after a failure
 * nothing more is exchanged in the pass, which goes on with what is there and is then discarded. */
#include "worker/model/training_device.h"

#include "transport/group/reduction.h"

#include <math.h>
#include <string.h>

static bool talks(const Training *m)
{
    return m->h->tp > 1 && m->status == GROUP_OK;
}

/* ---- partial sums: one fold at a time, m->partial is its own until it ends ---- */

float *pass_fold_target(const Pass *p, float *out, size_t *stride)
{
    const Training *m = p->m;
    *stride = (size_t)(m->o.team != NULL ? p->rows : m->max_rows) * m->width;
    return m->h->tp > 1 && !sums_are_whole(m) ? m->partial : out;
}

/* Ranks on hosts and, staged, on devices: the same blocks on the wire. */
static void begin_reduce(const Pass *p, const Units *units, float *out, const char *operation)
{
    const Training *m = p->m;
    const GroupWait wait = group_turn(m->o.group, operation);
    const GroupReduce what = {.n_leaves = units->n_leaves,
                              .cuts = units->cuts,
                              .mine = m->partial,
                              .stride = (size_t)m->max_rows * m->width,
                              .n = (size_t)p->rows * m->width,
                              .block = (size_t)FOLD_ROWS * m->width,
                              .out = out};
    group_reduce_begin(m->o.group->group, &wait, &what);
}

void exchange_sum(const Pass *p, const Units *units, float *out, const char *operation)
{
    Training *m = p->m;
    Group *group = m->o.group->group;
    begin_reduce(p, units, out, operation);
    const unsigned modes = precision_begin(m->o.precision);
    group_reduce_made(group, (size_t)p->rows * m->width);
    m->status = group_reduce_end(group, group_turn_deadline(m->o.group));
    precision_end(modes);
}

static void begin_fold(Pass *p, const Fold *fold)
{
    Training *m = p->m;
    if (p->t > 0 || m->device != NULL || !talks(m)) {
        return;
    }
    begin_reduce(p, fold->units, fold->out, fold->operation);
    m->folding = true;
    m->fold_made = 0;
}

void exchange_progress(Pass *p)
{
    Training *m = p->m;
    const unsigned modes = precision_begin(m->o.precision);
    group_reduce_made(m->o.group->group, m->fold_made);
    precision_end(modes);
    mark(p, TRAIN_OP_EXCHANGE);
}

/* Rows of the block that begins at `row`. */
static uint32_t block_rows(const Pass *p, uint32_t row)
{
    const bool cut = p->m->h->tp > 1 && p->m->device == NULL;
    return cut ? MIN(p->rows - row, FOLD_ROWS) : p->rows - row;
}

/* The rows before `row` are made by this thread. */
static void made_rows(Pass *p, const Fold *fold, uint32_t row)
{
    Training *m = p->m;
    if (m->h->tp == 1) {
        return;
    }
    if (m->device != NULL) {
        training_device_sum(p, fold->units, fold->out, fold->operation);
        mark(p, TRAIN_OP_EXCHANGE);
        return;
    }
    if (p->n_threads > 1) {
        pool_barrier(m->o.pool);
    }
    mark(p, TRAIN_OP_WAIT);
    if (p->t == 0 && m->folding) {
        m->fold_made = (size_t)row * m->width;
        exchange_progress(p);
    }
}

void pass_fold_product(Pass *p, const Fold *fold, GemmArgs *args, GemmSegment *segments, TrainOp op)
{
    float *const c = args->c;
    begin_fold(p, fold);
    for (uint32_t row = 0; row < p->rows; row += args->m) {
        args->m = block_rows(p, row);
        args->c = c + (size_t)row * args->ld;
        if (args->n > 0 && args->n_segments > 0) {
            pass_multiply(p, args);
        }
        for (uint32_t i = 0; i < args->n_segments; i++) {
            segments[i].a += args->m * segments[i].a_row;
        }
        mark_product(p, op);
        made_rows(p, fold, row + args->m);
    }
}

/* Until the sums of rows before `row` are complete. By thread 0. */
static void wait_for_rows(Pass *p, uint32_t row)
{
    Training *m = p->m;
    const unsigned modes = precision_begin(m->o.precision);
    const int64_t deadline_us = group_turn_deadline(m->o.group);
    Group *group = m->o.group->group;
    m->folding = row < p->rows;
    m->status = m->folding ? group_reduce_wait(group, (size_t)row * m->width, deadline_us)
                           : group_reduce_end(group, deadline_us);
    precision_end(modes);
    mark(p, TRAIN_OP_EXCHANGE);
}

bool pass_fold_take(Pass *p, uint32_t *row)
{
    const uint32_t first = *row, last = first + block_rows(p, first);
    p->first_row = first < p->rows ? first : 0;
    p->last_row = last;
    *row = last;
    if (first == p->rows) {
        return false;
    }
    if (p->t == 0 && p->m->folding) {
        wait_for_rows(p, last);
    }
    meet(p);
    return true;
}

void pass_fold_end(Pass *p)
{
    if (p->t == 0 && p->m->folding) {
        wait_for_rows(p, p->rows);
    }
    meet(p);
}

/* ---- the embedding: each row is a copy from the one rank that has its id (NUMERICS 6) ---- */

uint32_t exchange_owner(const Holding *h, uint32_t token)
{
    uint32_t r = 0;
    while (token / VOCAB_CHUNK >= h->vocab_cuts[r + 1]) {
        r++;
    }
    return r;
}

void exchange_embedding(Pass *p, const float *own, float *x)
{
    Training *m = p->m;
    const Holding *h = m->h;
    const float *table = weight(p, ROLE_TOKEN_EMBD, -1);
    const size_t row = m->width;
    size_t sizes[PLAN_RANKS_LIMIT] = {0}, at[PLAN_RANKS_LIMIT + 1] = {0};
    void *parts[PLAN_RANKS_LIMIT] = {NULL};
    if (!talks(m)) {
        return;
    }
    for (uint32_t i = 0; i < p->rows; i++) {
        sizes[exchange_owner(h, p->batch->tokens[i])] += row * sizeof(float);
    }
    for (uint32_t r = 0; r < h->tp; r++) {
        parts[r] = m->exchange + at[r];
        at[r + 1] = at[r] + sizes[r] / sizeof(float);
    }
    float *mine = parts[h->rank];
    for (uint32_t i = 0; i < p->rows; i++) {
        const uint32_t id = p->batch->tokens[i];
        if (exchange_owner(h, id) == h->rank) {
            memcpy(mine, own != NULL ? own + i * row : table + (size_t)(id - h->vocab_first) * row,
                   row * sizeof(float));
            mine += row;
        }
    }
    const GroupWait wait = group_turn(m->o.group, "gather of the embedding");
    m->status = group_all_gather(m->o.group->group, &wait, parts[h->rank], sizes, parts);
    for (uint32_t i = 0; i < p->rows; i++) {
        const uint32_t owner = exchange_owner(h, p->batch->tokens[i]);
        memcpy(x + i * row, m->exchange + at[owner], row * sizeof(float));
        at[owner] += row;
    }
}

/* ---- (m, l) of the logits (FORMULAS 11) ---- */

/* Of rank r, a row after another: (m, l) of its chunks (and the sum of logits for smoothed labels),
 * and the logit of the target where it has it. */
static size_t stats_floats(const Training *m, uint32_t r)
{
    const uint32_t n = m->h->vocab_cuts[r + 1] - m->h->vocab_cuts[r];
    return (m->o.smoothing > 0.0f ? 3 : 2) * (size_t)n + 1;
}

static void pack_stats(const Training *m, uint32_t rows, float *to)
{
    const Holding *h = m->h;
    for (uint32_t i = 0; i < rows; i++) {
        const size_t row = (size_t)i * h->spec->n_vocab_chunks;
        for (uint32_t c = h->vocab_cuts[h->rank]; c < h->vocab_cuts[h->rank + 1]; c++) {
            *to++ = m->row_max[row + c];
            *to++ = m->row_sum[row + c];
            if (m->o.smoothing > 0.0f) {
                *to++ = m->row_total[row + c];
            }
        }
        *to++ = m->row_target[i];
    }
}

static void unpack_stats(Pass *p, uint32_t r, const float *from)
{
    Training *m = p->m;
    const Holding *h = m->h;
    for (uint32_t i = 0; i < p->rows; i++) {
        const size_t row = (size_t)i * h->spec->n_vocab_chunks;
        const uint32_t target = p->batch->targets[i];
        for (uint32_t c = h->vocab_cuts[r]; c < h->vocab_cuts[r + 1]; c++) {
            m->row_max[row + c] = *from++;
            m->row_sum[row + c] = *from++;
            if (m->o.smoothing > 0.0f) {
                m->row_total[row + c] = *from++;
            }
        }
        if (target != TARGET_NONE && exchange_owner(h, target) == r) {
            m->row_target[i] = *from;
        }
        from++;
    }
}

void exchange_row_stats(Pass *p)
{
    Training *m = p->m;
    const Holding *h = m->h;
    size_t sizes[PLAN_RANKS_LIMIT], at = 0;
    void *parts[PLAN_RANKS_LIMIT];
    if (!talks(m)) {
        return;
    }
    for (uint32_t r = 0; r < h->tp; r++) {
        parts[r] = m->exchange + at;
        sizes[r] = p->rows * stats_floats(m, r) * sizeof(float);
        at += p->rows * stats_floats(m, r);
    }
    pack_stats(m, p->rows, parts[h->rank]);
    const GroupWait wait = group_turn(m->o.group, "maxima and sums of logits");
    m->status = group_all_gather(m->o.group->group, &wait, parts[h->rank], sizes, parts);
    for (uint32_t r = 0; r < h->tp; r++) {
        if (r != h->rank) {
            unpack_stats(p, r, parts[r]);
        }
    }
}

/* ---- KV heads whose query heads are on several ranks (NUMERICS 16) ---- */

uint32_t shared_subtrees(const Training *m, const SharedHead *s, uint32_t r)
{
    return tree_subtrees(m->spec->n_heads / m->spec->n_kv_heads, s->cuts[r], s->cuts[r + 1]);
}

/* Floats of rank `from`'s subtrees of all heads that it shares with `with`. */
static size_t shared_floats(const Training *m, uint32_t rows, uint32_t from, uint32_t with)
{
    size_t n = 0;
    for (uint32_t i = 0; i < m->n_shared; i++) {
        const SharedHead *s = &m->shared[i];
        if (shared_has_part(s, from) && shared_has_part(s, with)) {
            n += 2 * (size_t)rows * m->spec->head_size * shared_subtrees(m, s, from);
        }
    }
    return n;
}

/* A head's columns of dk or dv [rows][kv_width], and back. */
static void copy_head(const Training *m, uint32_t rows, uint32_t kv, float *d, float *packed,
                      bool pack)
{
    const uint32_t hd = m->spec->head_size;
    for (uint32_t r = 0; r < rows; r++) {
        float *at = d + (size_t)r * m->kv_width + (size_t)(kv - m->h->kv_first) * hd;
        memcpy(pack ? packed + (size_t)r * hd : at, pack ? at : packed + (size_t)r * hd,
               hd * sizeof(float));
    }
}

/* Own subtrees of head s: per subtree dk, then dv. Returns the floats written. */
static size_t pack_shared(const Pass *p, const SharedHead *s, float *to)
{
    const Training *m = p->m;
    const uint32_t rows = p->rows;
    const size_t n = (size_t)rows * m->spec->head_size, stride = (size_t)m->max_rows * m->kv_width;
    const uint32_t n_subtrees = shared_subtrees(m, s, m->h->rank);
    for (uint32_t k = 0; k < n_subtrees; k++) {
        copy_head(m, rows, s->kv, p->d->dk + k * stride, to + 2 * k * n, true);
        copy_head(m, rows, s->kv, p->d->dv + k * stride, to + (2 * k + 1) * n, true);
    }
    return 2 * n * n_subtrees;
}

/* The sum over all subtrees of head s; received[r]: where rank r's next one begins. */
static void complete_shared(const Pass *p, const SharedHead *s, float **received)
{
    const Training *m = p->m;
    const uint32_t rows = p->rows;
    const uint32_t group = m->spec->n_heads / m->spec->n_kv_heads;
    const size_t n = 2 * (size_t)rows * m->spec->head_size;
    const float *operands[TREE_LEAVES_LIMIT];
    ReductionCache cache = {0};
    uint32_t i = 0;
    for (uint32_t r = 0; r < m->h->tp; r++) {
        for (uint32_t k = 0; k < shared_subtrees(m, s, r); k++, received[r] += n) {
            operands[i++] = received[r];
        }
    }
    float *sum = (float *)operands[0];
    reduction_sum(reduction_find(&cache, group, 0, s->cuts, m->h->tp), operands, n, sum);
    copy_head(m, rows, s->kv, p->d->dk, sum, false);
    copy_head(m, rows, s->kv, p->d->dv, sum + n / 2, false);
}

/* A rank's messages are one head after another; own subtrees lie among those received. */
void exchange_shared_heads(Pass *p)
{
    Training *m = p->m;
    const uint32_t tp = m->h->tp, rank = m->h->rank;
    const void *send[PLAN_RANKS_LIMIT];
    float *receive[PLAN_RANKS_LIMIT];
    size_t send_sizes[PLAN_RANKS_LIMIT], receive_sizes[PLAN_RANKS_LIMIT];
    float *at = m->exchange;
    if (m->n_shared == 0 || !talks(m)) {
        return;
    }
    for (uint32_t r = 0; r < tp; r++) {
        send[r] = at;
        for (uint32_t i = 0; i < m->n_shared; i++) {
            const SharedHead *s = &m->shared[i];
            at += shared_has_part(s, rank) && shared_has_part(s, r) ? pack_shared(p, s, at) : 0;
        }
        send_sizes[r] = shared_floats(m, p->rows, rank, r) * sizeof(float);
    }
    for (uint32_t r = 0; r < tp; r++) {
        receive[r] = at;
        receive_sizes[r] = shared_floats(m, p->rows, r, rank) * sizeof(float);
        at += receive_sizes[r] / sizeof(float);
    }
    const GroupWait wait = group_turn(m->o.group, "gradients of shared KV heads");
    m->status = group_all_to_all(m->o.group->group, &wait, send, send_sizes, (void *const *)receive,
                                 receive_sizes);
    for (uint32_t i = 0; i < m->n_shared; i++) {
        if (shared_has_part(&m->shared[i], rank)) {
            complete_shared(p, &m->shared[i], receive);
        }
    }
}

/* ---- room for it ---- */

size_t exchange_floats(const Training *t)
{
    const Holding *h = t->h;
    size_t stats = 0, shared = 0;
    if (h->tp == 1) {
        return 0;
    }
    for (uint32_t r = 0; r < h->tp; r++) {
        stats += t->max_rows * stats_floats(t, r);
        shared +=
            shared_floats(t, t->max_rows, r, h->rank) + shared_floats(t, t->max_rows, h->rank, r);
    }
    return MAX(MAX(stats, shared), (size_t)t->max_rows * t->width);
}
