/* A step, top to bottom: train_rank_step(). Invariants:
 * 1. A leaf's gradients are one chain over its tokens: each micro-batch adds to the leaf's buffers,
 *    and no micro-batch crosses a leaf.
 * 2. Leaves fold by node(0, L), replicas' subtrees completing the same tree; an empty leaf is no
 *    operand.
 * 3. Weights and moments change only after every loss and the norm were found finite, on all ranks
 *    alike.
 * 4. All ranks make the same collectives in a step, whatever they find in it, until one fails. */
#include "kernels/device/use.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "worker/train/train_buffers.h"
#include "worker/train/train_rank_state.h"
#include "worker/train/weights_digest.h"

#include <math.h>

#define BUCKET_FLOATS (1u << 20)

/* ---- making ---- */

/* Why the device, if there is one, does not give what the job's class promises; NULL: it does.
 * Returned. */
static char *class_refusal(const TrainRankOptions *o)
{
    const DeviceTrainOps *ops = o->device != NULL ? o->device->train_ops : o->plan_ops;
    if (ops == NULL || o->fast) {
        return NULL;
    }
    if (!o->devices) {
        return g_strdup("a rank of numerics class exact computes on a device, and the job says "
                        "that none does");
    }
    return ops->gives_exact(precision_dtype(o->precision))
               ? NULL
               : g_strdup_printf("a rank computes on a device that trains with precision %s by "
                                 "numerics class fast only; say numerics: fast, or another "
                                 "precision",
                                 precision_name(o->precision));
}

static bool has_devices(const TrainRankOptions *o)
{
    return o->fast || o->devices;
}

bool train_rank_check(const TrainRankOptions *o, const TrainPosition *p, GError **error)
{
    char *refusal = class_refusal(o);
    g_autofree char *what =
        refusal != NULL ? refusal
        : o->leaves < 1 || o->leaves > TREE_LEAVES_LIMIT
            ? g_strdup_printf("%u leaves; choose 1 to %u", o->leaves, TREE_LEAVES_LIMIT)
        : p->dp > o->leaves ? g_strdup_printf("%u replicas share %u leaves; choose dp 1 to %u",
                                              p->dp, o->leaves, o->leaves)
        : p->chunks > 1 && o->schedule != PIPELINE_INTERLEAVED
            ? g_strdup_printf("schedule %s runs stages of one chunk of layers, and the plan has %u "
                              "chunks; choose schedule interleaved",
                              pipeline_name(o->schedule), p->chunks)
        : o->sequences < 1 || o->micro_sequences < 1
            ? g_strdup("a batch and a micro-batch have at least one sequence")
        : !(o->smoothing >= 0.0f && o->smoothing < 1.0f) ||
                !(o->dropout.rate >= 0.0f && o->dropout.rate < 1.0f)
            ? g_strdup_printf("dropout %g and label smoothing %g must be 0 or more and below 1",
                              (double)o->dropout.rate, (double)o->smoothing)
            : NULL;
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "training: %s", what);
    }
    return what == NULL;
}

static bool make_optimizer(TrainRank *t, const Plan *plan, const Holding *holding, GError **error)
{
    const TrainRankOptions *o = &t->o;
    const size_t bucket = train_rank_bucket_floats(&t->o);
    if (o->whole_optimizer) {
        t->everything = ownership_new(o->spec, plan, &t->position, holding, false, bucket);
    }
    const OptimizerOptions options = {.settings = o->optimizer,
                                      .kernels = o->kernels,
                                      .pool = o->pool,
                                      .holding = holding,
                                      .reduced = t->reduced,
                                      .work = t->device != NULL ? t->device->work : NULL,
                                      .stepped = o->whole_optimizer ? t->everything : t->reduced};
    t->optimizer = optimizer_new(&options, error);
    return t->optimizer != NULL;
}

static bool allocate(TrainRank *t, GError **error)
{
    const size_t tied = train_tied_floats(t->reduced, t->o.spec);
    t->squares = weft_alloc(t->reduced->tiles->len, sizeof *t->squares, "squares of tiles", error);
    t->sample_losses = weft_alloc(t->o.sequences, sizeof *t->sample_losses, "losses", error);
    t->tied = weft_alloc(MAX(tied, 1), sizeof *t->tied, "gradients of the embedding", error);
    if (t->device != NULL) {
        t->tied_own =
            weft_alloc(MAX(tied, 1), sizeof *t->tied, "gradients of the embedding", error);
    }
    return t->squares != NULL && t->sample_losses != NULL && t->tied != NULL &&
           (t->device == NULL || t->tied_own != NULL);
}

/* Biases and their like, of which each tensor rank makes a part: they are to be whole before they
 * are folded over replicas. */
static bool has_cut_vectors(const Holding *h)
{
    bool has = false;
    for (uint32_t i = 0; h->tp > 1 && i < h->spec->n_tensors; i++) {
        const TensorSpec *t = &h->spec->tensors[i];
        has = has || (t->rows == 1 && t->cut != CUT_WHOLE && holding_has(h, i));
    }
    return has;
}

size_t train_rank_bucket_floats(const TrainRankOptions *o)
{
    return o->bucket_floats > 0 ? o->bucket_floats : BUCKET_FLOATS;
}

MicroRunnerOptions train_rank_runner_options(const TrainRank *t, const Parameters *weights)
{
    const TrainRankOptions *o = &t->o;
    return (MicroRunnerOptions){.weights = weights,
                                .kernels = o->kernels,
                                .pool = o->pool,
                                .source = o->source,
                                .leaves = &t->leaves,
                                .position = t->position,
                                .links = o->links,
                                .sequences = o->sequences,
                                .micro_sequences = o->micro_sequences,
                                .schedule = o->schedule,
                                .recompute = o->recompute,
                                .precision = o->precision,
                                .dropout = o->dropout,
                                .smoothing = o->smoothing,
                                .trace = o->trace,
                                .times = o->times,
                                .work = t->device != NULL ? t->device->work : NULL,
                                .plan_ops = o->plan_ops,
                                .team =
                                    t->device != NULL ? rank_team(&t->device->teams.tensor) : NULL,
                                .exact = !o->fast,
                                .devices = has_devices(o)};
}

static void make_stream(TrainRank *t, const Plan *plan, const Holding *h)
{
    const size_t bucket = train_rank_bucket_floats(&t->o);
    t->reduced = ownership_new(t->o.spec, plan, &t->position, h, true, bucket);
    if (t->position.dp > 1) {
        t->stream = gradient_stream_new(t->o.links, t->reduced, &t->leaves);
    }
}

DeviceExchangeOptions train_rank_exchange_options(const TrainRank *t)
{
    return (DeviceExchangeOptions){.reduced = t->reduced,
                                   .leaves = &t->leaves,
                                   .team =
                                       t->device != NULL ? rank_team(&t->device->teams.data) : NULL,
                                   .exact = !t->o.fast};
}

/* Collective where some rank is on a device: also a rank on a host answers. */
static bool join_devices(TrainRank *t, GError **error)
{
    RankTeams none = {0};
    return !has_devices(&t->o) || t->o.links == NULL ||
           rank_teams_join(t->device != NULL ? &t->device->teams : &none, t->o.device,
                           t->device != NULL ? t->device->work : NULL, t->o.links, error);
}

static bool build(TrainRank *t, const Plan *plan, Parameters *weights, GError **error)
{
    const TrainRankOptions *o = &t->o;
    t->leaves = leaf_cuts(o->sequences, o->leaves, t->position.dp);
    if (o->device != NULL) {
        t->device = rank_device_new(o->device, weights, o->links, error);
        if (t->device == NULL) {
            return false;
        }
    }
    if (!join_devices(t, error)) {
        return false;
    }
    t->fold = gradient_fold_new(weights->holding, o->pool,
                                t->device != NULL ? t->device->work : NULL, o->kernels->add);
    make_stream(t, plan, weights->holding);
    const DeviceExchangeOptions exchange = train_rank_exchange_options(t);
    if (t->device != NULL && !rank_device_open_exchange(t->device, &exchange, error)) {
        return false;
    }
    MicroRunnerOptions runner =
        train_rank_runner_options(t, t->device != NULL ? t->device->weights : weights);
    runner.stream = has_cut_vectors(weights->holding) || t->device != NULL ? NULL : t->stream;
    /* with tensor ranks two groups would wait for each other's ranks at once */
    runner.exchange = exchange.team != NULL && t->position.tp == 1 ? t->device->exchange : NULL;
    t->runner = micro_runner_new(&runner, error);
    return t->runner != NULL && make_optimizer(t, plan, weights->holding, error) &&
           allocate(t, error);
}

TrainRank *train_rank_new(const TrainRankOptions *options, Parameters *weights, GError **error)
{
    g_autoptr(Plan) alone = NULL;
    const Plan *plan = options->plan;
    if (plan == NULL) {
        plan = alone = train_plan_new(options->spec, 1, 1, 1, error);
    }
    if (plan == NULL || !train_plan_check(plan, options->spec, error)) {
        return NULL;
    }
    g_autoptr(TrainRank) t = g_new0(TrainRank, 1);
    t->o = *options;
    t->o.micro_sequences = MIN(options->micro_sequences, options->sequences);
    t->position = train_position(plan, options->replica, options->stage, options->rank);
    if (!train_rank_check(options, &t->position, error) || !build(t, plan, weights, error)) {
        return NULL;
    }
    t->at.scale = loss_scale_begin(&t->o.scaling);
    t->weights = weights;
    return g_steal_pointer(&t);
}

void train_rank_free(TrainRank *t)
{
    if (t == NULL) {
        return;
    }
    rank_device_leave(t->device);
    parameters_free(t->gradients);
    micro_runner_free(t->runner);
    gradient_fold_free(t->fold);
    optimizer_free(t->optimizer);
    gradient_stream_free(t->stream);
    ownership_free(t->reduced);
    ownership_free(t->everything);
    rank_device_free(t->device);
    parameters_free(t->weights);
    weft_free(t->squares);
    weft_free(t->sample_losses);
    weft_free(t->tied);
    weft_free(t->tied_own);
    g_free(t);
}

/* loss_factor 2^-ceil(log2(sequences x length)), and its inverse (NUMERICS 15). */
static float power_of_batch(const TrainRank *t)
{
    float power = 1.0f;
    while ((double)power < (double)t->o.sequences * t->o.source->length) {
        power *= 2.0f;
    }
    return power;
}

bool train_rank_take_up(TrainRank *t, GError **error)
{
    return t->device == NULL || rank_device_take_up(t->device, t->weights, t->optimizer, error);
}

bool train_rank_settle(TrainRank *t, GError **error)
{
    return t->device == NULL || rank_device_settle(t->device, t->weights, t->optimizer, error);
}

/* ---- a step ---- */

/* The norm of the whole gradient, the same on all ranks. */
static bool gradient_norm(TrainRank *t, float *norm, GError **error)
{
    const float back = power_of_batch(t) / t->at.scale.scale;
    train_times_mark(t->o.times, TRAIN_OP_REST);
    optimizer_finish(t->optimizer, t->gradients, back, (float)MAX(t->valid, 1), t->squares);
    train_times_mark(t->o.times, TRAIN_OP_FINISH);
    if (t->device != NULL && !train_rank_check_device(t, error)) {
        return false;
    }
    if (!exchange_tiles(t->o.links, t->reduced, t->squares, sizeof *t->squares, error)) {
        return false;
    }
    *norm = optimizer_norm(t->optimizer, t->squares);
    if (!isfinite(*norm) && !t->o.scaling.dynamic && !t->o.skip_nonfinite) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                    "step %" G_GUINT64_FORMAT
                    ": the gradient is not finite, at a loss scale of %g; lower optimizer.lr, set "
                    "loss_scale.policy: dynamic, or leave such steps out (nonfinite: skip)",
                    t->at.step + 1, (double)t->at.scale.scale);
        return false;
    }
    return true;
}

/* One NaN for all: its sign would depend on the instructions that made it. */
static float one_nan(float x)
{
    return isnan(x) ? NAN : x;
}

static TrainStep step_report(const TrainRank *t, float norm, bool skipped)
{
    pool_float_control();
    const float loss = node_sum(t->sample_losses, t->o.sequences) / (float)MAX(t->valid, 1);
    return (TrainStep){.step = t->at.step,
                       .samples_seen = (t->at.step + 1) * t->o.sequences,
                       .loss = one_nan(loss),
                       .rate = (float)schedule_rate(&t->o.optimizer, t->at.updates),
                       .gradient_norm = one_nan(norm),
                       .skipped = skipped || !isfinite(norm),
                       .scale = t->at.scale.scale};
}

/* A replica without samples has no pass that waits for its device, whose last all-gather the other
 * replicas are waiting for: a stream may go on only while it is waited for. */
static bool idle_device_goes_on(TrainRank *t, GError **error)
{
    return t->device == NULL || micro_runner_count(t->runner) > 0 ||
           device_work_wait(t->device->work, "sharing what the owners updated") ||
           train_rank_check_device(t, error);
}

bool train_rank_step(TrainRank *t, TrainStep *out, GError **error)
{
    float norm;
    bool skipped;
    gradient_fold_give(t->fold, g_steal_pointer(&t->gradients));
    if (!train_rank_take_up(t, error) ||
        !micro_runner_step(t->runner, t->at.step, t->at.scale.scale / power_of_batch(t), t->fold,
                           t->sample_losses, &t->valid, error) ||
        !idle_device_goes_on(t, error) || !train_losses_gather(t, error) ||
        !train_replicas_fold(t, error) || !train_losses_check(t, &skipped, error) ||
        !gradient_norm(t, &norm, error)) {
        return false;
    }
    *out = step_report(t, norm, skipped);
    if (!out->skipped && !train_replicas_update(t, norm, error)) {
        return false;
    }
    loss_scale_after(&t->at.scale, &t->o.scaling, out->skipped);
    t->at.updates += !out->skipped;
    t->at.step++;
    if (t->device != NULL) {
        device_use_step(t->o.device, ++t->n_steps);
    }
    return true;
}

bool train_rank_sample(TrainRank *t, const TextWish *wish, uint32_t *out, uint32_t *n,
                       GError **error)
{
    const TextSampler sampler = {.runner = t->runner,
                                 .kernels = t->o.kernels,
                                 .holding = t->weights->holding,
                                 .position = t->position,
                                 .links = t->o.links,
                                 .length = t->o.source->length};
    return train_rank_take_up(t, error) && text_sampler_run(&sampler, wish, out, n, error);
}

bool train_rank_digest(TrainRank *t, Hash128 *out, GError **error)
{
    return train_rank_settle(t, error) &&
           weights_digest(t->o.links, t->reduced, t->weights, out, error);
}

/* ---- state ---- */

const Ownership *train_rank_ownership(const TrainRank *t)
{
    return t->o.whole_optimizer ? t->everything : t->reduced;
}

const Parameters *train_rank_weights(const TrainRank *t)
{
    return t->weights;
}

Parameters *train_rank_weights_to_restore(TrainRank *t)
{
    if (t->device != NULL) {
        t->device->weights_stale = true;
    }
    return t->weights;
}

Optimizer *train_rank_optimizer(TrainRank *t)
{
    return t->optimizer;
}

const TrainProgress *train_rank_progress(const TrainRank *t)
{
    return &t->at;
}

void train_rank_restore(TrainRank *t, const TrainProgress *progress)
{
    t->at = *progress;
    if (t->device != NULL) {
        t->device->weights_stale = t->device->moments_stale = true;
    }
    t->at.scale = loss_scale_resume(&t->o.scaling, &progress->scale);
}

uint32_t train_rank_overlapped(const TrainRank *t)
{
    const DeviceExchange *x = t->device != NULL ? t->device->exchange : NULL;
    return x != NULL           ? device_exchange_early(x)
           : t->stream != NULL ? gradient_stream_early(t->stream)
                               : 0;
}

const Parameters *train_rank_gradients(TrainRank *t)
{
    return t->device != NULL && t->gradients != NULL ? rank_device_show(t->device, t->gradients)
                                                     : t->gradients;
}
