/* JoinGate: the Join listener, open only while a token is valid (DESIGN 7.5), and the Join service
 * behind it. Loop thread only. */
#pragma once

#include "coordinator/ca/authority.h"
#include "coordinator/ca/tokens.h"
#include "coordinator/members.h"
#include "proto/base/log.h"
#include "transport/rpc/rpc.h"

#include <glib.h>

typedef struct JoinGateOptions {
    Loop *loop;
    RpcTransport *transport;
    Log *log;
    Random *random;
    Authority *authority;
    Members *members;
    const char
        *listen; /* "host:port", port 0 = any free, the same one each time it opens; copied */
    const char *cluster;         /* copied */
    const char *control_address; /* told to who joins; copied */
    RpcCredentials credentials;  /* server TLS; texts copied */
} JoinGateOptions;

typedef struct JoinGate JoinGate;
/* Tries the port once, so that one in use is known at start; closed again until join_gate_update().
 */
JoinGate *join_gate_new(const JoinGateOptions *options, GError **error);
void join_gate_free(JoinGate *gate); /* NULL-safe */
/* tokens: borrowed from now on; opens or (after a moment, so that the last answer gets out) closes
 * the listener. */
void join_gate_update(JoinGate *gate, TokenBook *tokens);
/* The coordinator's certificate was renewed; texts copied. */
void join_gate_set_credentials(JoinGate *gate, const RpcCredentials *credentials);
/* "host:port" really bound; borrowed. */
const char *join_gate_address(const JoinGate *gate);
