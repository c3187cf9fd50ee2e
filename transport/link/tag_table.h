/* TagTable: a port's connections by tag, and what came too early.
 *
 * Both ends of a pair connect by themselves, so datagrams may arrive before this end has connected:
 * they are kept, at most TAG_EARLY_LIMIT a tag and TAG_EARLY_BYTES in all, and come out in order
 * once it has. A tag that was removed is retired: what still arrives under it is refused. Owned by
 * the port's thread. */
#pragma once

#include "transport/link/link.h"

#include <glib.h>

#define TAG_EARLY_LIMIT 64u
#define TAG_EARLY_TAGS 256u
#define TAG_EARLY_BYTES (64u << 20)
#define TAG_RETIRED_LIMIT 1024u

typedef struct EarlyDatagram {
    struct EarlyDatagram *next;
    uint64_t tag;
    size_t size;
    unsigned char data[] __attribute__((aligned(16)));
} EarlyDatagram;

typedef struct TagTable {
    GHashTable *connected;              /* tag -> LinkRaw, borrowed */
    GHashTable *early;                  /* tag -> EarlyQueue, owned: not connected yet */
    EarlyDatagram *ready, **ready_tail; /* of tags that are connected by now */
    size_t early_bytes;
    uint64_t retired[TAG_RETIRED_LIMIT];
    unsigned n_retired; /* ever; the ring's next place is n_retired % TAG_RETIRED_LIMIT */
} TagTable;

void tag_table_init(TagTable *table);
void tag_table_clear(TagTable *table);

/* False when the tag is connected already. */
bool tag_table_add(TagTable *table, uint64_t tag, LinkRaw *raw);
/* Retires the tag. */
void tag_table_remove(TagTable *table, uint64_t tag);
LinkRaw *tag_table_find(const TagTable *table, uint64_t tag); /* NULL: not connected */
/* Copies a datagram for a tag that is not connected; false when it is refused (retired, or a
 * limit). */
bool tag_table_keep(TagTable *table, uint64_t tag, const void *data, size_t size);
bool tag_table_has_ready(const TagTable *table);
/* Hands the kept datagrams of connected tags to events->receive in their order; returns how many.
 */
unsigned tag_table_deliver(TagTable *table, const LinkRawEvents *events, void *user);
