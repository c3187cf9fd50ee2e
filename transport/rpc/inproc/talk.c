#include "transport/rpc/inproc/talk.h"

#include <string.h>

typedef struct Fault {
    char *client, *server; /* NULL = any */
    RpcInprocFault fault;
} Fault;

typedef struct Delivery {
    Talk *talk;
    Direction direction;
    LoopTimer *timer; /* while it is in its End's `delayed` */
    GList link;
} Delivery;

/* ---- ends ------------------------------------------------------------------------------------ */

End *end_new(Loop *loop, const RpcCredentials *credentials, const char *name, void *owner)
{
    End *end = g_new0(End, 1);
    atomic_init(&end->refs, 1);
    end->loop = loop;
    end->name = g_strdup(name);
    end->ca_pem = g_strdup(credentials->ca_pem);
    end->require_certificate = credentials->require_client_certificate;
    end->has_certificate = credentials->certificate_pem != NULL;
    end->owner = owner;
    g_queue_init(&end->delayed);
    return end;
}

static End *end_ref(End *end)
{
    atomic_fetch_add(&end->refs, 1);
    return end;
}

void end_unref(End *end)
{
    if (end && atomic_fetch_sub(&end->refs, 1) == 1) {
        g_free(end->name);
        g_free(end->ca_pem);
        g_free(end);
    }
}

static void drop_delayed(End *end)
{
    while (end->delayed.head) {
        Delivery *delivery = end->delayed.head->data;
        g_queue_unlink(&end->delayed, &delivery->link);
        loop_timer_cancel(end->loop, delivery->timer);
        talk_unref(delivery->talk);
        g_free(delivery);
    }
}

void end_close(InprocTransport *transport, End *end)
{
    drop_delayed(end);
    pthread_mutex_lock(&transport->mutex);
    end->loop = NULL;
    end->accepting = false;
    if (end->server) {
        g_hash_table_remove(transport->servers, end->name);
    } else {
        g_ptr_array_remove(transport->channels, end);
    }
    pthread_mutex_unlock(&transport->mutex);
}

/* ---- faults and reach; with the mutex held --------------------------------------------------- */

static RpcInprocFault fault_between(InprocTransport *transport, const char *client,
                                    const char *server)
{
    for (unsigned i = transport->faults->len; i > 0; i--) {
        const Fault *fault = &g_array_index(transport->faults, Fault, i - 1);
        if ((!fault->client || strcmp(fault->client, client) == 0) &&
            (!fault->server || strcmp(fault->server, server) == 0)) {
            return fault->fault;
        }
    }
    return RPC_INPROC_UP;
}

static RpcInprocFault fault_of_talk(Talk *talk)
{
    return fault_between(talk->transport, talk->ends[TO_CLIENT]->name, talk->ends[TO_SERVER]->name);
}

static const char *why_unreachable(InprocTransport *transport, const End *client, const End *server)
{
    if (!server || !server->accepting) {
        return "connection refused";
    }
    if (fault_between(transport, client->name, server->name) != RPC_INPROC_UP) {
        return "the network is cut";
    }
    if (g_strcmp0(client->ca_pem, server->ca_pem) != 0) {
        return "the certificates are not of the same authority";
    }
    if (server->require_certificate && server->ca_pem && !client->has_certificate) {
        return "the server takes only clients with a certificate";
    }
    return NULL;
}

End *inproc_find(InprocTransport *transport, const End *client, const char *target,
                 const char **why)
{
    pthread_mutex_lock(&transport->mutex);
    End *server = g_hash_table_lookup(transport->servers, target);
    *why = why_unreachable(transport, client, server);
    End *found = *why ? NULL : end_ref(server);
    pthread_mutex_unlock(&transport->mutex);
    return found;
}

static void look(void *user)
{
    End *end = user;
    if (end->loop) { /* closed only on this loop's thread */
        inproc_channel_look(end->owner);
    }
    end_unref(end);
}

static void announce_locked(InprocTransport *transport)
{
    for (unsigned i = 0; i < transport->channels->len; i++) {
        End *end = g_ptr_array_index(transport->channels, i);
        loop_post(end->loop, look, end_ref(end));
    }
}

void inproc_announce(InprocTransport *transport)
{
    pthread_mutex_lock(&transport->mutex);
    announce_locked(transport);
    pthread_mutex_unlock(&transport->mutex);
}

/* ---- the transport's life: its owner's reference, and one a talk ---- */

static InprocTransport *transport_ref(InprocTransport *transport)
{
    atomic_fetch_add(&transport->refs, 1);
    return transport;
}

static void transport_unref(InprocTransport *transport)
{
    if (atomic_fetch_sub(&transport->refs, 1) == 1) {
        g_hash_table_unref(transport->servers);
        g_ptr_array_unref(transport->channels);
        g_array_unref(transport->faults);
        pthread_mutex_destroy(&transport->mutex);
        g_free(transport);
    }
}

/* ---- talks ----------------------------------------------------------------------------------- */

static void parcel_clear(Parcel *parcel)
{
    g_free(parcel->bytes);
    g_free(parcel->text);
    g_free(parcel);
}

Talk *talk_new(InprocTransport *transport, End *client, End *server)
{
    Talk *talk = g_new0(Talk, 1);
    atomic_init(&talk->refs, 1);
    talk->transport = transport_ref(transport);
    talk->ends[TO_SERVER] = end_ref(server);
    talk->ends[TO_CLIENT] = end_ref(client);
    g_queue_init(&talk->lanes[TO_SERVER]);
    g_queue_init(&talk->lanes[TO_CLIENT]);
    talk->link.data = talk;
    pthread_mutex_lock(&transport->mutex);
    g_queue_push_tail_link(&transport->talks, &talk->link);
    pthread_mutex_unlock(&transport->mutex);
    return talk;
}

Talk *talk_ref(Talk *talk)
{
    atomic_fetch_add(&talk->refs, 1);
    return talk;
}

/* The count goes down under the mutex: whoever walks transport->talks with it held meets only talks
 * that are alive. */
void talk_unref(Talk *talk)
{
    if (!talk) {
        return;
    }
    InprocTransport *transport = talk->transport;
    pthread_mutex_lock(&transport->mutex);
    bool last = atomic_fetch_sub(&talk->refs, 1) == 1;
    if (last) {
        g_queue_unlink(&transport->talks, &talk->link);
    }
    pthread_mutex_unlock(&transport->mutex);
    if (!last) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        g_queue_clear_full(&talk->lanes[i], (GDestroyNotify)parcel_clear);
        end_unref(talk->ends[i]);
    }
    g_free(talk->path);
    g_free(talk->peer_name);
    g_free(talk->peer_serial);
    g_free(talk->peer_address);
    g_free(talk);
    transport_unref(transport);
}

static void tell_room(void *user)
{
    Talk *talk = user;
    inproc_server_drained(talk);
    talk_unref(talk);
}

/* with the mutex held */
static void note_room(Talk *talk)
{
    if (talk->room_wanted && talk->waiting_bytes <= talk->room_bytes) {
        talk->room_wanted = false;
        if (talk->ends[TO_SERVER]->loop) {
            loop_post(talk->ends[TO_SERVER]->loop, tell_room, talk_ref(talk));
        }
    }
}

bool talk_is_behind(Talk *talk, size_t most_waiting)
{
    pthread_mutex_lock(&talk->transport->mutex);
    talk->room_wanted = talk->waiting_bytes > most_waiting;
    talk->room_bytes = most_waiting;
    const bool behind = talk->room_wanted;
    pthread_mutex_unlock(&talk->transport->mutex);
    return behind;
}

static void arrive(void *user)
{
    Delivery *delivery = user;
    Talk *talk = delivery->talk;
    pthread_mutex_lock(&talk->transport->mutex);
    Parcel *parcel = g_queue_pop_head(&talk->lanes[delivery->direction]);
    if (delivery->direction == TO_CLIENT) {
        talk->waiting_bytes -= parcel->n_bytes;
        note_room(talk);
    }
    pthread_mutex_unlock(&talk->transport->mutex);
    if (delivery->direction == TO_SERVER) {
        inproc_server_receive(talk, parcel);
    } else {
        inproc_client_receive(talk, parcel);
    }
    parcel_clear(parcel);
    g_free(delivery);
    talk_unref(talk);
}

static void arrive_delayed(void *user)
{
    Delivery *delivery = user;
    g_queue_unlink(&delivery->talk->ends[delivery->direction]->delayed, &delivery->link);
    arrive(delivery);
}

static int64_t draw_delay(const InprocTransport *transport)
{
    if (!transport->jitter) {
        return transport->delay_us;
    }
    return transport->delay_us +
           (int64_t)(random_u64(transport->jitter) % ((uint64_t)transport->jitter_us + 1));
}

static void arrive_after_delay(void *user)
{
    Delivery *delivery = user;
    End *end = delivery->talk->ends[delivery->direction];
    if (end->loop) { /* closed only on this loop's thread */
        delivery->timer = loop_timer_start(end->loop, draw_delay(delivery->talk->transport),
                                           arrive_delayed, delivery);
        delivery->link.data = delivery;
        g_queue_push_tail_link(&end->delayed, &delivery->link);
    } else {
        arrive(delivery);
    }
}

/* with the mutex held; the End is open */
static void post_delivery(Talk *talk, Direction direction)
{
    Delivery *delivery = g_new(Delivery, 1);
    *delivery = (Delivery){.talk = talk_ref(talk), .direction = direction};
    loop_post(talk->ends[direction]->loop,
              talk->transport->delay_us > 0 ? arrive_after_delay : arrive, delivery);
}

static void put(Talk *talk, Direction direction, Parcel parcel)
{
    if (direction == TO_CLIENT) {
        talk->waiting_bytes += parcel.n_bytes;
    }
    g_queue_push_tail(&talk->lanes[direction], g_memdup2(&parcel, sizeof parcel));
}

static Parcel break_parcel(Direction direction, const char *why)
{
    if (direction == TO_SERVER) {
        return (Parcel){.kind = PARCEL_CANCEL};
    }
    return (Parcel){.kind = PARCEL_STATUS, .status = RPC_STATUS_UNAVAILABLE, .text = g_strdup(why)};
}

static void tell_break(Talk *talk, Direction direction, const char *why)
{
    if (talk->ends[direction]->loop) {
        put(talk, direction, break_parcel(direction, why));
        post_delivery(talk, direction);
    }
}

size_t talk_send(Talk *talk, Direction direction, Parcel parcel)
{
    InprocTransport *transport = talk->transport;
    pthread_mutex_lock(&transport->mutex);
    if (!talk->ends[direction]->loop) {
        bool last_word = parcel.kind == PARCEL_CANCEL || parcel.kind == PARCEL_STATUS;
        g_free(parcel.bytes);
        g_free(parcel.text);
        if (!last_word) {
            tell_break(talk, direction == TO_SERVER ? TO_CLIENT : TO_SERVER, "connection reset");
        }
    } else {
        put(talk, direction, parcel);
        if (fault_of_talk(talk) == RPC_INPROC_UP) {
            post_delivery(talk, direction);
        } else {
            talk->n_held[direction]++;
        }
    }
    size_t waiting = talk->waiting_bytes;
    pthread_mutex_unlock(&transport->mutex);
    return waiting;
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void release_held(Talk *talk)
{
    for (int i = 0; i < 2; i++) {
        for (; talk->n_held[i] > 0; talk->n_held[i]--) {
            if (talk->ends[i]->loop) {
                post_delivery(talk, (Direction)i);
            }
        }
    }
}

static void lose_held(Talk *talk)
{
    for (int i = 0; i < 2; i++) {
        for (; talk->n_held[i] > 0; talk->n_held[i]--) {
            Parcel *parcel = g_queue_pop_tail(&talk->lanes[i]);
            if (i == TO_CLIENT) {
                talk->waiting_bytes -= parcel->n_bytes;
            }
            parcel_clear(parcel);
        }
    }
}

static void apply_fault(Talk *talk)
{
    switch (fault_of_talk(talk)) {
    case RPC_INPROC_UP:
        release_held(talk);
        break;
    case RPC_INPROC_CUT:
        lose_held(talk);
        tell_break(talk, TO_CLIENT, "connection reset");
        tell_break(talk, TO_SERVER, "connection reset");
        break;
    case RPC_INPROC_FROZEN:
        break;
    }
}

void rpc_inproc_set_fault(RpcTransport *base, const char *client, const char *server,
                          RpcInprocFault kind)
{
    InprocTransport *transport = (InprocTransport *)base;
    pthread_mutex_lock(&transport->mutex);
    Fault fault = {g_strdup(client), g_strdup(server), kind};
    g_array_append_val(transport->faults, fault);
    for (GList *at = transport->talks.head; at; at = at->next) {
        apply_fault(at->data);
    }
    announce_locked(transport);
    pthread_mutex_unlock(&transport->mutex);
}

void rpc_inproc_set_delay(RpcTransport *base, int64_t delay_us)
{
    ((InprocTransport *)base)->delay_us = delay_us;
}

void rpc_inproc_set_jitter(RpcTransport *base, Random *random, int64_t most_us)
{
    InprocTransport *transport = (InprocTransport *)base;
    transport->jitter = random;
    transport->jitter_us = most_us;
}

char *rpc_inproc_certificate(const char *name, const char *role, const char *serial)
{
    return g_strdup_printf("inproc %s %s %s", name, role, serial ? serial : "-");
}

/* ---- the transport --------------------------------------------------------------------------- */

static void fault_clear(void *data)
{
    Fault *fault = data;
    g_free(fault->client);
    g_free(fault->server);
}

RpcTransport *rpc_transport_inproc_new(void)
{
    static const RpcTransportOps ops = {
        .server_new = inproc_server_new,
        .server_start = inproc_server_start,
        .server_free = inproc_server_free,
        .call_send = inproc_call_send,
        .call_is_behind = inproc_call_is_behind,
        .call_finish = inproc_call_finish,
        .call_free = inproc_call_free,
        .channel_new = inproc_channel_new,
        .channel_free = inproc_channel_free,
        .client_new = inproc_client_new,
        .client_start = inproc_client_start,
        .client_send = inproc_client_send,
        .client_half_close = inproc_client_half_close,
        .client_cancel = inproc_client_cancel,
        .client_free = inproc_client_free,
    };
    InprocTransport *transport = g_new0(InprocTransport, 1);
    transport->base.ops = &ops;
    atomic_init(&transport->refs, 1);
    pthread_mutex_init(&transport->mutex, NULL);
    transport->servers = g_hash_table_new(g_str_hash, g_str_equal);
    transport->channels = g_ptr_array_new();
    transport->faults = g_array_new(FALSE, FALSE, sizeof(Fault));
    g_array_set_clear_func(transport->faults, fault_clear);
    g_queue_init(&transport->talks);
    transport->next_port = 40000;
    return &transport->base;
}

/* Its servers and channels are freed before it. */
void rpc_transport_inproc_free(RpcTransport *base)
{
    if (base) {
        InprocTransport *transport = (InprocTransport *)base;
        g_assert(g_hash_table_size(transport->servers) == 0 && transport->channels->len == 0);
        transport_unref(transport);
    }
}
