#include "worker/train/train_snapshot.h"

#include "proto/base/checked.h"

#include <string.h>

static const char *const PARTS[] = {"weights", "first", "second"};

/* Where the floats of a piece lie in the rank; NULL: its optimizer has no such moment. */
static float *piece_floats(TrainRank *rank, const OwnedPiece *piece, unsigned part)
{
    Optimizer *optimizer = train_rank_optimizer(rank);
    float *moments = part == 1   ? optimizer_first(optimizer)
                     : part == 2 ? optimizer_second(optimizer)
                                 : NULL;
    if (part == 0) {
        return train_rank_weights(rank)->floats + piece->at;
    }
    return moments != NULL ? moments + piece->kept : NULL;
}

static size_t rect_floats(const SliceRect *r)
{
    return (size_t)r->n_rows * r->n_cols;
}

static void take_piece(TrainSnapshot *s, const TensorSpec *tensor, const OwnedPiece *piece,
                       unsigned part, const float *from, size_t *at)
{
    char *name = g_strdup_printf("%s/%s", PARTS[part], tensor->name);
    const size_t n = rect_floats(&piece->rect);
    memcpy(s->floats + *at, from, n * sizeof *from);
    s->pieces[s->n_pieces++] = (CheckpointPiece){.tensor = name,
                                                 .rows = tensor->rows,
                                                 .columns = tensor->columns,
                                                 .rect = piece->rect,
                                                 .data = s->floats + *at,
                                                 .ld = piece->rect.n_cols};
    g_ptr_array_add(s->names, name);
    *at += n;
}

TrainSnapshot *train_snapshot_take(TrainRank *rank, const ModelSpec *spec, uint64_t samples,
                                   const Hash128 *digest, GError **error)
{
    const GArray *pieces = train_rank_ownership(rank)->pieces;
    size_t n = 0, at = 0;
    if (!train_rank_settle(rank, error)) {
        return NULL;
    }
    TrainSnapshot *s = g_new0(TrainSnapshot, 1);
    for (guint i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        n += piece->counts ? rect_floats(&piece->rect) : 0;
    }
    s->at = *train_rank_progress(rank);
    s->samples = samples;
    s->digest = *digest;
    s->names = g_ptr_array_new_with_free_func(g_free);
    s->pieces = g_new0(CheckpointPiece, G_N_ELEMENTS(PARTS) * MAX(pieces->len, 1));
    const size_t parts = optimizer_second(train_rank_optimizer(rank)) != NULL ? 3 : 2;
    s->floats = weft_alloc(parts * MAX(n, 1), sizeof *s->floats, "a checkpoint's part", error);
    if (s->floats == NULL) {
        train_snapshot_free(s);
        return NULL;
    }
    for (guint i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        for (unsigned part = 0; piece->counts && part < G_N_ELEMENTS(PARTS); part++) {
            const float *from = piece_floats(rank, piece, part);
            if (from != NULL) {
                take_piece(s, &spec->tensors[piece->tensor], piece, part, from, &at);
            }
        }
    }
    return s;
}

void train_snapshot_free(TrainSnapshot *s)
{
    if (s == NULL) {
        return;
    }
    g_ptr_array_unref(s->names);
    g_free(s->pieces);
    weft_free(s->floats);
    g_free(s);
}

bool train_snapshot_read_weights(TrainRank *rank, const ModelSpec *spec, TrainRead read, void *user,
                                 GError **error)
{
    Parameters *weights = train_rank_weights_to_restore(rank);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const SliceRect rect = weights->holding->rects[i];
        g_autofree char *name = g_strdup_printf("%s/%s", PARTS[0], spec->tensors[i].name);
        if (holding_has(weights->holding, i) &&
            !read(user, name, rect, weights->tensors[i], rect.n_cols, error)) {
            return false;
        }
    }
    return true;
}

bool train_snapshot_restore(TrainRank *rank, const ModelSpec *spec, const TrainProgress *progress,
                            TrainRead read, void *user, GError **error)
{
    const GArray *pieces = train_rank_ownership(rank)->pieces;
    if (!train_snapshot_read_weights(rank, spec, read, user, error)) {
        return false;
    }
    for (guint i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        for (unsigned part = 1; part < G_N_ELEMENTS(PARTS); part++) {
            float *to = piece_floats(rank, piece, part);
            g_autofree char *name =
                g_strdup_printf("%s/%s", PARTS[part], spec->tensors[piece->tensor].name);
            if (to != NULL && !read(user, name, piece->rect, to, piece->rect.n_cols, error)) {
                return false;
            }
        }
    }
    train_rank_restore(rank, progress);
    return true;
}
