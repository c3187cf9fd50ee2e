/* Link: the data plane between ranks. A LinkPort is one rank's end of everything (for UCX: one
 * worker with its address); a Link is a connected, directed pair (this port -> one peer port). One
 * thread, the engine's, owns a port and calls everything here but link_port_interrupt().
 *
 * Two layers. This header is what the engine sees: 32-byte header, sealing, CRC, replay window,
 * epoch filter, counters (link.c). Below, LinkOps moves opaque datagrams reliably and in order per
 * link (ucx, inproc) or spoils them by script (fault, which wraps another fill). */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum LinkStatus {
    LINK_OK = 0,
    LINK_AGAIN = 1,      /* no buffer free: progress and call again */
    LINK_PEER_DEAD = -1, /* the fill saw the connection die */
    LINK_CLOSED = -2,
    LINK_TOO_LONG = -3,
} LinkStatus;

/* Operations of a header's `op`. */
typedef enum LinkOp {
    LINK_OP_HELLO = 1,   /* after set-up, both directions */
    LINK_OP_STEP = 2,    /* step rows, with activations between stages */
    LINK_OP_PARTIAL = 3, /* collectives: transport/group */
    LINK_OP_SAMPLE = 4,  /* vocabulary shard's candidates to the sampling rank */
    LINK_OP_TOKEN = 5,   /* sampled tokens back to the leader */
    LINK_OP_PROBE = 6,   /* latency and bandwidth measurement */
    LINK_OP_ABORT = 7,   /* sender leaves the epoch; payload: text why; flags: its code, or 0 */
    LINK_OP_TRACE = 8,   /* hashes of a step's traced rows, ahead of its step or tokens */
    /* collectives of training beside LINK_OP_PARTIAL: worker/train/train_links.h */
    LINK_OP_TRAIN_WORLD = 9,
    LINK_OP_TRAIN_FORWARD = 10,
    LINK_OP_TRAIN_BACKWARD = 11,
    LINK_OP_TRAIN_TIED = 12,
    LINK_OP_ACTIVATIONS = 13, /* a region: a step's activations, which its message lacks */
} LinkOp;

/* On the wire, 32 B little-endian (DESIGN 7.3): u64 handle, u32 step, u16 op, u16 flags, u64 seq,
 * u32 length, u32 crc (CRC32C of header with crc 0 + payload; 0 when sealed). The header is the
 * AEAD's associated data. seq starts at 1 per link direction and key and is the nonce. Sealed
 * payloads are followed by a 16 B tag (not counted in length). */
typedef struct LinkHeader {
    uint64_t handle; /* bound at set-up to cluster, generation, job, replica, epoch, link: both ends
                        derive it */
    uint32_t step;
    uint16_t op;
    uint16_t flags;
    uint64_t seq;    /* filled by link_send */
    uint32_t length; /* payload bytes, filled by link_send */
    uint32_t crc;    /* filled by link_send */
} LinkHeader;
#define LINK_HEADER_BYTES 32u
#define LINK_TAG_BYTES 16u
#define LINK_MESSAGE_LIMIT (64u << 20)

typedef struct LinkCounters {
    uint64_t messages_sent, bytes_sent; /* payload bytes */
    uint64_t messages_received, bytes_received;
    uint64_t dropped_stale, dropped_replayed, dropped_corrupt;
    uint64_t seal_ns;    /* sealing and opening; without a seal, copying and checksums */
    uint64_t send_ns;    /* in the fill's send, and waiting for a buffer of it */
    uint64_t receive_ns; /* in progress that brought something, opening apart */
} LinkCounters;
/* What one link has carried since it was opened, payload only. */
typedef struct LinkTraffic {
    uint64_t messages_sent, bytes_sent, messages_received, bytes_received;
} LinkTraffic;
/* What the port has been busy with so far; the three do not overlap. */
static inline uint64_t link_counters_busy_ns(const LinkCounters *c)
{
    return c->seal_ns + c->send_ns + c->receive_ns;
}

typedef struct LinkPort LinkPort;
typedef struct Link Link;

/* Whose memory a region lies in. A fill sends from there and receives into it by itself: what is
 * in it is neither copied nor read by the host. */
typedef enum LinkMemory { LINK_MEMORY_HOST, LINK_MEMORY_CUDA } LinkMemory;
typedef struct LinkRegion {
    LinkMemory memory;
    void *data;
    size_t size;
} LinkRegion;
/* A region under way, to or from a peer. The caller's, as the region's memory: neither is freed,
 * nor the memory used, before it is done. */
typedef struct LinkTransfer {
    bool done;         /* set once, at the latest by link_port_close(): nothing refers to it now */
    LinkStatus status; /* then: LINK_OK, or why it did not come to an end */
    size_t size;       /* of what came */
    uint32_t crc;      /* CRC32C of what was sent */
} LinkTransfer;

/* A message arrived on `link` and passed every check. payload is borrowed for the duration of the
 * callback and 16-byte aligned. Called inside link_port_progress() only. */
typedef void (*LinkReceive)(Link *link, const LinkHeader *header, const void *payload, void *user);
/* The fill saw the peer die; once per link; inside link_port_progress(). */
typedef void (*LinkDead)(Link *link, const char *why, void *user);

/* ---- what a fill provides ---- */
typedef struct LinkRawPort LinkRawPort;
typedef struct LinkRaw LinkRaw;
typedef struct LinkOffer LinkOffer; /* a region that waits for a place; the fill's */
typedef struct LinkRawEvents {
    /* One whole datagram; data borrowed during the callback and writable. raw is this side's end of
     * the pair that the datagram's tag names. NULL: that pair was closed here, or never connected
     * while more came than the fill keeps; only to be counted. */
    void (*receive)(LinkRaw *raw, void *data, size_t size, void *user);
    void (*dead)(LinkRaw *raw, const char *why, void *user);
    /* A region of `size` bytes is to come; head borrowed, raw as in receive. True: kept, until take
     * or drop, or the connection's end. False: refused; for its sender it was taken. */
    bool (*offered)(LinkRaw *raw, const void *head, size_t head_size, size_t size, LinkOffer *offer,
                    void *user);
    /* What send_region or take began has ended: the fill refers neither to the region nor to
     * `transfer` any more. Once each, inside that call, progress or port_close. */
    void (*transferred)(void *transfer, LinkStatus status, void *user);
} LinkRawEvents;
typedef struct LinkOps {
    const char *name; /* "ucx", "inproc", "fault" */
    LinkRawPort *(*port_open)(void *fill, const LinkRawEvents *events, void *user, GError **error);
    void (*port_close)(LinkRawPort *port); /* force; bounded 1 s */
    GBytes *(*address)(LinkRawPort *port); /* returned */
    /* Both sides connect with each other's address; `tag` is the same 64-bit value on both sides
     * and unique per pair and epoch. What arrives under a tag before this side has connected is
     * kept, up to 64 datagrams. */
    LinkRaw *(*connect)(LinkRawPort *port, GBytes *address, uint64_t tag, void *link_user,
                        GError **error);
    void *(*link_user)(LinkRaw *raw);
    /* A buffer of at least `size` bytes to build the datagram in, or NULL (LINK_AGAIN); sent or
     * given back before the next one. */
    void *(*buffer)(LinkRaw *raw, size_t size);
    /* Takes the buffer always. Never blocks. */
    LinkStatus (*send)(LinkRaw *raw, void *buffer, size_t size);
    /* Returns the number of events handled; 0 = nothing. Never blocks. */
    unsigned (*progress)(LinkRawPort *port);
    /* Arms the wake-up: true = sleep is allowed until the fd is readable; false = something is
     * there, progress again. */
    bool (*arm)(LinkRawPort *port);
    int (*fd)(LinkRawPort *port);
    void (*interrupt)(LinkRawPort *port); /* any thread: makes the fd readable */
    void (*close)(LinkRaw *raw);
    /* Whether regions in such memory are sent and taken. NULL: none are, nor any of the next three
     * is called. */
    bool (*has_memory)(LinkRawPort *port, LinkMemory memory);
    /* Copies the head. Unless it returns LINK_OK nothing was begun. Never blocks. Regions and
     * datagrams may overtake each other. */
    LinkStatus (*send_region)(LinkRaw *raw, const void *head, size_t head_size,
                              const LinkRegion *region, void *transfer);
    /* As large as the offer. Takes the offer always; else likewise. Not inside `offered`. */
    LinkStatus (*take)(LinkRaw *raw, LinkOffer *offer, const LinkRegion *region, void *transfer);
    void (*drop)(LinkRaw *raw, LinkOffer *offer); /* refuses it after all */
} LinkOps;

typedef struct LinkFill { /* a fill and its context */
    const LinkOps *ops;
    void *self;
} LinkFill;

/* UCX over tcp and shared memory; transports come from the process environment
 * (link_ucx_environment()). */
LinkFill *link_fill_ucx(void);
/* "UCX 1.13.1", as loaded. Returned. */
char *link_library(void);
/* To be called first thing in main: sets UCX_* defaults (a user's own win) and re-executes the
 * program once if one had to be set; returns if nothing was to do. tls: NULL = shared memory and
 * tcp, "tcp" = tcp alone. device: an interface's name or an address that it has; NULL = the first
 * interface that is up and not loopback, else loopback. */
void link_ucx_environment(int argc, char **argv, const char *tls, const char *device);
/* Within the process: one bus shared by all ports opened from it; thread-safe. */
LinkFill *link_fill_inproc_new(void);
void link_fill_free(LinkFill *fill);

/* Wraps another fill; the script sees each datagram before it is sent. */
typedef enum FaultAction {
    FAULT_PASS,
    FAULT_DROP,
    FAULT_DUPLICATE,
    FAULT_FLIP_BIT,    /* one bit behind the header; of its checksum when nothing is behind it */
    FAULT_DELAY,       /* sent after the link's next datagram */
    FAULT_REPLAY_LAST, /* sent, followed by the datagram that the link sent before it */
} FaultAction;
typedef FaultAction (*FaultScript)(uint64_t tag, const void *data, size_t size, void *user);
LinkFill *link_fill_fault_new(LinkFill *inner /* borrowed */, FaultScript script, void *user);

/* ---- what the engine uses ---- */

typedef struct LinkPortOptions {
    const LinkFill *fill; /* borrowed */
    LinkReceive receive;
    LinkDead dead;
    void *user;
    bool crowded; /* more ranks than cores: link_port_wait() yields the core on each empty progress
                     while it spins */
} LinkPortOptions;

LinkPort *link_port_open(const LinkPortOptions *options, GError **error);
void link_port_close(LinkPort *port); /* closes its links, erases keys; NULL-safe */
GBytes *link_port_address(LinkPort *port);

typedef struct LinkConnect {
    GBytes *address; /* the peer's */
    uint64_t handle; /* of messages in both directions of this pair */
    uint32_t peer;   /* caller's index for the peer, see link_peer() */
    bool seal;
    uint8_t send_key[32], receive_key[32]; /* crypto/keys.h; copied, erased with the link */
} LinkConnect;
Link *link_connect(LinkPort *port, const LinkConnect *options, GError **error);
/* Closes one link and erases its keys; what still arrives from the pair counts as stale. The rest
 * closes with the port. */
void link_close(Link *link);
uint32_t link_peer(const Link *link);
bool link_is_dead(const Link *link);

/* Sends header (op, step, flags set by the caller) + payload gathered from n parts; copies them
 * (and seals) before it returns, so the caller's memory is free again. Blocks only by progressing
 * its own port while LINK_AGAIN, until interrupted or dead: for what is sent seldom. Whoever has
 * deadlines, or is interrupted for other reasons, tries. */
typedef struct LinkPart {
    const void *data;
    size_t size;
} LinkPart;
LinkStatus link_send(Link *link, uint16_t op, uint16_t flags, uint32_t step, const LinkPart *parts,
                     unsigned n_parts);
/* The same without waiting: LINK_AGAIN when no buffer is free. The only form inside a receive
 * handler. */
LinkStatus link_send_try(Link *link, uint16_t op, uint16_t flags, uint32_t step,
                         const LinkPart *parts, unsigned n_parts);

/* Whether this port's fill sends from and receives into such memory; whether UCX knows CUDA's is
 * found at run time. Links that are sealed carry no regions: whoever seals reads. */
bool link_port_has_memory(const LinkPort *port, LinkMemory memory);
/* Sends a region, whose bytes have this CRC32C, as a message of its own; where link_send() would
 * copy, this borrows: see LinkTransfer. Does not wait: LINK_AGAIN. Unless it returns LINK_OK
 * nothing was begun. */
LinkStatus link_send_region(Link *link, uint16_t op, uint32_t step, const LinkRegion *region,
                            uint32_t crc, LinkTransfer *transfer);
/* Names the place for the region of this op and step, which may have come or not; one at a time on
 * a link, in the order of steps: what is offered for earlier ones is dropped as stale, and so is
 * what is offered while LINK_OFFERS wait. A larger one than the place is corrupt. */
#define LINK_OFFERS 16u
LinkStatus link_receive_region(Link *link, uint16_t op, uint32_t step, const LinkRegion *place,
                               LinkTransfer *transfer);
/* The last gate, for the owner of the memory: whether the bytes that came have the CRC32C that was
 * sent with them. Counts the message as received, or drops it as corrupt. */
bool link_check_region(Link *link, const LinkTransfer *transfer, uint32_t crc);

unsigned link_port_progress(LinkPort *port);
/* Changes the waiting policy of LinkPortOptions.crowded. */
void link_port_set_crowded(LinkPort *port, bool crowded);
/* Progresses until something has arrived, interrupt() was called since the last wait, or the time
 * is over: busily for `spin_us`, then asleep. */
void link_port_wait(LinkPort *port, int64_t timeout_us, int64_t spin_us);
void link_port_interrupt(LinkPort *port);                     /* any thread */
const LinkCounters *link_port_counters(const LinkPort *port); /* the port's thread */
const LinkTraffic *link_traffic(const Link *link);            /* the port's thread */
/* "ipsec-mb" or "openssl": what seals here. */
const char *link_seal_name(void);
