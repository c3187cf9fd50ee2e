#include "worker/train/train_memory.h"

#include "proto/plan/tree.h"
#include "worker/train/train_buffers.h"
#include "worker/train/train_rank_state.h"

static uint32_t moments_of(const OptimizerSettings *s)
{
    return s->kind == OPTIMIZER_SGD ? 1 : 2;
}

static uint64_t optimizer_bytes(const OptimizerSettings *s, const Ownership *stepped)
{
    return moments_of(s) * stepped->n_owned * sizeof(float);
}

static uint64_t buffer_bytes(const TrainRank *t, const Holding *h, const Ownership *reduced,
                             const Ownership *stepped)
{
    return train_buffers_bytes(
        &(const TrainBuffersOptions){.holding = h,
                                     .leaves = &t->leaves,
                                     .reduced = reduced,
                                     .stepped = stepped,
                                     .rows = (size_t)t->o.micro_sequences * t->o.source->length,
                                     .sequences = t->o.sequences,
                                     .moments = moments_of(&t->o.optimizer),
                                     .data_bytes = t->o.data_bytes,
                                     .saves = t->o.saves});
}

/* Floats of a set of gradients. */
static uint64_t set_floats(const Holding *h)
{
    const bool lookup = h->spec->tied_output && h->is_first && h->is_last;
    return h->n_floats + (lookup ? ((uint64_t)h->vocab * h->spec->width + 15) / 16 * 16 : 0);
}

/* Sets of gradients that are copied to host memory to be exchanged. */
static uint64_t copied_sets(const TrainRank *t)
{
    const uint32_t *cuts = t->leaves.cuts + t->position.replica;
    const uint32_t n =
        tree_subtrees_missing(t->leaves.n_leaves, t->leaves.missing, cuts[0], cuts[1]);
    return t->position.dp > 1 ? MAX(n, 1) : 0;
}

static bool plan_memory(const TrainRank *t, unsigned threads, TrainMemory *out, GError **error)
{
    const TrainRankOptions *o = &t->o;
    const MicroRunnerOptions runner = train_rank_runner_options(t, NULL);
    const size_t bucket = train_rank_bucket_floats(o);
    g_autoptr(Holding) h = holding_new(o->spec, o->plan, o->replica, o->stage, o->rank);
    Ownership *reduced = ownership_new(o->spec, o->plan, &t->position, h, true, bucket),
              *stepped = o->whole_optimizer
                             ? ownership_new(o->spec, o->plan, &t->position, h, false, bucket)
                             : reduced;
    const uint64_t buffers = buffer_bytes(t, h, reduced, stepped);
    *out =
        (TrainMemory){.weights = h->n_floats * sizeof(float),
                      .gradients = micro_runner_plan_sets(&runner) * set_floats(h) * sizeof(float),
                      .optimizer = optimizer_bytes(&o->optimizer, stepped),
                      .activations = micro_runner_plan_bytes(h, &runner, threads, error),
                      .buffers = o->plan_ops == NULL ? buffers : 0};
    if (o->plan_ops != NULL) {
        out->host = out->weights + out->optimizer + copied_sets(t) * set_floats(h) * sizeof(float) +
                    buffers;
    }
    if (o->plan_ops != NULL && t->position.dp > 1) {
        out->gradients += device_exchange_bytes(&(const DeviceExchangeOptions){
            .reduced = reduced, .leaves = &t->leaves, .exact = !o->fast});
    }
    if (stepped != reduced) {
        ownership_free(stepped);
    }
    ownership_free(reduced);
    return out->activations > 0;
}

bool train_memory_plan(const TrainRankOptions *options, unsigned threads, TrainMemory *out,
                       GError **error)
{
    TrainRank t = {.o = *options};
    if (!train_plan_check(options->plan, options->spec, error)) {
        return false;
    }
    if (options->device != NULL) {
        t.o.plan_ops = options->device->train_ops;
    }
    t.o.micro_sequences = MIN(options->micro_sequences, options->sequences);
    t.position = train_position(options->plan, options->replica, options->stage, options->rank);
    if (!train_rank_check(options, &t.position, error)) {
        return false;
    }
    t.leaves = leaf_cuts(options->sequences, options->leaves, t.position.dp);
    return plan_memory(&t, threads, out, error);
}

uint32_t train_micro_batches_plan(const TrainRankOptions *options)
{
    TrainRank t = {.o = *options};
    t.position = train_position(options->plan, options->replica, options->stage, options->rank);
    t.leaves = leaf_cuts(options->sequences, options->leaves, t.position.dp);
    const MicroRunnerOptions runner = train_rank_runner_options(&t, NULL);
    return micro_runner_plan_count(&runner);
}

TrainMemory train_rank_memory(const TrainRank *t)
{
    const Holding *h = t->weights->holding;
    const DeviceExchangeOptions exchange = train_rank_exchange_options(t);
    const bool exchanges = t->device != NULL && t->position.dp > 1;
    const uint64_t buffers = buffer_bytes(t, h, t->reduced, train_rank_ownership(t));
    return (TrainMemory){
        .weights = t->weights->n_floats * sizeof(float),
        .gradients = gradient_fold_made(t->fold) * set_floats(h) * sizeof(float) +
                     (exchanges ? device_exchange_bytes(&exchange) : 0),
        .optimizer = optimizer_bytes(&t->o.optimizer, train_rank_ownership(t)),
        .activations = micro_runner_bytes(t->runner),
        .buffers = t->device == NULL ? buffers : 0,
        .host = t->device == NULL ? 0
                                  : buffers + h->n_floats * sizeof(float) +
                                        optimizer_bytes(&t->o.optimizer, train_rank_ownership(t)) +
                                        t->device->sets->len * set_floats(h) * sizeof(float)};
}
