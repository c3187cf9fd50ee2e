#include "tests/golden/gguf_builder.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/base/random.h"

#include <math.h>
#include <string.h>

#define N_CONTROL 3u
#define N_BYTES 256u
#define LETTERS 26u

typedef enum KeyType {
    KEY_U16 = 2,
    KEY_U32 = 4,
    KEY_I32 = 5,
    KEY_F32 = 6,
    KEY_BOOL = 7,
    KEY_STRING = 8,
    KEY_ARRAY = 9
} KeyType;

/* ---- configuration ----------------------------------------------------------------------------
 */

void gguf_builder_set_type(GgufBuilderConfig *config, Dtype type)
{
    for (int role = 0; role < ROLE_LIMIT; role++) {
        config->type[role] = type;
    }
}

void gguf_builder_defaults(GgufBuilderConfig *config)
{
    *config = (GgufBuilderConfig){
        .name = "tiny",
        .family = FAMILY_LLAMA,
        .n_layers = 2,
        .width = 64,
        .n_heads = 4,
        .n_kv_heads = 2,
        .ffn_width = 128,
        .vocab_size = 1500,
        .context = 256,
        .tied = true,
        .rope_factor = 1.0,
        .rope_base = 10000.0,
        .seed = 1,
        .version = 3,
        .alignment = 32,
    };
    gguf_builder_set_type(config, DTYPE_Q8_0);
}

/* ---- little-endian writing --------------------------------------------------------------------
 */

static void put(GByteArray *out, uint64_t value, guint n_bytes)
{
    uint8_t bytes[8];
    for (guint i = 0; i < n_bytes; i++) {
        bytes[i] = (uint8_t)(value >> (8 * i));
    }
    g_byte_array_append(out, bytes, n_bytes);
}

static void put_f32(GByteArray *out, double value)
{
    float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    put(out, bits, 4);
}

static void put_f16(GByteArray *out, double value)
{
    _Float16 h = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &h, sizeof bits);
    put(out, bits, 2);
}

static void put_bf16(GByteArray *out, double value)
{
    float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    put(out, bits >> 16, 2);
}

static void put_text(GByteArray *out, const char *text)
{
    put(out, strlen(text), 8);
    g_byte_array_append(out, (const guint8 *)text, (guint)strlen(text));
}

typedef struct Keys {
    GByteArray *out;
    uint64_t n;
} Keys;

static void key(Keys *k, const char *name, KeyType type)
{
    put_text(k->out, name);
    put(k->out, type, 4);
    k->n++;
}

static void key_u32(Keys *k, const char *name, uint32_t value)
{
    key(k, name, KEY_U32);
    put(k->out, value, 4);
}

static void key_u16(Keys *k, const char *name, uint32_t value)
{
    key(k, name, KEY_U16);
    put(k->out, value, 2);
}

static void key_f32(Keys *k, const char *name, double value)
{
    key(k, name, KEY_F32);
    put_f32(k->out, value);
}

static void key_text(Keys *k, const char *name, const char *value)
{
    key(k, name, KEY_STRING);
    put_text(k->out, value);
}

static void key_array(Keys *k, const char *name, KeyType type, uint64_t n)
{
    key(k, name, KEY_ARRAY);
    put(k->out, type, 4);
    put(k->out, n, 8);
}

/* ---- vocabulary -------------------------------------------------------------------------------
 */

/* GPT-2's printable stand-in for a byte: printable Latin-1 bytes are themselves, the others follow
 * from U+0100 on in order (Radford et al. 2019, encoder of the released code). */
static gunichar byte_letter(uint32_t byte)
{
    gunichar next = 0x100;
    for (uint32_t b = 0; b <= byte; b++) {
        bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        if (b == byte) {
            return printable ? b : next;
        }
        next += !printable;
    }
    return 0;
}

/* Letter i of the words that merges build: a space's stand-in first, then a to z. */
static char *letter_text(uint32_t i)
{
    char text[8] = {0};
    g_unichar_to_utf8(byte_letter(i == 0 ? ' ' : 'a' + i - 1), text);
    return g_strdup(text);
}

/* Merge i joins *left and *right: first all pairs (any letter, a to z), then all pairs with a third
 * letter. */
static bool merge_parts(uint32_t i, char **left, char **right)
{
    uint32_t n_pairs = (LETTERS + 1) * LETTERS;
    if (i < n_pairs) {
        *left = letter_text(i / LETTERS);
        *right = letter_text(1 + i % LETTERS);
        return true;
    }
    i -= n_pairs;
    if (i >= n_pairs * LETTERS) {
        return false;
    }
    g_autofree char *a = NULL, *b = NULL;
    merge_parts(i / LETTERS, &a, &b);
    *left = g_strconcat(a, b, NULL);
    *right = letter_text(1 + i % LETTERS);
    return true;
}

static void put_vocabulary(Keys *k, const GgufBuilderConfig *c)
{
    static const char *const control[N_CONTROL] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
    g_autoptr(GPtrArray) merges = g_ptr_array_new_with_free_func(g_free);
    g_autoptr(GByteArray) types = g_byte_array_new();
    key_text(k, "tokenizer.ggml.model", "gpt2");
    key_text(k, "tokenizer.ggml.pre", "gpt-2");
    key_array(k, "tokenizer.ggml.tokens", KEY_STRING, c->vocab_size);
    for (uint32_t id = 0; id < c->vocab_size; id++) {
        g_autofree char *left = NULL, *right = NULL, *text = NULL;
        uint32_t type = 1; /* normal */
        if (id < N_CONTROL) {
            text = g_strdup(control[id]);
            type = 3; /* control */
        } else if (id < N_CONTROL + N_BYTES) {
            char utf8[8] = {0};
            g_unichar_to_utf8(byte_letter(id - N_CONTROL), utf8);
            text = g_strdup(utf8);
        } else if (merge_parts(id - N_CONTROL - N_BYTES, &left, &right)) {
            text = g_strconcat(left, right, NULL);
            g_ptr_array_add(merges, g_strconcat(left, " ", right, NULL));
        } else {
            text = g_strdup_printf("<|unused_%u|>", id);
            type = 5; /* unused */
        }
        put_text(k->out, text);
        put(types, type, 4);
    }
    key_array(k, "tokenizer.ggml.token_type", KEY_I32, c->vocab_size);
    g_byte_array_append(k->out, types->data, types->len);
    key_array(k, "tokenizer.ggml.merges", KEY_STRING, merges->len);
    for (guint i = 0; i < merges->len; i++) {
        put_text(k->out, g_ptr_array_index(merges, i));
    }
    key_u32(k, "tokenizer.ggml.bos_token_id", 1);
    key_u32(k, "tokenizer.ggml.eos_token_id", 2);
    key(k, "tokenizer.ggml.add_bos_token", KEY_BOOL);
    put(k->out, 0, 1);
    key_text(k, "tokenizer.chat_template",
             "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
             "message['content'] + "
             "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
             "'<|im_start|>assistant\n' }}"
             "{% endif %}");
}

static void put_llama_keys(Keys *k, const GgufBuilderConfig *c)
{
    key_u32(k, "llama.block_count", c->n_layers);
    key_u32(k, "llama.context_length", c->context);
    key_u32(k, "llama.embedding_length", c->width);
    key_u32(k, "llama.feed_forward_length", c->ffn_width);
    key_u32(k, "llama.attention.head_count", c->n_heads);
    key_u32(k, "llama.attention.head_count_kv", c->n_kv_heads);
    if (c->head_size != 0) {
        key_u32(k, "llama.attention.key_length", c->head_size);
        key_u32(k, "llama.attention.value_length", c->head_size);
    }
    key_f32(k, "llama.attention.layer_norm_rms_epsilon", 1e-5);
    key_f32(k, "llama.rope.freq_base", c->rope_base);
    if (c->rope_scaling != NULL) {
        key_text(k, "llama.rope.scaling.type", c->rope_scaling);
        key_f32(k, "llama.rope.scaling.factor", c->rope_factor);
    }
    if (c->rope_original_context != 0) {
        key_u32(k, "llama.rope.scaling.original_context_length", c->rope_original_context);
    }
}

static void put_gpt2_keys(Keys *k, const GgufBuilderConfig *c)
{
    key_u32(k, "gpt2.block_count", c->n_layers);
    key_u32(k, "gpt2.context_length", c->context);
    key_u32(k, "gpt2.embedding_length", c->width);
    key_u32(k, "gpt2.feed_forward_length", c->ffn_width);
    key_u32(k, "gpt2.attention.head_count", c->n_heads);
    key_f32(k, "gpt2.attention.layer_norm_epsilon", 1e-5);
}

static void put_model_keys(Keys *k, const GgufBuilderConfig *c)
{
    const bool gpt2 = c->family == FAMILY_GPT2;
    key_text(k, "general.architecture", gpt2 ? "gpt2" : "llama");
    key_text(k, "general.name", c->name);
    if (c->alignment != 32) {
        key_u32(k, "general.alignment", c->alignment);
    }
    (gpt2 ? put_gpt2_keys : put_llama_keys)(k, c);
    if (c->extra_key != NULL) {
        key_u32(k, c->extra_key, c->extra_value);
    }
    put_vocabulary(k, c);
}

/* ---- weights ----------------------------------------------------------------------------------
 */

/* Uniform in [-1, 1). */
static double draw(Random *random)
{
    return (double)(int64_t)random_u64(random) / 9223372036854775808.0;
}

static void put_random(GByteArray *out, Random *random, guint n)
{
    guint start = out->len;
    g_byte_array_set_size(out, start + n);
    random_fill(random, out->data + start, n);
}

/* Eight 6-bit scales and minimums in the 12 bytes that Q4_K and Q5_K share (ggml-quants,
 * get_scale_min_k4). */
static void put_k_scales(GByteArray *out, Random *random)
{
    uint8_t scale[8], least[8], packed[12] = {0};
    for (int j = 0; j < 8; j++) {
        scale[j] = (uint8_t)(32 + random_u64(random) % 32);
        least[j] = (uint8_t)(scale[j] - 4 + random_u64(random) % 5);
    }
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t)(scale[j] | (scale[j + 4] >> 4) << 6);
        packed[j + 4] = (uint8_t)(least[j] | (least[j + 4] >> 4) << 6);
        packed[j + 8] = (uint8_t)((scale[j + 4] & 15) | (least[j + 4] & 15) << 4);
    }
    g_byte_array_append(out, packed, sizeof packed);
}

/* One block whose values spread about `sigma` around 0: d x (quant - middle), quants uniform. */
static void put_block(GByteArray *out, Random *random, Dtype type, double sigma)
{
    double vary = 1.0 + 0.4 * draw(random);
    double d4 = vary * sigma / 4.6,
           d5 = vary * sigma / 9.2; /* standard deviation of 16 and 32 levels */
    switch (type) {
    case DTYPE_F32:
        put_f32(out, sigma * 1.7320508 * draw(random));
        break;
    case DTYPE_F16:
        put_f16(out, sigma * 1.7320508 * draw(random));
        break;
    case DTYPE_BF16:
        put_bf16(out, sigma * 1.7320508 * draw(random));
        break;
    case DTYPE_Q4_0:
        put_f16(out, d4);
        put_random(out, random, 16);
        break;
    case DTYPE_Q4_1:
        put_f16(out, d4);
        put_f16(out, -7.5 * d4);
        put_random(out, random, 16);
        break;
    case DTYPE_Q5_0:
        put_f16(out, d5);
        put_random(out, random, 4 + 16);
        break;
    case DTYPE_Q5_1:
        put_f16(out, d5);
        put_f16(out, -15.5 * d5);
        put_random(out, random, 4 + 16);
        break;
    case DTYPE_Q8_0:
        put_f16(out, vary * sigma / 73.3);
        for (int i = 0; i < 32; i++) {
            put(out, (uint64_t)(int64_t)((int)(random_u64(random) % 255) - 127), 1);
        }
        break;
    case DTYPE_Q4_K:
        put_f16(out, d4 / 48);
        put_f16(out, 7.5 * d4 / 48);
        put_k_scales(out, random);
        put_random(out, random, 128);
        break;
    case DTYPE_Q5_K:
        put_f16(out, d5 / 48);
        put_f16(out, 15.5 * d5 / 48);
        put_k_scales(out, random);
        put_random(out, random, 32 + 128);
        break;
    case DTYPE_Q6_K:
        put_random(out, random, 128 + 64);
        for (int i = 0; i < 16; i++) {
            int scale = 16 + (int)(random_u64(random) % 48);
            put(out, (uint64_t)(int64_t)(random_u64(random) % 2 ? scale : -scale), 1);
        }
        put_f16(out, vary * sigma / 18.5 / 40);
        break;
    case DTYPE_F8_E4M3: /* in no GGUF file */
    case DTYPE_LIMIT:
        g_assert_not_reached();
    }
}

/* ---- tensors ----------------------------------------------------------------------------------
 */

typedef struct Part {
    char *name;
    TensorRole role;
    int32_t layer; /* -1 = none */
    Dtype type;
    uint32_t rows, columns; /* rows 0 = 1-D */
    double sigma, mean;     /* mean only for 1-D */
} Part;

static void part_free(gpointer data)
{
    Part *part = data;
    g_free(part->name);
    g_free(part);
}

static void add_matrix(GPtrArray *parts, const GgufBuilderConfig *c, TensorRole role, uint32_t rows,
                       uint32_t columns, double gain, const char *format, uint32_t layer)
{
    const bool global =
        role == ROLE_TOKEN_EMBD || role == ROLE_POSITION_EMBD || role == ROLE_OUTPUT;
    Part *part = g_new0(Part, 1);
    part->name = global ? g_strdup(format) : g_strdup_printf("blk.%u.%s", layer, format);
    part->role = role;
    part->layer = global ? -1 : (int32_t)layer;
    part->type = c->type[role];
    part->rows = rows;
    part->columns = columns;
    part->sigma = gain / sqrt((double)columns);
    g_ptr_array_add(parts, part);
}

static void add_vector(GPtrArray *parts, TensorRole role, char *name, int32_t layer,
                       uint32_t length, double mean, double sigma)
{
    Part *part = g_new0(Part, 1);
    part->name = name;
    part->role = role;
    part->layer = layer;
    part->type = DTYPE_F32;
    part->columns = length;
    part->mean = mean;
    part->sigma = sigma;
    g_ptr_array_add(parts, part);
}

static void add_layer_vector(GPtrArray *parts, TensorRole role, const char *name, uint32_t layer,
                             uint32_t length, double mean, double sigma)
{
    add_vector(parts, role, g_strdup_printf("blk.%u.%s", layer, name), (int32_t)layer, length, mean,
               sigma);
}

static GPtrArray *list_gpt2_parts(const GgufBuilderConfig *c)
{
    GPtrArray *parts = g_ptr_array_new_with_free_func(part_free);
    const uint32_t n = c->width;
    add_matrix(parts, c, ROLE_TOKEN_EMBD, c->vocab_size, n, 3.0, "token_embd.weight", 0);
    add_matrix(parts, c, ROLE_POSITION_EMBD, c->context, n, 2.0, "position_embd.weight", 0);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        add_layer_vector(parts, ROLE_ATTN_NORM, "attn_norm.weight", i, n, 1.0, 0.2);
        add_layer_vector(parts, ROLE_ATTN_NORM_BIAS, "attn_norm.bias", i, n, 0.0, 0.2);
        add_matrix(parts, c, ROLE_ATTN_Q, 3 * n, n, 1.5, "attn_qkv.weight", i);
        add_layer_vector(parts, ROLE_ATTN_Q_BIAS, "attn_qkv.bias", i, 3 * n, 0.0, 0.3);
        add_matrix(parts, c, ROLE_ATTN_OUT, n, n, 1.0, "attn_output.weight", i);
        add_layer_vector(parts, ROLE_ATTN_OUT_BIAS, "attn_output.bias", i, n, 0.0, 0.3);
        add_layer_vector(parts, ROLE_FFN_NORM, "ffn_norm.weight", i, n, 1.0, 0.2);
        add_layer_vector(parts, ROLE_FFN_NORM_BIAS, "ffn_norm.bias", i, n, 0.0, 0.2);
        add_matrix(parts, c, ROLE_FFN_UP, c->ffn_width, n, 1.0, "ffn_up.weight", i);
        add_layer_vector(parts, ROLE_FFN_UP_BIAS, "ffn_up.bias", i, c->ffn_width, 0.0, 0.3);
        add_matrix(parts, c, ROLE_FFN_DOWN, n, c->ffn_width, 1.0, "ffn_down.weight", i);
        add_layer_vector(parts, ROLE_FFN_DOWN_BIAS, "ffn_down.bias", i, n, 0.0, 0.3);
    }
    add_vector(parts, ROLE_OUTPUT_NORM, g_strdup("output_norm.weight"), -1, n, 1.0, 0.2);
    add_vector(parts, ROLE_OUTPUT_NORM_BIAS, g_strdup("output_norm.bias"), -1, n, 0.0, 0.2);
    if (!c->tied) {
        add_matrix(parts, c, ROLE_OUTPUT, c->vocab_size, n, 3.0, "output.weight", 0);
    }
    return parts;
}

static GPtrArray *list_parts(const GgufBuilderConfig *c)
{
    if (c->family == FAMILY_GPT2) {
        return list_gpt2_parts(c);
    }
    GPtrArray *parts = g_ptr_array_new_with_free_func(part_free);
    uint32_t size = c->head_size != 0 ? c->head_size : c->width / c->n_heads;
    uint32_t q = c->n_heads * size, kv = c->n_kv_heads * size;
    add_matrix(parts, c, ROLE_TOKEN_EMBD, c->vocab_size, c->width, 3.0, "token_embd.weight", 0);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        add_vector(parts, ROLE_ATTN_NORM, g_strdup_printf("blk.%u.attn_norm.weight", i), (int32_t)i,
                   c->width, 1.0, 0.2);
        add_matrix(parts, c, ROLE_ATTN_Q, q, c->width, 1.5, "attn_q.weight", i);
        add_matrix(parts, c, ROLE_ATTN_K, kv, c->width, 1.5, "attn_k.weight", i);
        add_matrix(parts, c, ROLE_ATTN_V, kv, c->width, 1.0, "attn_v.weight", i);
        if (c->qkv_bias) {
            add_vector(parts, ROLE_ATTN_Q_BIAS, g_strdup_printf("blk.%u.attn_q.bias", i),
                       (int32_t)i, q, 0.0, 0.3);
            add_vector(parts, ROLE_ATTN_K_BIAS, g_strdup_printf("blk.%u.attn_k.bias", i),
                       (int32_t)i, kv, 0.0, 0.3);
            add_vector(parts, ROLE_ATTN_V_BIAS, g_strdup_printf("blk.%u.attn_v.bias", i),
                       (int32_t)i, kv, 0.0, 0.3);
        }
        add_matrix(parts, c, ROLE_ATTN_OUT, c->width, q, 1.0, "attn_output.weight", i);
        add_vector(parts, ROLE_FFN_NORM, g_strdup_printf("blk.%u.ffn_norm.weight", i), (int32_t)i,
                   c->width, 1.0, 0.2);
        add_matrix(parts, c, ROLE_FFN_GATE, c->ffn_width, c->width, 1.0, "ffn_gate.weight", i);
        add_matrix(parts, c, ROLE_FFN_UP, c->ffn_width, c->width, 1.0, "ffn_up.weight", i);
        add_matrix(parts, c, ROLE_FFN_DOWN, c->width, c->ffn_width, 1.0, "ffn_down.weight", i);
    }
    if (c->rope_factors) {
        add_vector(parts, ROLE_ROPE_FACTORS, g_strdup("rope_freqs.weight"), -1, size / 2, 2.0, 0.5);
    }
    add_vector(parts, ROLE_OUTPUT_NORM, g_strdup("output_norm.weight"), -1, c->width, 1.0, 0.2);
    if (!c->tied) {
        add_matrix(parts, c, ROLE_OUTPUT, c->vocab_size, c->width, 3.0, "output.weight", 0);
    }
    return parts;
}

static bool part_bytes(const Part *part, size_t *n_bytes, GError **error)
{
    size_t row_bytes;
    if (!dtype_row_bytes(part->type, part->columns, &row_bytes)) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "rows of %s have %u elements, no whole blocks of type %u; choose other dimensions",
            part->name, part->columns, (unsigned)part->type);
        return false;
    }
    *n_bytes = row_bytes * MAX(part->rows, 1);
    return true;
}

/* The stream of a tensor depends on (seed, name) only, so that tied and untied, split and whole
 * models share their layers' weights. */
static void put_weights(GByteArray *out, const Part *part, uint64_t seed)
{
    RandomSeeded random;
    Hash128 hash = hash128(part->name, strlen(part->name));
    uint64_t word;
    memcpy(&word, hash.bytes, sizeof word);
    random_seeded_init(&random, seed ^ GUINT64_FROM_LE(word));
    uint64_t n_blocks =
        (uint64_t)MAX(part->rows, 1) * part->columns / dtype_info(part->type)->block;
    for (uint64_t i = 0; i < n_blocks; i++) {
        if (part->rows == 0) {
            put_f32(out, part->mean + part->sigma * draw(&random.base));
        } else {
            put_block(out, &random.base, part->type, part->sigma);
        }
    }
}

static void pad(GByteArray *out, uint32_t alignment)
{
    while (out->len % alignment != 0) {
        put(out, 0, 1);
    }
}

/* File `index` of `n_files`: the keys go to the first, the tensors are dealt in order. */
static GBytes *build_file(const GgufBuilderConfig *c, uint32_t index, uint32_t n_files,
                          GError **error)
{
    g_autoptr(GPtrArray) parts = list_parts(c);
    guint first = parts->len * index / n_files, end = parts->len * (index + 1) / n_files;
    g_autoptr(GByteArray) body = g_byte_array_new();
    Keys keys = {body, 0};
    if (index == 0) {
        put_model_keys(&keys, c);
    } else if (c->alignment != 32) {
        key_u32(&keys, "general.alignment", c->alignment);
    }
    if (n_files > 1) {
        key_u16(&keys, "split.no", index);
        key_u16(&keys, "split.count", n_files);
        key(&keys, "split.tensors.count", KEY_I32);
        put(body, parts->len, 4);
    }
    uint64_t offset = 0;
    for (guint i = first; i < end; i++) {
        const Part *part = g_ptr_array_index(parts, i);
        size_t n_bytes;
        if (!part_bytes(part, &n_bytes, error)) {
            return NULL;
        }
        put_text(body, part->name);
        put(body, part->rows > 0 ? 2 : 1, 4);
        put(body, part->columns, 8);
        if (part->rows > 0) {
            put(body, part->rows, 8);
        }
        put(body, part->type, 4);
        put(body, offset, 8);
        offset += (n_bytes + c->alignment - 1) / c->alignment * c->alignment;
    }
    GByteArray *file = g_byte_array_new();
    g_byte_array_append(file, (const guint8 *)"GGUF", 4);
    put(file, c->version, 4);
    put(file, end - first, 8);
    put(file, keys.n, 8);
    g_byte_array_append(file, body->data, body->len);
    for (guint i = first; i < end; i++) {
        pad(file, c->alignment);
        put_weights(file, g_ptr_array_index(parts, i), c->seed);
    }
    pad(file, c->alignment);
    return g_byte_array_free_to_bytes(file);
}

GBytes *gguf_builder_bytes(const GgufBuilderConfig *config, GError **error)
{
    return build_file(config, 0, 1, error);
}

ModelSpec *gguf_builder_spec(const GgufBuilderConfig *config, GError **error)
{
    g_assert(config->family == FAMILY_LLAMA);
    g_autoptr(GPtrArray) parts = list_parts(config);
    g_autoptr(ModelSpec) spec = g_new0(ModelSpec, 1);
    spec->family = FAMILY_LLAMA;
    spec->name = g_strdup(config->name);
    spec->n_layers = config->n_layers;
    spec->width = config->width;
    spec->n_heads = config->n_heads;
    spec->n_kv_heads = config->n_kv_heads;
    spec->head_size = config->head_size != 0 ? config->head_size : config->width / config->n_heads;
    spec->ffn_width = config->ffn_width;
    spec->vocab_size = config->vocab_size;
    spec->context = config->context;
    spec->norm_eps = 1e-5f;
    spec->attention_scale = (float)(1.0 / sqrt((double)spec->head_size));
    spec->rope =
        (RopeSpec){.scaling = config->rope_factors ? ROPE_SCALING_FACTORS : ROPE_SCALING_NONE,
                   .dims = spec->head_size,
                   .freq_base = config->rope_base,
                   .factor = 1.0};
    spec->tied_output = config->tied;
    spec->tensors = weft_alloc(parts->len, sizeof *spec->tensors, "tensors", error);
    uint64_t offset = 0;
    for (guint i = 0; spec->tensors != NULL && i < parts->len; i++) {
        const Part *part = g_ptr_array_index(parts, i);
        TensorSpec *t = &spec->tensors[spec->n_tensors++];
        size_t n_bytes;
        *t = (TensorSpec){.name = g_strdup(part->name),
                          .role = part->role,
                          .layer = part->layer,
                          .type = part->type};
        if (!part_bytes(part, &n_bytes, error)) {
            return NULL;
        }
        t->rows = MAX(part->rows, 1);
        t->columns = part->columns;
        t->offset = offset;
        t->size_bytes = n_bytes;
        offset += (n_bytes + config->alignment - 1) / config->alignment * config->alignment;
    }
    return spec->tensors != NULL && model_spec_finish(spec, error) ? g_steal_pointer(&spec) : NULL;
}

static bool write_bytes(GBytes *bytes, const char *path, GError **error)
{
    gsize size;
    const char *data = g_bytes_get_data(bytes, &size);
    return g_file_set_contents(path, data, (gssize)size, error);
}

bool gguf_builder_write(const GgufBuilderConfig *config, const char *path, GError **error)
{
    const char *mark = strstr(path, "-00001-of-");
    uint32_t n_files = mark != NULL ? (uint32_t)g_ascii_strtoull(mark + 10, NULL, 10) : 1;
    for (uint32_t i = 0; i < n_files; i++) {
        g_autoptr(GBytes) bytes = build_file(config, i, n_files, error);
        g_autofree char *part_path =
            mark == NULL ? g_strdup(path)
                         : g_strdup_printf("%.*s-%05u-of-%05u.gguf", (int)(mark - path), path,
                                           i + 1, n_files);
        if (bytes == NULL || !write_bytes(bytes, part_path, error)) {
            return false;
        }
    }
    return true;
}
