/* Join: from a token to an identity (DESIGN 7.5). The CA is taken by its hash before anything
 * secret is sent; the key is made here and never leaves the host. */
#pragma once

#include "proto/base/loop.h"
#include "transport/rpc/rpc.h"
#include "worker/agent/identity.h"

typedef struct JoinOptions {
    Loop *loop;
    RpcTransport *transport;
    const char *address; /* host:port of the Join listener */
    const char *ca_pem;  /* from join_fetch_ca() */
    const char *token;   /* never logged */
    const char *name;    /* wished node id or NULL */
    const char *const
        *addresses; /* NULL-ended: hosts of our listeners, for the certificate's names */
} JoinOptions;

/* "sha256:HEX" -> the CA certificate that the listener at `address` shows. INVALID for a malformed
 * hash, DENIED for another CA, UNREACHABLE. Blocks at most 5 s: before the loop runs. Returned. */
char *join_fetch_ca(const char *address, const char *ca_hash, GError **error);

/* Exactly once on the loop; identity is borrowed (identity_copy), NULL with an error: DENIED
 * (token), UNREACHABLE, VERSION, ... */
typedef void (*JoinDoneFn)(const Identity *identity, const GError *error, void *user);
void join_start(const JoinOptions *options, JoinDoneFn done, void *user);

/* "0.0.0.0:7470" as told by a peer that we know as `peer` ("10.0.0.1:7471") -> "10.0.0.1:7470";
 * returned. */
char *join_reachable_address(const char *told, const char *peer);
