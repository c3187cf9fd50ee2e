/* GGUF: header, key-value pairs, tensor descriptions, padding, data (format: ggml docs/gguf.md).
 *
 * Invariants once a Gguf exists:
 * 1. every key's value lies inside its file, arrays wholly, strings with their bytes;
 * 2. keys are sorted and unique per file, tensor names over all files;
 * 3. every tensor has a known type, a size equal to what its shape says, and bytes that lie aligned
 *    inside the data section of its file, apart from every other tensor's;
 * 4. counts were bounded by what the remaining bytes can hold before anything was allocated for
 * them. */
#include "proto/model/gguf.h"

#include "proto/base/bytes.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GGUF_MAGIC 0x46554747u /* "GGUF" */
#define KEYS_LIMIT 65536u
#define TENSORS_LIMIT (1u << 20)
#define NAME_LIMIT 65536u
#define ALIGNMENT_DEFAULT 32u
#define ALIGNMENT_LIMIT (1u << 20)
#define FILES_LIMIT 1024u
#define KEY_BYTES_LEAST (8u + 4u + 1u)              /* empty name, type, one byte */
#define TENSOR_BYTES_LEAST (8u + 4u + 8u + 4u + 8u) /* empty name, one dimension, type, offset */

typedef enum ValueType {
    VALUE_U8 = 0,
    VALUE_I8,
    VALUE_U16,
    VALUE_I16,
    VALUE_U32,
    VALUE_I32,
    VALUE_F32,
    VALUE_BOOL,
    VALUE_STRING,
    VALUE_ARRAY,
    VALUE_U64,
    VALUE_I64,
    VALUE_F64,
    VALUE_LIMIT,
} ValueType;

static const struct {
    const char *name;
    uint32_t size; /* bytes of one element; 0 = not fixed */
} value_types[VALUE_LIMIT] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

typedef struct Key {
    const char *name; /* borrowed from the mapping */
    size_t name_length;
    ValueType type; /* of the value; of the elements when is_array */
    bool is_array;
    uint64_t n;           /* elements; 1 for scalars */
    const uint8_t *value; /* first element; strings: their u64 length */
    uint64_t *strings;    /* arrays of strings: offset of each from value, owned */
} Key;

typedef struct File {
    char *path;
    GMappedFile *mapping; /* NULL for a caller's buffer */
    const uint8_t *data;
    size_t size;
    uint32_t alignment;
    uint32_t n_keys;
    Key *keys;                        /* sorted by name */
    uint64_t n_tensors, first_tensor; /* this file's part of Gguf.tensors before it is sorted */
} File;

struct Gguf {
    uint32_t n_files;
    File *files;
    uint64_t n_tensors;
    GgufTensor *tensors; /* file order */
    uint32_t *by_name;   /* tensor indices sorted by name */
};

/* ---- reading ----------------------------------------------------------------------------------
 */

static bool fail(const File *file, GError **error, const char *format, ...) G_GNUC_PRINTF(3, 4);

static bool fail(const File *file, GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s: %s; get the file again", file->path,
                what);
    return false;
}

/* A name from the file, fit for a message: short and printable. Returned. */
static char *printable(const char *bytes, size_t length)
{
    GString *text = g_string_new("'");
    for (size_t i = 0; i < length && i < 60; i++) {
        bool plain = g_ascii_isprint(bytes[i]) && bytes[i] != '\'';
        g_string_append_c(text, plain ? bytes[i] : '?');
    }
    g_string_append(text, length > 60 ? "...'" : "'");
    return g_string_free(text, FALSE);
}

/* u64 length and bytes. False once the reader failed or the length passes `limit`. */
static bool read_string(ByteReader *r, uint64_t limit, const char **out, size_t *length_out)
{
    uint64_t length = byte_reader_u64le(r);
    if (r->failed || length > limit || length > r->size - r->offset) {
        return false;
    }
    *length_out = (size_t)length;
    *out = (const char *)byte_reader_take(r, (size_t)length);
    return true;
}

/* The elements of an array, after its element type and count. */
static bool read_array_body(File *file, ByteReader *r, Key *key, GError **error)
{
    g_autofree char *name = printable(key->name, key->name_length);
    size_t left = r->size - r->offset;
    key->value = r->data + r->offset;
    if (key->type == VALUE_ARRAY) {
        return fail(file, error, "key %s is an array of arrays, which is not read", name);
    }
    if (key->type != VALUE_STRING) {
        size_t n_bytes;
        if (key->n > left || !sz_mul((size_t)key->n, value_types[key->type].size, &n_bytes) ||
            byte_reader_take(r, n_bytes) == NULL) {
            return fail(file, error,
                        "key %s claims %" G_GUINT64_FORMAT " elements and %zu bytes are left", name,
                        key->n, left);
        }
        return true;
    }
    if (key->n > left / sizeof(uint64_t)) {
        return fail(file, error,
                    "key %s claims %" G_GUINT64_FORMAT " strings and %zu bytes are left", name,
                    key->n, left);
    }
    key->strings = weft_alloc((size_t)key->n, sizeof *key->strings, "a table of strings", error);
    if (key->strings == NULL) {
        return false;
    }
    size_t start = r->offset;
    for (uint64_t i = 0; i < key->n; i++) {
        const char *bytes;
        size_t length;
        key->strings[i] = r->offset - start;
        if (!read_string(r, G_MAXUINT32, &bytes, &length)) {
            return fail(file, error, "string %" G_GUINT64_FORMAT " of key %s runs past the end", i,
                        name);
        }
    }
    return true;
}

static bool read_value(File *file, ByteReader *r, Key *key, GError **error)
{
    g_autofree char *name = printable(key->name, key->name_length);
    uint32_t type = byte_reader_u32le(r);
    if (!r->failed && type == VALUE_ARRAY) {
        key->is_array = true;
        type = byte_reader_u32le(r);
        key->n = byte_reader_u64le(r);
    } else {
        key->n = 1;
    }
    if (r->failed || type >= VALUE_LIMIT) {
        return fail(file, error, "key %s has the unknown value type %u", name, type);
    }
    key->type = (ValueType)type;
    if (key->is_array) {
        return read_array_body(file, r, key, error);
    }
    key->value = r->data + r->offset;
    if (key->type == VALUE_STRING) {
        const char *bytes;
        size_t length;
        return read_string(r, G_MAXUINT32, &bytes, &length) ||
               fail(file, error, "the string of key %s runs past the end", name);
    }
    return byte_reader_take(r, value_types[type].size) != NULL ||
           fail(file, error, "the value of key %s runs past the end", name);
}

static int compare_bytes(const char *a, size_t a_length, const char *b, size_t b_length)
{
    size_t n = MIN(a_length, b_length);
    int order = n > 0 ? memcmp(a, b, n) : 0;
    return order != 0 ? order : (a_length > b_length) - (a_length < b_length);
}

static int compare_keys(const void *a, const void *b)
{
    const Key *x = a, *y = b;
    return compare_bytes(x->name, x->name_length, y->name, y->name_length);
}

static bool read_keys(File *file, ByteReader *r, uint64_t n_keys, GError **error)
{
    if (n_keys > KEYS_LIMIT || n_keys > (r->size - r->offset) / KEY_BYTES_LEAST) {
        return fail(file, error, "the header claims %" G_GUINT64_FORMAT " keys in %zu bytes",
                    n_keys, r->size);
    }
    file->keys = weft_alloc((size_t)n_keys, sizeof *file->keys, "a table of keys", error);
    if (file->keys == NULL) {
        return false;
    }
    for (uint64_t i = 0; i < n_keys; i++) {
        Key *key = &file->keys[i];
        if (!read_string(r, NAME_LIMIT, &key->name, &key->name_length)) {
            return fail(file, error, "the name of key %" G_GUINT64_FORMAT " runs past the end", i);
        }
        file->n_keys++; /* from here on gguf_free() releases its string table */
        if (!read_value(file, r, key, error)) {
            return false;
        }
    }
    qsort(file->keys, file->n_keys, sizeof *file->keys, compare_keys);
    for (uint32_t i = 1; i < file->n_keys; i++) {
        if (compare_keys(&file->keys[i - 1], &file->keys[i]) == 0) {
            g_autofree char *name = printable(file->keys[i].name, file->keys[i].name_length);
            return fail(file, error, "key %s is there twice", name);
        }
    }
    return true;
}

/* Names of ggml types that weft does not compute, for the message only. */
static const char *foreign_type_name(uint32_t type)
{
    static const char *const names[] = {
        [9] = "Q8_1",    [10] = "Q2_K",    [11] = "Q3_K",  [15] = "Q8_K",   [16] = "IQ2_XXS",
        [17] = "IQ2_XS", [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",
        [22] = "IQ2_S",  [23] = "IQ4_XS",  [24] = "I8",    [25] = "I16",    [26] = "I32",
        [27] = "I64",    [28] = "F64",     [29] = "IQ1_M", [34] = "TQ1_0",  [35] = "TQ2_0",
        [39] = "MXFP4",
    };
    return type < G_N_ELEMENTS(names) && names[type] != NULL ? names[type] : "an unknown type";
}

static bool unsupported_type(const File *file, const GgufTensor *t, uint32_t type, GError **error)
{
    g_autofree char *name = printable(t->name, t->name_length);
    g_set_error(
        error, WEFT_ERROR, WEFT_ERROR_INVALID,
        "%s: tensor %s has weights of type %s (%u), which is not supported; take a file with "
        "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K weights",
        file->path, name, foreign_type_name(type), type);
    return false;
}

/* One description; the offset is still relative to the data section. */
static bool read_tensor(const File *file, ByteReader *r, GgufTensor *t, GError **error)
{
    if (!read_string(r, NAME_LIMIT, &t->name, &t->name_length)) {
        return fail(file, error, "the name of a tensor runs past the end");
    }
    g_autofree char *name = printable(t->name, t->name_length);
    t->n_dims = byte_reader_u32le(r);
    if (r->failed || t->n_dims < 1 || t->n_dims > 4) {
        return fail(file, error, "tensor %s has %u dimensions, not 1 to 4", name, t->n_dims);
    }
    size_t n_rows = 1;
    for (uint32_t d = 0; d < 4; d++) {
        t->dims[d] = d < t->n_dims ? byte_reader_u64le(r) : 1;
        if (r->failed || t->dims[d] == 0 || (d > 0 && !sz_mul(n_rows, t->dims[d], &n_rows))) {
            return fail(file, error, "dimension %u of tensor %s is %" G_GUINT64_FORMAT, d, name,
                        t->dims[d]);
        }
    }
    uint32_t type = byte_reader_u32le(r);
    t->offset = byte_reader_u64le(r);
    if (r->failed) {
        return fail(file, error, "the description of tensor %s runs past the end", name);
    }
    if (dtype_info(type)->name == NULL || type >= DTYPE_FIRST_OWN) {
        return unsupported_type(file, t, type, error);
    }
    t->type = (Dtype)type;
    size_t row_bytes, size_bytes;
    if (!dtype_row_bytes(type, t->dims[0], &row_bytes) || !sz_mul(row_bytes, n_rows, &size_bytes)) {
        return fail(file, error,
                    "tensor %s has rows of %" G_GUINT64_FORMAT
                    " elements, which %s blocks of %u cannot hold",
                    name, t->dims[0], dtype_info(type)->name, dtype_info(type)->block);
    }
    t->size_bytes = size_bytes;
    return true;
}

/* Tensor descriptions of one file are appended to g->tensors. */
static bool read_tensors(Gguf *g, File *file, uint32_t file_index, ByteReader *r, uint64_t n,
                         GError **error)
{
    if (n > (r->size - r->offset) / TENSOR_BYTES_LEAST || n + g->n_tensors > TENSORS_LIMIT) {
        return fail(file, error, "the header claims %" G_GUINT64_FORMAT " tensors in %zu bytes", n,
                    r->size);
    }
    uint64_t total = g->n_tensors + n;
    GgufTensor *all = weft_alloc((size_t)total, sizeof *all, "a table of tensors", error);
    if (all == NULL) {
        return false;
    }
    if (g->n_tensors > 0) {
        memcpy(all, g->tensors, (size_t)g->n_tensors * sizeof *all);
    }
    weft_free(g->tensors);
    g->tensors = all;
    file->first_tensor = g->n_tensors;
    file->n_tensors = n;
    g->n_tensors = total;
    for (uint64_t i = 0; i < n; i++) {
        GgufTensor *t = &all[file->first_tensor + i];
        t->file = file_index;
        if (!read_tensor(file, r, t, error)) {
            return false;
        }
    }
    return true;
}

static int compare_offsets(const void *a, const void *b)
{
    const GgufTensor *const *x = a, *const *y = b;
    return ((*x)->offset > (*y)->offset) - ((*x)->offset < (*y)->offset);
}

/* Turns offsets of the data section into offsets of the file and proves invariant 3. */
static bool place_tensors(Gguf *g, File *file, size_t header_end, GError **error)
{
    if (file->n_tensors == 0) {
        return true;
    }
    size_t data_start = header_end;
    if (!sz_add(header_end, file->alignment - 1, &data_start)) {
        return fail(file, error, "the header ends at %zu, too far", header_end);
    }
    data_start = data_start / file->alignment * file->alignment;
    GgufTensor **sorted =
        weft_alloc((size_t)file->n_tensors, sizeof *sorted, "an order of tensors", error);
    if (sorted == NULL) {
        return false;
    }
    bool ok = true;
    for (uint64_t i = 0; ok && i < file->n_tensors; i++) {
        GgufTensor *t = &g->tensors[file->first_tensor + i];
        g_autofree char *name = printable(t->name, t->name_length);
        size_t start, end;
        sorted[i] = t;
        if (t->offset % file->alignment != 0) {
            ok = fail(file, error, "tensor %s lies at %" G_GUINT64_FORMAT ", no multiple of %u",
                      name, t->offset, file->alignment);
        } else if (!sz_add(data_start, t->offset, &start) || !sz_add(start, t->size_bytes, &end) ||
                   end > file->size) {
            ok = fail(file, error,
                      "tensor %s needs bytes %" G_GUINT64_FORMAT " + %" G_GUINT64_FORMAT
                      " of the data, and the file ends at %zu",
                      name, t->offset, t->size_bytes, file->size);
        } else {
            t->offset = start;
        }
    }
    if (ok) {
        qsort(sorted, (size_t)file->n_tensors, sizeof *sorted, compare_offsets);
    }
    for (uint64_t i = 1; ok && i < file->n_tensors; i++) {
        if (sorted[i - 1]->offset + sorted[i - 1]->size_bytes > sorted[i]->offset) {
            g_autofree char *a = printable(sorted[i - 1]->name, sorted[i - 1]->name_length);
            g_autofree char *b = printable(sorted[i]->name, sorted[i]->name_length);
            ok = fail(file, error, "tensors %s and %s overlap", a, b);
        }
    }
    weft_free(sorted);
    return ok;
}

static const Key *find_key(const File *file, const char *name)
{
    Key wanted = {.name = name, .name_length = strlen(name)};
    return file->n_keys == 0
               ? NULL
               : bsearch(&wanted, file->keys, file->n_keys, sizeof wanted, compare_keys);
}

static bool key_u64(const Key *key, uint64_t i, uint64_t *out);

static bool read_alignment(File *file, GError **error)
{
    const Key *key = find_key(file, "general.alignment");
    uint64_t alignment = ALIGNMENT_DEFAULT;
    if (key != NULL && (key->is_array || !key_u64(key, 0, &alignment))) {
        return fail(file, error, "general.alignment is no number");
    }
    if (alignment < 8 || alignment > ALIGNMENT_LIMIT || (alignment & (alignment - 1)) != 0) {
        return fail(file, error,
                    "general.alignment is %" G_GUINT64_FORMAT ", no power of two from 8",
                    alignment);
    }
    file->alignment = (uint32_t)alignment;
    return true;
}

static bool read_file(Gguf *g, uint32_t file_index, GError **error)
{
    File *file = &g->files[file_index];
    ByteReader r = byte_reader(file->data, file->size);
    uint32_t magic = byte_reader_u32le(&r);
    uint32_t version = byte_reader_u32le(&r);
    uint64_t n_tensors = byte_reader_u64le(&r);
    uint64_t n_keys = byte_reader_u64le(&r);
    if (r.failed || magic != GGUF_MAGIC) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: no GGUF file; name a file that ends in .gguf", file->path);
        return false;
    }
    if (version != 2 && version != 3) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "%s: GGUF version %u%s; versions 2 and 3, little-endian, are read; convert it again",
            file->path, version, (version & 0xffff) == 0 ? " (big-endian)" : "");
        return false;
    }
    return read_keys(file, &r, n_keys, error) && read_alignment(file, error) &&
           read_tensors(g, file, file_index, &r, n_tensors, error) &&
           place_tensors(g, file, r.offset, error);
}

/* ---- names over all files ---------------------------------------------------------------------
 */

static int compare_tensor_names(const void *a, const void *b, void *user)
{
    const GgufTensor *tensors = user;
    const GgufTensor *x = &tensors[*(const uint32_t *)a], *y = &tensors[*(const uint32_t *)b];
    return compare_bytes(x->name, x->name_length, y->name, y->name_length);
}

static bool index_tensors(Gguf *g, GError **error)
{
    g->by_name = weft_alloc((size_t)g->n_tensors, sizeof *g->by_name, "an index of tensors", error);
    if (g->by_name == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < g->n_tensors; i++) {
        g->by_name[i] = i;
    }
    qsort_r(g->by_name, (size_t)g->n_tensors, sizeof *g->by_name, compare_tensor_names, g->tensors);
    for (uint64_t i = 1; i < g->n_tensors; i++) {
        if (compare_tensor_names(&g->by_name[i - 1], &g->by_name[i], g->tensors) == 0) {
            const GgufTensor *t = &g->tensors[g->by_name[i]];
            g_autofree char *name = printable(t->name, t->name_length);
            return fail(&g->files[t->file], error, "tensor %s is there twice", name);
        }
    }
    return true;
}

/* ---- opening ----------------------------------------------------------------------------------
 */

static Gguf *gguf_new(uint32_t n_files)
{
    Gguf *g = g_new0(Gguf, 1);
    g->n_files = n_files;
    g->files = g_new0(File, n_files);
    return g;
}

void gguf_free(Gguf *gguf)
{
    if (gguf == NULL) {
        return;
    }
    for (uint32_t f = 0; f < gguf->n_files; f++) {
        File *file = &gguf->files[f];
        for (uint32_t k = 0; k < file->n_keys; k++) {
            weft_free(file->keys[k].strings);
        }
        weft_free(file->keys);
        g_clear_pointer(&file->mapping, g_mapped_file_unref);
        g_free(file->path);
    }
    g_free(gguf->files);
    weft_free(gguf->tensors);
    weft_free(gguf->by_name);
    g_free(gguf);
}

Gguf *gguf_parse(const void *data, size_t size, GError **error)
{
    g_autoptr(Gguf) g = gguf_new(1);
    g->files[0].path = g_strdup("model in memory");
    g->files[0].data = data;
    g->files[0].size = size;
    if (!read_file(g, 0, error) || !index_tensors(g, error)) {
        return NULL;
    }
    return g_steal_pointer(&g);
}

/* Splits "DIR/NAME-00001-of-00003.gguf" into stem, number and count; false for any other name. */
static bool split_name(const char *path, char **stem_out, uint32_t *number, uint32_t *count)
{
    static const char form[] = "-00000-of-00000.gguf";
    size_t length = strlen(path), tail = sizeof form - 1;
    if (length <= tail) {
        return false;
    }
    const char *p = path + length - tail;
    for (size_t i = 0; i < tail; i++) {
        if (form[i] == '0' ? !g_ascii_isdigit(p[i]) : p[i] != form[i]) {
            return false;
        }
    }
    *number = (uint32_t)g_ascii_strtoull(p + 1, NULL, 10);
    *count = (uint32_t)g_ascii_strtoull(p + 10, NULL, 10);
    *stem_out = g_strndup(path, length - tail);
    return true;
}

static bool map_file(File *file, GError **error)
{
    GError *cause = NULL;
    if (g_file_test(file->path, G_FILE_TEST_IS_DIR)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: a directory, not a model file; name a file that ends in .gguf",
                    file->path);
        return false;
    }
    file->mapping = g_mapped_file_new(file->path, FALSE, &cause);
    if (file->mapping == NULL) {
        bool missing = g_error_matches(cause, G_FILE_ERROR, G_FILE_ERROR_NOENT);
        g_set_error(error, WEFT_ERROR, missing ? WEFT_ERROR_NOT_FOUND : WEFT_ERROR_IO,
                    "cannot read the model file %s: %s; check the path", file->path,
                    missing ? "no such file" : cause->message);
        g_error_free(cause);
        return false;
    }
    file->data = (const uint8_t *)g_mapped_file_get_contents(file->mapping);
    file->size = g_mapped_file_get_length(file->mapping);
    return true;
}

/* The part's own keys must say what its name says, so that parts of two models do not mix. */
static bool check_split_keys(const Gguf *g, uint32_t i, GError **error)
{
    const File *file = &g->files[i];
    const Key *no = find_key(file, "split.no"), *count = find_key(file, "split.count");
    uint64_t number, total;
    if (no == NULL || count == NULL || no->is_array || count->is_array ||
        !key_u64(no, 0, &number) || !key_u64(count, 0, &total)) {
        return fail(file, error, "the keys split.no and split.count are missing");
    }
    if (number != i || total != g->n_files) {
        return fail(file, error,
                    "it says to be part %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT
                    ", not part %u of %u",
                    number + 1, total, i + 1, g->n_files);
    }
    const Key *sum = find_key(file, "split.tensors.count");
    uint64_t n_tensors;
    if (i + 1 == g->n_files && sum != NULL && !sum->is_array && key_u64(sum, 0, &n_tensors) &&
        n_tensors != g->n_tensors) {
        return fail(file, error,
                    "the parts hold %" G_GUINT64_FORMAT " tensors, not %" G_GUINT64_FORMAT,
                    g->n_tensors, n_tensors);
    }
    return true;
}

Gguf *gguf_open(const char *path, GError **error)
{
    g_autofree char *stem = NULL;
    uint32_t number = 1, count = 1;
    bool is_split = split_name(path, &stem, &number, &count);
    if (is_split && (number != 1 || count < 1 || count > FILES_LIMIT)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s is part %u of %u; name the first part, %s-00001-of-%05u.gguf", path, number,
                    count, stem, count);
        return NULL;
    }
    g_autoptr(Gguf) g = gguf_new(count);
    for (uint32_t i = 0; i < count; i++) {
        g->files[i].path =
            is_split ? g_strdup_printf("%s-%05u-of-%05u.gguf", stem, i + 1, count) : g_strdup(path);
        if (!map_file(&g->files[i], error) || !read_file(g, i, error) ||
            (count > 1 && !check_split_keys(g, i, error))) {
            return NULL;
        }
    }
    return index_tensors(g, error) ? g_steal_pointer(&g) : NULL;
}

/* ---- values -----------------------------------------------------------------------------------
 */

/* Element i as a signed integer in 128 bits' worth of care: *negative says how to read *bits. */
static bool key_integer(const Key *key, uint64_t i, uint64_t *bits, bool *negative)
{
    uint32_t size = value_types[key->type].size;
    ByteReader r = byte_reader(key->value + i * size, size);
    int64_t v;
    switch (key->type) {
    case VALUE_U8:
    case VALUE_BOOL:
        *bits = byte_reader_u8(&r);
        *negative = false;
        return true;
    case VALUE_U16:
        *bits = byte_reader_u16le(&r);
        *negative = false;
        return true;
    case VALUE_U32:
        *bits = byte_reader_u32le(&r);
        *negative = false;
        return true;
    case VALUE_U64:
        *bits = byte_reader_u64le(&r);
        *negative = false;
        return true;
    case VALUE_I8:
        v = (int8_t)byte_reader_u8(&r);
        break;
    case VALUE_I16:
        v = (int16_t)byte_reader_u16le(&r);
        break;
    case VALUE_I32:
        v = (int32_t)byte_reader_u32le(&r);
        break;
    case VALUE_I64:
        v = (int64_t)byte_reader_u64le(&r);
        break;
    default:
        return false;
    }
    *bits = (uint64_t)v;
    *negative = v < 0;
    return true;
}

static bool key_u64(const Key *key, uint64_t i, uint64_t *out)
{
    bool negative;
    return key->type != VALUE_BOOL && key_integer(key, i, out, &negative) && !negative;
}

static bool key_f64(const Key *key, uint64_t i, double *out)
{
    uint32_t size = value_types[key->type].size;
    ByteReader r = byte_reader(key->value + i * size, size);
    uint64_t bits;
    bool negative;
    if (key->type == VALUE_F32) {
        *out = (double)byte_reader_f32le(&r);
        return true;
    }
    if (key->type == VALUE_F64) {
        *out = byte_reader_f64le(&r);
        return true;
    }
    if (key->type == VALUE_BOOL || !key_integer(key, i, &bits, &negative)) {
        return false;
    }
    *out = negative ? (double)(int64_t)bits : (double)bits;
    return true;
}

static bool wrong_type(const Gguf *g, const Key *key, const char *wanted, GError **error)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "%s: key '%.*s' is %s%s, not %s; this kind of model file is not supported",
                g->files[0].path, (int)MIN(key->name_length, 60), key->name,
                key->is_array ? "an array of " : "of type ", value_types[key->type].name, wanted);
    return false;
}

bool gguf_get_u64(const Gguf *g, const char *key, uint64_t *out, GError **error)
{
    const Key *k = find_key(&g->files[0], key);
    if (k == NULL) {
        return false;
    }
    return (!k->is_array && key_u64(k, 0, out)) || wrong_type(g, k, "a whole number", error);
}

bool gguf_get_f64(const Gguf *g, const char *key, double *out, GError **error)
{
    const Key *k = find_key(&g->files[0], key);
    if (k == NULL) {
        return false;
    }
    return (!k->is_array && key_f64(k, 0, out)) || wrong_type(g, k, "a number", error);
}

bool gguf_get_bool(const Gguf *g, const char *key, bool *out, GError **error)
{
    const Key *k = find_key(&g->files[0], key);
    if (k == NULL) {
        return false;
    }
    if (k->is_array || k->type != VALUE_BOOL) {
        return wrong_type(g, k, "true or false", error);
    }
    *out = k->value[0] != 0;
    return true;
}

bool gguf_get_string(const Gguf *g, const char *key, const char **out, size_t *length_out,
                     GError **error)
{
    const Key *k = find_key(&g->files[0], key);
    if (k == NULL) {
        return false;
    }
    if (k->is_array || k->type != VALUE_STRING) {
        return wrong_type(g, k, "a string", error);
    }
    ByteReader r = byte_reader(k->value, sizeof(uint64_t));
    *length_out = (size_t)byte_reader_u64le(&r);
    *out = (const char *)k->value + sizeof(uint64_t);
    return true;
}

static const Key *find_element(const Gguf *g, const char *key, uint64_t i)
{
    const Key *k = find_key(&g->files[0], key);
    return k != NULL && k->is_array && i < k->n ? k : NULL;
}

bool gguf_array_length(const Gguf *g, const char *key, uint64_t *n_out)
{
    const Key *k = find_key(&g->files[0], key);
    if (k == NULL || !k->is_array) {
        return false;
    }
    *n_out = k->n;
    return true;
}

bool gguf_array_string(const Gguf *g, const char *key, uint64_t i, const char **out,
                       size_t *length_out)
{
    const Key *k = find_element(g, key, i);
    if (k == NULL || k->type != VALUE_STRING) {
        return false;
    }
    const uint8_t *p = k->value + k->strings[i];
    ByteReader r = byte_reader(p, sizeof(uint64_t));
    *length_out = (size_t)byte_reader_u64le(&r);
    *out = (const char *)p + sizeof(uint64_t);
    return true;
}

bool gguf_array_f64(const Gguf *g, const char *key, uint64_t i, double *out)
{
    const Key *k = find_element(g, key, i);
    return k != NULL && k->type != VALUE_STRING && key_f64(k, i, out);
}

bool gguf_array_i64(const Gguf *g, const char *key, uint64_t i, int64_t *out)
{
    const Key *k = find_element(g, key, i);
    uint64_t bits;
    bool negative;
    if (k == NULL || k->type == VALUE_STRING || !key_integer(k, i, &bits, &negative) ||
        (!negative && bits > G_MAXINT64)) {
        return false;
    }
    *out = (int64_t)bits;
    return true;
}

/* ---- tensors and files ------------------------------------------------------------------------
 */

uint64_t gguf_n_tensors(const Gguf *g)
{
    return g->n_tensors;
}

const GgufTensor *gguf_tensor(const Gguf *g, uint64_t i)
{
    g_assert(i < g->n_tensors);
    return &g->tensors[i];
}

const GgufTensor *gguf_find_tensor(const Gguf *g, const char *name)
{
    size_t length = strlen(name);
    uint64_t low = 0, high = g->n_tensors;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        const GgufTensor *t = &g->tensors[g->by_name[middle]];
        int order = compare_bytes(name, length, t->name, t->name_length);
        if (order == 0) {
            return t;
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

uint32_t gguf_n_files(const Gguf *g)
{
    return g->n_files;
}

const uint8_t *gguf_file_data(const Gguf *g, uint32_t file, size_t *size_out)
{
    g_assert(file < g->n_files);
    if (size_out != NULL) {
        *size_out = g->files[file].size;
    }
    return g->files[file].data;
}

const char *gguf_file_path(const Gguf *g, uint32_t file)
{
    g_assert(file < g->n_files);
    return g->files[file].path;
}
