/* FakeCoordinator: the coordinator's services as far as a worker sees them, on a Loop of a SimWorld
 * over inproc, with everything that a test wants to spoil; and the calls that a coordinator makes
 * at a worker. */
#pragma once

#include "tests/sim/sim_loop.h"
#include "tests/unit/worker/tiny_model.h"
#include "transport/rpc/inproc/inproc.h"
#include "weft/v1/cluster.pb-c.h"
#include "weft/v1/join.pb-c.h"
#include "weft/v1/serve.pb-c.h"
#include "worker/agent/identity.h"

typedef struct FakeCoordinator {
    SimWorld *world;
    Loop *loop;
    RpcTransport *transport;
    RpcServer *server;
    char *address;
    uint64_t generation;
    /* attach */
    RpcCall *attach;
    unsigned n_attached, n_heartbeats;
    Weft__V1__Hello *hello;         /* the latest */
    Weft__V1__Heartbeat *heartbeat; /* the latest */
    bool no_acks, no_welcome;
    GError *refuse;      /* Attach is answered with it */
    GArray *keep;        /* of FakeKeep; NULL = acks keep whatever was listed */
    const char *revoked; /* serial in every ack */
    /* renew */
    unsigned n_renewed;
    char *ca_pem, *ca_key_pem;       /* real ones, or NULL */
    char *own_certificate, *own_key; /* real ones: over gRPC; NULL: stand-ins of inproc */
    int64_t certificate_life_us;
    /* slices */
    const TinyModel *model;
    unsigned n_fetches, n_slices_asked;
    int corrupt_slices;   /* the next so many slices have a flipped bit; -1 = all */
    bool missing;         /* has nothing */
    int die_after_chunks; /* ends the call with an error after so many; -1 = never */
    bool silent;          /* accepts Fetch and sends nothing */
    bool (*answer_fetch)(RpcCall *call, void *user); /* true = has answered; NULL = nobody */
    void *answer_user;
    /* join */
    const char *token;
    const char *join_role; /* NULL = worker */
} FakeCoordinator;

typedef struct FakeKeep {
    const char *job;
    uint32_t replica;
    uint64_t epoch;
} FakeKeep;

/* On a Loop of any kind; `world` stays NULL. */
FakeCoordinator *fake_coordinator_new_on(Loop *loop, RpcTransport *transport, const char *address,
                                         const char *ca_pem);
/* Over gRPC on a free port of 127.0.0.1, with a CA and a certificate of its own; `address` is then
 * the one bound. */
FakeCoordinator *fake_coordinator_new_grpc(Loop *loop);
/* A key and certificate of its CA; *key_out is x509_free_key'd. Returned. */
char *fake_certificate(FakeCoordinator *c, const char *name, const char *role,
                       int64_t not_before_us, int64_t not_after_us, char **key_out);
/* Listens under `address`; tls: server with CA text "ca" and required client certificates. */
FakeCoordinator *fake_coordinator_new(SimWorld *world, RpcTransport *transport, const char *address,
                                      const char *ca_pem);
void fake_coordinator_free(FakeCoordinator *c);
/* Stops listening (a coordinator that dies) and starts again with the next generation. */
void fake_coordinator_down(FakeCoordinator *c);
void fake_coordinator_up(FakeCoordinator *c);

/* One call at a worker, run to its end. */
typedef struct FakeReply {
    bool done;
    GError *error;
    GPtrArray *messages; /* owned */
    RpcClientCall *call; /* while not done */
    RpcChannel *channel;
} FakeReply;
/* peer: name and role as in "coordinator coordinator". Returned. */
FakeReply *fake_call(FakeCoordinator *c, const char *address, const char *role,
                     const ProtobufCServiceDescriptor *service, const char *method,
                     const ProtobufCMessage *request);
const ProtobufCMessage *fake_reply_last(const FakeReply *reply);
void fake_reply_free(FakeReply *reply);

/* Requests. A stamp's texts are static. */
Weft__V1__Stamp fake_stamp(const FakeCoordinator *c, uint64_t epoch);
Identity fake_identity(const FakeCoordinator *c, const char *name); /* cleared by the caller */
