/* The trace of a request: the same on every layout, in no way of the result; a flipped bit shows at
 * its own site. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "proto/base/failpoint.h"
#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"
#include "worker/serve/trace.h"

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

static const uint32_t PROMPT[] = {1, 17, 5, 99, 23, 4, 25, 31, 77, 8};
enum {
    N_PROMPT = G_N_ELEMENTS(PROMPT),
    N_TOKENS = 6,
    N_LAYERS = 4,
    N_SITES = 1 + 2 * N_LAYERS,
    ROW_BYTES = 4 + 16 * N_SITES,
    N_ROWS = N_PROMPT + N_TOKENS - 1
};

static Gguf *tiny(char **path_out)
{
    g_autoptr(GError) error = NULL;
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, DTYPE_F32);
    config.n_layers = N_LAYERS;
    *path_out = g_strdup_printf("%s/weft-trace-%d.gguf", g_get_tmp_dir(), (int)getpid());
    Gguf *g = gguf_builder_write(&config, *path_out, &error) ? gguf_open(*path_out, &error) : NULL;
    if (g == NULL) {
        fail_msg("%s", error->message);
    }
    return g;
}

static LocalReplica *replica(const Gguf *g, LocalLayout layout)
{
    g_autoptr(GError) error = NULL;
    LocalReplica *r = local_replica_new(g, &layout, NULL, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    return r;
}

static const EngineRequest TRACED = {
    .prompt = PROMPT, .n_prompt = N_PROMPT, .max_tokens = N_TOKENS, .trace = true};

static void trace_of(const Gguf *g, LocalLayout layout, LocalResult *result)
{
    LocalReplica *r = replica(g, layout);
    local_replica_run(r, &TRACED, 1, result);
    assert_null(result->error);
    assert_int_equal(result->trace_bytes, N_ROWS * ROW_BYTES);
    local_replica_free(r);
}

static const uint8_t *site_of(const LocalResult *r, uint32_t row, uint32_t site)
{
    return r->trace + (size_t)row * ROW_BYTES + 4 + (size_t)site * 16;
}

/* The first (position, site) at which two traces differ. */
static bool first_difference(const LocalResult *a, const LocalResult *b, uint32_t *row,
                             uint32_t *site)
{
    for (*row = 0; *row < N_ROWS; (*row)++) {
        for (*site = 0; *site < N_SITES; (*site)++) {
            if (memcmp(site_of(a, *row, *site), site_of(b, *row, *site), 16) != 0) {
                return true;
            }
        }
    }
    return false;
}

static const LocalLayout ONE = {.pp = 1, .tp = {1}};

static void test_equal_on_layouts(void **state)
{
    static const LocalLayout layouts[] = {
        {.pp = 1, .tp = {1}, .threads = 2},
        {.pp = 1, .tp = {1}, .max_rows = 3}, /* the prompt in chunks */
        {.pp = 1, .tp = {2}},
        {.pp = 2, .tp = {1, 1}},
        {.pp = 3, .tp = {1, 2, 1}, .max_rows = 4},
        {.pp = 2, .tp = {2, 1}, .plain = true},
    };
    g_autofree char *path = NULL;
    g_autoptr(Gguf) g = tiny(&path);
    LocalResult alone, other, plain;
    trace_of(g, ONE, &alone);
    for (uint32_t row = 0; row < N_ROWS; row++) {
        uint32_t position;
        memcpy(&position, alone.trace + (size_t)row * ROW_BYTES, 4);
        assert_int_equal(position, row);
        for (uint32_t site = 1; site < N_SITES; site++) {
            assert_memory_not_equal(site_of(&alone, row, site), site_of(&alone, row, site - 1), 16);
        }
    }
    LocalReplica *untraced = replica(g, ONE);
    local_replica_greedy(untraced, PROMPT, N_PROMPT, N_TOKENS, &plain);
    assert_int_equal(plain.trace_bytes, 0);
    assert_string_equal(plain.digest, alone.digest);
    local_replica_free(untraced);
    for (unsigned i = 0; i < G_N_ELEMENTS(layouts); i++) {
        trace_of(g, layouts[i], &other);
        assert_string_equal(other.digest, alone.digest);
        assert_memory_equal(other.trace, alone.trace, alone.trace_bytes);
        local_result_clear(&other);
    }
    local_result_clear(&plain);
    local_result_clear(&alone);
    g_unlink(path);
}

/* Traced and untraced sequences in the same steps. */
static void test_beside_others(void **state)
{
    g_autofree char *path = NULL;
    g_autoptr(Gguf) g = tiny(&path);
    LocalResult alone, together[3];
    trace_of(g, ONE, &alone);
    LocalReplica *r = replica(g, (LocalLayout){.pp = 2, .tp = {1, 2}, .max_rows = 5});
    EngineRequest requests[3] = {TRACED, TRACED, TRACED};
    requests[0].trace = false;
    requests[2].prompt = PROMPT + 3;
    requests[2].n_prompt = N_PROMPT - 3;
    local_replica_run(r, requests, 3, together);
    assert_int_equal(together[0].trace_bytes, 0);
    assert_int_equal(together[1].trace_bytes, alone.trace_bytes);
    assert_memory_equal(together[1].trace, alone.trace, alone.trace_bytes);
    assert_int_equal(together[2].trace_bytes, alone.trace_bytes - 3 * ROW_BYTES);
    for (unsigned i = 0; i < 3; i++) {
        assert_null(together[i].error);
        local_result_clear(&together[i]);
    }
    local_replica_free(r);
    local_result_clear(&alone);
    g_unlink(path);
}

static void test_flip_is_named(void **state)
{
    g_autofree char *path = NULL;
    g_autoptr(Gguf) g = tiny(&path);
    static const struct {
        LocalLayout layout;
        uint32_t layer, rank;
        bool split; /* only one of a stage's ranks is wrong */
    } cases[] = {
        {{.pp = 1, .tp = {1}}, 0, 0, false},    {{.pp = 2, .tp = {1, 1}}, 3, 1, false},
        {{.pp = 2, .tp = {1, 1}}, 1, 0, false}, {{.pp = 1, .tp = {3}}, 2, 2, true},
        {{.pp = 2, .tp = {2, 1}}, 1, 1, true},
    };
    LocalResult right, wrong;
    trace_of(g, ONE, &right);
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        failpoint_set("engine-flip", true, cases[i].layer);
        failpoint_set("engine-flip-rank", true, cases[i].rank);
        trace_of(g, cases[i].layout, &wrong);
        failpoint_set("engine-flip", false, 0);
        failpoint_set("engine-flip-rank", false, 0);
        uint32_t row, site;
        assert_true(first_difference(&right, &wrong, &row, &site));
        assert_int_equal(row, N_PROMPT - 1); /* the last row of the prefill step */
        assert_int_equal(site, trace_site_ffn(cases[i].layer));
        assert_int_equal(memcmp(site_of(&wrong, row, site), TRACE_SPLIT, 8) == 0, cases[i].split);
        if (cases[i].split) {
            uint32_t rank;
            memcpy(&rank, site_of(&wrong, row, site) + 8, sizeof rank);
            assert_int_equal(rank, cases[i].rank);
        }
        local_result_clear(&wrong);
    }
    local_result_clear(&right);
    g_unlink(path);
}

static void count_row(uint32_t slot, uint64_t uid, uint32_t position, const uint8_t *sites,
                      uint32_t n_sites, void *user)
{
    ++*(unsigned *)user;
}

static void test_malformed_messages(void **state)
{
    const uint32_t good[] = {1, 1, 3, 7, 0, 9, 1, 2, 3, 4};
    unsigned n = 0;
    assert_true(trace_each_row(good, sizeof good, count_row, &n));
    assert_int_equal(n, 1);
    for (size_t size = 0; size < sizeof good; size++) {
        assert_false(trace_each_row(good, size, count_row, &n));
    }
    const uint32_t huge[] = {UINT32_MAX, UINT32_MAX, 3, 7, 0, 9, 1, 2, 3, 4};
    assert_false(trace_each_row(huge, sizeof huge, count_row, &n));
    const uint32_t longer[] = {1, 1, 3, 7, 0, 9, 1, 2, 3, 4, 5};
    assert_false(trace_each_row(longer, sizeof longer, count_row, &n));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equal_on_layouts),
        cmocka_unit_test(test_beside_others),
        cmocka_unit_test(test_flip_is_named),
        cmocka_unit_test(test_malformed_messages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
