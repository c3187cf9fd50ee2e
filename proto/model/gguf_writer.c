#include "proto/model/gguf_writer.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/whole_file.h"

#include <string.h>

#define ALIGNMENT 32u
#define ROWS_AT_ONCE_BYTES (1u << 20)

/* Value types of the format. */
enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };

static const struct {
    Dtype type;
    uint32_t file_type; /* general.file_type */
} written_types[] = {
    {DTYPE_F32, 0},  {DTYPE_F16, 1},  {DTYPE_Q4_0, 2},
    {DTYPE_Q4_1, 3}, {DTYPE_Q8_0, 7}, {DTYPE_BF16, 32},
};

bool gguf_write_type(const char *name, Dtype *out)
{
    for (size_t i = 0; i < G_N_ELEMENTS(written_types); i++) {
        if (g_ascii_strcasecmp(name, dtype_info(written_types[i].type)->name) == 0) {
            *out = written_types[i].type;
            return true;
        }
    }
    return false;
}

static uint32_t file_type_of(Dtype type)
{
    for (size_t i = 0; i < G_N_ELEMENTS(written_types); i++) {
        if (written_types[i].type == type) {
            return written_types[i].file_type;
        }
    }
    g_assert_not_reached(); /* gguf_write() has asked */
}

/* ---- keys ---- */

typedef struct Keys {
    GByteArray *bytes;
    uint64_t n;
    const char *architecture;
} Keys;

static void put(GByteArray *to, const void *bytes, size_t n)
{
    g_byte_array_append(to, bytes, (guint)n);
}

static void put_u32(GByteArray *to, uint32_t value)
{
    value = GUINT32_TO_LE(value);
    put(to, &value, sizeof value);
}

static void put_u64(GByteArray *to, uint64_t value)
{
    value = GUINT64_TO_LE(value);
    put(to, &value, sizeof value);
}

static void put_text(GByteArray *to, const char *text, size_t length)
{
    put_u64(to, length);
    put(to, text, length);
}

/* A name that begins with a dot belongs to the architecture. */
static void put_key(Keys *k, const char *name, uint32_t type)
{
    g_autofree char *full =
        name[0] == '.' ? g_strconcat(k->architecture, name, NULL) : g_strdup(name);
    put_text(k->bytes, full, strlen(full));
    put_u32(k->bytes, type);
    k->n++;
}

static void key_u32(Keys *k, const char *name, uint32_t value)
{
    put_key(k, name, GGUF_U32);
    put_u32(k->bytes, value);
}

static void key_f32(Keys *k, const char *name, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_key(k, name, GGUF_F32);
    put_u32(k->bytes, bits);
}

static void key_bool(Keys *k, const char *name, bool value)
{
    const uint8_t byte = value;
    put_key(k, name, GGUF_BOOL);
    put(k->bytes, &byte, 1);
}

static void key_text(Keys *k, const char *name, const char *text)
{
    put_key(k, name, GGUF_STRING);
    put_text(k->bytes, text, strlen(text));
}

static void key_array(Keys *k, const char *name, uint32_t type, uint64_t n)
{
    put_key(k, name, GGUF_ARRAY);
    put_u32(k->bytes, type);
    put_u64(k->bytes, n);
}

static void rope_keys(Keys *k, const RopeSpec *r)
{
    key_u32(k, ".rope.dimension_count", r->dims);
    key_f32(k, ".rope.freq_base", (float)r->freq_base);
    if (r->scaling == ROPE_SCALING_LINEAR || r->scaling == ROPE_SCALING_YARN) {
        key_text(k, ".rope.scaling.type", r->scaling == ROPE_SCALING_YARN ? "yarn" : "linear");
        key_f32(k, ".rope.scaling.factor", (float)r->factor);
    }
    if (r->scaling == ROPE_SCALING_YARN) {
        key_u32(k, ".rope.scaling.original_context_length", r->original_context);
        key_f32(k, ".rope.scaling.yarn_ext_factor", (float)r->yarn_ext_factor);
        key_f32(k, ".rope.scaling.yarn_attn_factor", (float)r->yarn_attn_factor);
        key_f32(k, ".rope.scaling.yarn_beta_fast", (float)r->yarn_beta_fast);
        key_f32(k, ".rope.scaling.yarn_beta_slow", (float)r->yarn_beta_slow);
    }
}

static void model_keys(Keys *k, const ModelSpec *spec, Dtype type)
{
    key_text(k, "general.architecture", k->architecture);
    key_text(k, "general.name", spec->name);
    key_u32(k, "general.file_type", file_type_of(type));
    key_u32(k, "general.quantization_version", 2);
    key_u32(k, ".context_length", spec->context);
    key_u32(k, ".embedding_length", spec->width);
    key_u32(k, ".feed_forward_length", spec->ffn_width);
    key_u32(k, ".block_count", spec->n_layers);
    key_u32(k, ".attention.head_count", spec->n_heads);
    if (spec->family == FAMILY_GPT2) {
        key_f32(k, ".attention.layer_norm_epsilon", spec->norm_eps);
        return;
    }
    key_u32(k, ".attention.head_count_kv", spec->n_kv_heads);
    key_f32(k, ".attention.layer_norm_rms_epsilon", spec->norm_eps);
    key_u32(k, ".attention.key_length", spec->head_size);
    key_u32(k, ".attention.value_length", spec->head_size);
    key_u32(k, ".vocab_size", spec->vocab_size);
    rope_keys(k, &spec->rope);
}

static void id_key(Keys *k, const char *name, int64_t id)
{
    if (id >= 0) {
        key_u32(k, name, (uint32_t)id);
    }
}

/* The model may have more ids than the tokenizer: the rest are named and never meant. */
static void vocab_keys(Keys *k, const TokenizerVocab *v, uint32_t size)
{
    key_text(k, "tokenizer.ggml.model", v->model);
    if (v->pre != NULL) {
        key_text(k, "tokenizer.ggml.pre", v->pre);
    }
    key_array(k, "tokenizer.ggml.tokens", GGUF_STRING, size);
    for (uint32_t i = 0; i < size; i++) {
        g_autofree char *none = g_strdup_printf("[PAD%u]", i);
        const VocabText text = i < v->n_tokens ? v->tokens[i] : (VocabText){none, strlen(none)};
        put_text(k->bytes, text.text, text.length);
    }
    key_array(k, "tokenizer.ggml.token_type", GGUF_I32, size);
    for (uint32_t i = 0; i < size; i++) {
        put_u32(k->bytes, i >= v->n_tokens   ? TOKEN_UNUSED
                          : v->kinds != NULL ? (uint32_t)v->kinds[i]
                                             : TOKEN_NORMAL);
    }
    if (v->scores != NULL) {
        key_array(k, "tokenizer.ggml.scores", GGUF_F32, size);
        for (uint32_t i = 0; i < size; i++) {
            const float score = i < v->n_tokens ? (float)v->scores[i] : -1e9f;
            uint32_t bits;
            memcpy(&bits, &score, sizeof bits);
            put_u32(k->bytes, bits);
        }
    }
    if (v->n_merges > 0 || strcmp(v->model, "gpt2") == 0) {
        key_array(k, "tokenizer.ggml.merges", GGUF_STRING, v->n_merges);
        for (uint64_t i = 0; i < v->n_merges; i++) {
            put_text(k->bytes, v->merges[i].text, v->merges[i].length);
        }
    }
    id_key(k, "tokenizer.ggml.bos_token_id", v->bos);
    id_key(k, "tokenizer.ggml.eos_token_id", v->eos);
    id_key(k, "tokenizer.ggml.eot_token_id", v->eot);
    id_key(k, "tokenizer.ggml.eom_token_id", v->eom);
    id_key(k, "tokenizer.ggml.unknown_token_id", v->unk);
    if (v->adds_bos != VOCAB_DEFAULT) {
        key_bool(k, "tokenizer.ggml.add_bos_token", v->adds_bos == VOCAB_YES);
    }
    if (v->space_prefix != SPACE_PREFIX_DEFAULT) { /* FIRST is not among GGUF's */
        key_bool(k, "tokenizer.ggml.add_space_prefix", v->space_prefix != SPACE_PREFIX_NEVER);
    }
}

/* ---- tensors ---- */

/* One tensor of the file: `n` tensors of the spec, row after row. */
typedef struct FileTensor {
    uint32_t first, n;
    uint64_t columns, rows;
    Dtype type;
    bool is_vector;
    char *name;
    uint64_t offset, size_bytes;
} FileTensor;

static void file_tensor_clear(gpointer tensor)
{
    g_free(((FileTensor *)tensor)->name);
}

/* GPT-2's Q, K and V are one tensor there; in canonical order they are neighbours. */
static uint32_t joined(const ModelSpec *spec, uint32_t i)
{
    const TensorRole role = spec->tensors[i].role;
    return spec->family == FAMILY_GPT2 && (role == ROLE_ATTN_Q || role == ROLE_ATTN_Q_BIAS) ? 3 : 1;
}

static char *file_name(const TensorSpec *t, uint32_t n)
{
    return n == 1 ? g_strdup(t->name)
                  : g_strdup_printf("blk.%d.attn_qkv.%s", t->layer,
                                    t->role == ROLE_ATTN_Q_BIAS ? "bias" : "weight");
}

/* GArray of FileTensor; NULL + INVALID. */
static GArray *plan_tensors(const ModelSpec *spec, Dtype type, GError **error)
{
    g_autoptr(GArray) list = g_array_new(FALSE, FALSE, sizeof(FileTensor));
    g_array_set_clear_func(list, file_tensor_clear);
    uint64_t at = 0;
    for (uint32_t i = 0, n; i < spec->n_tensors; i += n) {
        const TensorSpec *t = &spec->tensors[i];
        n = joined(spec, i);
        const bool vector = t->rows == 1 && t->role != ROLE_POSITION_EMBD;
        const bool plain = vector || t->role == ROLE_POSITION_EMBD;
        FileTensor f = {.first = i,
                        .n = n,
                        .columns = vector ? (uint64_t)n * t->columns : t->columns,
                        .rows = vector ? 1 : (uint64_t)n * t->rows,
                        .type = plain ? DTYPE_F32 : type,
                        .is_vector = vector,
                        .offset = at};
        size_t row_bytes, size_bytes;
        if (!dtype_row_bytes(f.type, f.columns, &row_bytes) ||
            !sz_mul(row_bytes, (size_t)f.rows, &size_bytes)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "tensor %s has rows of %u elements, which %s blocks of %u cannot hold; "
                        "write F16 or BF16",
                        t->name, t->columns, dtype_info(f.type)->name, dtype_info(f.type)->block);
            return NULL;
        }
        f.name = file_name(t, n);
        f.size_bytes = size_bytes;
        g_array_append_val(list, f);
        at = (at + size_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    return g_steal_pointer(&list);
}

static void describe(GByteArray *to, const FileTensor *f)
{
    put_text(to, f->name, strlen(f->name));
    put_u32(to, f->is_vector ? 1 : 2);
    put_u64(to, f->columns);
    if (!f->is_vector) {
        put_u64(to, f->rows);
    }
    put_u32(to, f->type);
    put_u64(to, f->offset);
}

static bool write_rows(WholeFile *file, const ModelContents *c, uint32_t tensor, Dtype type,
                       GError **error)
{
    const TensorSpec *t = &c->spec->tensors[tensor];
    size_t row_bytes = 0;
    dtype_row_bytes(type, t->columns, &row_bytes);
    const uint32_t step =
        MAX(1u, MIN(t->rows, (uint32_t)(ROWS_AT_ONCE_BYTES / (t->columns * sizeof(float) + 1))));
    float *rows = weft_alloc((size_t)step * t->columns, sizeof *rows, "rows of a tensor", error);
    uint8_t *bytes = rows != NULL ? weft_alloc(step, row_bytes, "rows of a tensor", error) : NULL;
    bool ok = bytes != NULL;
    for (uint32_t row = 0; ok && row < t->rows; row += step) {
        const uint32_t n = MIN(step, t->rows - row);
        ok = c->read(c->user, tensor, row, n, rows, error);
        for (uint32_t r = 0; ok && r < n; r++) {
            quantise_row(type, rows + (size_t)r * t->columns, t->columns, bytes + r * row_bytes);
        }
        ok = ok && whole_file_write(file, bytes, n * row_bytes, error);
    }
    weft_free(rows);
    weft_free(bytes);
    return ok;
}

static bool write_padding(WholeFile *file, GError **error)
{
    static const uint8_t zeros[ALIGNMENT];
    const uint64_t past = whole_file_size(file) % ALIGNMENT;
    return past == 0 || whole_file_write(file, zeros, ALIGNMENT - past, error);
}

static bool write_model(WholeFile *file, const ModelContents *c, const Keys *keys,
                        const GArray *tensors, GError **error)
{
    g_autoptr(GByteArray) head = g_byte_array_new();
    put(head, "GGUF", 4);
    put_u32(head, 3);
    put_u64(head, tensors->len);
    put_u64(head, keys->n);
    put(head, keys->bytes->data, keys->bytes->len);
    for (guint i = 0; i < tensors->len; i++) {
        describe(head, &g_array_index(tensors, FileTensor, i));
    }
    bool ok = whole_file_write(file, head->data, head->len, error) && write_padding(file, error);
    for (guint i = 0; ok && i < tensors->len; i++) {
        const FileTensor *f = &g_array_index(tensors, FileTensor, i);
        for (uint32_t k = 0; ok && k < f->n; k++) {
            ok = write_rows(file, c, f->first + k, f->type, error);
        }
        ok = ok && write_padding(file, error);
    }
    return ok;
}

bool gguf_write(const char *path, const ModelContents *c, Dtype type, GError **error)
{
    if (type >= DTYPE_FIRST_OWN) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "a GGUF file has no %s weights; write Q8_0 or BF16", dtype_info(type)->name);
        return false;
    }
    if (c->vocab != NULL && c->vocab->n_tokens > c->spec->vocab_size) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the tokenizer has %" G_GUINT64_FORMAT
                    " ids, the model %u; give the tokenizer that it was trained with",
                    c->vocab->n_tokens, c->spec->vocab_size);
        return false;
    }
    g_autoptr(GArray) tensors = plan_tensors(c->spec, type, error);
    WholeFile *file = tensors != NULL ? whole_file_new(path, error) : NULL;
    if (file == NULL) {
        return false;
    }
    g_autoptr(GByteArray) bytes = g_byte_array_new();
    Keys keys = {bytes, 0, c->spec->family == FAMILY_GPT2 ? "gpt2" : "llama"};
    model_keys(&keys, c->spec, type);
    if (c->vocab != NULL) {
        vocab_keys(&keys, c->vocab, c->spec->vocab_size);
    }
    if (c->chat_template != NULL) {
        key_text(&keys, "tokenizer.chat_template", c->chat_template);
    }
    const bool ok = write_model(file, c, &keys, tensors, error);
    return whole_file_finish(file, ok, error);
}
