#include "tests/sim/watch.h"

#include "proto/base/hash.h"

#include <string.h>

/* A replica's epoch, or a rank's part in it, and who was seen with it first. */
typedef struct Part {
    const SimNode *owner;
    Hash128 secret;
    bool started;
} Part;

static struct {
    History *history;  /* NULL: nobody watches */
    GHashTable *parts; /* text -> Part */
} now;

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
    if (!now.history) {
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
    if (!now.history) {
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

SimEngineHooks watch_hooks(History *history)
{
    return (SimEngineHooks){.opened = on_opened, .started = on_started, .user = history};
}

void watch_begin(History *history)
{
    now.history = history;
    now.parts = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
}

void watch_end(History *history)
{
    now.history = NULL;
    g_clear_pointer(&now.parts, g_hash_table_unref);
}

void watch_check_quiet(History *history) {}
