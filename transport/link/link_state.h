/* A port and its links, as the files of the shared layer see them: link.c (datagrams, set-up,
 * waiting) and link_region.c. Not for others. */
#pragma once

#include "proto/base/crc32c.h"
#include "transport/crypto/aead.h"
#include "transport/link/link.h"
#include "transport/link/replay_window.h"

#include <endian.h>
#include <stdatomic.h>

struct LinkPort {
    const LinkOps *ops;
    LinkRawPort *raw;
    LinkReceive receive;
    LinkDead dead;
    void *user;
    bool crowded;
    bool progressing;
    GPtrArray *links;   /* of Link, owned */
    GPtrArray *closing; /* of Link, owned: closed inside a callback, ended when progress leaves */
    void *scratch;      /* payloads that did not arrive aligned */
    size_t scratch_bytes;
    LinkCounters counters;
    unsigned n_offers; /* of all links */
    atomic_bool interrupted;
};

/* A region that passed the gates and has no place yet. */
typedef struct KeptOffer {
    LinkHeader header;
    uint32_t crc; /* of the payload */
    LinkOffer *offer;
} KeptOffer;

struct Link {
    LinkPort *port;
    LinkRaw *raw;
    uint64_t handle;
    uint32_t peer;
    bool dead, closed;
    AeadKey *send_key, *receive_key; /* NULL: not sealed */
    uint64_t next_seq;
    ReplayWindow window;
    LinkTraffic traffic;
    KeptOffer offers[LINK_OFFERS]; /* in order of arrival */
    unsigned n_offers;
    struct {
        LinkTransfer *transfer; /* NULL: none is waited for */
        LinkRegion region;
        uint32_t step;
        uint16_t op;
        bool named; /* one was: step is the last */
    } place;
};

/* ---- header ---- */

typedef struct WireHeader {
    uint64_t handle;
    uint32_t step;
    uint16_t op, flags;
    uint64_t seq;
    uint32_t length, crc;
} WireHeader;
_Static_assert(sizeof(WireHeader) == LINK_HEADER_BYTES, "32 bytes on the wire");

static inline WireHeader header_encode(const LinkHeader *h)
{
    return (WireHeader){.handle = htole64(h->handle),
                        .step = htole32(h->step),
                        .op = htole16(h->op),
                        .flags = htole16(h->flags),
                        .seq = htole64(h->seq),
                        .length = htole32(h->length),
                        .crc = htole32(h->crc)};
}

static inline LinkHeader header_decode(const WireHeader *w)
{
    return (LinkHeader){.handle = le64toh(w->handle),
                        .step = le32toh(w->step),
                        .op = le16toh(w->op),
                        .flags = le16toh(w->flags),
                        .seq = le64toh(w->seq),
                        .length = le32toh(w->length),
                        .crc = le32toh(w->crc)};
}

static inline uint32_t header_checksum(WireHeader wire, const void *payload, size_t size)
{
    wire.crc = 0;
    return crc32c(crc32c(0, &wire, sizeof wire), payload, size);
}

/* ---- link_region.c ---- */

/* The raw events of a port, but for the first two. */
bool link_region_offered(Link *link, const void *head, size_t head_size, size_t size,
                         LinkOffer *offer);
void link_region_transferred(LinkTransfer *transfer, LinkStatus status);
/* Offers whose place was named begin to move. Outside callbacks. */
void link_region_match_all(LinkPort *port);
/* The link died or closes: what waits for an offer ends so; a closing one's offers are the fill's
 * to drop. */
void link_region_end(Link *link, LinkStatus status);
