/* Attach: the one stream to the coordinator. Hello, a heartbeat every 500 ms, and this worker's own
 * fencing (DESIGN 7.6). Loop thread. */
#pragma once

#include "proto/base/log.h"
#include "proto/base/loop.h"
#include "transport/rpc/rpc.h"
#include "weft/v1/cluster.pb-c.h"
#include "worker/agent/identity.h"

#define ATTACH_HEARTBEAT_US 500000
#define ATTACH_FENCE_US 3500000 /* after the send time of the last acknowledged report */

typedef struct Attach Attach;

typedef struct AttachHooks {
    /* What to say; returned, freed with free_unpacked. */
    Weft__V1__Hello *(*hello)(void *user);
    Weft__V1__Heartbeat *(*heartbeat)(uint64_t sequence,
                                      void *user); /* the sequence is filled by Attach */
    void (*welcome)(const Weft__V1__Welcome *welcome, void *user);
    void (*ack)(const Weft__V1__Ack *ack, void *user);
    /* No acknowledgement for ATTACH_FENCE_US: everything of this epoch must have stopped when it
     * returns. Once until the next welcome. */
    void (*fenced)(int64_t silent_us, void *user);
    /* The coordinator will not have this worker (DENIED, VERSION): nothing is tried again. */
    void (*refused)(const GError *error, void *user);
    void *user;
} AttachHooks;

typedef struct AttachOptions {
    Loop *loop;
    RpcTransport *transport;
    Log *log;
    const Identity *identity; /* copied */
    AttachHooks hooks;
} AttachOptions;

/* Starts at once and goes on until attach_free(). */
Attach *attach_new(const AttachOptions *options, GError **error);
void attach_free(Attach *attach); /* NULL-safe; not inside a hook */

bool attach_is_attached(const Attach *attach);
/* This process is going to end: said now and in every heartbeat from now on. */
void attach_leave(Attach *attach);
/* The coordinator has acknowledged that. */
bool attach_has_said_goodbye(const Attach *attach);
/* True if fenced now; fences first if the time is over but the timer has not run yet (a process
 * that was stopped). */
bool attach_is_fenced(Attach *attach);
/* Asks for a certificate for this request; on_done as in rpc.h, with the response before it.
 * Attached only, else false. */
bool attach_renew(Attach *attach, const char *request_pem, RpcCallbacks callbacks, void *user);
/* New credentials: the stream is opened again with them. Copied. */
void attach_set_identity(Attach *attach, const Identity *identity);
