#include "tests/unit/worker/train_runs.h"

#include "proto/base/error.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <setjmp.h>
#include <stdarg.h>
#include <math.h>
#include <string.h>

#include <cmocka.h>

enum {
    VALIDATED = 5,
    VALIDATED_SLOWLY = 11,
    HELLO_BYTES = 4096, /* early messages before ranks say what may be ahead */
};

typedef struct RunRank {
    struct Run *run;
    TrainPosition position;
    LinkPort *port;
    Link *links[RUN_RANKS_LIMIT];
    TrainLinks *train_links;
    pthread_t thread;
    RunResult result; /* [0] of the arrays by rank */
    GError *error;
} RunRank;

typedef struct Run {
    const Toy *toy;
    const RunSpread *spread;
    uint32_t n_steps, n_ranks;
    void (*define)(TrainRankOptions *options);
    const ModelSpec *spec;
    const TokenData *data;
    Plan *plan;
    LinkFill *fill;
    atomic_uint_fast64_t begun[2]; /* the sample that a stage validates: of RunSpread.slow_end */
    atomic_bool too_far;
    atomic_bool failed; /* some rank: the others do not wait for it */
    pthread_barrier_t built;
    RunRank ranks[RUN_RANKS_LIMIT];
} Run;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    train_links_receive(((RunRank *)user)->train_links, link, header, payload);
}

static void on_dead(Link *link, const char *why, void *user) {}

static void connect_ranks(Run *run)
{
    for (uint32_t a = 0; a < run->n_ranks; a++) {
        for (uint32_t b = 0; b < run->n_ranks; b++) {
            if (a != b) {
                g_autoptr(GBytes) address = link_port_address(run->ranks[b].port);
                const LinkConnect connect = {
                    .address = address, .handle = 1 + MIN(a, b) * 64 + MAX(a, b), .peer = b};
                run->ranks[a].links[b] = link_connect(run->ranks[a].port, &connect, NULL);
                assert_non_null(run->ranks[a].links[b]);
            }
        }
    }
}

static void open_ranks(Run *run)
{
    const TrainPosition all = train_position(run->plan, 0, 0, 0);
    run->n_ranks = train_world(&all);
    run->fill = link_fill_inproc_new();
    assert_true(run->n_ranks <= RUN_RANKS_LIMIT);
    for (uint32_t r = 0; r < run->n_ranks; r++) {
        RunRank *rank = &run->ranks[r];
        const LinkPortOptions port = {
            .fill = run->fill, .receive = on_receive, .dead = on_dead, .user = rank};
        rank->run = run;
        rank->position =
            train_position(run->plan, r / (all.pp * all.tp), r / all.tp % all.pp, r % all.tp);
        rank->port = link_port_open(&port, NULL);
    }
    connect_ranks(run);
    for (uint32_t r = 0; r < run->n_ranks; r++) {
        RunRank *rank = &run->ranks[r];
        const TrainLinksOptions links = {.port = rank->port,
                                         .links = rank->links,
                                         .position = rank->position,
                                         .plan = run->plan,
                                         .abort = &run->failed,
                                         .yield = true,
                                         .early_bytes = HELLO_BYTES};
        rank->train_links = train_links_new(&links);
    }
}

static void close_ranks(Run *run)
{
    for (uint32_t r = 0; r < run->n_ranks; r++) {
        train_links_free(run->ranks[r].train_links);
        link_port_close(run->ranks[r].port);
    }
    link_fill_free(run->fill);
    plan_free(run->plan);
}

/* ---- state by logical tensor ---- */

RunState *run_state_new(const ModelSpec *spec)
{
    RunState *s = g_new0(RunState, 1);
    s->weights = parameters_new(spec, false, NULL);
    s->first = parameters_new(spec, false, NULL);
    s->second = parameters_new(spec, false, NULL);
    s->written = g_new0(uint8_t, s->weights->n_floats);
    return s;
}

void run_state_free(RunState *s)
{
    parameters_free(s->weights);
    parameters_free(s->first);
    parameters_free(s->second);
    g_free(s->written);
    g_free(s);
}

/* A piece's rows between the rank's arenas and the whole ones. */
static void copy_piece(const OwnedPiece *piece, Parameters *whole, float *rows, bool save)
{
    for (uint32_t r = 0; r < piece->rect.n_rows; r++) {
        float *at = whole->floats + holding_at(whole->holding, piece->tensor, piece->rect.row0 + r,
                                               piece->rect.col0),
              *mine = rows + (size_t)r * piece->rect.n_cols;
        memcpy(save ? at : mine, save ? mine : at, piece->rect.n_cols * sizeof *at);
    }
}

static void count_piece(const OwnedPiece *piece, RunState *s)
{
    for (uint32_t r = 0; r < piece->rect.n_rows; r++) {
        uint8_t *at = s->written + holding_at(s->weights->holding, piece->tensor,
                                              piece->rect.row0 + r, piece->rect.col0);
        for (uint32_t c = 0; c < piece->rect.n_cols; c++) {
            at[c]++;
        }
    }
}

/* Ranks save different pieces, at the same time. */
static void save_state(TrainRank *t, RunState *s, bool is_first)
{
    const GArray *pieces = train_rank_ownership(t)->pieces;
    Optimizer *optimizer = train_rank_optimizer(t);
    g_assert_true(train_rank_settle(t, NULL));
    for (uint32_t i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        if (piece->counts) {
            copy_piece(piece, s->weights, train_rank_weights(t)->floats + piece->at, true);
            copy_piece(piece, s->first, optimizer_first(optimizer) + piece->kept, true);
            copy_piece(piece, s->second, optimizer_second(optimizer) + piece->kept, true);
            count_piece(piece, s);
        }
    }
    if (is_first) {
        s->progress = *train_rank_progress(t);
    }
}

static void load_state(TrainRank *t, const RunState *s)
{
    const GArray *pieces = train_rank_ownership(t)->pieces;
    Optimizer *optimizer = train_rank_optimizer(t);
    toy_cut(train_rank_weights_to_restore(t), s->weights);
    for (uint32_t i = 0; i < pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(pieces, OwnedPiece, i);
        copy_piece(piece, s->first, optimizer_first(optimizer) + piece->kept, false);
        copy_piece(piece, s->second, optimizer_second(optimizer) + piece->kept, false);
    }
    train_rank_restore(t, &s->progress);
}

/* ---- a validation whose last stage is slow ---- */

typedef struct SlowSource {
    RunRank *rank;
    const SampleSource *of;
} SlowSource;

static bool first_stage_stands(const Run *run)
{
    const Group *group = run->ranks[0].train_links->from_next.turns.group;
    return atomic_load(&run->begun[0]) == VALIDATED_SLOWLY - 1 ||
           group_waits_for(group, NULL, NULL) >= 0;
}

static void read_slowly(void *user, uint64_t sample, uint32_t *tokens, uint32_t *targets)
{
    const SlowSource *slow = user;
    Run *run = slow->rank->run;
    const uint32_t stage = slow->rank->position.stage;
    atomic_store(&run->begun[stage], sample);
    if (stage == 0 && sample > atomic_load(&run->begun[1]) + RUN_AHEAD) {
        atomic_store(&run->too_far, true);
    }
    while (stage == 1 && !first_stage_stands(run)) {
        link_port_progress(slow->rank->port);
        sched_yield();
    }
    slow->of->read(slow->of->user, sample % VALIDATED, tokens, targets);
}

static bool validate_slowly(RunRank *rank, TrainRank *t, const SampleSource *source)
{
    float loss;
    SlowSource slow = {rank, source};
    SampleSource slowly = *source;
    slowly.user = &slow;
    slowly.read = read_slowly;
    if (!train_rank_validate(t, &slowly, VALIDATED_SLOWLY, &loss, &rank->error)) {
        return false;
    }
    if (atomic_load(&rank->run->too_far)) {
        g_set_error(&rank->error, G_FILE_ERROR, 0, "the first stage was more than %d samples ahead",
                    RUN_AHEAD);
    }
    return rank->error == NULL;
}

static bool run_steps(RunRank *rank, TrainRank *t)
{
    RunResult *result = &rank->result;
    for (uint32_t i = 0; i < rank->run->n_steps; i++) {
        TrainStep out;
        if (!train_rank_step(t, &out, &rank->error)) {
            return false;
        }
        result->losses[i] = out.loss;
        result->norms[i] = out.gradient_norm;
        result->skipped[i] = out.skipped;
    }
    result->traffic[0] = train_links_traffic(rank->train_links);
    result->floats[0] = rank->run->n_steps > 0 ? train_rank_gradients(t)->n_floats : 0;
    result->overlapped[0] = train_rank_overlapped(t);
    result->owned[0] = train_rank_ownership(t)->n_owned;
    TokenSamples samples = {
        .data = rank->run->data, .in_order = true, .bounds = rank->run->toy->bounds};
    const SampleSource source = token_samples_source(&samples);
    return train_rank_validate(t, &source, VALIDATED, &result->validation, &rank->error) &&
           (!rank->run->spread->slow_end || validate_slowly(rank, t, &source)) &&
           train_rank_digest(t, &result->digest, &rank->error);
}

/* What the rank holds after its first step is what its plan says. */
static bool memory_is_planned(RunRank *rank, const TrainRankOptions *options, const TrainRank *t)
{
    const TrainMemory held = train_rank_memory(t);
    TrainMemory planned;
    if (!train_memory_plan(options, pool_threads(options->pool), &planned, &rank->error)) {
        return false;
    }
    /* copies of gradients, which replicas in a group of devices do not make */
    const bool fits = held.host <= planned.host;
    planned.host = fits ? held.host : planned.host;
    if (rank->run->n_steps > 0 && memcmp(&held, &planned, sizeof held) != 0) {
        g_set_error(&rank->error, G_FILE_ERROR, 0,
                    "weights, gradients, optimizer, activations: %" G_GUINT64_FORMAT
                    " %" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT
                    ", planned %" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT " %" G_GUINT64_FORMAT
                    " %" G_GUINT64_FORMAT,
                    held.weights, held.gradients, held.optimizer, held.activations, planned.weights,
                    planned.gradients, planned.optimizer, planned.activations);
        return false;
    }
    return true;
}

/* So are the micro-batches that it ran. */
static bool micro_batches_are_planned(RunRank *rank, const TrainRankOptions *options)
{
    const uint32_t planned = train_micro_batches_plan(options) * rank->run->n_steps;
    uint32_t n = 0;
    for (guint i = 0; i < options->trace->len; i++) {
        const PipelineOp *op = &g_array_index(options->trace, PipelineOpTime, i).op;
        n += op->kind == PIPELINE_FORWARD && op->chunk == 0;
    }
    if (n != planned) {
        g_set_error(&rank->error, G_FILE_ERROR, 0, "%u micro-batches in all, planned %u", n,
                    planned);
    }
    return n == planned;
}

static void *rank_main(void *user)
{
    RunRank *rank = user;
    const Run *run = rank->run;
    const RunSpread *spread = run->spread;
    const TrainPosition *p = &rank->position;
    g_autoptr(Holding) holding = holding_new(run->spec, run->plan, p->replica, p->stage, p->rank);
    TokenSamples samples = {.data = run->data, .seed = run->toy->order, .bounds = run->toy->bounds};
    const SampleSource source = token_samples_source(&samples);
    Pool *pool = pool_new(MAX(spread->threads, 1), NULL, false, 0);
    TrainRankOptions options = toy_options(run->toy, run->spec, &source);
    options.kernels = kernels_get(spread->isa);
    options.pool = pool;
    options.micro_sequences = MAX(spread->micro, 1);
    options.plan = run->plan;
    options.replica = p->replica;
    options.stage = p->stage;
    options.rank = p->rank;
    options.links = rank->train_links;
    g_autoptr(GArray) trace = g_array_new(FALSE, FALSE, sizeof(PipelineOpTime));
    options.trace = spread->traces != NULL
                        ? spread->traces[train_global(p, p->replica, p->stage, p->rank)]
                        : trace;
    if (run->define != NULL) {
        run->define(&options);
    }
    if (spread->chunks > 0) {
        options.schedule = PIPELINE_INTERLEAVED;
    }
    if (spread->change != NULL) {
        spread->change(&options);
    }
    TrainRank *t = train_rank_new(&options, toy_part(run->toy, run->spec, holding), &rank->error);
    pthread_barrier_wait(&rank->run->built);
    if (t != NULL && spread->load != NULL) {
        load_state(t, spread->load);
    }
    if (t != NULL && run_steps(rank, t) && memory_is_planned(rank, &options, t) &&
        micro_batches_are_planned(rank, &options) && spread->save != NULL) {
        save_state(t, spread->save, train_global(p, p->replica, p->stage, p->rank) == 0);
    }
    if (rank->error != NULL) {
        atomic_store(&rank->run->failed, true);
    }
    train_rank_free(t);
    pool_free(pool);
    return NULL;
}

static RunResult gather(const Run *run)
{
    RunResult all = run->ranks[0].result;
    all.n_steps = run->n_steps;
    for (uint32_t r = 0; r < run->n_ranks; r++) {
        const RunRank *rank = &run->ranks[r];
        if (rank->error != NULL &&
            !g_error_matches(rank->error, WEFT_ERROR, WEFT_ERROR_CANCELLED)) {
            fail_msg("rank %u: %s", r, rank->error->message);
        }
        assert_memory_equal(rank->result.losses, all.losses, sizeof all.losses);
        assert_memory_equal(rank->result.norms, all.norms, sizeof all.norms);
        assert_memory_equal(rank->result.skipped, all.skipped, sizeof all.skipped);
        assert_true(hash128_equal(&rank->result.digest, &all.digest));
        assert_memory_equal(&rank->result.validation, &all.validation, sizeof all.validation);
        all.traffic[r] = rank->result.traffic[0];
        all.overlapped[r] = rank->result.overlapped[0];
        all.floats[r] = rank->result.floats[0];
        all.owned[r] = rank->result.owned[0];
    }
    return all;
}

RunResult run_toy(const Toy *toy, const RunSpread *spread, uint32_t n_steps,
                  void (*define)(TrainRankOptions *options))
{
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    g_autoptr(TokenData) data = toy_data(toy);
    g_autoptr(GError) error = NULL;
    g_autofree Run *run = g_new0(Run, 1);
    *run = (Run){.toy = toy,
                 .spread = spread,
                 .n_steps = n_steps,
                 .define = define,
                 .spec = spec,
                 .data = data};
    assert_true(n_steps <= RUN_STEPS_LIMIT);
    run->plan =
        train_plan_new(spec, MAX(spread->dp, 1), MAX(spread->pp, 1), MAX(spread->tp, 1), &error);
    if (run->plan == NULL ||
        (spread->chunks > 0 && !train_plan_interleave(run->plan, spec, spread->chunks, &error))) {
        fail_msg("%s", error->message);
    }
    if (spread->edit != NULL) {
        spread->edit(run->plan);
    }
    open_ranks(run);
    pthread_barrier_init(&run->built, NULL, run->n_ranks);
    for (uint32_t r = 0; r < run->n_ranks; r++) {
        assert_int_equal(pthread_create(&run->ranks[r].thread, NULL, rank_main, &run->ranks[r]), 0);
    }
    for (uint32_t r = 0; r < run->n_ranks; r++) {
        pthread_join(run->ranks[r].thread, NULL);
    }
    pthread_barrier_destroy(&run->built);
    const RunResult result = gather(run);
    close_ranks(run);
    return result;
}

void assert_same_run(const RunResult *got, const RunResult *want)
{
    assert_int_equal(got->n_steps, want->n_steps);
    assert_memory_equal(got->losses, want->losses, want->n_steps * sizeof *want->losses);
    assert_memory_equal(got->norms, want->norms, want->n_steps * sizeof *want->norms);
    assert_memory_equal(got->skipped, want->skipped, want->n_steps * sizeof *want->skipped);
    assert_memory_equal(&got->validation, &want->validation, sizeof want->validation);
    assert_true(hash128_equal(&got->digest, &want->digest));
}

static void assert_near(float got, float want, double tolerance)
{
    assert_true(fabs((double)got / (double)want - 1.0) < tolerance);
}

void assert_close_run(const RunResult *got, const RunResult *want, double tolerance)
{
    assert_int_equal(got->n_steps, want->n_steps);
    for (uint32_t i = 0; i < want->n_steps; i++) {
        assert_near(got->losses[i], want->losses[i], tolerance);
        assert_near(got->norms[i], want->norms[i], tolerance);
    }
    assert_near(got->validation, want->validation, tolerance);
}

void plan_uneven(Plan *plan)
{
    for (uint32_t d = 0; d < plan->n_replicas; d++) {
        for (uint32_t s = 0; s < plan->replicas[d].n_stages; s++) {
            PlanRank *ranks = plan->replicas[d].stages[s].ranks;
            ranks[0].attn_count = ranks[1].attn_first = 1;
            ranks[1].attn_count = 5;
            ranks[0].ffn_count = ranks[1].ffn_first = 4;
            ranks[1].ffn_count = 1;
            ranks[0].vocab_count += ranks[1].vocab_count;
            ranks[1].vocab_first = ranks[0].vocab_count;
            ranks[1].vocab_count = 0;
        }
    }
}
