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

void engine_counters_ops(EngineCounters *c, const StageTimes *times)
{
    for (int op = 0; op < STAGE_OP_LIMIT; op++) {
        set(&c->op_ns[op], times->ns[op]);
    }
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

void engine_counters_peer(EngineCounters *c, uint32_t global_rank, const LinkTraffic *traffic)
{
    set(&c->peers[global_rank].messages_sent, traffic->messages_sent);
    set(&c->peers[global_rank].bytes_sent, traffic->bytes_sent);
    set(&c->peers[global_rank].bytes_received, traffic->bytes_received);
}

void engine_counters_peer_wait(EngineCounters *c, uint32_t global_rank, uint64_t wait_us)
{
    add(&c->peers[global_rank].wait_us, wait_us);
}

void engine_counters_peer_stall(EngineCounters *c, uint32_t global_rank)
{
    add(&c->peers[global_rank].stalls, 1);
}

void engine_counters_load(EngineCounters *c, const EngineLoad *load)
{
    atomic_store_explicit(&c->load.running, load->running, memory_order_relaxed);
    atomic_store_explicit(&c->load.waiting, load->waiting, memory_order_relaxed);
    atomic_store_explicit(&c->load.slots, load->slots, memory_order_relaxed);
    set(&c->load.kv_pages_total, load->kv_pages_total);
    set(&c->load.kv_pages_used, load->kv_pages_used);
    set(&c->load.kv_pages_cached, load->kv_pages_cached);
    set(&c->load.prefix_query_tokens, load->prefix_query_tokens);
    set(&c->load.prefix_hit_tokens, load->prefix_hit_tokens);
    set(&c->load.preemptions, load->preemptions);
    set(&c->load.prompt_tokens, load->prompt_tokens);
    set(&c->load.generation_tokens, load->generation_tokens);
    for (unsigned i = 0; i <= STEP_ROWS_BOUNDS; i++) {
        set(&c->load.steps_by_rows[i], load->steps_by_rows[i]);
    }
    set(&c->load.step_rows, load->step_rows);
}

static void read_load(EngineCounters *c, EngineLoad *out)
{
    *out = (EngineLoad){
        .running = atomic_load_explicit(&c->load.running, memory_order_relaxed),
        .waiting = atomic_load_explicit(&c->load.waiting, memory_order_relaxed),
        .slots = atomic_load_explicit(&c->load.slots, memory_order_relaxed),
        .kv_pages_total = get(&c->load.kv_pages_total),
        .kv_pages_used = get(&c->load.kv_pages_used),
        .kv_pages_cached = get(&c->load.kv_pages_cached),
        .prefix_query_tokens = get(&c->load.prefix_query_tokens),
        .prefix_hit_tokens = get(&c->load.prefix_hit_tokens),
        .preemptions = get(&c->load.preemptions),
        .prompt_tokens = get(&c->load.prompt_tokens),
        .generation_tokens = get(&c->load.generation_tokens),
        .step_rows = get(&c->load.step_rows),
    };
    for (unsigned i = 0; i <= STEP_ROWS_BOUNDS; i++) {
        out->steps_by_rows[i] = get(&c->load.steps_by_rows[i]);
    }
}

void engine_counters_read(EngineCounters *c, EngineStatus *out)
{
    out->steps = get(&c->steps);
    out->rows = get(&c->rows);
    out->compute_us = get(&c->compute_us);
    out->wait_us = get(&c->wait_us);
    for (int op = 0; op < STAGE_OP_LIMIT; op++) {
        out->op_us[op] = get(&c->op_ns[op]) / 1000;
    }
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
    read_load(c, &out->load);
    out->wire_us = (out->link.send_ns + out->link.receive_ns) / 1000;
    out->seal_us = out->link.seal_ns / 1000;
}

void engine_counters_read_peer(EngineCounters *c, uint32_t global_rank, EnginePeerTraffic *out)
{
    *out = (EnginePeerTraffic){.messages_sent = get(&c->peers[global_rank].messages_sent),
                               .bytes_sent = get(&c->peers[global_rank].bytes_sent),
                               .bytes_received = get(&c->peers[global_rank].bytes_received),
                               .wait_us = get(&c->peers[global_rank].wait_us),
                               .stalls = get(&c->peers[global_rank].stalls)};
}
