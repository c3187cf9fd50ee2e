/* Model files: what is written as GGUF or as a Hugging Face directory is read as the same model,
 * tensor by tensor, with the same tokenizer. tests/golden/export/check_export.py holds the same
 * files to the packages of others. */
#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/gguf.h"
#include "proto/model/hf_model.h"
#include "proto/model/model_config.h"
#include "proto/model/model_source.h"
#include "proto/text/bpe_train.h"
#include "proto/text/tokenizer_json.h"
#include "tests/unit/remove_tree.h"

#include <glib/gstdio.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

typedef struct World {
    char *directory;
    BpeVocab *vocab;
} World;

static const ModelConfig configs[] = {
    {.family = FAMILY_GPT2, .layers = 2, .width = 64, .heads = 4, .vocabulary = 300, .context = 32},
    {.family = FAMILY_GPT2,
     .layers = 1,
     .width = 32,
     .heads = 2,
     .vocabulary = 280,
     .context = 16,
     .untied = true,
     .norm_eps = 1e-6f},
    {.family = FAMILY_LLAMA,
     .layers = 2,
     .width = 64,
     .heads = 4,
     .kv_heads = 2,
     .ffn_width = 96,
     .vocabulary = 300,
     .context = 64,
     .rope_base = 50000.0},
    {.family = FAMILY_LLAMA,
     .layers = 1,
     .width = 64,
     .heads = 2,
     .head_size = 16,
     .ffn_width = 32,
     .vocabulary = 290,
     .context = 64,
     .untied = true},
};

static float value_of(uint32_t tensor, const TensorSpec *t, uint32_t row, uint32_t column)
{
    uint32_t x = (tensor * 7919u + row) * 104729u + column * 31u + 12345u;
    x ^= x >> 15;
    x *= 0x2c1b3c6du;
    x ^= x >> 12;
    return ((float)(x & 0xffffu) / 65536.0f - 0.5f) * (t->rows == 1 ? 2.0f : 0.2f);
}

static bool read_values(const void *user, uint32_t tensor, uint32_t row0, uint32_t n_rows,
                        float *out, GError **error)
{
    const TensorSpec *t = &((const ModelSpec *)user)->tensors[tensor];
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t c = 0; c < t->columns; c++) {
            out[(size_t)r * t->columns + c] = value_of(tensor, t, row0 + r, c);
        }
    }
    return true;
}

static int setup(void **state)
{
    static const char text[] = "the cat sat on the mat and the other cat sat there too, then that";
    World *w = g_new0(World, 1);
    g_autoptr(BpeTrainer) trainer = bpe_trainer_new(NULL);
    w->directory = g_dir_make_tmp("weft-models-XXXXXX", NULL);
    if (trainer == NULL || !bpe_trainer_add(trainer, text, sizeof text - 1, NULL)) {
        return -1;
    }
    w->vocab = bpe_trainer_finish(trainer, 270, NULL);
    *state = w;
    return 0;
}

static int teardown(void **state)
{
    World *w = *state;
    remove_tree(w->directory);
    g_free(w->directory);
    bpe_vocab_free(w->vocab);
    g_free(w);
    return 0;
}

/* ---- comparing ---- */

static void check_dimensions(const ModelSpec *a, const ModelSpec *b)
{
    assert_int_equal(a->family, b->family);
    assert_int_equal(a->n_layers, b->n_layers);
    assert_int_equal(a->n_kv_heads, b->n_kv_heads);
    assert_int_equal(a->head_size, b->head_size);
    assert_int_equal(a->ffn_width, b->ffn_width);
    assert_int_equal(a->vocab_size, b->vocab_size);
    assert_int_equal(a->context, b->context);
    assert_int_equal(a->tied_output, b->tied_output);
    assert_true(a->norm_eps == b->norm_eps && a->attention_scale == b->attention_scale);
    assert_true(a->rope.freq_base == b->rope.freq_base);
    assert_int_equal(a->rope.pairing, b->rope.pairing);
    assert_int_equal(a->n_tensors, b->n_tensors);
}

/* What a row is after it was stored in a type. */
static void round_row(Dtype type, float *row, uint32_t n)
{
    g_autofree uint8_t *bytes = g_malloc0((size_t)n * sizeof(float));
    quantise_row(type, row, n, bytes);
    dequantise_row(type, bytes, n, row);
}

static void check_values(const ModelSpec *spec, const ModelSource *s, Dtype type, bool all)
{
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        const bool plain = !all && (t->rows == 1 || t->role == ROLE_POSITION_EMBD);
        g_autofree float *wanted = g_new(float, t->columns);
        g_autofree float *got = g_new(float, (size_t)t->rows * t->columns);
        assert_string_equal(model_source_spec(s)->tensors[i].name, t->name);
        assert_true(model_source_read(s, i, 0, t->rows, got, NULL));
        for (uint32_t r = 0; r < t->rows; r++) {
            read_values(spec, i, r, 1, wanted, NULL);
            round_row(plain ? DTYPE_F32 : type, wanted, t->columns);
            assert_memory_equal(wanted, got + (size_t)r * t->columns, t->columns * sizeof(float));
        }
    }
    assert_false(model_source_read(s, 0, 1, spec->tensors[0].rows, NULL, NULL));
    assert_false(model_source_read(s, spec->n_tensors, 0, 1, NULL, NULL));
}

static void check_vocab(const TokenizerVocab *a, const TokenizerVocab *b)
{
    assert_non_null(b);
    assert_string_equal(a->model, b->model);
    assert_string_equal(a->pre, b->pre);
    assert_int_equal(a->n_merges, b->n_merges);
    assert_int_equal(a->eos, b->eos);
    assert_int_equal(a->bos, b->bos);
    for (uint64_t i = 0; i < a->n_tokens; i++) {
        assert_int_equal(a->tokens[i].length, b->tokens[i].length);
        assert_memory_equal(a->tokens[i].text, b->tokens[i].text, a->tokens[i].length);
        assert_int_equal(a->kinds[i], b->kinds[i]);
    }
    for (uint64_t i = 0; i < a->n_merges; i++) {
        assert_memory_equal(a->merges[i].text, b->merges[i].text, a->merges[i].length);
    }
    g_autoptr(GError) error = NULL;
    g_autoptr(Tokenizer) t = tokenizer_from_vocab(b, &error);
    assert_non_null(t);
}

static ModelSource *open_source(const char *path)
{
    g_autoptr(GError) error = NULL;
    ModelSource *s = model_source_open(path, &error);
    if (s == NULL) {
        fail_msg("%s", error->message);
    }
    return s;
}

/* ---- tests ---- */

static void test_gguf(void **state)
{
    const World *w = *state;
    static const char *const types[] = {"F32", "f16", "bf16", "Q8_0", "q4_0", "Q4_1"};
    g_autofree char *path = g_build_filename(w->directory, "model.gguf", NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(configs) * G_N_ELEMENTS(types); i++) {
        g_autoptr(ModelSpec) spec = model_spec_from_config(&configs[i / G_N_ELEMENTS(types)], NULL);
        Dtype type = DTYPE_LIMIT;
        g_autoptr(GError) error = NULL;
        assert_true(gguf_write_type(types[i % G_N_ELEMENTS(types)], &type));
        const ModelContents contents = {spec, read_values, spec, bpe_vocab_get(w->vocab),
                                        "{{ messages[0].content }}"};
        if (!gguf_write(path, &contents, type, &error)) {
            fail_msg("%s", error->message);
        }
        g_autoptr(ModelSource) s = open_source(path);
        check_dimensions(spec, model_source_spec(s));
        check_values(spec, s, type, false);
        check_vocab(bpe_vocab_get(w->vocab), model_source_vocab(s));
        assert_int_equal(model_source_vocab(s)->n_tokens, spec->vocab_size);
        assert_string_equal(model_source_contents(s).chat_template, contents.chat_template);
        assert_null(model_source_digest(s));
    }
    Dtype type;
    assert_false(gguf_write_type("Q6_K", &type));
    assert_false(gguf_write_type("", &type));
}

static void test_gguf_refuses(void **state)
{
    const World *w = *state;
    g_autofree char *path = g_build_filename(w->directory, "model.gguf", NULL);
    ModelConfig config = configs[0];
    config.width = 40;
    g_autoptr(ModelSpec) narrow = model_spec_from_config(&config, NULL);
    g_autoptr(GError) error = NULL;
    ModelContents contents = {narrow, read_values, narrow, NULL, NULL};
    assert_false(gguf_write(path, &contents, DTYPE_Q8_0, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    assert_non_null(strstr(error->message, "blocks of 32 cannot hold"));
    g_clear_error(&error);
    assert_false(gguf_write(path, &contents, DTYPE_F8_E4M3, &error));
    assert_non_null(strstr(error->message, "no F8_E4M3 weights"));
    g_clear_error(&error);
    assert_true(gguf_write(path, &contents, DTYPE_F16, NULL));

    config.vocabulary = 100;
    g_autoptr(ModelSpec) few = model_spec_from_config(&config, NULL);
    contents = (ModelContents){few, read_values, few, bpe_vocab_get(w->vocab), NULL};
    assert_false(gguf_write(path, &contents, DTYPE_F16, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    g_clear_error(&error);
    assert_false(gguf_write("/nonexistent/model.gguf", &contents, DTYPE_F16, &error));
    g_clear_error(&error);
    contents.vocab = NULL;
    assert_false(gguf_write("/nonexistent/model.gguf", &contents, DTYPE_F16, &error));
    assert_int_equal(error->code, WEFT_ERROR_IO);
    /* What was there is still there, and nothing lies beside it. */
    g_autoptr(ModelSource) s = open_source(path);
    g_autofree char *aside = g_strconcat(path, ".part", NULL);
    assert_false(g_file_test(aside, G_FILE_TEST_EXISTS));
}

static void test_directory(void **state)
{
    const World *w = *state;
    static const Dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    for (size_t i = 0; i < G_N_ELEMENTS(configs) * G_N_ELEMENTS(types); i++) {
        g_autofree char *path = g_strdup_printf("%s/hf-%zu", w->directory, i);
        const Dtype type = types[i % G_N_ELEMENTS(types)];
        g_autoptr(ModelSpec) spec = model_spec_from_config(&configs[i / G_N_ELEMENTS(types)], NULL);
        g_autoptr(GError) error = NULL;
        const ModelContents contents = {spec, read_values, spec, bpe_vocab_get(w->vocab),
                                        "{{ 1 }}"};
        if (!hf_model_write(path, &contents, type, &error)) {
            fail_msg("%s", error->message);
        }
        g_autoptr(ModelSource) s = open_source(path);
        check_dimensions(spec, model_source_spec(s));
        check_values(spec, s, type, true);
        check_vocab(bpe_vocab_get(w->vocab), model_source_vocab(s));
        assert_string_equal(model_source_contents(s).chat_template, "{{ 1 }}");
    }
}

static void put(const char *directory, const char *name, const char *text)
{
    g_autofree char *path = g_build_filename(directory, name, NULL);
    assert_true(g_file_set_contents(path, text, -1, NULL));
}

/* Mistral's are Llama's with another name; not with a window. */
static void test_mistral(void **state)
{
    const World *w = *state;
    static const struct {
        const char *windows;
        bool taken;
    } cases[] = {{"", true},
                 {"\"sliding_window\": null, ", true},
                 {"\"sliding_window\": 1000000, ", true},
                 {"\"sliding_window\": 1, ", false}};
    const ModelConfig *llama = configs;
    while (llama->family != FAMILY_LLAMA) {
        llama++;
    }
    g_autoptr(ModelSpec) spec = model_spec_from_config(llama, NULL);
    const ModelContents contents = {spec, read_values, spec, NULL, NULL};
    assert_true(hf_model_write(w->directory, &contents, DTYPE_F32, NULL));
    g_autofree char *path = g_build_filename(w->directory, "config.json", NULL), *text = NULL;
    assert_true(g_file_get_contents(path, &text, NULL, NULL));
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GString) config = g_string_new(text);
        g_autofree char *type = g_strconcat(cases[i].windows, "\"model_type\": \"mistral\"", NULL);
        assert_int_equal(g_string_replace(config, "\"model_type\": \"llama\"", type, 0), 1);
        put(w->directory, "config.json", config->str);
        g_autoptr(GError) error = NULL;
        g_autoptr(ModelSource) s = model_source_open(w->directory, &error);
        assert_int_equal(s != NULL, cases[i].taken);
        if (s != NULL) {
            check_dimensions(spec, model_source_spec(s));
            check_values(spec, s, DTYPE_F32, true);
        } else {
            assert_non_null(strstr(error->message, "sliding_window of 1 tokens"));
        }
    }
}

static void test_directory_refuses(void **state)
{
    const World *w = *state;
    static const char *const cases[][2] = {
        {"{", "no JSON object"},
        {"[]", "no JSON object"},
        {"{}", "model_type '' is not supported"},
        {"{\"model_type\":\"bert\"}", "model_type 'bert' is not supported"},
        {"{\"model_type\":\"gpt2\",\"activation_function\":\"relu\"}",
         "activation_function 'relu' is not supported; gelu_new is"},
        {"{\"model_type\":\"gpt2\",\"scale_attn_weights\":false}", "scaled otherwise"},
        {"{\"model_type\":\"gpt2\",\"n_embd\":-1}", "width is missing or out of range"},
        {"{\"model_type\":\"llama\",\"rope_scaling\":{\"rope_type\":\"dynamic\"}}",
         "rope_type 'dynamic' is not supported"},
        {"{\"model_type\":\"llama\",\"rope_scaling\":{\"rope_type\":\"llama3\"}}",
         "numbers of rope_type 'llama3' are missing"},
        {"{\"model_type\":\"llama\"}", "layers is missing"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":1,\"n_embd\":8,\"n_head\":2,\"vocab_size\":9}",
         "model.safetensors"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) error = NULL;
        put(w->directory, "config.json", cases[i][0]);
        assert_null(model_source_open(w->directory, &error));
        if (strstr(error->message, cases[i][1]) == NULL) {
            fail_msg("%s gives: %s", cases[i][0], error->message);
        }
    }
    g_autoptr(ModelSpec) spec = model_spec_from_config(&configs[0], NULL);
    const ModelContents contents = {spec, read_values, spec, NULL, NULL};
    assert_true(hf_model_write(w->directory, &contents, DTYPE_F16, NULL));
    static const char *const changed[][2] = {
        {"{\"model_type\":\"gpt2\",\"n_layer\":2,\"n_embd\":64,\"n_head\":4,\"vocab_size\":299,"
         "\"n_positions\":32}",
         "asks for 299 x 64"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":3,\"n_embd\":64,\"n_head\":4,\"vocab_size\":300,"
         "\"n_positions\":32}",
         "transformer.h.2.ln_1.weight is missing"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(changed); i++) {
        g_autoptr(GError) error = NULL;
        put(w->directory, "config.json", changed[i][0]);
        assert_null(model_source_open(w->directory, &error));
        assert_int_equal(error->code, WEFT_ERROR_INVALID);
        assert_non_null(strstr(error->message, changed[i][1]));
    }
    put(w->directory, "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"../x\"}}");
    assert_null(model_source_open(w->directory, NULL));
    g_autoptr(GError) error = NULL;
    assert_null(model_source_open("/nonexistent", &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
}

/* SentencePiece's BPE as tokenizer.json has it. */
#define PIECES_OF(merges)                                                                          \
    "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"merges\":[" merges                      \
    "],\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"ac\":3}}"
#define PIECES PIECES_OF("")
#define MARKS                                                                                      \
    ",\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":"            \
    "\"\xE2\x96\x81\"}"

static void test_tokenizer_json_refuses(void **state)
{
    static const char *const cases[][2] = {
        {"", "no JSON object"},
        {"{}", "model '' is not supported, BPE is"},
        {"{\"model\":{\"type\":\"Unigram\"}}", "'Unigram' is not supported"},
        {"{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true}}", "it has no tokens"},
        {PIECES "}", "mark spaces otherwise"},
        {PIECES ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\xE2\x96\x81\","
                "\"prepend_scheme\":\"first\",\"split\":true}}",
         "mark spaces otherwise"},
        {PIECES MARKS "}", "0 merges, SentencePiece's vocabulary would have 1"},
        {PIECES_OF("[\"a\",\"b\"],[\"b\",\"b\"]") MARKS "}", "merge 1 makes no token"},
        {PIECES_OF("[\"a\",\"b\"],[\"a\",\"c\"],[\"a\",\"b\"]") MARKS "}", "token 2 are apart"},
        {"{\"model\":{\"type\":\"BPE\"}}", "pre_tokenizer"},
        {"{\"model\":{\"type\":\"BPE\"},\"pre_tokenizer\":{\"type\":\"Whitespace\"}}",
         "Whitespace is not supported"},
        {"{\"model\":{\"type\":\"BPE\"},\"pre_tokenizer\":{\"type\":\"ByteLevel\"},"
         "\"normalizer\":{\"type\":\"Lowercase\"}}",
         "none of GPT-2's"},
        {"{\"model\":{\"type\":\"BPE\"},\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}",
         "it has no tokens"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1}},"
         "\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}",
         "has no id below"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1,\"b\":1}},"
         "\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}",
         "two tokens have the id 1"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1},\"merges\":[[\"a\"]]},"
         "\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}",
         "merge 0 is no pair"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) error = NULL;
        assert_null(json_vocab_parse(cases[i][0], strlen(cases[i][0]), NULL, 0, &error));
        assert_int_equal(error->code, WEFT_ERROR_INVALID);
        if (strstr(error->message, cases[i][1]) == NULL) {
            fail_msg("%s gives: %s", cases[i][0], error->message);
        }
    }
    static const char holes[] = "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":3}},"
                                "\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}";
    g_autoptr(JsonVocab) v = json_vocab_parse(holes, sizeof holes - 1, NULL, 0, NULL);
    assert_int_equal(json_vocab_get(v)->n_tokens, 4);
    assert_int_equal(json_vocab_get(v)->kinds[2], TOKEN_UNUSED);
}

/* By the configuration, else by the post-processor. */
static void test_what_begins_a_text(void **state)
{
    World *w = *state;
#define BEGINS                                                                                     \
    ",\"post_processor\":{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"},"         \
    "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":"  \
    "0}},"                                                                                         \
    "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}]}]}"
#define ADDED                                                                                      \
    ",\"added_tokens\":[{\"id\":4,\"content\":\"<s>\",\"special\":true},"                          \
    "{\"id\":5,\"content\":\"<b>\",\"special\":true}]"
    static const struct {
        const char *tokenizer, *config;
        int64_t bos;
        VocabChoice adds;
    } cases[] = {
        {PIECES_OF("\"a b\"") MARKS ADDED "}", "{}", -1, VOCAB_NO},
        {PIECES_OF("\"a b\"") MARKS ADDED BEGINS "}", "{}", 4, VOCAB_YES},
        {PIECES_OF("\"a b\"") MARKS ADDED BEGINS "}", "{\"bos_token\":\"<b>\"}", 4, VOCAB_YES},
        {PIECES_OF("\"a b\"") MARKS ADDED BEGINS "}",
         "{\"bos_token\":\"<b>\",\"add_bos_token\":true}", 5, VOCAB_YES},
        {PIECES_OF("\"a b\"") MARKS ADDED BEGINS "}",
         "{\"bos_token\":{\"content\":\"<b>\"},\"add_bos_token\":false}", 5, VOCAB_NO},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) error = NULL;
        put(w->directory, "tokenizer.json", cases[i].tokenizer);
        put(w->directory, "tokenizer_config.json", cases[i].config);
        g_autoptr(JsonVocab) v = json_vocab_load(w->directory, &error);
        if (v == NULL) {
            fail_msg("case %zu: %s", i, error->message);
        }
        assert_int_equal(json_vocab_get(v)->bos, cases[i].bos);
        assert_int_equal(json_vocab_get(v)->adds_bos, cases[i].adds);
    }
}

/* A file of its own comes first, then the configuration's only one or its "default". */
static void test_chat_templates(void **state)
{
    World *w = *state;
    static const char tokenizer[] = "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}},"
                                    "\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}";
    static const char *const cases[][3] = {
        {"{}", NULL, NULL},
        {"{\"chat_template\":\"one\"}", NULL, "one"},
        {"{\"chat_template\":[{\"name\":\"tools\",\"template\":\"t\"},"
         "{\"name\":\"default\",\"template\":\"d\"}]}",
         NULL, "d"},
        {"{\"chat_template\":[{\"name\":\"tools\",\"template\":\"t\"},3,{}]}", NULL, NULL},
        {"{\"chat_template\":7}", NULL, NULL},
        {"{\"chat_template\":\"one\"}", "{{ file }}\n", "{{ file }}\n"},
        {"{}", "{{ file }}\n", "{{ file }}\n"},
    };
    put(w->directory, "tokenizer.json", tokenizer);
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        put(w->directory, "tokenizer_config.json", cases[i][0]);
        if (cases[i][1] != NULL) {
            put(w->directory, "chat_template.jinja", cases[i][1]);
        }
        g_autoptr(JsonVocab) v = json_vocab_load(w->directory, NULL);
        assert_non_null(v);
        const char *got = json_vocab_chat_template(v);
        if (cases[i][2] == NULL) {
            assert_null(got);
        } else {
            assert_string_equal(got, cases[i][2]);
        }
    }
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_gguf),
        CASE(test_gguf_refuses),
        CASE(test_directory),
        CASE(test_mistral),
        CASE(test_directory_refuses),
        cmocka_unit_test(test_tokenizer_json_refuses),
        CASE(test_what_begins_a_text),
        CASE(test_chat_templates),
    };
    return cmocka_run_group_tests_name("model_source", tests, NULL, NULL);
}
