/* Training engines, several in one process over inproc links: any layout gives one process's losses
 * and weights, also when it goes on from what another layout left; a rank that dies, falls silent
 * or is stopped ends the epoch everywhere and is named. */
#include "tests/unit/worker/toy_training.h"

#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "transport/daemon/daemon.h"
#include "worker/train/train_engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum {
    STEPS = 4,
    RANKS_LIMIT = 4,
    TOKENS = 900,
    BAD_AT = 70,
    SAMPLED = 21,
    TRACE_FIRST = 1,
    TRACE_STEPS = 2,
    WAIT_US = 3 * 1000 * 1000,
    HOLD_US = 5 * 1000 * 1000,
    PATIENCE_US = 240 * 1000 * 1000
};

typedef struct Rank {
    struct World *world;
    TrainEngine *engine;
    bool loaded, running, ended;
    GError *error;
    Hash128 digest;
    float losses[STEPS];
    uint32_t n_skipped;
    uint32_t n_steps, validations;
    float validation;
    uint32_t samples, sample[SAMPLED], first_sample[SAMPLED]; /* texts; the last, the first one */
    GPtrArray *snapshots;                                     /* of TrainSnapshot */
} Rank;

typedef struct World {
    const Toy *toy;
    MainLoop *main;
    LinkFill *fill, *faults;
    ModelSpec *spec;
    Plan *plan;
    uint32_t ids[TOKENS];
    uint32_t bad_id[2]; /* in the data, in those of validation; 0: none */
    uint32_t n_ranks;
    Rank ranks[RANKS_LIMIT];
    const GPtrArray *from; /* of TrainSnapshot: what the restored state is read from */
    atomic_bool silent;    /* the faulty fill drops everything */
    uint32_t stop_rank, stop_step;
    bool stops, silences;
    uint64_t steps;               /* more than will ever be run, where something stops them */
    bool f16;                     /* with a loss scale that overflows at first */
    Device *devices[RANKS_LIMIT]; /* of the ranks; NULL: the host */
    const char *point;            /* a fail point set with stop_rank's step stop_step; NULL: none */
    int64_t argument;
    bool settled;       /* all started engines have ended */
    uint32_t leaves;    /* 0: the toy's */
    uint32_t idle_rank; /* has no samples */
    uint32_t slow_rank; /* whose first checkpoint is taken late */
} World;

/* ---- what an engine asks and tells ---- */

static bool feed_tokens(void *user, bool validation, uint64_t first, uint64_t n, uint32_t *out,
                        GError **error)
{
    const World *w = user;
    assert_true(first + n <= TOKENS);
    for (uint64_t i = 0; i < n; i++) {
        const bool bad = first + i == BAD_AT && w->bad_id[validation] != 0;
        out[i] = (bad ? w->bad_id[validation] : w->ids[first + i]) | (uint32_t)DOCUMENT_LOSS
                                                                         << TRAIN_ID_BITS;
    }
    return true;
}

/* From the piece that has the element. */
static float element_of(const GPtrArray *snapshots, const char *tensor, uint32_t row,
                        uint32_t column)
{
    for (guint i = 0; i < snapshots->len; i++) {
        const TrainSnapshot *s = snapshots->pdata[i];
        for (uint32_t p = 0; p < s->n_pieces; p++) {
            const CheckpointPiece *piece = &s->pieces[p];
            const SliceRect *r = &piece->rect;
            if (strcmp(piece->tensor, tensor) == 0 && row - r->row0 < r->n_rows &&
                column - r->col0 < r->n_cols) {
                return piece->data[(row - r->row0) * piece->ld + (column - r->col0)];
            }
        }
    }
    fail_msg("no piece has %s (%u, %u)", tensor, row, column);
    return 0;
}

static bool feed_floats(void *user, const char *tensor, SliceRect rect, float *out, size_t ld,
                        GError **error)
{
    const World *w = user;
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        for (uint32_t c = 0; c < rect.n_cols; c++) {
            out[r * ld + c] = element_of(w->from, tensor, rect.row0 + r, rect.col0 + c);
        }
    }
    return true;
}

static void settle(World *w)
{
    w->settled = true;
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        w->settled = w->settled && (w->ranks[r].ended || w->ranks[r].engine == NULL);
    }
}

static void start_all(World *w)
{
    TrainPeer peers[RANKS_LIMIT];
    const uint8_t secret[32] = {7};
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        if (!w->ranks[r].loaded) {
            return;
        }
        peers[r] = (TrainPeer){.worker = "w", .address = train_engine_address(w->ranks[r].engine)};
        peers[r].boot_id[0] = (uint8_t)r;
    }
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        train_engine_start(w->ranks[r].engine, secret, peers[r].boot_id, true, peers, w->n_ranks);
    }
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        g_bytes_unref(peers[r].address);
    }
}

static void on_loaded(void *user)
{
    Rank *rank = user;
    rank->loaded = true;
    start_all(rank->world);
}

static void on_running(void *user)
{
    ((Rank *)user)->running = true;
}

/* Of the steps that are traced, and of these all that was done, in order. */
static void check_trace(const TrainReport *report, bool has_samples)
{
    const uint64_t step = report->step.step;
    const bool traced = step >= TRACE_FIRST && step < TRACE_FIRST + TRACE_STEPS;
    int64_t at = report->begin_us, work[PIPELINE_WEIGHTS + 1] = {0};
    assert_true(report->traced == traced);
    assert_true((traced && has_samples) == (report->n_trace > 0));
    for (uint32_t i = 0; i < report->n_trace; i++) {
        assert_true(report->trace[i].begin_us >= at);
        at = report->trace[i].end_us;
        work[report->trace[i].op.kind]++;
    }
    assert_true(report->end_us >= at);
    assert_int_equal(work[PIPELINE_FORWARD], work[PIPELINE_BACKWARD]);
}

static void on_step(const TrainReport *report, void *user)
{
    Rank *rank = user;
    World *w = rank->world;
    assert_true(rank->running && report->step.step < w->steps);
    if (report->step.step < STEPS) {
        rank->losses[report->step.step] = report->step.loss;
    }
    assert_true(train_memory_total(&report->memory) > 0);
    assert_true(report->resident_bytes == 0 || rank->n_steps == 0);
    rank->n_steps++;
    rank->n_skipped += report->step.skipped;
    if (report->validated) {
        rank->validations++;
        rank->validation = report->validation;
    }
    if (report->sample != NULL) {
        assert_int_equal(report->n_sample, SAMPLED);
        memcpy(rank->samples++ == 0 ? rank->first_sample : rank->sample, report->sample,
               sizeof rank->sample);
    }
    check_trace(report, rank != w->ranks + w->idle_rank);
    assert_true(report->seconds > 0 && report->waited >= 0 &&
                report->waited <= report->seconds + 1e-3);
    if (rank == &w->ranks[w->stop_rank] && report->step.step == w->stop_step) {
        atomic_store(&w->silent, w->silences);
        if (w->point != NULL) {
            failpoint_set(w->point, true, w->argument);
        }
        if (w->stops) {
            train_engine_free(g_steal_pointer(&rank->engine));
            settle(w);
        }
    }
}

static void taken_late(void *user)
{
    Rank *rank = user;
    if (rank->engine != NULL) {
        train_engine_taken(rank->engine);
    }
}

static void on_snapshot(TrainSnapshot *snapshot, void *user)
{
    Rank *rank = user;
    g_ptr_array_add(rank->snapshots, snapshot);
    const bool late = rank == rank->world->ranks + rank->world->slow_rank;
    if (late && rank->snapshots->len == 1) { /* longer than a rank is waited for */
        loop_timer_start(main_loop_loop(rank->world->main), HOLD_US, taken_late, rank);
    } else if (rank->engine != NULL) {
        train_engine_taken(rank->engine);
    }
}

static void on_ended(const Hash128 *digest, const GError *error, void *user)
{
    Rank *rank = user;
    assert_false(rank->ended);
    assert_true((digest != NULL) != (error != NULL));
    rank->ended = true;
    rank->error = error != NULL ? g_error_copy(error) : NULL;
    rank->digest = digest != NULL ? *digest : (Hash128){{0}};
    settle(rank->world);
}

static FaultAction drop_when_silent(uint64_t tag, const void *data, size_t size, void *user)
{
    return atomic_load(&((World *)user)->silent) ? FAULT_DROP : FAULT_PASS;
}

/* ---- a run ---- */

static void snapshot_free(void *snapshot)
{
    train_snapshot_free(snapshot);
}

static World *world_new(const Toy *toy, uint32_t dp, uint32_t pp, uint32_t tp)
{
    World *w = g_new0(World, 1);
    w->toy = toy;
    w->main = main_loop_new();
    w->fill = link_fill_inproc_new();
    w->faults = link_fill_fault_new(w->fill, drop_when_silent, w);
    w->spec = toy_spec(toy);
    w->plan = train_plan_new(w->spec, dp, pp, tp, NULL);
    w->n_ranks = dp * pp * tp;
    w->stop_rank = RANKS_LIMIT - 1;
    w->stop_step = UINT32_MAX;
    w->steps = STEPS;
    w->idle_rank = w->slow_rank = RANKS_LIMIT;
    for (uint32_t i = 0; i < TOKENS; i++) {
        w->ids[i] = (i * 7919 + i * i) % toy->config.vocabulary;
    }
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        w->ranks[r].world = w;
        w->ranks[r].snapshots = g_ptr_array_new_with_free_func(snapshot_free);
    }
    return w;
}

/* Where the snapshots of `from` stand. */
static TrainProgress progress_at(const World *w, uint64_t first_step)
{
    const TrainSnapshot *s = first_step > 0 ? w->from->pdata[0] : NULL;
    assert_true(s == NULL || s->at.step == first_step);
    return s != NULL ? s->at : (TrainProgress){.step = 0};
}

static TrainEngineOptions engine_options(World *w, uint32_t r, uint64_t first_step)
{
    static const uint32_t prompt[] = {3, 1}; /* a text of more tokens than a sequence */
    const TrainPosition all = train_position(w->plan, 0, 0, 0);
    const TrainRankOptions toy = toy_options(w->toy, w->spec, NULL);
    return (TrainEngineOptions){
        .spec = w->spec,
        .plan = w->plan,
        .replica = r / (all.pp * all.tp),
        .stage = r / all.tp % all.pp,
        .rank = r % all.tp,
        .generation = 3,
        .epoch = 5,
        .work = {.sequences = w->toy->sequences,
                 .length = w->toy->length,
                 .leaves = w->leaves > 0 ? w->leaves : toy.leaves,
                 .micro_sequences = 1,
                 .steps = w->steps,
                 .seed = 9,
                 .optimizer = toy.optimizer,
                 .precision = w->f16 ? PRECISION_F16 : PRECISION_F32,
                 .scaling = {.dynamic = w->f16, .initial = 0x1p26f, .window = 2},
                 .checkpoint_every = 3,
                 .trace_first = TRACE_FIRST,
                 .trace_steps = TRACE_STEPS,
                 .validation_every = 2,
                 .validation_sequences = 2,
                 .sample_every = 2,
                 .sample = {prompt, G_N_ELEMENTS(prompt), SAMPLED, 0.8f, 9},
                 .n_tokens = TOKENS,
                 .n_validation_tokens = TOKENS / 2,
                 .fast = w->devices[0] != NULL,
                 .from = progress_at(w, first_step)},
        .feed = {feed_tokens, feed_floats, w},
        .threads = 1,
        .kernels = kernels_get(ISA_GENERIC),
        .device = w->devices[r],
        .fill = w->faults,
        .crowded = true,
        .loop = main_loop_loop(w->main),
        .events = {on_loaded, on_running, on_step, on_snapshot, on_ended, &w->ranks[r]}};
}

static void run(World *w, uint64_t first_step, int64_t wait_deadline_us)
{
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        TrainEngineOptions options = engine_options(w, r, first_step);
        g_autoptr(GError) error = NULL;
        options.wait_deadline_us = wait_deadline_us;
        w->ranks[r].engine = train_engine_new(&options, &error);
        assert_null(error);
    }
    assert_true(main_loop_run_until(w->main, &w->settled, PATIENCE_US));
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        train_engine_free(g_steal_pointer(&w->ranks[r].engine));
    }
}

static void world_free(World *w)
{
    main_loop_free(w->main);
    for (uint32_t r = 0; r < RANKS_LIMIT; r++) {
        device_free(w->devices[r]);
    }
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        g_ptr_array_unref(w->ranks[r].snapshots);
        g_clear_error(&w->ranks[r].error);
    }
    link_fill_free(w->faults);
    link_fill_free(w->fill);
    plan_free(w->plan);
    model_spec_free(w->spec);
    g_free(w);
}

static void assert_same(const World *got, const World *want, uint32_t from)
{
    for (uint32_t r = 0; r < got->n_ranks; r++) {
        const Rank *rank = &got->ranks[r];
        if (rank->error != NULL) {
            fail_msg("rank %u: %s", r, rank->error->message);
        }
        assert_int_equal(rank->n_steps, STEPS - from);
        assert_memory_equal(rank->losses + from, want->ranks[0].losses + from,
                            (STEPS - from) * sizeof(float));
        assert_memory_equal(&rank->validation, &want->ranks[0].validation, sizeof(float));
        assert_true(hash128_equal(&rank->digest, &want->ranks[0].digest));
        assert_int_equal(rank->samples, from == 0 ? 2 : 1);
        assert_memory_equal(from == 0 ? rank->sample : rank->first_sample, want->ranks[0].sample,
                            sizeof rank->sample);
        if (from == 0) {
            assert_memory_equal(rank->first_sample, want->ranks[0].first_sample,
                                sizeof rank->sample);
        }
    }
}

/* ---- tests ---- */

static const uint32_t layouts[][3] = {{2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {2, 2, 1}};

static void any_layout_gives_the_same(void **state)
{
    const Toy *const toys[] = {&toy_gpt2, &toy_llama};
    for (size_t t = 0; t < G_N_ELEMENTS(toys); t++) {
        World *alone = world_new(toys[t], 1, 1, 1);
        run(alone, 0, 0);
        assert_same(alone, alone, 0);
        assert_int_equal(alone->ranks[0].validations, 2);
        assert_int_equal(alone->ranks[0].snapshots->len, 2);
        for (size_t i = 0; i < G_N_ELEMENTS(layouts); i++) {
            World *w = world_new(toys[t], layouts[i][0], layouts[i][1], layouts[i][2]);
            run(w, 0, 0);
            assert_same(w, alone, 0);
            world_free(w);
        }
        world_free(alone);
    }
}

/* Two samples in three leaves: the first replica has none, and is traced like the other. */
static void a_replica_without_samples(void **state)
{
    Toy toy = toy_gpt2;
    toy.sequences = 2;
    World *w = world_new(&toy, 2, 1, 1), *alone = world_new(&toy, 1, 1, 1);
    w->leaves = alone->leaves = 3;
    w->idle_rank = 0;
    run(w, 0, 0);
    run(alone, 0, 0);
    assert_same(w, alone, 0);
    world_free(w);
    world_free(alone);
}

/* One rank's checkpoint is on its way for longer than a rank is waited for that says nothing. */
static void a_slow_checkpoint_is_waited_for(void **state)
{
    World *w = world_new(&toy_gpt2, 1, 2, 1), *alone = world_new(&toy_gpt2, 1, 1, 1);
    w->slow_rank = 1;
    run(w, 0, WAIT_US);
    run(alone, 0, 0);
    assert_same(w, alone, 0);
    assert_int_equal(w->ranks[1].snapshots->len, 2);
    world_free(w);
    world_free(alone);
}

/* What four ranks had after three steps, a process alone goes on from, and the reverse. */
static void goes_on_from_any_layout(void **state)
{
    World *w = world_new(&toy_gpt2, 2, 2, 1), *alone = world_new(&toy_gpt2, 1, 1, 1);
    run(w, 0, 0);
    run(alone, 0, 0);
    g_autoptr(GPtrArray) parts = g_ptr_array_new(), whole = g_ptr_array_new();
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        const TrainSnapshot *s = w->ranks[r].snapshots->pdata[0];
        assert_int_equal(s->at.step, 3);
        assert_int_equal(s->samples, 3 * toy_gpt2.sequences);
        g_ptr_array_add(parts, (void *)s);
    }
    g_ptr_array_add(whole, alone->ranks[0].snapshots->pdata[0]);
    World *on_alone = world_new(&toy_gpt2, 1, 1, 1), *on_tp = world_new(&toy_gpt2, 1, 1, 2);
    on_alone->from = parts;
    on_tp->from = whole;
    run(on_alone, 3, 0);
    run(on_tp, 3, 0);
    assert_same(on_alone, alone, 3);
    assert_same(on_tp, alone, 3);
    world_free(on_alone);
    world_free(on_tp);
    world_free(w);
    world_free(alone);
}

/* The loss scale and the optimizer's own count are state: two of the first three steps overflow,
 * and whoever goes on from there, on another layout, skips what the undisturbed run skips. */
static void f16_goes_on_with_its_scale(void **state)
{
    World *alone = world_new(&toy_gpt2, 1, 1, 1), *w = world_new(&toy_gpt2, 2, 2, 1),
          *on_tp = world_new(&toy_gpt2, 1, 1, 2);
    alone->f16 = w->f16 = on_tp->f16 = true;
    run(alone, 0, 0);
    run(w, 0, 0);
    assert_same(w, alone, 0);
    g_autoptr(GPtrArray) parts = g_ptr_array_new();
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        g_ptr_array_add(parts, w->ranks[r].snapshots->pdata[0]);
    }
    const TrainProgress *at = &((TrainSnapshot *)parts->pdata[0])->at;
    assert_true(at->updates < at->step && at->scale.scale < 0x1p26f);
    assert_int_equal(alone->ranks[0].n_skipped, w->ranks[3].n_skipped);
    assert_true(alone->ranks[0].n_skipped > 0);
    on_tp->from = parts;
    run(on_tp, 3, 0);
    assert_same(on_tp, alone, 3);
    world_free(on_tp);
    world_free(w);
    world_free(alone);
}

static void assert_names(const Rank *rank, const char *worker)
{
    assert_non_null(rank->error);
    assert_int_equal(rank->error->code, WEFT_ERROR_WORKER_LOST);
    if (strstr(rank->error->message, worker) == NULL) {
        fail_msg("\"%s\" does not name %s", rank->error->message, worker);
    }
}

/* Takes the world. */
static void names_who_leaves(World *w)
{
    w->stops = true;
    w->steps = UINT32_MAX;
    w->stop_rank = 1;
    w->stop_step = 0;
    run(w, 0, 0);
    assert_names(&w->ranks[0], "rank-1");
    world_free(w);
}

static void a_rank_that_leaves_is_named(void **state)
{
    names_who_leaves(world_new(&toy_gpt2, 1, 2, 1));
}

static void a_rank_that_falls_silent_is_named(void **state)
{
    World *w = world_new(&toy_gpt2, 2, 1, 1);
    w->silences = true;
    w->steps = UINT32_MAX;
    w->stop_rank = 0;
    w->stop_step = 0;
    run(w, 0, 1500000);
    assert_names(&w->ranks[0], "rank-1");
    assert_names(&w->ranks[1], "rank-0");
    world_free(w);
}

/* ---- on devices of one process, which form groups ---- */

static World *world_on_devices(uint32_t dp, uint32_t pp, uint32_t tp)
{
    World *w = world_new(&toy_gpt2, dp, pp, tp);
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        w->devices[r] = device_open_module(device_module_cpu(), r, NULL);
        assert_non_null(w->devices[r]);
    }
    return w;
}

static void assert_says(const Rank *rank, const char *const *words)
{
    assert_non_null(rank->error);
    for (; *words != NULL; words++) {
        if (strstr(rank->error->message, *words) == NULL) {
            fail_msg("\"%s\" does not say \"%s\"", rank->error->message, *words);
        }
    }
}

/* What failed on the way goes on from its checkpoint as if nothing had been: two tensor ranks, one
 * of whose devices fails in the step after it. */
static void a_dead_device_is_named_and_the_job_goes_on(void **state)
{
    World *undisturbed = world_on_devices(1, 1, 2), *w = world_on_devices(1, 1, 2),
          *again = world_on_devices(1, 1, 2);
    run(undisturbed, 0, 0);
    assert_same(undisturbed, undisturbed, 0);
    w->stop_rank = 0;
    w->stop_step = 3; /* its checkpoint is the third step's */
    w->point = "device-fail-1";
    w->argument = -(int64_t)DEVICE_ECC;
    w->steps = UINT32_MAX;
    run(w, 0, 0);
    failpoint_set(w->point, false, 0);
    for (uint32_t r = 0; r < 2; r++) {
        assert_says(&w->ranks[r], (const char *[]){"cpu:1 (host)", "uncorrectable", NULL});
    }
    g_autoptr(GPtrArray) parts = g_ptr_array_new();
    for (uint32_t r = 0; r < 2; r++) {
        assert_true(w->ranks[r].snapshots->len > 0);
        g_ptr_array_add(parts, w->ranks[r].snapshots->pdata[0]);
    }
    again->from = parts;
    run(again, 3, 0);
    assert_same(again, undisturbed, 3);
    world_free(again);
    world_free(w);
    world_free(undisturbed);
}

/* The fail point on after the first step: the job ends, and all ranks say all of `words`. */
static void assert_ends(World *w, const char *point, int64_t argument, int64_t wait_deadline_us,
                        const char *const *words)
{
    w->stop_rank = 0;
    w->stop_step = 0;
    w->steps = UINT32_MAX;
    w->point = point;
    w->argument = argument;
    run(w, 0, wait_deadline_us);
    failpoint_set(point, false, 0);
    for (uint32_t r = 0; r < w->n_ranks; r++) {
        assert_says(&w->ranks[r], words);
    }
    world_free(w);
}

static void a_group_that_ends_names_the_rank(void **state)
{
    const char *const words[] = {"rank 1: fail point device-group-fail", NULL};
    assert_ends(world_on_devices(1, 1, 2), "device-group-fail", 1, 0, words);
    assert_ends(world_on_devices(2, 1, 1), "device-group-fail", 1, 0, words);
}

/* The hosts live, a stream stands: all ranks answer each other, so nobody is accused. */
static void a_stream_that_stands(void **state)
{
    const char *const words[] = {"which every rank of the group waits in", NULL};
    assert_ends(world_on_devices(1, 1, 2), "device-group-hold", 1, 3000000, words);
    assert_ends(world_on_devices(2, 1, 1), "device-group-hold", 1, 3000000, words);
}

/* It does not answer the others, either: it is named. */
static void a_rank_that_is_cut_off_in_a_sum_is_named(void **state)
{
    World *w = world_on_devices(1, 1, 2);
    w->silences = true;
    w->steps = UINT32_MAX;
    w->stop_rank = 0;
    w->stop_step = 0;
    w->point = "device-group-hold";
    w->argument = 1;
    run(w, 0, 1500000);
    failpoint_set(w->point, false, 0);
    assert_names(&w->ranks[0], "rank-1");
    assert_names(&w->ranks[1], "rank-0");
    world_free(w);
}

static void a_rank_that_leaves_its_group_is_named(void **state)
{
    static const uint32_t shapes[][3] = {{1, 1, 2}, {2, 1, 1}, {1, 2, 2}};
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        names_who_leaves(world_on_devices(shapes[i][0], shapes[i][1], shapes[i][2]));
    }
}

static bool feed_fails(void *user, bool validation, uint64_t first, uint64_t n, uint32_t *out,
                       GError **error)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "no tokens today");
    return false;
}

/* What goes wrong before the start is told, and what the owner says is what is reported. */
static void ends_before_the_start(void **state)
{
    World *w = world_new(&toy_gpt2, 1, 1, 2);
    for (uint32_t r = 0; r < 2; r++) {
        TrainEngineOptions options = engine_options(w, r, 0);
        options.feed.tokens = r == 0 ? feed_fails : feed_tokens;
        w->ranks[r].engine = train_engine_new(&options, NULL);
        assert_non_null(w->ranks[r].engine);
    }
    g_autoptr(GError) why = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_STALE, "the epoch 5 ended");
    train_engine_abort(w->ranks[1].engine, why);
    assert_true(main_loop_run_until(w->main, &w->settled, PATIENCE_US));
    assert_string_equal(w->ranks[0].error->message, "no tokens today");
    assert_string_equal(w->ranks[1].error->message, "the epoch 5 ended");
    train_engine_free(w->ranks[0].engine);
    train_engine_free(w->ranks[1].engine);
    world_free(w);
}

/* Before anything is computed, by every rank. */
static void an_id_beyond_the_vocabulary_is_refused(void **state)
{
    static const char *const names[] = {"data.train", "data.validation"};
    const uint32_t vocabulary = (uint32_t)toy_gpt2.config.vocabulary;
    for (unsigned i = 0; i < 2; i++) {
        World *w = world_new(&toy_gpt2, 1, 1, 2);
        w->bad_id[i] = vocabulary;
        run(w, 0, 0);
        g_autofree char *id = g_strdup_printf("token 70 has id %u", vocabulary);
        for (uint32_t r = 0; r < 2; r++) {
            assert_false(w->ranks[r].loaded);
            assert_says(&w->ranks[r], (const char *[]){names[i], id, NULL});
            assert_int_equal(w->ranks[r].error->code, WEFT_ERROR_INVALID);
        }
        world_free(w);
    }
}

/* A step of GPT-2 that takes minutes on any host; a model of thousands of parameters. */
static void slow_steps_are_waited_for(void **state)
{
    const ModelConfig gpt2 = {.family = FAMILY_GPT2,
                              .layers = 12,
                              .width = 768,
                              .heads = 12,
                              .ffn_width = 3072,
                              .vocabulary = 50257,
                              .context = 1024};
    g_autoptr(ModelSpec) large = model_spec_from_config(&gpt2, NULL);
    g_autoptr(ModelSpec) small = toy_spec(&toy_gpt2);
    TrainWork w = {.sequences = 64, .length = 1024};
    const int64_t step_us = train_work_wait_us(&w, large);
    assert_true(step_us > INT64_C(6) * 124 * 1000000 * 64 * 1024 / 4000);
    w.length = 20;
    assert_int_equal(train_work_wait_us(&w, small), 120 * INT64_C(1000000));
    w = (TrainWork){.sequences = 64, .length = 1024, .devices = true};
    assert_in_range(train_work_wait_us(&w, large), step_us / 101, step_us / 99);
    w = (TrainWork){.sequences = 1,
                    .length = 1024,
                    .validation_every = 1,
                    .validation_sequences = 192,
                    .sample_every = 1,
                    .sample = {.n_tokens = 10}};
    assert_int_equal(train_work_wait_us(&w, large), step_us);
    w.sample.n_tokens = 384;
    assert_in_range(train_work_wait_us(&w, large), 2 * step_us, 2 * step_us + 1);
}

typedef struct Failure {
    int code, arrives;
} Failure;

static bool feed_fails_with(void *user, const char *tensor, SliceRect rect, float *out, size_t ld,
                            GError **error)
{
    g_set_error(error, WEFT_ERROR, *(const int *)user, "no weights today");
    return false;
}

static bool feed_zeros(void *user, const char *tensor, SliceRect rect, float *out, size_t ld,
                       GError **error)
{
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        memset(out + r * ld, 0, rect.n_cols * sizeof *out);
    }
    return true;
}

static bool feed_learnt(void *user, bool validation, uint64_t first, uint64_t n, uint32_t *out,
                        GError **error)
{
    for (uint64_t i = 0; i < n; i++) {
        out[i] = (uint32_t)DOCUMENT_LOSS << TRAIN_ID_BITS;
    }
    return true;
}

/* Whoever hears of it ends with the same error, where another worker would not help; a worker that
 * left is lost to the others. */
static void a_failure_arrives_as_what_it_is(void **state)
{
    static const Failure failures[] = {{WEFT_ERROR_NUMERICS, WEFT_ERROR_NUMERICS},
                                       {WEFT_ERROR_INVALID, WEFT_ERROR_INVALID},
                                       {WEFT_ERROR_MEMORY, WEFT_ERROR_MEMORY},
                                       {WEFT_ERROR_CANCELLED, WEFT_ERROR_WORKER_LOST},
                                       {WEFT_ERROR_STALE, WEFT_ERROR_WORKER_LOST}};
    for (size_t i = 0; i < G_N_ELEMENTS(failures); i++) {
        World *w = world_new(&toy_gpt2, 1, 2, 1);
        for (uint32_t r = 0; r < 2; r++) {
            TrainEngineOptions options = engine_options(w, r, 0);
            options.work.given = true;
            options.feed = (TrainFeed){feed_learnt, r == 0 ? feed_fails_with : feed_zeros,
                                       (void *)&failures[i].code};
            w->ranks[r].engine = train_engine_new(&options, NULL);
            assert_non_null(w->ranks[r].engine);
        }
        assert_true(main_loop_run_until(w->main, &w->settled, PATIENCE_US));
        const int codes[] = {failures[i].code, failures[i].arrives};
        for (uint32_t r = 0; r < 2; r++) {
            assert_says(&w->ranks[r], (const char *[]){"no weights today", NULL});
            assert_int_equal(w->ranks[r].error->code, codes[r]);
            train_engine_free(g_steal_pointer(&w->ranks[r].engine));
        }
        world_free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_layout_gives_the_same),
        cmocka_unit_test(a_replica_without_samples),
        cmocka_unit_test(a_slow_checkpoint_is_waited_for),
        cmocka_unit_test(goes_on_from_any_layout),
        cmocka_unit_test(f16_goes_on_with_its_scale),
        cmocka_unit_test(a_rank_that_leaves_is_named),
        cmocka_unit_test(a_rank_that_falls_silent_is_named),
        cmocka_unit_test(ends_before_the_start),
        cmocka_unit_test(an_id_beyond_the_vocabulary_is_refused),
        cmocka_unit_test(slow_steps_are_waited_for),
        cmocka_unit_test(a_failure_arrives_as_what_it_is),
        cmocka_unit_test(a_dead_device_is_named_and_the_job_goes_on),
        cmocka_unit_test(a_group_that_ends_names_the_rank),
        cmocka_unit_test(a_stream_that_stands),
        cmocka_unit_test(a_rank_that_is_cut_off_in_a_sum_is_named),
        cmocka_unit_test(a_rank_that_leaves_its_group_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
