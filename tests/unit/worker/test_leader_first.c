/* The time to the first token, in steps: prompts that were read before cost a row each, and all of
 * them enter one step, whatever decodes beside them (scheduler.h, invariant 4; prefix_cache.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "tests/unit/worker/leader_world.h"

#include <string.h>

enum { N = 32, CONTEXT = 1024, LONGEST = 512, NEW_PROMPT = 256, PAGES = N * CONTEXT / 32 };
static const StepLimits LIMITS = {.max_rows = 512,
                                  .max_slots = N + 1,
                                  .max_pages = PAGES,
                                  .context = CONTEXT,
                                  .vocab_size = 1000};

typedef struct Crowd {
    World w;
    uint32_t texts[N][LONGEST];
    EngineRequest requests[N];
    Client clients[N], talker;
    uint64_t next_id;
} Crowd;

/* N texts without a common beginning, of `least` to least + N - 1 ids. */
static void crowd_open(Crowd *c, uint32_t least, uint32_t max_tokens)
{
    world_open(&c->w, &LIMITS, PAGES, 1);
    for (uint32_t i = 0; i < N; i++) {
        for (uint32_t k = 0; k < LONGEST; k++) {
            c->texts[i][k] = (7 * i + 13 * k + i * k) % 1000;
        }
        c->requests[i] =
            (EngineRequest){.prompt = c->texts[i], .n_prompt = least + i, .max_tokens = max_tokens};
    }
}

/* What was built last has come back. */
static void settle(World *w)
{
    while (!g_queue_is_empty(&w->flights)) {
        world_return(w);
    }
}

static void crowd_submit(Crowd *c)
{
    for (uint32_t i = 0; i < N; i++) {
        world_submit(&c->w, c->next_id++, &c->requests[i], &c->clients[i]);
    }
}

static void crowd_finish(Crowd *c)
{
    world_run(&c->w);
    for (uint32_t i = 0; i < N; i++) {
        world_drain(&c->w, &c->clients[i]);
        world_assert_tokens(&c->w, &c->clients[i], &c->requests[i], c->requests[i].max_tokens);
    }
}

/* A step that takes as long as rows of a millisecond; rows of it that draw. */
static uint32_t step(Crowd *c)
{
    uint32_t n_drawing = 0;
    settle(&c->w);
    assert_true(world_build(&c->w));
    for (uint32_t i = 0; i < c->w.step->n_rows; i++) {
        n_drawing += c->w.step->rows[i].output == STEP_OUTPUT_SAMPLE;
    }
    c->w.now_us += 1000 * (int64_t)c->w.step->n_rows;
    world_return(&c->w);
    return n_drawing;
}

/* Texts that were read before, each with an answer of so many tokens: all draw in one step. */
static void read_again(uint32_t least, uint32_t n_answer)
{
    Crowd *c = g_new0(Crowd, 1);
    crowd_open(c, least, n_answer);
    crowd_submit(c);
    crowd_finish(c);
    crowd_submit(c);
    assert_int_equal(step(c), N);
    assert_int_equal(c->w.step->n_rows, N);
    crowd_finish(c);
    world_close(&c->w);
    g_free(c);
}

/* Their last page was filled by their answers. */
static void test_all_begin_in_one_step(void **state)
{
    static const uint32_t least[] = {2, 100, LONGEST - N};
    for (unsigned i = 0; i < G_N_ELEMENTS(least); i++) {
        read_again(least[i], 40);
    }
}

/* One token was drawn, and no page was filled by it: the tail serves, too. */
static void test_after_short_answers(void **state)
{
    read_again(97, 1);
}

/* While another one decodes, and rows are so dear that a chunk has the fewest. */
static void test_beside_one_that_decodes(void **state)
{
    Crowd *c = g_new0(Crowd, 1);
    crowd_open(c, 100, 40);
    crowd_submit(c);
    crowd_finish(c);
    EngineRequest talk = world_request(9, 400);
    talk.fresh = true;
    world_submit(&c->w, 1000, &talk, &c->talker);
    assert_int_equal(step(c), 1);
    crowd_submit(c);
    assert_int_equal(step(c), 1 + N);
    assert_int_equal(c->w.step->n_rows, 1 + N);
    leader_cancel(c->w.leader, 1000);
    crowd_finish(c);
    world_drain(&c->w, &c->talker);
    world_close(&c->w);
    g_free(c);
}

/* A prompt that is new is read in chunks beside those that are not, and delays none of them. */
static void test_beside_one_that_is_new(void **state)
{
    Crowd *c = g_new0(Crowd, 1);
    Client reader;
    crowd_open(c, 100, 40);
    crowd_submit(c);
    crowd_finish(c);
    EngineRequest reads = world_request(NEW_PROMPT, 1);
    reads.fresh = true;
    world_submit(&c->w, 1000, &reads, &reader);
    crowd_submit(c);
    assert_int_equal(step(c), N);
    assert_true(c->w.step->n_rows > N && c->w.step->n_rows < N + NEW_PROMPT);
    crowd_finish(c);
    world_drain(&c->w, &reader);
    world_assert_tokens(&c->w, &reader, &reads, 1);
    world_close(&c->w);
    g_free(c);
}

/* ---- what is not taken from others ---- */

/* Rows that a text needs after another one was read. */
static uint32_t rows_after(const EngineRequest *first, const EngineRequest *second)
{
    World w;
    Client a, b;
    world_open(&w, &LIMITS, PAGES, 1);
    world_submit(&w, 1, first, &a);
    world_run(&w);
    world_drain(&w, &a);
    const uint32_t before = fake_replica_rows(w.replica);
    world_submit(&w, 2, second, &b);
    world_run(&w);
    world_drain(&w, &b);
    world_assert_tokens(&w, &b, second, second->max_tokens);
    const uint32_t n = fake_replica_rows(w.replica) - before;
    world_close(&w);
    return n;
}

static void test_only_the_common_beginning(void **state)
{
    uint32_t a[80], b[80];
    for (uint32_t i = 0; i < 80; i++) {
        a[i] = i;
        b[i] = i < 50 ? i : 500 + i;
    }
    const EngineRequest first = {.prompt = a, .n_prompt = 80, .max_tokens = 1},
                        second = {.prompt = b, .n_prompt = 80, .max_tokens = 1};
    EngineRequest salted = second, fresh = second, longer = {.prompt = a, .n_prompt = 70};
    longer.max_tokens = 1;
    salted.cache_salt.bytes[0] = 1;
    fresh.fresh = true;
    assert_int_equal(rows_after(&first, &first), 1);
    assert_int_equal(rows_after(&first, &second), 80 - 50);
    assert_int_equal(rows_after(&first, &longer), 1); /* ends within the tail */
    assert_int_equal(rows_after(&longer, &first), 80 - 70);
    assert_int_equal(rows_after(&first, &salted), 80);
    assert_int_equal(rows_after(&salted, &second), 80);
    assert_int_equal(rows_after(&first, &fresh), 80);
    assert_int_equal(rows_after(&fresh, &second), 80);
}

/* Many pages with the same first id: the newest are compared, and the cost is bounded. */
static void test_many_siblings(void **state)
{
    World w;
    Client client;
    uint32_t text[40];
    world_open(&w, &LIMITS, PAGES, 1);
    const EngineRequest r = {.prompt = text, .n_prompt = 40, .max_tokens = 1};
    memset(text, 0, sizeof text);
    for (uint32_t i = 0; i < 3 * PREFIX_SIBLINGS; i++) {
        text[39] = i;
        text[1] = 1 + i;
        world_submit(&w, i, &r, &client);
        world_run(&w);
        world_drain(&w, &client);
        world_assert_tokens(&w, &client, &r, 1);
    }
    uint32_t before = fake_replica_rows(w.replica);
    world_submit(&w, 1000, &r, &client); /* the newest */
    world_run(&w);
    world_drain(&w, &client);
    assert_int_equal(fake_replica_rows(w.replica) - before, 1);
    text[5] = 77; /* parts from it in its first page */
    before = fake_replica_rows(w.replica);
    world_submit(&w, 1001, &r, &client);
    world_run(&w);
    world_drain(&w, &client);
    world_assert_tokens(&w, &client, &r, 1);
    assert_int_equal(fake_replica_rows(w.replica) - before, 40 - 5);
    world_close(&w);
}

/* Logits that are not finite: neither what was computed nor what it was begun with serves. */
static void test_a_failed_row_taints_its_source(void **state)
{
    World w;
    Client a, b;
    const EngineRequest r = world_request(20, 2);
    world_open(&w, &LIMITS, PAGES, 1);
    world_submit(&w, 1, &r, &a);
    world_run(&w);
    world_drain(&w, &a);
    assert_int_equal(world_load(&w).kv_pages_cached, 1);
    world_submit(&w, 2, &r, &b);
    settle(&w);
    assert_true(world_build(&w));
    assert_int_equal(w.step->n_copies, 1);
    ((FakeFlight *)g_queue_peek_head(&w.flights))->results[0].failed = 1;
    world_return(&w);
    world_run(&w);
    world_drain(&w, &b);
    assert_int_equal(b.code, WEFT_ERROR_NUMERICS);
    assert_int_equal(world_load(&w).kv_pages_cached, 0);
    world_close(&w);
}

/* The last page that is to be had is the one whose beginning is wanted. */
static void test_the_source_becomes_the_page(void **state)
{
    World w;
    Client c;
    uint32_t text[70];
    for (uint32_t i = 0; i < 70; i++) {
        text[i] = i;
    }
    EngineRequest r = {.prompt = text, .n_prompt = 40, .max_tokens = 1};
    StepLimits limits = LIMITS;
    limits.context = 64;
    limits.max_pages = 2;
    world_open(&w, &limits, 2, 1);
    world_submit(&w, 1, &r, &c);
    world_run(&w);
    world_drain(&w, &c);
    assert_int_equal(world_load(&w).kv_pages_cached, 2);
    text[36] = 99;
    world_submit(&w, 2, &r, &c);
    settle(&w);
    assert_true(world_build(&w));
    assert_int_equal(w.step->n_copies, 1);
    assert_int_equal(w.step->copies[0].n_positions, 4);
    assert_int_equal(w.step->copies[0].from, w.step->copies[0].to);
    world_return(&w);
    world_run(&w);
    world_drain(&w, &c);
    world_assert_tokens(&w, &c, &r, 1);
    world_close(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_begin_in_one_step),
        cmocka_unit_test(test_after_short_answers),
        cmocka_unit_test(test_beside_one_that_decodes),
        cmocka_unit_test(test_beside_one_that_is_new),
        cmocka_unit_test(test_only_the_common_beginning),
        cmocka_unit_test(test_many_siblings),
        cmocka_unit_test(test_a_failed_row_taints_its_source),
        cmocka_unit_test(test_the_source_becomes_the_page),
    };
    return cmocka_run_group_tests_name("first tokens", tests, NULL, NULL);
}
