/* The layer that every fill shares: 32-byte header, sealing or CRC32C, epoch filter, replay window,
 * counters.
 *
 * What arrives goes through these gates in order; each that closes counts the message and drops it:
 *   1. the tag is connected (the fill's table), else stale: an epoch that is over, or a stranger;
 *   2. the sizes fit together, else corrupt;
 *   3. unsealed: the checksum is right, else corrupt;  the handle is this pair's, else stale;
 *      sealed: the handle is this pair's, else stale (no key would fit);  the tag is right, else
 *      corrupt;
 *   4. the number is new, else replayed. Asked last: only authentic numbers move the window.
 *
 * A region passes 1, 2 and 3 with its header, the payload's checksum under the header's, and 4; its
 * payload passes 3 when it has arrived, by whoever can read it (link_region.c).
 *
 * Invariants: a number (the AEAD's nonce) is taken only when a buffer is held and is never given
 * back, so that none repeats under one key; user callbacks run only inside progress, and progress
 * is never entered twice. */
#include "transport/link/link_state.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "transport/link/fill.h"
#include "transport/link/link_clock.h"

#include <poll.h>
#include <sched.h>
#include <string.h>

#define PAYLOAD_ALIGN 16u
#define SCRATCH_LEAST (64u << 10)

/* ---- receiving ---- */

/* Room for `size` payload bytes, aligned; NULL without memory. */
static void *port_scratch(LinkPort *port, size_t size)
{
    if (port->scratch == NULL || port->scratch_bytes < size) {
        size_t capacity = SCRATCH_LEAST;
        while (capacity < size) {
            capacity *= 2;
        }
        weft_free(port->scratch);
        port->scratch = weft_alloc(1, capacity, "an arriving link message", NULL);
        port->scratch_bytes = port->scratch != NULL ? capacity : 0;
    }
    return port->scratch;
}

static void link_died(Link *link, const char *why)
{
    if (!link->dead && !link->closed) {
        link->dead = true;
        link_region_end(link, LINK_PEER_DEAD);
        if (link->port->dead != NULL) {
            link->port->dead(link, why, link->port->user);
        }
    }
}

/* Where the payload is to lie for the user: where it came if that is aligned, else the scratch. */
static void *link_place(Link *link, uint8_t *payload, size_t size)
{
    if ((uintptr_t)payload % PAYLOAD_ALIGN == 0) {
        return payload;
    }
    void *place = port_scratch(link->port, size);
    if (place == NULL) {
        link_died(link, "no memory for an arriving message");
    }
    return place;
}

/* Gate 3 for a sealed message; NULL: dropped and counted. */
static void *link_open_sealed(Link *link, const WireHeader *wire, uint64_t seq, uint8_t *payload,
                              size_t size)
{
    LinkCounters *counters = &link->port->counters;
    if (le64toh(wire->handle) != link->handle) {
        counters->dropped_stale++;
        return NULL;
    }
    void *plain = link_place(link, payload, size);
    if (plain == NULL) {
        return NULL;
    }
    uint64_t start = link_clock_ns();
    bool authentic =
        aead_open(link->receive_key, seq, wire, sizeof *wire, payload, size, plain, payload + size);
    counters->seal_ns += link_clock_ns() - start;
    if (!authentic) {
        counters->dropped_corrupt++;
        return NULL;
    }
    return plain;
}

/* Gate 3 for a message in the clear. */
static void *link_open_plain(Link *link, const WireHeader *wire, uint8_t *payload, size_t size)
{
    LinkCounters *counters = &link->port->counters;
    if (le32toh(wire->crc) != header_checksum(*wire, payload, size)) {
        counters->dropped_corrupt++;
        return NULL;
    }
    if (le64toh(wire->handle) != link->handle) {
        counters->dropped_stale++;
        return NULL;
    }
    void *place = link_place(link, payload, size);
    if (place != NULL && place != payload && size > 0) {
        memcpy(place, payload, size);
    }
    return place;
}

static void link_receive(Link *link, uint8_t *data, size_t size)
{
    LinkPort *port = link->port;
    LinkCounters *counters = &port->counters;
    bool sealed = link->receive_key != NULL;
    size_t around = LINK_HEADER_BYTES + (sealed ? LINK_TAG_BYTES : 0);
    WireHeader wire;
    if (size < around || size - around > LINK_MESSAGE_LIMIT) {
        counters->dropped_corrupt++;
        return;
    }
    memcpy(&wire, data, sizeof wire);
    LinkHeader header = header_decode(&wire);
    if (header.length != size - around) {
        counters->dropped_corrupt++;
        return;
    }
    uint8_t *payload = data + LINK_HEADER_BYTES;
    void *place = sealed ? link_open_sealed(link, &wire, header.seq, payload, header.length)
                         : link_open_plain(link, &wire, payload, header.length);
    if (place == NULL) {
        return;
    }
    if (!replay_window_accept(&link->window, header.seq)) {
        counters->dropped_replayed++;
        return;
    }
    counters->messages_received++;
    counters->bytes_received += header.length;
    link->traffic.messages_received++;
    link->traffic.bytes_received += header.length;
    port->receive(link, &header, place, port->user);
}

static void port_on_receive(LinkRaw *raw, void *data, size_t size, void *user)
{
    LinkPort *port = user;
    Link *link = raw != NULL ? port->ops->link_user(raw) : NULL;
    if (link == NULL || link->closed) {
        port->counters.dropped_stale++;
    } else if (!link->dead) {
        link_receive(link, data, size);
    }
}

static bool port_on_offered(LinkRaw *raw, const void *head, size_t head_size, size_t size,
                            LinkOffer *offer, void *user)
{
    LinkPort *port = user;
    Link *link = raw != NULL ? port->ops->link_user(raw) : NULL;
    if (link == NULL || link->closed || link->dead) {
        port->counters.dropped_stale++;
        return false;
    }
    return link_region_offered(link, head, head_size, size, offer);
}

static void port_on_transferred(void *transfer, LinkStatus status, void *user)
{
    (void)user;
    link_region_transferred(transfer, status);
}

static void port_on_dead(LinkRaw *raw, const char *why, void *user)
{
    LinkPort *port = user;
    link_died(port->ops->link_user(raw), why);
}

/* ---- set-up ---- */

LinkPort *link_port_open(const LinkPortOptions *options, GError **error)
{
    static const LinkRawEvents events = {.receive = port_on_receive,
                                         .dead = port_on_dead,
                                         .offered = port_on_offered,
                                         .transferred = port_on_transferred};
    LinkPort *port = g_new0(LinkPort, 1);
    port->ops = options->fill->ops;
    port->receive = options->receive;
    port->dead = options->dead;
    port->user = options->user;
    port->crowded = options->crowded;
    port->links = g_ptr_array_new();
    port->closing = g_ptr_array_new();
    port->raw = port->ops->port_open(options->fill->self, &events, port, error);
    if (port->raw == NULL) {
        link_port_close(port);
        return NULL;
    }
    return port;
}

/* Ends a link that is in no list any more. */
static void link_free(Link *link)
{
    if (link->raw != NULL) {
        link->port->ops->close(link->raw);
    }
    aead_key_free(link->send_key);
    aead_key_free(link->receive_key);
    g_free(link);
}

static void port_end_closing(LinkPort *port)
{
    while (port->closing->len > 0) {
        link_free(g_ptr_array_steal_index_fast(port->closing, port->closing->len - 1));
    }
}

void link_close(Link *link)
{
    if (link == NULL || link->closed) {
        return;
    }
    LinkPort *port = link->port;
    link->closed = true;
    link_region_end(link, LINK_CLOSED);
    g_ptr_array_remove_fast(port->links, link);
    g_ptr_array_add(port->closing, link);
    if (!port->progressing) {
        port_end_closing(port);
    }
}

void link_port_close(LinkPort *port)
{
    if (port == NULL) {
        return;
    }
    g_assert(!port->progressing);
    while (port->links->len > 0) {
        link_close(g_ptr_array_index(port->links, port->links->len - 1));
    }
    if (port->raw != NULL) {
        port->ops->port_close(port->raw);
    }
    g_ptr_array_unref(port->links);
    g_ptr_array_unref(port->closing);
    weft_free(port->scratch);
    g_free(port);
}

GBytes *link_port_address(LinkPort *port)
{
    return port->ops->address(port->raw);
}

Link *link_connect(LinkPort *port, const LinkConnect *options, GError **error)
{
    Link *link = g_new0(Link, 1);
    link->port = port;
    link->handle = options->handle;
    link->peer = options->peer;
    link->next_seq = 1;
    bool ready = true;
    if (options->seal) {
        link->send_key = aead_key_new(options->send_key, AEAD_AUTO, error);
        link->receive_key =
            link->send_key != NULL ? aead_key_new(options->receive_key, AEAD_AUTO, error) : NULL;
        ready = link->receive_key != NULL;
    }
    if (ready) {
        link->raw = port->ops->connect(port->raw, options->address, options->handle, link, error);
        ready = link->raw != NULL;
    }
    if (!ready) {
        link_free(link);
        return NULL;
    }
    g_ptr_array_add(port->links, link);
    return link;
}

uint32_t link_peer(const Link *link)
{
    return link->peer;
}

bool link_is_dead(const Link *link)
{
    return link->dead;
}

void link_fill_free(LinkFill *fill)
{
    if (fill != NULL) {
        OwnedFill *owned = (OwnedFill *)fill;
        owned->release(owned);
    }
}

/* ---- sending ---- */

static bool parts_size(const LinkPart *parts, unsigned n_parts, size_t *size_out)
{
    size_t size = 0;
    for (unsigned i = 0; i < n_parts; i++) {
        if (!sz_add(size, parts[i].size, &size)) {
            return false;
        }
    }
    *size_out = size;
    return size <= LINK_MESSAGE_LIMIT;
}

_Static_assert(sizeof(LinkPart) == sizeof(AeadPart) &&
                   offsetof(LinkPart, size) == offsetof(AeadPart, size),
               "a list of parts is handed to the AEAD as it stands");

/* Fills the datagram and hands it to the fill. */
static LinkStatus link_post(Link *link, void *buffer, LinkHeader header, const LinkPart *parts,
                            unsigned n_parts)
{
    LinkCounters *counters = &link->port->counters;
    uint8_t *payload = (uint8_t *)buffer + LINK_HEADER_BYTES;
    header.handle = link->handle;
    header.seq = link->next_seq++;
    size_t size = LINK_HEADER_BYTES + header.length;
    uint64_t start = link_clock_ns();
    WireHeader wire = header_encode(&header);
    if (link->send_key != NULL) {
        aead_seal(link->send_key, header.seq, &wire, sizeof wire, (const AeadPart *)parts, n_parts,
                  payload, payload + header.length);
        size += LINK_TAG_BYTES;
    } else {
        size_t done = 0;
        for (unsigned i = 0; i < n_parts; i++) {
            if (parts[i].size > 0) {
                memcpy(payload + done, parts[i].data, parts[i].size);
                done += parts[i].size;
            }
        }
        wire.crc = htole32(header_checksum(wire, payload, done));
    }
    memcpy(buffer, &wire, sizeof wire);
    uint64_t sealed = link_clock_ns();
    LinkStatus status = link->port->ops->send(link->raw, buffer, size);
    counters->seal_ns += sealed - start;
    counters->send_ns += link_clock_ns() - sealed;
    if (status == LINK_OK) {
        counters->messages_sent++;
        counters->bytes_sent += header.length;
        link->traffic.messages_sent++;
        link->traffic.bytes_sent += header.length;
    }
    return status;
}

LinkStatus link_send_try(Link *link, uint16_t op, uint16_t flags, uint32_t step,
                         const LinkPart *parts, unsigned n_parts)
{
    size_t length;
    if (link->dead || link->closed) {
        return link->closed ? LINK_CLOSED : LINK_PEER_DEAD;
    }
    if (!parts_size(parts, n_parts, &length)) {
        return LINK_TOO_LONG;
    }
    size_t size = LINK_HEADER_BYTES + length + (link->send_key != NULL ? LINK_TAG_BYTES : 0);
    void *buffer = link->port->ops->buffer(link->raw, size);
    if (buffer == NULL) {
        return LINK_AGAIN;
    }
    LinkHeader header = {.step = step, .op = op, .flags = flags, .length = (uint32_t)length};
    return link_post(link, buffer, header, parts, n_parts);
}

/* LINK_AGAIN: makes progress once; false when that is not allowed here, or was interrupted. */
static bool wait_for_room(Link *link)
{
    LinkPort *port = link->port;
    if (port->progressing || atomic_load_explicit(&port->interrupted, memory_order_acquire)) {
        return false;
    }
    uint64_t start = link_clock_ns();
    if (link_port_progress(port) == 0) {
        sched_yield();
        port->counters.send_ns += link_clock_ns() - start;
    }
    return true;
}

LinkStatus link_send(Link *link, uint16_t op, uint16_t flags, uint32_t step, const LinkPart *parts,
                     unsigned n_parts)
{
    LinkStatus status = link_send_try(link, op, flags, step, parts, n_parts);
    while (status == LINK_AGAIN && wait_for_room(link)) {
        status = link_send_try(link, op, flags, step, parts, n_parts);
    }
    return status;
}

/* ---- progress and waiting ---- */

unsigned link_port_progress(LinkPort *port)
{
    g_assert(!port->progressing);
    uint64_t start = link_clock_ns(), busy = link_counters_busy_ns(&port->counters);
    port->progressing = true;
    unsigned n = port->ops->progress(port->raw);
    port->progressing = false;
    if (n > 0) { /* what callbacks opened and sent is counted already */
        port->counters.receive_ns +=
            link_clock_ns() - start - (link_counters_busy_ns(&port->counters) - busy);
    }
    port_end_closing(port);
    if (port->n_offers > 0) {
        link_region_match_all(port);
    }
    return n;
}

void link_port_set_crowded(LinkPort *port, bool crowded)
{
    port->crowded = crowded;
}

static void wait_pause(const LinkPort *port)
{
    if (port->crowded) {
        sched_yield();
    } else {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
    }
}

/* Until something came (or an interrupt): true; or until `until`: false. */
static bool wait_spinning(LinkPort *port, int64_t until)
{
    do {
        if (link_port_progress(port) > 0 ||
            atomic_load_explicit(&port->interrupted, memory_order_acquire)) {
            return true;
        }
        wait_pause(port);
    } while (link_clock_us() < until);
    return false;
}

/* An interrupt sets the flag before it makes the fd readable, and arming empties the fd before the
 * flag is looked at: so either the flag is seen here, or the fd is readable when poll begins. */
static void wait_asleep(LinkPort *port, int64_t until)
{
    for (;;) {
        bool armed = port->ops->arm(port->raw);
        int64_t left = until - link_clock_us();
        if (atomic_load_explicit(&port->interrupted, memory_order_acquire) || left <= 0) {
            return;
        }
        if (armed) {
            struct pollfd fd = {.fd = port->ops->fd(port->raw), .events = POLLIN};
            struct timespec limit = {.tv_sec = left / 1000000, .tv_nsec = left % 1000000 * 1000};
            ppoll(&fd, 1, &limit, NULL);
        }
        if (link_port_progress(port) > 0) {
            return;
        }
    }
}

void link_port_wait(LinkPort *port, int64_t timeout_us, int64_t spin_us)
{
    int64_t start = link_clock_us();
    if (!wait_spinning(port, start + MIN(spin_us, timeout_us)) && spin_us < timeout_us) {
        wait_asleep(port, start + timeout_us);
    }
    atomic_store_explicit(&port->interrupted, false, memory_order_release);
}

void link_port_interrupt(LinkPort *port)
{
    atomic_store_explicit(&port->interrupted, true, memory_order_release);
    port->ops->interrupt(port->raw);
}

const LinkTraffic *link_traffic(const Link *link)
{
    return &link->traffic;
}

const LinkCounters *link_port_counters(const LinkPort *port)
{
    return &port->counters;
}

const char *link_seal_name(void)
{
    return aead_name();
}
