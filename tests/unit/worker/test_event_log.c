/* Tokens on their way to the main loop (worker/serve/event_log.h): in order, once, done last, and
 * what is held on the way is bounded by what the loop has yet to read. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/random.h"
#include "transport/daemon/daemon.h"
#include "worker/serve/event_log.h"

#include <string.h>

enum { TOP = 3 };

typedef struct Reader {
    uint32_t n, n_done;
} Reader;

static void on_token(const EngineToken *t, void *user)
{
    Reader *r = user;
    assert_int_equal(r->n_done, 0);
    if (t->done) {
        assert_string_equal(t->finish_reason, "stop");
        r->n_done++;
        return;
    }
    assert_int_equal(t->position, r->n);
    assert_int_equal(t->id, 3 * r->n);
    assert_int_equal(t->n_top, r->n % (TOP + 1));
    for (uint32_t k = 0; k < t->n_top; k++) {
        assert_int_equal(t->top_ids[k], r->n + k);
        assert_true(t->top_logprobs[k] == -(float)(r->n * k));
    }
    assert_int_equal(t->row_hash[0], (uint8_t)r->n);
    r->n++;
}

static void push(EventLog *log, uint32_t i)
{
    uint32_t ids[TOP];
    float logprobs[TOP];
    RowResult result = {.id = 3 * i,
                        .n_top = i % (TOP + 1),
                        .position = i,
                        .top_ids = ids,
                        .top_logprobs = logprobs};
    for (uint32_t k = 0; k < result.n_top; k++) {
        ids[k] = i + k;
        logprobs[k] = -(float)(i * k);
    }
    result.row_hash[0] = (uint8_t)i;
    event_log_push(log, &result, i, 0, NULL);
}

/* The loop reads at random: what is left are the blocks that it has yet to read, and one. */
static void test_what_is_held_is_bounded(void **state)
{
    for (uint64_t seed = 0; seed < 20; seed++) {
        const bool never = false;
        const EventTimes times = {0};
        RandomSeeded random;
        Reader reader = {0};
        MainLoop *loop = main_loop_new();
        random_seeded_init(&random, seed);
        EventLog *log = event_log_new(TOP, main_loop_loop(loop), on_token, &reader);
        assert_int_equal(event_log_n_blocks(log), 0);
        const uint32_t pause = 1 + (uint32_t)(random_u64(&random.base) % 200);
        for (uint32_t i = 0; i < 3000; i++) {
            push(log, i);
            if (random_u64(&random.base) % pause == 0) {
                main_loop_run_until(loop, &never, 0);
                assert_int_equal(reader.n, i + 1);
            }
            const uint32_t n_unread = i + 1 - reader.n;
            assert_true(event_log_n_blocks(log) <= n_unread / EVENT_LOG_BLOCK + 2);
        }
        event_log_finish(log, "stop", NULL, &times);
        main_loop_run_until(loop, &never, 0);
        assert_int_equal(reader.n, 3000);
        assert_int_equal(reader.n_done, 1);
        main_loop_free(loop);
    }
}

/* As the header says of 64 requests with the longest lists. */
static void test_blocks_are_small(void **state)
{
    assert_true(64 * 2 * event_log_block_bytes(64) < 3u << 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_held_is_bounded),
        cmocka_unit_test(test_blocks_are_small),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
