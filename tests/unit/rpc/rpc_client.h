/* What the tests need of a client: one call's outcome, and waiting for it on a MainLoop. */
#pragma once

#include "tests/unit/rpc/probe.pb-c.h"
#include "transport/daemon/daemon.h"
#include "transport/rpc/rpc.h"

#define PATIENCE_US G_GINT64_CONSTANT(10000000) /* bound of every wait in these tests */

typedef struct Outcome {
    RpcClientCall *call; /* NULL when done */
    bool done, got_message;
    int n_messages, n_done;
    int64_t last_value, sum;
    size_t payload_bytes;
    GError *error;
} Outcome;

void outcome_clear(Outcome *outcome);
/* Starts a call of Probe with a Number. */
void outcome_start(Outcome *outcome, RpcChannel *channel, const char *method, int64_t value,
                   int64_t deadline_ms);
void outcome_start_waiting(Outcome *outcome, RpcChannel *channel, const char *method, int64_t value,
                           int64_t deadline_ms);
/* Without a first message. */
void outcome_open(Outcome *outcome, RpcChannel *channel, const char *method, int64_t deadline_ms);
void outcome_send(Outcome *outcome, int64_t value);
/* Asserts that it ended (in time). */
void outcome_wait(Outcome *outcome, MainLoop *loop);
/* Runs the loop until *count reaches n; asserts that it does. */
void wait_for_count(MainLoop *loop, const int *count, int n);
