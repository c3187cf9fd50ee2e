/* Where a rank's time goes: no moment counts twice, and a slow wire is neither called computing by
 * the sender nor by who waits. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"
#include "worker/serve/inbox.h"

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

static const uint32_t PROMPT[] = {1, 17, 5, 99, 23, 4, 25, 31};
enum { N_PROMPT = G_N_ELEMENTS(PROMPT), N_TOKENS = 12, SEND_US = 1000, GUARD_US = 60000000 };

static Gguf *tiny(char **path_out)
{
    g_autoptr(GError) error = NULL;
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    *path_out = g_strdup_printf("%s/weft-counters-%d.gguf", g_get_tmp_dir(), (int)getpid());
    Gguf *g = gguf_builder_write(&config, *path_out, &error) ? gguf_open(*path_out, &error) : NULL;
    if (g == NULL) {
        fail_msg("%s", error->message);
    }
    return g;
}

/* A wire on which handing over a message takes SEND_US. */
static FaultAction slow_wire(uint64_t tag, const void *data, size_t size, void *user)
{
    g_usleep(SEND_US);
    return FAULT_PASS;
}

/* Runs N_TOKENS greedily on a slow wire; the ranks' status once they rest. */
static uint64_t run_slow(const Gguf *g, LocalLayout layout, EngineStatus *status, unsigned n)
{
    g_autoptr(GError) error = NULL;
    const int64_t start = g_get_monotonic_time();
    LinkFill *inner = link_fill_inproc_new(), *fill = link_fill_fault_new(inner, slow_wire, NULL);
    LocalReplica *r = local_replica_new(g, &layout, fill, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    LocalResult result;
    local_replica_greedy(r, PROMPT, N_PROMPT, N_TOKENS, &result);
    assert_null(result.error);
    assert_int_equal(result.n, N_TOKENS);
    for (unsigned i = 0; i < n; i++) { /* the last stage counts a step after its tokens are sent */
        do {
            engine_status(local_replica_engine(r, i), &status[i]);
        } while (status[i].steps < N_TOKENS && g_get_monotonic_time() - start < GUARD_US);
    }
    const uint64_t wall = (uint64_t)(g_get_monotonic_time() - start);
    local_result_clear(&result);
    local_replica_free(r);
    link_fill_free(fill);
    link_fill_free(inner);
    return wall;
}

static void check_disjoint(const EngineStatus *s, uint64_t wall)
{
    assert_true(s->steps >= N_TOKENS);
    assert_true(s->rows >= N_PROMPT + N_TOKENS - 1);
    assert_true(s->compute_us > 0 && s->seal_us > 0);
    assert_true(s->link.messages_sent > 0);
    assert_true(s->wire_us >= SEND_US * s->link.messages_sent);
    assert_true(s->compute_us + s->wait_us + s->wire_us + s->seal_us <= wall);
}

static void test_tensor_ranks(void **state)
{
    g_autofree char *path = NULL;
    g_autoptr(Gguf) g = tiny(&path);
    EngineStatus status[2];
    const uint64_t wall =
        run_slow(g, (LocalLayout){.pp = 1, .tp = {2}, .isa = kernels_best_isa()}, status, 2);
    check_disjoint(&status[0], wall);
    check_disjoint(&status[1], wall);
    g_unlink(path);
}

static void test_leader_waits_for_tokens(void **state)
{
    g_autofree char *path = NULL;
    g_autoptr(Gguf) g = tiny(&path);
    EngineStatus status[2];
    const uint64_t wall =
        run_slow(g, (LocalLayout){.pp = 2, .tp = {1, 1}, .isa = kernels_best_isa()}, status, 2);
    check_disjoint(&status[0], wall);
    check_disjoint(&status[1], wall);
    assert_true(status[0].wait_us >= (uint64_t)N_TOKENS * SEND_US /
                                         3); /* stage 1 takes SEND_US to hand over each token */
    g_unlink(path);
}

static void test_inbox(void **state)
{
    g_autoptr(GError) error = NULL;
    Inbox inbox;
    assert_true(inbox_open(&inbox, 2, 100, &error));
    assert_int_equal(inbox.bytes, inbox_bytes(2, 100));
    assert_null(inbox_peek(&inbox));
    for (uint32_t i = 1; i < 8; i++) {
        assert_true(inbox_push(&inbox, i, &i, sizeof i, &error));
        assert_true(inbox_push(&inbox, i + 100, "x", 1, &error));
        assert_false(inbox_push(&inbox, 9, "x", 1, &error));
        assert_non_null(strstr(error->message, "more than 2 steps"));
        g_clear_error(&error);
        const InboxSlot *slot = inbox_peek(&inbox);
        assert_int_equal(slot->number, i);
        assert_int_equal((uintptr_t)slot->data % 64, 0);
        assert_memory_equal(slot->data, &i, sizeof i);
        inbox_pop(&inbox);
        assert_int_equal(inbox_peek(&inbox)->number, i + 100);
        inbox_pop(&inbox);
    }
    uint8_t big[101] = {0};
    assert_false(inbox_push(&inbox, 9, big, sizeof big, &error));
    assert_non_null(strstr(error->message, "101 bytes exceeds 100"));
    inbox_clear(&inbox);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tensor_ranks),
        cmocka_unit_test(test_leader_waits_for_tokens),
        cmocka_unit_test(test_inbox),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
