/* Activations from device memory to device memory: argv[1] = inproc, tcp or shm, the links that
 * they go over. The devices are trivial ones, whose memory is the host's, so that every fill can
 * carry it: the engines' way is that of other devices. The bits are those of the host alone, what
 * is spoilt on the way is dropped and counted, and who does not take his is named. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "proto/base/failpoint.h"
#include "tests/unit/worker/engine_runs.h"
#include "worker/serve/engine_state.h"

#include <string.h>

/* Steps of 16 rows, of 1152 bytes each, and a last one of 6, which is too short like those of one
 * row that follow. */
enum { N_PROMPT = 150, N_LARGE = 9, LEAST_BYTES = 16 * 1152, N_TOKENS = 6, DEVICES = 5 };

static const char *links;

static LinkFill *fill_new(void)
{
    return strcmp(links, "inproc") == 0 ? link_fill_inproc_new() : link_fill_ucx();
}

/* ---- replicas ---- */

typedef struct World {
    Device *devices[DEVICES];
    const Device *given[8]; /* by global rank */
    LinkFill *fill, *fault;
    LocalReplica *replica;
    FaultAction action; /* of the n-th region that is sent, from 0 */
    int n;
} World;

static FaultAction scripted(uint64_t tag, const void *data, size_t size, void *user)
{
    World *w = user;
    uint16_t op;
    memcpy(&op, (const uint8_t *)data + offsetof(LinkHeader, op), sizeof op);
    return op == LINK_OP_ACTIVATIONS && w->n-- == 0 ? w->action : FAULT_PASS;
}

/* Bit i of `on`: rank i is on a device. */
static void world_open(World *w, const Gguf *g, LocalLayout layout, unsigned on)
{
    g_autoptr(GError) error = NULL;
    for (uint32_t i = 0; i < DEVICES; i++) {
        w->devices[i] = device_open_module(device_module_cpu(), i, NULL);
        assert_non_null(w->devices[i]);
        w->given[i] = on >> i & 1 ? w->devices[i] : NULL;
    }
    w->fill = fill_new();
    w->fault = link_fill_fault_new(w->fill, scripted, w);
    layout.isa = kernels_best_isa();
    layout.devices = w->given;
    w->replica =
        local_replica_new(g, &layout, w->action != FAULT_PASS ? w->fault : w->fill, &error);
    if (w->replica == NULL) {
        fail_msg("%s", error->message);
    }
}

static void world_close(World *w)
{
    local_replica_free(w->replica);
    link_fill_free(w->fault);
    link_fill_free(w->fill);
    for (uint32_t i = 0; i < DEVICES; i++) {
        device_free(w->devices[i]);
    }
}

static DirectCounters counts(const World *w, uint32_t rank)
{
    return direct_counters(local_replica_engine(w->replica, rank)->direct);
}

static LinkCounters link_counts(const World *w, uint32_t rank)
{
    EngineStatus status;
    engine_status(local_replica_engine(w->replica, rank), &status);
    return status.link;
}

static const char *how(const World *w, uint32_t rank)
{
    EngineStatus status;
    engine_status(local_replica_engine(w->replica, rank), &status);
    return status.activations;
}

static void run(const World *w, LocalResult *result)
{
    uint32_t prompt[RUNS_PROMPT];
    runs_prompt(prompt, N_PROMPT, 2500);
    const EngineRequest request = {
        .prompt = prompt, .n_prompt = N_PROMPT, .max_tokens = N_TOKENS, .fresh = true};
    local_replica_run(w->replica, &request, 1, result);
}

static void run_well(const World *w, const LocalResult *host)
{
    LocalResult result;
    run(w, &result);
    if (result.error != NULL) {
        fail_msg("%s", result.error);
    }
    assert_true(runs_equal(host, &result));
    local_result_clear(&result);
}

static void host_alone(const Gguf *g, LocalResult *result)
{
    World w = {.n = 0};
    world_open(&w, g, (LocalLayout){.pp = 1, .tp = {1}}, 0);
    run(&w, result);
    assert_null(result->error);
    assert_null(how(&w, 0));
    world_close(&w);
}

/* ---- the same text ---- */

static const LocalLayout TWO = {.pp = 2, .tp = {1, 1}, .plain = true, .direct = LEAST_BYTES};

static uint32_t n_ranks(const LocalLayout *layout)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < layout->pp; s++) {
        n += layout->tp[s];
    }
    return n;
}

static void layouts_give_the_same_bits(void **state)
{
    static const struct {
        LocalLayout layout;
        unsigned on, sent[DEVICES], taken[DEVICES]; /* regions of a step */
    } cases[] = {
        {{.pp = 2, .tp = {1, 1}}, 3, {1, 0}, {0, 1}},
        {{.pp = 3, .tp = {1, 1, 1}}, 7, {1, 1, 0}, {0, 1, 1}},
        {{.pp = 2, .tp = {1, 2}}, 7, {2, 0, 0}, {0, 1, 1}},
        {{.pp = 2, .tp = {2, 1}}, 7, {1, 0, 0}, {0, 0, 1}},
        {{.pp = 2, .tp = {3, 2}}, 31, {1, 1, 0, 0, 0}, {0, 0, 0, 1, 1}},
        {{.pp = 2, .tp = {1, 2}}, 5, {1, 0, 0}, {0, 0, 1}}, /* a receiver on the host */
        {{.pp = 3, .tp = {1, 1, 1}}, 6, {0, 1, 0}, {0, 0, 1}},
        {{.pp = 2, .tp = {1, 1}}, 1, {0, 0}, {0, 0}},
        {{.pp = 2, .tp = {1, 1}}, 2, {0, 0}, {0, 0}},
    };
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalResult host;
    host_alone(g, &host);
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        World w = {.n = 0};
        LocalLayout layout = cases[i].layout;
        layout.plain = true;
        layout.direct = LEAST_BYTES;
        world_open(&w, g, layout, cases[i].on);
        for (unsigned again = 1; again <= 3; again++) {
            run_well(&w, &host);
            for (uint32_t r = 0; r < n_ranks(&layout); r++) {
                assert_int_equal(counts(&w, r).sent, again * N_LARGE * cases[i].sent[r]);
                assert_int_equal(counts(&w, r).taken, again * N_LARGE * cases[i].taken[r]);
                const LinkCounters c = link_counts(&w, r);
                assert_int_equal(c.dropped_corrupt + c.dropped_replayed + c.dropped_stale, 0);
            }
        }
        world_close(&w);
    }
    local_result_clear(&host);
}

/* Several sequences at once: steps of many shapes, decoding rows in chunks, more in flight. */
static void streams_together(void **state)
{
    enum { STREAMS = 4 };
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q8_0);
    uint32_t prompt[RUNS_PROMPT];
    EngineRequest requests[STREAMS];
    LocalResult host[STREAMS], other[STREAMS];
    runs_prompt(prompt, RUNS_PROMPT, 2500);
    for (unsigned i = 0; i < STREAMS; i++) {
        requests[i] = (EngineRequest){.prompt = prompt + i,
                                      .n_prompt = 140 - 9 * i,
                                      .max_tokens = 10 + i,
                                      .temperature = i % 2 ? 0.8f : 0.0f,
                                      .seed = i,
                                      .trace = i == 3};
    }
    for (unsigned direct = 0; direct < 2; direct++) {
        World w = {.n = 0};
        world_open(
            &w, g,
            direct ? (LocalLayout){.pp = 3, .tp = {1, 2, 1}, .plain = true, .direct = LEAST_BYTES}
                   : (LocalLayout){.pp = 1, .tp = {1}},
            direct ? 15 : 0);
        local_replica_run(w.replica, requests, STREAMS, direct ? other : host);
        assert_true(!direct || counts(&w, 3).taken > 0);
        world_close(&w);
    }
    for (unsigned i = 0; i < STREAMS; i++) {
        assert_null(other[i].error);
        assert_true(runs_equal(&host[i], &other[i]));
        assert_int_equal(host[i].trace_bytes, other[i].trace_bytes);
        assert_memory_equal(host[i].trace, other[i].trace, host[i].trace_bytes);
        local_result_clear(&host[i]);
        local_result_clear(&other[i]);
    }
}

/* ---- where it is not used ---- */

static void staged(const Gguf *g, const LocalResult *host, LocalLayout layout, unsigned on,
                   const char *why)
{
    World w = {.n = 0};
    world_open(&w, g, layout, on);
    run_well(&w, host);
    assert_int_equal(counts(&w, 0).sent, 0);
    assert_int_equal(counts(&w, 1).taken, 0);
    if (why != NULL) {
        assert_non_null(strstr(how(&w, 0), why));
    } else {
        assert_null(how(&w, 0));
    }
    world_close(&w);
}

static void what_is_used_is_said(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalLayout layout = TWO;
    LocalResult host;
    host_alone(g, &host);
    World w = {.n = 0};
    world_open(&w, g, layout, 3);
    assert_string_equal(how(&w, 0), "from device memory to device memory");
    assert_string_equal(how(&w, 1), "from device memory to device memory");
    world_close(&w);
    staged(g, &host, layout, 1, "the other ends cannot");
    staged(g, &host, layout, 2, NULL); /* no device of its own */
    layout.plain = false;
    staged(g, &host, layout, 3, "payloads are sealed");
    layout = TWO;
    layout.direct = 0;
    staged(g, &host, layout, 3, "the device is the host");
    g_setenv("WEFT_GPUDIRECT", "off", TRUE);
    staged(g, &host, TWO, 3, "WEFT_GPUDIRECT=off");
    g_unsetenv("WEFT_GPUDIRECT");
    local_result_clear(&host);
}

/* ---- spoilt, lost, late ---- */

static void what_changes_nothing(void **state)
{
    static const FaultAction actions[] = {FAULT_DUPLICATE, FAULT_DELAY, FAULT_REPLAY_LAST};
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalResult host;
    host_alone(g, &host);
    for (unsigned i = 0; i < G_N_ELEMENTS(actions); i++) {
        for (int n = 0; n < N_LARGE; n += 4) {
            World w = {.action = actions[i], .n = n};
            world_open(&w, g, TWO, 3);
            run_well(&w, &host);
            assert_int_equal(counts(&w, 1).taken, N_LARGE);
            const LinkCounters c = link_counts(&w, 1);
            assert_int_equal(c.dropped_replayed, actions[i] != FAULT_DELAY);
            assert_int_equal(c.dropped_corrupt + c.dropped_stale, 0);
            world_close(&w);
        }
    }
    local_result_clear(&host);
}

static void what_never_comes_right_is_named(void **state)
{
    static const FaultAction actions[] = {FAULT_DROP, FAULT_FLIP_BIT};
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    for (unsigned i = 0; i < G_N_ELEMENTS(actions); i++) {
        World w = {.action = actions[i], .n = 1};
        LocalResult result;
        world_open(&w, g, TWO, 3);
        run(&w, &result);
        assert_string_equal(result.finish_reason, "error");
        if (strstr(result.error, "worker node0 did not answer during activations") == NULL) {
            fail_msg("%s", result.error);
        }
        assert_int_equal(link_counts(&w, 1).dropped_corrupt, actions[i] == FAULT_FLIP_BIT);
        assert_int_equal(counts(&w, 1).taken, 1);
        local_result_clear(&result);
        world_close(&w);
    }
}

/* Over UCX (inproc copies at once) its memory is lent, and stays lent: the sender's next pass
 * waits, and names who holds it up. */
static void a_receiver_that_takes_nothing_is_named(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalLayout layout = TWO;
    LocalResult result;
    World w = {.n = 0};
    layout.predicted_step_s = 0.1;
    world_open(&w, g, layout, 3);
    failpoint_set("engine-hold-rank", true, 1);
    failpoint_set("engine-hold", true, 0);
    run(&w, &result);
    failpoint_set("engine-hold", false, 0);
    failpoint_set("engine-hold-rank", false, 0);
    assert_string_equal(result.finish_reason, "error");
    assert_non_null(
        strstr(result.error, "worker node1 did not answer during taking activations over"));
    local_result_clear(&result);
    world_close(&w);
}

/* ---- ends ---- */

typedef struct Ender {
    const World *world;
    uint32_t rank;   /* whose engine ends the epoch */
    uint64_t n_sent; /* once rank 0 has sent so many messages */
} Ender;

static gpointer ender_main(gpointer user)
{
    const Ender *ender = user;
    g_autoptr(GError) why = g_error_new_literal(g_quark_from_string("test"), 0, "it is over");
    while (link_counts(ender->world, 0).messages_sent < ender->n_sent) {
        g_thread_yield();
    }
    engine_abort(local_replica_engine(ender->world->replica, ender->rank), why);
    return NULL;
}

/* An epoch that is ended by either end, at any moment, ends; nothing is used after it went (as
 * AddressSanitizer sees it). */
static void epochs_end_at_any_time(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalLayout layout = TWO;
    layout.predicted_step_s = 0.1;
    for (unsigned i = 0; i < 10; i++) {
        World w = {.n = 0};
        LocalResult result;
        const Ender ender = {&w, i / 5, 1 + i % 5}; /* behind the hello */
        world_open(&w, g, layout, 3);
        GThread *thread = g_thread_new("ender", ender_main, (gpointer)&ender);
        run(&w, &result);
        g_thread_join(thread);
        local_result_clear(&result);
        world_close(&w);
    }
}

int main(int argc, char **argv)
{
    links = argc > 1 ? argv[1] : "inproc";
    const bool copies = strcmp(links, "inproc") == 0;
    if (!copies) {
        link_ucx_environment(argc, argv, strcmp(links, "tcp") == 0 ? "tcp" : NULL, "lo");
    }
    const struct CMUnitTest waits[] = {
        cmocka_unit_test(a_receiver_that_takes_nothing_is_named),
        cmocka_unit_test(what_never_comes_right_is_named),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts_give_the_same_bits), cmocka_unit_test(streams_together),
        cmocka_unit_test(what_is_used_is_said),       cmocka_unit_test(what_changes_nothing),
        cmocka_unit_test(epochs_end_at_any_time),     waits[copies],
    };
    return cmocka_run_group_tests_name("engine_direct", tests, NULL, NULL);
}
