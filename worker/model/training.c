/* The ends of a training pass (embedding, head, loss), the order of its layers and its buffers; the
 * layers are the families'. */
#include "worker/model/training_device.h"

#include "kernels/ops/xent_rows.h"

#include <string.h>

/* ---- embedding ---- */

static void copy_rows(Pass *p, uint32_t first, uint32_t last, float *x)
{
    const float *table = weight(p, ROLE_TOKEN_EMBD, -1);
    const size_t width = p->m->width;
    for (uint32_t r = first; r < last; r++) {
        memcpy(x + r * width, table + p->batch->tokens[r] * width, width * sizeof(float));
    }
}

/* Ends without a barrier: each thread has written its rows. */
void host_embed(Pass *p, float *x)
{
    Training *m = p->m;
    const float *positions = weight(p, ROLE_POSITION_EMBD, -1);
    uint32_t first, last;
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    if (m->h->tp == 1) {
        copy_rows(p, first, last, x);
    } else {
        if (p->t == 0) {
            exchange_embedding(p, NULL, x);
        }
        meet(p);
    }
    for (uint32_t r = first; positions != NULL && r < last; r++) {
        m->o.kernels->add(x + (size_t)r * m->width,
                          positions + (size_t)position_of(p, r) * m->width, m->width);
    }
    host_dropout(p, DROPOUT_SITE_EMBEDDING, x, x);
    mark(p, TRAIN_OP_EMBEDDING);
}

/* By what a row's gradients are summed: its id, counted from the first own one, or its position.
 * Those of other ranks are not below keys_of(): unsigned. */
static uint32_t key_of(const Pass *p, bool by_position, uint32_t r)
{
    return by_position ? position_of(p, r) : p->batch->tokens[r] - p->m->h->vocab_first;
}

static uint32_t keys_of(const Pass *p, bool by_position)
{
    return by_position ? p->batch->length : p->m->h->vocab;
}

/* Chains of rows with the same key: a row is its key's first or the next of one before. By one
 * thread. */
static void chain_rows(Pass *p, bool by_position)
{
    Training *m = p->m;
    const uint32_t n = keys_of(p, by_position);
    for (uint32_t r = 0; r < p->rows; r++) {
        const uint32_t key = key_of(p, by_position, r);
        if (key < n) {
            m->first_row[key] = ROW_NONE;
        }
    }
    for (uint32_t r = p->rows; r-- > 0;) {
        const uint32_t key = key_of(p, by_position, r);
        if (key < n) {
            m->next_row[r] = m->first_row[key];
            m->first_row[key] = r;
        }
    }
}

/* Of a chain of rows from row r on, channels [0, n) of dy: sums leaf by leaf, folded, to `to`. A
 * leaf without a row of it is no operand: sums that began at +0 are never -0, so that adding its
 * zeros would change nothing. */
static void fold_chain(Pass *p, const float *dy, uint32_t r, uint32_t n, float *to)
{
    const AddFn add = p->m->o.kernels->add;
    float *stack = p->m->scratch[p->t];
    bool there[TREE_LEAVES_LIMIT + 1];
    uint32_t depth = 0;
    for (uint32_t leaf = 0; leaf < leaves_of(p); leaf++) {
        float *top = stack + (size_t)depth * n;
        const uint32_t end = leaf_end(p, leaf);
        there[depth++] = r < end;
        memset(top, 0, n * sizeof *top);
        while (r < end) {
            add(top, dy + (size_t)r * p->m->width, n);
            r = p->m->next_row[r];
        }
        for (uint32_t k = 0; k < p->batch->leaves->steps[leaf].n_merges; k++) {
            depth--;
            float *left = stack + (size_t)(depth - 1) * n, *right = left + n;
            if (there[depth - 1] && there[depth]) {
                add(left, right, n);
            } else if (there[depth]) {
                memcpy(left, right, n * sizeof *left);
            }
            there[depth - 1] |= there[depth];
        }
    }
    memcpy(to, stack, n * sizeof *to);
}

/* Several leaves: this thread's channels of all rows of a table. */
static void embed_leaves(Pass *p, const float *dy, bool by_position, float *table)
{
    const Training *m = p->m;
    const uint32_t n_keys = keys_of(p, by_position);
    uint32_t first, last;
    if (p->t == 0) {
        chain_rows(p, by_position);
    }
    meet(p);
    pool_share(m->width, 16, p->t, p->n_threads, &first, &last);
    for (; first < last; first += FOLD_COLUMNS) {
        const uint32_t n = MIN(FOLD_COLUMNS, last - first);
        for (uint32_t r = 0; r < p->rows; r++) {
            const uint32_t key = key_of(p, by_position, r);
            if (key < n_keys && m->first_row[key] == r) {
                fold_chain(p, dy + first, r, n, table + (size_t)key * m->width + first);
            }
        }
    }
}

void host_embed_backward(Pass *p, const float *dy)
{
    Training *m = p->m;
    const Holding *h = m->h;
    float *table = p->g->lookup != NULL ? p->g->lookup : gradient(p, ROLE_TOKEN_EMBD, -1);
    float *positions = gradient(p, ROLE_POSITION_EMBD, -1);
    uint32_t first, last;
    if (leaves_of(p) > 1) {
        embed_leaves(p, dy, false, table);
        if (positions != NULL) {
            meet(p); /* the chains of ids are done with */
            embed_leaves(p, dy, true, positions);
        }
        return;
    }
    pool_share(m->width, 16, p->t, p->n_threads, &first, &last);
    for (uint32_t r = 0; first < last && r < p->rows; r++) {
        const float *dx = dy + (size_t)r * m->width + first;
        const size_t id = p->batch->tokens[r], position = position_of(p, r);
        if (id >= h->vocab_first && id - h->vocab_first < h->vocab) {
            m->o.kernels->add(table + (id - h->vocab_first) * m->width + first, dx, last - first);
        }
        if (positions != NULL) {
            m->o.kernels->add(positions + position * m->width + first, dx, last - first);
        }
    }
}

/* ---- head and loss ---- */

uint32_t pass_own_target(const Pass *p, uint32_t r)
{
    const Holding *h = p->m->h;
    const uint32_t target = p->batch->targets[r];
    return target != TARGET_NONE && target >= h->vocab_first && target - h->vocab_first < h->vocab
               ? target - h->vocab_first
               : XENT_NO_TARGET;
}

/* (m, l) of a row's own chunks, and their sums; its target's logit. */
static void row_stats(Pass *p, uint32_t r)
{
    Training *m = p->m;
    const size_t row = (size_t)r * m->spec->n_vocab_chunks + m->h->vocab_cuts[m->h->rank];
    m->row_target[r] = xent_row_stats(m->o.kernels, m->logits + r * m->logits_ld, m->vocab,
                                      pass_own_target(p, r), m->row_max + row, m->row_sum + row,
                                      m->o.smoothing > 0.0f ? m->row_total + row : NULL);
}

static void row_loss(Pass *p, uint32_t r)
{
    Training *m = p->m;
    const uint32_t n = m->spec->n_vocab_chunks;
    const size_t row = (size_t)r * n;
    p->losses[r] =
        xent_row_loss(m->row_max + row, m->row_sum + row, m->row_total + row, n, m->row_target[r],
                      p->batch->targets[r] != TARGET_NONE, m->o.smoothing, m->spec->vocab_size);
}

void host_losses(Pass *p)
{
    uint32_t first, last;
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        row_stats(p, r);
    }
    mark(p, TRAIN_OP_LOSS);
    if (p->m->h->tp > 1) {
        meet(p);
        if (p->t == 0) {
            exchange_row_stats(p);
            mark(p, TRAIN_OP_EXCHANGE);
        }
        meet(p);
    }
    for (uint32_t r = first; r < last; r++) {
        row_loss(p, r);
    }
    mark(p, TRAIN_OP_LOSS);
}

static void loss_region(void *user, unsigned t, unsigned n_threads)
{
    Pass pass = *(const Pass *)user, *p = &pass;
    Training *m = p->m;
    p->t = t;
    p->n_threads = n_threads;
    p->at_head = true;
    pass_norm(p, p->slot->x, weight(p, ROLE_OUTPUT_NORM, -1), weight(p, ROLE_OUTPUT_NORM_BIAS, -1),
              m->head_in);
    meet(p);
    pass_linear(
        p, m->head_in, m->width,
        (const Linear[]){{parameters_head(m->o.weights), m->vocab, m->logits, m->logits_ld}}, 1);
    meet(p);
    m->ops->losses(p);
}

/* This thread's columns of dh from the logits' gradient: units = vocabulary chunks. */
static void head_dx(Pass *p)
{
    Training *m = p->m;
    GemmSegment *segments = m->segments[p->t];
    const float *w = parameters_head(m->o.weights);
    uint32_t first, last;
    size_t stride;
    float *target = pass_fold_target(p, m->dh, &stride);
    pool_share(m->width, 48, p->t, p->n_threads, &first, &last);
    for (uint32_t c = 0; c < m->chunks.n; c++) {
        const uint32_t at = c * VOCAB_CHUNK;
        segments[c] = (GemmSegment){.a = m->logits + at,
                                    .a_row = m->logits_ld,
                                    .a_step = 1,
                                    .b = w + (size_t)at * m->width + first,
                                    .b_step = m->width,
                                    .b_column = 1,
                                    .length = MIN(VOCAB_CHUNK, m->vocab - at),
                                    .step = m->chunk_steps[c]};
    }
    pass_fold_product(p, &(Fold){&m->chunks, m->dh, "gradients through the head"},
                      &(GemmArgs){.n = last - first,
                                  .segments = segments,
                                  .n_segments = m->chunks.n,
                                  .c = target + first,
                                  .ld = m->width,
                                  .subtree_stride = stride},
                      segments, TRAIN_OP_DX);
}

void host_loss_gradient(Pass *p)
{
    Training *m = p->m;
    uint32_t first, last;
    size_t n;
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        const size_t at = (size_t)r * m->spec->n_vocab_chunks;
        xent_row_gradient(m->o.kernels, m->logits + r * m->logits_ld, m->vocab, m->row_max[at],
                          m->row_sum[at], pass_own_target(p, r),
                          p->batch->targets[r] == TARGET_NONE ? 0.0f : p->factor, m->o.smoothing,
                          m->spec->vocab_size);
    }
    const size_t own = pass_own_rows(p, m->width, &n);
    memset(m->dx + own, 0, n * sizeof(float));
    mark(p, TRAIN_OP_LOSS_BACKWARD);
}

/* Logits become their gradient; dx that of the last layer's result. */
static void head_backward(Pass *p)
{
    Training *m = p->m;
    p->at_head = true;
    m->ops->loss_gradient(p);
    meet(p);
    head_dx(p);
    pass_linear_dw(p,
                   (const LinearGradient[]){{m->logits, m->vocab, m->head_in, m->width,
                                             parameters_head(p->g), m->logits_ld}},
                   1);
    pass_fold_end(p);
    pass_norm_backward(p, p->slot->x, weight(p, ROLE_OUTPUT_NORM, -1),
                       gradient(p, ROLE_OUTPUT_NORM, -1), gradient(p, ROLE_OUTPUT_NORM_BIAS, -1));
    meet(p);
    p->at_head = false;
}

/* ---- the passes ---- */

static void layer_forward(Pass *p, uint32_t l, float *out)
{
    (p->m->spec->family == FAMILY_GPT2 ? gpt2_layer_forward : llama_training_layer_forward)(p, l,
                                                                                            out);
}

/* What backward reads and was not kept. */
static void layer_again(Pass *p, uint32_t l)
{
    if (p->m->o.recompute == RECOMPUTE_FULL) {
        layer_forward(p, l, NULL);
    } else if (p->m->o.recompute == RECOMPUTE_SELECTIVE) {
        (p->m->spec->family == FAMILY_GPT2 ? gpt2_layer_again : llama_training_layer_again)(p, l);
        meet(p);
    }
}

static void forward_region(void *user, unsigned t, unsigned n_threads)
{
    Pass p = *(const Pass *)user;
    p.t = t;
    p.n_threads = n_threads;
    if (p.is_first) {
        p.m->ops->embed(&p, p.slot->tape[0].x);
        meet(&p);
    }
    for (uint32_t l = 0; l < p.n_layers; l++) {
        layer_forward(&p, l, l + 1 < p.n_layers ? p.slot->tape[l + 1].x : p.slot->x);
    }
}

static LayerGradients *layer_gradients(const Pass *p, uint32_t l)
{
    return p->m->o.apart ? &p->slot->gradients[l] : &p->m->d;
}

/* Behind a barrier after the layer's last gradient. */
static void notify(Pass *p, uint32_t l)
{
    const TrainingNotice *notice = p->batch->notice;
    if (notice != NULL) {
        notice->complete(notice->user, p->layer_first + l, p->t, p->n_threads);
        meet(p);
        if (p->t == 0) {
            notice->completed(notice->user, p->layer_first + l);
        }
    }
}

static void backward_region(void *user, unsigned t, unsigned n_threads)
{
    Pass p = *(const Pass *)user;
    p.t = t;
    p.n_threads = n_threads;
    if (p.is_last) {
        head_backward(&p);
    }
    for (uint32_t l = p.n_layers; l-- > 0;) {
        p.d = layer_gradients(&p, l);
        layer_again(&p, l);
        (p.m->spec->family == FAMILY_GPT2 ? gpt2_layer_backward : llama_training_layer_backward)(&p,
                                                                                                 l);
        if (!p.m->o.apart) {
            notify(&p, l);
        }
    }
    if (p.is_first) {
        p.m->ops->embed_backward(&p, pass_result_gradient(&p, DROPOUT_SITE_EMBEDDING, NULL));
        mark(&p, TRAIN_OP_EMBEDDING_BACKWARD);
    }
}

static void weights_region(void *user, unsigned t, unsigned n_threads)
{
    Pass p = *(const Pass *)user;
    p.t = t;
    p.n_threads = n_threads;
    for (uint32_t l = p.n_layers; l-- > 0;) {
        p.d = layer_gradients(&p, l);
        (p.m->spec->family == FAMILY_GPT2 ? gpt2_layer_weights : llama_training_layer_weights)(&p,
                                                                                               l);
        if (p.batch->notice != NULL) {
            meet(&p);
        }
        notify(&p, l);
    }
}

static Pass pass_of(Training *t, uint32_t slot, const TrainBatch *batch)
{
    g_assert(batch->length == t->o.length && batch->n_sequences <= t->o.max_sequences &&
             batch->n_sequences > 0 && slot < t->o.slots && batch->chunk < t->h->n_chunks);
    t->status = GROUP_OK;
    train_times_mark(t->o.times, TRAIN_OP_REST);
    return (Pass){.m = t,
                  .batch = batch,
                  .slot = &t->slots[slot],
                  .rows = batch->n_sequences * batch->length,
                  .last_row = batch->n_sequences * batch->length,
                  .layer_first = t->h->chunks[batch->chunk].layer_first,
                  .n_layers = t->h->chunks[batch->chunk].n_layers,
                  .is_first = t->h->is_first && batch->chunk == 0,
                  .is_last = t->h->is_last && batch->chunk + 1 == t->h->n_chunks};
}

/* All threads of the pool; or, to enqueue on a device, this one. */
static void run_region(Training *t, PoolFn region, Pass *p)
{
    if (t->device != NULL) {
        region(p, 0, 1);
    } else {
        pool_run(t->o.pool, region, p);
    }
    train_times_mark(t->o.times, TRAIN_OP_WAIT);
}

/* What the pass came to with other ranks. */
static GroupStatus status_of(const Training *t)
{
    const DeviceTeam *ended = t->device != NULL ? t->o.work->ended : NULL;
    return t->status == GROUP_OK && ended != NULL ? ended->peers : t->status;
}

GroupStatus training_forward(Training *t, uint32_t slot, const TrainBatch *batch)
{
    Pass p = pass_of(t, slot, batch);
    if (t->device != NULL) {
        training_device_begin(&p, false);
        if (!p.is_first) {
            training_device_take_input(&p);
        }
    }
    run_region(t, forward_region, &p);
    return status_of(t);
}

GroupStatus training_loss(Training *t, uint32_t slot, const TrainBatch *batch, float *losses)
{
    Pass p = pass_of(t, slot, batch);
    p.losses = losses;
    if (t->device != NULL) {
        training_device_begin(&p, false);
    }
    run_region(t, loss_region, &p);
    return status_of(t);
}

GroupStatus training_backward(Training *t, uint32_t slot, const TrainBatch *batch, float factor,
                              Parameters *gradients)
{
    Pass p = pass_of(t, slot, batch);
    p.factor = factor;
    p.g = gradients;
    if (t->device != NULL) {
        training_device_begin(&p, p.is_first);
        if (!p.is_last) {
            training_device_take_gradient(&p);
        }
    }
    run_region(t, backward_region, &p);
    if (t->device != NULL && !p.is_first) {
        training_device_give_gradient(&p);
    }
    return status_of(t);
}

void training_weights(Training *t, uint32_t slot, const TrainBatch *batch, Parameters *gradients)
{
    Pass p = pass_of(t, slot, batch);
    p.g = gradients;
    run_region(t, weights_region, &p);
}

float *training_input(Training *t, uint32_t slot)
{
    return t->device != NULL ? training_device_input(t) : t->slots[slot].tape[0].x;
}

const float *training_output(Training *t, uint32_t slot)
{
    return t->device != NULL ? training_device_output(t, slot) : t->slots[slot].x;
}

float *training_gradient(Training *t)
{
    return t->device != NULL ? training_device_gradient(t) : t->dx;
}

const float *training_logits_row(Training *t, uint32_t row)
{
    return t->device != NULL ? training_device_logits(t, row) : t->logits + row * t->logits_ld;
}

size_t training_bytes(const Training *t)
{
    return t->arena_bytes + (t->device != NULL ? training_device_bytes(t, t->o.work->ops) : 0);
}
