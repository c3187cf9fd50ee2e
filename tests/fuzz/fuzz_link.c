/* Any bytes as datagrams at a link, sealed or not: each is handed on once, or dropped and counted.
 * First byte: 1 = sealed. Then records whose kind says what is put right in them first, as nobody
 * guesses a checksum: the handle, the length, the sequence number, and then CRC or seal. */
#include "proto/base/crc32c.h"
#include "tests/fuzz/calls.h"
#include "transport/crypto/aead.h"
#include "transport/link/link.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HANDLE 0x1122334455667788u

enum { FIX_HANDLE = 1, FIX_LENGTH = 2, FIX_SEQUENCE = 4, FIX_CHECK = 8 };

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

typedef struct World {
    LinkFill *fill;
    LinkPort *port;
    Link *link;
    LinkRawPort *raw_port;
    LinkRaw *raw;
    AeadKey *key; /* of what the peer sends; NULL = not sealed */
    uint64_t sequence;
    unsigned n_received, n_sent;
} World;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    World *w = user;
    volatile uint8_t sum = 0;
    g_assert(link == w->link && header->handle == HANDLE && (uintptr_t)payload % 16 == 0);
    for (uint32_t i = 0; i < header->length; i++) {
        sum = (uint8_t)(sum + ((const uint8_t *)payload)[i]);
    }
    w->n_received++;
}

static void on_dead(Link *link, const char *why, void *user) {}
static void raw_receive(LinkRaw *raw, void *data, size_t size, void *user) {}
static void raw_dead(LinkRaw *raw, const char *why, void *user) {}

static void world_open(World *w, bool seal)
{
    static const LinkRawEvents events = {raw_receive, raw_dead};
    LinkConnect connect = {.handle = HANDLE, .peer = 1, .seal = seal};
    memset(connect.receive_key, 0x11, sizeof connect.receive_key);
    w->fill = link_fill_inproc_new();
    LinkPortOptions options = {.fill = w->fill, .receive = on_receive, .dead = on_dead, .user = w};
    w->port = link_port_open(&options, NULL);
    w->raw_port = w->fill->ops->port_open(w->fill->self, &events, w, NULL);
    connect.address = w->fill->ops->address(w->raw_port);
    w->link = link_connect(w->port, &connect, NULL);
    g_bytes_unref(connect.address);
    g_autoptr(GBytes) address = link_port_address(w->port);
    w->raw = w->fill->ops->connect(w->raw_port, address, HANDLE, NULL, NULL);
    g_assert(w->link != NULL && w->raw != NULL);
    w->key = seal ? aead_key_new(connect.receive_key, AEAD_AUTO, NULL) : NULL;
}

static void world_close(World *w)
{
    w->fill->ops->port_close(w->raw_port);
    link_port_close(w->port);
    link_fill_free(w->fill);
    aead_key_free(w->key);
}

/* The header at `at` as the sender would have filled it in for what follows. */
static void put_right(World *w, unsigned what, uint8_t *at, size_t size)
{
    const size_t around = LINK_HEADER_BYTES + (w->key != NULL ? LINK_TAG_BYTES : 0);
    const uint64_t handle = HANDLE;
    if (size < around) {
        return;
    }
    const uint32_t length = (uint32_t)(size - around);
    if (what & FIX_HANDLE) {
        memcpy(at, &handle, 8);
    }
    if (what & FIX_SEQUENCE) {
        w->sequence++;
        memcpy(at + 16, &w->sequence, 8);
    }
    if (what & FIX_LENGTH) {
        memcpy(at + 24, &length, 4);
    }
    if (!(what & FIX_CHECK)) {
        return;
    }
    if (w->key != NULL) {
        g_autofree uint8_t *plain = g_memdup2(at + LINK_HEADER_BYTES, length + 1u);
        const AeadPart part = {plain, length};
        uint64_t sequence;
        memcpy(&sequence, at + 16, 8);
        aead_seal(w->key, sequence, at, LINK_HEADER_BYTES, &part, 1, at + LINK_HEADER_BYTES,
                  at + LINK_HEADER_BYTES + length);
    } else {
        memset(at + 28, 0, 4);
        const uint32_t crc = crc32c(0, at, size);
        memcpy(at + 28, &crc, 4);
    }
}

static void send(World *w, const Record *record)
{
    uint8_t *buffer = w->fill->ops->buffer(w->raw, record->size + 1);
    g_assert(buffer != NULL);
    memcpy(buffer, record->bytes, record->size);
    put_right(w, record->kind, buffer, record->size);
    w->fill->ops->send(w->raw, buffer, record->size);
    w->n_sent++;
    while (link_port_progress(w->port) > 0) {
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    World w = {0};
    Record record;
    if (size == 0) {
        return 0;
    }
    world_open(&w, data[0] & 1);
    for (Records r = {data, size, 1}; records_next(&r, &record);) {
        send(&w, &record);
    }
    const LinkCounters *c = link_port_counters(w.port);
    g_assert(c->messages_received == w.n_received);
    g_assert(c->messages_received + c->dropped_stale + c->dropped_replayed + c->dropped_corrupt ==
             w.n_sent);
    world_close(&w);
    return 0;
}
