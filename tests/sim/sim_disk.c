#include "tests/sim/sim_disk.h"

#include "tests/sim/bugs.h"

/* A coordinator with a bug goes on as if it had been written. */
typedef struct Unheard {
    StoreDone done;
    void *user;
} Unheard;

static void unheard_done(const GError *error, void *user)
{
    Unheard *u = user;
    (void)error;
    if (u->done) {
        u->done(NULL, u->user);
    }
    g_free(u);
}

typedef struct Write {
    Store *store;
    unsigned incarnation; /* of the coordinator that asked */
    StoreChange *changes;
    unsigned n;
    StoreDone done;
    void *user;
} Write;

static struct {
    Whole *whole; /* NULL: writes are as fast as the store */
    int64_t most_us, last_us;
    RandomSeeded random;
    GQueue queue; /* of Write; each has one event, which takes the head */
} here;

void __wrap_store_write(Store *store, const StoreChange *changes, unsigned n, StoreDone done,
                        void *user);
void __real_store_write(Store *store, const StoreChange *changes, unsigned n, StoreDone done,
                        void *user);

static StoreTable forgotten_table(void)
{
    return bug_is(BUG_EPOCH_NOT_DURABLE)        ? STORE_EPOCHS
           : bug_is(BUG_GENERATION_NOT_DURABLE) ? STORE_META
                                                : STORE_TABLE_COUNT;
}

static void write_free(Write *w)
{
    for (unsigned i = 0; i < w->n; i++) {
        g_free((char *)w->changes[i].key);
        g_clear_pointer(&w->changes[i].value, g_bytes_unref);
    }
    g_free(w->changes);
    g_free(w);
}

static void write_due(void *user)
{
    (void)user;
    Write *w = here.whole ? g_queue_pop_head(&here.queue) : NULL;
    if (!w) {
        return;
    }
    if (here.whole->coordinator && here.whole->n_incarnations == w->incarnation) {
        if (bug_is(BUG_DISK_ERROR_IGNORED)) {
            Unheard *u = g_new(Unheard, 1);
            *u = (Unheard){w->done, w->user};
            w->done = unheard_done;
            w->user = u;
        }
        __real_store_write(w->store, w->changes, w->n, w->done, w->user);
    }
    write_free(w);
}

static Write *write_new(Store *store, const StoreChange *changes, unsigned n)
{
    Write *w = g_new0(Write, 1);
    w->store = store;
    w->incarnation = here.whole->n_incarnations;
    w->changes = g_new0(StoreChange, n + 1);
    for (unsigned i = 0; i < n; i++) {
        if (changes[i].table != forgotten_table()) {
            w->changes[w->n++] =
                (StoreChange){changes[i].table, g_strdup(changes[i].key),
                              changes[i].value ? g_bytes_ref(changes[i].value) : NULL};
        }
    }
    return w;
}

void __wrap_store_write(Store *store, const StoreChange *changes, unsigned n, StoreDone done,
                        void *user)
{
    if (!here.whole) {
        __real_store_write(store, changes, n, done, user);
        return;
    }
    Write *w = write_new(store, changes, n);
    w->done = done;
    w->user = user;
    const int64_t now = sim_world_now_us(here.whole->world);
    const int64_t takes = (int64_t)(random_u64(&here.random.base) % ((uint64_t)here.most_us + 1));
    here.last_us = MAX(here.last_us, now + takes);
    g_queue_push_tail(&here.queue, w);
    loop_timer_start(here.whole->director, here.last_us - now, write_due, NULL);
}

void sim_disk_enter(Whole *whole, int64_t most_us)
{
    here.whole = whole;
    here.most_us = most_us;
    here.last_us = 0;
    g_queue_init(&here.queue);
    random_seeded_init(&here.random, random_u64(sim_world_random(whole->world)));
}

void sim_disk_leave(void)
{
    g_queue_clear_full(&here.queue, (GDestroyNotify)write_free);
    here.whole = NULL;
}
