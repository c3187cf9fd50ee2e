#include "tests/unit/worker/leader_world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

static void on_token(const EngineToken *t, void *user)
{
    Client *c = user;
    assert_int_equal(c->n_done, 0); /* invariant 4: done is the last event */
    if (t->done) {
        c->n_done++;
        g_strlcpy(c->reason, t->finish_reason, sizeof c->reason);
        g_strlcpy(c->error, t->error != NULL ? t->error->message : "", sizeof c->error);
        c->code = t->error != NULL ? t->error->code : 0;
        return;
    }
    c->ids[c->n] = t->id;
    c->logprobs[c->n] = t->logprob;
    c->positions[c->n++] = t->position;
}

static uint64_t no_bytes(void *user)
{
    return 0;
}

static int64_t world_now(void *user)
{
    return ((World *)user)->now_us;
}

void world_open(World *w, const StepLimits *limits, uint32_t n_pages, uint32_t n_stages)
{
    *w = (World){.limits = *limits, .now_us = 1000000};
    const LeaderOptions options = {.limits = *limits,
                                   .kv_pages = n_pages,
                                   .n_stages = n_stages,
                                   .steps_in_flight = n_stages == 1 ? 1 : n_stages + 1,
                                   .wire_bytes = no_bytes,
                                   .now_us = world_now,
                                   .user = w};
    w->leader = leader_new(&options);
    w->replica = fake_replica_new(limits, n_pages);
    w->loop = main_loop_new();
    w->step = step_new(limits);
    g_queue_init(&w->flights);
}

void world_close(World *w)
{
    leader_free(w->leader, NULL);
    fake_replica_free(w->replica);
    g_queue_clear_full(&w->flights, (GDestroyNotify)fake_flight_free);
    step_free(w->step);
    main_loop_free(w->loop);
}

bool world_build(World *w)
{
    if (!leader_next(w->leader, w->step)) {
        return false;
    }
    g_queue_push_tail(&w->flights, fake_replica_run(w->replica, w->step));
    return true;
}

void world_return(World *w)
{
    FakeFlight *f = g_queue_pop_head(&w->flights);
    leader_result(w->leader, f->number, f->results, f->n);
    fake_flight_free(f);
}

void world_run(World *w)
{
    for (unsigned turn = 0; leader_open_requests(w->leader) > 0; turn++) {
        assert_true(turn < 20000);
        while (world_build(w)) {
        }
        assert_false(g_queue_is_empty(&w->flights)); /* open requests and nothing to do: stuck */
        world_return(w);
    }
    while (!g_queue_is_empty(&w->flights)) {
        world_return(w);
    }
    world_build(w); /* the last releases */
}

EngineLoad world_load(const World *w)
{
    EngineLoad load;
    leader_load(w->leader, &load);
    return load;
}

void world_submit(World *w, uint64_t id, const EngineRequest *r, Client *c)
{
    memset(c, 0, sizeof *c);
    leader_submit(w->leader, leader_request_new(id, r, main_loop_loop(w->loop), on_token, c));
}

void world_drain(World *w, const Client *c)
{
    for (unsigned i = 0; c->n_done == 0 && i < 1000; i++) {
        const bool never = false;
        main_loop_run_until(w->loop, &never, 1000);
    }
    assert_int_equal(c->n_done, 1);
}

void world_assert_tokens(const World *w, const Client *c, const EngineRequest *r, uint32_t n)
{
    g_autofree uint32_t *ids = g_new0(uint32_t, r->n_prompt + r->n_generated + n + 1);
    uint32_t known = r->n_prompt + r->n_generated;
    memcpy(ids, r->prompt, sizeof(uint32_t) * r->n_prompt);
    if (r->n_generated > 0) {
        memcpy(ids + r->n_prompt, r->generated, sizeof(uint32_t) * r->n_generated);
    }
    assert_int_equal(c->n, n);
    for (uint32_t i = 0; i < n; i++, known++) {
        assert_int_equal(c->positions[i], known);
        ids[known] = fake_token(&w->limits, ids, known);
        assert_int_equal(c->ids[i], ids[known]);
    }
}

void world_assert_scores(const World *w, const Client *c, const EngineRequest *r)
{
    const uint32_t from = MAX(r->score_from, 1);
    assert_int_equal(c->n, r->n_prompt - from);
    for (uint32_t i = 0; i < c->n; i++) {
        assert_int_equal(c->positions[i], from + i);
        assert_int_equal(c->ids[i], r->prompt[from + i]);
        assert_int_equal((uint32_t)c->logprobs[i], fake_token(&w->limits, r->prompt, from + i));
    }
}

static const uint32_t zeros[1024];

EngineRequest world_request(uint32_t n_prompt, uint32_t n)
{
    return (EngineRequest){.prompt = zeros, .n_prompt = n_prompt, .max_tokens = n};
}
