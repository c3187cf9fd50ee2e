/* The Probe service's server side and a test cluster's certificates: shared by the tests and by
 * rpc-probe-server. */
#pragma once

#include "tests/unit/rpc/probe.pb-c.h"
#include "transport/rpc/rpc.h"

typedef struct ProbeService {
    Loop *loop;
    int n_called, n_cancelled, n_data_freed;
    int64_t time_left_ms; /* of the last call */
    char peer_name[64];   /* of the last call */
    char text[64];        /* of the last Add that had one */
    RpcRole peer_role;
    size_t most_waiting; /* largest answer of rpc_call_send */
    RpcCall *held;       /* last call of Hang, referenced until it ended */
} ProbeService;

/* Adds the descriptor set of probe.proto once per process. */
void probe_declare(void);
void probe_service_init(ProbeService *probe, Loop *loop);
void probe_service_add(ProbeService *probe, RpcServer *server, unsigned roles);

typedef struct TestCa {
    char *key, *pem;
} TestCa;
typedef struct TestIdentity {
    char *key, *pem, *serial; /* pem: leaf + CA */
} TestIdentity;
void test_ca_make(TestCa *ca, const char *cluster);
void test_ca_clear(TestCa *ca);
void test_identity_make(TestIdentity *identity, const TestCa *ca, const char *name,
                        const char *role);
void test_identity_clear(TestIdentity *identity);
RpcCredentials test_credentials(const TestCa *ca, const TestIdentity *identity);
