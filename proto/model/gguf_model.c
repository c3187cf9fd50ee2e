/* From keys and tensor names of a llama or gpt2 GGUF to a ModelSpec. What is not understood is
 * refused with its name: a bias or a norm that is read over would give wrong text without a word.
 */
#include "proto/model/gguf.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <math.h>
#include <string.h>

#define MODEL_NAME_LIMIT 256u

/* ---- keys -------------------------------------------------------------------------------------
 */

static bool invalid(const Gguf *g, GError **error, const char *format, ...) G_GNUC_PRINTF(3, 4);

static bool invalid(const Gguf *g, GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s: %s", gguf_file_path(g, 0), what);
    return false;
}

/* A whole number that fits 32 bits; `fallback` when absent, G_MAXUINT64 = it must be there. */
static bool read_u32(const Gguf *g, const char *key, uint64_t fallback, uint32_t *out,
                     GError **error)
{
    GError *cause = NULL;
    uint64_t value = fallback;
    if (!gguf_get_u64(g, key, &value, &cause) && cause != NULL) {
        g_propagate_error(error, cause);
        return false;
    }
    if (value > G_MAXUINT32) {
        return value == G_MAXUINT64
                   ? invalid(g, error, "key '%s' is missing; convert the model again", key)
                   : invalid(g, error, "key '%s' is %" G_GUINT64_FORMAT ", beyond 32 bits", key,
                             value);
    }
    *out = (uint32_t)value;
    return true;
}

static bool read_f64(const Gguf *g, const char *key, double fallback, double *out, GError **error)
{
    GError *cause = NULL;
    *out = fallback;
    if (!gguf_get_f64(g, key, out, &cause) && cause != NULL) {
        g_propagate_error(error, cause);
        return false;
    }
    return true;
}

/* Returned; NULL when absent or no string. Always valid UTF-8 without control characters. */
static char *read_text(const Gguf *g, const char *key)
{
    const char *bytes;
    size_t length;
    if (!gguf_get_string(g, key, &bytes, &length, NULL) || length == 0) {
        return NULL;
    }
    g_autofree char *head = g_strndup(bytes, MIN(length, MODEL_NAME_LIMIT));
    char *text = g_utf8_make_valid(head, -1);
    for (char *c = text; *c != '\0'; c++) {
        if (g_ascii_iscntrl(*c)) {
            *c = ' ';
        }
    }
    return text;
}

static bool read_architecture(const Gguf *g, ModelFamily *family, GError **error)
{
    g_autofree char *architecture = read_text(g, "general.architecture");
    if (architecture == NULL) {
        return invalid(g, error,
                       "key 'general.architecture' is missing; name a language model's file");
    }
    const bool gpt2 = strcmp(architecture, "gpt2") == 0;
    if (!gpt2 && strcmp(architecture, "llama") != 0) {
        return invalid(g, error,
                       "architecture '%s' is not supported; take a model of architecture "
                       "'llama' or 'gpt2'",
                       architecture);
    }
    *family = gpt2 ? FAMILY_GPT2 : FAMILY_LLAMA;
    uint32_t n_experts;
    if (!read_u32(g, "llama.expert_count", 0, &n_experts, error)) {
        return false;
    }
    return n_experts == 0 ||
           invalid(g, error,
                   "it has %u experts, and expert models are not supported; take a "
                   "dense model of architecture 'llama'",
                   n_experts);
}

static bool read_dimensions(const Gguf *g, ModelSpec *spec, GError **error)
{
    double eps, scale;
    uint32_t key_length, value_length;
    if (!read_u32(g, "llama.block_count", G_MAXUINT64, &spec->n_layers, error) ||
        !read_u32(g, "llama.embedding_length", G_MAXUINT64, &spec->width, error) ||
        !read_u32(g, "llama.feed_forward_length", G_MAXUINT64, &spec->ffn_width, error) ||
        !read_u32(g, "llama.context_length", G_MAXUINT64, &spec->context, error) ||
        !read_u32(g, "llama.attention.head_count", G_MAXUINT64, &spec->n_heads, error) ||
        !read_u32(g, "llama.attention.head_count_kv", spec->n_heads, &spec->n_kv_heads, error) ||
        !read_u32(g, "llama.attention.key_length", 0, &key_length, error) ||
        !read_u32(g, "llama.attention.value_length", 0, &value_length, error) ||
        !read_u32(g, "llama.attention.sliding_window", 0, &spec->window, error) ||
        !read_f64(g, "llama.attention.layer_norm_rms_epsilon", NAN, &eps, error)) {
        return false;
    }
    if (isnan(eps)) {
        return invalid(g, error,
                       "key 'llama.attention.layer_norm_rms_epsilon' is missing or NaN; "
                       "convert the model again");
    }
    if (spec->n_heads == 0) {
        return invalid(g, error, "key 'llama.attention.head_count' is 0; get the file again");
    }
    if (key_length == 0 && value_length == 0 && spec->width % spec->n_heads != 0) {
        return invalid(g, error,
                       "a width of %u is not shared evenly by %u heads; get the file again",
                       spec->width, spec->n_heads);
    }
    uint32_t even = spec->width / spec->n_heads;
    key_length = key_length != 0 ? key_length : even;
    value_length = value_length != 0 ? value_length : even;
    if (key_length != value_length) {
        return invalid(g, error,
                       "keys of %u and values of %u elements a head are not supported; "
                       "take a model whose heads are equal",
                       key_length, value_length);
    }
    spec->head_size = key_length;
    spec->norm_eps = (float)eps;
    if (!read_f64(g, "llama.attention.scale", 0.0, &scale, error)) {
        return false;
    }
    spec->attention_scale =
        scale != 0.0 ? (float)scale : (float)(1.0 / sqrt((double)spec->head_size));
    return true;
}

static bool read_gpt2_dimensions(const Gguf *g, ModelSpec *spec, GError **error)
{
    double eps;
    if (!read_u32(g, "gpt2.block_count", G_MAXUINT64, &spec->n_layers, error) ||
        !read_u32(g, "gpt2.embedding_length", G_MAXUINT64, &spec->width, error) ||
        !read_u32(g, "gpt2.feed_forward_length", G_MAXUINT64, &spec->ffn_width, error) ||
        !read_u32(g, "gpt2.context_length", G_MAXUINT64, &spec->context, error) ||
        !read_u32(g, "gpt2.attention.head_count", G_MAXUINT64, &spec->n_heads, error) ||
        !read_f64(g, "gpt2.attention.layer_norm_epsilon", 1e-5, &eps, error)) {
        return false;
    }
    if (spec->n_heads == 0 || spec->width % spec->n_heads != 0) {
        return invalid(g, error,
                       "a width of %u is not shared evenly by %u heads; get the file again",
                       spec->width, spec->n_heads);
    }
    spec->n_kv_heads = spec->n_heads;
    spec->head_size = spec->width / spec->n_heads;
    spec->norm_eps = (float)eps;
    spec->attention_scale = (float)(1.0 / sqrt((double)spec->head_size));
    spec->rope.factor = 1.0;
    return true;
}

static bool read_rope(const Gguf *g, ModelSpec *spec, GError **error)
{
    RopeSpec *rope = &spec->rope;
    double linear;
    rope->pairing = ROPE_ADJACENT; /* converters permute Q and K rows of this architecture so */
    if (!read_u32(g, "llama.rope.dimension_count", spec->head_size, &rope->dims, error) ||
        !read_f64(g, "llama.rope.freq_base", 10000.0, &rope->freq_base, error) ||
        !read_f64(g, "llama.rope.scale_linear", 0.0, &linear, error) ||
        !read_f64(g, "llama.rope.scaling.factor", linear, &rope->factor, error) ||
        !read_u32(g, "llama.rope.scaling.original_context_length", 0, &rope->original_context,
                  error) ||
        !read_f64(g, "llama.rope.scaling.yarn_ext_factor", 1.0, &rope->yarn_ext_factor, error) ||
        !read_f64(g, "llama.rope.scaling.attn_factor", 1.0, &rope->yarn_attn_factor, error) ||
        !read_f64(g, "llama.rope.scaling.yarn_attn_factor", rope->yarn_attn_factor,
                  &rope->yarn_attn_factor, error) ||
        !read_f64(g, "llama.rope.scaling.yarn_beta_fast", 32.0, &rope->yarn_beta_fast, error) ||
        !read_f64(g, "llama.rope.scaling.yarn_beta_slow", 1.0, &rope->yarn_beta_slow, error)) {
        return false;
    }
    g_autofree char *type = read_text(g, "llama.rope.scaling.type");
    bool has_factors = gguf_find_tensor(g, "rope_freqs.weight") != NULL;
    /* Files from before the type key say linear by giving a factor. */
    const char *scaling = type != NULL ? type : rope->factor != 0.0 ? "linear" : "none";
    if (strcmp(scaling, "none") == 0 || (strcmp(scaling, "linear") == 0 && rope->factor == 0.0)) {
        rope->scaling = ROPE_SCALING_NONE;
    } else if (strcmp(scaling, "linear") == 0) {
        rope->scaling = rope->factor == 1.0 ? ROPE_SCALING_NONE : ROPE_SCALING_LINEAR;
    } else if (strcmp(scaling, "yarn") == 0) {
        rope->scaling = ROPE_SCALING_YARN;
        if (rope->original_context == 0) {
            rope->original_context = spec->context;
        }
    } else if (strcmp(scaling, "llama3") == 0 && has_factors) {
        rope->scaling = ROPE_SCALING_NONE;
    } else {
        return invalid(g, error,
                       "rope scaling '%s' is not supported; none, linear, yarn and a tensor "
                       "of factors (llama3) are",
                       scaling);
    }
    if (has_factors) {
        if (rope->scaling != ROPE_SCALING_NONE) {
            return invalid(g, error,
                           "rope scaling '%s' together with the tensor rope_freqs is not "
                           "supported; convert the model again",
                           scaling);
        }
        rope->scaling = ROPE_SCALING_FACTORS;
    }
    if (rope->scaling == ROPE_SCALING_NONE || rope->scaling == ROPE_SCALING_FACTORS ||
        rope->factor == 0.0) {
        rope->factor = 1.0;
    }
    return true;
}

/* ---- tensors ----------------------------------------------------------------------------------
 */

typedef struct NameRow {
    const char *name; /* behind "blk.N." for roles of a layer; NULL ends a list */
    TensorRole role;
} NameRow;

static const NameRow llama_global_names[] = {
    {"token_embd.weight", ROLE_TOKEN_EMBD},
    {"rope_freqs.weight", ROLE_ROPE_FACTORS},
    {"output_norm.weight", ROLE_OUTPUT_NORM},
    {"output.weight", ROLE_OUTPUT},
    {NULL, ROLE_LIMIT},
};
static const NameRow llama_layer_names[] = {
    {"attn_norm.weight", ROLE_ATTN_NORM},
    {"attn_q.weight", ROLE_ATTN_Q},
    {"attn_k.weight", ROLE_ATTN_K},
    {"attn_v.weight", ROLE_ATTN_V},
    {"attn_q.bias", ROLE_ATTN_Q_BIAS},
    {"attn_k.bias", ROLE_ATTN_K_BIAS},
    {"attn_v.bias", ROLE_ATTN_V_BIAS},
    {"attn_output.weight", ROLE_ATTN_OUT},
    {"ffn_norm.weight", ROLE_FFN_NORM},
    {"ffn_gate.weight", ROLE_FFN_GATE},
    {"ffn_up.weight", ROLE_FFN_UP},
    {"ffn_down.weight", ROLE_FFN_DOWN},
    {NULL, ROLE_LIMIT},
};
static const NameRow gpt2_global_names[] = {
    {"token_embd.weight", ROLE_TOKEN_EMBD},   {"position_embd.weight", ROLE_POSITION_EMBD},
    {"output_norm.weight", ROLE_OUTPUT_NORM}, {"output_norm.bias", ROLE_OUTPUT_NORM_BIAS},
    {"output.weight", ROLE_OUTPUT},           {NULL, ROLE_LIMIT},
};
/* The role of Q stands for all three of attn_qkv: fill_joined(). */
static const NameRow gpt2_layer_names[] = {
    {"attn_norm.weight", ROLE_ATTN_NORM},
    {"attn_norm.bias", ROLE_ATTN_NORM_BIAS},
    {"attn_qkv.weight", ROLE_ATTN_Q},
    {"attn_qkv.bias", ROLE_ATTN_Q_BIAS},
    {"attn_output.weight", ROLE_ATTN_OUT},
    {"attn_output.bias", ROLE_ATTN_OUT_BIAS},
    {"ffn_norm.weight", ROLE_FFN_NORM},
    {"ffn_norm.bias", ROLE_FFN_NORM_BIAS},
    {"ffn_up.weight", ROLE_FFN_UP},
    {"ffn_up.bias", ROLE_FFN_UP_BIAS},
    {"ffn_down.weight", ROLE_FFN_DOWN},
    {"ffn_down.bias", ROLE_FFN_DOWN_BIAS},
    {NULL, ROLE_LIMIT},
};

static bool find_name(const NameRow *row, const char *name, TensorRole *role)
{
    for (; row->name != NULL; row++) {
        if (strcmp(row->name, name) == 0) {
            *role = row->role;
            return true;
        }
    }
    return false;
}

/* "blk.12.attn_q.weight" -> role and layer. */
static bool role_of_name(ModelFamily family, const char *name, TensorRole *role, int32_t *layer)
{
    const bool gpt2 = family == FAMILY_GPT2;
    *layer = -1;
    if (find_name(gpt2 ? gpt2_global_names : llama_global_names, name, role)) {
        return true;
    }
    if (!g_str_has_prefix(name, "blk.") || !g_ascii_isdigit(name[4])) {
        return false;
    }
    char *end;
    guint64 number = g_ascii_strtoull(name + 4, &end, 10);
    if (*end != '.' || number > G_MAXINT32) {
        return false;
    }
    *layer = (int32_t)number;
    return find_name(gpt2 ? gpt2_layer_names : llama_layer_names, end + 1, role);
}

static bool fill_tensor(const Gguf *g, ModelFamily family, const GgufTensor *from, TensorSpec *t,
                        GError **error)
{
    if (from->name_length > MODEL_NAME_LIMIT ||
        !g_utf8_validate_len(from->name, from->name_length, NULL)) {
        return invalid(g, error,
                       "the name of a tensor is no text of at most %u bytes; get the file "
                       "again",
                       MODEL_NAME_LIMIT);
    }
    t->name = g_strndup(from->name, from->name_length);
    if (!role_of_name(family, t->name, &t->role, &t->layer)) {
        return invalid(g, error,
                       "tensor '%s' is no part of a %s model that is supported; take "
                       "another model",
                       t->name, family == FAMILY_GPT2 ? "gpt2" : "llama");
    }
    if (from->n_dims > 2 || from->dims[0] > G_MAXUINT32 || from->dims[1] > G_MAXUINT32) {
        return invalid(g, error,
                       "tensor '%s' has %u dimensions, the first %" G_GUINT64_FORMAT
                       "; get the file again",
                       t->name, from->n_dims, from->dims[0]);
    }
    t->type = from->type;
    t->columns = (uint32_t)from->dims[0];
    t->rows = (uint32_t)from->dims[1];
    t->offset = from->offset;
    t->size_bytes = from->size_bytes;
    t->file = from->file;
    return true;
}

/* attn_qkv holds the rows of Q, K and V one after another: each is a tensor of its own here. t: the
 * first of three places. */
static bool fill_joined(const Gguf *g, TensorSpec *t, GError **error)
{
    static const char *const names[] = {"q", "k", "v"};
    const bool bias = t->role == ROLE_ATTN_Q_BIAS;
    uint32_t *length = bias ? &t->columns : &t->rows;
    if (*length % 3 != 0 || t->size_bytes % 3 != 0) {
        return invalid(g, error,
                       "tensor '%s' has %u outputs, which are no Q, K and V; get the "
                       "file again",
                       t->name, *length);
    }
    *length /= 3;
    t->size_bytes /= 3;
    const TensorSpec whole = *t;
    for (uint32_t i = 0; i < 3; i++) {
        t[i] = whole;
        t[i].name =
            g_strdup_printf("blk.%d.attn_%s.%s", whole.layer, names[i], bias ? "bias" : "weight");
        t[i].role = (TensorRole)(whole.role + i);
        t[i].offset = whole.offset + i * whole.size_bytes;
    }
    g_free(whole.name);
    return true;
}

/* A vocabulary key may disagree with padded embeddings; the embedding decides. */
static bool fill_tensors(const Gguf *g, ModelSpec *spec, GError **error)
{
    const uint64_t n = gguf_n_tensors(g);
    const bool gpt2 = spec->family == FAMILY_GPT2;
    spec->tensors =
        weft_alloc((size_t)n * (gpt2 ? 3 : 1), sizeof *spec->tensors, "a model's tensors", error);
    if (spec->tensors == NULL) {
        return false;
    }
    spec->tied_output = true;
    for (uint64_t i = 0; i < n; i++) {
        TensorSpec *t = &spec->tensors[spec->n_tensors++];
        if (!fill_tensor(g, spec->family, gguf_tensor(g, i), t, error)) {
            return false;
        }
        if (gpt2 && (t->role == ROLE_ATTN_Q || t->role == ROLE_ATTN_Q_BIAS)) {
            if (!fill_joined(g, t, error)) {
                return false;
            }
            spec->n_tensors += 2;
        }
        if (t->role == ROLE_TOKEN_EMBD) {
            spec->vocab_size = t->rows;
        } else if (t->role == ROLE_OUTPUT) {
            spec->tied_output = false;
        }
    }
    return true;
}

ModelSpec *gguf_model_spec(const Gguf *g, GError **error)
{
    g_autoptr(ModelSpec) spec = g_new0(ModelSpec, 1);
    if (!read_architecture(g, &spec->family, error)) {
        return NULL;
    }
    spec->attention = ATTENTION_CAUSAL;
    spec->cache = CACHE_KV;
    spec->output = OUTPUT_LOGITS;
    spec->name = read_text(g, "general.name");
    if (spec->name == NULL) {
        g_autofree char *base = g_path_get_basename(gguf_file_path(g, 0));
        spec->name = g_utf8_make_valid(base, -1);
    }
    const bool read = spec->family == FAMILY_GPT2
                          ? read_gpt2_dimensions(g, spec, error)
                          : read_dimensions(g, spec, error) && read_rope(g, spec, error);
    if (!read || !fill_tensors(g, spec, error) || !model_spec_finish(spec, error)) {
        return NULL;
    }
    return g_steal_pointer(&spec);
}

/* ---- bytes ------------------------------------------------------------------------------------
 */

Hash128 gguf_hash(const Gguf *g)
{
    Hasher *hasher = hasher_new();
    for (uint32_t f = 0; f < gguf_n_files(g); f++) {
        size_t size;
        const uint8_t *data = gguf_file_data(g, f, &size);
        hasher_update(hasher, data, size);
    }
    Hash128 hash = hasher_finish(hasher);
    hasher_free(hasher);
    return hash;
}

bool gguf_copy_slice(const Gguf *g, const ModelSpec *spec, const TensorSpec *tensor, uint32_t slice,
                     void *out)
{
    size_t file_size;
    if (tensor->file >= gguf_n_files(g) || slice >= tensor->n_slices) {
        return false;
    }
    const uint8_t *data = gguf_file_data(g, tensor->file, &file_size);
    if (tensor->offset > file_size || tensor->size_bytes > file_size - tensor->offset) {
        return false;
    }
    SliceRect rect = model_spec_slice(spec, tensor, slice);
    size_t row_bytes, before, part;
    if (!dtype_row_bytes(tensor->type, tensor->columns, &row_bytes) ||
        !dtype_row_bytes(tensor->type, rect.col0, &before) ||
        !dtype_row_bytes(tensor->type, rect.n_cols, &part)) {
        return false;
    }
    const uint8_t *from = data + tensor->offset + (size_t)rect.row0 * row_bytes + before;
    uint8_t *to = out;
    if (part == row_bytes) {
        memcpy(to, from, part * rect.n_rows);
        return true;
    }
    for (uint32_t row = 0; row < rect.n_rows; row++) {
        memcpy(to + row * part, from + row * row_bytes, part);
    }
    return true;
}
