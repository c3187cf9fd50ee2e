#include "worker/train/optimizer.h"

#include "proto/base/checked.h"

#include <math.h>

/* A row block of a piece, or a tile of a vector: small enough for the second-level cache, so that
 * what is finished is there for its squares. */
typedef struct FinishBlock {
    uint32_t tensor;
    size_t at, n;                   /* floats in the arena */
    uint32_t first_tile, last_tile; /* [first, last) */
} FinishBlock;

struct Optimizer {
    OptimizerOptions o;
    GArray *blocks;              /* of FinishBlock: the reduced pieces */
    size_t n_reduced;            /* floats in them */
    GArray *counted;             /* of uint32_t: tiles that count here; of a device */
    float *first, *second;       /* host memory; of a device, copies */
    float *first_on, *second_on; /* on the device */
    DeviceTile *tiles; /* on the device: counted ones of the running gradient, and their squares */
    float *tile_squares;
};

static float *moments_new(size_t n, GError **error)
{
    return weft_map(MAX(n, 1) * sizeof(float), "an optimizer's moments", error);
}

static bool has_second(const Optimizer *o)
{
    return o->o.settings.kind != OPTIMIZER_SGD;
}

/* The blocks of a piece; *tile: the first tile that may lie in it, then the first behind it. */
static void add_blocks(Optimizer *o, const OwnedPiece *piece, uint32_t *tile)
{
    const Holding *h = o->o.holding;
    const GArray *tiles = o->o.reduced->tiles;
    const bool is_matrix = h->spec->tensors[piece->tensor].rows > 1;
    for (; *tile < tiles->len; (*tile)++) {
        const Tile *t = &g_array_index(tiles, Tile, *tile);
        if (t->tensor < piece->tensor || !holding_covers(h, t->tensor, &t->rect)) {
            continue;
        }
        const size_t at = holding_at(h, t->tensor, t->rect.row0, t->rect.col0);
        if (t->tensor != piece->tensor || at >= piece->at + piece->n) {
            break;
        }
        if (at < piece->at) {
            continue;
        }
        FinishBlock *last =
            o->blocks->len > 0 ? &g_array_index(o->blocks, FinishBlock, o->blocks->len - 1) : NULL;
        if (last != NULL && is_matrix && last->tensor == t->tensor && at < last->at + last->n) {
            last->last_tile = *tile + 1; /* the next unit of columns of the same rows */
            continue;
        }
        const size_t columns = is_matrix ? h->rects[t->tensor].n_cols : t->rect.n_cols;
        const FinishBlock block = {t->tensor, at, t->rect.n_rows * columns, *tile, *tile + 1};
        g_array_append_val(o->blocks, block);
        o->n_reduced += block.n;
    }
}

static void cut_blocks(Optimizer *o)
{
    const GArray *pieces = o->o.reduced->pieces;
    uint32_t tile = 0;
    o->blocks = g_array_new(FALSE, FALSE, sizeof(FinishBlock));
    for (uint32_t i = 0; i < pieces->len; i++) {
        add_blocks(o, &g_array_index(pieces, OwnedPiece, i), &tile);
    }
    g_assert(o->n_reduced == o->o.reduced->n_owned);
}

static bool allocate_on_device(Optimizer *o, GError **error)
{
    DeviceWork *w = o->o.work;
    o->counted = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    for (uint32_t t = 0; t < o->o.reduced->tiles->len; t++) {
        if (ownership_counts(o->o.reduced, t)) {
            g_array_append_val(o->counted, t);
        }
    }
    const size_t bytes = MAX(o->o.stepped->n_owned, 1) * sizeof(float), n = MAX(o->counted->len, 1);
    o->first_on = device_work_alloc(w, bytes, "an optimizer's moments", error);
    o->second_on = o->first_on != NULL && has_second(o)
                       ? device_work_alloc(w, bytes, "an optimizer's moments", error)
                       : NULL;
    o->tiles = device_work_alloc(w, n * sizeof *o->tiles, "tiles", error);
    o->tile_squares = o->tiles != NULL
                          ? device_work_alloc(w, n * sizeof(float), "squares of tiles", error)
                          : NULL;
    return o->first_on != NULL && (!has_second(o) || o->second_on != NULL) &&
           o->tile_squares != NULL;
}

Optimizer *optimizer_new(const OptimizerOptions *options, GError **error)
{
    g_autoptr(Optimizer) o = g_new0(Optimizer, 1);
    o->o = *options;
    cut_blocks(o);
    const size_t n = options->stepped->n_owned;
    o->first = moments_new(n, error);
    o->second = o->first != NULL && has_second(o) ? moments_new(n, error) : NULL;
    if (o->first == NULL || (has_second(o) && o->second == NULL) ||
        (options->work != NULL && !allocate_on_device(o, error))) {
        return NULL;
    }
    return g_steal_pointer(&o);
}

void optimizer_free(Optimizer *o)
{
    if (o == NULL) {
        return;
    }
    const size_t bytes = MAX(o->o.stepped->n_owned, 1) * sizeof(float);
    device_work_release(o->o.work, o->first_on);
    device_work_release(o->o.work, o->second_on);
    device_work_release(o->o.work, o->tiles);
    device_work_release(o->o.work, o->tile_squares);
    if (o->first != NULL) {
        weft_unmap(o->first, bytes);
    }
    if (o->second != NULL) {
        weft_unmap(o->second, bytes);
    }
    g_clear_pointer(&o->counted, g_array_unref);
    g_array_unref(o->blocks);
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

static void finish_block(const Finish *f, const FinishBlock *block)
{
    const Optimizer *o = f->o;
    const Holding *h = o->o.holding;
    const TrainKernels *k = &o->o.kernels->train;
    float *g = f->g->floats + block->at;
    if (f->g->lookup != NULL && h->spec->tensors[block->tensor].role == ROLE_TOKEN_EMBD) {
        o->o.kernels->add(g, f->g->lookup + (block->at - h->offsets[block->tensor]), block->n);
    }
    k->gradient_finish(g, block->n, f->back, f->tokens);
    for (uint32_t t = block->first_tile; t < block->last_tile; t++) {
        if (ownership_counts(o->o.reduced, t)) {
            const SliceRect *rect = &g_array_index(o->o.reduced->tiles, Tile, t).rect;
            f->squares[t] =
                k->sum_squares(f->g->floats + holding_at(h, block->tensor, rect->row0, rect->col0),
                               h->rects[block->tensor].n_cols, rect->n_rows, rect->n_cols);
        }
    }
}

static void finish_region(void *user, unsigned thread, unsigned n_threads)
{
    const Finish *f = user;
    const GArray *blocks = f->o->blocks;
    const size_t first = f->o->n_reduced / n_threads * thread,
                 last = thread + 1 == n_threads ? SIZE_MAX
                                                : f->o->n_reduced / n_threads * (thread + 1);
    for (size_t i = 0, at = 0; i < blocks->len && at < last; i++) {
        const FinishBlock *block = &g_array_index(blocks, FinishBlock, i);
        if (at >= first) {
            finish_block(f, block);
        }
        at += block->n;
    }
}

/* ---- the same on a device ---- */

static void finish_pieces_on_device(const Finish *f)
{
    const Optimizer *o = f->o;
    DeviceWork *w = o->o.work;
    const GArray *pieces = o->o.reduced->pieces;
    for (uint32_t i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        float *g = f->g->floats + piece->at;
        if (f->g->lookup != NULL &&
            o->o.holding->spec->tensors[piece->tensor].role == ROLE_TOKEN_EMBD) {
            const float *lookup = f->g->lookup + (piece->at - o->o.holding->offsets[piece->tensor]);
            device_work_note(w, w->ops->add(w->stream, g, lookup, piece->n), "a gradient's parts");
        }
        device_work_note(w, w->ops->finish(w->stream, g, piece->n, f->back, f->tokens),
                         "dividing gradients");
    }
}

static void finish_on_device(const Finish *f)
{
    const Optimizer *o = f->o;
    const Holding *h = o->o.holding;
    DeviceWork *w = o->o.work;
    const uint32_t n = o->counted->len;
    g_autofree DeviceTile *tiles = g_new(DeviceTile, MAX(n, 1));
    g_autofree float *squares = g_new(float, MAX(n, 1));
    for (uint32_t i = 0; i < n; i++) {
        const Tile *tile =
            &g_array_index(o->o.reduced->tiles, Tile, g_array_index(o->counted, uint32_t, i));
        tiles[i] = (DeviceTile){
            f->g->floats + holding_at(h, tile->tensor, tile->rect.row0, tile->rect.col0),
            h->rects[tile->tensor].n_cols, tile->rect.n_rows, tile->rect.n_cols};
    }
    finish_pieces_on_device(f);
    device_work_up(w, o->tiles, tiles, n * sizeof *tiles);
    if (n > 0) {
        device_work_note(w, w->ops->squares(w->stream, o->tiles, n, o->tile_squares),
                         "squares of gradients");
    }
    if (device_work_down(w, squares, o->tile_squares, n * sizeof *squares)) {
        for (uint32_t i = 0; i < n; i++) {
            f->squares[g_array_index(o->counted, uint32_t, i)] = squares[i];
        }
    }
}

void optimizer_finish(Optimizer *o, Parameters *g, float back, float tokens, float *squares)
{
    Finish f = {o, g, back, tokens, squares};
    if (o->o.work != NULL) {
        finish_on_device(&f);
        return;
    }
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

static void update_on_device(const Update *u)
{
    const Optimizer *o = u->o;
    const OptimizerSettings *settings = &o->o.settings;
    DeviceWork *w = o->o.work;
    const GArray *pieces = o->o.stepped->pieces;
    for (uint32_t i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        const bool decays = schedule_decays(settings, &o->o.holding->spec->tensors[piece->tensor]);
        float *weights = u->weights->floats + piece->at, *m = o->first_on + piece->kept;
        const float *g = u->g->floats + piece->at;
        DeviceStatus status;
        if (settings->kind == OPTIMIZER_SGD) {
            const SgdScalars s = schedule_sgd(settings, u->step, u->clip, decays);
            status = w->ops->sgd(w->stream, &s, piece->n, g, m, weights);
        } else {
            const AdamwScalars s = schedule_adamw(settings, u->step, u->clip, decays);
            status =
                w->ops->adamw(w->stream, &s, piece->n, g, m, o->second_on + piece->kept, weights);
        }
        device_work_note(w, status, "the optimizer's step");
    }
}

void optimizer_update(Optimizer *o, uint64_t step, float clip, const Parameters *g,
                      Parameters *weights)
{
    Update u = {o, step, clip, g, weights};
    if (o->o.work != NULL) {
        update_on_device(&u);
        return;
    }
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

void optimizer_copy_down(Optimizer *o)
{
    const size_t bytes = o->o.stepped->n_owned * sizeof(float);
    device_work_down(o->o.work, o->first, o->first_on, bytes);
    if (o->second != NULL) {
        device_work_down(o->o.work, o->second, o->second_on, bytes);
    }
}

void optimizer_copy_up(Optimizer *o)
{
    const size_t bytes = o->o.stepped->n_owned * sizeof(float);
    device_work_up(o->o.work, o->first_on, o->first, bytes);
    if (o->second != NULL) {
        device_work_up(o->o.work, o->second_on, o->second, bytes);
    }
}
