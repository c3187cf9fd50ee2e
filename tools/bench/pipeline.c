/* bench-pipeline: one training step after the other through the stages of a pipeline, a thread a
 * stage in this process, traced; and the schedule simulator, given the times that the ops took. For
 * each schedule: idle share measured and simulated, and their difference in points; medians over
 * the steps, each column by itself.
 *
 * Wants a core a stage, and binds each stage to one. Where others run on these cores with the same
 * priority (two tools under chrt, say) a stage whose message has come waits for its core, by turns
 * of 100 ms: no schedule knows of that. So the kernel's account of the time that the stages were
 * ready and did not run is shown beside, and steps with more than STOLEN_LIMIT of it do not count
 * as long as there are others. */
#include "proto/model/model_config.h"
#include "worker/train/token_data.h"
#include "worker/train/train_rank.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

enum { STAGES_LIMIT = 8, LENGTH = 64, WARM = 1 };
#define STOLEN_LIMIT 0.02

typedef struct Setup {
    gint stages, chunks, micro, steps, layers, width;
} Setup;

typedef struct Bench Bench;

typedef struct BenchRank {
    Bench *bench;
    uint32_t stage;
    LinkPort *port;
    Link *links[STAGES_LIMIT];
    TrainLinks *train_links;
    GArray *trace;  /* of PipelineOpTime: of all steps */
    GArray *stolen; /* of double: seconds of each step that it was ready and did not run */
    int cpu;        /* -1: any */
    GError *error;
} BenchRank;

struct Bench {
    const Setup *setup;
    PipelineKind kind;
    ModelSpec *spec;
    Plan *plan;
    TokenData *data;
    LinkFill *fill;
    BenchRank ranks[STAGES_LIMIT];
};

/* ---- ranks ---- */

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    train_links_receive(((BenchRank *)user)->train_links, link, header, payload);
}

static void on_dead(Link *link, const char *why, void *user)
{
    g_printerr("a link died: %s\n", why);
    exit(1);
}

/* The stage's own of the CPUs that this process may use; -1: there are fewer than stages. */
static int stage_cpu(const Setup *setup, uint32_t stage)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) < setup->stages) {
        return -1;
    }
    int cpu = 0;
    for (uint32_t seen = 0; !CPU_ISSET(cpu, &set) || seen++ < stage; cpu++) {
    }
    return cpu;
}

static void open_links(Bench *b)
{
    const uint32_t n = (uint32_t)b->setup->stages;
    b->fill = link_fill_inproc_new();
    for (uint32_t s = 0; s < n; s++) {
        b->ranks[s] = (BenchRank){.bench = b, .stage = s};
        b->ranks[s].trace = g_array_new(FALSE, FALSE, sizeof(PipelineOpTime));
        b->ranks[s].stolen = g_array_new(FALSE, FALSE, sizeof(double));
        b->ranks[s].cpu = stage_cpu(b->setup, s);
        const LinkPortOptions port = {
            .fill = b->fill, .receive = on_receive, .dead = on_dead, .user = &b->ranks[s]};
        b->ranks[s].port = link_port_open(&port, NULL);
    }
    for (uint32_t s = 0; s < n; s++) {
        for (uint32_t o = 0; o < n; o++) {
            g_autoptr(GBytes) address = link_port_address(b->ranks[o].port);
            const LinkConnect connect = {
                .address = address, .handle = 1 + MIN(s, o) * 64 + MAX(s, o), .peer = o};
            b->ranks[s].links[o] = s == o ? NULL : link_connect(b->ranks[s].port, &connect, NULL);
        }
        const TrainLinksOptions links = {.port = b->ranks[s].port,
                                         .links = b->ranks[s].links,
                                         .position = train_position(b->plan, 0, s, 0),
                                         .plan = b->plan,
                                         .spin_us = 200};
        b->ranks[s].train_links = train_links_new(&links);
    }
}

/* Seconds that this thread was ready and did not run so far; 0 where the kernel does not say. */
static double ready_seconds(void)
{
    g_autofree char *text = NULL;
    unsigned long long ran = 0, waited = 0;
    if (!g_file_get_contents("/proc/thread-self/schedstat", &text, NULL, NULL) ||
        sscanf(text, "%llu %llu", &ran, &waited) != 2) {
        return 0.0;
    }
    return (double)waited * 1e-9;
}

static void *run_rank(void *user)
{
    BenchRank *r = user;
    const Bench *b = r->bench;
    const Setup *setup = b->setup;
    TokenSamples samples = {.data = b->data, .seed = 1};
    const SampleSource source = token_samples_source(&samples);
    Pool *pool = pool_new(1, r->cpu >= 0 ? &r->cpu : NULL, r->cpu >= 0, 0);
    g_autoptr(Holding) holding = holding_new(b->spec, b->plan, 0, r->stage, 0);
    Parameters *weights = parameters_new_part(holding, false, &r->error);
    parameters_initialise(weights, 1, pool);
    const TrainRankOptions options = {.spec = b->spec,
                                      .kernels = kernels_get(kernels_best_isa()),
                                      .pool = pool,
                                      .source = &source,
                                      .sequences = (uint32_t)setup->micro,
                                      .leaves = 1,
                                      .micro_sequences = 1,
                                      .optimizer = {.kind = OPTIMIZER_ADAMW,
                                                    .rate = 1e-4,
                                                    .beta1 = 0.9,
                                                    .beta2 = 0.95,
                                                    .eps = 1e-8,
                                                    .steps = (uint64_t)setup->steps + WARM},
                                      .plan = b->plan,
                                      .stage = r->stage,
                                      .links = r->train_links,
                                      .schedule = b->kind,
                                      .trace = r->trace};
    TrainRank *t = train_rank_new(&options, weights, &r->error);
    for (gint i = 0; t != NULL && i < setup->steps + WARM; i++) {
        TrainStep out;
        const double before = ready_seconds();
        if (!train_rank_step(t, &out, &r->error)) {
            break;
        }
        const double stolen = ready_seconds() - before;
        g_array_append_val(r->stolen, stolen);
    }
    train_rank_free(t);
    pool_free(pool);
    return NULL;
}

static void run_ranks(Bench *b)
{
    pthread_t threads[STAGES_LIMIT];
    for (gint s = 0; s < b->setup->stages; s++) {
        pthread_create(&threads[s], NULL, run_rank, &b->ranks[s]);
    }
    for (gint s = 0; s < b->setup->stages; s++) {
        pthread_join(threads[s], NULL);
    }
}

static void close_all(Bench *b)
{
    for (gint s = 0; s < b->setup->stages; s++) {
        train_links_free(b->ranks[s].train_links);
        link_port_close(b->ranks[s].port);
        g_array_unref(b->ranks[s].trace);
        g_array_unref(b->ranks[s].stolen);
        g_clear_error(&b->ranks[s].error);
    }
    link_fill_free(b->fill);
    plan_free(b->plan);
}

/* ---- what came of it ---- */

/* Of a step. */
typedef enum Column { MAKESPAN, SIMULATED, IDLE, SIMULATED_IDLE, POINTS, STOLEN, N_COLUMNS } Column;
typedef struct StepRow {
    double at[N_COLUMNS];
} StepRow;

static gint by_value(gconstpointer a, gconstpointer b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(const GArray *rows, Column column)
{
    g_autoptr(GArray) values = g_array_new(FALSE, FALSE, sizeof(double));
    for (guint i = 0; i < rows->len; i++) {
        g_array_append_val(values, g_array_index(rows, StepRow, i).at[column]);
    }
    g_array_sort(values, by_value);
    return g_array_index(values, double, values->len / 2);
}

/* Of step number `step`, of which every stage has as many ops. */
static bool compare_step(Bench *b, const Pipeline *line, guint step, PipelineComparison *out,
                         GError **error)
{
    GArray *traces[STAGES_LIMIT];
    for (uint32_t s = 0; s < line->n_stages; s++) {
        const guint n = line->stages[s]->len;
        traces[s] = g_array_new(FALSE, FALSE, sizeof(PipelineOpTime));
        g_array_append_vals(traces[s], &g_array_index(b->ranks[s].trace, PipelineOpTime, step * n),
                            n);
    }
    const bool ok = pipeline_compare(line, traces, out, error);
    for (uint32_t s = 0; s < line->n_stages; s++) {
        g_array_unref(traces[s]);
    }
    return ok;
}

/* Of all stages' time in a step. */
static double stolen_share(const Bench *b, guint step, double makespan)
{
    double sum = 0.0;
    for (gint s = 0; s < b->setup->stages; s++) {
        sum += g_array_index(b->ranks[s].stolen, double, step);
    }
    return sum / (b->setup->stages * makespan);
}

static bool report(Bench *b, GError **error)
{
    const Setup *setup = b->setup;
    const uint32_t chunks = b->kind == PIPELINE_INTERLEAVED ? (uint32_t)setup->chunks : 1;
    g_autoptr(Pipeline) line =
        pipeline_new(b->kind, (uint32_t)setup->stages, chunks, (uint32_t)setup->micro);
    g_autoptr(GArray) all = g_array_new(FALSE, FALSE, sizeof(StepRow)),
                      calm = g_array_new(FALSE, FALSE, sizeof(StepRow));
    for (guint i = WARM; i < (guint)setup->steps + WARM; i++) {
        PipelineComparison c;
        if (!compare_step(b, line, i, &c, error)) {
            return false;
        }
        const StepRow row = {{c.makespan * 1e3, c.simulated_makespan * 1e3, c.idle * 100,
                              c.simulated_idle * 100, (c.idle - c.simulated_idle) * 100,
                              stolen_share(b, i, c.makespan) * 100}};
        g_array_append_val(all, row);
        if (row.at[STOLEN] <= STOLEN_LIMIT * 100) {
            g_array_append_val(calm, row);
        }
    }
    const GArray *rows = calm->len > 0 ? calm : all;
    printf("%-12s %8.1f %8.1f %9.1f %9.1f %+8.1f %9.1f %8u\n", pipeline_name(b->kind),
           median(rows, MAKESPAN), median(rows, SIMULATED), median(rows, IDLE),
           median(rows, SIMULATED_IDLE), median(rows, POINTS), median(all, STOLEN), rows->len);
    if (calm->len == 0) {
        printf("  others ran on these cores in every step: the points are theirs, too\n");
    }
    return true;
}

static bool bench_schedule(Bench *b, GError **error)
{
    const Setup *setup = b->setup;
    b->plan = train_plan_new(b->spec, 1, (uint32_t)setup->stages, 1, error);
    if (b->plan == NULL ||
        (b->kind == PIPELINE_INTERLEAVED &&
         !train_plan_interleave(b->plan, b->spec, (uint32_t)setup->chunks, error))) {
        plan_free(b->plan);
        return false;
    }
    open_links(b);
    run_ranks(b);
    bool ok = true;
    for (gint s = 0; ok && s < setup->stages; s++) {
        ok = b->ranks[s].error == NULL;
        if (!ok) {
            g_propagate_error(error, g_steal_pointer(&b->ranks[s].error));
        }
    }
    ok = ok && report(b, error);
    close_all(b);
    return ok;
}

static bool run(const Setup *setup, GError **error)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = (uint32_t)setup->layers,
                                .width = (uint32_t)setup->width,
                                .heads = (uint32_t)setup->width / 32,
                                .ffn_width = 4 * (uint32_t)setup->width,
                                .vocabulary = 1024,
                                .context = LENGTH};
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, error);
    if (spec == NULL) {
        return false;
    }
    uint32_t ids[40 * LENGTH];
    for (uint32_t i = 0; i < G_N_ELEMENTS(ids); i++) {
        ids[i] = (i * 7919 + i * i) % config.vocabulary;
    }
    g_autoptr(TokenData) data = token_data_new(ids, G_N_ELEMENTS(ids), LENGTH, error);
    bool ok = data != NULL;
    printf("%d stages, %d micro-batches of %d tokens, %d layers of width %d, medians of %d steps\n",
           setup->stages, setup->micro, LENGTH, setup->layers, setup->width, setup->steps);
    printf("%-12s %8s %8s %9s %9s %8s %9s %8s\n", "schedule", "ms", "sim. ms", "idle %", "sim. %",
           "points", "stolen %", "steps");
    for (PipelineKind k = PIPELINE_1F1B; ok && k < PIPELINE_KIND_LIMIT; k++) {
        Bench b = {.setup = setup, .kind = k, .spec = spec, .data = data};
        ok = bench_schedule(&b, error);
    }
    return ok;
}

int main(int argc, char **argv)
{
    Setup setup = {.stages = 2, .chunks = 2, .micro = 8, .steps = 9, .layers = 8, .width = 256};
    const GOptionEntry entries[] = {
        {"stages", 0, 0, G_OPTION_ARG_INT, &setup.stages, "stages of the pipeline (2)", "N"},
        {"chunks", 0, 0, G_OPTION_ARG_INT, &setup.chunks, "interleaved: of a stage (2)", "N"},
        {"micro", 0, 0, G_OPTION_ARG_INT, &setup.micro, "micro-batches of a step (8)", "N"},
        {"steps", 0, 0, G_OPTION_ARG_INT, &setup.steps, "steps that are measured (9)", "N"},
        {"layers", 0, 0, G_OPTION_ARG_INT, &setup.layers, "of the model (8)", "N"},
        {"width", 0, 0, G_OPTION_ARG_INT, &setup.width, "a multiple of 32 (256)", "N"},
        {NULL},
    };
    g_autoptr(GError) error = NULL;
    GOptionContext *context = g_option_context_new("- a pipeline beside its simulation");
    g_option_context_add_main_entries(context, entries, NULL);
    bool ok = g_option_context_parse(context, &argc, &argv, &error);
    g_option_context_free(context);
    if (ok && (setup.stages < 2 || setup.stages > STAGES_LIMIT || setup.micro < 1 ||
               setup.steps < 1 || setup.width < 32 || setup.layers < 1)) {
        g_set_error(&error, G_OPTION_ERROR, G_OPTION_ERROR_BAD_VALUE,
                    "stages 2 to %d, width 32 or more, the others 1 or more", STAGES_LIMIT);
        ok = false;
    }
    ok = ok && run(&setup, &error);
    if (!ok) {
        g_printerr("bench-pipeline: %s\n", error->message);
    }
    return ok ? 0 : 1;
}
