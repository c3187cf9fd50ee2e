#include "proto/model/hf_model.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/hf_layout.h"
#include "proto/model/model_config.h"
#include "proto/model/safetensors.h"

#include <jansson.h>
#include <string.h>

#define CONFIG_LIMIT (1u << 20)
#define INDEX_LIMIT (32u << 20)
#define FILES_LIMIT 1024u

struct HfModel {
    char *directory;
    ModelSpec *spec;
    GPtrArray *files;                  /* Safetensors */
    const SafetensorsTensor **tensors; /* by tensor of the spec; borrowed from the files */
};

static bool fail(const char *directory, GError **error, const char *format, ...)
    G_GNUC_PRINTF(3, 4);

static bool fail(const char *directory, GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s: %s", directory, what);
    return false;
}

/* ---- config.json ---- */

/* A JSON object from a file of the directory; NULL without an error if the file is not there. */
static json_t *read_json(const char *directory, const char *name, size_t limit, GError **error)
{
    g_autofree char *path = g_build_filename(directory, name, NULL);
    g_autoptr(GMappedFile) file = g_mapped_file_new(path, FALSE, NULL);
    if (file == NULL) {
        return NULL;
    }
    const size_t size = g_mapped_file_get_length(file);
    json_error_t why = {.text = "it is empty"};
    json_t *object = size > 0 && size <= limit ? json_loadb(g_mapped_file_get_contents(file), size,
                                                            JSON_REJECT_DUPLICATES, &why)
                                               : NULL;
    if (!json_is_object(object)) {
        fail(directory, error, "%s is no JSON object of at most %zu bytes: %.80s; get it again",
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

static double number(const json_t *config, const char *key, double fallback)
{
    const json_t *value = json_object_get(config, key);
    return json_is_number(value) ? json_number_value(value) : fallback;
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
           fail(directory, error, "%s '%.40s' is not supported; %s is", key, value, values[0]);
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
    out->norm_eps = (float)number(config, "layer_norm_epsilon", 1e-5);
    out->untied = !flag(config, "tie_word_embeddings", true);
    if (!flag(config, "scale_attn_weights", true) ||
        flag(config, "scale_attn_by_inverse_layer_idx", false)) {
        return fail(directory, error,
                    "attention that is scaled otherwise is not supported; take "
                    "a model with scale_attn_weights alone");
    }
    return is_known(directory, config, "activation_function", gelu, error);
}

static bool read_llama(const char *directory, const json_t *config, ModelConfig *out,
                       GError **error)
{
    static const char *const silu[] = {"silu", "swish", NULL}, *const plain[] = {"default", NULL};
    const json_t *scaling = json_object_get(config, "rope_scaling"),
                 *rope = json_object_get(config, "rope_parameters");
    out->family = FAMILY_LLAMA;
    out->layers = count(config, "num_hidden_layers", 0);
    out->width = count(config, "hidden_size", 0);
    out->heads = count(config, "num_attention_heads", 0);
    out->kv_heads = count(config, "num_key_value_heads", 0);
    out->head_size = count(config, "head_dim", 0);
    out->ffn_width = count(config, "intermediate_size", 0);
    out->context = count(config, "max_position_embeddings", 0);
    out->norm_eps = (float)number(config, "rms_norm_eps", 1e-6);
    out->rope_base = number(json_is_object(rope) ? rope : config, "rope_theta",
                            number(config, "rope_theta", 1e4));
    out->untied = !flag(config, "tie_word_embeddings", false);
    out->qkv_bias = flag(config, "attention_bias", false);
    if (flag(config, "mlp_bias", false)) {
        return fail(directory, error, "biases of the feed-forward network are not supported");
    }
    return is_known(directory, config, "hidden_act", silu, error) &&
           is_known(directory, scaling, "rope_type", plain, error) &&
           is_known(directory, scaling, "type", plain, error) &&
           is_known(directory, rope, "rope_type", plain, error);
}

static ModelSpec *read_config(const char *directory, GError **error)
{
    GError *why = NULL;
    json_t *config = read_json(directory, "config.json", CONFIG_LIMIT, &why);
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
    bool ok = g_strcmp0(type, "gpt2") == 0    ? read_gpt2(directory, config, &c, error)
              : g_strcmp0(type, "llama") == 0 ? read_llama(directory, config, &c, error)
                                              : fail(directory, error,
                                                     "model_type '%.40s' is not supported; gpt2 "
                                                     "and llama are",
                                                     type != NULL ? type : "");
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
        return fail(m->directory, error, "its index names the file '%.60s'; get it again", name);
    }
    g_autofree char *path = g_build_filename(m->directory, name, NULL);
    Safetensors *file = safetensors_open(path, error);
    if (file != NULL) {
        g_ptr_array_add(m->files, file);
    }
    return file != NULL;
}

static bool add_files(HfModel *m, GError **error)
{
    GError *why = NULL;
    json_t *index = read_json(m->directory, "model.safetensors.index.json", INDEX_LIMIT, &why);
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
                              : fail(m->directory, error, "its index is damaged; get it again");
        }
    }
    json_decref(index);
    return ok;
}

/* Names with and without GPT-2's "transformer." are both in use. */
static const SafetensorsTensor *find(const HfModel *m, const char *name)
{
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

static bool bind(HfModel *m, GError **error)
{
    m->tensors = weft_alloc(m->spec->n_tensors, sizeof *m->tensors, "a table of tensors", error);
    for (uint32_t i = 0; m->tensors != NULL && i < m->spec->n_tensors; i++) {
        const HfPlace p = hf_place(m->spec, &m->spec->tensors[i]);
        const SafetensorsTensor *t = find(m, p.name);
        if (t == NULL) {
            return fail(m->directory, error, "tensor %s is missing; get the files again", p.name);
        }
        const bool vector = m->spec->tensors[i].rows == 1 && t->n_dims == 1;
        if (t->type == DTYPE_LIMIT) {
            return fail(m->directory, error,
                        "tensor %s is stored as %s; F32, F16 and BF16 are supported", p.name,
                        t->kind);
        }
        if (vector ? t->dims[0] != p.columns
                   : t->n_dims != 2 || t->dims[0] != p.rows || t->dims[1] != p.columns) {
            return fail(m->directory, error,
                        "tensor %s is %" G_GUINT64_FORMAT " x %" G_GUINT64_FORMAT
                        ", and config.json asks for %u x %u",
                        p.name, vector ? 1 : t->dims[0], vector ? t->dims[0] : t->dims[1], p.rows,
                        p.columns);
        }
        m->tensors[i] = t;
    }
    return m->tensors != NULL;
}

HfModel *hf_model_open(const char *directory, GError **error)
{
    g_autoptr(HfModel) m = g_new0(HfModel, 1);
    m->directory = g_strdup(directory);
    m->files = g_ptr_array_new_with_free_func((GDestroyNotify)safetensors_free);
    m->spec = read_config(directory, error);
    return m->spec != NULL && add_files(m, error) && bind(m, error) ? g_steal_pointer(&m) : NULL;
}

void hf_model_free(HfModel *m)
{
    if (m == NULL) {
        return;
    }
    g_ptr_array_unref(m->files);
    weft_free(m->tensors);
    model_spec_free(m->spec);
    g_free(m->directory);
    g_free(m);
}

const ModelSpec *hf_model_spec(const HfModel *m)
{
    return m->spec;
}

/* ---- reading ---- */

static float element(const SafetensorsTensor *t, size_t i)
{
    float value;
    dequantise_row(t->type, t->data + i * dtype_info(t->type)->block_bytes, 1, &value);
    return value;
}

static void read_row(const TensorSpec *spec, const SafetensorsTensor *t, const HfPlace *p,
                     uint32_t row, float *out)
{
    const size_t bytes = dtype_info(t->type)->block_bytes;
    const bool vector = spec->rows == 1;
    if (p->form == HF_ROWS) {
        dequantise_row(t->type, t->data + ((size_t)row * p->columns + p->first) * bytes,
                       spec->columns, out);
    } else if (p->form == HF_HEADS && !vector) {
        const size_t from = hf_head_row(row, p->head_size);
        dequantise_row(t->type, t->data + from * p->columns * bytes, spec->columns, out);
    } else {
        for (uint32_t c = 0; c < spec->columns; c++) {
            out[c] = element(t, vector ? hf_head_row(c, p->head_size)
                                       : (size_t)c * p->columns + p->first + row);
        }
    }
}

bool hf_model_read(const void *model, uint32_t tensor, uint32_t row0, uint32_t n_rows, float *out,
                   GError **error)
{
    const HfModel *m = model;
    const TensorSpec *t = &m->spec->tensors[tensor];
    const HfPlace p = hf_place(m->spec, t);
    for (uint32_t r = 0; r < n_rows; r++) {
        read_row(t, m->tensors[tensor], &p, row0 + r, out + (size_t)r * t->columns);
    }
    return true;
}
