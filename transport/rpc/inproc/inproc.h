/* Rpc within one process, for tests and simulated clusters: the table of rpc.h over Loops. Messages
 * are packed and unpacked, so that ownership is as honest as over a wire; each side has its own
 * Loop (one thread or many, real or simulated).
 *
 * Who a channel speaks as: credentials.certificate_pem is either a real certificate (CN and OU are
 * read) or the text of rpc_inproc_certificate(). A server with a CA takes only channels with the
 * same ca_pem text; with require_client_certificate only those with a certificate. */
#pragma once

#include "proto/base/random.h"
#include "transport/rpc/rpc.h"

/* A stand-in for a certificate: name without spaces, role as in a certificate's OU, serial may be
 * NULL. Returned. */
char *rpc_inproc_certificate(const char *name, const char *role, const char *serial);

typedef enum RpcInprocFault {
    RPC_INPROC_UP,
    RPC_INPROC_CUT,    /* both sides see the connection break, nothing connects */
    RPC_INPROC_FROZEN, /* nothing arrives and nobody is told; what was sent arrives when it is UP
                          again, and is lost when it is CUT */
} RpcInprocFault;

/* Between the channels of a client (by the name in its certificate; NULL: of all) and a server (by
 * its address; NULL: all). The latest that matches holds. Any thread; takes effect through the
 * Loops. */
void rpc_inproc_set_fault(RpcTransport *transport, const char *client, const char *server,
                          RpcInprocFault fault);
/* Every message takes this long; 0 at first. Before the first channel. */
void rpc_inproc_set_delay(RpcTransport *transport, int64_t delay_us);
/* With a delay, each message takes up to most_us longer; messages of a call stay in order. random:
 * borrowed, used by the Loops' one thread (simulated Loops only). */
void rpc_inproc_set_jitter(RpcTransport *transport, Random *random, int64_t most_us);
