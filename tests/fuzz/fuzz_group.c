/* Any messages at a group of three ranks, before and between its collectives, from ranks 1 and 2.
 * Records: kind 0, 1 = a message of that rank (u16 flags, u32 step, payload); others = rank 0 runs
 * a collective (u16 site, u32 step) whose deadline is over, so that it takes what is there and
 * ends. */
#include "tests/fuzz/calls.h"
#include "transport/group/group.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { RANKS = 3, VALUES = 48, LEAVES = 4 };

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

typedef struct World {
    LinkFill *fill;
    LinkPort *ports[RANKS];
    Link *links[RANKS]; /* of rank 0 */
    Link *back[RANKS];  /* of the others, to rank 0 */
    Group *group;
    atomic_bool abort;
} World;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    World *w = user;
    if (w->group != NULL && link_peer(link) != 0) {
        group_receive(w->group, link, header, payload);
    }
}

static void on_dead(Link *link, const char *why, void *user) {}

static Link *connect(LinkPort *port, LinkPort *to, uint32_t pair, uint32_t peer)
{
    g_autoptr(GBytes) address = link_port_address(to);
    LinkConnect options = {.address = address, .handle = 100 + pair, .peer = peer};
    return link_connect(port, &options, NULL);
}

static void world_open(World *w)
{
    w->fill = link_fill_inproc_new();
    LinkPortOptions port = {.fill = w->fill, .receive = on_receive, .dead = on_dead, .user = w};
    for (uint32_t r = 0; r < RANKS; r++) {
        w->ports[r] = link_port_open(&port, NULL);
    }
    for (uint32_t r = 1; r < RANKS; r++) {
        w->links[r] = connect(w->ports[0], w->ports[r], r, r);
        w->back[r] = connect(w->ports[r], w->ports[0], r, 0);
    }
    GroupOptions options = {.port = w->ports[0],
                            .n_ranks = RANKS,
                            .links = w->links,
                            .abort = &w->abort,
                            .two_shot_bytes = 64};
    w->group = group_new(&options);
}

static void world_close(World *w)
{
    group_free(w->group);
    for (uint32_t r = 0; r < RANKS; r++) {
        link_port_close(w->ports[r]);
    }
    link_fill_free(w->fill);
}

static void progress(World *w)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        while (link_port_progress(w->ports[r]) > 0) {
        }
    }
}

static void run(World *w, unsigned which, const GroupWait *wait)
{
    static const uint32_t cuts[RANKS + 1] = {0, 1, 2, LEAVES};
    static const size_t first[RANKS + 1] = {0, 16, 32, VALUES};
    static const size_t sizes[RANKS] = {12, 8, 20};
    float mine[VALUES] = {1}, out[VALUES];
    uint8_t bytes[RANKS][32];
    void *places[RANKS] = {bytes[0], bytes[1], bytes[2]};
    const void *sends[RANKS] = {mine, mine, mine};
    const GroupOperands operands = {LEAVES, 0, cuts, (const float *const[]){mine}};
    GroupSent sent = {0};
    switch (which % 6) {
    case 0:
        group_all_reduce(w->group, wait, LEAVES, cuts, mine, VALUES, 8, out);
        return;
    case 1: /* large enough for two shots */
        group_all_reduce(w->group, wait, LEAVES, cuts, mine, VALUES, VALUES, out);
        return;
    case 2:
        group_all_gather(w->group, wait, mine, sizes, places);
        return;
    case 3:
        group_broadcast(w->group, wait, 1, bytes, 40);
        return;
    case 4:
        group_scatter_send(w->group, wait, &operands, first, true, &sent);
        group_scatter_arrived(w->group, wait, &operands, first);
        group_scatter_receive(w->group, wait, &operands, first, out);
        return;
    default:
        group_all_to_all(w->group, wait, sends, sizes, places, sizes);
    }
}

static void play(World *w, const Record *record)
{
    uint16_t flags;
    uint32_t step;
    if (record->size < 6) {
        return;
    }
    memcpy(&flags, record->bytes, 2);
    memcpy(&step, record->bytes + 2, 4);
    if (record->kind < 2) {
        const LinkPart part = {record->bytes + 6, record->size - 6};
        link_send_try(w->back[record->kind + 1], LINK_OP_PARTIAL, flags, step, &part, 1);
    } else {
        const GroupWait wait = {
            .step = step, .site = flags % GROUP_SITE_LIMIT, .deadline_us = 1, .operation = "fuzz"};
        run(w, record->kind, &wait);
    }
    progress(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    World w = {0};
    Record record;
    world_open(&w);
    for (Records r = {data, size, 0}; records_next(&r, &record);) {
        play(&w, &record);
    }
    world_close(&w);
    return 0;
}
