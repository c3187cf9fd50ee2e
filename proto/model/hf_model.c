#include "proto/model/hf_model.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/hf_config.h"
#include "proto/model/hf_fp8.h"
#include "proto/model/hf_layout.h"
#include "proto/model/hf_rope.h"
#include "proto/model/model_config.h"
#include "proto/model/safetensors.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#define CONFIG_LIMIT (1u << 20)
#define INDEX_LIMIT (32u << 20)
#define FILES_LIMIT 1024u

struct HfModel {
    char *directory;
    ModelSpec *spec;
    GPtrArray *texts;                  /* GMappedFile: config.json, the index */
    GPtrArray *files;                  /* Safetensors */
    GPtrArray *paths;                  /* of both, in this order */
    const SafetensorsTensor **tensors; /* by tensor of the spec; borrowed from the files */
    HfScale *scales;                   /* of each, where it is fp8 */
    float *rope_factors;               /* or NULL */
    SafetensorsTensor rope_tensor;     /* they, as if a file had them */
};

/* ---- config.json ---- */

/* A JSON object from a file of the directory; NULL without an error if the file is not there. */
static json_t *read_json(HfModel *m, const char *name, size_t limit, GError **error)
{
    const char *directory = m->directory;
    g_autofree char *path = g_build_filename(directory, name, NULL);
    GMappedFile *file = g_mapped_file_new(path, FALSE, NULL);
    if (file == NULL) {
        return NULL;
    }
    g_ptr_array_add(m->texts, file);
    g_ptr_array_add(m->paths, g_steal_pointer(&path));
    const size_t size = g_mapped_file_get_length(file);
    json_error_t why = {.text = "it is empty"};
    json_t *object = size > 0 && size <= limit ? json_loadb(g_mapped_file_get_contents(file), size,
                                                            JSON_REJECT_DUPLICATES, &why)
                                               : NULL;
    if (!json_is_object(object)) {
        hf_fail(directory, error, "%s is no JSON object of at most %zu bytes: %.80s; get it again",
                name, limit, why.text);
        g_clear_pointer(&object, json_decref);
    }
    return object;
}

/* A count; `fallback` where it is absent or null. */
static uint32_t count(const json_t *config, const char *key, uint32_t fallback)
{
    const json_t *value = json_object_get(config, key);
    if (value == NULL || json_is_null(value)) {
        return fallback;
    }
    const json_int_t n = json_integer_value(value);
    return n >= 0 && n <= G_MAXUINT32 ? (uint32_t)n : 0;
}

static bool flag(const json_t *config, const char *key, bool fallback)
{
    const json_t *value = json_object_get(config, key);
    return json_is_boolean(value) ? json_is_true(value) : fallback;
}

/* False if a setting has a value that is not computed here. */
static bool is_known(const char *directory, const json_t *config, const char *key,
                     const char *const *values, GError **error)
{
    const char *value = json_string_value(json_object_get(config, key));
    return value == NULL || g_strv_contains(values, value) ||
           hf_fail(directory, error, "%s '%.40s' is not supported; %s is", key, value, values[0]);
}

static bool read_gpt2(const char *directory, const json_t *config, ModelConfig *out, GError **error)
{
    static const char *const gelu[] = {"gelu_new", "gelu_pytorch_tanh", NULL};
    out->family = FAMILY_GPT2;
    out->layers = count(config, "n_layer", 12);
    out->width = count(config, "n_embd", 768);
    out->heads = count(config, "n_head", 12);
    out->ffn_width = count(config, "n_inner", 0);
    out->context = count(config, "n_positions", 1024);
    out->norm_eps = (float)hf_number(config, "layer_norm_epsilon", 1e-5);
    out->untied = !flag(config, "tie_word_embeddings", true);
    if (!flag(config, "scale_attn_weights", true) ||
        flag(config, "scale_attn_by_inverse_layer_idx", false)) {
        return hf_fail(directory, error,
                       "attention that is scaled otherwise is not supported; take "
                       "a model with scale_attn_weights alone");
    }
    return is_known(directory, config, "activation_function", gelu, error);
}

static bool read_llama(HfModel *m, const json_t *config, ModelConfig *out, GError **error)
{
    const char *directory = m->directory;
    static const char *const silu[] = {"silu", "swish", NULL};
    out->family = FAMILY_LLAMA;
    out->layers = count(config, "num_hidden_layers", 0);
    out->width = count(config, "hidden_size", 0);
    out->heads = count(config, "num_attention_heads", 0);
    out->kv_heads = count(config, "num_key_value_heads", 0);
    out->head_size = count(config, "head_dim", 0);
    out->ffn_width = count(config, "intermediate_size", 0);
    out->context = count(config, "max_position_embeddings", 0);
    out->norm_eps = (float)hf_number(config, "rms_norm_eps", 1e-6);
    out->untied = !flag(config, "tie_word_embeddings", false);
    out->qkv_bias = flag(config, "attention_bias", false);
    if (flag(config, "mlp_bias", false)) {
        return hf_fail(directory, error, "biases of the feed-forward network are not supported");
    }
    const uint32_t head_size = out->head_size != 0 ? out->head_size
                               : out->heads != 0   ? out->width / out->heads
                                                   : 0;
    return is_known(directory, config, "hidden_act", silu, error) &&
           hf_rope_read(directory, config, head_size, &out->rope, &m->rope_factors, error);
}

/* Llama's network where no token looks back a part of the context alone. */
static bool read_mistral(HfModel *m, const json_t *config, ModelConfig *out, GError **error)
{
    if (!read_llama(m, config, out, error)) {
        return false;
    }
    const uint32_t window = count(config, "sliding_window", 0);
    if (window != 0 && window < out->context) {
        return hf_fail(m->directory, error,
                       "a sliding_window of %u tokens in a context of %u is not supported; take a "
                       "model without one",
                       window, out->context);
    }
    return true;
}

static ModelSpec *read_config(HfModel *m, GError **error)
{
    const char *directory = m->directory;
    GError *why = NULL;
    json_t *config = read_json(m, "config.json", CONFIG_LIMIT, &why);
    if (config == NULL) {
        if (why == NULL) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                        "%s has no config.json; name a GGUF file, a checkpoint or a Hugging Face "
                        "directory",
                        directory);
        } else {
            g_propagate_error(error, why);
        }
        return NULL;
    }
    g_autofree char *base = g_path_get_basename(directory), *name = g_utf8_make_valid(base, -1);
    ModelConfig c = {.vocabulary = count(config, "vocab_size", 0), .name = name};
    const char *type = json_string_value(json_object_get(config, "model_type"));
    bool ok = g_strcmp0(type, "gpt2") == 0      ? read_gpt2(directory, config, &c, error)
              : g_strcmp0(type, "llama") == 0   ? read_llama(m, config, &c, error)
              : g_strcmp0(type, "mistral") == 0 ? read_mistral(m, config, &c, error)
                                                : hf_fail(directory, error,
                                                          "model_type '%.40s' is not supported; "
                                                          "gpt2, llama and mistral are",
                                                          type != NULL ? type : "");
    ok = ok && hf_quantization_check(directory, config, error);
    json_decref(config);
    ModelSpec *spec = ok ? model_spec_from_config(&c, error) : NULL;
    if (ok && spec == NULL) {
        g_prefix_error(error, "%s: ", directory);
    }
    return spec;
}

/* ---- weights ---- */

static bool add_file(HfModel *m, const char *name, GError **error)
{
    if (name[0] == '.' || strchr(name, '/') != NULL || m->files->len >= FILES_LIMIT) {
        return hf_fail(m->directory, error, "its index names the file '%.60s'; get it again", name);
    }
    g_autofree char *path = g_build_filename(m->directory, name, NULL);
    Safetensors *file = safetensors_open(path, error);
    if (file != NULL) {
        g_ptr_array_add(m->files, file);
        g_ptr_array_add(m->paths, g_steal_pointer(&path));
    }
    return file != NULL;
}

static bool add_files(HfModel *m, GError **error)
{
    GError *why = NULL;
    json_t *index = read_json(m, "model.safetensors.index.json", INDEX_LIMIT, &why);
    if (index == NULL) {
        return why == NULL ? add_file(m, "model.safetensors", error)
                           : (g_propagate_error(error, why), false);
    }
    g_autoptr(GHashTable) seen = g_hash_table_new(g_str_hash, g_str_equal);
    const char *key;
    json_t *value;
    bool ok = true;
    json_object_foreach(json_object_get(index, "weight_map"), key, value)
    {
        const char *name = json_string_value(value);
        if (ok && (name == NULL || g_hash_table_add(seen, (char *)name))) {
            ok = name != NULL ? add_file(m, name, error)
                              : hf_fail(m->directory, error, "its index is damaged; get it again");
        }
    }
    json_decref(index);
    return ok;
}

/* Names with and without GPT-2's "transformer." are both in use. */
static const SafetensorsTensor *find(const void *user, const char *name)
{
    const HfModel *m = user;
    static const char prefix[] = "transformer.";
    const SafetensorsTensor *t = NULL;
    for (guint i = 0; t == NULL && i < m->files->len; i++) {
        t = safetensors_find(m->files->pdata[i], name);
        if (t == NULL && g_str_has_prefix(name, prefix)) {
            t = safetensors_find(m->files->pdata[i], name + sizeof prefix - 1);
        }
    }
    return t;
}

/* A type that can be read for this tensor. */
static bool check_type(const HfModel *m, const SafetensorsTensor *t, const TensorSpec *spec,
                       const HfPlace *p, GError **error)
{
    if (t->type == DTYPE_LIMIT && !hf_is_fp8(t)) {
        return hf_fail(
            m->directory, error,
            "tensor %s is stored as %s; F32, F16, BF16 and F8_E4M3 are supported: take the "
            "model in one of them, or a GGUF file of it",
            p->name, t->kind);
    }
    return t->type != DTYPE_LIMIT || (spec->rows > 1 && p->form != HF_COLUMNS) ||
           hf_fail(m->directory, error,
                   "tensor %s is stored as F8_E4M3; only matrices of llama models may be", p->name);
}

static bool bind_tensor(HfModel *m, uint32_t i, GError **error)
{
    const TensorSpec *spec = &m->spec->tensors[i];
    const HfPlace p = hf_place(m->spec, spec);
    if (spec->role == ROLE_ROPE_FACTORS) {
        m->rope_tensor = (SafetensorsTensor){.name = "rope factors",
                                             .kind = "F32",
                                             .type = DTYPE_F32,
                                             .n_dims = 1,
                                             .dims = {spec->columns},
                                             .data = (const uint8_t *)m->rope_factors,
                                             .size_bytes = spec->columns * sizeof(float)};
        m->tensors[i] = &m->rope_tensor;
        return true;
    }
    const SafetensorsTensor *t = find(m, p.name);
    if (t == NULL) {
        return hf_fail(m->directory, error, "tensor %s is missing; get the files again", p.name);
    }
    const bool vector = spec->rows == 1 && t->n_dims == 1;
    if (!check_type(m, t, spec, &p, error)) {
        return false;
    }
    if (vector ? t->dims[0] != p.columns
               : t->n_dims != 2 || t->dims[0] != p.rows || t->dims[1] != p.columns) {
        return hf_fail(m->directory, error,
                       "tensor %s is %" G_GUINT64_FORMAT " x %" G_GUINT64_FORMAT
                       ", and config.json asks for %u x %u",
                       p.name, vector ? 1 : t->dims[0], vector ? t->dims[0] : t->dims[1], p.rows,
                       p.columns);
    }
    m->tensors[i] = t;
    return !hf_is_fp8(t) || hf_scale_bind(m->directory, t, find, m, &m->scales[i], error);
}

static bool bind(HfModel *m, GError **error)
{
    const uint32_t n = m->spec->n_tensors;
    m->tensors = weft_alloc(n, sizeof *m->tensors, "a table of tensors", error);
    m->scales =
        m->tensors != NULL ? weft_alloc(n, sizeof *m->scales, "a table of scales", error) : NULL;
    bool ok = m->scales != NULL;
    for (guint i = 0; ok && i < m->files->len; i++) {
        ok = hf_scales_check(m->directory, m->files->pdata[i], find, m, error);
    }
    for (uint32_t i = 0; ok && i < n; i++) {
        ok = bind_tensor(m, i, error);
    }
    return ok;
}

HfModel *hf_model_open(const char *directory, GError **error)
{
    g_autoptr(HfModel) m = g_new0(HfModel, 1);
    m->directory = g_strdup(directory);
    m->texts = g_ptr_array_new_with_free_func((GDestroyNotify)g_mapped_file_unref);
    m->files = g_ptr_array_new_with_free_func((GDestroyNotify)safetensors_free);
    m->paths = g_ptr_array_new_with_free_func(g_free);
    m->spec = read_config(m, error);
    return m->spec != NULL && add_files(m, error) && bind(m, error) ? g_steal_pointer(&m) : NULL;
}

void hf_model_free(HfModel *m)
{
    if (m == NULL) {
        return;
    }
    g_ptr_array_unref(m->texts);
    g_ptr_array_unref(m->files);
    g_ptr_array_unref(m->paths);
    weft_free(m->tensors);
    weft_free(m->scales);
    g_free(m->rope_factors);
    model_spec_free(m->spec);
    g_free(m->directory);
    g_free(m);
}

uint32_t hf_model_n_files(const HfModel *m)
{
    return m->paths->len;
}

const char *hf_model_file_path(const HfModel *m, uint32_t file)
{
    return m->paths->pdata[file];
}

Hash128 hf_model_hash(const HfModel *m)
{
    Hasher *hasher = hasher_new();
    for (guint i = 0; i < m->texts->len; i++) {
        GMappedFile *file = m->texts->pdata[i];
        hasher_update(hasher, g_mapped_file_get_contents(file), g_mapped_file_get_length(file));
    }
    for (guint i = 0; i < m->files->len; i++) {
        size_t size;
        const uint8_t *bytes = safetensors_bytes(m->files->pdata[i], &size);
        hasher_update(hasher, bytes, size);
    }
    const Hash128 hash = hasher_finish(hasher);
    hasher_free(hasher);
    return hash;
}

const ModelSpec *hf_model_spec(const HfModel *m)
{
    return m->spec;
}

/* ---- reading ---- */

/* Where row `row` of a matrix lies. */
static uint32_t file_row(const HfPlace *p, uint32_t row)
{
    return p->form == HF_HEADS ? hf_head_row(row, p->head_size) : row;
}

/* Which of the file's elements that of a vector, or of a matrix that is stored by columns, is. */
static size_t place_of(const TensorSpec *spec, const HfPlace *p, uint32_t row, uint32_t column)
{
    if (spec->rows == 1) {
        return p->first + file_row(p, column);
    }
    return p->form == HF_COLUMNS ? (size_t)column * p->columns + p->first + row
                                 : (size_t)file_row(p, row) * p->columns + p->first + column;
}

static bool is_contiguous(const TensorSpec *spec, const HfPlace *p)
{
    return p->form == HF_ROWS || (p->form == HF_HEADS && spec->rows > 1);
}

static void read_row(const HfModel *m, uint32_t tensor, const HfPlace *p, uint32_t row, float *out)
{
    const TensorSpec *spec = &m->spec->tensors[tensor];
    const SafetensorsTensor *t = m->tensors[tensor];
    if (hf_is_fp8(t)) {
        for (uint32_t c = 0; c < spec->columns; c++) {
            out[c] = hf_fp8_element(t, &m->scales[tensor], file_row(p, row), c);
        }
        return;
    }
    const size_t bytes = dtype_info(t->type)->block_bytes;
    const uint32_t run = is_contiguous(spec, p) ? spec->columns : 1;
    for (uint32_t c = 0; c < spec->columns; c += run) {
        dequantise_row(t->type, t->data + place_of(spec, p, row, c) * bytes, run, out + c);
    }
}

bool hf_model_read(const void *model, uint32_t tensor, uint32_t row0, uint32_t n_rows, float *out,
                   GError **error)
{
    const HfModel *m = model;
    const TensorSpec *t = &m->spec->tensors[tensor];
    const HfPlace p = hf_place(m->spec, t);
    for (uint32_t r = 0; r < n_rows; r++) {
        float *to = out + (size_t)r * t->columns;
        read_row(m, tensor, &p, row0 + r, to);
        for (uint32_t c = 0; hf_is_fp8(m->tensors[tensor]) && c < t->columns; c++) {
            if (isnan(to[c])) {
                return hf_fail(m->directory, error,
                               "weight %s has no number (NaN) in row %u, column %u; get the files "
                               "again",
                               p.name, file_row(&p, row0 + r), c);
            }
        }
    }
    return true;
}

/* ---- serving ---- */

/* What tensor i is served as. */
static bool serve_as(const HfModel *m, uint32_t i, TensorSpec *t, GError **error)
{
    const bool fp8 = hf_is_fp8(m->tensors[i]);
    size_t row_bytes = 0, size_bytes = 0;
    t->type = t->rows == 1 ? DTYPE_F32 : fp8 ? DTYPE_F8_E4M3 : m->tensors[i]->type;
    if (!dtype_row_bytes(t->type, t->columns, &row_bytes) ||
        !sz_mul(row_bytes, t->rows, &size_bytes)) {
        return hf_fail(m->directory, error,
                       "weight %s has rows of %u elements, and fp8 weights are served in blocks of "
                       "%u; write the model as a GGUF file with weft export",
                       m->tensors[i]->name, t->columns, dtype_info(t->type)->block);
    }
    t->size_bytes = size_bytes;
    t->offset = i > 0 ? t[-1].offset + t[-1].size_bytes : 0;
    return true;
}

ModelSpec *hf_model_serving_spec(const HfModel *m, GError **error)
{
    const ModelSpec *from = m->spec;
    g_autoptr(ModelSpec) spec = g_memdup2(from, sizeof *from);
    spec->name = g_strdup(from->name);
    spec->tensors = weft_alloc(from->n_tensors, sizeof *spec->tensors, "a list of tensors", error);
    for (uint32_t i = 0; spec->tensors != NULL && i < from->n_tensors; i++) {
        spec->tensors[i] = from->tensors[i];
        spec->tensors[i].name = g_strdup(from->tensors[i].name);
    }
    for (uint32_t i = 0; spec->tensors != NULL && i < from->n_tensors; i++) {
        if (!serve_as(m, i, &spec->tensors[i], error)) {
            return NULL;
        }
    }
    return spec->tensors != NULL && model_spec_finish(spec, error) ? g_steal_pointer(&spec) : NULL;
}

/* Columns of a row, as the serving spec has them. */
static bool copy_row(const HfModel *m, uint32_t tensor, const TensorSpec *spec, const HfPlace *p,
                     uint32_t row, uint32_t column0, uint32_t n_columns, uint8_t *out,
                     GError **error)
{
    const SafetensorsTensor *t = m->tensors[tensor];
    if (hf_is_fp8(t)) {
        return hf_fp8_copy(t, &m->scales[tensor], file_row(p, row), column0, n_columns, out, error);
    }
    const size_t bytes = dtype_info(t->type)->block_bytes;
    const uint32_t run = is_contiguous(spec, p) ? n_columns : 1;
    for (uint32_t c = 0; c < n_columns; c += run) {
        const uint8_t *from = t->data + place_of(spec, p, row, column0 + c) * bytes;
        if (spec->type == t->type) {
            memcpy(out + c * bytes, from, run * bytes);
            continue;
        }
        for (uint32_t i = 0; i < run; i++) { /* a vector that becomes f32 */
            float value;
            dequantise_row(t->type, from + i * bytes, 1, &value);
            memcpy(out + (c + i) * sizeof value, &value, sizeof value);
        }
    }
    return true;
}

bool hf_model_copy_slice(const HfModel *m, const ModelSpec *spec, uint32_t tensor, uint32_t slice,
                         uint8_t *out, GError **error)
{
    const TensorSpec *t = &spec->tensors[tensor];
    const HfPlace p = hf_place(m->spec, &m->spec->tensors[tensor]);
    const SliceRect rect = model_spec_slice(spec, t, slice);
    size_t row_bytes = 0;
    const bool whole_blocks = dtype_row_bytes(t->type, rect.n_cols, &row_bytes);
    g_assert(whole_blocks);
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        if (!copy_row(m, tensor, t, &p, rect.row0 + r, rect.col0, rect.n_cols, out + r * row_bytes,
                      error)) {
            return false;
        }
    }
    return true;
}
