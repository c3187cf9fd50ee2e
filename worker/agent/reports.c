/* What a worker tells about its deployments. Counters of engines that are gone stay in the sum, so
 * that what the coordinator sees never falls. */
#include "worker/agent/deployment.h"

#include <string.h>

/* The next deployment from *at on whose engine is open, with its status; NULL = no more. */
static const Deployment *next_open(const Deployments *table, guint *at, EngineStatus *status)
{
    while (*at < table->all->len) {
        const Deployment *d = table->all->pdata[(*at)++];
        if (d->engine && !d->task_running) {
            engine_status(d->engine, status);
            return d;
        }
    }
    return NULL;
}

static void add_counters(const EngineStatus *status, Weft__V1__Counters *sum)
{
    sum->steps += status->steps;
    sum->rows += status->rows;
    sum->wire_bytes_sent += status->link.bytes_sent;
    sum->wire_bytes_received += status->link.bytes_received;
    sum->wire_messages_sent += status->link.messages_sent;
    sum->dropped_stale += status->link.dropped_stale;
    sum->dropped_replayed += status->link.dropped_replayed;
    sum->dropped_corrupt += status->link.dropped_corrupt;
    sum->compute_us += status->compute_us;
    sum->wait_us += status->wait_us;
    sum->wire_us += status->wire_us;
    sum->seal_us += status->seal_us;
    sum->norm_us += status->op_us[STAGE_OP_NORM];
    sum->qkv_us += status->op_us[STAGE_OP_QKV];
    sum->rope_us += status->op_us[STAGE_OP_ROPE];
    sum->attention_us += status->op_us[STAGE_OP_ATTENTION];
    sum->attn_out_us += status->op_us[STAGE_OP_ATTN_OUT];
    sum->gate_up_us += status->op_us[STAGE_OP_GATE_UP];
    sum->activation_us += status->op_us[STAGE_OP_ACTIVATION];
    sum->down_us += status->op_us[STAGE_OP_DOWN];
    sum->reduce_us += status->op_us[STAGE_OP_REDUCE];
    sum->head_us += status->op_us[STAGE_OP_HEAD];
}

void reports_add_counters(Engine *engine, Weft__V1__Counters *sum)
{
    EngineStatus status;
    engine_status(engine, &status);
    add_counters(&status, sum);
}

Weft__V1__Counters *deployments_counters(Deployments *table)
{
    Weft__V1__Counters *sum = g_new(Weft__V1__Counters, 1);
    *sum = table->gone;
    EngineStatus status;
    for (guint at = 0; next_open(table, &at, &status) != NULL;) {
        add_counters(&status, sum);
    }
    return sum;
}

/* ---- links ---- */

static void link_load_free(void *load)
{
    weft__v1__link_load__free_unpacked(load, NULL);
}

GHashTable *reports_links_new(void)
{
    return g_hash_table_new_full(g_str_hash, g_str_equal, NULL, link_load_free);
}

static Weft__V1__LinkLoad *link_to(GHashTable *links, const char *peer)
{
    Weft__V1__LinkLoad *load = g_hash_table_lookup(links, peer);
    if (load == NULL) {
        load = g_new(Weft__V1__LinkLoad, 1);
        weft__v1__link_load__init(load);
        load->peer = g_strdup(peer);
        g_hash_table_insert(links, load->peer, load);
    }
    return load;
}

static void add_peer(GHashTable *links, const char *peer, const EnginePeerTraffic *p)
{
    Weft__V1__LinkLoad *load = link_to(links, peer);
    load->sent_bytes += p->bytes_sent;
    load->received_bytes += p->bytes_received;
    load->sent_messages += p->messages_sent;
    load->wait_us += p->wait_us;
    load->stalls += p->stalls;
}

void reports_add_links(const Deployment *d, GHashTable *links)
{
    const PlanReplica *replica = &d->plan->replicas[d->replica];
    EnginePeerTraffic peers[PLAN_RANKS_LIMIT];
    const uint32_t n = engine_peers(d->engine, peers);
    uint32_t global = 0;
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        for (uint32_t k = 0; k < replica->stages[s].n_ranks && global < n; k++, global++) {
            const bool own = s == d->stage && k == d->rank;
            if (!own) {
                add_peer(links, replica->stages[s].ranks[k].worker, &peers[global]);
            }
        }
    }
}

static void add_gone_link(void *peer, void *value, void *links)
{
    const Weft__V1__LinkLoad *gone = value;
    const EnginePeerTraffic p = {.messages_sent = gone->sent_messages,
                                 .bytes_sent = gone->sent_bytes,
                                 .bytes_received = gone->received_bytes,
                                 .wait_us = gone->wait_us,
                                 .stalls = gone->stalls};
    add_peer(links, peer, &p);
}

Weft__V1__LinkLoad **deployments_links(Deployments *table, size_t *n_out)
{
    g_autoptr(GHashTable) links = reports_links_new();
    EngineStatus status;
    const Deployment *d;
    g_hash_table_foreach(table->gone_links, add_gone_link, links);
    for (guint at = 0; (d = next_open(table, &at, &status)) != NULL;) {
        reports_add_links(d, links);
    }
    Weft__V1__LinkLoad **all = g_new0(Weft__V1__LinkLoad *, g_hash_table_size(links) + 1);
    GHashTableIter at;
    void *load;
    size_t n = 0;
    g_hash_table_iter_init(&at, links);
    while (g_hash_table_iter_next(&at, NULL, &load)) {
        all[n++] = load;
        g_hash_table_iter_steal(&at);
    }
    *n_out = n;
    return all;
}

/* ---- what it holds, for whom it waits, what it leads ---- */

Weft__V1__Held **deployments_held(Deployments *table, uint64_t sequence, size_t *n_out)
{
    Weft__V1__Held **all = g_new0(Weft__V1__Held *, table->all->len + 1);
    size_t n = 0;
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->state == DEPLOY_CLOSING) {
            continue;
        }
        if (d->listed_since == 0) {
            d->listed_since = sequence;
        }
        Weft__V1__Held *held = all[n++] = g_new(Weft__V1__Held, 1);
        weft__v1__held__init(held);
        held->job = g_strdup(d->job);
        held->replica = d->replica;
        held->epoch = d->epoch;
        held->stage = d->stage;
        held->rank = d->rank;
        held->generation = d->generation;
        held->unsealed = !d->seal;
        held->state = g_strdup(d->pulse.to_blame ? "failed" : deployment_state_name(d->state));
        held->error = g_strdup(d->error            ? d->error->message
                               : d->pulse.to_blame ? d->pulse.problem
                                                   : "");
    }
    *n_out = n;
    return all;
}

static Weft__V1__Waiting *waiting_of(const Deployment *d, const EngineStatus *status)
{
    const PlanReplica *replica = &d->plan->replicas[d->replica];
    if (status->waits_stage >= replica->n_stages ||
        status->waits_rank >= replica->stages[status->waits_stage].n_ranks) {
        return NULL;
    }
    Weft__V1__Waiting *w = g_new(Weft__V1__Waiting, 1);
    weft__v1__waiting__init(w);
    w->job = g_strdup(d->job);
    w->replica = d->replica;
    w->epoch = d->epoch;
    w->waits_for = g_strdup(replica->stages[status->waits_stage].ranks[status->waits_rank].worker);
    w->operation = g_strdup(status->waits_operation);
    w->since_ms = (uint64_t)MAX(0, g_get_monotonic_time() - status->waits_since_us) / 1000;
    w->expired = status->wait_expired;
    return w;
}

Weft__V1__Waiting **deployments_waiting(Deployments *table, size_t *n_out)
{
    Weft__V1__Waiting **all = g_new0(Weft__V1__Waiting *, table->all->len + 1);
    size_t n = 0;
    EngineStatus status;
    const Deployment *d;
    for (guint at = 0; (d = next_open(table, &at, &status)) != NULL;) {
        Weft__V1__Waiting *w =
            status.waiting || status.wait_expired ? waiting_of(d, &status) : NULL;
        if (w) {
            all[n++] = w;
        }
    }
    *n_out = n;
    return all;
}

static Weft__V1__ReplicaLoad *load_of(const Deployment *d, const EngineLoad *load)
{
    Weft__V1__ReplicaLoad *l = g_new(Weft__V1__ReplicaLoad, 1);
    weft__v1__replica_load__init(l);
    l->job = g_strdup(d->job);
    l->replica = d->replica;
    l->epoch = d->epoch;
    l->running = load->running;
    l->waiting = load->waiting;
    l->slots = load->slots;
    l->kv_pages_total = load->kv_pages_total;
    l->kv_pages_used = load->kv_pages_used;
    l->kv_pages_cached = load->kv_pages_cached;
    l->prefix_query_tokens = load->prefix_query_tokens;
    l->prefix_hit_tokens = load->prefix_hit_tokens;
    l->preemptions = load->preemptions;
    l->prompt_tokens = load->prompt_tokens;
    l->generation_tokens = load->generation_tokens;
    l->steps_by_rows = g_memdup2(load->steps_by_rows, sizeof load->steps_by_rows);
    l->n_steps_by_rows = G_N_ELEMENTS(load->steps_by_rows);
    l->step_rows = load->step_rows;
    return l;
}

Weft__V1__ReplicaLoad **deployments_loads(Deployments *table, size_t *n_out)
{
    Weft__V1__ReplicaLoad **all = g_new0(Weft__V1__ReplicaLoad *, table->all->len + 1);
    size_t n = 0;
    EngineStatus status;
    const Deployment *d;
    for (guint at = 0; (d = next_open(table, &at, &status)) != NULL;) {
        if (status.leads && status.running) {
            all[n++] = load_of(d, &status.load);
        }
    }
    *n_out = n;
    return all;
}
