/* The engines' side of the watch, and its frame. */
#include "tests/sim/watch.h"

#include "proto/base/hash.h"

#include <string.h>

/* An engine looks at its deadline when its process has an event, which is every 250 ms at least. */
#define WAIT_SLACK_US (WHOLE_SECOND / 2)

/* A replica's epoch, or a rank's part in it, and who was seen with it first. */
typedef struct Part {
    const SimNode *owner;
    Hash128 secret;
    bool started;
} Part;

static struct {
    History *history;
    GHashTable *parts; /* text -> Part */
} now;

History *watch_history(void)
{
    return now.history;
}

static Part *part_of(const SimEngine *e, bool rank)
{
    g_autofree char *key =
        rank ? g_strdup_printf("job %s replica %u epoch %" G_GUINT64_FORMAT " stage %u rank %u",
                               e->job, e->replica, e->epoch, e->stage, e->rank)
             : g_strdup_printf("job %s replica %u epoch %" G_GUINT64_FORMAT, e->job, e->replica,
                               e->epoch);
    Part *part = g_hash_table_lookup(now.parts, key);
    if (!part) {
        part = g_new0(Part, 1);
        g_hash_table_insert(now.parts, g_steal_pointer(&key), part);
    }
    return part;
}

/* ---- one owner per shard and epoch ----------------------------------------------------------- */

static void on_opened(SimEngine *e, void *user)
{
    if (!now.history || sim_node_is_dead(e->node)) {
        return;
    }
    Part *part = part_of(e, true);
    if (part->owner && part->owner != e->node) {
        history_violate(user, "one owner per shard and epoch",
                        "job %s replica %u epoch %" G_GUINT64_FORMAT
                        " stage %u rank %u is opened on w%u by another process than before (w%u)",
                        e->job, e->replica, e->epoch, e->stage, e->rank, sim_node_host(e->node),
                        sim_node_host(part->owner));
    }
    part->owner = e->node;
}

static void on_started(SimEngine *e, const uint8_t secret[32], void *user)
{
    if (!now.history || sim_node_is_dead(e->node)) {
        return;
    }
    Part *part = part_of(e, false);
    const Hash128 hash = hash128(secret, 32);
    if (part->started && !hash128_equal(&hash, &part->secret)) {
        history_violate(user, "an epoch is used once",
                        "job %s replica %u epoch %" G_GUINT64_FORMAT
                        " is started a second time, with another secret",
                        e->job, e->replica, e->epoch);
    }
    part->started = true;
    part->secret = hash;
}

/* ---- every wait ends ------------------------------------------------------------------------- */

static void check_wait(History *h, const SimEngine *e)
{
    const WholeWorker *worker = &h->whole->workers[sim_node_host(e->node)];
    EngineStatus status;
    engine_status(e->engine, &status);
    if (sim_node_is_dead(e->node) || worker->frozen || !status.running) {
        return;
    }
    const bool flying = status.waiting && strcmp(status.waits_operation, "tokens of a step") == 0;
    const int64_t since = e->waits_since_us ? e->waits_since_us
                          : flying          ? status.waits_since_us
                                            : 0;
    const int64_t bound =
        status.step_deadline_us * (e->waits_since_us ? 1 : e->n_stages + 1) + WAIT_SLACK_US;
    const int64_t waits = sim_world_now_us(h->whole->world) - MAX(since, worker->thawed_us);
    if (since && waits > bound) {
        history_violate(h, "every wait ends",
                        "w%u has waited %.1f s for stage %u rank %u in %s; its deadline is %.1f s",
                        worker->index, (double)waits / 1e6, status.waits_stage, status.waits_rank,
                        status.waits_operation, (double)status.step_deadline_us / 1e6);
    }
}

/* ---- the frame ------------------------------------------------------------------------------- */

SimEngineHooks watch_hooks(History *history)
{
    return (SimEngineHooks){.opened = on_opened, .started = on_started, .user = history};
}

void watch_begin(History *history)
{
    now.history = history;
    now.parts = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    watch_coordinator_begin();
    watch_worker_begin();
}

void watch_end(History *history)
{
    now.history = NULL;
    g_clear_pointer(&now.parts, g_hash_table_unref);
    watch_coordinator_end();
    watch_worker_end();
}

void watch_look(History *history)
{
    for (guint i = 0; i < sim_engines()->len; i++) {
        check_wait(history, g_ptr_array_index(sim_engines(), i));
    }
    watch_coordinator_look(history);
    watch_worker_look(history);
}

void watch_check_quiet(History *history)
{
    watch_coordinator_quiet(history);
    watch_worker_quiet(history);
}
