/* A step, top to bottom: train_rank_step(). Invariants:
 * 1. A leaf's gradients are one chain over its tokens: each micro-batch adds to the leaf's buffers,
 *    and no micro-batch crosses a leaf.
 * 2. Leaves fold by node(0, L), replicas' subtrees completing the same tree; an empty leaf is no
 *    operand.
 * 3. Weights and moments change only after every loss and the norm were found finite, on all ranks
 *    alike.
 * 4. All ranks make the same collectives in a step, whatever they find in it, until one fails. */
#include "worker/train/train_rank.h"

#include "kernels/device/use.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "worker/train/gradient_exchange.h"
#include "worker/train/gradient_fold.h"
#include "worker/train/gradient_stream.h"
#include "worker/train/rank_device.h"
#include "worker/train/train_buffers.h"
#include "worker/train/weights_digest.h"

#include <math.h>
#include <string.h>

#define BUCKET_FLOATS (1u << 20)

struct TrainRank {
    TrainRankOptions o;
    TrainPosition position;
    Parameters *weights; /* of a rank on a device: their copy */
    RankDevice *device;  /* or NULL */
    MicroRunner *runner;
    LeafCuts leaves;
    GradientFold *fold;
    Parameters *gradients; /* of the last step */
    Ownership *reduced, *everything;
    GradientStream *stream; /* NULL: one replica */
    Optimizer *optimizer;
    float *squares;       /* [tiles] */
    float *sample_losses; /* [sequences] of the global batch */
    float *tied;          /* the other end's part of a tied embedding: of one bucket */
    float *tied_own;      /* of a device: a copy of the own part */
    uint64_t n_steps;     /* done by this rank */
    uint64_t valid;       /* tokens with a target of the current step */
    TrainProgress at;
};

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

static bool check(const TrainRankOptions *o, const TrainPosition *p, GError **error)
{
    char *refusal = class_refusal(o);
    g_autofree char *what =
        refusal != NULL ? refusal
        : o->source->vocabulary > o->spec->vocab_size
            ? g_strdup_printf("the data has ids up to %u, the model a vocabulary of %u; use the "
                              "model's tokenizer",
                              o->source->vocabulary - 1, o->spec->vocab_size)
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
    const size_t bucket = o->bucket_floats > 0 ? o->bucket_floats : BUCKET_FLOATS;
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

/* Whether the embedding of a tied model is here and at another stage. */
static bool is_tied_apart(const TrainRank *t)
{
    return train_tied_floats(t->reduced, t->o.spec) > 0;
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

static MicroRunnerOptions runner_options(const TrainRank *t, const Parameters *weights)
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
    const size_t bucket = t->o.bucket_floats > 0 ? t->o.bucket_floats : BUCKET_FLOATS;
    t->reduced = ownership_new(t->o.spec, plan, &t->position, h, true, bucket);
    if (t->position.dp > 1) {
        t->stream = gradient_stream_new(t->o.links, t->reduced, &t->leaves);
    }
}

static DeviceExchangeOptions exchange_options(const TrainRank *t)
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
    const DeviceExchangeOptions exchange = exchange_options(t);
    if (t->device != NULL && !rank_device_open_exchange(t->device, &exchange, error)) {
        return false;
    }
    MicroRunnerOptions runner = runner_options(t, t->device != NULL ? t->device->weights : weights);
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
    if (!check(options, &t->position, error) || !build(t, plan, weights, error)) {
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

/* ---- what all ranks must know ---- */

/* Bytes that rank r reports: the last stage's first tensor rank of each replica its valid tokens
 * and its samples' losses. */
static size_t report_bytes(const TrainRank *t, uint32_t r, uint32_t *first, uint32_t *n)
{
    const TrainPosition *p = &t->position;
    const uint32_t replica = r / (p->pp * p->tp);
    const bool reports = r == train_global(p, replica, p->pp - 1, 0);
    *first = leaf_begin(t->leaves.cuts[replica], t->o.leaves, t->o.sequences);
    *n = leaf_begin(t->leaves.cuts[replica + 1], t->o.leaves, t->o.sequences) - *first;
    return reports ? sizeof t->valid + *n * sizeof(float) : 0;
}

static void pack_report(const TrainRank *t, uint8_t *to)
{
    const TrainPosition *p = &t->position;
    uint32_t first, n;
    if (report_bytes(t, train_global(p, p->replica, p->stage, p->rank), &first, &n) > 0) {
        memcpy(to, &t->valid, sizeof t->valid);
        memcpy(to + sizeof t->valid, t->sample_losses + first, n * sizeof(float));
    }
}

static void unpack_reports(TrainRank *t, uint8_t *const *parts)
{
    t->valid = 0;
    for (uint32_t r = 0; r < train_world(&t->position); r++) {
        uint32_t first, n;
        if (report_bytes(t, r, &first, &n) > 0) {
            uint64_t valid;
            memcpy(&valid, parts[r], sizeof valid);
            memcpy(t->sample_losses + first, parts[r] + sizeof valid, n * sizeof(float));
            t->valid += valid;
        }
    }
}

/* Losses of all samples and the count of valid tokens, everywhere. */
static bool gather_losses(TrainRank *t, GError **error)
{
    TrainGroup *g = t->o.links != NULL ? &t->o.links->world : NULL;
    size_t sizes[PLAN_RANKS_LIMIT], total = 0;
    uint8_t *parts[PLAN_RANKS_LIMIT];
    uint32_t first, n;
    if (g == NULL || g->turns.group == NULL) {
        return true;
    }
    for (uint32_t r = 0; r < g->n; r++) {
        sizes[r] = report_bytes(t, r, &first, &n);
        total += sizes[r];
    }
    g_autofree uint8_t *reports = g_malloc0(total);
    for (size_t r = 0, at = 0; r < g->n; at += sizes[r++]) {
        parts[r] = reports + at;
    }
    pack_report(t, parts[g->rank]);
    const GroupWait wait = group_turn(&g->turns, "gathering losses");
    if (!train_links_check(
            t->o.links, g,
            group_all_gather(g->turns.group, &wait, parts[g->rank], sizes, (void *const *)parts),
            error)) {
        return false;
    }
    unpack_reports(t, parts);
    return true;
}

/* False: an error, or (skip_nonfinite) *skipped. */
static bool check_losses(const TrainRank *t, bool *skipped, GError **error)
{
    *skipped = false;
    for (uint32_t i = 0; i < t->o.sequences && !*skipped; i++) {
        *skipped = !isfinite(t->sample_losses[i]);
        if (*skipped && !t->o.skip_nonfinite) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "step %" G_GUINT64_FORMAT ": the loss of sample %u of the batch is not "
                        "finite; lower optimizer.lr, set optimizer.clip, or leave such steps out "
                        "(nonfinite: skip)",
                        t->at.step + 1, i);
            return false;
        }
    }
    return true;
}

/* ---- the fold over replicas ---- */

/* Vectors whose matrices are cut among tensor ranks become whole in every subtree. */
static bool gather_vectors(TrainRank *t, GPtrArray *subtrees, GError **error)
{
    for (uint32_t i = 0; t->position.tp > 1 && i < subtrees->len; i++) {
        if (!exchange_vectors(t->o.links, subtrees->pdata[i], error)) {
            return false;
        }
    }
    return true;
}

static bool check_device(const TrainRank *t, GError **error)
{
    return rank_work_check(t->device->work, t->o.links, error);
}

/* n own floats of the embedding's gradient: head + lookup, in host memory. */
static bool join_tied_part(TrainRank *t, float *own, size_t n, GError **error)
{
    if (!exchange_tied(t->o.links, own, n, t->tied, error)) {
        return false;
    }
    if (t->position.stage == 0) {
        t->o.kernels->add(t->tied, own, n);
        memcpy(own, t->tied, n * sizeof *own);
    } else {
        t->o.kernels->add(own, t->tied, n);
    }
    return true;
}

static bool join_tied_on_device(TrainRank *t, float *own, size_t n, GError **error)
{
    DeviceWork *work = t->device->work;
    return (device_work_down(work, t->tied_own, own, n * sizeof *own) || check_device(t, error)) &&
           join_tied_part(t, t->tied_own, n, error) &&
           (device_work_up(work, own, t->tied_own, n * sizeof *own) || check_device(t, error));
}

/* The lookup part of a tied embedding lies on the first stage, the head part on the last: both get
 * head + lookup (NUMERICS 16). */
static bool join_tied(TrainRank *t, GError **error)
{
    const GArray *buckets = t->reduced->buckets;
    for (uint32_t b = 0; b < buckets->len; b++) {
        const Bucket *bucket = &g_array_index(buckets, Bucket, b);
        const size_t first = bucket->first[t->position.replica],
                     n = bucket->first[t->position.replica + 1] - first;
        float *own = t->gradients->floats + first;
        if (bucket->is_embedding && n > 0 &&
            !(t->device != NULL ? join_tied_on_device : join_tied_part)(t, own, n, error)) {
            return false;
        }
    }
    return true;
}

/* The subtrees of all replicas become t->gradients, complete in what this rank owns. */
static bool fold_replicas(TrainRank *t, GError **error)
{
    GPtrArray *subtrees = gradient_fold_subtrees(t->fold);
    if (!gather_vectors(t, subtrees, error)) {
        return false;
    }
    Parameters *root = subtrees->len > 0 ? subtrees->pdata[0] : gradient_fold_take(t->fold, error);
    if (root == NULL) {
        return false;
    }
    if (t->stream != NULL && !gradient_stream_has_begun(t->stream)) {
        gradient_stream_begin(t->stream, (Parameters *const *)subtrees->pdata, subtrees->len, root);
    }
    const bool ok = t->stream == NULL || gradient_stream_finish(t->stream, error);
    if (subtrees->len > 0) {
        g_ptr_array_remove_index_fast(subtrees, 0);
    }
    t->gradients = root;
    gradient_fold_reset(t->fold);
    return ok && (!is_tied_apart(t) || join_tied(t, error));
}

/* ---- on a device: replicas exchange in their team, or through copies in host memory ---- */

/* The subtrees' copies go through the host's fold; what this rank owns of the root comes back. */
static bool fold_copies(TrainRank *t, GPtrArray *subtrees, Parameters *root, GError **error)
{
    Parameters *copies[TREE_SUBTREES_LIMIT];
    for (uint32_t i = 0; i < subtrees->len; i++) {
        copies[i] = rank_device_copy(t->device, i, subtrees->pdata[i], error);
        if (copies[i] == NULL) {
            return false;
        }
    }
    t->gradients = subtrees->len > 0 ? copies[0] : rank_device_copy(t->device, 0, root, error);
    if (t->gradients == NULL) {
        return false;
    }
    gradient_stream_begin(t->stream, copies, subtrees->len, t->gradients);
    const bool ok = gradient_stream_finish(t->stream, error) &&
                    rank_device_owned_up(t->device, t->reduced, root, t->gradients, error);
    t->gradients = NULL;
    return ok;
}

static bool gather_vectors_on_device(TrainRank *t, GPtrArray *subtrees, GError **error)
{
    for (uint32_t i = 0; t->position.tp > 1 && i < subtrees->len; i++) {
        if (!device_exchange_vectors(t->device->work, t->o.links, subtrees->pdata[i],
                                     t->device->vectors, error)) {
            return false;
        }
    }
    return true;
}

static bool reduce_on_device(TrainRank *t, GPtrArray *subtrees, Parameters *root, GError **error)
{
    RankDevice *d = t->device;
    if (t->stream != NULL && rank_team(&d->teams.data) == NULL) {
        return fold_copies(t, subtrees, root, error);
    }
    if (t->stream != NULL && !device_exchange_has_begun(d->exchange)) {
        device_exchange_begin(d->exchange, (Parameters *const *)subtrees->pdata, subtrees->len,
                              root);
    }
    if (t->stream != NULL) {
        device_exchange_finish(d->exchange);
    }
    return check_device(t, error);
}

static bool fold_replicas_of_device(TrainRank *t, GError **error)
{
    GPtrArray *subtrees = gradient_fold_subtrees(t->fold);
    if (!gather_vectors_on_device(t, subtrees, error)) {
        return false;
    }
    Parameters *root = subtrees->len > 0 ? subtrees->pdata[0] : gradient_fold_take(t->fold, error);
    if (root == NULL) {
        return false;
    }
    const bool ok = reduce_on_device(t, subtrees, root, error);
    if (subtrees->len > 0) {
        g_ptr_array_remove_index_fast(subtrees, 0);
    }
    t->gradients = root;
    gradient_fold_reset(t->fold);
    return ok && (!is_tied_apart(t) || join_tied(t, error));
}

/* What the replicas own of `set` on the device becomes whole; host: a copy to go through. */
static bool share_on_device(TrainRank *t, Parameters *set, Parameters *host, GError **error)
{
    RankDevice *d = t->device;
    if (rank_team(&d->teams.data) != NULL) {
        device_exchange_share(d->exchange, set);
        return check_device(t, error);
    }
    return host != NULL && rank_device_owned_down(d, t->reduced, host, set, error) &&
           exchange_share(t->o.links, t->reduced, host, error) &&
           rank_device_up(d, set, host, error);
}

static bool share_gradients_on_device(TrainRank *t, GError **error)
{
    Parameters *copy = rank_team(&t->device->teams.data) == NULL
                           ? rank_device_copy(t->device, 0, NULL, error)
                           : NULL;
    return share_on_device(t, t->gradients, copy, error);
}

static bool update_on_device(TrainRank *t, float norm, GError **error)
{
    RankDevice *d = t->device;
    const bool shares = t->position.dp > 1;
    if (shares && t->o.whole_optimizer && !share_gradients_on_device(t, error)) {
        return false;
    }
    optimizer_update(t->optimizer, t->at.updates, schedule_clip(&t->o.optimizer, norm),
                     t->gradients, d->weights);
    d->host_stale = true;
    return !shares || t->o.whole_optimizer ? check_device(t, error)
                                           : share_on_device(t, d->weights, t->weights, error);
}

/* What a restore or the first weights left in host memory is on the device. */
static bool is_up(TrainRank *t, GError **error)
{
    return t->device == NULL || rank_device_take_up(t->device, t->weights, t->optimizer, error);
}

bool train_rank_settle(TrainRank *t, GError **error)
{
    return t->device == NULL || rank_device_settle(t->device, t->weights, t->optimizer, error);
}

/* ---- a step ---- */

static bool update(TrainRank *t, float norm, GError **error)
{
    const bool shares = t->position.dp > 1;
    if (t->device != NULL) {
        return update_on_device(t, norm, error);
    }
    if (shares && t->o.whole_optimizer &&
        !exchange_share(t->o.links, t->reduced, t->gradients, error)) {
        return false;
    }
    train_times_mark(t->o.times, TRAIN_OP_REST);
    optimizer_update(t->optimizer, t->at.updates, schedule_clip(&t->o.optimizer, norm),
                     t->gradients, t->weights);
    train_times_mark(t->o.times, TRAIN_OP_UPDATE);
    return !shares || t->o.whole_optimizer ||
           exchange_share(t->o.links, t->reduced, t->weights, error);
}

/* The norm of the whole gradient, the same on all ranks. */
static bool gradient_norm(TrainRank *t, float *norm, GError **error)
{
    const float back = power_of_batch(t) / t->at.scale.scale;
    train_times_mark(t->o.times, TRAIN_OP_REST);
    optimizer_finish(t->optimizer, t->gradients, back, (float)MAX(t->valid, 1), t->squares);
    train_times_mark(t->o.times, TRAIN_OP_FINISH);
    if (t->device != NULL && !check_device(t, error)) {
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
           check_device(t, error);
}

bool train_rank_step(TrainRank *t, TrainStep *out, GError **error)
{
    float norm;
    bool skipped;
    gradient_fold_give(t->fold, g_steal_pointer(&t->gradients));
    if (!is_up(t, error) ||
        !micro_runner_step(t->runner, t->at.step, t->at.scale.scale / power_of_batch(t), t->fold,
                           t->sample_losses, &t->valid, error) ||
        !idle_device_goes_on(t, error) || !gather_losses(t, error) ||
        !(t->device != NULL ? fold_replicas_of_device : fold_replicas)(t, error) ||
        !check_losses(t, &skipped, error) || !gradient_norm(t, &norm, error)) {
        return false;
    }
    *out = step_report(t, norm, skipped);
    if (!out->skipped && !update(t, norm, error)) {
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

/* The first replica's last stage knows. */
static bool share_validation(TrainRank *t, double sums[2], GError **error)
{
    TrainGroup *g = t->o.links != NULL ? &t->o.links->world : NULL;
    if (g == NULL || g->turns.group == NULL) {
        return true;
    }
    const GroupWait wait = group_turn(&g->turns, "sharing a validation loss");
    return train_links_check(t->o.links, g,
                             group_broadcast(g->turns.group, &wait,
                                             train_global(&t->position, 0, t->position.pp - 1, 0),
                                             sums, 2 * sizeof *sums),
                             error);
}

bool train_rank_validate(TrainRank *t, const SampleSource *source, uint64_t samples, float *out,
                         GError **error)
{
    double sums[2] = {0.0, 0.0}; /* of losses, of tokens */
    if (!is_up(t, error)) {
        return false;
    }
    for (uint64_t i = 0; i < samples; i++) {
        float loss;
        uint64_t valid;
        if (!micro_runner_validate(t->runner, source, i, &loss, &valid, error)) {
            return false;
        }
        sums[0] += (double)loss;
        sums[1] += (double)valid;
    }
    if (!share_validation(t, sums, error)) {
        return false;
    }
    *out = (float)(sums[0] / MAX(sums[1], 1.0));
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
    return is_up(t, error) && text_sampler_run(&sampler, wish, out, n, error);
}

bool train_rank_digest(TrainRank *t, Hash128 *out, GError **error)
{
    return train_rank_settle(t, error) &&
           weights_digest(t->o.links, t->reduced, t->weights, out, error);
}

/* ---- memory ---- */

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
    const MicroRunnerOptions runner = runner_options(t, NULL);
    const size_t bucket = o->bucket_floats > 0 ? o->bucket_floats : BUCKET_FLOATS;
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
    if (!check(options, &t.position, error)) {
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
    const MicroRunnerOptions runner = runner_options(&t, NULL);
    return micro_runner_plan_count(&runner);
}

TrainMemory train_rank_memory(const TrainRank *t)
{
    const Holding *h = t->weights->holding;
    const DeviceExchangeOptions exchange = exchange_options(t);
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
