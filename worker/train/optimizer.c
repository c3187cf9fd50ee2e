#include "worker/train/optimizer.h"

#include "proto/base/checked.h"

#include <math.h>

struct Optimizer {
    OptimizerOptions o;
    GArray *counted; /* of uint32_t: tiles that count here */
    float *first, *second;
};

static float *moments_new(size_t n, GError **error)
{
    return weft_map(MAX(n, 1) * sizeof(float), "an optimizer's moments", error);
}

static bool has_second(const Optimizer *o)
{
    return o->o.settings.kind != OPTIMIZER_SGD;
}

Optimizer *optimizer_new(const OptimizerOptions *options, GError **error)
{
    g_autoptr(Optimizer) o = g_new0(Optimizer, 1);
    o->o = *options;
    o->counted = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    for (uint32_t t = 0; t < options->reduced->tiles->len; t++) {
        if (ownership_counts(options->reduced, t)) {
            g_array_append_val(o->counted, t);
        }
    }
    const size_t n = options->stepped->n_owned;
    o->first = moments_new(n, error);
    o->second = o->first != NULL && has_second(o) ? moments_new(n, error) : NULL;
    return o->first == NULL || (has_second(o) && o->second == NULL) ? NULL : g_steal_pointer(&o);
}

void optimizer_free(Optimizer *o)
{
    if (o == NULL) {
        return;
    }
    const size_t bytes = MAX(o->o.stepped->n_owned, 1) * sizeof(float);
    if (o->first != NULL) {
        weft_unmap(o->first, bytes);
    }
    if (o->second != NULL) {
        weft_unmap(o->second, bytes);
    }
    g_array_unref(o->counted);
    g_free(o);
}

/* Thread `thread`'s share of a piece. */
static size_t share_of(const OwnedPiece *piece, unsigned thread, unsigned n_threads, size_t *n)
{
    const size_t first = piece->n * thread / n_threads;
    *n = piece->n * (thread + 1) / n_threads - first;
    return first;
}

/* ---- gradients ---- */

typedef struct Finish {
    Optimizer *o;
    Parameters *g;
    float back, tokens;
    float *squares;
} Finish;

static void finish_pieces(const Finish *f, unsigned thread, unsigned n_threads)
{
    const Optimizer *o = f->o;
    const GArray *pieces = o->o.reduced->pieces;
    for (uint32_t i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        const TensorRole role = o->o.holding->spec->tensors[piece->tensor].role;
        size_t n;
        const size_t at = piece->at + share_of(piece, thread, n_threads, &n);
        if (f->g->lookup != NULL && role == ROLE_TOKEN_EMBD) {
            o->o.kernels->add(f->g->floats + at,
                              f->g->lookup + (at - o->o.holding->offsets[piece->tensor]), n);
        }
        o->o.kernels->train.gradient_finish(f->g->floats + at, n, f->back, f->tokens);
    }
}

static void finish_region(void *user, unsigned thread, unsigned n_threads)
{
    const Finish *f = user;
    const Optimizer *o = f->o;
    const Holding *h = o->o.holding;
    uint32_t first, last;
    finish_pieces(f, thread, n_threads);
    pool_barrier(o->o.pool);
    pool_share(o->counted->len, 1, thread, n_threads, &first, &last);
    for (uint32_t i = first; i < last; i++) {
        const uint32_t t = g_array_index(o->counted, uint32_t, i);
        const Tile *tile = &g_array_index(o->o.reduced->tiles, Tile, t);
        const float *x =
            f->g->floats + holding_at(h, tile->tensor, tile->rect.row0, tile->rect.col0);
        f->squares[t] = o->o.kernels->train.sum_squares(x, h->rects[tile->tensor].n_cols,
                                                        tile->rect.n_rows, tile->rect.n_cols);
    }
}

void optimizer_finish(Optimizer *o, Parameters *g, float back, float tokens, float *squares)
{
    Finish f = {o, g, back, tokens, squares};
    pool_run(o->o.pool, finish_region, &f);
}

float optimizer_norm(const Optimizer *o, const float *squares)
{
    const GArray *tiles = o->o.reduced->tiles;
    const uint32_t n_tensors = o->o.holding->spec->n_tensors;
    g_autofree float *sums = g_new(float, n_tensors);
    uint32_t at = 0;
    pool_float_control();
    for (uint32_t i = 0; i < n_tensors; i++) {
        uint32_t end = at;
        while (end < tiles->len && g_array_index(tiles, Tile, end).tensor == i) {
            end++;
        }
        sums[i] = node_sum(squares + at, end - at);
        at = end;
    }
    return sqrtf(node_sum(sums, n_tensors));
}

/* ---- the update ---- */

typedef struct Update {
    Optimizer *o;
    uint64_t step;
    float clip;
    const Parameters *g;
    Parameters *weights;
} Update;

static void update_region(void *user, unsigned thread, unsigned n_threads)
{
    const Update *u = user;
    const Optimizer *o = u->o;
    const OptimizerSettings *settings = &o->o.settings;
    const TrainKernels *k = &o->o.kernels->train;
    const GArray *pieces = o->o.stepped->pieces;
    for (uint32_t i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        const bool decays = schedule_decays(settings, &o->o.holding->spec->tensors[piece->tensor]);
        size_t n;
        const size_t own = share_of(piece, thread, n_threads, &n);
        float *w = u->weights->floats + piece->at + own, *m = o->first + piece->kept + own;
        const float *g = u->g->floats + piece->at + own;
        if (settings->kind == OPTIMIZER_SGD) {
            const SgdScalars s = schedule_sgd(settings, u->step, u->clip, decays);
            k->sgd(&s, n, g, m, w);
        } else {
            const AdamwScalars s = schedule_adamw(settings, u->step, u->clip, decays);
            k->adamw(&s, n, g, m, o->second + piece->kept + own, w);
        }
    }
}

void optimizer_update(Optimizer *o, uint64_t step, float clip, const Parameters *g,
                      Parameters *weights)
{
    Update u = {o, step, clip, g, weights};
    pool_run(o->o.pool, update_region, &u);
}

float *optimizer_first(Optimizer *o)
{
    return o->first;
}

float *optimizer_second(Optimizer *o)
{
    return o->second;
}
