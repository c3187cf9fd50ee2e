/* Regions: payloads that the fill sends from and receives into memory which the host does not read.
 *
 * On the wire a region is a head and a payload. The head is a message's header, whose checksum is
 * of itself and of the eight bytes behind it: the payload's checksum, computed by whoever can read
 * the payload, and zero. The head arrives first and goes through the gates of link.c; then it waits
 * for its place; then the payload moves.
 *
 *     offered -> kept -> [its place is named: link_receive_region()] -> taken -> transferred
 *             -> [link_check_region()] received, or corrupt
 *
 * Invariants: a LinkTransfer is done only when the fill has said that it refers to the region no
 * more, or has never been told of it; nothing is taken inside a callback of the fill. */
#include "transport/link/link_state.h"

#include <string.h>

typedef struct RegionHead {
    WireHeader header;
    struct {
        uint32_t payload_crc, zero;
    } tail;
} RegionHead;
_Static_assert(sizeof(RegionHead) == LINK_HEADER_BYTES + 8, "on the wire");

bool link_port_has_memory(const LinkPort *port, LinkMemory memory)
{
    return port->ops->has_memory != NULL && port->ops->has_memory(port->raw, memory);
}

/* ---- sending ---- */

static RegionHead head_encode(LinkHeader header, uint32_t crc)
{
    RegionHead head = {.header = header_encode(&header), .tail = {htole32(crc), 0}};
    head.header.crc = htole32(header_checksum(head.header, &head.tail, sizeof head.tail));
    return head;
}

LinkStatus link_send_region(Link *link, uint16_t op, uint32_t step, const LinkRegion *region,
                            uint32_t crc, LinkTransfer *transfer)
{
    LinkPort *port = link->port;
    g_assert(link->send_key == NULL && link_port_has_memory(port, region->memory));
    if (link->dead || link->closed) {
        return link->closed ? LINK_CLOSED : LINK_PEER_DEAD;
    }
    if (region->size > LINK_MESSAGE_LIMIT) {
        return LINK_TOO_LONG;
    }
    const RegionHead head = head_encode((LinkHeader){.handle = link->handle,
                                                     .step = step,
                                                     .op = op,
                                                     .seq = link->next_seq++,
                                                     .length = (uint32_t)region->size},
                                        crc);
    *transfer = (LinkTransfer){.size = region->size, .crc = crc};
    const LinkStatus status =
        port->ops->send_region(link->raw, &head, sizeof head, region, transfer);
    if (status == LINK_OK) {
        port->counters.messages_sent++;
        port->counters.bytes_sent += region->size;
        link->traffic.messages_sent++;
        link->traffic.bytes_sent += region->size;
    }
    return status;
}

/* ---- receiving ---- */

static bool is_before(uint32_t step, uint32_t other)
{
    return (int32_t)(step - other) < 0;
}

bool link_region_offered(Link *link, const void *data, size_t head_size, size_t size,
                         LinkOffer *offer)
{
    LinkCounters *counters = &link->port->counters;
    RegionHead head;
    if (link->receive_key != NULL || head_size != sizeof head || size > LINK_MESSAGE_LIMIT) {
        counters->dropped_corrupt++;
        return false;
    }
    memcpy(&head, data, sizeof head);
    const LinkHeader header = header_decode(&head.header);
    if (header.length != size ||
        header.crc != header_checksum(head.header, &head.tail, sizeof head.tail)) {
        counters->dropped_corrupt++;
        return false;
    }
    if (header.handle != link->handle) {
        counters->dropped_stale++;
        return false;
    }
    if (!replay_window_accept(&link->window, header.seq)) {
        counters->dropped_replayed++;
        return false;
    }
    if (link->n_offers == LINK_OFFERS ||
        (link->place.named && is_before(header.step, link->place.step))) {
        counters->dropped_stale++;
        return false;
    }
    link->offers[link->n_offers++] = (KeptOffer){header, le32toh(head.tail.payload_crc), offer};
    link->port->n_offers++;
    return true;
}

static LinkOffer *offer_remove(Link *link, unsigned i)
{
    LinkOffer *offer = link->offers[i].offer;
    link->n_offers--;
    link->port->n_offers--;
    memmove(&link->offers[i], &link->offers[i + 1], sizeof *link->offers * (link->n_offers - i));
    return offer;
}

static void take(Link *link, unsigned i)
{
    const KeptOffer kept = link->offers[i];
    LinkTransfer *transfer = link->place.transfer;
    LinkRegion region = link->place.region;
    region.size = transfer->size = kept.header.length;
    transfer->crc = kept.crc;
    link->place.transfer = NULL;
    offer_remove(link, i);
    const LinkStatus status = link->port->ops->take(link->raw, kept.offer, &region, transfer);
    if (status != LINK_OK) {
        link_region_transferred(transfer, status);
    }
}

/* The offer whose place was named; drops those that no place will be named for. */
static void match(Link *link)
{
    LinkCounters *counters = &link->port->counters;
    unsigned i = 0;
    while (i < link->n_offers && link->place.transfer != NULL) {
        const LinkHeader *header = &link->offers[i].header;
        const bool late = is_before(header->step, link->place.step),
                   here = header->step == link->place.step && header->op == link->place.op;
        if (here && header->length <= link->place.region.size) {
            take(link, i);
        } else if (late || here) {
            *(late ? &counters->dropped_stale : &counters->dropped_corrupt) += 1;
            link->port->ops->drop(link->raw, offer_remove(link, i));
        } else {
            i++;
        }
    }
}

void link_region_match_all(LinkPort *port)
{
    for (guint i = 0; i < port->links->len; i++) {
        Link *link = g_ptr_array_index(port->links, i);
        if (!link->dead) {
            match(link);
        }
    }
}

LinkStatus link_receive_region(Link *link, uint16_t op, uint32_t step, const LinkRegion *place,
                               LinkTransfer *transfer)
{
    g_assert(link->place.transfer == NULL);
    if (link->dead || link->closed) {
        return link->closed ? LINK_CLOSED : LINK_PEER_DEAD;
    }
    *transfer = (LinkTransfer){0};
    link->place.transfer = transfer;
    link->place.region = *place;
    link->place.op = op;
    link->place.step = step;
    link->place.named = true;
    if (!link->port->progressing) { /* else when progress leaves */
        match(link);
    }
    return LINK_OK;
}

bool link_check_region(Link *link, const LinkTransfer *transfer, uint32_t crc)
{
    LinkCounters *counters = &link->port->counters;
    if (crc != transfer->crc) {
        counters->dropped_corrupt++;
        return false;
    }
    counters->messages_received++;
    counters->bytes_received += transfer->size;
    link->traffic.messages_received++;
    link->traffic.bytes_received += transfer->size;
    return true;
}

/* ---- ends ---- */

void link_region_transferred(LinkTransfer *transfer, LinkStatus status)
{
    transfer->status = status;
    transfer->done = true;
}

void link_region_end(Link *link, LinkStatus status)
{
    if (link->place.transfer != NULL) {
        link_region_transferred(link->place.transfer, status);
        link->place.transfer = NULL;
    }
    if (link->closed) {
        link->port->n_offers -= link->n_offers;
        link->n_offers = 0;
    }
}
