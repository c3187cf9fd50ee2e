/* Invariants once a Safetensors exists:
 * 1. tensors are sorted by name, names are unique;
 * 2. size = product of dims x bytes of the type, [begin, end) of exactly that length;
 * 3. sorted by place they follow one another without hole or overlap from the first byte of the
 *    data to the last: what the format asks for, and no byte is hidden or used twice. */
#include "proto/model/safetensors.h"

#include "proto/base/bytes.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define HEADER_LIMIT (32u << 20)
#define TENSORS_LIMIT (1u << 18)
#define NAME_SHOWN 64

struct Safetensors {
    char *path;
    GMappedFile *mapping; /* NULL for a caller's buffer */
    const uint8_t *bytes;
    size_t size;
    json_t *header;
    size_t n;
    SafetensorsTensor *tensors; /* by name */
};

static const struct {
    const char *name;
    uint32_t bytes;
    Dtype type;
} kinds[] = {
    {"F32", 4, DTYPE_F32},    {"F16", 2, DTYPE_F16},       {"BF16", 2, DTYPE_BF16},
    {"F64", 8, DTYPE_LIMIT},  {"I64", 8, DTYPE_LIMIT},     {"I32", 4, DTYPE_LIMIT},
    {"I16", 2, DTYPE_LIMIT},  {"I8", 1, DTYPE_LIMIT},      {"U64", 8, DTYPE_LIMIT},
    {"U32", 4, DTYPE_LIMIT},  {"U16", 2, DTYPE_LIMIT},     {"U8", 1, DTYPE_LIMIT},
    {"BOOL", 1, DTYPE_LIMIT}, {"F8_E4M3", 1, DTYPE_LIMIT}, {"F8_E5M2", 1, DTYPE_LIMIT},
};

static bool fail(const Safetensors *s, GError **error, const char *format, ...) G_GNUC_PRINTF(3, 4);

static bool fail(const Safetensors *s, GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    for (char *at = what; *at != '\0'; at++) {
        if (g_ascii_iscntrl(*at)) {
            *at = '?';
        }
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s: %s; get the file again", s->path, what);
    return false;
}

/* ---- reading ---- */

static bool read_kind(const Safetensors *s, SafetensorsTensor *t, const json_t *value,
                      uint32_t *bytes, GError **error)
{
    const char *name = json_string_value(value);
    for (size_t i = 0; name != NULL && i < G_N_ELEMENTS(kinds); i++) {
        if (strcmp(kinds[i].name, name) == 0) {
            t->kind = kinds[i].name;
            t->type = kinds[i].type;
            *bytes = kinds[i].bytes;
            return true;
        }
    }
    return fail(s, error, "tensor '%.*s' has the unknown type '%.20s'", NAME_SHOWN, t->name,
                name != NULL ? name : "none");
}

static bool read_count(const json_t *value, uint64_t *out)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0) {
        return false;
    }
    *out = (uint64_t)json_integer_value(value);
    return true;
}

static bool read_shape(const Safetensors *s, SafetensorsTensor *t, const json_t *shape,
                       uint32_t bytes, GError **error)
{
    size_t size = bytes;
    if (!json_is_array(shape) || json_array_size(shape) > SAFETENSORS_DIMS) {
        return fail(s, error, "tensor '%.*s' has no shape of at most %d dimensions", NAME_SHOWN,
                    t->name, SAFETENSORS_DIMS);
    }
    t->n_dims = (uint32_t)json_array_size(shape);
    for (uint32_t d = 0; d < SAFETENSORS_DIMS; d++) {
        t->dims[d] = 1;
        if (d < t->n_dims && (!read_count(json_array_get(shape, d), &t->dims[d]) ||
                              !sz_mul(size, (size_t)t->dims[d], &size))) {
            return fail(s, error, "dimension %u of tensor '%.*s' is no count that fits", d,
                        NAME_SHOWN, t->name);
        }
    }
    t->size_bytes = size;
    return true;
}

static bool read_place(const Safetensors *s, SafetensorsTensor *t, const json_t *offsets,
                       const uint8_t *data, size_t data_size, GError **error)
{
    uint64_t begin, end;
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 ||
        !read_count(json_array_get(offsets, 0), &begin) ||
        !read_count(json_array_get(offsets, 1), &end)) {
        return fail(s, error, "tensor '%.*s' has no two data_offsets", NAME_SHOWN, t->name);
    }
    if (begin > end || end > data_size || end - begin != t->size_bytes) {
        return fail(s, error,
                    "tensor '%.*s' lies at %" G_GUINT64_FORMAT " to %" G_GUINT64_FORMAT
                    ", its shape takes %" G_GUINT64_FORMAT " bytes, and there are %zu",
                    NAME_SHOWN, t->name, begin, end, t->size_bytes, data_size);
    }
    t->data = data + begin;
    return true;
}

static bool read_tensor(const Safetensors *s, SafetensorsTensor *t, const json_t *value,
                        const uint8_t *data, size_t data_size, GError **error)
{
    uint32_t bytes = 0;
    if (!json_is_object(value) || json_object_size(value) != 3) {
        return fail(s, error, "tensor '%.*s' is not described by dtype, shape and data_offsets",
                    NAME_SHOWN, t->name);
    }
    return read_kind(s, t, json_object_get(value, "dtype"), &bytes, error) &&
           read_shape(s, t, json_object_get(value, "shape"), bytes, error) &&
           read_place(s, t, json_object_get(value, "data_offsets"), data, data_size, error);
}

static bool check_metadata(const Safetensors *s, GError **error)
{
    json_t *metadata = json_object_get(s->header, "__metadata__"), *value;
    const char *key;
    if (metadata != NULL && !json_is_object(metadata)) {
        return fail(s, error, "__metadata__ is no object");
    }
    json_object_foreach(metadata, key, value)
    {
        if (!json_is_string(value)) {
            return fail(s, error, "'%.*s' of __metadata__ is no text", NAME_SHOWN, key);
        }
    }
    return true;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const SafetensorsTensor *)a)->name, ((const SafetensorsTensor *)b)->name);
}

static int compare_places(const void *a, const void *b)
{
    const SafetensorsTensor *const *x = a, *const *y = b;
    if ((*x)->data != (*y)->data) {
        return (*x)->data > (*y)->data ? 1 : -1;
    }
    /* Empty tensors stand before what begins at the same place. */
    return ((*x)->size_bytes > (*y)->size_bytes) - ((*x)->size_bytes < (*y)->size_bytes);
}

/* Invariant 3. */
static bool check_places(const Safetensors *s, const uint8_t *data, size_t data_size,
                         GError **error)
{
    const SafetensorsTensor **sorted =
        weft_alloc(MAX(s->n, 1), sizeof *sorted, "an order of tensors", error);
    if (sorted == NULL) {
        return false;
    }
    for (size_t i = 0; i < s->n; i++) {
        sorted[i] = &s->tensors[i];
    }
    qsort(sorted, s->n, sizeof *sorted, compare_places);
    const uint8_t *at = data;
    bool ok = true;
    for (size_t i = 0; ok && i < s->n; i++) {
        ok = sorted[i]->data == at ||
             fail(s, error, "tensor '%.*s' begins at %zu, not behind the one before it, at %zu",
                  NAME_SHOWN, sorted[i]->name, (size_t)(sorted[i]->data - data),
                  (size_t)(at - data));
        at = sorted[i]->data + sorted[i]->size_bytes;
    }
    weft_free(sorted);
    return ok && ((size_t)(at - data) == data_size ||
                  fail(s, error, "the tensors end at %zu, the data at %zu", (size_t)(at - data),
                       data_size));
}

static bool read_tensors(Safetensors *s, const uint8_t *data, size_t data_size, GError **error)
{
    const size_t n = json_object_size(s->header);
    const char *name;
    json_t *value;
    if (n > TENSORS_LIMIT) {
        return fail(s, error, "it has %zu tensors; at most %u are read", n, TENSORS_LIMIT);
    }
    s->tensors = weft_alloc(MAX(n, 1), sizeof *s->tensors, "a table of tensors", error);
    if (s->tensors == NULL) {
        return false;
    }
    json_object_foreach(s->header, name, value)
    {
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        SafetensorsTensor *t = &s->tensors[s->n++];
        t->name = g_strdup(name);
        if (!read_tensor(s, t, value, data, data_size, error)) {
            return false;
        }
    }
    qsort(s->tensors, s->n, sizeof *s->tensors, compare_names);
    return check_places(s, data, data_size, error);
}

static bool read_file(Safetensors *s, const uint8_t *bytes, size_t size, GError **error)
{
    ByteReader r = byte_reader(bytes, size);
    s->bytes = bytes;
    s->size = size;
    const uint64_t length = byte_reader_u64le(&r);
    if (r.failed || length > HEADER_LIMIT || length > size - r.offset) {
        return fail(s, error,
                    "the header claims %" G_GUINT64_FORMAT " bytes in a file of %zu (at most %u)",
                    length, size, HEADER_LIMIT);
    }
    const char *text = (const char *)byte_reader_take(&r, (size_t)length);
    json_error_t why;
    if (length > 0 && text[0] == '{') {
        s->header = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &why);
    } else {
        g_strlcpy(why.text, "it does not begin with '{'", sizeof why.text);
    }
    if (!json_is_object(s->header)) {
        return fail(s, error, "the header is no JSON object: %.80s", why.text);
    }
    return check_metadata(s, error) && read_tensors(s, bytes + r.offset, size - r.offset, error);
}

Safetensors *safetensors_parse(const void *data, size_t size, GError **error)
{
    g_autoptr(Safetensors) s = g_new0(Safetensors, 1);
    s->path = g_strdup("safetensors data");
    return read_file(s, data, size, error) ? g_steal_pointer(&s) : NULL;
}

Safetensors *safetensors_open(const char *path, GError **error)
{
    g_autoptr(Safetensors) s = g_new0(Safetensors, 1);
    g_autoptr(GError) why = NULL;
    s->path = g_strdup(path);
    s->mapping = g_mapped_file_new(path, FALSE, &why);
    if (s->mapping == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "%s; name a safetensors file",
                    why->message);
        return NULL;
    }
    const char *bytes = g_mapped_file_get_contents(s->mapping);
    const size_t size = g_mapped_file_get_length(s->mapping);
    return read_file(s, (const uint8_t *)(bytes != NULL ? bytes : ""), size, error)
               ? g_steal_pointer(&s)
               : NULL;
}

void safetensors_free(Safetensors *s)
{
    if (s == NULL) {
        return;
    }
    for (size_t i = 0; i < s->n; i++) {
        g_free(s->tensors[i].name);
    }
    weft_free(s->tensors);
    json_decref(s->header);
    if (s->mapping != NULL) {
        g_mapped_file_unref(s->mapping);
    }
    g_free(s->path);
    g_free(s);
}

const uint8_t *safetensors_bytes(const Safetensors *s, size_t *size_out)
{
    *size_out = s->size;
    return s->bytes;
}

size_t safetensors_n(const Safetensors *s)
{
    return s->n;
}

const SafetensorsTensor *safetensors_at(const Safetensors *s, size_t i)
{
    return &s->tensors[i];
}

const SafetensorsTensor *safetensors_find(const Safetensors *s, const char *name)
{
    SafetensorsTensor wanted = {.name = (char *)name};
    return bsearch(&wanted, s->tensors, s->n, sizeof wanted, compare_names);
}

/* ---- writing ---- */

static json_t *entry_json(const SafetensorsEntry *e, uint64_t begin, uint64_t end)
{
    json_t *shape = json_array();
    for (uint32_t d = 0; d < e->n_dims; d++) {
        json_array_append_new(shape, json_integer((json_int_t)e->dims[d]));
    }
    return json_pack("{s:s,s:o,s:[I,I]}", "dtype", dtype_info(e->type)->name, "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)end);
}

GBytes *safetensors_header(const SafetensorsEntry *entries, size_t n, const char *const *metadata,
                           GError **error)
{
    json_t *header = json_object();
    if (metadata != NULL && metadata[0] != NULL) {
        json_t *texts = json_object();
        for (; metadata[0] != NULL; metadata += 2) {
            json_object_set_new(texts, metadata[0], json_string(metadata[1]));
        }
        json_object_set_new(header, "__metadata__", texts);
    }
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        size_t end, size = dtype_info(entries[i].type)->block_bytes;
        bool fits = true;
        for (uint32_t d = 0; d < entries[i].n_dims; d++) {
            fits = fits && sz_mul(size, (size_t)entries[i].dims[d], &size);
        }
        if (!fits || !sz_add(at, size, &end) || end > INT64_MAX) {
            json_decref(header);
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "tensor '%s' does not fit a file of 2^63 bytes; cut it", entries[i].name);
            return NULL;
        }
        json_object_set_new(header, entries[i].name, entry_json(&entries[i], at, end));
        at = end;
    }
    char *text = json_dumps(header, JSON_COMPACT);
    json_decref(header);
    const size_t length = strlen(text), padded = (length + 8 + 63) / 64 * 64 - 8;
    GByteArray *out = g_byte_array_sized_new((guint)padded + 8);
    const uint64_t little = GUINT64_TO_LE((uint64_t)padded);
    g_byte_array_append(out, (const guint8 *)&little, sizeof little);
    g_byte_array_append(out, (const guint8 *)text, (guint)length);
    free(text);
    g_byte_array_set_size(out, (guint)padded + 8);
    memset(out->data + 8 + length, ' ', padded - length);
    return g_byte_array_free_to_bytes(out);
}
