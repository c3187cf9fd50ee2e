/* Coordinator: the whole daemon as one object, so that a test process can host a cluster. */
#pragma once

#include "coordinator/gateway/openai/api_limits.h"
#include "coordinator/store/store.h"
#include "proto/base/log.h"
#include "proto/base/loop.h"
#include "proto/base/random.h"
#include "transport/rpc/rpc.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct CoordinatorOptions {
    Loop *loop;
    RpcTransport *transport;
    Log *log;
    Random *random;
    Store *store;       /* taken always */
    const char *listen; /* control: mutual TLS */
    const char *join_listen;
    const char *health_listen; /* NULL: none. Plaintext, health only */
    const char *advertise;  /* host that others reach this one by; NULL: from listen, or this host's
                               first address */
    const char *state_dir;  /* NULL: keys and credentials are kept nowhere (tests) */
    const char *models_dir; /* NULL: models are refused */
    const char *http_listen; /* NULL: none but what ServeModel asks for */
    /* PEM texts of the HTTP listeners; NULL: plaintext */
    const char *http_certificate_pem, *http_key_pem;
    const ApiLimits *http_limits; /* NULL: the defaults */
    bool http_isolate_keys;       /* prefixes are shared within an API key only */
    bool seal_off;    /* trusted fabrics: workers' payloads travel unsealed, with CRC32C only */
    unsigned threads; /* of the work pool; 0 = on the loop */
    int64_t recovery_wait_us; /* after a loss requests wait so long for workers; 0: not at all */
    double (*lag_ms)(void *user); /* loop lag for status; NULL: 0 */
    void *lag_user;
    LoopFn on_stop; /* an administrator asked the coordinator to stop */
    void *stop_user;
} CoordinatorOptions;

typedef struct Coordinator Coordinator;

/* Texts are copied. */
Coordinator *coordinator_new(const CoordinatorOptions *options);
/* Reads the state, makes what is missing, raises the generation and opens the listeners;
 * started(NULL) once it serves, started(error) when it cannot (then only coordinator_free is left
 * to do). Posted, once. */
void coordinator_start(Coordinator *c, void (*started)(const GError *error, void *user),
                       void *user);
void coordinator_free(Coordinator *c); /* NULL-safe; ends calls, finishes writes */

/* Really bound; borrowed, NULL before it serves. */
const char *coordinator_control_address(const Coordinator *c);
