#include "coordinator/train/train_part.h"

#include "proto/base/error.h"

#include <string.h>

static bool refuse(GError **error, const char *what, const char *tensor)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "a checkpoint's piece of %s %s", tensor,
                what);
    return false;
}

static const TensorSpec *find_tensor(const ModelSpec *spec, const char *name)
{
    const char *slash = strchr(name, '/');
    const size_t kind = slash != NULL ? (size_t)(slash - name) : 0;
    const bool known = (kind == 7 && strncmp(name, "weights", 7) == 0) ||
                       (kind == 5 && strncmp(name, "first", 5) == 0) ||
                       (kind == 6 && strncmp(name, "second", 6) == 0);
    for (uint32_t i = 0; known && i < spec->n_tensors; i++) {
        if (strcmp(spec->tensors[i].name, slash + 1) == 0) {
            return &spec->tensors[i];
        }
    }
    return NULL;
}

static bool add_place(TrainPart *p, const ModelSpec *spec, const Weft__V1__TrainPlace *m,
                      GError **error)
{
    const TensorSpec *t = find_tensor(spec, m->tensor);
    const Weft__V1__TrainRect *r = m->rect;
    if (t == NULL || r == NULL || r->n_rows == 0 || r->n_cols == 0 || r->row0 > t->rows ||
        r->n_rows > t->rows - r->row0 || r->col0 > t->columns || r->n_cols > t->columns - r->col0) {
        return refuse(error, "does not lie in the model", m->tensor);
    }
    const CheckpointPiece piece = {.tensor = g_strdup(m->tensor),
                                   .rows = t->rows,
                                   .columns = t->columns,
                                   .rect = {r->row0, r->n_rows, r->col0, r->n_cols},
                                   .ld = r->n_cols};
    g_array_append_val(p->pieces, piece);
    return true;
}

TrainPart *train_part_new(const ModelSpec *spec, const Weft__V1__TrainPartBegin *begin,
                          GError **error)
{
    TrainPart *p = g_new0(TrainPart, 1);
    p->step = begin->step;
    p->pieces = g_array_new(FALSE, TRUE, sizeof(CheckpointPiece));
    for (size_t i = 0; i < begin->n_places; i++) {
        if (!add_place(p, spec, begin->places[i], error)) {
            train_part_free(p);
            return NULL;
        }
    }
    return p;
}

void train_part_free(void *part)
{
    TrainPart *p = part;
    if (p == NULL) {
        return;
    }
    for (guint i = 0; i < p->pieces->len; i++) {
        g_free((char *)g_array_index(p->pieces, CheckpointPiece, i).tensor);
    }
    g_array_unref(p->pieces);
    g_free(p);
}

bool train_part_add(TrainPart *p, const Weft__V1__TrainPiece *m, GError **error)
{
    if (p == NULL || p->whole || p->at == p->pieces->len) {
        return refuse(error, "was not announced", m->tensor);
    }
    const CheckpointPiece *next = &g_array_index(p->pieces, CheckpointPiece, p->at);
    const size_t total = (size_t)next->rect.n_rows * next->rect.n_cols,
                 n = m->data.len / sizeof(float);
    const bool ends = n == total - p->filled;
    if (strcmp(next->tensor, m->tensor) != 0 || m->offset != p->filled ||
        m->data.len % sizeof(float) != 0 || n > total - p->filled ||
        !(ends || m->data.len >= TRAIN_PIECE_LEAST)) {
        return refuse(error, "is not the next one", m->tensor);
    }
    p->filled = ends ? 0 : p->filled + n;
    p->at += ends;
    return true;
}

bool train_part_end(TrainPart *p, const Weft__V1__TrainPart *end, GError **error)
{
    if (p == NULL || p->whole || p->at < p->pieces->len || end->step != p->step ||
        end->digest.len != sizeof p->digest.bytes || end->state == NULL) {
        return refuse(error, "is not whole", "its end");
    }
    p->whole = true;
    p->state = (CheckpointState){.step = end->step,
                                 .samples = end->samples,
                                 .updates = end->state->updates,
                                 .loss_scale = (double)end->state->scale,
                                 .scale_growth = end->state->good,
                                 .scale_hysteresis = end->state->hysteresis};
    memcpy(p->digest.bytes, end->digest.data, sizeof p->digest.bytes);
    return true;
}
