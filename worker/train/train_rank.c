/* A step, top to bottom: train_rank_step(). Invariants:
 * 1. A leaf's gradients are one chain over its tokens: each micro-batch adds to the leaf's buffers,
 *    and no micro-batch crosses a leaf.
 * 2. Leaves fold by node(0, L), replicas' subtrees completing the same tree; an empty leaf is no
 *    operand.
 * 3. Weights and moments change only after every loss and the norm were found finite, on all ranks
 *    alike.
 * 4. All ranks make the same collectives in a step, whatever they find in it, until one fails. */
#include "worker/train/train_rank.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "worker/train/gradient_exchange.h"
#include "worker/train/gradient_fold.h"
#include "worker/train/weights_digest.h"

#include <math.h>
#include <string.h>

#define BUCKET_FLOATS (1u << 20)

/* Samples [first, first + n) of the global batch, inside one leaf. */
typedef struct MicroBatch {
    uint32_t first, n, leaf;
    bool begins, ends; /* the leaf */
} MicroBatch;

struct TrainRank {
    TrainRankOptions o;
    TrainPosition position;
    Parameters *weights;
    Training *training;
    LeafCuts leaves;
    GArray *micro_batches; /* of MicroBatch: this replica's, in order */
    GradientFold *fold;
    Parameters *leaf_gradients; /* of the running leaf */
    uint32_t next_leaf;         /* to be folded */
    Parameters *gradients;      /* of the last step */
    Ownership *reduced, *everything;
    Optimizer *optimizer;
    float *squares;             /* [tiles] */
    uint32_t *tokens, *targets; /* [micro_sequences][length] */
    float *losses;              /* [micro_sequences][length] */
    float *sample_losses;       /* [sequences] of the global batch */
    uint64_t step, valid;       /* valid: tokens with a target of the current step */
};

/* ---- making ---- */

static bool check(const TrainRankOptions *o, const TrainPosition *p, GError **error)
{
    g_autofree char *what =
        o->source->vocabulary > o->spec->vocab_size
            ? g_strdup_printf("the data has ids up to %u, the model a vocabulary of %u; use the "
                              "model's tokenizer",
                              o->source->vocabulary - 1, o->spec->vocab_size)
        : o->leaves < 1 || o->leaves > TREE_LEAVES_LIMIT
            ? g_strdup_printf("%u leaves; choose 1 to %u", o->leaves, TREE_LEAVES_LIMIT)
        : p->dp > o->leaves ? g_strdup_printf("%u replicas share %u leaves; choose dp 1 to %u",
                                              p->dp, o->leaves, o->leaves)
        : o->sequences < 1 || o->micro_sequences < 1
            ? g_strdup("a batch and a micro-batch have at least one sequence")
            : NULL;
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "training: %s", what);
    }
    return what == NULL;
}

/* The first sample of a leaf. */
static uint32_t leaf_begin(const TrainRank *t, uint32_t leaf)
{
    return (uint32_t)((uint64_t)leaf * t->o.sequences / t->o.leaves);
}

static GArray *cut_micro_batches(const TrainRank *t)
{
    GArray *list = g_array_new(FALSE, FALSE, sizeof(MicroBatch));
    const uint32_t *cuts = t->leaves.cuts + t->position.replica;
    for (uint32_t leaf = cuts[0]; leaf < cuts[1]; leaf++) {
        const uint32_t begin = leaf_begin(t, leaf), end = leaf_begin(t, leaf + 1);
        for (uint32_t at = begin; at < end; at += t->o.micro_sequences) {
            const uint32_t n = MIN(t->o.micro_sequences, end - at);
            const MicroBatch micro = {at, n, leaf, at == begin, at + n == end};
            g_array_append_val(list, micro);
        }
    }
    return list;
}

static bool make_optimizer(TrainRank *t, const Plan *plan, const Holding *holding, GError **error)
{
    const TrainRankOptions *o = &t->o;
    const size_t bucket = o->bucket_floats > 0 ? o->bucket_floats : BUCKET_FLOATS;
    t->reduced = ownership_new(o->spec, plan, &t->position, holding, true, bucket);
    if (o->whole_optimizer) {
        t->everything = ownership_new(o->spec, plan, &t->position, holding, false, bucket);
    }
    const OptimizerOptions options = {.settings = o->optimizer,
                                      .kernels = o->kernels,
                                      .pool = o->pool,
                                      .holding = holding,
                                      .reduced = t->reduced,
                                      .stepped = o->whole_optimizer ? t->everything : t->reduced};
    t->optimizer = optimizer_new(&options, error);
    return t->optimizer != NULL;
}

static bool allocate(TrainRank *t, GError **error)
{
    const size_t rows = (size_t)t->o.micro_sequences * t->o.source->length;
    t->squares = weft_alloc(t->reduced->tiles->len, sizeof *t->squares, "squares of tiles", error);
    t->tokens = weft_alloc(rows, sizeof *t->tokens, "tokens", error);
    t->targets = weft_alloc(rows, sizeof *t->targets, "targets", error);
    t->losses = weft_alloc(rows, sizeof *t->losses, "losses", error);
    t->sample_losses = weft_alloc(t->o.sequences, sizeof *t->sample_losses, "losses", error);
    return t->squares != NULL && t->tokens != NULL && t->targets != NULL && t->losses != NULL &&
           t->sample_losses != NULL;
}

static bool build(TrainRank *t, const Plan *plan, Parameters *weights, GError **error)
{
    const TrainRankOptions *o = &t->o;
    const TrainingOptions training = {.spec = o->spec,
                                      .weights = weights,
                                      .kernels = o->kernels,
                                      .pool = o->pool,
                                      .max_sequences = o->micro_sequences,
                                      .length = o->source->length};
    t->leaves = leaf_cuts(o->sequences, o->leaves, t->position.dp);
    t->micro_batches = cut_micro_batches(t);
    t->fold = gradient_fold_new(weights->holding, o->pool, o->kernels->add);
    t->training = training_new(&training, error);
    return t->training != NULL && make_optimizer(t, plan, weights->holding, error) &&
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
    t->weights = weights;
    return g_steal_pointer(&t);
}

void train_rank_free(TrainRank *t)
{
    if (t == NULL) {
        return;
    }
    parameters_free(t->gradients);
    parameters_free(t->leaf_gradients);
    gradient_fold_free(t->fold);
    training_free(t->training);
    optimizer_free(t->optimizer);
    ownership_free(t->reduced);
    ownership_free(t->everything);
    parameters_free(t->weights);
    if (t->micro_batches != NULL) {
        g_array_unref(t->micro_batches);
    }
    weft_free(t->squares);
    weft_free(t->tokens);
    weft_free(t->targets);
    weft_free(t->losses);
    weft_free(t->sample_losses);
    g_free(t);
}

/* ---- micro-batches ---- */

/* loss_factor 2^-ceil(log2(sequences x length)), and its inverse (NUMERICS 15). */
static float power_of_batch(const TrainRank *t)
{
    float power = 1.0f;
    while ((double)power < (double)t->o.sequences * t->o.source->length) {
        power *= 2.0f;
    }
    return power;
}

/* n samples of a source from number `first` on. */
static TrainBatch read_batch(TrainRank *t, const SampleSource *source, uint64_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const size_t at = (size_t)i * source->length;
        source->read(source->user, first + i, t->tokens + at, t->targets + at);
    }
    return (TrainBatch){t->tokens, t->targets, n, source->length};
}

/* Token losses of a sample in order; counts valid tokens. */
static float sample_loss(TrainRank *t, uint32_t sample_of_batch)
{
    const uint32_t length = t->o.source->length;
    float sum = 0.0f;
    for (uint32_t i = 0; i < length; i++) {
        const size_t at = (size_t)sample_of_batch * length + i;
        if (t->targets[at] != TARGET_NONE) {
            sum += t->losses[at];
            t->valid++;
        } else if (isnan(t->losses[at])) {
            sum = NAN;
        }
    }
    return sum;
}

/* ---- gradients of this replica's leaves ---- */

/* Leaves without samples before `leaf` (and all that are left: leaf = the replica's last). */
static void fold_empty_leaves(TrainRank *t, uint32_t leaf)
{
    for (; t->next_leaf < leaf; t->next_leaf++) {
        gradient_fold_leaf(t->fold, NULL);
    }
}

static bool micro_batch(TrainRank *t, const MicroBatch *micro, GError **error)
{
    if (micro->begins) {
        fold_empty_leaves(t, micro->leaf);
        t->leaf_gradients = gradient_fold_take(t->fold, error);
        if (t->leaf_gradients == NULL) {
            return false;
        }
    }
    const TrainBatch batch =
        read_batch(t, t->o.source, t->step * t->o.sequences + micro->first, micro->n);
    training_forward(t->training, &batch, t->losses);
    for (uint32_t i = 0; i < micro->n; i++) {
        t->sample_losses[micro->first + i] = sample_loss(t, i);
    }
    training_backward(t->training, &batch, 1.0f / power_of_batch(t), t->leaf_gradients);
    if (micro->ends) {
        gradient_fold_leaf(t->fold, g_steal_pointer(&t->leaf_gradients));
        t->next_leaf++;
    }
    return true;
}

static bool run_micro_batches(TrainRank *t, GError **error)
{
    const uint32_t *cuts = t->leaves.cuts + t->position.replica;
    gradient_fold_begin(t->fold, t->o.leaves, cuts[0], cuts[1]);
    gradient_fold_give(t->fold, g_steal_pointer(&t->leaf_gradients));
    t->next_leaf = cuts[0];
    for (uint32_t i = 0; i < t->micro_batches->len; i++) {
        if (!micro_batch(t, &g_array_index(t->micro_batches, MicroBatch, i), error)) {
            return false;
        }
    }
    fold_empty_leaves(t, cuts[1]);
    return true;
}

/* ---- what all ranks must know ---- */

/* Bytes that rank r reports: the last stage's first tensor rank of each replica its valid tokens
 * and its samples' losses. */
static size_t report_bytes(const TrainRank *t, uint32_t r, uint32_t *first, uint32_t *n)
{
    const TrainPosition *p = &t->position;
    const uint32_t replica = r / (p->pp * p->tp);
    const bool reports = r == train_global(p, replica, p->pp - 1, 0);
    *first = leaf_begin(t, t->leaves.cuts[replica]);
    *n = leaf_begin(t, t->leaves.cuts[replica + 1]) - *first;
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

static bool losses_are_finite(const TrainRank *t, GError **error)
{
    for (uint32_t i = 0; i < t->o.sequences; i++) {
        if (!isfinite(t->sample_losses[i])) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "step %" G_GUINT64_FORMAT ": the loss of sample %u of the batch is not "
                        "finite; lower the learning rate or clip gradients",
                        t->step, i);
            return false;
        }
    }
    return true;
}

/* ---- the fold over replicas ---- */

/* The subtrees of all replicas become t->gradients, complete in what this rank owns. */
static bool fold_replicas(TrainRank *t, GError **error)
{
    GPtrArray *subtrees = gradient_fold_subtrees(t->fold);
    t->gradients = subtrees->len > 0 ? subtrees->pdata[0] : gradient_fold_take(t->fold, error);
    if (t->gradients == NULL) {
        return false;
    }
    const bool ok = t->position.dp == 1 || exchange_reduce(t->o.links, t->reduced, &t->leaves,
                                                           (Parameters *const *)subtrees->pdata,
                                                           subtrees->len, t->gradients, error);
    if (subtrees->len > 0) {
        g_ptr_array_steal_index_fast(subtrees, 0);
    }
    gradient_fold_reset(t->fold);
    return ok;
}

/* ---- a step ---- */

static bool update(TrainRank *t, float norm, GError **error)
{
    const bool shares = t->position.dp > 1;
    if (shares && t->o.whole_optimizer &&
        !exchange_share(t->o.links, t->reduced, t->gradients, error)) {
        return false;
    }
    optimizer_update(t->optimizer, t->step, schedule_clip(&t->o.optimizer, norm), t->gradients,
                     t->weights);
    return !shares || t->o.whole_optimizer ||
           exchange_share(t->o.links, t->reduced, t->weights, error);
}

/* The norm of the whole gradient, the same on all ranks. */
static bool gradient_norm(TrainRank *t, float *norm, GError **error)
{
    optimizer_finish(t->optimizer, t->gradients, power_of_batch(t), (float)MAX(t->valid, 1),
                     t->squares);
    if (!exchange_tiles(t->o.links, t->reduced, t->squares, sizeof *t->squares, error)) {
        return false;
    }
    *norm = optimizer_norm(t->optimizer, t->squares);
    if (!isfinite(*norm)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                    "step %" G_GUINT64_FORMAT
                    ": the gradient's norm is %g; lower the learning rate",
                    t->step, (double)*norm);
        return false;
    }
    return true;
}

bool train_rank_step(TrainRank *t, TrainStep *out, GError **error)
{
    float norm;
    gradient_fold_give(t->fold, g_steal_pointer(&t->gradients));
    t->valid = 0;
    if (!run_micro_batches(t, error) || !gather_losses(t, error) || !losses_are_finite(t, error) ||
        !fold_replicas(t, error) || !gradient_norm(t, &norm, error)) {
        return false;
    }
    pool_float_control();
    *out = (TrainStep){.step = t->step,
                       .samples_seen = (t->step + 1) * t->o.sequences,
                       .loss = node_sum(t->sample_losses, t->o.sequences) / (float)MAX(t->valid, 1),
                       .rate = (float)schedule_rate(&t->o.optimizer, t->step),
                       .gradient_norm = norm};
    if (!update(t, norm, error)) {
        return false;
    }
    t->step++;
    return true;
}

bool train_rank_validate(TrainRank *t, const SampleSource *source, uint64_t samples, float *out,
                         GError **error)
{
    double sum = 0.0;
    t->valid = 0;
    for (uint64_t i = 0; i < samples; i++) {
        const TrainBatch batch = read_batch(t, source, i, 1);
        training_forward(t->training, &batch, t->losses);
        sum += (double)sample_loss(t, 0);
    }
    *out = (float)(sum / (double)MAX(t->valid, 1));
    return true;
}

bool train_rank_digest(TrainRank *t, Hash128 *out, GError **error)
{
    return weights_digest(t->o.links, t->reduced, t->weights, out, error);
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
    return t->weights;
}

Optimizer *train_rank_optimizer(TrainRank *t)
{
    return t->optimizer;
}

uint64_t train_rank_next_step(const TrainRank *t)
{
    return t->step;
}

void train_rank_set_step(TrainRank *t, uint64_t step)
{
    t->step = step;
}

const Parameters *train_rank_gradients(const TrainRank *t)
{
    return t->gradients;
}
