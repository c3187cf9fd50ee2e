#include "proto/text/documents.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <jansson.h>
#include <string.h>

#define CUT_BYTES (1u << 20)
#define ROW_LIMIT (16u << 20)
#define COMPLAINTS_LIMIT 16u

/* ---- what a reading hands on ---- */

/* One document; prompt: NULL or read without a loss. */
typedef struct Row {
    const char *prompt, *text;
    size_t prompt_length, length;
} Row;
typedef bool (*RowFn)(void *user, const Row *row, GError **error);

typedef struct Reading {
    const DocumentOptions *o;
    const char *path;
    RowFn row;
    void *user;
    uint64_t rows, bad_rows;
    GPtrArray *complaints;
} Reading;

/* False if it ends the reading. why: taken. */
static bool bad_row(Reading *r, uint64_t line, char *why, GError **error)
{
    g_autofree char *text = why;
    r->bad_rows++;
    if (r->o->stop_at_bad) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: line %" G_GUINT64_FORMAT ": %s; mend the row, or use bad_rows: skip",
                    r->path, line, text);
        return false;
    }
    if (r->complaints != NULL && r->complaints->len < COMPLAINTS_LIMIT) {
        g_ptr_array_add(r->complaints,
                        g_strdup_printf("line %" G_GUINT64_FORMAT ": %s", line, text));
    }
    return true;
}

/* ---- jsonl ---- */

/* A member that is a text; NULL otherwise. */
static const char *member(const json_t *row, const char *name, size_t *length)
{
    const json_t *value = name != NULL ? json_object_get(row, name) : NULL;
    *length = json_string_length(value);
    return json_string_value(value);
}

/* NULL if the row is good. */
static char *take_members(const DocumentOptions *o, const json_t *object, Row *row)
{
    if (!json_is_object(object)) {
        return g_strdup("it is no JSON object");
    }
    *row = (Row){0};
    row->text = member(object, o->text, &row->length);
    if (row->text == NULL) {
        row->prompt = member(object, o->prompt, &row->prompt_length);
        row->text = member(object, o->response, &row->length);
    }
    if (row->text == NULL || (row->prompt == NULL && json_object_get(object, o->text) == NULL)) {
        return g_strdup_printf("it has neither a text '%s' nor '%s' and '%s'", o->text, o->prompt,
                               o->response);
    }
    return row->length == 0 ? g_strdup("its text is empty") : NULL;
}

static bool read_line(Reading *r, uint64_t number, const char *line, size_t length, GError **error)
{
    json_error_t why;
    Row row;
    if (length > ROW_LIMIT) {
        return bad_row(r, number, g_strdup("it has more than 16 MiB"), error);
    }
    json_t *object = json_loadb(line, length, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
    char *wrong = object == NULL ? g_strdup_printf("it is no JSON: %.60s", why.text)
                                 : take_members(r->o, object, &row);
    if (wrong != NULL) {
        g_strdelimit(wrong, "\n\r", ' ');
    }
    const bool ok = wrong != NULL ? bad_row(r, number, wrong, error) : r->row(r->user, &row, error);
    json_decref(object);
    return ok;
}

static bool is_blank(const char *line, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        if (!g_ascii_isspace(line[i])) {
            return false;
        }
    }
    return true;
}

static bool read_lines(Reading *r, const char *text, size_t length, GError **error)
{
    uint64_t number = 0;
    for (size_t at = 0; at < length;) {
        const char *end = memchr(text + at, '\n', length - at);
        const size_t n = end != NULL ? (size_t)(end - text) - at : length - at;
        number++;
        if (!is_blank(text + at, n)) {
            r->rows++;
            if (!read_line(r, number, text + at, n, error)) {
                return false;
            }
        }
        at += n + 1;
    }
    return true;
}

/* ---- text ---- */

static bool read_text(Reading *r, const char *text, size_t length, GError **error)
{
    const char *separator = r->o->separator;
    const size_t n = separator != NULL ? strlen(separator) : 0;
    for (size_t at = 0; at < length;) {
        const char *end = n > 0 ? memmem(text + at, length - at, separator, n) : NULL;
        const size_t size = end != NULL ? (size_t)(end - text) - at : length - at;
        const Row row = {.text = text + at, .length = size};
        r->rows += size > 0;
        if (size > 0 && !r->row(r->user, &row, error)) {
            return false;
        }
        at += size + n + (end == NULL);
    }
    return true;
}

static bool read_rows(Reading *r, GError **error)
{
    g_autoptr(GError) why = NULL;
    g_autoptr(GMappedFile) file = g_mapped_file_new(r->path, FALSE, &why);
    if (file == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "training data %s: %s; name a file of the data's format", r->path,
                    why->message);
        return false;
    }
    const char *text = g_mapped_file_get_contents(file);
    const size_t length = text != NULL ? g_mapped_file_get_length(file) : 0;
    return r->o->format == DOCUMENT_JSONL ? read_lines(r, text, length, error)
                                          : read_text(r, text, length, error);
}

/* ---- tokens of a document ---- */

static bool reserve(Documents *d, size_t more, GError **error)
{
    if (more <= d->capacity - d->n) {
        return true;
    }
    const size_t capacity = MAX(d->n + more, MAX(2 * d->capacity, 4096));
    uint32_t *ids = weft_alloc(capacity, sizeof *ids, "training data", error);
    uint8_t *flags = ids != NULL ? weft_alloc(capacity, 1, "training data", error) : NULL;
    if (flags == NULL) {
        weft_free(ids);
        return false;
    }
    if (d->n > 0) {
        memcpy(ids, d->ids, d->n * sizeof *ids);
        memcpy(flags, d->flags, d->n);
    }
    weft_free(d->ids);
    weft_free(d->flags);
    d->ids = ids;
    d->flags = flags;
    d->capacity = capacity;
    return true;
}

static void add_id(Documents *d, uint32_t id, uint8_t flags)
{
    d->ids[d->n] = id;
    d->flags[d->n++] = flags;
}

size_t documents_cut(const char *text, size_t length, size_t limit)
{
    if (length <= limit) {
        return length;
    }
    for (size_t at = limit; at > 1; at--) {
        if (text[at - 1] == '\n' && !g_ascii_isspace(text[at - 2]) && !g_ascii_isspace(text[at]) &&
            (unsigned char)text[at] < 0x80 && (unsigned char)text[at - 2] < 0x80) {
            return at;
        }
    }
    size_t at = limit;
    while (at > 1 && ((unsigned char)text[at] & 0xc0) == 0x80) {
        at--;
    }
    return at;
}

static bool add_text(Documents *d, const Tokenizer *tokenizer, const char *text, size_t length,
                     uint8_t flags, GError **error)
{
    for (size_t at = 0, n; at < length; at += n) {
        n = documents_cut(text + at, length - at, CUT_BYTES);
        g_autoptr(GArray) ids = tokenizer != NULL
                                    ? tokenizer_encode(tokenizer, text + at, n, false, false, error)
                                    : NULL;
        if ((tokenizer != NULL && ids == NULL) || !reserve(d, ids != NULL ? ids->len : n, error)) {
            return false;
        }
        for (size_t i = 0; i < (ids != NULL ? ids->len : n); i++) {
            add_id(d, ids != NULL ? g_array_index(ids, uint32_t, i) : (uint8_t)text[at + i], flags);
        }
    }
    return true;
}

typedef struct Collect {
    Documents *documents;
    const DocumentOptions *o;
    bool ends; /* documents end with the end of text */
} Collect;

static bool collect_row(void *user, const Row *row, GError **error)
{
    const Collect *c = user;
    Documents *d = c->documents;
    const Tokenizer *t = c->o->tokenizer;
    const size_t first = d->n;
    if (!reserve(d, 2, error)) {
        return false;
    }
    if (t != NULL && tokenizer_adds_bos(t)) {
        add_id(d, (uint32_t)tokenizer_bos(t), 0);
    }
    if (!add_text(d, t, row->prompt, row->prompt_length, 0, error) ||
        !add_text(d, t, row->text, row->length, DOCUMENT_LOSS, error) || !reserve(d, 1, error)) {
        return false;
    }
    if (c->ends && t != NULL && tokenizer_eos(t) >= 0) {
        add_id(d, (uint32_t)tokenizer_eos(t), DOCUMENT_LOSS);
    }
    if (d->n > first) {
        d->flags[first] |= DOCUMENT_BEGIN;
    }
    return true;
}

/* ---- tokens as they are ---- */

/* Little-endian, 16 bits each; 32 where the name ends in .u32. */
static bool load_tokens(Documents *d, const char *path, const DocumentOptions *o, GError **error)
{
    g_autoptr(GError) why = NULL;
    g_autoptr(GMappedFile) file = g_mapped_file_new(path, FALSE, &why);
    if (file == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "training data %s: %s; name a file of ids", path, why->message);
        return false;
    }
    const size_t size = g_mapped_file_get_length(file),
                 width = g_str_has_suffix(path, ".u32") ? 4 : 2, n = size / width;
    const char *bytes = g_mapped_file_get_contents(file);
    const int64_t eos = o->tokenizer != NULL ? tokenizer_eos(o->tokenizer) : -1;
    if (size % width != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "training data %s: %zu bytes are no ids of %zu; ids are 16 bits, or 32 in a "
                    "file whose name ends in .u32",
                    path, size, width);
        return false;
    }
    if (!reserve(d, n, error)) {
        return false;
    }
    bool begins = true;
    for (size_t i = 0; i < n; i++) {
        uint32_t id = 0;
        memcpy(&id, bytes + i * width, width);
        id = GUINT32_FROM_LE(id);
        add_id(d, id, DOCUMENT_LOSS | (begins ? DOCUMENT_BEGIN : 0));
        begins = id == eos;
    }
    return true;
}

/* ---- public ---- */

Documents *documents_load(const char *path, const DocumentOptions *o, GError **error)
{
    g_autoptr(Documents) d = g_new0(Documents, 1);
    Collect collect = {
        d, o, o->format == DOCUMENT_JSONL || (o->separator != NULL && o->separator[0] != '\0')};
    d->complaints = g_ptr_array_new_with_free_func(g_free);
    Reading r = {
        .o = o, .path = path, .row = collect_row, .user = &collect, .complaints = d->complaints};
    if (!(o->format == DOCUMENT_TOKENS ? load_tokens(d, path, o, error) : read_rows(&r, error))) {
        return NULL;
    }
    d->rows = r.rows;
    d->bad_rows = r.bad_rows;
    if (d->n == 0) {
        g_autofree char *report = documents_report(d);
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "training data %s holds nothing to learn%s%s; check the file and the format",
                    path, report != NULL ? ": " : "", report != NULL ? report : "");
        return NULL;
    }
    return g_steal_pointer(&d);
}

void documents_free(Documents *d)
{
    if (d != NULL) {
        weft_free(d->ids);
        weft_free(d->flags);
        g_ptr_array_unref(d->complaints);
        g_free(d);
    }
}

char *documents_report(const Documents *d)
{
    if (d->bad_rows == 0) {
        return NULL;
    }
    GString *text = g_string_new(NULL);
    g_string_printf(text, "%" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT " rows were left out",
                    d->bad_rows, d->rows);
    for (guint i = 0; i < d->complaints->len; i++) {
        g_string_append_printf(text, "%s %s", i == 0 ? ":" : ";",
                               (const char *)d->complaints->pdata[i]);
    }
    if (d->bad_rows > d->complaints->len) {
        g_string_append_printf(text, "; and %" G_GUINT64_FORMAT " more",
                               d->bad_rows - d->complaints->len);
    }
    return g_string_free(text, FALSE);
}

static bool count_text(BpeTrainer *trainer, const char *text, size_t length, GError **error)
{
    for (size_t at = 0, n; at < length; at += n) {
        n = documents_cut(text + at, length - at, CUT_BYTES);
        if (!bpe_trainer_add(trainer, text + at, n, error)) {
            return false;
        }
    }
    return true;
}

static bool count_row(void *user, const Row *row, GError **error)
{
    return count_text(user, row->prompt, row->prompt_length, error) &&
           count_text(user, row->text, row->length, error);
}

bool documents_count_words(const char *path, const DocumentOptions *o, BpeTrainer *trainer,
                           GError **error)
{
    if (o->format == DOCUMENT_TOKENS) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s holds ids and no text to train a tokenizer on; name the tokenizer", path);
        return false;
    }
    Reading r = {.o = o, .path = path, .row = count_row, .user = trainer};
    return read_rows(&r, error);
}
