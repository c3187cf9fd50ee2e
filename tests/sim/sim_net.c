/* Invariants
 *   1. A lane is one direction of one connection. Its parcels wait in `queue`; each has exactly one
 *      event in the receiving Loop, which takes the head: they arrive in order whatever the events'
 *      order. Behind a cut they move to `held`, in order, and come back before younger ones.
 *   2. Ports are found by id, so that what arrives for one that is closed finds nobody.
 *   3. Lanes, strays and nodes belong to the net: events of a world that ends may still point to
 *      them. */
#include "tests/sim/sim_net.h"

#include "proto/base/error.h"
#include "transport/link/tag_table.h"

#include <string.h>

#define LEAST_US 50
#define REPEAT_MOST_US 2000000
#define SWAP_MOST_US 20000

typedef struct Port Port;

typedef enum ParcelKind { PARCEL_DATA, PARCEL_CLOSED } ParcelKind;

typedef struct Parcel {
    ParcelKind kind;
    uint64_t tag;
    size_t size;
    unsigned char data[] __attribute__((aligned(16)));
} Parcel;

typedef struct Lane {
    SimNet *net;
    SimNode *from;
    unsigned to_host;
    uint64_t to_port, tag;
    Loop *loop; /* of the receiver */
    GQueue queue, held;
    int64_t last_us; /* when the youngest arrives */
} Lane;

/* A datagram outside its lane's order. */
typedef struct Stray {
    SimNet *net;
    uint64_t to_port;
    Parcel *parcel; /* NULL once it arrived */
} Stray;

typedef struct Raw {
    Port *port;
    Lane *lane;
    uint64_t tag;
    void *link_user;
    Parcel *building;
    bool dead;
} Raw;

struct Port {
    SimNode *node;
    uint64_t id;
    const LinkRawEvents *events;
    void *user;
    GQueue inbox; /* of Parcel */
    TagTable tags;
    GPtrArray *raws;
};

struct SimNode {
    LinkFill fill; /* first */
    SimNet *net;
    unsigned host;
    Loop *loop;
    bool dead;
};

struct SimNet {
    SimWorld *world;
    RandomSeeded random;
    int64_t delay_us;
    SimTrouble trouble;
    bool cut[SIM_NET_HOSTS][SIM_NET_HOSTS];
    GHashTable *ports; /* id -> Port, borrowed */
    uint64_t last_port;
    GPtrArray *nodes, *lanes, *strays;
};

static uint64_t draw(SimNet *net, uint64_t n)
{
    return random_u64(&net->random.base) % n;
}

/* ---- arriving -------------------------------------------------------------------------------- */

static void port_take(SimNet *net, uint64_t id, Parcel *parcel /* taken */)
{
    Port *port = g_hash_table_lookup(net->ports, &id);
    if (port && !port->node->dead) {
        g_queue_push_tail(&port->inbox, parcel);
    } else {
        g_free(parcel);
    }
}

static void lane_arrive(void *user)
{
    Lane *lane = user;
    Parcel *parcel = g_queue_pop_head(&lane->queue);
    g_assert(parcel); /* invariant 1 */
    if (sim_net_is_cut(lane->net, lane->from->host, lane->to_host)) {
        g_queue_push_tail(&lane->held, parcel);
        return;
    }
    port_take(lane->net, lane->to_port, parcel);
}

static void lane_schedule(Lane *lane)
{
    SimNet *net = lane->net;
    const int64_t now = sim_world_now_us(net->world);
    const int64_t due = now + LEAST_US + (int64_t)draw(net, (uint64_t)net->delay_us);
    lane->last_us = MAX(lane->last_us, due);
    loop_timer_start(lane->loop, lane->last_us - now, lane_arrive, lane);
}

static void lane_put(Lane *lane, Parcel *parcel /* taken */)
{
    if (sim_net_is_cut(lane->net, lane->from->host, lane->to_host)) {
        g_queue_push_tail(&lane->held, parcel);
        return;
    }
    g_queue_push_tail(&lane->queue, parcel);
    lane_schedule(lane);
}

static Parcel *parcel_new(ParcelKind kind, uint64_t tag, size_t size)
{
    Parcel *parcel = g_malloc(sizeof *parcel + size);
    *parcel = (Parcel){.kind = kind, .tag = tag, .size = size};
    return parcel;
}

static void lane_close(Lane *lane)
{
    if (!lane->from->dead) {
        lane_put(lane, parcel_new(PARCEL_CLOSED, lane->tag, 0));
    }
}

/* ---- trouble --------------------------------------------------------------------------------- */

static void stray_arrive(void *user)
{
    Stray *stray = user;
    port_take(stray->net, stray->to_port, g_steal_pointer(&stray->parcel));
}

static void stray_send(Lane *lane, const Parcel *parcel, int64_t delay_us)
{
    Stray *stray = g_new0(Stray, 1);
    stray->net = lane->net;
    stray->to_port = lane->to_port;
    stray->parcel = g_memdup2(parcel, sizeof *parcel + parcel->size);
    g_ptr_array_add(lane->net->strays, stray);
    loop_timer_start(lane->loop, delay_us, stray_arrive, stray);
}

static bool meets(SimNet *net, unsigned of_1024)
{
    return of_1024 > 0 && draw(net, 1024) < of_1024;
}

static void send_with_trouble(Lane *lane, Parcel *parcel /* taken */)
{
    SimNet *net = lane->net;
    if (meets(net, net->trouble.repeat)) {
        stray_send(lane, parcel, (int64_t)draw(net, REPEAT_MOST_US));
    }
    if (meets(net, net->trouble.flip)) {
        const uint64_t bit = draw(net, parcel->size * 8);
        parcel->data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    if (meets(net, net->trouble.swap) && !sim_net_is_cut(net, lane->from->host, lane->to_host)) {
        stray_send(lane, parcel, (int64_t)draw(net, SWAP_MOST_US));
        g_free(parcel);
        return;
    }
    lane_put(lane, parcel);
}

/* ---- the fill -------------------------------------------------------------------------------- */

static LinkRawPort *net_port_open(void *fill, const LinkRawEvents *events, void *user,
                                  GError **error)
{
    SimNode *node = fill;
    Port *port = g_new0(Port, 1);
    port->node = node;
    port->id = ++node->net->last_port;
    port->events = events;
    port->user = user;
    g_queue_init(&port->inbox);
    tag_table_init(&port->tags);
    port->raws = g_ptr_array_new();
    g_hash_table_insert(node->net->ports, &port->id, port);
    return (LinkRawPort *)port;
}

static void raw_free(Raw *raw)
{
    tag_table_remove(&raw->port->tags, raw->tag);
    g_ptr_array_remove_fast(raw->port->raws, raw);
    g_free(raw->building);
    g_free(raw);
}

static void net_close(LinkRaw *link)
{
    Raw *raw = (Raw *)link;
    lane_close(raw->lane);
    raw_free(raw);
}

static void net_port_close(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    while (port->raws->len > 0) {
        net_close(g_ptr_array_index(port->raws, port->raws->len - 1));
    }
    g_hash_table_remove(port->node->net->ports, &port->id);
    g_queue_clear_full(&port->inbox, g_free);
    tag_table_clear(&port->tags);
    g_ptr_array_unref(port->raws);
    g_free(port);
}

static GBytes *net_address(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    const uint64_t address[2] = {port->id, port->node->host};
    return g_bytes_new(address, sizeof address);
}

static Lane *lane_new(SimNode *from, const uint64_t address[2], uint64_t tag)
{
    SimNet *net = from->net;
    Lane *lane = g_new0(Lane, 1);
    Port *peer = g_hash_table_lookup(net->ports, &address[0]);
    lane->net = net;
    lane->from = from;
    lane->to_host = (unsigned)address[1];
    lane->to_port = address[0];
    lane->tag = tag;
    lane->loop = peer ? peer->node->loop : from->loop;
    g_queue_init(&lane->queue);
    g_queue_init(&lane->held);
    g_ptr_array_add(net->lanes, lane);
    return lane;
}

static LinkRaw *net_connect(LinkRawPort *raw_port, GBytes *bytes, uint64_t tag, void *link_user,
                            GError **error)
{
    Port *port = (Port *)raw_port;
    gsize size;
    const uint64_t *address = g_bytes_get_data(bytes, &size);
    if (size != 2 * sizeof *address || address[1] >= SIM_NET_HOSTS) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PEER_UNREACHABLE, "an address of %zu bytes",
                    size);
        return NULL;
    }
    Raw *raw = g_new0(Raw, 1);
    if (!tag_table_add(&port->tags, tag, (LinkRaw *)raw)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "the tag is connected already");
        g_free(raw);
        return NULL;
    }
    *raw = (Raw){.port = port,
                 .lane = lane_new(port->node, address, tag),
                 .tag = tag,
                 .link_user = link_user};
    g_ptr_array_add(port->raws, raw);
    return (LinkRaw *)raw;
}

static void *net_link_user(LinkRaw *raw)
{
    return ((Raw *)raw)->link_user;
}

static void *net_buffer(LinkRaw *link, size_t size)
{
    Raw *raw = (Raw *)link;
    g_free(raw->building);
    raw->building = parcel_new(PARCEL_DATA, raw->tag, size);
    return raw->building->data;
}

static LinkStatus net_send(LinkRaw *link, void *buffer, size_t size)
{
    Raw *raw = (Raw *)link;
    Parcel *parcel = g_steal_pointer(&raw->building);
    SimNet *net = raw->port->node->net;
    parcel->size = size;
    if (raw->port->node->dead) {
        g_free(parcel);
        return LINK_OK;
    }
    if (!g_hash_table_contains(net->ports, &raw->lane->to_port) && !raw->dead) {
        /* The other end answers with a reset: this port hears it as if the peer had closed. */
        g_free(parcel);
        g_queue_push_tail(&raw->port->inbox, parcel_new(PARCEL_CLOSED, raw->tag, 0));
        return LINK_OK;
    }
    send_with_trouble(raw->lane, parcel);
    return LINK_OK;
}

static void port_handle(Port *port, Parcel *parcel)
{
    Raw *raw = (Raw *)tag_table_find(&port->tags, parcel->tag);
    if (parcel->kind == PARCEL_CLOSED) {
        if (raw && !raw->dead) {
            raw->dead = true;
            port->events->dead((LinkRaw *)raw, "the peer closed the connection", port->user);
        }
    } else if (raw) {
        port->events->receive((LinkRaw *)raw, parcel->data, parcel->size, port->user);
    } else if (!tag_table_keep(&port->tags, parcel->tag, parcel->data, parcel->size)) {
        port->events->receive(NULL, parcel->data, parcel->size, port->user);
    }
}

static unsigned net_progress(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    unsigned n = tag_table_deliver(&port->tags, port->events, port->user);
    GQueue inbox = port->inbox;
    g_queue_init(&port->inbox);
    Parcel *parcel;
    while ((parcel = g_queue_pop_head(&inbox))) {
        port_handle(port, parcel);
        g_free(parcel);
        n++;
    }
    return n;
}

/* Nobody sleeps on it: sim_engine.c stands in for link_port_wait(). */
static bool net_arm(LinkRawPort *port)
{
    return true;
}
static int net_fd(LinkRawPort *port)
{
    return -1;
}
static void net_interrupt(LinkRawPort *port) {}

static const LinkOps net_ops = {
    .name = "sim",
    .port_open = net_port_open,
    .port_close = net_port_close,
    .address = net_address,
    .connect = net_connect,
    .link_user = net_link_user,
    .buffer = net_buffer,
    .send = net_send,
    .progress = net_progress,
    .arm = net_arm,
    .fd = net_fd,
    .interrupt = net_interrupt,
    .close = net_close,
};

/* ---- faults ---------------------------------------------------------------------------------- */

bool sim_net_is_cut(const SimNet *net, unsigned a, unsigned b)
{
    return net->cut[a][b];
}

void sim_net_cut(SimNet *net, unsigned a, unsigned b)
{
    net->cut[a][b] = net->cut[b][a] = true;
}

static void lane_heal(Lane *lane, bool reset)
{
    const guint n = lane->held.length;
    Parcel *parcel;
    while ((parcel = g_queue_pop_tail(&lane->held))) {
        if (reset) {
            g_free(parcel);
        } else {
            g_queue_push_head(&lane->queue, parcel);
        }
    }
    for (guint i = 0; i < n && !reset; i++) {
        lane_schedule(lane);
    }
    if (reset && n > 0) {
        lane_put(lane, parcel_new(PARCEL_CLOSED, lane->tag, 0));
    }
}

void sim_net_heal(SimNet *net, unsigned a, unsigned b, bool reset)
{
    if (!net->cut[a][b]) {
        return;
    }
    net->cut[a][b] = net->cut[b][a] = false;
    for (guint i = 0; i < net->lanes->len; i++) {
        Lane *lane = g_ptr_array_index(net->lanes, i);
        const unsigned from = lane->from->host, to = lane->to_host;
        if ((from == a && to == b) || (from == b && to == a)) {
            lane_heal(lane, reset);
        }
    }
}

void sim_net_set_delay(SimNet *net, int64_t most_us)
{
    net->delay_us = MAX(most_us, 1);
}

void sim_net_set_trouble(SimNet *net, SimTrouble trouble)
{
    net->trouble = trouble;
}

/* ---- nodes ----------------------------------------------------------------------------------- */

SimNode *sim_net_node(SimNet *net, unsigned host, Loop *loop)
{
    g_assert(host < SIM_NET_HOSTS);
    SimNode *node = g_new0(SimNode, 1);
    node->fill = (LinkFill){.ops = &net_ops, .self = node};
    node->net = net;
    node->host = host;
    node->loop = loop;
    g_ptr_array_add(net->nodes, node);
    return node;
}

void sim_node_kill(SimNode *node)
{
    SimNet *net = node->net;
    for (guint i = 0; i < net->lanes->len; i++) { /* before `dead`, which stops lanes */
        Lane *lane = g_ptr_array_index(net->lanes, i);
        if (lane->from == node) {
            lane_close(lane);
        }
    }
    node->dead = true;
}

const LinkFill *sim_node_fill(SimNode *node)
{
    return &node->fill;
}
Loop *sim_node_loop(const SimNode *node)
{
    return node->loop;
}
unsigned sim_node_host(const SimNode *node)
{
    return node->host;
}
bool sim_node_is_dead(const SimNode *node)
{
    return node->dead;
}
SimNode *sim_node_of_fill(const LinkFill *fill)
{
    return fill->ops == &net_ops ? fill->self : NULL;
}

/* ---- life ------------------------------------------------------------------------------------ */

static void lane_free(void *data)
{
    Lane *lane = data;
    g_queue_clear_full(&lane->queue, g_free);
    g_queue_clear_full(&lane->held, g_free);
    g_free(lane);
}

static void stray_free(void *data)
{
    g_free(((Stray *)data)->parcel);
    g_free(data);
}

SimNet *sim_net_new(SimWorld *world, uint64_t seed)
{
    SimNet *net = g_new0(SimNet, 1);
    net->world = world;
    random_seeded_init(&net->random, seed);
    net->delay_us = 200;
    net->ports = g_hash_table_new(g_int64_hash, g_int64_equal);
    net->nodes = g_ptr_array_new_with_free_func(g_free);
    net->lanes = g_ptr_array_new_with_free_func(lane_free);
    net->strays = g_ptr_array_new_with_free_func(stray_free);
    return net;
}

void sim_net_free(SimNet *net)
{
    if (net) {
        g_hash_table_unref(net->ports);
        g_ptr_array_unref(net->strays);
        g_ptr_array_unref(net->lanes);
        g_ptr_array_unref(net->nodes);
        g_free(net);
    }
}
