/* The shared half of inproc's two sides. A Talk is one call: two lanes of parcels, one a direction.
 *
 * Invariants
 *   1. Everything shared is guarded by the transport's mutex; nothing is called with it held but
 *      loop_post().
 *   2. Each parcel in a lane that is not held back by a fault has exactly one delivery posted to
 *      the receiving Loop; each delivery takes the lane's head. So parcels of a lane arrive in
 *      order however deliveries are ordered.
 *   3. An End whose loop is NULL is closed: nothing is posted to it; what is sent to it comes back
 *      as a break to the sender. */
#pragma once

#include "transport/rpc/inproc/inproc.h"
#include "transport/rpc/wire.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct InprocTransport InprocTransport;
typedef struct Talk Talk;

typedef struct End {
    atomic_uint refs;
    Loop *loop;             /* guarded; NULL = closed */
    bool server, accepting; /* accepting: guarded */
    char *name;             /* server: address; channel: the client's name */
    char *ca_pem;
    bool require_certificate, has_certificate;
    void *owner;    /* InprocServer or InprocChannel; touched on the loop only, valid while open */
    GQueue delayed; /* Delivery whose timer runs; touched on the loop only */
} End;

typedef enum ParcelKind {
    PARCEL_OPEN,
    PARCEL_DATA,
    PARCEL_HALF_CLOSE,
    PARCEL_CANCEL,
    PARCEL_STATUS
} ParcelKind;

typedef struct Parcel {
    ParcelKind kind;
    uint8_t *bytes;
    size_t n_bytes;
    int status;
    char *text;
} Parcel;

typedef enum Direction { TO_SERVER, TO_CLIENT } Direction;

struct Talk {
    atomic_uint refs;
    InprocTransport *transport;
    End *ends[2];          /* by Direction: where parcels go */
    GQueue lanes[2];       /* Parcel; guarded */
    unsigned n_held[2];    /* at each lane's tail, without a delivery; guarded */
    size_t waiting_bytes;  /* of the lane to the client; guarded */
    size_t room_bytes;     /* the server waits until so many do, if room_wanted; guarded */
    bool room_wanted;      /* guarded */
    GList link;            /* in transport->talks; guarded */
    RpcClientCall *client; /* client's loop only; NULL when over */
    RpcCall *call;         /* server's loop only */
    char *path;            /* constant */
    int64_t deadline_ms;
    RpcPeer peer; /* texts owned by the channel's End and identity; copied by rpc_call_init */
    char *peer_name, *peer_serial, *peer_address;
};

struct InprocTransport {
    RpcTransport base;
    atomic_uint refs;
    pthread_mutex_t mutex;
    GHashTable *servers; /* name -> End */
    GPtrArray *channels; /* End */
    GArray *faults;
    GQueue talks;
    int64_t delay_us, jitter_us;
    Random *jitter; /* NULL = none */
    unsigned next_port;
};

End *end_new(Loop *loop, const RpcCredentials *credentials, const char *name, void *owner);
void end_close(InprocTransport *transport, End *end);
void end_unref(End *end);

Talk *talk_new(InprocTransport *transport, End *client, End *server);
Talk *talk_ref(Talk *talk);
void talk_unref(Talk *talk);
/* Takes text and bytes. Returns bytes that wait in the lane to the client. */
size_t talk_send(Talk *talk, Direction direction, Parcel parcel);
/* Whether more bytes wait in the lane to the client; if so, inproc_server_drained() follows. */
bool talk_is_behind(Talk *talk, size_t most_waiting);

/* The server that a channel's end can reach now (referenced), or NULL and why (borrowed). */
End *inproc_find(InprocTransport *transport, const End *client, const char *target,
                 const char **why);
/* Tells all channels to look again whether their server can be reached. */
void inproc_announce(InprocTransport *transport);

/* What arrives on each side; on that side's loop. */
void inproc_server_receive(Talk *talk, Parcel *parcel);
void inproc_client_receive(Talk *talk, Parcel *parcel);
void inproc_server_drained(Talk *talk);
void inproc_channel_look(void *channel);

/* the table */
RpcServer *inproc_server_new(RpcTransport *transport, Loop *loop, const RpcServerOptions *options,
                             GError **error);
bool inproc_server_start(RpcServer *server, GError **error);
void inproc_server_free(RpcServer *server, int grace_ms);
size_t inproc_call_send(RpcCall *call, uint8_t *bytes, size_t n_bytes);
bool inproc_call_is_behind(RpcCall *call, size_t most_waiting);
void inproc_call_finish(RpcCall *call, int status, const char *message);
void inproc_call_free(RpcCall *call);
RpcChannel *inproc_channel_new(RpcTransport *transport, Loop *loop,
                               const RpcChannelOptions *options, GError **error);
void inproc_channel_free(RpcChannel *channel);
RpcClientCall *inproc_client_new(RpcChannel *channel);
void inproc_client_start(RpcClientCall *call, const RpcStart *start);
void inproc_client_send(RpcClientCall *call, uint8_t *bytes, size_t n_bytes);
void inproc_client_half_close(RpcClientCall *call);
void inproc_client_cancel(RpcClientCall *call);
void inproc_client_free(RpcClientCall *call);
