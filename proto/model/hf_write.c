/* Writing a Hugging Face directory: the tensors of hf_layout.h, one after another. */
#include "proto/model/hf_model.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/hf_layout.h"
#include "proto/model/safetensors.h"
#include "proto/model/whole_file.h"
#include "proto/text/tokenizer_json.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- config.json ---- */

static json_t *gpt2_json(const ModelSpec *s)
{
    return json_pack("{s:[s],s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:f,s:f,s:f}", "architectures",
                     "GPT2LMHeadModel", "model_type", "gpt2", "activation_function", "gelu_new",
                     "n_layer", (int)s->n_layers, "n_embd", (int)s->width, "n_head",
                     (int)s->n_heads, "n_positions", (int)s->context, "n_ctx", (int)s->context,
                     "n_inner", (int)s->ffn_width, "layer_norm_epsilon", (double)s->norm_eps,
                     "attn_pdrop", 0.0, "embd_pdrop", 0.0, "resid_pdrop", 0.0);
}

static json_t *llama_json(const ModelSpec *s)
{
    return json_pack("{s:[s],s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:f,s:b,s:b}", "architectures",
                     "LlamaForCausalLM", "model_type", "llama", "hidden_act", "silu",
                     "num_hidden_layers", (int)s->n_layers, "hidden_size", (int)s->width,
                     "num_attention_heads", (int)s->n_heads, "num_key_value_heads",
                     (int)s->n_kv_heads, "head_dim", (int)s->head_size, "intermediate_size",
                     (int)s->ffn_width, "max_position_embeddings", (int)s->context, "rms_norm_eps",
                     (double)s->norm_eps, "rope_theta", s->rope.freq_base, "attention_bias",
                     (int)(model_spec_tensor(s, ROLE_ATTN_Q_BIAS, 0) != NULL), "mlp_bias", 0);
}

/* What such a directory cannot say. */
static bool check_spec(const ModelSpec *s, GError **error)
{
    const bool llama = s->family == FAMILY_LLAMA;
    const char *what =
        llama && (s->rope.scaling != ROPE_SCALING_NONE || s->rope.dims != s->head_size)
            ? "scaled or partial rope"
        : llama && model_spec_tensor(s, ROLE_ATTN_Q_BIAS, 0) != NULL
            ? "biases of Q, K and V without one of the output"
        : fabsf(s->attention_scale * sqrtf((float)s->head_size) - 1.0f) > 1e-4f
            ? "an attention scale of its own"
            : NULL;
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s has %s, which this export cannot write; export to GGUF", s->name,
                    what);
    }
    return what == NULL;
}

/* A model without one says so: else transformers takes that of the first model of the family. */
static void set_id(json_t *config, const char *key, int64_t id)
{
    json_object_set_new(config, key, id >= 0 ? json_integer(id) : json_null());
}

static char *config_text(const ModelContents *c, Dtype type)
{
    const ModelSpec *s = c->spec;
    json_t *config = s->family == FAMILY_GPT2 ? gpt2_json(s) : llama_json(s);
    const char *name = type == DTYPE_F32 ? "float32" : type == DTYPE_F16 ? "float16" : "bfloat16";
    json_object_set_new(config, "vocab_size", json_integer(s->vocab_size));
    json_object_set_new(config, "tie_word_embeddings", json_boolean(s->tied_output));
    json_object_set_new(config, "torch_dtype", json_string(name));
    set_id(config, "eos_token_id", c->vocab != NULL ? c->vocab->eos : -1);
    set_id(config, "bos_token_id", c->vocab != NULL ? c->vocab->bos : -1);
    char *text = json_dumps(config, JSON_INDENT(2)), *copy = g_strconcat(text, "\n", NULL);
    free(text);
    json_decref(config);
    return copy;
}

/* ---- weights ---- */

/* Puts a row of a logical tensor where it belongs in the file's tensor. */
static void place_row(const TensorSpec *t, const HfPlace *p, uint32_t row, const float *from,
                      float *to)
{
    for (uint32_t c = 0; c < t->columns; c++) {
        const size_t at = p->form == HF_ROWS      ? (size_t)row * p->columns + p->first + c
                          : p->form == HF_COLUMNS ? (size_t)c * p->columns + p->first + row
                          : t->rows == 1          ? hf_head_row(c, p->head_size)
                                         : (size_t)hf_head_row(row, p->head_size) * p->columns + c;
        to[at] = from[c];
    }
}

static bool gather(const ModelContents *c, uint32_t tensor, float *to, GError **error)
{
    const TensorSpec *t = &c->spec->tensors[tensor];
    const HfPlace p = hf_place(c->spec, t);
    float *row = weft_alloc(t->columns, sizeof *row, "a row", error);
    bool ok = row != NULL;
    for (uint32_t r = 0; ok && r < t->rows; r++) {
        ok = c->read(c->user, tensor, r, 1, row, error);
        if (ok) {
            place_row(t, &p, r, row, to);
        }
    }
    weft_free(row);
    return ok;
}

/* Tensors [first, last) of the spec make one of the file. */
static bool write_tensor(WholeFile *file, const ModelContents *c, uint32_t first, uint32_t last,
                         Dtype type, GError **error)
{
    const HfPlace p = hf_place(c->spec, &c->spec->tensors[first]);
    const size_t n = (size_t)p.rows * p.columns;
    size_t row_bytes = 0;
    dtype_row_bytes(type, p.columns, &row_bytes);
    float *values = weft_alloc(n, sizeof *values, "a tensor", error);
    uint8_t *row = values != NULL ? weft_alloc(row_bytes, 1, "a row", error) : NULL;
    bool ok = row != NULL;
    for (uint32_t i = first; ok && i < last; i++) {
        ok = gather(c, i, values, error);
    }
    for (uint32_t r = 0; ok && r < p.rows; r++) {
        quantise_row(type, values + (size_t)r * p.columns, p.columns, row);
        ok = whole_file_write(file, row, row_bytes, error);
    }
    weft_free(values);
    weft_free(row);
    return ok;
}

/* The first tensor behind `first` that lies in another one of the file: those of one are neighbours
 * in canonical order. */
static uint32_t end_of(const ModelSpec *spec, uint32_t first)
{
    const HfPlace p = hf_place(spec, &spec->tensors[first]);
    uint32_t last = first + 1;
    while (last < spec->n_tensors &&
           strcmp(hf_place(spec, &spec->tensors[last]).name, p.name) == 0) {
        last++;
    }
    return last;
}

static bool write_weights(const char *path, const ModelContents *c, Dtype type, GError **error)
{
    const ModelSpec *spec = c->spec;
    g_autofree SafetensorsEntry *entries = g_new0(SafetensorsEntry, spec->n_tensors);
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);
    for (uint32_t i = 0; i < spec->n_tensors; i = end_of(spec, i)) {
        const HfPlace p = hf_place(spec, &spec->tensors[i]);
        const bool vector = spec->tensors[i].rows == 1 && p.rows == 1 &&
                            spec->tensors[i].role != ROLE_POSITION_EMBD &&
                            spec->tensors[i].role != ROLE_TOKEN_EMBD;
        g_ptr_array_add(names, g_strdup(p.name));
        entries[names->len - 1] =
            (SafetensorsEntry){.name = names->pdata[names->len - 1],
                               .type = type,
                               .n_dims = vector ? 1 : 2,
                               .dims = {vector ? p.columns : p.rows, p.columns}};
    }
    const char *const metadata[] = {"format", "pt", NULL};
    g_autoptr(GBytes) header = safetensors_header(entries, names->len, metadata, error);
    WholeFile *file = header != NULL ? whole_file_new(path, error) : NULL;
    if (file == NULL) {
        return false;
    }
    bool ok =
        whole_file_write(file, g_bytes_get_data(header, NULL), g_bytes_get_size(header), error);
    for (uint32_t i = 0, last; ok && i < spec->n_tensors; i = last) {
        last = end_of(spec, i);
        ok = write_tensor(file, c, i, last, type, error);
    }
    return whole_file_finish(file, ok, error);
}

static bool put_text(const char *directory, const char *name, char *text /* taken */,
                     GError **error)
{
    g_autofree char *path = g_build_filename(directory, name, NULL);
    const bool ok = text != NULL && whole_file_put(path, text, strlen(text), error);
    g_free(text);
    return ok;
}

bool hf_model_write(const char *directory, const ModelContents *c, Dtype type, GError **error)
{
    if (!check_spec(c->spec, error)) {
        return false;
    }
    if (g_mkdir_with_parents(directory, 0755) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot create %s: %s; check the folder",
                    directory, g_strerror(errno));
        return false;
    }
    if (c->vocab != NULL &&
        (!put_text(directory, "tokenizer.json", json_vocab_write(c->vocab, error), error) ||
         !put_text(directory, "tokenizer_config.json",
                   json_vocab_write_config(c->vocab, c->chat_template), error))) {
        return false;
    }
    g_autofree char *weights = g_build_filename(directory, "model.safetensors", NULL);
    return write_weights(weights, c, type, error) &&
           put_text(directory, "config.json", config_text(c, type), error);
}
