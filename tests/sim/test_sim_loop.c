/* The simulated Loop itself, and Rpc over inproc under it: the same seed gives the same run. */
#include "tests/sim/sim_loop.h"
#include "tests/unit/rpc/probe_service.h"
#include "tests/unit/rpc/rpc_client.h"

#include "proto/base/error.h"
#include "transport/rpc/inproc/inproc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define HOUR_US G_GINT64_CONSTANT(3600000000)

typedef struct Diary {
    GString *text;
    SimWorld *world;
} Diary;

typedef struct Entry {
    Diary *diary;
    const char *word;
} Entry;

static void write_entry(void *user)
{
    Entry *entry = user;
    g_string_append_printf(entry->diary->text, "%s ", entry->word);
}

static void test_time_order_and_cancel(void **state)
{
    SimWorld *world = sim_world_new(1);
    Loop *loop = sim_world_loop(world);
    Diary diary = {g_string_new(NULL), world};
    Entry a = {&diary, "a"}, b = {&diary, "b"}, c = {&diary, "c"}, never = {&diary, "never"};
    int64_t began_us = loop_now_us(loop);
    loop_timer_start(loop, 3 * HOUR_US, write_entry, &c);
    LoopTimer *cancelled = loop_timer_start(loop, HOUR_US, write_entry, &never);
    loop_timer_start(loop, HOUR_US, write_entry, &b);
    loop_post(loop, write_entry, &a);
    loop_timer_cancel(loop, cancelled);
    loop_timer_cancel(loop, NULL);
    sim_world_run_for(world, 2 * HOUR_US);
    assert_string_equal(diary.text->str, "a b ");
    assert_int_equal(loop_now_us(loop) - began_us, 2 * HOUR_US);
    while (sim_world_step(world, INT64_MAX)) {
    }
    assert_string_equal(diary.text->str, "a b c ");
    assert_int_equal(loop_now_us(loop) - began_us, 3 * HOUR_US);
    assert_true(loop_wall_us(loop) > G_GINT64_CONSTANT(1700000000000000));
    sim_world_free(world);
    g_string_free(diary.text, TRUE);
}

/* 100 posts to one Loop keep their order; timers due at the same time do not, and the seed decides.
 */
static char *run_equal_times(uint64_t seed, bool posts)
{
    SimWorld *world = sim_world_new(seed);
    Loop *loop = sim_world_loop(world);
    Diary diary = {g_string_new(NULL), world};
    char words[100][4];
    Entry entries[100];
    for (int i = 0; i < 100; i++) {
        g_snprintf(words[i], sizeof words[i], "%d", i);
        entries[i] = (Entry){&diary, words[i]};
        if (posts) {
            loop_post(loop, write_entry, &entries[i]);
        } else {
            loop_timer_start(loop, 5, write_entry, &entries[i]);
        }
    }
    sim_world_run_for(world, 10);
    assert_int_equal(sim_world_n_events(world), 100);
    sim_world_free(world);
    return g_string_free(diary.text, FALSE);
}

static void test_equal_times_follow_the_seed(void **state)
{
    g_autofree char *posts = run_equal_times(1, true), *posts_again = run_equal_times(2, true);
    assert_string_equal(posts, posts_again);
    g_autofree char *one = run_equal_times(1, false), *one_again = run_equal_times(1, false),
                    *two = run_equal_times(2, false);
    assert_string_equal(one, one_again);
    assert_string_not_equal(one, two);
}

static void test_frozen_loop(void **state)
{
    SimWorld *world = sim_world_new(1);
    Loop *loop = sim_world_loop(world), *other = sim_world_loop(world);
    Diary diary = {g_string_new(NULL), world};
    Entry a = {&diary, "a"}, b = {&diary, "b"}, c = {&diary, "c"}, never = {&diary, "never"};
    sim_loop_freeze(loop, true);
    loop_timer_start(loop, 10, write_entry, &a);
    LoopTimer *stalled = loop_timer_start(loop, 10, write_entry, &never);
    loop_timer_start(other, 20, write_entry, &b);
    sim_world_run_for(world, 100);
    assert_string_equal(diary.text->str, "b ");
    loop_timer_cancel(loop, stalled);
    int64_t before_us = loop_now_us(loop);
    sim_loop_freeze(loop, false);
    loop_timer_start(loop, 10, write_entry, &c);
    sim_world_run_for(world, 100);
    assert_string_equal(diary.text->str, "b a c ");
    assert_int_equal(loop_now_us(loop), before_us + 100);
    sim_world_free(world);
    g_string_free(diary.text, TRUE);
}

static void count_post(void *user)
{
    ++*(int *)user;
}

static void test_free_runs_what_is_posted(void **state)
{
    SimWorld *world = sim_world_new(1);
    int n = 0;
    loop_post(sim_world_loop(world), count_post, &n);
    loop_timer_start(sim_world_loop(world), 1, count_post, &n);
    sim_world_free(world);
    assert_int_equal(n, 1);
}

/* ---- rpc ------------------------------------------------------------------------------------- */

typedef struct Cluster {
    SimWorld *world;
    RpcTransport *transport;
    Loop *server_loop, *client_loop;
    RpcServer *server;
    ProbeService probe;
    RpcChannel *channel;
    int n_changes;
    bool ready;
} Cluster;

static void on_state(bool ready, void *user)
{
    Cluster *cluster = user;
    cluster->ready = ready;
    cluster->n_changes++;
}

static void cluster_start(Cluster *cluster, uint64_t seed, int64_t delay_us)
{
    probe_declare();
    cluster->world = sim_world_new(seed);
    cluster->transport = rpc_transport_inproc_new();
    rpc_inproc_set_delay(cluster->transport, delay_us);
    cluster->server_loop = sim_world_loop(cluster->world);
    cluster->client_loop = sim_world_loop(cluster->world);
    RpcServerOptions options = {.listen = "c0:1", .health = true};
    cluster->server = rpc_server_new(cluster->transport, cluster->server_loop, &options, NULL);
    probe_service_init(&cluster->probe, cluster->server_loop);
    probe_service_add(&cluster->probe, cluster->server, RPC_ROLE_WORKER);
    g_autofree char *certificate = rpc_inproc_certificate("w1", "worker", "77");
    RpcChannelOptions channel = {"c0:1", {.certificate_pem = certificate}, NULL, on_state, cluster};
    cluster->channel = rpc_channel_new(cluster->transport, cluster->client_loop, &channel, NULL);
    rpc_server_start(cluster->server, NULL);
}

static void cluster_stop(Cluster *cluster)
{
    rpc_channel_free(cluster->channel);
    rpc_server_free(cluster->server, 1000);
    assert_null(cluster->probe.held);
    rpc_transport_inproc_free(cluster->transport);
    sim_world_free(cluster->world);
}

static void test_round_trip_takes_the_delay(void **state)
{
    Cluster cluster = {0};
    cluster_start(&cluster, sim_seed(11), 500);
    Outcome outcome = {0};
    outcome_start(&outcome, cluster.channel, "Add", 41, 5000);
    int64_t began_us = sim_world_now_us(cluster.world);
    assert_true(sim_world_run_until(cluster.world, &outcome.done, HOUR_US));
    assert_null(outcome.error);
    assert_int_equal(outcome.last_value, 42);
    assert_int_equal(sim_world_now_us(cluster.world) - began_us, 1000);
    assert_string_equal(cluster.probe.peer_name, "w1");
    assert_int_equal(cluster.probe.peer_role, RPC_ROLE_WORKER);
    cluster_stop(&cluster);
}

typedef struct Trace {
    uint64_t digest, n_events;
    int64_t sum;
} Trace;

/* Three concurrent calls, one of which meets its deadline of an hour. */
static Trace run_traffic(uint64_t seed)
{
    Cluster cluster = {0};
    cluster_start(&cluster, seed, 100);
    Outcome echo = {0}, count = {0}, hang = {0};
    outcome_open(&echo, cluster.channel, "Echo", 0);
    outcome_start(&count, cluster.channel, "Count", 50, 1000);
    outcome_start(&hang, cluster.channel, "Hang", 1, 3600 * 1000);
    for (int i = 0; i < 20; i++) {
        outcome_send(&echo, i);
    }
    rpc_client_half_close(echo.call);
    assert_true(sim_world_run_until(cluster.world, &hang.done, 2 * HOUR_US));
    sim_world_run_for(cluster.world, 1000);
    assert_true(echo.done && count.done);
    assert_int_equal(count.n_messages, 50);
    assert_true(g_error_matches(hang.error, WEFT_ERROR, WEFT_ERROR_DEADLINE));
    assert_int_equal(cluster.probe.n_cancelled, 1);
    Trace trace = {sim_world_digest(cluster.world), sim_world_n_events(cluster.world),
                   echo.sum + count.sum};
    outcome_clear(&hang);
    cluster_stop(&cluster);
    return trace;
}

static void test_same_seed_same_run(void **state)
{
    uint64_t seed = sim_seed(3);
    Trace first = run_traffic(seed), again = run_traffic(seed), other = run_traffic(seed + 1);
    assert_int_equal(first.digest, again.digest);
    assert_int_equal(first.n_events, again.n_events);
    assert_int_not_equal(first.digest, other.digest);
    assert_int_equal(first.sum, other.sum); /* another order, the same results */
}

static void test_cut_is_seen_on_both_sides(void **state)
{
    Cluster cluster = {0};
    cluster_start(&cluster, sim_seed(5), 100);
    Outcome hang = {0};
    outcome_start(&hang, cluster.channel, "Hang", 1, 0);
    sim_world_run_for(cluster.world, 1000);
    assert_int_equal(hang.n_messages, 1);
    assert_true(cluster.ready);
    rpc_inproc_set_fault(cluster.transport, "w1", "c0:1", RPC_INPROC_CUT);
    sim_world_run_for(cluster.world, 1000);
    assert_true(g_error_matches(hang.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    assert_int_equal(cluster.probe.n_cancelled, 1);
    assert_false(cluster.ready);

    Outcome fast = {0}, waits = {0};
    outcome_start(&fast, cluster.channel, "Add", 1, 5000);
    outcome_start_waiting(&waits, cluster.channel, "Add", 1, 5000);
    sim_world_run_for(cluster.world, 1000);
    assert_true(g_error_matches(fast.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    assert_false(waits.done);
    rpc_inproc_set_fault(cluster.transport, NULL, NULL, RPC_INPROC_UP);
    sim_world_run_for(cluster.world, 1000);
    assert_true(waits.done && !waits.error && cluster.ready);
    outcome_clear(&hang);
    outcome_clear(&fast);
    cluster_stop(&cluster);
}

static void test_frozen_network_tells_nobody(void **state)
{
    Cluster cluster = {0};
    cluster_start(&cluster, sim_seed(6), 100);
    Outcome echo = {0}, dies = {0}, lost = {0};
    outcome_open(&echo, cluster.channel, "Echo", 0);
    sim_world_run_for(cluster.world, 1000);
    rpc_inproc_set_fault(cluster.transport, "w1", NULL, RPC_INPROC_FROZEN);
    outcome_send(&echo, 1);
    rpc_client_half_close(echo.call);
    outcome_start_waiting(&dies, cluster.channel, "Add", 1, 2000);
    sim_world_run_for(cluster.world, HOUR_US);
    assert_false(echo.done);
    assert_int_equal(echo.n_messages, 0);
    assert_true(
        g_error_matches(dies.error, WEFT_ERROR, WEFT_ERROR_DEADLINE)); /* by its own clock */
    rpc_inproc_set_fault(cluster.transport, "w1", NULL, RPC_INPROC_UP);
    sim_world_run_for(cluster.world, 1000);
    assert_true(echo.done && !echo.error);
    assert_int_equal(echo.n_messages, 1);

    outcome_open(&lost, cluster.channel, "Echo", 0);
    sim_world_run_for(cluster.world, 1000);
    rpc_inproc_set_fault(cluster.transport, "w1", NULL, RPC_INPROC_FROZEN);
    outcome_send(&lost, 1);
    rpc_inproc_set_fault(cluster.transport, "w1", NULL, RPC_INPROC_CUT);
    sim_world_run_for(cluster.world, 1000);
    assert_true(g_error_matches(lost.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    assert_int_equal(lost.n_messages, 0);
    outcome_clear(&dies);
    outcome_clear(&lost);
    cluster_stop(&cluster);
}

/* An answer given while the network is frozen arrives after it, although the server's side is over
 * by then. */
static void test_answer_held_back_by_a_frozen_network(void **state)
{
    Cluster cluster = {0};
    cluster_start(&cluster, sim_seed(8), 0);
    Outcome hang = {0};
    outcome_start(&hang, cluster.channel, "Hang", 1, 0);
    sim_world_run_for(cluster.world, 1000);
    rpc_inproc_set_fault(cluster.transport, NULL, "c0:1", RPC_INPROC_FROZEN);
    rpc_call_finish(cluster.probe.held, NULL);
    g_clear_pointer(&cluster.probe.held, rpc_call_unref);
    sim_world_run_for(cluster.world, 1000);
    assert_false(hang.done);
    rpc_inproc_set_fault(cluster.transport, NULL, "c0:1", RPC_INPROC_UP);
    sim_world_run_for(cluster.world, 1000);
    assert_true(hang.done && !hang.error);
    cluster_stop(&cluster);
}

static void test_server_comes_back(void **state)
{
    Cluster cluster = {0};
    cluster_start(&cluster, sim_seed(7), 100);
    Outcome outcome = {0};
    sim_world_run_for(cluster.world, 1000);
    rpc_server_free(cluster.server, 0);
    outcome_start_waiting(&outcome, cluster.channel, "Add", 1, 60000);
    sim_world_run_for(cluster.world, 1000000);
    assert_false(outcome.done || cluster.ready);
    RpcServerOptions options = {.listen = "c0:1"};
    cluster.server = rpc_server_new(cluster.transport, cluster.server_loop, &options, NULL);
    probe_service_add(&cluster.probe, cluster.server, RPC_ROLE_WORKER);
    rpc_server_start(cluster.server, NULL);
    assert_true(sim_world_run_until(cluster.world, &outcome.done, HOUR_US));
    assert_null(outcome.error);
    assert_true(cluster.ready);
    cluster_stop(&cluster);
}

/* Calls are in flight in both directions when everything goes away. */
static void test_stop_with_traffic_in_flight(void **state)
{
    for (int events = 0; events < 60; events++) {
        Cluster cluster = {0};
        cluster_start(&cluster, (uint64_t)events, events % 2 ? 100 : 0);
        Outcome count = {0}, hang = {0};
        outcome_start(&count, cluster.channel, "Count", 10, 1000);
        outcome_start(&hang, cluster.channel, "Hang", 1, 0);
        for (int i = 0; i < events; i++) {
            sim_world_step(cluster.world, INT64_MAX);
        }
        cluster_stop(&cluster);
        assert_true(count.done && hang.done);
        outcome_clear(&count);
        outcome_clear(&hang);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_time_order_and_cancel),
        cmocka_unit_test(test_equal_times_follow_the_seed),
        cmocka_unit_test(test_frozen_loop),
        cmocka_unit_test(test_free_runs_what_is_posted),
        cmocka_unit_test(test_round_trip_takes_the_delay),
        cmocka_unit_test(test_same_seed_same_run),
        cmocka_unit_test(test_cut_is_seen_on_both_sides),
        cmocka_unit_test(test_frozen_network_tells_nobody),
        cmocka_unit_test(test_answer_held_back_by_a_frozen_network),
        cmocka_unit_test(test_server_comes_back),
        cmocka_unit_test(test_stop_with_traffic_in_flight),
    };
    return cmocka_run_group_tests_name("sim_loop", tests, NULL, NULL);
}
