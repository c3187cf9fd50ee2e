/* The fill that spoils another one by script: what tests of everything above a link are run
 * against.
 *
 * Datagrams are built in memory of its own and copied to the inner fill's buffers when those are
 * free, so that a datagram can be sent twice, later, changed or never. Regions likewise: they are
 * copied, so only those of host memory are sent; the script sees their heads. */
#include "transport/link/fill.h"

#include <string.h>

#define QUEUE_LIMIT 64u
#define CHECKSUM_OFFSET 28u

typedef struct FaultFill {
    OwnedFill owned;
    const LinkFill *inner;
    FaultScript script;
    void *user;
} FaultFill;

typedef struct Port {
    FaultFill *fill;
    LinkRawPort *inner;
    const LinkRawEvents *events;
    void *user;
    GPtrArray *raws; /* of Raw */
} Port;

/* A datagram, or a region with its head. Counted. */
typedef struct Parcel {
    GBytes *data;    /* the datagram, the head */
    GBytes *payload; /* of a region; NULL: a datagram */
} Parcel;

/* A region that the inner fill has: one of ours, or one that the user takes. */
typedef struct Passage {
    Parcel *parcel; /* or NULL */
    void *transfer; /* the user's */
} Passage;

typedef struct Raw {
    Port *port;
    LinkRaw *inner;
    uint64_t tag;
    void *link_user;
    GByteArray *building;
    GQueue out;      /* of Parcel: waiting for the inner fill's buffers */
    Parcel *last;    /* the one before this one, as it was built */
    Parcel *delayed; /* to go behind the next one */
    unsigned n_flips;
} Raw;

static void parcel_clear(Parcel *parcel)
{
    g_bytes_unref(parcel->data);
    g_clear_pointer(&parcel->payload, g_bytes_unref);
}

static void parcel_unref(Parcel *parcel)
{
    g_rc_box_release_full(parcel, (GDestroyNotify)parcel_clear);
}

/* Copies both. */
static Parcel *parcel_new(const void *data, size_t size, const LinkRegion *region)
{
    Parcel *parcel = g_rc_box_new0(Parcel);
    parcel->data = g_bytes_new(data, size);
    parcel->payload = region != NULL ? g_bytes_new(region->data, region->size) : NULL;
    return parcel;
}

static void on_receive(LinkRaw *inner, void *data, size_t size, void *user)
{
    Port *port = user;
    LinkRaw *raw = inner != NULL ? port->fill->inner->ops->link_user(inner) : NULL;
    port->events->receive(raw, data, size, port->user);
}

static void on_dead(LinkRaw *inner, const char *why, void *user)
{
    Port *port = user;
    port->events->dead(port->fill->inner->ops->link_user(inner), why, port->user);
}

static bool on_offered(LinkRaw *inner, const void *head, size_t head_size, size_t size,
                       LinkOffer *offer, void *user)
{
    Port *port = user;
    LinkRaw *raw = inner != NULL ? port->fill->inner->ops->link_user(inner) : NULL;
    return port->events->offered(raw, head, head_size, size, offer, port->user);
}

static void on_transferred(void *inner, LinkStatus status, void *user)
{
    Port *port = user;
    Passage *passage = inner;
    if (passage->parcel != NULL) {
        parcel_unref(passage->parcel);
    } else {
        port->events->transferred(passage->transfer, status, port->user);
    }
    g_free(passage);
}

static const LinkRawEvents fault_events = {
    .receive = on_receive, .dead = on_dead, .offered = on_offered, .transferred = on_transferred};

static void port_free(Port *port)
{
    g_ptr_array_unref(port->raws);
    g_free(port);
}

static LinkRawPort *fault_port_open(void *self, const LinkRawEvents *events, void *user,
                                    GError **error)
{
    Port *port = g_new0(Port, 1);
    *port = (Port){.fill = self, .events = events, .user = user, .raws = g_ptr_array_new()};
    port->inner =
        port->fill->inner->ops->port_open(port->fill->inner->self, &fault_events, port, error);
    if (port->inner == NULL) {
        port_free(port);
        return NULL;
    }
    return (LinkRawPort *)port;
}

static void raw_free(Raw *raw)
{
    g_ptr_array_remove_fast(raw->port->raws, raw);
    g_queue_clear_full(&raw->out, (GDestroyNotify)parcel_unref);
    g_clear_pointer(&raw->last, parcel_unref);
    g_clear_pointer(&raw->delayed, parcel_unref);
    g_byte_array_unref(raw->building);
    g_free(raw);
}

static void fault_close(LinkRaw *link)
{
    Raw *raw = (Raw *)link;
    raw->port->fill->inner->ops->close(raw->inner);
    raw_free(raw);
}

static void fault_port_close(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    while (port->raws->len > 0) {
        fault_close(g_ptr_array_index(port->raws, port->raws->len - 1));
    }
    port->fill->inner->ops->port_close(port->inner);
    port_free(port);
}

static GBytes *fault_address(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    return port->fill->inner->ops->address(port->inner);
}

static LinkRaw *fault_connect(LinkRawPort *raw_port, GBytes *address, uint64_t tag, void *link_user,
                              GError **error)
{
    Port *port = (Port *)raw_port;
    Raw *raw = g_new0(Raw, 1);
    *raw = (Raw){.port = port, .tag = tag, .link_user = link_user, .building = g_byte_array_new()};
    g_queue_init(&raw->out);
    g_ptr_array_add(port->raws, raw);
    raw->inner = port->fill->inner->ops->connect(port->inner, address, tag, raw, error);
    if (raw->inner == NULL) {
        raw_free(raw);
        return NULL;
    }
    return (LinkRaw *)raw;
}

static void *fault_link_user(LinkRaw *raw)
{
    return ((Raw *)raw)->link_user;
}

static void *fault_buffer(LinkRaw *link, size_t size)
{
    Raw *raw = (Raw *)link;
    if (raw->out.length >= QUEUE_LIMIT) {
        return NULL;
    }
    g_byte_array_set_size(raw->building, (guint)size);
    return raw->building->data;
}

static LinkStatus raw_send_datagram(Raw *raw, const Parcel *parcel)
{
    const LinkOps *inner = raw->port->fill->inner->ops;
    gsize size;
    const void *data = g_bytes_get_data(parcel->data, &size);
    void *buffer = inner->buffer(raw->inner, size);
    if (buffer == NULL) {
        return LINK_AGAIN;
    }
    memcpy(buffer, data, size);
    return inner->send(raw->inner, buffer, size);
}

static LinkStatus raw_send_region(Raw *raw, Parcel *parcel)
{
    const LinkOps *inner = raw->port->fill->inner->ops;
    gsize head_size, size;
    const void *head = g_bytes_get_data(parcel->data, &head_size);
    const void *payload = g_bytes_get_data(parcel->payload, &size);
    const LinkRegion region = {LINK_MEMORY_HOST, (void *)payload, size};
    Passage *passage = g_new0(Passage, 1);
    passage->parcel = g_rc_box_acquire(parcel);
    const LinkStatus status = inner->send_region(raw->inner, head, head_size, &region, passage);
    if (status != LINK_OK) {
        parcel_unref(parcel);
        g_free(passage);
    }
    return status;
}

/* Hands the inner fill as much as it takes. */
static LinkStatus raw_flush(Raw *raw)
{
    LinkStatus status = LINK_OK;
    while (raw->out.length > 0 && status == LINK_OK) {
        Parcel *parcel = g_queue_peek_head(&raw->out);
        status =
            parcel->payload != NULL ? raw_send_region(raw, parcel) : raw_send_datagram(raw, parcel);
        if (status != LINK_AGAIN) {
            parcel_unref(g_queue_pop_head(&raw->out));
        }
    }
    return status == LINK_AGAIN ? LINK_OK : status; /* it waits here */
}

static void raw_emit(Raw *raw, Parcel *parcel)
{
    g_queue_push_tail(&raw->out, g_rc_box_acquire(parcel));
}

static GBytes *flipped(const GBytes *bytes, size_t at, unsigned bit)
{
    gsize size;
    const void *data = g_bytes_get_data((GBytes *)bytes, &size);
    uint8_t *copy = g_memdup2(data, size);
    copy[at] ^= (uint8_t)(1u << bit);
    return g_bytes_new_take(copy, size);
}

static void raw_emit_flipped(Raw *raw, const Parcel *parcel)
{
    const unsigned n = raw->n_flips++;
    const size_t head = parcel->payload != NULL ? 0 : LINK_HEADER_BYTES,
                 size = g_bytes_get_size(parcel->payload != NULL ? parcel->payload : parcel->data),
                 at = size > head ? head + n * 37u % (size - head) : CHECKSUM_OFFSET;
    Parcel *spoilt = g_rc_box_new0(Parcel);
    if (parcel->payload != NULL) {
        spoilt->data = g_bytes_ref(parcel->data);
        spoilt->payload = flipped(parcel->payload, at, n % 8);
    } else {
        spoilt->data = flipped(parcel->data, at, n % 8);
    }
    raw_emit(raw, spoilt);
    parcel_unref(spoilt);
}

static void raw_act(Raw *raw, FaultAction action, Parcel *parcel)
{
    switch (action) {
    case FAULT_PASS:
        raw_emit(raw, parcel);
        break;
    case FAULT_DROP:
        break;
    case FAULT_DUPLICATE:
        raw_emit(raw, parcel);
        raw_emit(raw, parcel);
        break;
    case FAULT_FLIP_BIT:
        raw_emit_flipped(raw, parcel);
        break;
    case FAULT_DELAY:
        break;
    case FAULT_REPLAY_LAST:
        raw_emit(raw, parcel);
        if (raw->last != NULL) {
            raw_emit(raw, raw->last);
        }
        break;
    }
}

/* Takes the parcel. */
static LinkStatus raw_post(Raw *raw, Parcel *parcel)
{
    FaultFill *fill = raw->port->fill;
    gsize size;
    const void *data = g_bytes_get_data(parcel->data, &size);
    FaultAction action = fill->script(raw->tag, data, size, fill->user);
    raw_act(raw, action, parcel);
    if (raw->delayed != NULL) {
        raw_emit(raw, raw->delayed);
        g_clear_pointer(&raw->delayed, parcel_unref);
    }
    if (action == FAULT_DELAY) {
        raw->delayed = g_rc_box_acquire(parcel);
    }
    g_clear_pointer(&raw->last, parcel_unref);
    raw->last = parcel;
    return raw_flush(raw);
}

static LinkStatus fault_send(LinkRaw *link, void *buffer, size_t size)
{
    return raw_post((Raw *)link, parcel_new(buffer, size, NULL));
}

static bool fault_has_memory(LinkRawPort *raw_port, LinkMemory memory)
{
    Port *port = (Port *)raw_port;
    const LinkOps *inner = port->fill->inner->ops;
    return memory == LINK_MEMORY_HOST && inner->has_memory != NULL &&
           inner->has_memory(port->inner, memory);
}

static LinkStatus fault_send_region(LinkRaw *link, const void *head, size_t head_size,
                                    const LinkRegion *region, void *transfer)
{
    Raw *raw = (Raw *)link;
    if (raw->out.length >= QUEUE_LIMIT) {
        return LINK_AGAIN;
    }
    const LinkStatus status = raw_post(raw, parcel_new(head, head_size, region));
    if (status == LINK_OK) {
        raw->port->events->transferred(transfer, LINK_OK, raw->port->user);
    }
    return status;
}

static LinkStatus fault_take(LinkRaw *link, LinkOffer *offer, const LinkRegion *region,
                             void *transfer)
{
    Raw *raw = (Raw *)link;
    Passage *passage = g_new0(Passage, 1);
    passage->transfer = transfer;
    const LinkStatus status = raw->port->fill->inner->ops->take(raw->inner, offer, region, passage);
    if (status != LINK_OK) {
        g_free(passage);
    }
    return status;
}

static void fault_drop(LinkRaw *link, LinkOffer *offer)
{
    Raw *raw = (Raw *)link;
    raw->port->fill->inner->ops->drop(raw->inner, offer);
}

static bool port_has_queued(const Port *port)
{
    for (guint i = 0; i < port->raws->len; i++) {
        if (((const Raw *)g_ptr_array_index(port->raws, i))->out.length > 0) {
            return true;
        }
    }
    return false;
}

static unsigned fault_progress(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    for (guint i = 0; i < port->raws->len; i++) {
        raw_flush(g_ptr_array_index(port->raws, i));
    }
    return port->fill->inner->ops->progress(port->inner);
}

static bool fault_arm(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    return !port_has_queued(port) && port->fill->inner->ops->arm(port->inner);
}

static int fault_fd(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    return port->fill->inner->ops->fd(port->inner);
}

static void fault_interrupt(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    port->fill->inner->ops->interrupt(port->inner);
}

static const LinkOps fault_ops = {
    .name = "fault",
    .port_open = fault_port_open,
    .port_close = fault_port_close,
    .address = fault_address,
    .connect = fault_connect,
    .link_user = fault_link_user,
    .buffer = fault_buffer,
    .send = fault_send,
    .progress = fault_progress,
    .arm = fault_arm,
    .fd = fault_fd,
    .interrupt = fault_interrupt,
    .close = fault_close,
    .has_memory = fault_has_memory,
    .send_region = fault_send_region,
    .take = fault_take,
    .drop = fault_drop,
};

static void fault_release(OwnedFill *fill)
{
    g_free(fill);
}

LinkFill *link_fill_fault_new(LinkFill *inner, FaultScript script, void *user)
{
    FaultFill *fill = g_new0(FaultFill, 1);
    fill->owned = (OwnedFill){.fill = {.ops = &fault_ops, .self = fill}, .release = fault_release};
    fill->inner = inner;
    fill->script = script;
    fill->user = user;
    return &fill->owned.fill;
}
