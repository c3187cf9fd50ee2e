/* SimNet: the data plane's network in a SimWorld: a LinkFill for each process, whose datagrams take
 * virtual time and meet what networks do to them.
 *
 * As over TCP, datagrams of a connection arrive in order, once, or the connection breaks; `trouble`
 * breaks that contract on purpose (copies that come again later, datagrams that overtake others,
 * flipped bits), and what stands above must stay right. */
#pragma once

#include "tests/sim/sim_loop.h"
#include "transport/link/link.h"

typedef struct SimNet SimNet;
typedef struct SimNode SimNode; /* a process's end of the network */

/* Of 1024 datagrams, how many meet it. */
typedef struct SimTrouble {
    unsigned repeat; /* comes a second time, up to 2 s later */
    unsigned swap;   /* is overtaken */
    unsigned flip;   /* has one bit changed */
} SimTrouble;

SimNet *sim_net_new(SimWorld *world, uint64_t seed);
/* After the world: what is still on its way belongs to events of it. */
void sim_net_free(SimNet *net);
/* Every datagram takes 50 us to this. */
void sim_net_set_delay(SimNet *net, int64_t most_us);
void sim_net_set_trouble(SimNet *net, SimTrouble trouble);
/* Nothing passes between two hosts; what is sent waits, as it would in TCP's hands. Healed: it goes
 * on, or (reset) the connections are found broken. */
void sim_net_cut(SimNet *net, unsigned a, unsigned b);
void sim_net_heal(SimNet *net, unsigned a, unsigned b, bool reset);
bool sim_net_is_cut(const SimNet *net, unsigned a, unsigned b);

/* A new process on a host; borrowed, lives as long as the net. */
SimNode *sim_net_node(SimNet *net, unsigned host, Loop *loop);
/* The process is gone: nothing of it leaves any more, its connections are reset. */
void sim_node_kill(SimNode *node);
const LinkFill *sim_node_fill(SimNode *node);
Loop *sim_node_loop(const SimNode *node);
unsigned sim_node_host(const SimNode *node);
bool sim_node_is_dead(const SimNode *node);
/* The node whose fill this is. */
SimNode *sim_node_of_fill(const LinkFill *fill);

#define SIM_NET_HOSTS 16u
