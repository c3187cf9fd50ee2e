/* A link to another rank of the same epoch, with keys of its own (DESIGN 7.4). Both ends call it
 * with each other's numbers. */
#pragma once

#include "transport/crypto/keys.h"
#include "transport/link/link.h"

typedef struct PeerLink {  /* everything is borrowed for the call */
    const uint8_t *secret; /* [EPOCH_SECRET_BYTES] of the epoch */
    KeyScope scope;
    const uint8_t *own_boot, *peer_boot; /* [BOOT_ID_BYTES] */
    uint32_t own, peer;                  /* ranks, by any numbering that both know */
    GBytes *address;                     /* the peer's */
    bool seal;
} PeerLink;

/* On the port's thread. Returned; closes with the port. */
Link *peer_link_connect(LinkPort *port, const PeerLink *link, GError **error);
