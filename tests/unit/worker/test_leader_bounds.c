/* What the leader does at its bounds (leader.h): canaries. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/unit/worker/leader_world.h"

static const StepLimits LIMITS = {
    .max_rows = 48, .max_slots = 3, .max_pages = 40, .context = 256, .vocab_size = 1000};

static void assert_empty(const Step *s)
{
    assert_int_equal(s->n_rows + s->n_segments + s->n_admits + s->n_releases + s->n_pages +
                         s->n_reuses + s->n_tokens + s->n_biases,
                     0);
}

/* A canary is a step of its own only when there is nothing else to do, and never more than one. */
static void test_canary(void **state)
{
    World w;
    Client c;
    world_open(&w, &LIMITS, 40, 2);
    const EngineLoad before = world_load(&w);
    assert_false(world_build(&w));
    leader_canary(w.leader);
    leader_canary(w.leader);
    assert_true(world_build(&w));
    assert_empty(w.step);
    assert_false(world_build(&w));
    assert_int_equal(leader_steps_in_flight(w.leader), 1);
    uint32_t number;
    assert_true(leader_oldest_step_us(w.leader, &number) > 0); /* it has the flight's deadline */
    world_return(&w);
    assert_int_equal(leader_steps_in_flight(w.leader), 0);
    const EngineLoad after = world_load(&w);
    assert_memory_equal(&before, &after, sizeof before);

    const EngineRequest r = world_request(70, 9);
    world_submit(&w, 1, &r, &c);
    leader_canary(w.leader);
    assert_true(world_build(&w));
    assert_true(w.step->n_rows > 0); /* the request's step is the canary */
    while (leader_open_requests(w.leader) > 0) {
        leader_canary(w.leader); /* between all of its steps */
        while (world_build(&w)) {
        }
        assert_true(leader_steps_in_flight(w.leader) <= 3);
        world_return(&w);
    }
    world_run(&w);
    world_drain(&w, &c);
    world_assert_tokens(&w, &c, &r, 9);
    world_close(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_canary),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
