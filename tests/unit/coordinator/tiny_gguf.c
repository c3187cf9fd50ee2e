#include "tests/unit/coordinator/tiny_gguf.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 64u
#define HEADS 4u
#define FFN 256u
#define LAYERS 2u
#define ALIGNMENT 32u

enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_STRING = 8, GGUF_ARRAY = 9 };

typedef struct Writer {
    GByteArray *out;
    uint64_t n_keys, n_tensors;
    GByteArray *infos;
    uint64_t offset;
    GArray *sizes; /* of uint64_t */
} Writer;

static void put(GByteArray *out, const void *data, size_t size)
{
    g_byte_array_append(out, data, (guint)size);
}

static void put_u32(GByteArray *out, uint32_t v)
{
    put(out, &v, sizeof v);
}

static void put_u64(GByteArray *out, uint64_t v)
{
    put(out, &v, sizeof v);
}

static void put_string(GByteArray *out, const char *text)
{
    put_u64(out, strlen(text));
    put(out, text, strlen(text));
}

static void key(Writer *w, const char *name, uint32_t type)
{
    put_string(w->out, name);
    put_u32(w->out, type);
    w->n_keys++;
}

static void key_u32(Writer *w, const char *name, uint32_t v)
{
    key(w, name, GGUF_U32);
    put_u32(w->out, v);
}

static void key_f32(Writer *w, const char *name, float v)
{
    key(w, name, GGUF_F32);
    put(w->out, &v, sizeof v);
}

static void key_string(Writer *w, const char *name, const char *v)
{
    key(w, name, GGUF_STRING);
    put_string(w->out, v);
}

/* GPT-2's printable stand-in for a byte. */
static uint32_t byte_character(unsigned byte)
{
    unsigned next = 256;
    for (unsigned b = 0; b < 256; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
        unsigned c = printable ? b : next++;
        if (b == byte) {
            return c;
        }
    }
    return 0;
}

static void vocabulary(Writer *w)
{
    key(w, "tokenizer.ggml.tokens", GGUF_ARRAY);
    put_u32(w->out, GGUF_STRING);
    put_u64(w->out, TINY_GGUF_VOCAB);
    for (unsigned b = 0; b < 256; b++) {
        char text[8] = {0};
        g_unichar_to_utf8(byte_character(b), text);
        put_string(w->out, text);
    }
    put_string(w->out, "<|im_start|>");
    put_string(w->out, "<|im_end|>");
    key(w, "tokenizer.ggml.token_type", GGUF_ARRAY);
    put_u32(w->out, GGUF_I32);
    put_u64(w->out, TINY_GGUF_VOCAB);
    for (unsigned i = 0; i < TINY_GGUF_VOCAB; i++) {
        put_u32(w->out, i < 256 ? 1 : 3);
    }
    key(w, "tokenizer.ggml.merges", GGUF_ARRAY);
    put_u32(w->out, GGUF_STRING);
    put_u64(w->out, 0);
}

static void tensor(Writer *w, const char *name, uint32_t columns, uint32_t rows)
{
    uint64_t size = (uint64_t)columns * rows * sizeof(float);
    put_string(w->infos, name);
    put_u32(w->infos, rows == 1 ? 1 : 2);
    put_u64(w->infos, columns);
    if (rows > 1) {
        put_u64(w->infos, rows);
    }
    put_u32(w->infos, 0); /* F32 */
    put_u64(w->infos, w->offset);
    g_array_append_val(w->sizes, size);
    w->offset += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    w->n_tensors++;
}

static void layer_tensors(Writer *w, unsigned layer)
{
    static const struct {
        const char *name;
        uint32_t columns, rows;
    } parts[] = {
        {"attn_norm", WIDTH, 1},  {"attn_q", WIDTH, WIDTH},      {"attn_k", WIDTH, WIDTH},
        {"attn_v", WIDTH, WIDTH}, {"attn_output", WIDTH, WIDTH}, {"ffn_norm", WIDTH, 1},
        {"ffn_gate", WIDTH, FFN}, {"ffn_up", WIDTH, FFN},        {"ffn_down", FFN, WIDTH},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(parts); i++) {
        g_autofree char *name = g_strdup_printf("blk.%u.%s.weight", layer, parts[i].name);
        tensor(w, name, parts[i].columns, parts[i].rows);
    }
}

static void keys(Writer *w)
{
    key_string(w, "general.architecture", "llama");
    key_string(w, "general.name", "Tiny Test");
    key_u32(w, "general.alignment", ALIGNMENT);
    key_u32(w, "llama.block_count", LAYERS);
    key_u32(w, "llama.context_length", TINY_GGUF_CONTEXT);
    key_u32(w, "llama.embedding_length", WIDTH);
    key_u32(w, "llama.feed_forward_length", FFN);
    key_u32(w, "llama.attention.head_count", HEADS);
    key_u32(w, "llama.attention.head_count_kv", HEADS);
    key_f32(w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    key_u32(w, "llama.rope.dimension_count", WIDTH / HEADS);
    key_f32(w, "llama.rope.freq_base", 10000);
    key_u32(w, "llama.vocab_size", TINY_GGUF_VOCAB);
    key_string(w, "tokenizer.ggml.model", "gpt2");
    key_string(w, "tokenizer.ggml.pre", "smollm");
    vocabulary(w);
    key_u32(w, "tokenizer.ggml.bos_token_id", 256);
    key_u32(w, "tokenizer.ggml.eos_token_id", 257);
    key_string(w, "tokenizer.chat_template",
               "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] "
               "}}<|im_end|>\n{% endfor %}");
}

void tiny_gguf_write(const char *path)
{
    Writer w = {.out = g_byte_array_new(),
                .infos = g_byte_array_new(),
                .sizes = g_array_new(FALSE, FALSE, sizeof(uint64_t))};
    keys(&w);
    tensor(&w, "token_embd.weight", WIDTH, TINY_GGUF_VOCAB);
    for (unsigned layer = 0; layer < LAYERS; layer++) {
        layer_tensors(&w, layer);
    }
    tensor(&w, "output_norm.weight", WIDTH, 1);
    GByteArray *file = g_byte_array_new();
    put(file, "GGUF", 4);
    put_u32(file, 3);
    put_u64(file, w.n_tensors);
    put_u64(file, w.n_keys);
    put(file, w.out->data, w.out->len);
    put(file, w.infos->data, w.infos->len);
    static const uint8_t zeros[ALIGNMENT];
    put(file, zeros, (ALIGNMENT - file->len % ALIGNMENT) % ALIGNMENT);
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    for (uint64_t i = 0; i < w.offset / sizeof(float); i++) {
        float v = (float)g_rand_double_range(rand, -0.1, 0.1);
        put(file, &v, sizeof v);
    }
    g_assert_true(g_file_set_contents(path, (const char *)file->data, file->len, NULL));
    g_byte_array_unref(file);
    g_byte_array_unref(w.out);
    g_byte_array_unref(w.infos);
    g_array_unref(w.sizes);
}
