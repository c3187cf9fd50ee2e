/* The fill that spoils another one by script: what tests of everything above a link are run
 * against.
 *
 * Datagrams are built in memory of its own and copied to the inner fill's buffers when those are
 * free, so that a datagram can be sent twice, later, changed or never. */
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

typedef struct Raw {
    Port *port;
    LinkRaw *inner;
    uint64_t tag;
    void *link_user;
    GByteArray *building;
    GQueue out;      /* of GBytes: waiting for the inner fill's buffers */
    GBytes *last;    /* the datagram before this one, as it was built */
    GBytes *delayed; /* to go behind the next one */
    unsigned n_flips;
} Raw;

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

static const LinkRawEvents fault_events = {.receive = on_receive, .dead = on_dead};

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
    g_queue_clear_full(&raw->out, (GDestroyNotify)g_bytes_unref);
    g_clear_pointer(&raw->last, g_bytes_unref);
    g_clear_pointer(&raw->delayed, g_bytes_unref);
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

/* Hands the inner fill as much as it takes. */
static LinkStatus raw_flush(Raw *raw)
{
    const LinkOps *inner = raw->port->fill->inner->ops;
    LinkStatus status = LINK_OK;
    while (raw->out.length > 0 && status == LINK_OK) {
        gsize size;
        const void *data = g_bytes_get_data(g_queue_peek_head(&raw->out), &size);
        void *buffer = inner->buffer(raw->inner, size);
        if (buffer == NULL) {
            break;
        }
        memcpy(buffer, data, size);
        status = inner->send(raw->inner, buffer, size);
        g_bytes_unref(g_queue_pop_head(&raw->out));
    }
    return status;
}

static void raw_emit(Raw *raw, GBytes *datagram)
{
    g_queue_push_tail(&raw->out, g_bytes_ref(datagram));
}

static void raw_emit_flipped(Raw *raw, GBytes *datagram)
{
    gsize size;
    const void *data = g_bytes_get_data(datagram, &size);
    g_autofree uint8_t *copy = g_memdup2(data, size);
    unsigned n = raw->n_flips++;
    size_t at = size > LINK_HEADER_BYTES ? LINK_HEADER_BYTES + n * 37u % (size - LINK_HEADER_BYTES)
                                         : CHECKSUM_OFFSET;
    copy[at] ^= (uint8_t)(1u << n % 8);
    g_autoptr(GBytes) flipped = g_bytes_new(copy, size);
    raw_emit(raw, flipped);
}

static void raw_act(Raw *raw, FaultAction action, GBytes *datagram)
{
    switch (action) {
    case FAULT_PASS:
        raw_emit(raw, datagram);
        break;
    case FAULT_DROP:
        break;
    case FAULT_DUPLICATE:
        raw_emit(raw, datagram);
        raw_emit(raw, datagram);
        break;
    case FAULT_FLIP_BIT:
        raw_emit_flipped(raw, datagram);
        break;
    case FAULT_DELAY:
        break;
    case FAULT_REPLAY_LAST:
        raw_emit(raw, datagram);
        if (raw->last != NULL) {
            raw_emit(raw, raw->last);
        }
        break;
    }
}

static LinkStatus fault_send(LinkRaw *link, void *buffer, size_t size)
{
    Raw *raw = (Raw *)link;
    FaultFill *fill = raw->port->fill;
    g_autoptr(GBytes) datagram = g_bytes_new(buffer, size);
    FaultAction action = fill->script(raw->tag, buffer, size, fill->user);
    raw_act(raw, action, datagram);
    if (raw->delayed != NULL) {
        raw_emit(raw, raw->delayed);
        g_clear_pointer(&raw->delayed, g_bytes_unref);
    }
    if (action == FAULT_DELAY) {
        raw->delayed = g_bytes_ref(datagram);
    }
    g_clear_pointer(&raw->last, g_bytes_unref);
    raw->last = g_bytes_ref(datagram);
    return raw_flush(raw);
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
