/* Invariants
 *   1. The heap is ordered by (due, key, id); keys are random, so that the seed decides among
 *      equals and a run repeats exactly.
 *   2. A post puts its function at the end of its Loop's own queue and one token into the heap; a
 *      token runs the head of that queue. So posts of a Loop keep their order whatever the tokens'
 *      keys.
 *   3. An event of a frozen Loop moves to its `stalled` list when its time comes, and back when the
 *      Loop is thawed. */
#include "tests/sim/sim_loop.h"

#include <stdlib.h>

/* 2026-01-01 in Unix time: certificates and tokens see a plausible date. */
#define WALL_EPOCH_US G_GINT64_CONSTANT(1767225600000000)
/* More events than this at one virtual instant is an endless loop of posts. */
#define MAX_EVENTS_AT_ONCE 1000000
#define FINAL_EVENTS 1000000

typedef struct SimLoop SimLoop;

typedef struct Event {
    int64_t due_us;
    uint64_t key, id;
    SimLoop *loop;
    LoopFn fn; /* NULL: a token for the Loop's posts */
    void *user;
    unsigned index; /* in the heap; UINT_MAX: stalled */
} Event;

typedef struct Post {
    LoopFn fn;
    void *user;
} Post;

struct SimLoop {
    Loop loop;
    SimWorld *world;
    unsigned number;
    GQueue posts; /* Post */
    bool frozen;
    GQueue stalled; /* Event */
    LoopFn after;   /* NULL: nothing */
    void *after_user;
};

struct SimWorld {
    int64_t now_us;
    RandomSeeded random, order;
    GPtrArray *heap, *loops;
    uint64_t next_id, n_events, digest;
    unsigned n_at_once;
};

uint64_t sim_seed(uint64_t fallback)
{
    const char *text = g_getenv("WEFT_SIM_SEED");
    uint64_t seed = text ? g_ascii_strtoull(text, NULL, 0) : fallback;
    g_printerr("# simulation seed %" G_GUINT64_FORMAT " (WEFT_SIM_SEED)\n", seed);
    return seed;
}

/* ---- the heap -------------------------------------------------------------------------------- */

static bool before(const Event *a, const Event *b)
{
    if (a->due_us != b->due_us) {
        return a->due_us < b->due_us;
    }
    return a->key != b->key ? a->key < b->key : a->id < b->id;
}

static Event *heap_at(SimWorld *world, unsigned i)
{
    return g_ptr_array_index(world->heap, i);
}

static void heap_set(SimWorld *world, unsigned i, Event *event)
{
    g_ptr_array_index(world->heap, i) = event;
    event->index = i;
}

static void heap_up(SimWorld *world, unsigned i)
{
    Event *event = heap_at(world, i);
    for (; i > 0 && before(event, heap_at(world, (i - 1) / 2)); i = (i - 1) / 2) {
        heap_set(world, i, heap_at(world, (i - 1) / 2));
    }
    heap_set(world, i, event);
}

static void heap_down(SimWorld *world, unsigned i)
{
    Event *event = heap_at(world, i);
    for (unsigned child; (child = 2 * i + 1) < world->heap->len; i = child) {
        if (child + 1 < world->heap->len &&
            before(heap_at(world, child + 1), heap_at(world, child))) {
            child++;
        }
        if (!before(heap_at(world, child), event)) {
            break;
        }
        heap_set(world, i, heap_at(world, child));
    }
    heap_set(world, i, event);
}

static void heap_push(SimWorld *world, Event *event)
{
    g_ptr_array_add(world->heap, event);
    heap_set(world, world->heap->len - 1, event);
    heap_up(world, event->index);
}

static void heap_remove(SimWorld *world, Event *event)
{
    unsigned i = event->index;
    Event *last = heap_at(world, world->heap->len - 1);
    g_ptr_array_set_size(world->heap, (int)world->heap->len - 1);
    if (last != event) {
        heap_set(world, i, last);
        heap_up(world, i);
        heap_down(world, last->index);
    }
}

/* ---- the table ------------------------------------------------------------------------------- */

static Event *add_event(SimLoop *loop, int64_t delay_us, LoopFn fn, void *user)
{
    SimWorld *world = loop->world;
    Event *event = g_new0(Event, 1);
    event->due_us = world->now_us + MAX(delay_us, 0);
    event->key = random_u64(&world->order.base);
    event->id = world->next_id++;
    event->loop = loop;
    event->fn = fn;
    event->user = user;
    heap_push(world, event);
    return event;
}

static int64_t sim_now_us(Loop *loop)
{
    return ((SimLoop *)loop)->world->now_us;
}
static int64_t sim_wall_us(Loop *loop)
{
    return WALL_EPOCH_US + sim_now_us(loop);
}

static void sim_post(Loop *base, LoopFn fn, void *user)
{
    SimLoop *loop = (SimLoop *)base;
    Post post = {fn, user};
    g_queue_push_tail(&loop->posts, g_memdup2(&post, sizeof post));
    add_event(loop, 0, NULL, NULL);
}

static LoopTimer *sim_timer_start(Loop *loop, int64_t delay_us, LoopFn fn, void *user)
{
    return (LoopTimer *)add_event((SimLoop *)loop, delay_us, fn, user);
}

static void sim_timer_cancel(Loop *base, LoopTimer *timer)
{
    SimLoop *loop = (SimLoop *)base;
    Event *event = (Event *)timer;
    if (!event) {
        return;
    }
    if (event->index == UINT_MAX) {
        g_queue_remove(&loop->stalled, event);
    } else {
        heap_remove(loop->world, event);
    }
    g_free(event);
}

static const LoopOps sim_ops = {sim_now_us, sim_wall_us, sim_post, sim_timer_start,
                                sim_timer_cancel};

/* ---- running --------------------------------------------------------------------------------- */

static void digest_event(SimWorld *world, const Event *event)
{
    const uint64_t words[] = {(uint64_t)world->now_us, event->loop->number, event->id};
    for (size_t i = 0; i < G_N_ELEMENTS(words); i++) {
        world->digest = (world->digest ^ words[i]) * 0x100000001b3u; /* FNV-1a over words */
    }
    world->n_events++;
}

static void run_event(SimWorld *world, Event *event)
{
    digest_event(world, event);
    LoopFn fn = event->fn;
    void *user = event->user;
    if (!fn) {
        Post *post = g_queue_pop_head(&event->loop->posts);
        fn = post->fn;
        user = post->user;
        g_free(post);
    }
    SimLoop *loop = event->loop;
    g_free(event);
    fn(user);
    if (loop->after) {
        loop->after(loop->after_user);
    }
}

static void move_clock(SimWorld *world, int64_t to_us)
{
    if (to_us > world->now_us) {
        world->now_us = to_us;
        world->n_at_once = 0;
    } else if (++world->n_at_once > MAX_EVENTS_AT_ONCE) {
        g_error("%d events ran at virtual time %" G_GINT64_FORMAT " us: something posts for ever",
                MAX_EVENTS_AT_ONCE, world->now_us);
    }
}

bool sim_world_step(SimWorld *world, int64_t until_us)
{
    while (world->heap->len > 0 && heap_at(world, 0)->due_us <= until_us) {
        Event *event = heap_at(world, 0);
        heap_remove(world, event);
        move_clock(world, event->due_us);
        if (!event->loop->frozen) {
            run_event(world, event);
            return true;
        }
        event->index = UINT_MAX;
        g_queue_push_tail(&event->loop->stalled, event);
    }
    if (until_us != INT64_MAX) {
        world->now_us = MAX(world->now_us, until_us);
    }
    return false;
}

void sim_world_run_for(SimWorld *world, int64_t duration_us)
{
    int64_t until_us = world->now_us + duration_us;
    while (sim_world_step(world, until_us)) {
    }
}

bool sim_world_run_until(SimWorld *world, const bool *done, int64_t limit_us)
{
    int64_t until_us = world->now_us + limit_us;
    while (!*done && sim_world_step(world, until_us)) {
    }
    return *done;
}

void sim_loop_freeze(Loop *base, bool frozen)
{
    SimLoop *loop = (SimLoop *)base;
    loop->frozen = frozen;
    Event *event;
    while (!frozen && (event = g_queue_pop_head(&loop->stalled))) {
        heap_push(loop->world, event); /* due in the past: next, the clock does not go back */
    }
}

void sim_loop_set_after(Loop *base, LoopFn fn, void *user)
{
    SimLoop *loop = (SimLoop *)base;
    loop->after = fn;
    loop->after_user = user;
}

/* ---- life ------------------------------------------------------------------------------------ */

SimWorld *sim_world_new(uint64_t seed)
{
    SimWorld *world = g_new0(SimWorld, 1);
    world->heap = g_ptr_array_new();
    world->loops = g_ptr_array_new();
    world->digest = 0xcbf29ce484222325u;
    world->now_us = 1000000;
    random_seeded_init(&world->random, seed);
    random_seeded_init(&world->order, ~seed);
    return world;
}

Loop *sim_world_loop(SimWorld *world)
{
    SimLoop *loop = g_new0(SimLoop, 1);
    loop->loop.ops = &sim_ops;
    loop->world = world;
    loop->number = world->loops->len;
    g_queue_init(&loop->posts);
    g_queue_init(&loop->stalled);
    g_ptr_array_add(world->loops, loop);
    return &loop->loop;
}

static bool run_one_left_over(SimWorld *world)
{
    for (unsigned i = 0; i < world->loops->len; i++) {
        SimLoop *loop = g_ptr_array_index(world->loops, i);
        Post *post = g_queue_pop_head(&loop->posts);
        if (post) {
            post->fn(post->user);
            g_free(post);
            return true;
        }
    }
    return false;
}

void sim_world_free(SimWorld *world)
{
    if (!world) {
        return;
    }
    for (int n = 0; n < FINAL_EVENTS && run_one_left_over(world); n++) {
    }
    for (unsigned i = 0; i < world->heap->len; i++) {
        g_free(heap_at(world, i));
    }
    for (unsigned i = 0; i < world->loops->len; i++) {
        SimLoop *loop = g_ptr_array_index(world->loops, i);
        g_queue_clear_full(&loop->stalled, g_free);
        g_free(loop);
    }
    g_ptr_array_free(world->heap, TRUE);
    g_ptr_array_free(world->loops, TRUE);
    g_free(world);
}

Random *sim_world_random(SimWorld *world)
{
    return &world->random.base;
}
int64_t sim_world_now_us(const SimWorld *world)
{
    return world->now_us;
}
uint64_t sim_world_n_events(const SimWorld *world)
{
    return world->n_events;
}
uint64_t sim_world_digest(const SimWorld *world)
{
    return world->digest;
}
