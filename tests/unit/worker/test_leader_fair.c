/* Fair order over keys (worker/serve/fair_queue.h): what a key is served when others flood. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/unit/worker/leader_world.h"
#include "worker/serve/fair_queue.h"

#include <string.h>

enum { KEYS_LIMIT = 4, PROMPT_LIMIT = 64, SLOTS = 3 };
static const StepLimits LIMITS = {
    .max_rows = 200, .max_slots = SLOTS, .max_pages = 60, .context = 256, .vocab_size = 1000};

/* One user of a key, who asks for the same again and again. The prompt's tokens are the key's
 * number, so that a step shows whose rows it has. */
typedef struct User {
    uint32_t prompt[PROMPT_LIMIT];
    EngineRequest request;
    GPtrArray *clients; /* Client * */
} User;

typedef struct Street {
    World w;
    User users[KEYS_LIMIT];
    uint32_t n_users;
    uint64_t next_id;
    int slot_user[SLOTS];        /* who has it */
    uint64_t served[KEYS_LIMIT]; /* positions computed */
} Street;

static void street_open(Street *s, uint32_t n_users, uint32_t n_slots)
{
    StepLimits limits = LIMITS;
    limits.max_slots = n_slots;
    memset(s, 0, sizeof *s);
    world_open(&s->w, &limits, limits.max_pages, 1);
    s->n_users = n_users;
    for (uint32_t i = 0; i < n_users; i++) {
        User *u = &s->users[i];
        for (uint32_t k = 0; k < PROMPT_LIMIT; k++) {
            u->prompt[k] = i;
        }
        u->request =
            (EngineRequest){.prompt = u->prompt, .n_prompt = 20, .max_tokens = 10, .fresh = true};
        u->request.share_key.bytes[0] = (uint8_t)(i + 1);
        u->clients = g_ptr_array_new_with_free_func(g_free);
    }
}

static void street_close(Street *s)
{
    world_run(&s->w);
    for (uint32_t i = 0; i < s->n_users; i++) {
        const User *u = &s->users[i];
        for (guint k = 0; k < u->clients->len; k++) { /* whatever the order: its own tokens */
            Client *c = g_ptr_array_index(u->clients, k);
            world_drain(&s->w, c);
            world_assert_tokens(&s->w, c, &u->request, u->request.max_tokens);
        }
        g_ptr_array_unref(u->clients);
    }
    world_close(&s->w);
}

static Client *ask(Street *s, uint32_t user)
{
    User *u = &s->users[user];
    Client *c = g_new0(Client, 1);
    g_ptr_array_add(u->clients, c);
    world_submit(&s->w, ++s->next_id, &u->request, c);
    return c;
}

static void ask_often(Street *s, uint32_t user, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        ask(s, user);
    }
}

/* One step there and back; false: nothing is to be done. */
static bool turn(Street *s)
{
    if (!world_build(&s->w)) {
        return false;
    }
    const Step *step = s->w.step;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        if (g->position == 0) {
            s->slot_user[g->slot] = (int)step->rows[g->row0].token;
        }
        s->served[s->slot_user[g->slot]] += g->n_rows;
    }
    s->w.now_us += 1000;
    world_return(&s->w);
    return true;
}

static uint32_t n_done(Street *s, uint32_t user)
{
    const bool never = false;
    uint32_t n = 0;
    main_loop_run_until(s->w.loop, &never, 0);
    for (guint i = 0; i < s->users[user].clients->len; i++) {
        n += ((const Client *)g_ptr_array_index(s->users[user].clients, i))->n_done;
    }
    return n;
}

/* A single request of another key has the next slot that becomes free. */
static void test_a_flood_does_not_starve_others(void **state)
{
    Street s;
    street_open(&s, 2, SLOTS);
    ask_often(&s, 0, 60);
    turn(&s);
    Client *late = ask(&s, 1);
    for (uint32_t i = 0; late->n_done == 0; i++) {
        assert_true(i < 25); /* the running ones end at step 10, its own ten tokens follow */
        assert_true(turn(&s));
        n_done(&s, 1);
    }
    assert_in_range(n_done(&s, 0), SLOTS, 2 * SLOTS);
    street_close(&s);
}

/* Keys that wait throughout are served alike, whatever they ask for and however many at once. */
static void test_keys_share_alike(void **state)
{
    static const struct {
        uint32_t n_prompt, max_tokens, n_first, n_again;
    } kinds[KEYS_LIMIT] = {{20, 10, 300, 0}, {60, 3, 20, 1}, {2, 60, 40, 1}, {33, 33, 10, 2}};
    Street s;
    street_open(&s, KEYS_LIMIT, SLOTS);
    uint32_t largest = 0;
    for (uint32_t i = 0; i < KEYS_LIMIT; i++) {
        s.users[i].request.n_prompt = kinds[i].n_prompt;
        s.users[i].request.max_tokens = kinds[i].max_tokens;
        largest = MAX(largest, kinds[i].n_prompt + kinds[i].max_tokens);
        ask_often(&s, i, kinds[i].n_first);
    }
    for (uint32_t step = 0; step < 1500; step++) {
        assert_true(turn(&s));
        if (step % 50 == 0) { /* nobody's queue runs dry */
            for (uint32_t i = 0; i < KEYS_LIMIT; i++) {
                ask_often(&s, i, kinds[i].n_again);
            }
        }
        uint64_t least = UINT64_MAX, most = 0;
        for (uint32_t i = 0; i < KEYS_LIMIT; i++) {
            least = MIN(least, s.served[i]);
            most = MAX(most, s.served[i]);
        }
        assert_true(most - least <= (uint64_t)SLOTS * largest); /* fair_queue.h, invariant 4 */
    }
    street_close(&s);
}

/* Two keys that come and go, so that one of them always waits as if new, leave a third its share.
 */
static void test_who_goes_is_not_forgiven(void **state)
{
    Street s;
    street_open(&s, 3, 1);
    ask_often(&s, 2, 200);
    for (uint32_t i = 0; i < 15; i++) { /* it is ahead of whoever comes */
        assert_true(turn(&s));
    }
    Client *at[2] = {ask(&s, 0), ask(&s, 1)};
    memset(s.served, 0, sizeof s.served);
    for (uint32_t step = 0; step < 600; step++) {
        assert_true(turn(&s));
        n_done(&s, 0);
        for (uint32_t i = 0; i < 2; i++) {
            at[i] = at[i]->n_done > 0 ? ask(&s, i) : at[i];
        }
    }
    assert_true(s.served[2] * 4 > s.served[0] + s.served[1] + s.served[2]);
    street_close(&s);
}

/* Who comes late has its share from then on, and nothing for the time before. */
static void test_nobody_saves_up(void **state)
{
    Street s;
    street_open(&s, 2, SLOTS);
    ask_often(&s, 0, 200);
    for (uint32_t i = 0; i < 200; i++) {
        assert_true(turn(&s));
    }
    ask_often(&s, 1, 200);
    memset(s.served, 0, sizeof s.served);
    for (uint32_t i = 0; i < 200; i++) {
        assert_true(turn(&s));
    }
    assert_true(s.served[0] * 5 > s.served[1] * 4 && s.served[1] * 5 > s.served[0] * 4);
    street_close(&s);
}

/* A stream that has begun, here or before a loss, goes before one that has not. */
static void test_streams_that_began_come_first(void **state)
{
    World w;
    Client flood[20], resumed, fresh;
    const uint32_t generated[3] = {0};
    EngineRequest r = world_request(30, 6), after = world_request(30, 6);
    after.generated = generated;
    after.n_generated = 3;
    StepLimits limits = LIMITS;
    limits.max_slots = 1;
    world_open(&w, &limits, 60, 1);
    for (uint32_t i = 0; i < 20; i++) {
        world_submit(&w, i, &r, &flood[i]);
    }
    world_build(&w);
    world_return(&w);
    EngineRequest other = r;
    other.share_key.bytes[0] = 1;
    world_submit(&w, 30, &other, &fresh);
    world_submit(&w, 31, &after, &resumed);
    const bool never = false;
    while (resumed.n_done == 0) {
        assert_true(world_build(&w));
        world_return(&w);
        main_loop_run_until(w.loop, &never, 0);
        assert_int_equal(fresh.n_done, 0);
        assert_int_equal(flood[1].n_done, 0);
    }
    while (fresh.n_done == 0) {
        assert_true(world_build(&w));
        world_return(&w);
        main_loop_run_until(w.loop, &never, 0);
        assert_int_equal(flood[1].n_done, 0);
    }
    world_run(&w);
    for (uint32_t i = 0; i < 20; i++) {
        world_drain(&w, &flood[i]);
    }
    world_close(&w);
}

/* ---- the queue by itself ---- */

static LeaderRequest *of_key(uint32_t key, uint64_t order)
{
    LeaderRequest *q = g_new0(LeaderRequest, 1);
    memcpy(q->share_key.bytes, &key, sizeof key);
    q->order = order;
    return q;
}

static void pass_by(FairQueue *queue, uint32_t key, uint32_t cost)
{
    LeaderRequest *q = of_key(key, 0);
    fair_queue_join(queue, q);
    fair_queue_charge(q, cost);
    fair_queue_leave(queue, q);
    g_free(q);
}

/* Keys that are gone are remembered only while that decides something, and never too many. */
static void test_memory_of_keys_is_bounded(void **state)
{
    FairQueue *queue = fair_queue_new();
    pass_by(queue, 7, 100);
    assert_int_equal(fair_queue_n_keys(queue), 0); /* nobody is left to compare with */
    LeaderRequest *stays = of_key(1, 1);
    fair_queue_join(queue, stays);
    fair_queue_charge(stays, 10);
    for (uint32_t i = 0; i < 3 * FAIR_KEYS_KEPT; i++) {
        pass_by(queue, 100 + i, 5);
        assert_true(fair_queue_n_keys(queue) <= FAIR_KEYS_KEPT + 1);
    }
    assert_int_equal(fair_queue_n_keys(queue), FAIR_KEYS_KEPT + 1);
    fair_queue_charge(stays, 5); /* as much as they have: they come back as if new */
    pass_by(queue, 99, 0);
    assert_int_equal(fair_queue_n_keys(queue), 1);
    fair_queue_leave(queue, stays);
    assert_int_equal(fair_queue_n_keys(queue), 0);
    g_free(stays);
    fair_queue_free(queue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_flood_does_not_starve_others),
        cmocka_unit_test(test_keys_share_alike),
        cmocka_unit_test(test_who_goes_is_not_forgiven),
        cmocka_unit_test(test_nobody_saves_up),
        cmocka_unit_test(test_streams_that_began_come_first),
        cmocka_unit_test(test_memory_of_keys_is_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
