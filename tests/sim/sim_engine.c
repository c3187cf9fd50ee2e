#include "tests/sim/sim_engine.h"

#include "tests/sim/fiber.h"

#include <time.h>

/* The one world of the process that is entered. */
static struct {
    SimWorld *world;
    SimEngineHooks hooks;
    GPtrArray *engines; /* of SimEngine, owned */
    int64_t step_least_us, step_most_us;
    RandomSeeded random;
    SimEngine *running; /* on its fiber */
} here;

/* What the linker knows the replaced functions as; `__real_` are the product's. */
gint64 __wrap_g_get_monotonic_time(void);
gint64 __real_g_get_monotonic_time(void);
int __wrap_clock_gettime(clockid_t clock, struct timespec *out);
int __real_clock_gettime(clockid_t clock, struct timespec *out);
Engine *__wrap_engine_new(const EngineOptions *options, GError **error);
Engine *__real_engine_new(const EngineOptions *options, GError **error);
void __wrap_engine_free(Engine *engine);
void __real_engine_free(Engine *engine);
bool __wrap_engine_step(Engine *engine);
bool __real_engine_step(Engine *engine);
void __wrap_engine_start(Engine *engine, const uint8_t secret[32], const uint8_t own_boot_id[16],
                         bool seal, const EnginePeer *peers, uint32_t n_peers, Loop *loop,
                         void (*ready)(const GError *error, void *user), void *user);
void __real_engine_start(Engine *engine, const uint8_t secret[32], const uint8_t own_boot_id[16],
                         bool seal, const EnginePeer *peers, uint32_t n_peers, Loop *loop,
                         void (*ready)(const GError *error, void *user), void *user);
void __wrap_link_port_wait(LinkPort *port, int64_t timeout_us, int64_t spin_us);
void __real_link_port_wait(LinkPort *port, int64_t timeout_us, int64_t spin_us);

/* ---- time ------------------------------------------------------------------------------------ */

gint64 __wrap_g_get_monotonic_time(void)
{
    return here.world ? sim_world_now_us(here.world) : __real_g_get_monotonic_time();
}

int __wrap_clock_gettime(clockid_t clock, struct timespec *out)
{
    if (!here.world || clock != CLOCK_MONOTONIC) {
        return __real_clock_gettime(clock, out);
    }
    const int64_t now = sim_world_now_us(here.world);
    *out = (struct timespec){.tv_sec = now / 1000000, .tv_nsec = now % 1000000 * 1000};
    return 0;
}

/* ---- engines --------------------------------------------------------------------------------- */

static SimEngine *find(const Engine *engine)
{
    for (guint i = 0; here.world && i < here.engines->len; i++) {
        SimEngine *s = g_ptr_array_index(here.engines, i);
        if (s->engine == engine) {
            return s;
        }
    }
    return NULL;
}

static void turn(void *user)
{
    SimEngine *s = user;
    s->did = __real_engine_step(s->engine);
}

static void sim_engine_free(void *data)
{
    SimEngine *s = data;
    fiber_free(s->fiber);
    g_free(s->job);
    g_free(s);
}

Engine *__wrap_engine_new(const EngineOptions *options, GError **error)
{
    Engine *engine = __real_engine_new(options, error);
    SimNode *node = here.world ? sim_node_of_fill(options->fill) : NULL;
    if (!engine || !node) {
        return engine;
    }
    SimEngine *s = g_new0(SimEngine, 1);
    s->engine = engine;
    s->node = node;
    s->job = g_strdup(options->plan->job);
    s->replica = options->replica;
    s->stage = options->stage;
    s->rank = options->rank;
    s->generation = options->generation;
    s->epoch = options->epoch;
    s->n_stages = options->plan->replicas[options->replica].n_stages;
    s->fiber = fiber_new(turn, s);
    g_ptr_array_add(here.engines, s);
    if (here.hooks.opened) {
        here.hooks.opened(s, here.hooks.user);
    }
    return engine;
}

void __wrap_engine_start(Engine *engine, const uint8_t secret[32], const uint8_t own_boot_id[16],
                         bool seal, const EnginePeer *peers, uint32_t n_peers, Loop *loop,
                         void (*ready)(const GError *error, void *user), void *user)
{
    SimEngine *s = find(engine);
    if (s && here.hooks.started) {
        here.hooks.started(s, secret, here.hooks.user);
    }
    __real_engine_start(engine, secret, own_boot_id, seal, peers, n_peers, loop, ready, user);
}

static void computed(void *user)
{
    (void)user; /* an event of the Loop: the engines of its process get a turn after it */
}

/* Virtual time for the steps that this turn computed. */
static void spend(SimEngine *s)
{
    EngineStatus status;
    engine_status(s->engine, &status);
    if (status.steps == s->steps) {
        return;
    }
    s->steps = status.steps;
    const uint64_t width = (uint64_t)(here.step_most_us - here.step_least_us) + 1;
    const int64_t cost = here.step_least_us + (int64_t)(random_u64(&here.random.base) % width);
    s->busy_until_us = sim_world_now_us(here.world) + cost;
    loop_timer_start(sim_node_loop(s->node), cost, computed, NULL);
}

static bool resume(SimEngine *s)
{
    here.running = s;
    const bool finished = fiber_resume(s->fiber);
    here.running = NULL;
    if (!finished) {
        s->waits_since_us = s->waits_since_us ? s->waits_since_us : sim_world_now_us(here.world);
        return false;
    }
    s->waits_since_us = 0;
    spend(s);
    return s->did;
}

bool __wrap_engine_step(Engine *engine)
{
    SimEngine *s = find(engine);
    if (!s) {
        return __real_engine_step(engine);
    }
    return sim_world_now_us(here.world) >= s->busy_until_us && resume(s);
}

/* A thread would be joined: the fiber runs to the end of its turn, which is near, as the engine was
 * aborted. */
void __wrap_engine_free(Engine *engine)
{
    SimEngine *s = find(engine);
    if (s) {
        for (int n = 0; fiber_is_suspended(s->fiber); n++) {
            g_assert(n < 100);
            resume(s);
        }
        if (here.hooks.closing) {
            here.hooks.closing(s, here.hooks.user);
        }
        g_ptr_array_remove_fast(here.engines, s);
    }
    __real_engine_free(engine);
}

void __wrap_link_port_wait(LinkPort *port, int64_t timeout_us, int64_t spin_us)
{
    if (!fiber_current()) {
        __real_link_port_wait(port, timeout_us, spin_us);
    } else if (link_port_progress(port) == 0) {
        fiber_yield(); /* until the process's next event; whoever waits looks again */
    } else {
        here.running->waits_since_us = 0; /* something came: the next wait is another */
    }
}

/* ---- the world ------------------------------------------------------------------------------- */

void sim_engines_enter(SimWorld *world, const SimEngineHooks *hooks)
{
    g_assert(!here.world);
    here.world = world;
    here.hooks = *hooks;
    here.engines = g_ptr_array_new_with_free_func(sim_engine_free);
    here.step_least_us = here.step_most_us = 1000;
    random_seeded_init(&here.random, random_u64(sim_world_random(world)));
}

void sim_engines_leave(void)
{
    g_assert(here.engines->len == 0);
    g_ptr_array_unref(here.engines);
    here.world = NULL;
}

void sim_engines_set_step(int64_t least_us, int64_t most_us)
{
    here.step_least_us = least_us;
    here.step_most_us = most_us;
}

const GPtrArray *sim_engines(void)
{
    return here.engines;
}
