/* ModelSpec -> message -> bytes -> message -> ModelSpec, and messages that lie. */
#include "proto/model/model_message.h"

#include "proto/base/error.h"
#include "proto/base/random.h"
#include "tests/golden/gguf_builder.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static ModelSpec *sample(void)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.tied = false;
    c.qkv_bias = true;
    c.rope_factors = true;
    ModelSpec *spec = gguf_builder_spec(&c, NULL);
    assert_non_null(spec);
    for (size_t i = 0; i < sizeof spec->file_hash.bytes; i++) {
        spec->file_hash.bytes[i] = (uint8_t)(i + 1);
    }
    return spec;
}

/* Through the wire format and back. */
static Weft__V1__Model *through_wire(Weft__V1__Model *m /* taken */)
{
    size_t size = weft__v1__model__get_packed_size(m);
    g_autofree uint8_t *bytes = g_malloc(size);
    assert_int_equal(weft__v1__model__pack(m, bytes), size);
    weft__v1__model__free_unpacked(m, NULL);
    m = weft__v1__model__unpack(NULL, size, bytes);
    assert_non_null(m);
    return m;
}

static void assert_same_tensor(const TensorSpec *a, const TensorSpec *b)
{
    assert_string_equal(a->name, b->name);
    assert_int_equal(a->role, b->role);
    assert_int_equal(a->layer, b->layer);
    assert_int_equal(a->type, b->type);
    assert_int_equal(a->rows, b->rows);
    assert_int_equal(a->columns, b->columns);
    assert_true(a->offset == b->offset);
    assert_true(a->size_bytes == b->size_bytes);
    assert_int_equal(a->file, b->file);
    assert_int_equal(a->cut, b->cut);
    assert_int_equal(a->n_slices, b->n_slices);
}

static void test_round_trip(void **state)
{
    g_autoptr(ModelSpec) a = sample();
    Weft__V1__Model *m = model_to_message(a, true);
    static const char *const files[] = {"model.gguf"};
    g_autofree Hash128 *hashes = g_new0(Hash128, a->tensors[0].n_slices);
    hashes[1].bytes[3] = 7;
    model_message_set_files(m, files, 1);
    model_message_set_hashes(m, 0, hashes, a->tensors[0].n_slices);
    m = through_wire(m);
    g_autoptr(GError) error = NULL;
    g_autoptr(ModelSpec) b = model_from_message(m, &error);
    assert_non_null(b);
    assert_string_equal(a->name, b->name);
    assert_memory_equal(&a->file_hash, &b->file_hash, sizeof a->file_hash);
    assert_memory_equal(&a->rope, &b->rope, sizeof a->rope);
    assert_true(a->norm_eps == b->norm_eps && a->attention_scale == b->attention_scale);
    assert_int_equal(a->tied_output, b->tied_output);
    assert_int_equal(a->vocab_size, b->vocab_size);
    assert_int_equal(a->context, b->context);
    assert_int_equal(a->n_attn_units, b->n_attn_units);
    assert_int_equal(a->n_ffn_units, b->n_ffn_units);
    assert_int_equal(a->n_tensors, b->n_tensors);
    for (uint32_t i = 0; i < a->n_tensors; i++) {
        assert_same_tensor(&a->tensors[i], &b->tensors[i]);
    }
    Hash128 hash;
    assert_true(model_message_hash(m, 0, 1, &hash));
    assert_true(hash128_equal(&hash, &hashes[1]));
    assert_false(model_message_hash(m, 0, a->tensors[0].n_slices, &hash));
    assert_false(model_message_hash(m, 1, 0, &hash));
    assert_false(model_message_hash(m, UINT32_MAX, 0, &hash));
    weft__v1__model__free_unpacked(m, NULL);
}

static void test_description_only(void **state)
{
    g_autoptr(ModelSpec) spec = sample();
    Weft__V1__Model *m = through_wire(model_to_message(spec, false));
    assert_int_equal(m->n_tensors, 0);
    assert_int_equal(m->n_layers, 2);
    g_autoptr(GError) error = NULL;
    assert_null(model_from_message(m, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL));
    weft__v1__model__free_unpacked(m, NULL);
}

typedef void (*BreakFn)(Weft__V1__Model *m);

static void set_text(char **field, const char *text)
{
    g_free(*field);
    *field = g_strdup(text);
}

/* What no coordinator of ours would send. */
static void set_file(Weft__V1__Model *m, const char *name)
{
    const char *good = "good.gguf";
    model_message_set_files(m, &good, 1);
    set_text(&m->file_names[0], name);
}

static void short_hash(Weft__V1__Model *m)
{
    m->file_hash.len = 15;
}
static void bad_name(Weft__V1__Model *m)
{
    set_text(&m->name, "a\xff");
}
static void control_name(Weft__V1__Model *m)
{
    set_text(&m->name, "a\nb");
}
static void long_name(Weft__V1__Model *m)
{
    g_free(m->name);
    m->name = g_strnfill(5000, 'x');
}
static void bad_tensor_name(Weft__V1__Model *m)
{
    set_text(&m->tensors[3]->name, "\x80");
}
static void no_rope(Weft__V1__Model *m)
{
    weft__v1__rope__free_unpacked(m->rope, NULL);
    m->rope = NULL;
}
static void swapped(Weft__V1__Model *m)
{
    Weft__V1__Tensor *t = m->tensors[1];
    m->tensors[1] = m->tensors[2];
    m->tensors[2] = t;
}
static void partial_hashes(Weft__V1__Model *m)
{
    Hash128 one = {0};
    model_message_set_hashes(m, 0, &one, 1);
}
static void path_up(Weft__V1__Model *m)
{
    set_file(m, "../secret");
}
static void path_absolute(Weft__V1__Model *m)
{
    set_file(m, "/etc/passwd");
}
static void path_hidden(Weft__V1__Model *m)
{
    set_file(m, "..");
}
static void path_inside_up(Weft__V1__Model *m)
{
    set_file(m, "models/../../secret");
}
static void path_of_nothing(Weft__V1__Model *m)
{
    set_file(m, "models//m.gguf");
}
static void path_of_dot(Weft__V1__Model *m)
{
    set_file(m, "./m.gguf");
}
static void path_empty(Weft__V1__Model *m)
{
    set_file(m, "");
}
static void file_beyond(Weft__V1__Model *m)
{
    set_file(m, "a.gguf");
    m->tensors[0]->file = 1;
}
static void wrong_rows(Weft__V1__Model *m)
{
    m->tensors[0]->rows = UINT32_MAX;
}
static void wrong_role(Weft__V1__Model *m)
{
    m->tensors[0]->role = 900;
}
static void wrong_type(Weft__V1__Model *m)
{
    m->tensors[0]->type = 31;
}
static void wrong_family(Weft__V1__Model *m)
{
    m->family = 0;
}
static void huge_layers(Weft__V1__Model *m)
{
    m->n_layers = UINT32_MAX;
}

/* Paths beneath a directory travel; of names that may not none does. */
static void test_file_names(void **state)
{
    (void)state;
    g_autoptr(ModelSpec) spec = sample();
    const char *nested = ".cache/llama/v1/m.gguf", *const bad[] = {"a.gguf", "b\xff.gguf"};
    Weft__V1__Model *m = model_to_message(spec, true);
    model_message_set_files(m, &nested, 1);
    assert_int_equal(m->n_file_names, 1);
    g_autoptr(GError) error = NULL;
    g_autoptr(ModelSpec) back = model_from_message(m, &error);
    assert_non_null(back);
    weft__v1__model__free_unpacked(m, NULL);
    m = model_to_message(spec, true);
    model_message_set_files(m, bad, 2);
    assert_int_equal(m->n_file_names, 0);
    g_autoptr(ModelSpec) without = model_from_message(m, &error);
    assert_non_null(without);
    weft__v1__model__free_unpacked(m, NULL);
}

static void test_refusals(void **state)
{
    static const BreakFn breaks[] = {
        short_hash,     bad_name,        control_name, long_name,     bad_tensor_name, no_rope,
        swapped,        partial_hashes,  path_up,      path_absolute, path_hidden,     path_empty,
        file_beyond,    wrong_rows,      wrong_role,   wrong_type,    wrong_family,    huge_layers,
        path_inside_up, path_of_nothing, path_of_dot};
    g_autoptr(ModelSpec) spec = sample();
    for (size_t i = 0; i < G_N_ELEMENTS(breaks); i++) {
        Weft__V1__Model *m = model_to_message(spec, true);
        g_autoptr(GError) error = NULL;
        breaks[i](m);
        g_autoptr(ModelSpec) back = model_from_message(m, &error);
        if (back != NULL) {
            fail_msg("break %zu was accepted", i);
        }
        assert_non_null(error);
        assert_true(error->domain == WEFT_ERROR);
        weft__v1__model__free_unpacked(m, NULL);
    }
    g_autoptr(GError) error = NULL;
    assert_null(model_from_message(NULL, &error));
    assert_non_null(error);
}

/* Damaged bytes either do not parse, or are refused, or make a spec that holds together. */
static void test_damaged_bytes(void **state)
{
    g_autoptr(ModelSpec) spec = sample();
    Weft__V1__Model *m = model_to_message(spec, true);
    size_t size = weft__v1__model__get_packed_size(m);
    g_autofree uint8_t *bytes = g_malloc(size), *copy = g_malloc(size);
    weft__v1__model__pack(m, bytes);
    weft__v1__model__free_unpacked(m, NULL);
    RandomSeeded random;
    random_seeded_init(&random, 7);
    for (int i = 0; i < 5000; i++) {
        memcpy(copy, bytes, size);
        copy[random_u64(&random.base) % size] ^= (uint8_t)(1u << random_u64(&random.base) % 8);
        m = weft__v1__model__unpack(NULL, size, copy);
        if (m == NULL) {
            continue;
        }
        g_autoptr(GError) error = NULL;
        g_autoptr(ModelSpec) back = model_from_message(m, &error);
        assert_int_equal(back == NULL, error != NULL);
        for (uint32_t k = 0; back != NULL && k < back->n_tensors; k++) {
            for (uint32_t s = 0; s < back->tensors[k].n_slices; s++) {
                assert_true(model_spec_slice_bytes(back, &back->tensors[k], s) <=
                            back->tensors[k].size_bytes);
            }
        }
        weft__v1__model__free_unpacked(m, NULL);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_description_only),
        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_file_names),
        cmocka_unit_test(test_damaged_bytes),
    };
    return cmocka_run_group_tests_name("model-message", tests, NULL, NULL);
}
