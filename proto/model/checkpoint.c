/* The manifest is {"checkpoint": {...}, "xxh3_128": H}: H is the hash of the inner object's compact
 * text with sorted keys, so that white space is free and any other change is seen. Whoever writes
 * the manifest (coordinator/train/checkpoint.c) does so last, in a folder that gets its name only
 * then: a folder with a name and without a whole manifest was damaged afterwards. */
#include "proto/model/checkpoint.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/model/model_json.h"
#include "proto/model/safetensors.h"

#include <stdlib.h>
#include <string.h>

#define VERSION 1
#define MANIFEST_LIMIT (64u << 20)
#define FILES_LIMIT 4096u
#define STEP_DIGITS 10

typedef struct Piece {
    CheckpointPiece at; /* tensor: owned */
    const uint8_t *bytes;
} Piece;

struct Checkpoint {
    char *path;
    CheckpointState state;
    ModelSpec *model;
    GPtrArray *files; /* Safetensors, those of them that hold pieces */
    GArray *pieces;   /* Piece, sorted by tensor, then place */
};

static bool damaged(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

static bool damaged(GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_INVALID, what);
    return false;
}

/* ---- names ---- */

char *checkpoint_name(uint64_t step)
{
    return g_strdup_printf("step-%0*" G_GUINT64_FORMAT, STEP_DIGITS, step);
}

char *checkpoint_piece_name(const CheckpointPiece *p)
{
    const SliceRect r = p->rect;
    return r.n_rows == p->rows && r.n_cols == p->columns
               ? g_strdup(p->tensor)
               : g_strdup_printf("%s[%u:%u,%u:%u]", p->tensor, r.row0, r.row0 + r.n_rows, r.col0,
                                 r.col0 + r.n_cols);
}

static int compare_steps(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

GArray *checkpoint_steps(const char *directory)
{
    GArray *steps = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    g_autoptr(GDir) dir = g_dir_open(directory, 0, NULL);
    for (const char *name; dir != NULL && (name = g_dir_read_name(dir)) != NULL;) {
        if (!g_str_has_prefix(name, "step-")) {
            continue;
        }
        char *end;
        const uint64_t step = g_ascii_strtoull(name + 5, &end, 10);
        g_autofree char *proper = checkpoint_name(step);
        if (*end == '\0' && strcmp(proper, name) == 0) {
            g_array_append_val(steps, step);
        }
    }
    g_array_sort(steps, compare_steps);
    return steps;
}

/* ---- pieces ---- */

static int compare_pieces(const void *a, const void *b)
{
    const CheckpointPiece *x = &((const Piece *)a)->at, *y = &((const Piece *)b)->at;
    const int order = strcmp(x->tensor, y->tensor);
    if (order != 0) {
        return order;
    }
    if (x->rect.row0 != y->rect.row0) {
        return x->rect.row0 > y->rect.row0 ? 1 : -1;
    }
    return (x->rect.col0 > y->rect.col0) - (x->rect.col0 < y->rect.col0);
}

static bool spans_meet(uint32_t a, uint32_t n_a, uint32_t b, uint32_t n_b)
{
    return a < b + n_b && b < a + n_a;
}

static bool rects_meet(SliceRect a, SliceRect b)
{
    return spans_meet(a.row0, a.n_rows, b.row0, b.n_rows) &&
           spans_meet(a.col0, a.n_cols, b.col0, b.n_cols);
}

static bool is_inside(SliceRect r, uint32_t rows, uint32_t columns)
{
    return r.n_rows > 0 && r.n_cols > 0 && r.row0 < rows && r.n_rows <= rows - r.row0 &&
           r.col0 < columns && r.n_cols <= columns - r.col0;
}

/* Pieces [first, last) of one tensor cover it exactly once. */
static bool check_cover(const Piece *pieces, size_t n, GError **error)
{
    const CheckpointPiece *whole = &pieces[0].at;
    uint64_t area = 0;
    for (size_t i = 0; i < n; i++) {
        const CheckpointPiece *p = &pieces[i].at;
        if (p->rows != whole->rows || p->columns != whole->columns ||
            !is_inside(p->rect, p->rows, p->columns)) {
            return damaged(error, "a piece of tensor %s does not lie in it", p->tensor);
        }
        area += (uint64_t)p->rect.n_rows * p->rect.n_cols;
        /* Sorted by row: those that can meet this one follow it. */
        for (size_t j = i + 1; j < n && pieces[j].at.rect.row0 < p->rect.row0 + p->rect.n_rows;
             j++) {
            if (rects_meet(p->rect, pieces[j].at.rect)) {
                return damaged(error, "two pieces of tensor %s overlap", p->tensor);
            }
        }
    }
    return area == (uint64_t)whole->rows * whole->columns ||
           damaged(error, "the pieces of tensor %s have %" G_GUINT64_FORMAT " of %u x %u elements",
                   whole->tensor, area, whole->rows, whole->columns);
}

static bool check_pieces(GArray *pieces, GError **error)
{
    g_array_sort(pieces, compare_pieces);
    const Piece *all = (const Piece *)(void *)pieces->data;
    for (size_t first = 0, last; first < pieces->len; first = last) {
        for (last = first + 1;
             last < pieces->len && strcmp(all[last].at.tensor, all[first].at.tensor) == 0; last++) {
        }
        if (!check_cover(all + first, last - first, error)) {
            return false;
        }
    }
    return true;
}

/* Pieces of `tensor`; *n of them, NULL if there are none. */
static const Piece *find_pieces(const Checkpoint *c, const char *tensor, size_t *n)
{
    const Piece *all = (const Piece *)(void *)c->pieces->data;
    size_t low = 0, high = c->pieces->len;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (strcmp(all[middle].at.tensor, tensor) < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (high = low; high < c->pieces->len && strcmp(all[high].at.tensor, tensor) == 0; high++) {
    }
    *n = high - low;
    return *n > 0 ? all + low : NULL;
}

/* ---- writing ---- */

char *checkpoint_part_json(const CheckpointFile *file, const CheckpointPiece *pieces, size_t n)
{
    char hex[33];
    hash128_hex(&file->hash, hex);
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) {
        const CheckpointPiece *p = &pieces[i];
        const SliceRect r = p->rect;
        json_array_append_new(list, json_pack("{s:s,s:[I,I],s:[I,I,I,I]}", "tensor", p->tensor,
                                              "shape", (json_int_t)p->rows, (json_int_t)p->columns,
                                              "rect", (json_int_t)r.row0, (json_int_t)r.n_rows,
                                              (json_int_t)r.col0, (json_int_t)r.n_cols));
    }
    json_t *part = json_pack("{s:s,s:I,s:s,s:o}", "name", file->name, "size",
                             (json_int_t)file->size, "hash", hex, "pieces", list);
    char *text = json_dumps(part, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(part);
    char *copy = g_strdup(text);
    free(text);
    return copy;
}

static json_t *state_json(const CheckpointState *s)
{
    json_t *o = json_pack("{s:I,s:I,s:I,s:f,s:I,s:I}", "step", (json_int_t)s->step, "samples",
                          (json_int_t)s->samples, "updates", (json_int_t)s->updates, "loss_scale",
                          s->loss_scale, "scale_growth", (json_int_t)s->scale_growth,
                          "scale_hysteresis", (json_int_t)s->scale_hysteresis);
    const char *const texts[][2] = {
        {"job", s->job}, {"definition", s->definition}, {"weights_digest", s->weights_digest}};
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        if (texts[i][1] != NULL) {
            json_object_set_new(o, texts[i][0], json_string(texts[i][1]));
        }
    }
    return o;
}

static void inner_hash(const json_t *inner, char hex[33])
{
    char *text = json_dumps(inner, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    const Hash128 hash = hash128(text, strlen(text));
    free(text);
    hash128_hex(&hash, hex);
}

static void piece_clear(gpointer piece)
{
    g_free((char *)((Piece *)piece)->at.tensor);
}

static bool read_u32(const json_t *value, uint32_t *out)
{
    const json_int_t n = json_is_integer(value) ? json_integer_value(value) : -1;
    *out = n >= 0 && n <= G_MAXUINT32 ? (uint32_t)n : 0;
    return n >= 0 && n <= G_MAXUINT32;
}

/* tensor, shape and rect of a piece; its tensor's name is copied. */
static bool read_piece(const json_t *value, Piece *out, GError **error)
{
    const char *tensor = json_string_value(json_object_get(value, "tensor"));
    const json_t *shape = json_object_get(value, "shape"), *rect = json_object_get(value, "rect");
    CheckpointPiece *p = &out->at;
    if (tensor == NULL || !read_u32(json_array_get(shape, 0), &p->rows) ||
        !read_u32(json_array_get(shape, 1), &p->columns) ||
        !read_u32(json_array_get(rect, 0), &p->rect.row0) ||
        !read_u32(json_array_get(rect, 1), &p->rect.n_rows) ||
        !read_u32(json_array_get(rect, 2), &p->rect.col0) ||
        !read_u32(json_array_get(rect, 3), &p->rect.n_cols) ||
        !is_inside(p->rect, p->rows, p->columns)) {
        return damaged(error, "a piece is not described by tensor, shape and a rect in it");
    }
    p->tensor = g_strdup(tensor);
    return true;
}

static GArray *pieces_new(void)
{
    GArray *pieces = g_array_new(FALSE, FALSE, sizeof(Piece));
    g_array_set_clear_func(pieces, piece_clear);
    return pieces;
}

static bool parts_cover(const json_t *files, GError **error)
{
    g_autoptr(GArray) pieces = pieces_new();
    for (size_t f = 0; f < json_array_size(files); f++) {
        const json_t *list = json_object_get(json_array_get(files, f), "pieces");
        for (size_t i = 0; i < json_array_size(list); i++) {
            Piece piece = {0};
            if (!read_piece(json_array_get(list, i), &piece, error)) {
                return false;
            }
            g_array_append_val(pieces, piece);
        }
    }
    return check_pieces(pieces, error);
}

char *checkpoint_manifest(const CheckpointState *state, const ModelSpec *model,
                          const char *const *parts, size_t n_parts, GError **error)
{
    json_t *files = json_array();
    bool ok = true;
    for (size_t i = 0; ok && i < n_parts; i++) {
        json_t *part = json_loads(parts[i], JSON_REJECT_DUPLICATES, NULL);
        ok = part != NULL || damaged(error, "part %zu of a checkpoint is no JSON", i);
        json_array_append_new(files, part);
    }
    if (!ok || !parts_cover(files, error)) {
        json_decref(files);
        return NULL;
    }
    char hex[33];
    json_t *inner = json_pack("{s:i,s:o,s:o,s:o}", "version", VERSION, "state", state_json(state),
                              "model", model_to_json(model), "files", files);
    inner_hash(inner, hex);
    json_t *outer = json_pack("{s:o,s:s}", "checkpoint", inner, "xxh3_128", hex);
    char *text = json_dumps(outer, JSON_INDENT(1) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    json_decref(outer);
    char *copy = g_strdup(text);
    free(text);
    return copy;
}

/* ---- reading ---- */

static json_t *read_manifest(const char *path, GError **error)
{
    g_autofree char *file = g_build_filename(path, CHECKPOINT_MANIFEST, NULL);
    g_autoptr(GMappedFile) mapping = g_mapped_file_new(file, FALSE, NULL);
    const size_t size = mapping != NULL ? g_mapped_file_get_length(mapping) : 0;
    if (size == 0 || size > MANIFEST_LIMIT) {
        damaged(error, "its " CHECKPOINT_MANIFEST " is missing, empty or above 64 MiB");
        return NULL;
    }
    json_error_t why;
    json_t *outer =
        json_loadb(g_mapped_file_get_contents(mapping), size, JSON_REJECT_DUPLICATES, &why);
    json_t *inner = json_incref(json_object_get(outer, "checkpoint"));
    const char *wanted = json_string_value(json_object_get(outer, "xxh3_128"));
    char hex[33] = "";
    if (outer == NULL) {
        damaged(error, "its " CHECKPOINT_MANIFEST " is no JSON: %.80s", why.text);
    } else if (inner == NULL || wanted == NULL) {
        damaged(error, "its " CHECKPOINT_MANIFEST " is no manifest of a checkpoint");
    } else {
        inner_hash(inner, hex);
        if (strcmp(hex, wanted) != 0) {
            damaged(error, "its " CHECKPOINT_MANIFEST " has the hash %s, not %.32s", hex, wanted);
        }
    }
    const bool ok = wanted != NULL && strcmp(hex, wanted) == 0;
    json_decref(outer);
    if (!ok) {
        g_clear_pointer(&inner, json_decref);
    }
    return inner;
}

static char *take_text(const json_t *o, const char *key)
{
    return g_strdup(json_string_value(json_object_get(o, key)));
}

static uint64_t take_count(const json_t *o, const char *key)
{
    return (uint64_t)MAX(json_integer_value(json_object_get(o, key)), 0);
}

static void read_state(CheckpointState *s, const json_t *o)
{
    s->step = take_count(o, "step");
    s->samples = take_count(o, "samples");
    s->updates = take_count(o, "updates");
    s->loss_scale = json_number_value(json_object_get(o, "loss_scale"));
    s->scale_growth = take_count(o, "scale_growth");
    s->scale_hysteresis = json_integer_value(json_object_get(o, "scale_hysteresis"));
    s->job = take_text(o, "job");
    s->definition = take_text(o, "definition");
    s->weights_digest = take_text(o, "weights_digest");
}

/* Sizes and hash of a file as recorded; its bytes. */
static GMappedFile *open_file(const Checkpoint *c, const json_t *entry, const char *name,
                              GError **error)
{
    g_autofree char *path = g_build_filename(c->path, name, NULL);
    g_autoptr(GMappedFile) mapping = g_mapped_file_new(path, FALSE, NULL);
    const uint64_t size = take_count(entry, "size");
    if (mapping == NULL) {
        damaged(error, "its file %s is missing", name);
        return NULL;
    }
    if (g_mapped_file_get_length(mapping) != size) {
        damaged(error, "its file %s has %zu bytes, not %" G_GUINT64_FORMAT, name,
                g_mapped_file_get_length(mapping), size);
        return NULL;
    }
    char hex[33];
    const char *bytes = g_mapped_file_get_contents(mapping);
    const Hash128 hash = hash128(bytes != NULL ? bytes : "", size);
    const char *wanted = json_string_value(json_object_get(entry, "hash"));
    hash128_hex(&hash, hex);
    if (g_strcmp0(wanted, hex) != 0) {
        damaged(error, "its file %s has the hash %s, not %.32s", name, hex,
                wanted != NULL ? wanted : "");
        return NULL;
    }
    return g_steal_pointer(&mapping);
}

static bool place_piece(const Safetensors *file, Piece *piece, GError **error)
{
    g_autofree char *name = checkpoint_piece_name(&piece->at);
    const SafetensorsTensor *t = safetensors_find(file, name);
    const uint64_t size = (uint64_t)piece->at.rect.n_rows * piece->at.rect.n_cols * sizeof(float);
    if (t == NULL || t->type != DTYPE_F32 || t->size_bytes != size) {
        return damaged(error, "piece %s is not in its file as recorded", name);
    }
    piece->bytes = t->data;
    return true;
}

static bool read_file(Checkpoint *c, const json_t *entry, GError **error)
{
    const char *name = json_string_value(json_object_get(entry, "name"));
    const json_t *list = json_object_get(entry, "pieces");
    if (name == NULL || name[0] == '.' || strchr(name, '/') != NULL) {
        return damaged(error, "a file's name is no plain name");
    }
    g_autoptr(GMappedFile) checked = open_file(c, entry, name, error);
    if (checked == NULL) {
        return false;
    }
    if (json_array_size(list) == 0) {
        return true;
    }
    g_autofree char *path = g_build_filename(c->path, name, NULL);
    Safetensors *file = safetensors_open(path, error);
    if (file == NULL) {
        return false;
    }
    g_ptr_array_add(c->files, file);
    for (size_t i = 0; i < json_array_size(list); i++) {
        Piece piece = {0};
        if (!read_piece(json_array_get(list, i), &piece, error)) {
            return false;
        }
        const bool placed = place_piece(file, &piece, error);
        g_array_append_val(c->pieces, piece);
        if (!placed) {
            return false;
        }
    }
    return true;
}

static bool check_weights(const Checkpoint *c, GError **error)
{
    for (uint32_t i = 0; i < c->model->n_tensors; i++) {
        const TensorSpec *t = &c->model->tensors[i];
        g_autofree char *name = g_strconcat("weights/", t->name, NULL);
        if (!checkpoint_has(c, name, t->rows, t->columns)) {
            return damaged(error, "it has no tensor %s of %u x %u", name, t->rows, t->columns);
        }
    }
    return true;
}

static bool read_inner(Checkpoint *c, const json_t *inner, GError **error)
{
    const json_int_t version = json_integer_value(json_object_get(inner, "version"));
    const json_t *files = json_object_get(inner, "files");
    if (version != VERSION) {
        return damaged(error, "it has version %lld; this release reads %d", (long long)version,
                       VERSION);
    }
    if (json_array_size(files) < 1 || json_array_size(files) > FILES_LIMIT) {
        return damaged(error, "it lists %zu files", json_array_size(files));
    }
    read_state(&c->state, json_object_get(inner, "state"));
    c->model = model_from_json(json_object_get(inner, "model"), error);
    for (size_t i = 0; c->model != NULL && i < json_array_size(files); i++) {
        if (!read_file(c, json_array_get(files, i), error)) {
            return false;
        }
    }
    return c->model != NULL && check_pieces(c->pieces, error) && check_weights(c, error);
}

Checkpoint *checkpoint_open(const char *path, GError **error)
{
    if (!g_file_test(path, G_FILE_TEST_IS_DIR)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "checkpoint %s is not there; name a folder step-...", path);
        return NULL;
    }
    g_autoptr(Checkpoint) c = g_new0(Checkpoint, 1);
    c->path = g_strdup(path);
    c->files = g_ptr_array_new_with_free_func((GDestroyNotify)safetensors_free);
    c->pieces = pieces_new();
    json_t *inner = read_manifest(path, error);
    const bool ok = inner != NULL && read_inner(c, inner, error);
    json_decref(inner);
    if (!ok) {
        g_prefix_error(error, "checkpoint %s is damaged: ", path);
        return NULL;
    }
    return g_steal_pointer(&c);
}

Checkpoint *checkpoint_open_newest(const char *directory, CheckpointDamage damage, void *user,
                                   GError **error)
{
    g_autoptr(GArray) steps = checkpoint_steps(directory);
    for (unsigned i = steps->len; i-- > 0;) {
        g_autofree char *name = checkpoint_name(g_array_index(steps, uint64_t, i));
        g_autofree char *path = g_build_filename(directory, name, NULL);
        g_autoptr(GError) why = NULL;
        Checkpoint *c = checkpoint_open(path, &why);
        if (c != NULL) {
            return c;
        }
        if (damage != NULL) {
            damage(user, why->message);
        }
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                "there is no whole checkpoint in %s (%u looked at); start anew or name another "
                "folder",
                directory, steps->len);
    return NULL;
}

void checkpoint_free(Checkpoint *c)
{
    if (c == NULL) {
        return;
    }
    g_ptr_array_unref(c->files);
    g_array_unref(c->pieces);
    model_spec_free(c->model);
    g_free(c->state.job);
    g_free(c->state.definition);
    g_free(c->state.weights_digest);
    g_free(c->path);
    g_free(c);
}

const char *checkpoint_path(const Checkpoint *c)
{
    return c->path;
}

const CheckpointState *checkpoint_state(const Checkpoint *c)
{
    return &c->state;
}

const ModelSpec *checkpoint_model(const Checkpoint *c)
{
    return c->model;
}

bool checkpoint_has(const Checkpoint *c, const char *tensor, uint32_t rows, uint32_t columns)
{
    size_t n;
    const Piece *pieces = find_pieces(c, tensor, &n);
    return pieces != NULL && pieces[0].at.rows == rows && pieces[0].at.columns == columns;
}

/* What of `piece` lies in `rect`. */
static void copy_common(const Piece *piece, SliceRect rect, float *out, size_t ld)
{
    const SliceRect from = piece->at.rect;
    const uint32_t row0 = MAX(from.row0, rect.row0), col0 = MAX(from.col0, rect.col0),
                   row1 = MIN(from.row0 + from.n_rows, rect.row0 + rect.n_rows),
                   col1 = MIN(from.col0 + from.n_cols, rect.col0 + rect.n_cols);
    for (uint32_t r = row0; col0 < col1 && r < row1; r++) {
        const size_t at = (size_t)(r - from.row0) * from.n_cols + (col0 - from.col0);
        memcpy(out + (size_t)(r - rect.row0) * ld + (col0 - rect.col0),
               piece->bytes + at * sizeof(float), (size_t)(col1 - col0) * sizeof(float));
    }
}

bool checkpoint_read(const Checkpoint *c, const char *tensor, SliceRect rect, float *out, size_t ld,
                     GError **error)
{
    size_t n;
    const Piece *pieces = find_pieces(c, tensor, &n);
    if (pieces == NULL || !is_inside(rect, pieces[0].at.rows, pieces[0].at.columns)) {
        return damaged(error,
                       "checkpoint %s has no rows %u + %u, columns %u + %u of tensor %s; resume "
                       "with the model and the optimizer that wrote it",
                       c->path, rect.row0, rect.n_rows, rect.col0, rect.n_cols, tensor);
    }
    for (size_t i = 0; i < n; i++) {
        copy_common(&pieces[i], rect, out, ld);
    }
    return true;
}
