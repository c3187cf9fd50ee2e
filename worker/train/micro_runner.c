/* Invariants:
 * 1. A leaf's gradients are one chain over its tokens: a micro-batch is some samples of one leaf,
 *    and goes on with its buffers, or all leaves of a node of the tree, folded as they come.
 * 2. Each chunk of the stage's layers sees the micro-batches in order, forward and backward. A
 *    micro-batch comes back to chunk 0 last: then its gradients are complete.
 * 3. A stage is ahead of the next one by no more than what it keeps for backward passes, or, where
 *    nothing comes back, by ALONE_AHEAD sequences: the links keep as much (train_links_set_ahead).
 */
#include "worker/train/micro_runner.h"

#include "proto/base/checked.h"
#include "proto/plan/tree.h"
#include "worker/train/rank_team.h"

#include <math.h>
#include <string.h>

enum { ALONE_AHEAD = 4, TENSOR_AHEAD = 4 };

/* Samples [first, first + n) of the global batch, inside one leaf; or those of a node's leaves. */
typedef struct MicroBatch {
    uint32_t first, n, leaf, n_leaves;
    bool begins, ends; /* the leaf */
} MicroBatch;

struct MicroRunner {
    MicroRunnerOptions o;
    Training *training;
    Pipeline *pipeline;
    GArray *micro_batches;                         /* of MicroBatch: the replica's, in order */
    uint32_t slots, *slot_of;                      /* [chunks][micro-batches] */
    uint32_t *tokens, *targets;                    /* [slots][micro_sequences][length] */
    uint32_t *begins;                              /* the same, NULL: samples are one document */
    float *losses;                                 /* [micro_sequences][length] */
    BatchLeaves batch_leaves;                      /* of the running micro-batch */
    GradientFold *fold;                            /* of the running step, like all from here */
    Parameters *leaf_gradients[TREE_LEAVES_LIMIT]; /* by first leaf: begun and not yet folded */
    bool ends_step;                                /* the running op is the last with gradients */
    size_t *complete_from; /* by layer of the model: floats from there on are complete with it */
    size_t summed_from;    /* floats from there on are folded, where sums are deferred */
    uint32_t next_leaf;    /* to be folded */
    uint64_t step;
    float loss_factor, *sample_losses;
    uint64_t valid;
};

/* ---- making ---- */

uint32_t leaf_begin(uint32_t leaf, uint32_t n_leaves, uint32_t sequences)
{
    return (uint32_t)((uint64_t)leaf * sequences / n_leaves);
}

/* A device folds no leaves in its products, and all stages of a replica cut alike. */
static bool folds_in_products(const MicroRunnerOptions *o)
{
    return !o->devices;
}

static void cut_leaf(const MicroRunnerOptions *o, uint32_t leaf, uint32_t begin, uint32_t end,
                     GArray *list)
{
    for (uint32_t at = begin; at < end; at += o->micro_sequences) {
        const uint32_t n = MIN(o->micro_sequences, end - at);
        const MicroBatch micro = {at, n, leaf, 1, at == begin, at + n == end};
        g_array_append_val(list, micro);
    }
}

/* node(a, b) of the leaves, where it is the replica's: at once if it fits, else piece by piece. */
static void cut_node(const MicroRunnerOptions *o, uint32_t a, uint32_t b, GArray *list)
{
    const uint32_t *cuts = o->leaves->cuts + o->position.replica,
                   begin = leaf_begin(a, o->leaves->n_leaves, o->sequences),
                   end = leaf_begin(b, o->leaves->n_leaves, o->sequences);
    const bool inside = cuts[0] <= a && b <= cuts[1];
    if (begin == end || b <= cuts[0] || cuts[1] <= a) {
        return;
    }
    if (b - a == 1) {
        cut_leaf(o, a, begin, end, list);
    } else if (inside && end - begin <= o->micro_sequences && folds_in_products(o)) {
        const MicroBatch micro = {begin, end - begin, a, b - a, true, true};
        g_array_append_val(list, micro);
    } else {
        cut_node(o, a, tree_middle(a, b), list);
        cut_node(o, tree_middle(a, b), b, list);
    }
}

static GArray *cut_micro_batches(const MicroRunnerOptions *o)
{
    GArray *list = g_array_new(FALSE, FALSE, sizeof(MicroBatch));
    cut_node(o, 0, o->leaves->n_leaves, list);
    return list;
}

/* A merge of nothing is none, and one that follows a leaf without samples is that of the last leaf
 * that has some. */
static void fill_leaves(const MicroRunnerOptions *o, const MicroBatch *micro, BatchLeaves *out)
{
    TreeStep steps[TREE_LEAVES_LIMIT];
    bool there[TREE_LEAVES_LIMIT];
    uint32_t depth = 0;
    *out = (BatchLeaves){.begun = !micro->begins};
    if (micro->n_leaves == 1) {
        out->first[++out->n] = micro->n;
        return;
    }
    tree_program(o->leaves->n_leaves, micro->leaf, micro->leaf + micro->n_leaves, steps);
    for (uint32_t i = 0; i < micro->n_leaves; i++) {
        const uint32_t leaf = micro->leaf + i,
                       begin = leaf_begin(leaf, o->leaves->n_leaves, o->sequences),
                       end = leaf_begin(leaf + 1, o->leaves->n_leaves, o->sequences);
        there[depth++] = end > begin;
        if (end > begin) {
            out->first[++out->n] = end - micro->first;
        }
        for (uint32_t k = 0; k < steps[i].n_merges; k++) {
            depth--;
            if (there[depth - 1] && there[depth]) {
                out->steps[out->n - 1].n_merges++;
            }
            there[depth - 1] |= there[depth];
        }
    }
    out->steps[out->n - 1].emit = 1;
}

/* Of ids, targets and documents of all slots, and losses. */
static size_t own_bytes(const MicroRunner *r)
{
    const size_t rows = (size_t)r->o.micro_sequences * r->o.source->length;
    return (rows * r->slots * (r->o.source->begins != NULL ? 3 : 2) + rows) * sizeof(uint32_t);
}

static bool allocate(MicroRunner *r, GError **error)
{
    const size_t rows = (size_t)r->o.micro_sequences * r->o.source->length;
    r->tokens = weft_alloc(rows * r->slots, sizeof *r->tokens, "tokens", error);
    r->targets = weft_alloc(rows * r->slots, sizeof *r->targets, "targets", error);
    r->losses = weft_alloc(rows, sizeof *r->losses, "losses", error);
    if (r->o.source->begins != NULL) {
        r->begins = weft_alloc(rows * r->slots, sizeof *r->begins, "documents", error);
        if (r->begins == NULL) {
            return false;
        }
    }
    return r->tokens != NULL && r->targets != NULL && r->losses != NULL;
}

/* What was sent goes out, and what comes is taken in, while this rank computes. */
static void progress_links(void *user)
{
    const TrainLinks *l = user;
    link_port_progress(l->o.port);
}

/* Cuts the micro-batches and makes the schedule; the passes' shape. */
static TrainingOptions prepare(MicroRunner *r, const MicroRunnerOptions *options)
{
    r->o = *options;
    r->micro_batches = cut_micro_batches(options);
    const TrainPosition *at = &options->position;
    r->pipeline = pipeline_new(options->schedule, at->pp, at->chunks, r->micro_batches->len);
    r->slots = MAX(pipeline_in_flight(r->pipeline, at->stage), 1);
    r->slot_of = g_new0(uint32_t, MAX((size_t)at->chunks * r->micro_batches->len, 1));
    pipeline_slots(r->pipeline, at->stage, r->slot_of);
    return (TrainingOptions){.weights = options->weights,
                             .kernels = options->kernels,
                             .pool = options->pool,
                             .max_sequences = options->micro_sequences,
                             .length = options->source->length,
                             .slots = r->slots,
                             .smoothing = options->smoothing,
                             .precision = options->precision,
                             .apart = options->schedule == PIPELINE_ZERO_BUBBLE,
                             .recompute = options->recompute,
                             .documents = options->source->begins != NULL,
                             .work = options->work,
                             .plan_ops = options->plan_ops,
                             .team = options->team,
                             .exact = options->exact,
                             .group = options->links != NULL ? &options->links->tensor.turns : NULL,
                             .progress = options->links != NULL ? progress_links : NULL,
                             .progress_user = options->links,
                             .times = options->times};
}

static bool is_complete_with(const TensorSpec *t, uint32_t layer)
{
    return (t->layer >= 0 && (uint32_t)t->layer >= layer) || t->role == ROLE_OUTPUT ||
           t->role == ROLE_OUTPUT_NORM || t->role == ROLE_OUTPUT_NORM_BIAS;
}

/* The tensors behind each other at the arena's end that are complete. */
static size_t complete_from(const Holding *h, uint32_t layer)
{
    size_t from = h->n_floats;
    for (uint32_t i = h->spec->n_tensors; i-- > 0;) {
        if (!is_complete_with(&h->spec->tensors[i], layer)) {
            break;
        }
        from = holding_has(h, i) ? h->offsets[i] : from;
    }
    return from;
}

/* Bytes of a residual stream, or its gradient. */
static size_t stream_bytes(const MicroRunner *r, uint32_t n_sequences)
{
    return (size_t)n_sequences * r->o.source->length * r->o.weights->spec->width * sizeof(float);
}

/* Neighbouring stages: what the earlier one of two keeps. Tensor ranks: a sum that this rank has
 * not come to, and those before it to which it brings nothing, where nobody waits for it: looked up
 * rows, the sums of a sub-layer, gradients of shared KV heads. */
static void prepare_links(const MicroRunner *r)
{
    const Holding *h = r->o.weights->holding;
    const size_t bytes = stream_bytes(r, r->o.micro_sequences);
    const GroupCut cuts[] = {
        {h->tp, h->rank, h->spec->n_attn_units, 0, h->attn_cuts},
        {h->tp, h->rank, h->spec->n_ffn_units, 0, h->ffn_cuts},
        {h->tp, h->rank, h->spec->n_vocab_chunks, 0, h->vocab_cuts},
    };
    uint32_t ahead = ALONE_AHEAD, arriving = 0;
    for (uint32_t s = 0; s < r->o.position.pp; s++) {
        ahead = MAX(ahead, pipeline_in_flight(r->pipeline, s));
    }
    for (size_t i = 0; h->tp > 1 && i < G_N_ELEMENTS(cuts); i++) {
        arriving = MAX(arriving, group_arriving(&cuts[i]));
    }
    train_links_set_ahead(r->o.links, ahead, TENSOR_AHEAD * MAX(arriving, h->tp - 1), bytes);
}

MicroRunner *micro_runner_new(const MicroRunnerOptions *options, GError **error)
{
    g_autoptr(MicroRunner) r = g_new0(MicroRunner, 1);
    const TrainingOptions training = prepare(r, options);
    const Holding *h = options->weights->holding;
    r->complete_from = g_new(size_t, h->spec->n_layers);
    for (uint32_t l = 0; l < h->spec->n_layers; l++) {
        r->complete_from[l] = complete_from(h, l);
    }
    if (options->links != NULL) {
        prepare_links(r);
    }
    r->training = training_new(&training, error);
    return r->training != NULL && allocate(r, error) ? g_steal_pointer(&r) : NULL;
}

void micro_runner_free(MicroRunner *r)
{
    if (r == NULL) {
        return;
    }
    training_free(r->training);
    pipeline_free(r->pipeline);
    g_array_unref(r->micro_batches);
    for (uint32_t i = 0; i < TREE_LEAVES_LIMIT; i++) {
        parameters_free(r->leaf_gradients[i]);
    }
    weft_free(r->tokens);
    weft_free(r->targets);
    weft_free(r->begins);
    weft_free(r->losses);
    g_free(r->slot_of);
    g_free(r->complete_from);
    g_free(r);
}

/* ---- samples and losses ---- */

/* The model's first chunk, and its last. */
static bool is_first(const MicroRunner *r, uint32_t chunk)
{
    return r->o.position.stage == 0 && chunk == 0;
}

static bool is_last(const MicroRunner *r, uint32_t chunk)
{
    return r->o.position.stage + 1 == r->o.position.pp && chunk + 1 == r->o.position.chunks;
}

/* A slot's batch; its tokens are there from read_batch() on, of the first and the last chunk, its
 * documents' bounds of every one. */
static TrainBatch batch_of(const MicroRunner *r, uint32_t slot, uint32_t chunk, uint32_t n)
{
    const size_t at = (size_t)slot * r->o.micro_sequences * r->o.source->length;
    return (TrainBatch){.tokens = r->tokens + at,
                        .targets = r->targets + at,
                        .begins = r->begins != NULL ? r->begins + at : NULL,
                        .restart = r->o.source->restart,
                        .chunk = chunk,
                        .n_sequences = n,
                        .length = r->o.source->length};
}

/* Where a pass takes place. */
typedef struct Place {
    uint32_t slot, chunk;
} Place;

/* A micro-batch of a step, in its slot. */
static TrainBatch step_batch(MicroRunner *r, const Place *at, const MicroBatch *micro)
{
    TrainBatch batch = batch_of(r, at->slot, at->chunk, micro->n);
    fill_leaves(&r->o, micro, &r->batch_leaves);
    batch.leaves = &r->batch_leaves;
    batch.first_sample = r->step * r->o.sequences + micro->first;
    batch.dropout = r->o.dropout;
    return batch;
}

static void read_batch(MicroRunner *r, const SampleSource *source, const Place *at_place,
                       uint64_t first, uint32_t n)
{
    const size_t begin = (size_t)at_place->slot * r->o.micro_sequences * source->length;
    const bool reads = is_first(r, at_place->chunk) || is_last(r, at_place->chunk);
    for (uint32_t i = 0; reads && i < n; i++) {
        const size_t at = begin + (size_t)i * source->length;
        source->read(source->user, first + i, r->tokens + at, r->targets + at);
    }
    for (uint32_t i = 0; r->begins != NULL && i < n; i++) {
        uint32_t *begins = r->begins + begin + (size_t)i * source->length;
        if (source->begins != NULL) {
            source->begins(source->user, first + i, begins);
        } else {
            memset(begins, 0, source->length * sizeof *begins);
        }
    }
}

/* Token losses of a sample in order; counts valid tokens. */
static float sample_loss(MicroRunner *r, const TrainBatch *batch, uint32_t sample)
{
    float sum = 0.0f;
    for (uint32_t i = 0; i < batch->length; i++) {
        const size_t at = (size_t)sample * batch->length + i;
        if (batch->targets[at] != TARGET_NONE) {
            sum += r->losses[at];
            r->valid++;
        } else if (isnan(r->losses[at])) {
            sum = NAN;
        }
    }
    return sum;
}

static bool passed(MicroRunner *r, GroupStatus status, GError **error)
{
    if (r->o.work != NULL && !rank_work_check(r->o.work, r->o.links, error)) {
        return false;
    }
    return status == GROUP_OK || train_links_check(r->o.links, &r->o.links->tensor, status, error);
}

/* ---- operations ---- */

/* Leaves without samples before `leaf`. */
static void fold_empty_leaves(MicroRunner *r, uint32_t leaf)
{
    for (; r->next_leaf < leaf; r->next_leaf++) {
        gradient_fold_leaf(r->fold, NULL);
    }
}

/* A chunk has given all its gradients of a micro-batch. */
static void end_leaf(MicroRunner *r, uint32_t chunk, const MicroBatch *micro)
{
    if (micro->ends && chunk == 0) {
        fold_empty_leaves(r, micro->leaf);
        gradient_fold_node(r->fold, g_steal_pointer(&r->leaf_gradients[micro->leaf]),
                           micro->n_leaves);
        r->next_leaf += micro->n_leaves;
    }
}

/* ---- the step's last pass: gradients are folded and exchanged while it makes them ---- */

static void on_complete(void *user, uint32_t layer, unsigned t, unsigned n_threads)
{
    const MicroRunner *r = user;
    gradient_fold_sum(r->fold, r->complete_from[layer], r->summed_from, t, n_threads);
}

static void on_completed(void *user, uint32_t layer)
{
    MicroRunner *r = user;
    r->summed_from = r->complete_from[layer];
    if (r->o.exchange != NULL) {
        device_exchange_final(r->o.exchange, r->summed_from);
    } else {
        gradient_stream_final(r->o.stream, r->summed_from);
    }
}

/* The fold goes to its end, but for its sums. */
static void begin_last_pass(MicroRunner *r, const MicroBatch *micro)
{
    gradient_fold_defer(r->fold);
    end_leaf(r, 0, micro);
    fold_empty_leaves(r, r->o.leaves->cuts[r->o.position.replica + 1]);
    GPtrArray *subtrees = gradient_fold_subtrees(r->fold);
    Parameters *const *sets = (Parameters *const *)subtrees->pdata;
    if (r->o.exchange != NULL) {
        device_exchange_begin(r->o.exchange, sets, subtrees->len, sets[0]);
    } else {
        gradient_stream_begin(r->o.stream, sets, subtrees->len, sets[0]);
    }
    r->summed_from = r->o.weights->holding->n_floats;
}

/* What comes before the layers, and the lookup part behind them all. */
static void sum_rest(void *user, unsigned t, unsigned n_threads)
{
    const MicroRunner *r = user;
    const Parameters *any = gradient_fold_subtrees(r->fold)->pdata[0];
    gradient_fold_sum(r->fold, 0, r->summed_from, t, n_threads);
    gradient_fold_sum(r->fold, any->holding->n_floats, any->n_floats, t, n_threads);
}

static void end_last_pass(MicroRunner *r)
{
    if (r->o.work != NULL) {
        sum_rest(r, 0, 1);
    } else {
        pool_run(r->o.pool, sum_rest, r);
    }
    gradient_fold_settle(r->fold);
}

static bool forward(MicroRunner *r, const Place *at, const MicroBatch *micro, GError **error)
{
    const TrainBatch batch = step_batch(r, at, micro);
    read_batch(r, r->o.source, at, batch.first_sample, micro->n);
    return passed(r, training_forward(r->training, at->slot, &batch), error);
}

/* Of the last chunk the head's forward pass is here: so one set of logits will do. */
static bool backward(MicroRunner *r, const Place *at, const MicroBatch *micro, GError **error)
{
    const TrainingNotice notice = {on_complete, on_completed, r};
    TrainBatch batch = step_batch(r, at, micro);
    if (is_last(r, at->chunk)) {
        if (!passed(r, training_loss(r->training, at->slot, &batch, r->losses), error)) {
            return false;
        }
        for (uint32_t i = 0; i < micro->n; i++) {
            r->sample_losses[micro->first + i] = sample_loss(r, &batch, i);
        }
    }
    Parameters *gradients = r->leaf_gradients[micro->leaf];
    if (gradients == NULL) {
        gradients = r->leaf_gradients[micro->leaf] = gradient_fold_take_for_pass(r->fold, error);
        if (gradients == NULL) {
            return false;
        }
    }
    if (r->ends_step) {
        begin_last_pass(r, micro);
        batch.notice = &notice;
    }
    if (!passed(r, training_backward(r->training, at->slot, &batch, r->loss_factor, gradients),
                error)) {
        return false;
    }
    if (r->ends_step) {
        end_last_pass(r);
    } else if (r->o.schedule != PIPELINE_ZERO_BUBBLE) {
        end_leaf(r, at->chunk, micro);
    }
    return true;
}

static bool weights(MicroRunner *r, const Place *at, const MicroBatch *micro)
{
    const TrainingNotice notice = {on_complete, on_completed, r};
    TrainBatch batch = step_batch(r, at, micro);
    Parameters *gradients = r->leaf_gradients[micro->leaf];
    if (r->ends_step) {
        begin_last_pass(r, micro);
        batch.notice = &notice;
    }
    training_weights(r->training, at->slot, &batch, gradients);
    if (r->ends_step) {
        end_last_pass(r);
    } else {
        end_leaf(r, at->chunk, micro);
    }
    return true;
}

static bool run_op(MicroRunner *r, const PipelineOp *op, GError **error)
{
    const MicroBatch *micro = &g_array_index(r->micro_batches, MicroBatch, op->micro);
    const uint32_t slot = r->slot_of[op->chunk * r->micro_batches->len + op->micro];
    const Place at = {slot, op->chunk};
    const size_t bytes = stream_bytes(r, micro->n);
    TrainLinks *l = r->o.links;
    switch (op->kind) {
    case PIPELINE_RECEIVE_FORWARD:
        return train_channel_receive(l, &l->from_previous, "activations of the stage before",
                                     training_input(r->training, slot), bytes, error);
    case PIPELINE_FORWARD:
        return forward(r, &at, micro, error);
    case PIPELINE_SEND_FORWARD:
        return train_channel_send(l, &l->to_next, "activations for the next stage",
                                  training_output(r->training, slot), bytes, error);
    case PIPELINE_RECEIVE_BACKWARD:
        return train_channel_receive(l, &l->from_next, "gradients of the next stage",
                                     training_gradient(r->training), bytes, error);
    case PIPELINE_BACKWARD:
        return backward(r, &at, micro, error);
    case PIPELINE_SEND_BACKWARD:
        return train_channel_send(l, &l->to_previous, "gradients for the stage before",
                                  training_gradient(r->training), bytes, error);
    case PIPELINE_WEIGHTS:
        return weights(r, &at, micro);
    }
    g_assert_not_reached();
}

static bool run_traced(MicroRunner *r, const PipelineOp *op, GError **error)
{
    PipelineOpTime time = {.op = *op, .begin_us = r->o.trace != NULL ? link_clock_us() : 0};
    const bool ok = run_op(r, op, error);
    if (r->o.trace != NULL) {
        time.end_us = link_clock_us();
        g_array_append_val(r->o.trace, time);
    }
    return ok;
}

static void give_leaves_back(MicroRunner *r)
{
    for (uint32_t i = 0; i < TREE_LEAVES_LIMIT; i++) {
        gradient_fold_give(r->fold, g_steal_pointer(&r->leaf_gradients[i]));
    }
}

/* The op that ends the gradients of the step's last micro-batch. */
static uint32_t last_gradients(const MicroRunner *r, const GArray *ops)
{
    const PipelineOpKind kind =
        r->o.schedule == PIPELINE_ZERO_BUBBLE ? PIPELINE_WEIGHTS : PIPELINE_BACKWARD;
    uint32_t last = ops->len;
    while (last-- > 0 && g_array_index(ops, PipelineOp, last).kind != kind) {
    }
    return last;
}

bool micro_runner_step(MicroRunner *r, uint64_t step, float loss_factor, GradientFold *fold,
                       float *sample_losses, uint64_t *valid, GError **error)
{
    const uint32_t *cuts = r->o.leaves->cuts + r->o.position.replica;
    const GArray *ops = r->pipeline->stages[r->o.position.stage];
    r->step = step;
    r->loss_factor = loss_factor;
    r->fold = fold;
    r->sample_losses = sample_losses;
    r->valid = 0;
    r->next_leaf = cuts[0];
    const uint32_t last = last_gradients(r, ops);
    gradient_fold_begin(fold, r->o.leaves->n_leaves, cuts[0], cuts[1]);
    for (uint32_t i = 0; i < ops->len; i++) {
        r->ends_step = (r->o.stream != NULL || r->o.exchange != NULL) && i == last;
        if (!run_traced(r, &g_array_index(ops, PipelineOp, i), error)) {
            give_leaves_back(r);
            return false;
        }
    }
    fold_empty_leaves(r, cuts[1]);
    *valid = r->valid;
    return true;
}

/* In a row of forward passes, before every ALONE_AHEAD-th each stage waits for the word that the
 * next one has come so far. (With chunks the way round the stages holds them together.) */
static bool is_told(const MicroRunner *r, uint64_t number)
{
    return r->o.position.chunks == 1 && number > 0 && number % ALONE_AHEAD == 0;
}

static bool say_here(MicroRunner *r, uint32_t chunk, uint64_t number, GError **error)
{
    TrainLinks *l = r->o.links;
    const uint8_t word = 1;
    return is_first(r, chunk) || !is_told(r, number) ||
           train_channel_send(l, &l->to_previous, "word for the stage before", &word, sizeof word,
                              error);
}

static bool hear_next(MicroRunner *r, uint32_t chunk, uint64_t number, GError **error)
{
    TrainLinks *l = r->o.links;
    uint8_t word;
    return is_last(r, chunk) || !is_told(r, number) ||
           train_channel_receive(l, &l->from_next, "word of the next stage", &word, sizeof word,
                                 error);
}

/* Slot 0's one sequence, number `number` of a row, through one chunk; losses and logits after the
 * last. */
static bool pass_alone(MicroRunner *r, uint32_t chunk, const TrainBatch *batch, uint64_t number,
                       GError **error)
{
    const size_t bytes = stream_bytes(r, 1);
    TrainLinks *l = r->o.links;
    return say_here(r, chunk, number, error) &&
           (is_first(r, chunk) ||
            train_channel_receive(l, &l->from_previous, "activations of the stage before",
                                  training_input(r->training, 0), bytes, error)) &&
           passed(r, training_forward(r->training, 0, batch), error) &&
           hear_next(r, chunk, number, error) &&
           (is_last(r, chunk) ||
            train_channel_send(l, &l->to_next, "activations for the next stage",
                               training_output(r->training, 0), bytes, error)) &&
           (!is_last(r, chunk) ||
            passed(r, training_loss(r->training, 0, batch, r->losses), error));
}

bool micro_runner_validate(MicroRunner *r, const SampleSource *source, uint64_t sample, float *loss,
                           uint64_t *valid, GError **error)
{
    r->valid = 0;
    for (uint32_t c = 0; c < r->o.position.chunks; c++) {
        const TrainBatch batch = batch_of(r, 0, c, 1);
        read_batch(r, source, &(const Place){0, c}, sample, 1);
        if (!pass_alone(r, c, &batch, sample, error)) {
            return false;
        }
        *loss = is_last(r, c) ? sample_loss(r, &batch, 0) : 0.0f;
    }
    *valid = r->valid;
    return true;
}

bool micro_runner_logits(MicroRunner *r, const uint32_t *tokens, uint32_t n, const float **logits,
                         GError **error)
{
    *logits = NULL;
    for (uint32_t i = 0; i < r->o.source->length; i++) {
        r->tokens[i] = i < n ? tokens[i] : 0; /* what comes after a token changes nothing of it */
        r->targets[i] = TARGET_NONE;
    }
    for (uint32_t c = 0; c < r->o.position.chunks; c++) {
        TrainBatch batch = batch_of(r, 0, c, 1);
        /* One text, whatever documents the slot held, and no row of them: 0. */
        batch.begins = NULL;
        if (!pass_alone(r, c, &batch, 0, error)) {
            return false;
        }
        if (is_last(r, c)) {
            *logits = training_logits_row(r->training, n - 1);
        }
    }
    return true;
}

/* ---- for plans ---- */

size_t micro_runner_plan_bytes(const Holding *holding, const MicroRunnerOptions *options,
                               unsigned threads, GError **error)
{
    g_autoptr(MicroRunner) r = g_new0(MicroRunner, 1);
    const TrainingOptions training = prepare(r, options);
    const size_t passes = training_plan_bytes(holding, &training, threads, error);
    return passes > 0 ? passes + (options->plan_ops == NULL ? own_bytes(r) : 0) : 0;
}

uint32_t micro_runner_plan_count(const MicroRunnerOptions *options)
{
    g_autoptr(GArray) micro_batches = cut_micro_batches(options);
    return micro_batches->len;
}

/* The fold's stack, of which only matters what is there. */
typedef struct SetCount {
    TreeStep steps[TREE_LEAVES_LIMIT];
    bool stack[TREE_LEAVES_LIMIT];
    uint32_t depth, leaf, live, most;
} SetCount;

/* The next leaves, of one node, are folded. */
static void count_node(SetCount *c, bool there, uint32_t n_leaves)
{
    uint32_t n_merges = 0;
    for (uint32_t i = 0; i < n_leaves; i++) {
        n_merges += c->steps[c->leaf++].n_merges;
    }
    c->stack[c->depth++] = there;
    for (uint32_t i = n_leaves - 1; i < n_merges; i++) {
        const bool right = c->stack[--c->depth], left = c->stack[c->depth - 1];
        c->live -= left && right;
        c->stack[c->depth - 1] = left || right;
    }
    c->depth -= c->steps[c->leaf - 1].emit;
}

uint32_t micro_runner_plan_sets(const MicroRunnerOptions *options)
{
    g_autoptr(MicroRunner) r = g_new0(MicroRunner, 1);
    prepare(r, options);
    const uint32_t *cuts = options->leaves->cuts + options->position.replica;
    const GArray *ops = r->pipeline->stages[options->position.stage];
    const PipelineOpKind ends =
        options->schedule == PIPELINE_ZERO_BUBBLE ? PIPELINE_WEIGHTS : PIPELINE_BACKWARD;
    SetCount c = {.most = 1};
    tree_program(options->leaves->n_leaves, cuts[0], cuts[1], c.steps);
    for (uint32_t i = 0; i < ops->len; i++) {
        const PipelineOp *op = &g_array_index(ops, PipelineOp, i);
        const MicroBatch *micro = &g_array_index(r->micro_batches, MicroBatch, op->micro);
        c.live += op->kind == PIPELINE_BACKWARD && micro->begins &&
                  op->chunk + 1 == options->position.chunks;
        c.most = MAX(c.most, c.live);
        if (op->kind == ends && micro->ends && op->chunk == 0) {
            while (cuts[0] + c.leaf < micro->leaf) {
                count_node(&c, false, 1);
            }
            count_node(&c, true, micro->n_leaves);
        }
    }
    return c.most;
}

size_t micro_runner_bytes(const MicroRunner *r)
{
    return training_bytes(r->training) + (r->o.work == NULL ? own_bytes(r) : 0);
}

uint32_t micro_runner_count(const MicroRunner *r)
{
    return r->micro_batches->len;
}
