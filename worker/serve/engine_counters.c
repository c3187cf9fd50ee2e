#include "worker/serve/engine_counters.h"

NetTime net_time_begin(const LinkPort *port)
{
    return (NetTime){.start_us = g_get_monotonic_time(),
                     .busy_ns = link_counters_busy_ns(link_port_counters(port))};
}

uint64_t net_time_us(const NetTime *begin, const LinkPort *port)
{
    const uint64_t busy_us =
        (link_counters_busy_ns(link_port_counters(port)) - begin->busy_ns) / 1000;
    const uint64_t took_us = (uint64_t)(g_get_monotonic_time() - begin->start_us);
    return took_us > busy_us ? took_us - busy_us : 0;
}

/* One writer: no read-modify-write is needed. */
static void add(atomic_ullong *counter, uint64_t value)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + value,
                          memory_order_relaxed);
}

static void set(atomic_ullong *counter, uint64_t value)
{
    atomic_store_explicit(counter, value, memory_order_relaxed);
}

static uint64_t get(atomic_ullong *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void engine_counters_step(EngineCounters *c, uint32_t n_rows, uint64_t compute_us, uint64_t wait_us)
{
    add(&c->steps, 1);
    add(&c->rows, n_rows);
    add(&c->compute_us, compute_us);
    add(&c->wait_us, wait_us);
}

void engine_counters_wait(EngineCounters *c, uint64_t wait_us)
{
    add(&c->wait_us, wait_us);
}

void engine_counters_link(EngineCounters *c, const LinkCounters *link)
{
    set(&c->messages_sent, link->messages_sent);
    set(&c->bytes_sent, link->bytes_sent);
    set(&c->messages_received, link->messages_received);
    set(&c->bytes_received, link->bytes_received);
    set(&c->dropped_stale, link->dropped_stale);
    set(&c->dropped_replayed, link->dropped_replayed);
    set(&c->dropped_corrupt, link->dropped_corrupt);
    set(&c->seal_ns, link->seal_ns);
    set(&c->send_ns, link->send_ns);
    set(&c->receive_ns, link->receive_ns);
}

void engine_counters_read(EngineCounters *c, EngineStatus *out)
{
    out->steps = get(&c->steps);
    out->rows = get(&c->rows);
    out->compute_us = get(&c->compute_us);
    out->wait_us = get(&c->wait_us);
    out->link = (LinkCounters){.messages_sent = get(&c->messages_sent),
                               .bytes_sent = get(&c->bytes_sent),
                               .messages_received = get(&c->messages_received),
                               .bytes_received = get(&c->bytes_received),
                               .dropped_stale = get(&c->dropped_stale),
                               .dropped_replayed = get(&c->dropped_replayed),
                               .dropped_corrupt = get(&c->dropped_corrupt),
                               .seal_ns = get(&c->seal_ns),
                               .send_ns = get(&c->send_ns),
                               .receive_ns = get(&c->receive_ns)};
    out->wire_us = (out->link.send_ns + out->link.receive_ns) / 1000;
    out->seal_us = out->link.seal_ns / 1000;
}
