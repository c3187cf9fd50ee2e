#include "coordinator/train/train_part.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

static void free_floats(void *floats)
{
    weft_free(floats);
}

TrainPart *train_part_new(void)
{
    TrainPart *p = g_new0(TrainPart, 1);
    p->pieces = g_array_new(FALSE, TRUE, sizeof(CheckpointPiece));
    p->memory = g_ptr_array_new_with_free_func(free_floats);
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
    g_ptr_array_unref(p->memory);
    g_free(p);
}

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

static bool begin_piece(TrainPart *p, const ModelSpec *spec, const Weft__V1__TrainPiece *m,
                        GError **error)
{
    const TensorSpec *t = find_tensor(spec, m->tensor);
    const Weft__V1__TrainRect *r = m->rect;
    if (t == NULL || r == NULL || r->n_rows == 0 || r->n_cols == 0 || r->row0 > t->rows ||
        r->n_rows > t->rows - r->row0 || r->col0 > t->columns || r->n_cols > t->columns - r->col0) {
        return refuse(error, "does not lie in the model", m->tensor);
    }
    float *floats =
        weft_alloc((size_t)r->n_rows * r->n_cols, sizeof *floats, "a checkpoint's piece", error);
    if (floats == NULL) {
        return false;
    }
    g_ptr_array_add(p->memory, floats);
    const CheckpointPiece piece = {.tensor = g_strdup(m->tensor),
                                   .rows = t->rows,
                                   .columns = t->columns,
                                   .rect = {r->row0, r->n_rows, r->col0, r->n_cols},
                                   .data = floats,
                                   .ld = r->n_cols};
    g_array_append_val(p->pieces, piece);
    p->filled = 0;
    return true;
}

static size_t floats_of(const CheckpointPiece *piece)
{
    return (size_t)piece->rect.n_rows * piece->rect.n_cols;
}

static const CheckpointPiece *last_piece(const TrainPart *p)
{
    return p->pieces->len > 0 ? &g_array_index(p->pieces, CheckpointPiece, p->pieces->len - 1)
                              : NULL;
}

static bool is_filled(const TrainPart *p)
{
    const CheckpointPiece *last = last_piece(p);
    return last == NULL || p->filled == floats_of(last);
}

bool train_part_add(TrainPart *p, const ModelSpec *spec, const Weft__V1__TrainPiece *m,
                    GError **error)
{
    if (m->offset == 0 && !is_filled(p)) {
        return refuse(error, "came too early", m->tensor);
    }
    if (m->offset == 0 && !begin_piece(p, spec, m, error)) {
        return false;
    }
    const CheckpointPiece *last = last_piece(p);
    const size_t n = m->data.len / sizeof(float);
    if (p->whole || last == NULL || strcmp(last->tensor, m->tensor) != 0 ||
        m->offset != p->filled || m->data.len % sizeof(float) != 0 ||
        n > floats_of(last) - p->filled) {
        return refuse(error, "is not the next one", m->tensor);
    }
    memcpy((float *)p->memory->pdata[p->memory->len - 1] + p->filled, m->data.data, m->data.len);
    p->filled += n;
    return true;
}

bool train_part_end(TrainPart *p, const Weft__V1__TrainPart *end, GError **error)
{
    if (!is_filled(p) || end->digest.len != sizeof p->digest.bytes || end->state == NULL) {
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

/* ---- writing ---- */

static bool write_parts(const TrainWriting *w, CheckpointDisk *disk, uint64_t step,
                        GPtrArray *texts, GError **error)
{
    for (guint i = 0; i < w->parts->len; i++) {
        const TrainPart *p = w->parts->pdata[i];
        if (p->pieces->len == 0) {
            continue;
        }
        char *text = checkpoint_write(disk, w->directory, step, i,
                                      (const CheckpointPiece *)(const void *)p->pieces->data,
                                      p->pieces->len, error);
        if (text == NULL) {
            return false;
        }
        g_ptr_array_add(texts, text);
    }
    if (w->tokenizer_json != NULL) {
        char *text = checkpoint_write_file(disk, w->directory, step, "tokenizer.json",
                                           w->tokenizer_json, strlen(w->tokenizer_json), error);
        if (text == NULL) {
            return false;
        }
        g_ptr_array_add(texts, text);
    }
    return true;
}

bool train_writing_run(const TrainWriting *w, CheckpointDisk *disk, GError **error)
{
    const TrainPart *first = w->parts->pdata[0];
    char digest[33];
    hash128_hex(&first->digest, digest);
    CheckpointState state = first->state;
    state.job = (char *)w->job;
    state.weights_digest = digest;
    for (guint i = 1; i < w->parts->len; i++) {
        const TrainPart *p = w->parts->pdata[i];
        if (p->state.step != state.step || !hash128_equal(&p->digest, &first->digest)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "rank %u is at step %" G_GUINT64_FORMAT
                        " with other weights than the first, "
                        "which is at step %" G_GUINT64_FORMAT,
                        i, p->state.step, state.step);
            return false;
        }
    }
    g_autoptr(GPtrArray) texts = g_ptr_array_new_with_free_func(g_free);
    if (!write_parts(w, disk, state.step, texts, error)) {
        checkpoint_abandon(w->directory, state.step);
        return false;
    }
    return checkpoint_commit(disk, w->directory, &state, w->spec, (const char *const *)texts->pdata,
                             texts->len, w->keep, error);
}
