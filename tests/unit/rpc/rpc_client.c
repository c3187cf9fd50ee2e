#include "tests/unit/rpc/rpc_client.h"

static void on_message(const ProtobufCMessage *response, void *user)
{
    Outcome *outcome = user;
    const Weft__Test__Number *number = (const void *)response;
    outcome->got_message = true;
    outcome->n_messages++;
    outcome->last_value = number->value;
    outcome->sum += number->value;
    outcome->payload_bytes += number->payload.len;
}

static void on_done(const GError *error, void *user)
{
    Outcome *outcome = user;
    outcome->done = true;
    outcome->n_done++;
    outcome->call = NULL;
    outcome->error = error ? g_error_copy(error) : NULL;
}

static const RpcCallbacks callbacks = {on_message, on_done};

void outcome_clear(Outcome *outcome)
{
    g_clear_error(&outcome->error);
    *outcome = (Outcome){0};
}

static void start(Outcome *outcome, RpcChannel *channel, const char *method,
                  const Weft__Test__Number *number, int64_t deadline_ms, bool wait_for_ready)
{
    outcome_clear(outcome);
    outcome->call = rpc_call_start(channel, &weft__test__probe__descriptor, method,
                                   number ? &number->base : NULL, deadline_ms, wait_for_ready,
                                   callbacks, outcome);
}

void outcome_start(Outcome *outcome, RpcChannel *channel, const char *method, int64_t value,
                   int64_t deadline_ms)
{
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.value = value;
    start(outcome, channel, method, &number, deadline_ms, false);
}

void outcome_start_waiting(Outcome *outcome, RpcChannel *channel, const char *method, int64_t value,
                           int64_t deadline_ms)
{
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.value = value;
    start(outcome, channel, method, &number, deadline_ms, true);
}

void outcome_open(Outcome *outcome, RpcChannel *channel, const char *method, int64_t deadline_ms)
{
    start(outcome, channel, method, NULL, deadline_ms, false);
}

void outcome_send(Outcome *outcome, int64_t value)
{
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.value = value;
    rpc_client_send(outcome->call, &number.base);
}

void outcome_wait(Outcome *outcome, MainLoop *loop)
{
    g_assert_true(main_loop_run_until(loop, &outcome->done, PATIENCE_US));
}

typedef struct CountWait {
    MainLoop *loop;
    const int *count;
    int n;
    bool reached;
} CountWait;

static void look(void *user)
{
    CountWait *wait = user;
    wait->reached = *wait->count >= wait->n;
    if (!wait->reached) {
        loop_timer_start(main_loop_loop(wait->loop), 1000, look, wait);
    }
}

void wait_for_count(MainLoop *loop, const int *count, int n)
{
    CountWait wait = {loop, count, n, false};
    look(&wait);
    g_assert_true(main_loop_run_until(loop, &wait.reached, PATIENCE_US));
}
