#include "coordinator/train/train_want.h"

#include "proto/base/error.h"

TrainWant *train_want_new(const Weft__V1__TrainWant *m)
{
    const Weft__V1__TrainRect *r = m->rect;
    TrainWant *w = g_new0(TrainWant, 1);
    *w = (TrainWant){.id = m->id,
                     .validation = m->validation,
                     .first = m->first,
                     .n = MIN(m->n, TRAIN_WANT_LIMIT)};
    if (r != NULL) {
        w->tensor = g_strdup(m->tensor);
        w->rect = (SliceRect){r->row0, r->n_rows, r->col0, r->n_cols};
    }
    return w;
}

static bool read_floats(TrainWant *w, const TrainInput *input, const Checkpoint *from)
{
    const SliceRect rect = w->rect;
    if ((uint64_t)rect.n_rows * rect.n_cols != w->n) {
        return false;
    }
    return from != NULL ? checkpoint_read(from, w->tensor, rect, w->data, rect.n_cols, &w->error)
                        : train_input_weights(input, w->tensor, rect, w->data, &w->error);
}

void train_want_read(TrainWant *w, const TrainInput *input, const Checkpoint *from)
{
    w->size = w->n * sizeof(uint32_t);
    w->data = g_malloc(MAX(w->size, 1));
    const bool ok = w->tensor != NULL
                        ? read_floats(w, input, from)
                        : train_input_tokens(input, w->validation, w->first, w->n, w->data);
    if (!ok && w->error == NULL) {
        w->error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                       "it asks for data that is not there");
    }
}

void train_want_free(TrainWant *w)
{
    if (w != NULL) {
        g_free(w->data);
        g_free(w->tensor);
        g_clear_error(&w->error);
        g_free(w);
    }
}
