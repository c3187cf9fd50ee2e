/* A step, top to bottom: trainer_step(). Invariants:
 * 1. A leaf's gradients are one chain over its tokens: each micro-batch adds to the leaf's buffers,
 *    and no micro-batch crosses a leaf.
 * 2. Leaves fold by node(0, L), replicas' subtrees completing the same tree; an empty leaf is no
 *    operand.
 * 3. Weights and moments change only in update(), after everything was found finite. */
#include "worker/train/trainer.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "worker/train/gradient_fold.h"
#include "worker/train/tiles.h"

#include <math.h>

struct Trainer {
    TrainerOptions o;
    Parameters *weights, *first, *second; /* master weights; moments (second: AdamW only) */
    Training *training;
    GradientFold *fold;
    Parameters *gradients;      /* of the last step */
    GArray *tiles;              /* of Tile */
    float *squares;             /* [tiles] */
    uint32_t *tokens, *targets; /* [micro_sequences][length] */
    float *losses;              /* [micro_sequences][length] */
    float *sample_losses;       /* [sequences] */
    uint64_t step, valid;       /* valid: tokens with a target of the current step */
};

static bool check(const TrainerOptions *o, GError **error)
{
    const uint32_t vocabulary = token_data_vocabulary(o->data);
    g_autofree char *what =
        vocabulary > o->spec->vocab_size
            ? g_strdup_printf("the data has ids up to %u, the model a vocabulary of %u; use the "
                              "model's tokenizer",
                              vocabulary - 1, o->spec->vocab_size)
        : o->leaves < 1 || o->leaves > TREE_LEAVES_LIMIT
            ? g_strdup_printf("%u leaves; choose 1 to %u", o->leaves, TREE_LEAVES_LIMIT)
        : o->replicas < 1 || o->replicas > o->leaves
            ? g_strdup_printf("%u replicas share %u leaves; choose 1 to %u", o->replicas, o->leaves,
                              o->leaves)
        : o->sequences < 1 || o->micro_sequences < 1
            ? g_strdup("a batch and a micro-batch have at least one sequence")
            : NULL;
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "training: %s", what);
    }
    return what == NULL;
}

static bool allocate(Trainer *t, GError **error)
{
    const TrainerOptions *o = &t->o;
    const size_t rows = (size_t)o->micro_sequences * o->length;
    const bool adamw = o->optimizer.kind == OPTIMIZER_ADAMW;
    t->tiles = tiles_of(o->spec);
    t->fold = gradient_fold_new(o->spec, o->pool, o->kernels->add);
    t->first = parameters_new(o->spec, false, error);
    t->second = t->first != NULL && adamw ? parameters_new(o->spec, false, error) : NULL;
    if (t->first == NULL || (adamw && t->second == NULL)) {
        return false;
    }
    t->squares = weft_alloc(t->tiles->len, sizeof *t->squares, "squares of tiles", error);
    t->tokens = weft_alloc(rows, sizeof *t->tokens, "tokens", error);
    t->targets = weft_alloc(rows, sizeof *t->targets, "targets", error);
    t->losses = weft_alloc(rows, sizeof *t->losses, "losses", error);
    t->sample_losses = weft_alloc(o->sequences, sizeof *t->sample_losses, "losses", error);
    return t->squares != NULL && t->tokens != NULL && t->targets != NULL && t->losses != NULL &&
           t->sample_losses != NULL;
}

Trainer *trainer_new(const TrainerOptions *options, Parameters *weights, GError **error)
{
    if (!check(options, error)) {
        return NULL;
    }
    g_autoptr(Trainer) t = g_new0(Trainer, 1);
    t->o = *options;
    t->o.micro_sequences = MIN(options->micro_sequences, options->sequences);
    const TrainingOptions training = {.spec = options->spec,
                                      .weights = weights,
                                      .kernels = options->kernels,
                                      .pool = options->pool,
                                      .max_sequences = t->o.micro_sequences,
                                      .length = options->length};
    t->training = training_new(&training, error);
    if (t->training == NULL || !allocate(t, error)) {
        return NULL;
    }
    t->weights = weights;
    return g_steal_pointer(&t);
}

void trainer_free(Trainer *t)
{
    if (t == NULL) {
        return;
    }
    parameters_free(t->gradients);
    gradient_fold_free(t->fold);
    training_free(t->training);
    parameters_free(t->weights);
    parameters_free(t->first);
    parameters_free(t->second);
    if (t->tiles != NULL) {
        g_array_unref(t->tiles);
    }
    weft_free(t->squares);
    weft_free(t->tokens);
    weft_free(t->targets);
    weft_free(t->losses);
    weft_free(t->sample_losses);
    g_free(t);
}

/* ---- gradients of a leaf ---- */

/* loss_factor 2^-ceil(log2(sequences x length)), and its inverse (NUMERICS 15). */
static float power_of_batch(const Trainer *t)
{
    float power = 1.0f;
    while ((double)power < (double)t->o.sequences * t->o.length) {
        power *= 2.0f;
    }
    return power;
}

/* Samples [first, first + n) of the step: tokens and targets. */
static TrainBatch read_batch(Trainer *t, const TokenData *data, const uint64_t *windows, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const size_t at = (size_t)i * t->o.length;
        token_data_read(data, windows[i], t->tokens + at, t->targets + at);
    }
    return (TrainBatch){t->tokens, t->targets, n, t->o.length};
}

/* Token losses of a sample in order; counts valid tokens. */
static float sample_loss(Trainer *t, uint32_t sample_of_batch)
{
    float sum = 0.0f;
    for (uint32_t i = 0; i < t->o.length; i++) {
        const size_t at = (size_t)sample_of_batch * t->o.length + i;
        if (t->targets[at] != TARGET_NONE) {
            sum += t->losses[at];
            t->valid++;
        } else if (isnan(t->losses[at])) {
            sum = NAN;
        }
    }
    return sum;
}

static bool micro_batch(Trainer *t, uint32_t first, uint32_t n, Parameters *gradients,
                        GError **error)
{
    g_autofree uint64_t *windows = g_new(uint64_t, n);
    for (uint32_t i = 0; i < n; i++) {
        windows[i] =
            token_data_window_of(t->o.data, t->o.seed, t->step * t->o.sequences + first + i);
    }
    const TrainBatch batch = read_batch(t, t->o.data, windows, n);
    training_forward(t->training, &batch, t->losses);
    for (uint32_t i = 0; i < n; i++) {
        t->sample_losses[first + i] = sample_loss(t, i);
        if (!isfinite(t->sample_losses[first + i])) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "step %" G_GUINT64_FORMAT ": the loss of sample %u (window "
                        "%" G_GUINT64_FORMAT ") is not finite; lower the learning rate or clip "
                        "gradients",
                        t->step, first + i, windows[i]);
            return false;
        }
    }
    training_backward(t->training, &batch, 1.0f / power_of_batch(t), gradients);
    return true;
}

/* The gradients of leaf `leaf`; *out = NULL for an empty one. */
static bool leaf_gradients(Trainer *t, uint32_t leaf, Parameters **out, GError **error)
{
    const uint64_t samples = t->o.sequences, leaves = t->o.leaves;
    const uint32_t first = (uint32_t)(leaf * samples / leaves),
                   last = (uint32_t)((leaf + 1) * samples / leaves);
    *out = NULL;
    if (first == last) {
        return true;
    }
    Parameters *gradients = gradient_fold_take(t->fold, error);
    if (gradients == NULL) {
        return false;
    }
    for (uint32_t i = first; i < last; i += t->o.micro_sequences) {
        if (!micro_batch(t, i, MIN(t->o.micro_sequences, last - i), gradients, error)) {
            gradient_fold_give(t->fold, gradients);
            return false;
        }
    }
    *out = gradients;
    return true;
}

/* ---- the fold ---- */

/* Leaves [first, last) as a replica sees them: its maximal subtrees in order. */
static bool replica_gradients(Trainer *t, uint32_t first, uint32_t last, GPtrArray *subtrees,
                              GError **error)
{
    TreeStep steps[TREE_LEAVES_LIMIT];
    tree_program(t->o.leaves, first, last, steps);
    for (uint32_t leaf = first; leaf < last; leaf++) {
        Parameters *gradients;
        if (!leaf_gradients(t, leaf, &gradients, error)) {
            return false;
        }
        gradient_fold_push(t->fold, gradients, steps[leaf - first].n_merges);
        if (steps[leaf - first].emit) {
            g_ptr_array_add(subtrees, gradient_fold_pop(t->fold));
        }
    }
    return true;
}

/* All leaves: t->gradients. */
static bool fold_leaves(Trainer *t, GError **error)
{
    const uint32_t replicas = t->o.replicas, leaves = t->o.leaves;
    uint32_t cuts[TREE_LEAVES_LIMIT + 1];
    uint8_t merges[TREE_LEAVES_LIMIT];
    g_autoptr(GPtrArray) subtrees = g_ptr_array_new();
    bool ok = true;
    for (uint32_t r = 0; r <= replicas; r++) {
        cuts[r] = (uint32_t)((uint64_t)leaves * r / replicas);
    }
    for (uint32_t r = 0; ok && r < replicas; r++) {
        ok = replica_gradients(t, cuts[r], cuts[r + 1], subtrees, error);
    }
    if (!ok) {
        gradient_fold_reset(t->fold);
        for (guint i = 0; i < subtrees->len; i++) {
            gradient_fold_give(t->fold, subtrees->pdata[i]);
        }
        return false;
    }
    const uint32_t n = tree_completion(leaves, cuts, replicas, merges);
    g_assert(n == subtrees->len);
    for (uint32_t i = 0; i < n; i++) {
        gradient_fold_push(t->fold, subtrees->pdata[i], merges[i]);
    }
    t->gradients = gradient_fold_pop(t->fold);
    return true;
}

/* ---- the owner's part, tile by tile ---- */

typedef struct Finish {
    Trainer *t;
    float back, tokens;
} Finish;

static float *tensor_of(const Parameters *p, const Tile *tile)
{
    return p->tensors[tile->tensor];
}

/* Tied embedding: head + lookup, once; then unscale, divide, square. */
static void finish_region(void *user, unsigned thread, unsigned n_threads)
{
    const Finish *f = user;
    Trainer *t = f->t;
    const Kernels *k = t->o.kernels;
    Parameters *g = t->gradients;
    uint32_t first, last;
    pool_share(t->tiles->len, 1, thread, n_threads, &first, &last);
    for (uint32_t i = first; i < last; i++) {
        const Tile *tile = &g_array_index(t->tiles, Tile, i);
        const size_t ld = t->o.spec->tensors[tile->tensor].columns;
        const size_t at = tile->rect.row0 * ld + tile->rect.col0;
        float *x = tensor_of(g, tile) + at;
        for (uint32_t r = 0; r < tile->rect.n_rows; r++) {
            if (g->lookup != NULL && t->o.spec->tensors[tile->tensor].role == ROLE_TOKEN_EMBD) {
                k->add(x + r * ld, g->lookup + at + r * ld, tile->rect.n_cols);
            }
            k->train.gradient_finish(x + r * ld, tile->rect.n_cols, f->back, f->tokens);
        }
        t->squares[i] = k->train.sum_squares(x, ld, tile->rect.n_rows, tile->rect.n_cols);
    }
}

/* Tiles by node() per tensor, tensors by node(). */
static float gradient_norm(Trainer *t)
{
    const uint32_t n_tensors = t->o.spec->n_tensors;
    g_autofree float *sums = g_new(float, n_tensors);
    uint32_t at = 0;
    for (uint32_t i = 0; i < n_tensors; i++) {
        uint32_t end = at;
        while (end < t->tiles->len && g_array_index(t->tiles, Tile, end).tensor == i) {
            end++;
        }
        sums[i] = node_sum(t->squares + at, end - at);
        at = end;
    }
    return sqrtf(node_sum(sums, n_tensors));
}

typedef struct Update {
    Trainer *t;
    float clip;
} Update;

static void update_region(void *user, unsigned thread, unsigned n_threads)
{
    const Update *u = user;
    Trainer *t = u->t;
    const TrainKernels *k = &t->o.kernels->train;
    for (uint32_t i = 0; i < t->o.spec->n_tensors; i++) {
        const TensorSpec *tensor = &t->o.spec->tensors[i];
        const size_t n = (size_t)tensor->rows * tensor->columns, a = n * thread / n_threads,
                     some = n * (thread + 1) / n_threads - a;
        const bool decays = tensor->rows > 1;
        float *w = t->weights->tensors[i] + a, *m = t->first->tensors[i] + a;
        const float *g = t->gradients->tensors[i] + a;
        if (t->o.optimizer.kind == OPTIMIZER_ADAMW) {
            const AdamwScalars s = schedule_adamw(&t->o.optimizer, t->step, u->clip, decays);
            k->adamw(&s, some, g, m, t->second->tensors[i] + a, w);
        } else {
            const SgdScalars s = schedule_sgd(&t->o.optimizer, t->step, u->clip, decays);
            k->sgd(&s, some, g, m, w);
        }
    }
}

bool trainer_step(Trainer *t, TrainerStep *out, GError **error)
{
    gradient_fold_give(t->fold, g_steal_pointer(&t->gradients));
    t->valid = 0;
    if (!fold_leaves(t, error)) {
        return false;
    }
    Finish finish = {t, power_of_batch(t), (float)MAX(t->valid, 1)};
    pool_run(t->o.pool, finish_region, &finish);
    pool_float_control();
    const float norm = gradient_norm(t);
    if (!isfinite(norm)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                    "step %" G_GUINT64_FORMAT
                    ": the gradient's norm is %g; lower the learning rate",
                    t->step, (double)norm);
        return false;
    }
    *out = (TrainerStep){.step = t->step,
                         .samples_seen = (t->step + 1) * t->o.sequences,
                         .loss = node_sum(t->sample_losses, t->o.sequences) / finish.tokens,
                         .rate = (float)schedule_rate(&t->o.optimizer, t->step),
                         .gradient_norm = norm};
    Update update = {t, schedule_clip(&t->o.optimizer, norm)};
    pool_run(t->o.pool, update_region, &update);
    t->step++;
    return true;
}

float trainer_validate(Trainer *t, const TokenData *data, uint64_t samples)
{
    const uint64_t n = MIN(samples, token_data_windows(data));
    double sum = 0.0;
    t->valid = 0;
    for (uint64_t i = 0; i < n; i++) {
        const TrainBatch batch = read_batch(t, data, &i, 1);
        training_forward(t->training, &batch, t->losses);
        sum += (double)sample_loss(t, 0);
    }
    return (float)(sum / (double)MAX(t->valid, 1));
}

const Parameters *trainer_weights(const Trainer *t)
{
    return t->weights;
}

const Parameters *trainer_gradients(const Trainer *t)
{
    return t->gradients;
}

Hash128 trainer_digest(const Trainer *t)
{
    Hasher *all = hasher_new(), *tensor = hasher_new();
    for (uint32_t i = 0; i < t->tiles->len; i++) {
        const Tile *tile = &g_array_index(t->tiles, Tile, i);
        const size_t ld = t->o.spec->tensors[tile->tensor].columns;
        const float *x = tensor_of(t->weights, tile) + tile->rect.row0 * ld + tile->rect.col0;
        Hasher *h = hasher_new();
        for (uint32_t r = 0; r < tile->rect.n_rows; r++) { /* x86: little-endian already */
            hasher_update(h, x + r * ld, tile->rect.n_cols * sizeof(float));
        }
        const Hash128 hash = hasher_finish(h);
        hasher_free(h);
        hasher_update(tensor, hash.bytes, sizeof hash.bytes);
        if (i + 1 == t->tiles->len || tile[1].tensor != tile->tensor) {
            const Hash128 whole = hasher_finish(tensor);
            hasher_update(all, whole.bytes, sizeof whole.bytes);
            hasher_free(tensor);
            tensor = hasher_new();
        }
    }
    const Hash128 digest = hasher_finish(all);
    hasher_free(tensor);
    hasher_free(all);
    return digest;
}
