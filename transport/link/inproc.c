/* The fill within one process: ports on a bus, datagrams moved by pointer.
 *
 * Each port has an inbox that senders of any thread append to under its lock; its own thread takes
 * the whole list at once. A buffer goes back to its sender's pool when the receiver has handled it.
 * A region is copied to a buffer when it is sent, so its sender's part ends there; the buffer is
 * the offer. A port that sleeps says so (armed, under the same lock), so that senders write to its
 * eventfd only then.
 *
 * Lifetimes: a port is held by its opener, by every connection to it and by the bus until it
 * closes; a pool is held by its connection and by every datagram in flight. Locks in this order:
 * the bus, a port, a pool. They are pthread mutexes because ThreadSanitizer sees those, and not
 * GLib's. */
#include "transport/link/buffer_pool.h"
#include "transport/link/fill.h"
#include "transport/link/tag_table.h"

#include "proto/base/error.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define IN_FLIGHT_LIMIT 256u
#define IN_FLIGHT_BYTES (128u << 20)
#define REGION_AT 64u /* in its buffer */

typedef struct Bus {
    OwnedFill owned;
    atomic_uint references; /* the fill's own and one a port */
    pthread_mutex_t lock;
    GHashTable *ports; /* id -> Port, borrowed: a port leaves when it closes */
    uint64_t last_id;
} Bus;

typedef struct SharedPool {
    atomic_uint references;
    pthread_mutex_t lock;
    BufferPool pool;
} SharedPool;

typedef enum NoticeKind { NOTICE_LINK_CLOSED, NOTICE_PORT_CLOSED } NoticeKind;

/* News about a peer; datagrams are the buffers themselves. */
typedef struct Notice {
    struct Notice *next;
    uint64_t tag_or_port;
    NoticeKind kind;
} Notice;

typedef struct Port {
    atomic_uint references;
    Bus *bus;
    uint64_t id;
    int event_fd;
    const LinkRawEvents *events;
    void *user;
    pthread_mutex_t lock;
    LinkBuffer *inbox, **inbox_tail; /* datagrams; owner = the SharedPool that they return to */
    Notice *notices, **notices_tail; /* handled after the datagrams that were there before them */
    bool armed, closed;
    TagTable tags;   /* the port's thread */
    GPtrArray *raws; /* the port's thread; of Raw */
} Port;

typedef struct Raw {
    Port *port, *peer; /* peer: a reference */
    uint64_t tag;
    void *link_user;
    SharedPool *pool;
    GPtrArray *offers; /* LinkBuffer */
    bool dead;
} Raw;

static void pool_unref(SharedPool *pool)
{
    if (atomic_fetch_sub(&pool->references, 1) == 1) {
        buffer_pool_clear(&pool->pool);
        pthread_mutex_destroy(&pool->lock);
        g_free(pool);
    }
}

static void buffer_return(LinkBuffer *buffer)
{
    SharedPool *pool = buffer->owner;
    pthread_mutex_lock(&pool->lock);
    buffer_pool_put(&pool->pool, buffer);
    pthread_mutex_unlock(&pool->lock);
    pool_unref(pool);
}

static void bus_unref(Bus *bus)
{
    if (atomic_fetch_sub(&bus->references, 1) == 1) {
        g_hash_table_unref(bus->ports);
        pthread_mutex_destroy(&bus->lock);
        g_free(bus);
    }
}

static void bus_release(OwnedFill *fill)
{
    bus_unref((Bus *)fill);
}

static void port_wake(Port *port)
{
    uint64_t one = 1;
    ssize_t n;
    do {
        n = write(port->event_fd, &one, sizeof one);
    } while (n < 0 && errno == EINTR);
}

static void port_drop_inbox(Port *port)
{
    while (port->inbox != NULL) {
        LinkBuffer *buffer = port->inbox;
        port->inbox = buffer->next;
        buffer_return(buffer);
    }
    while (port->notices != NULL) {
        Notice *notice = port->notices;
        port->notices = notice->next;
        g_free(notice);
    }
    port->inbox_tail = &port->inbox;
    port->notices_tail = &port->notices;
}

static void port_unref(Port *port)
{
    if (atomic_fetch_sub(&port->references, 1) == 1) {
        port_drop_inbox(port);
        close(port->event_fd);
        pthread_mutex_destroy(&port->lock);
        bus_unref(port->bus);
        g_free(port);
    }
}

static LinkRawPort *inproc_port_open(void *fill, const LinkRawEvents *events, void *user,
                                     GError **error)
{
    Bus *bus = fill;
    int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (event_fd < 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "cannot create an event descriptor: %s: raise the limit of open files",
                    g_strerror(errno));
        return NULL;
    }
    Port *port = g_new0(Port, 1);
    atomic_init(&port->references, 1);
    port->bus = bus;
    port->event_fd = event_fd;
    port->events = events;
    port->user = user;
    pthread_mutex_init(&port->lock, NULL);
    port->inbox_tail = &port->inbox;
    port->notices_tail = &port->notices;
    tag_table_init(&port->tags);
    port->raws = g_ptr_array_new();
    atomic_fetch_add(&bus->references, 1);
    pthread_mutex_lock(&bus->lock);
    port->id = ++bus->last_id;
    g_hash_table_insert(bus->ports, &port->id, port);
    pthread_mutex_unlock(&bus->lock);
    return (LinkRawPort *)port;
}

/* Tells `peer` that a connection or a whole port is gone. */
static void port_notify(Port *peer, NoticeKind kind, uint64_t tag_or_port)
{
    Notice *notice = g_new(Notice, 1);
    *notice = (Notice){.kind = kind, .tag_or_port = tag_or_port};
    pthread_mutex_lock(&peer->lock);
    bool wake = peer->armed;
    if (peer->closed) {
        g_free(notice);
        wake = false;
    } else {
        *peer->notices_tail = notice;
        peer->notices_tail = &notice->next;
        peer->armed = false;
    }
    pthread_mutex_unlock(&peer->lock);
    if (wake) {
        port_wake(peer);
    }
}

static void raw_free(Raw *raw)
{
    g_ptr_array_unref(raw->offers);
    tag_table_remove(&raw->port->tags, raw->tag);
    g_ptr_array_remove_fast(raw->port->raws, raw);
    port_unref(raw->peer);
    pool_unref(raw->pool);
    g_free(raw);
}

static void inproc_close(LinkRaw *link)
{
    Raw *raw = (Raw *)link;
    port_notify(raw->peer, NOTICE_LINK_CLOSED, raw->tag);
    raw_free(raw);
}

static void inproc_port_close(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    while (port->raws->len > 0) {
        raw_free(g_ptr_array_index(port->raws, port->raws->len - 1));
    }
    Bus *bus = port->bus;
    pthread_mutex_lock(&bus->lock);
    g_hash_table_remove(bus->ports, &port->id);
    pthread_mutex_lock(&port->lock);
    port->closed = true;
    port_drop_inbox(port);
    pthread_mutex_unlock(&port->lock);
    GHashTableIter iter;
    gpointer other;
    g_hash_table_iter_init(&iter, bus->ports);
    while (g_hash_table_iter_next(&iter, NULL, &other)) {
        port_notify(other, NOTICE_PORT_CLOSED, port->id);
    }
    pthread_mutex_unlock(&bus->lock);
    tag_table_clear(&port->tags);
    g_ptr_array_unref(port->raws);
    port_unref(port);
}

static GBytes *inproc_address(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    return g_bytes_new(&port->id, sizeof port->id);
}

/* A reference to an open port, or NULL. */
static Port *bus_find(Bus *bus, GBytes *address)
{
    gsize size;
    const void *id = g_bytes_get_data(address, &size);
    if (size != sizeof(uint64_t)) {
        return NULL;
    }
    pthread_mutex_lock(&bus->lock);
    Port *port = g_hash_table_lookup(bus->ports, id);
    if (port != NULL) {
        atomic_fetch_add(&port->references, 1);
    }
    pthread_mutex_unlock(&bus->lock);
    return port;
}

static LinkRaw *inproc_connect(LinkRawPort *raw_port, GBytes *address, uint64_t tag,
                               void *link_user, GError **error)
{
    Port *port = (Port *)raw_port;
    Port *peer = bus_find(port->bus, address);
    if (peer == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PEER_UNREACHABLE,
                    "no port with that address is open: the peer has closed it");
        return NULL;
    }
    Raw *raw = g_new0(Raw, 1);
    if (!tag_table_add(&port->tags, tag, (LinkRaw *)raw)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "link tag %016" G_GINT64_MODIFIER "x is connected already: use a new one", tag);
        port_unref(peer);
        g_free(raw);
        return NULL;
    }
    SharedPool *pool = g_new0(SharedPool, 1);
    atomic_init(&pool->references, 1);
    pthread_mutex_init(&pool->lock, NULL);
    pool->pool.out_limit = IN_FLIGHT_LIMIT;
    pool->pool.bytes_out_limit = IN_FLIGHT_BYTES;
    *raw = (Raw){.port = port,
                 .peer = peer,
                 .tag = tag,
                 .link_user = link_user,
                 .pool = pool,
                 .offers = g_ptr_array_new_with_free_func((GDestroyNotify)buffer_return)};
    g_ptr_array_add(port->raws, raw);
    return (LinkRaw *)raw;
}

static void *inproc_link_user(LinkRaw *raw)
{
    return ((Raw *)raw)->link_user;
}

static void *inproc_buffer(LinkRaw *link, size_t size)
{
    Raw *raw = (Raw *)link;
    pthread_mutex_lock(&raw->pool->lock);
    LinkBuffer *buffer = buffer_pool_get(&raw->pool->pool, size);
    pthread_mutex_unlock(&raw->pool->lock);
    if (buffer == NULL) {
        return NULL;
    }
    atomic_fetch_add(&raw->pool->references, 1);
    buffer->owner = raw->pool;
    buffer->head = 0;
    return buffer_data(buffer);
}

static LinkStatus inproc_send(LinkRaw *link, void *data, size_t size)
{
    Raw *raw = (Raw *)link;
    Port *peer = raw->peer;
    LinkBuffer *buffer = buffer_of(data);
    buffer->size = size;
    buffer->tag = raw->tag;
    buffer->next = NULL;
    pthread_mutex_lock(&peer->lock);
    bool closed = peer->closed || raw->dead;
    bool wake = peer->armed && !closed;
    if (!closed) {
        *peer->inbox_tail = buffer;
        peer->inbox_tail = &buffer->next;
        peer->armed = false;
    }
    pthread_mutex_unlock(&peer->lock);
    if (closed) {
        buffer_return(buffer);
    } else if (wake) {
        port_wake(peer);
    }
    return closed ? LINK_PEER_DEAD : LINK_OK;
}

/* A region's buffer has the head first. */
static void *region_of(LinkBuffer *buffer)
{
    return (uint8_t *)buffer_data(buffer) + REGION_AT;
}

static bool inproc_has_memory(LinkRawPort *port, LinkMemory memory)
{
    (void)port;
    return memory == LINK_MEMORY_HOST;
}

static LinkStatus inproc_send_region(LinkRaw *link, const void *head, size_t head_size,
                                     const LinkRegion *region, void *transfer)
{
    Port *port = ((Raw *)link)->port;
    g_assert(head_size <= REGION_AT);
    void *data = inproc_buffer(link, REGION_AT + region->size);
    if (data == NULL) {
        return LINK_AGAIN;
    }
    buffer_of(data)->head = head_size;
    memcpy(data, head, head_size);
    memcpy(region_of(buffer_of(data)), region->data, region->size);
    const LinkStatus status = inproc_send(link, data, REGION_AT + region->size);
    if (status == LINK_OK) {
        port->events->transferred(transfer, LINK_OK, port->user);
    }
    return status;
}

/* Takes the buffer if it is wanted. */
static bool port_offer(Port *port, LinkBuffer *buffer)
{
    Raw *raw = (Raw *)tag_table_find(&port->tags, buffer->tag);
    const bool kept =
        port->events->offered((LinkRaw *)raw, buffer_data(buffer), buffer->head,
                              buffer->size - REGION_AT, (LinkOffer *)buffer, port->user);
    if (kept) {
        g_ptr_array_add(raw->offers, buffer);
    }
    return kept;
}

static void inproc_drop(LinkRaw *link, LinkOffer *offer)
{
    g_ptr_array_remove_fast(((Raw *)link)->offers, offer);
}

static LinkStatus inproc_take(LinkRaw *link, LinkOffer *offer, const LinkRegion *region,
                              void *transfer)
{
    Port *port = ((Raw *)link)->port;
    memcpy(region->data, region_of((LinkBuffer *)offer), region->size);
    inproc_drop(link, offer);
    port->events->transferred(transfer, LINK_OK, port->user);
    return LINK_OK;
}

static void port_deliver(Port *port, LinkBuffer *buffer)
{
    LinkRaw *raw = tag_table_find(&port->tags, buffer->tag);
    if (raw != NULL) {
        port->events->receive(raw, buffer_data(buffer), buffer->size, port->user);
    } else if (!tag_table_keep(&port->tags, buffer->tag, buffer_data(buffer), buffer->size)) {
        port->events->receive(NULL, buffer_data(buffer), buffer->size, port->user);
    }
}

static void raw_died(Raw *raw, const char *why)
{
    if (!raw->dead) {
        raw->dead = true;
        raw->port->events->dead((LinkRaw *)raw, why, raw->port->user);
    }
}

static void port_handle_notice(Port *port, const Notice *notice)
{
    if (notice->kind == NOTICE_LINK_CLOSED) {
        Raw *raw = (Raw *)tag_table_find(&port->tags, notice->tag_or_port);
        if (raw != NULL) {
            raw_died(raw, "the peer closed the link");
        }
        return;
    }
    for (guint i = 0; i < port->raws->len; i++) {
        Raw *raw = g_ptr_array_index(port->raws, i);
        if (raw->peer->id == notice->tag_or_port) {
            raw_died(raw, "the peer closed its port");
        }
    }
}

static unsigned inproc_progress(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    unsigned n = tag_table_deliver(&port->tags, port->events, port->user);
    pthread_mutex_lock(&port->lock);
    LinkBuffer *buffers = port->inbox;
    Notice *notices = port->notices;
    port->inbox = NULL;
    port->inbox_tail = &port->inbox;
    port->notices = NULL;
    port->notices_tail = &port->notices;
    port->armed = false;
    pthread_mutex_unlock(&port->lock);
    while (buffers != NULL) {
        LinkBuffer *buffer = buffers;
        buffers = buffer->next;
        if (buffer->head == 0) {
            port_deliver(port, buffer);
            buffer_return(buffer);
        } else if (!port_offer(port, buffer)) {
            buffer_return(buffer);
        }
        n++;
    }
    while (notices != NULL) {
        Notice *notice = notices;
        notices = notice->next;
        port_handle_notice(port, notice);
        g_free(notice);
        n++;
    }
    return n;
}

static bool inproc_arm(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    uint64_t count;
    while (read(port->event_fd, &count, sizeof count) < 0 && errno == EINTR) {
    }
    pthread_mutex_lock(&port->lock);
    bool empty = port->inbox == NULL && port->notices == NULL && !tag_table_has_ready(&port->tags);
    port->armed = empty;
    pthread_mutex_unlock(&port->lock);
    return empty;
}

static int inproc_fd(LinkRawPort *raw_port)
{
    return ((Port *)raw_port)->event_fd;
}

static void inproc_interrupt(LinkRawPort *raw_port)
{
    port_wake((Port *)raw_port);
}

static const LinkOps inproc_ops = {
    .name = "inproc",
    .port_open = inproc_port_open,
    .port_close = inproc_port_close,
    .address = inproc_address,
    .connect = inproc_connect,
    .link_user = inproc_link_user,
    .buffer = inproc_buffer,
    .send = inproc_send,
    .progress = inproc_progress,
    .arm = inproc_arm,
    .fd = inproc_fd,
    .interrupt = inproc_interrupt,
    .close = inproc_close,
    .has_memory = inproc_has_memory,
    .send_region = inproc_send_region,
    .take = inproc_take,
    .drop = inproc_drop,
};

LinkFill *link_fill_inproc_new(void)
{
    Bus *bus = g_new0(Bus, 1);
    bus->owned.fill = (LinkFill){.ops = &inproc_ops, .self = bus};
    bus->owned.release = bus_release;
    atomic_init(&bus->references, 1);
    pthread_mutex_init(&bus->lock, NULL);
    bus->ports = g_hash_table_new(g_int64_hash, g_int64_equal);
    return &bus->owned.fill;
}
