/* Resuming on another layout gives the run that was never interrupted, each element of the model is
 * in exactly one rank's pieces that count, and a rank whose peer is gone says so. */
#include "tests/unit/worker/train_runs.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { BEFORE = 2, AFTER = 2 };

static void define(TrainRankOptions *options)
{
    options->sequences = 7;
    options->leaves = 4;
    options->dropout = (Dropout){.rate = 0.1f, .seed = 8};
    options->scaling = (LossScaleRule){.dynamic = true, .initial = 0x1p20f, .window = 3};
}

static void whole_optimizer(TrainRankOptions *options)
{
    options->whole_optimizer = true;
    options->bucket_floats = 500;
}

static void assert_each_once(const ModelSpec *spec, const RunState *state)
{
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const size_t at = state->weights->holding->offsets[i],
                     n = (size_t)spec->tensors[i].rows * spec->tensors[i].columns;
        for (size_t e = 0; e < n; e++) {
            if (state->written[at + e] != 1) {
                fail_msg("%s[%zu] was written %u times", spec->tensors[i].name, e,
                         state->written[at + e]);
            }
        }
    }
}

static void assert_resumes(const Toy *toy)
{
    const KernelIsa isa = kernels_best_isa();
    const RunSpread layouts[] = {
        {.isa = isa},
        {.dp = 2, .pp = 2, .isa = isa, .change = whole_optimizer},
        {.tp = 2, .dp = 3, .isa = isa},
        {.pp = 2, .tp = 2, .dp = 2, .isa = isa},
        {.isa = isa, .threads = 2},
    };
    const RunResult want = run_toy(toy, &layouts[0], BEFORE + AFTER, define);
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    for (size_t i = 0; i + 1 < G_N_ELEMENTS(layouts); i++) {
        RunSpread from = layouts[i], to = layouts[i + 1];
        RunState *state = run_state_new(spec);
        from.save = state;
        to.load = state;
        const RunResult first = run_toy(toy, &from, BEFORE, define);
        assert_each_once(spec, state);
        assert_int_equal(state->progress.step, BEFORE);
        const RunResult last = run_toy(toy, &to, AFTER, define);
        assert_memory_equal(first.losses, want.losses, BEFORE * sizeof(float));
        assert_memory_equal(last.losses, want.losses + BEFORE, AFTER * sizeof(float));
        assert_memory_equal(last.norms, want.norms + BEFORE, AFTER * sizeof(float));
        assert_true(hash128_equal(&last.digest, &want.digest));
        run_state_free(state);
    }
}

static void test_resume(void **state)
{
    assert_resumes(&toy_gpt2);
    assert_resumes(&toy_llama);
}

/* ---- a peer that is gone ---- */

typedef struct Pair {
    LinkPort *ports[2];
    Link *links[2];
    TrainLinks *ends[2];
} Pair;

typedef struct End {
    Pair *pair;
    int index;
} End;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    const End *end = user;
    train_links_receive(end->pair->ends[end->index], link, header, payload);
}

static void on_dead(Link *link, const char *why, void *user) {}

/* Two replicas; the second never runs. */
static void step_alone(bool aborted, WeftErrorCode code, const char *says)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    g_autoptr(TokenData) data = toy_data(&toy_gpt2);
    g_autoptr(Plan) plan = train_plan_new(spec, 2, 1, 1, NULL);
    g_autoptr(GError) error = NULL;
    TokenSamples samples = {.data = data, .seed = 1};
    const SampleSource source = token_samples_source(&samples);
    LinkFill *fill = link_fill_inproc_new();
    Pool *pool = pool_new(1, NULL, false, 0);
    Pair pair = {0};
    End ends[2] = {{&pair, 0}, {&pair, 1}};
    atomic_bool abort = aborted;
    for (int i = 0; i < 2; i++) {
        const LinkPortOptions options = {
            .fill = fill, .receive = on_receive, .dead = on_dead, .user = &ends[i]};
        pair.ports[i] = link_port_open(&options, NULL);
    }
    for (int i = 0; i < 2; i++) {
        g_autoptr(GBytes) address = link_port_address(pair.ports[1 - i]);
        const LinkConnect connect = {.address = address, .handle = 3, .peer = (uint32_t)(1 - i)};
        pair.links[i] = link_connect(pair.ports[i], &connect, NULL);
    }
    Link *const links[2] = {NULL, pair.links[0]};
    const TrainLinksOptions options = {.port = pair.ports[0],
                                       .links = links,
                                       .position = train_position(plan, 0, 0, 0),
                                       .plan = plan,
                                       .abort = &abort,
                                       .yield = true};
    pair.ends[0] = train_links_new(&options);
    if (!aborted) {
        link_port_close(pair.ports[1]);
        pair.ports[1] = NULL;
    }
    TrainRankOptions rank_options = toy_options(&toy_gpt2, spec, &source);
    rank_options.kernels = kernels_get(kernels_best_isa());
    rank_options.pool = pool;
    rank_options.plan = plan;
    rank_options.links = pair.ends[0];
    g_autoptr(TrainRank) rank = train_rank_new(&rank_options, toy_weights(&toy_gpt2, spec), &error);
    TrainStep out;
    assert_false(train_rank_step(rank, &out, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, (int)code));
    assert_non_null(strstr(error->message, "gathering losses, worker rank-1"));
    assert_non_null(strstr(error->message, says));
    g_clear_pointer(&rank, train_rank_free);
    train_links_free(pair.ends[0]);
    link_port_close(pair.ports[0]);
    link_port_close(pair.ports[1]);
    link_fill_free(fill);
    pool_free(pool);
}

static void test_dead_peer(void **state)
{
    step_alone(false, WEFT_ERROR_WORKER_LOST, "its link is dead");
}

static void test_aborted(void **state)
{
    step_alone(true, WEFT_ERROR_CANCELLED, "aborted");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_dead_peer),
        cmocka_unit_test(test_aborted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
