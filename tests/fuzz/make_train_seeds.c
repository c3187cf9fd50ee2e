/* Seeds of fuzz_train and fuzz_trainer: jobs and what their ranks report, ranks and what they are
 * told. */
#include "proto/model/model_config.h"
#include "proto/model/model_message.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"
#include "tests/fuzz/seeds.h"
#include "weft/v1/train.pb-c.h"

#include <glib.h>
#include <string.h>

enum { T_REPORT, T_SAVE, T_TIME };
enum { R_COMMAND, R_ESTIMATE, R_CLOSE, R_CANCEL, R_HONEST };

/* ---- training ---- */

static void add_report(Weft__V1__TrainReport__ReportCase which, void *what)
{
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    report.report_case = which;
    report.want = what; /* any member of the union */
    seed_add(T_REPORT, &report);
}

static void add_loaded(void)
{
    Weft__V1__TrainLoaded loaded = WEFT__V1__TRAIN_LOADED__INIT;
    Weft__V1__TrainRunning running = WEFT__V1__TRAIN_RUNNING__INIT;
    loaded.data_address = binary("address", 7);
    loaded.boot_id = binary(SIXTEEN, 16);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_LOADED, &loaded);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_RUNNING, &running);
}

static void add_step(uint64_t at)
{
    Weft__V1__TrainProgress step = WEFT__V1__TRAIN_PROGRESS__INIT;
    step.step = at;
    step.samples_seen = 2 * at + 2;
    step.loss = 4.5f;
    step.rate = 1e-3f;
    step.gradient_norm = 1.5f;
    step.scale = 1;
    step.seconds = 0.25;
    step.waited = 0.125;
    step.validated = at == 1;
    step.validation = 4.25f;
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_STEP, &step);
}

static void add_wants(const char *tensor, uint32_t n_columns)
{
    Weft__V1__TrainWant want = WEFT__V1__TRAIN_WANT__INIT;
    Weft__V1__TrainRect rect = WEFT__V1__TRAIN_RECT__INIT;
    want.id = 1;
    want.first = 1;
    want.n = 4;
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_WANT, &want);
    rect.row0 = 1;
    rect.n_rows = 2;
    rect.n_cols = n_columns;
    want.id = 2;
    want.n = 2 * n_columns;
    want.tensor = (char *)tensor;
    want.rect = &rect;
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_WANT, &want);
}

static void add_part(uint64_t at)
{
    const float floats[16] = {1, 2, 3};
    Weft__V1__TrainPiece piece = WEFT__V1__TRAIN_PIECE__INIT;
    Weft__V1__TrainPart part = WEFT__V1__TRAIN_PART__INIT;
    Weft__V1__TrainState state = WEFT__V1__TRAIN_STATE__INIT;
    Weft__V1__TrainRect rect = WEFT__V1__TRAIN_RECT__INIT;
    Weft__V1__TrainPlace place = WEFT__V1__TRAIN_PLACE__INIT, *places = &place;
    Weft__V1__TrainPartBegin begin = WEFT__V1__TRAIN_PART_BEGIN__INIT;
    rect.n_rows = 1;
    rect.n_cols = 16;
    piece.step = part.step = begin.step = at;
    place.tensor = piece.tensor = (char *)"weights/token_embd.weight";
    place.rect = &rect;
    begin.places = &places;
    begin.n_places = 1;
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_BEGIN, &begin);
    piece.data = binary(floats, sizeof floats);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_PIECE, &piece);
    part.samples = 2 * at;
    part.state = &state;
    state.updates = at;
    state.scale = 1;
    state.good = 1;
    state.hysteresis = 2;
    part.digest = binary(SIXTEEN, 16);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_PART, &part);
}

static void add_trace(uint64_t at)
{
    Weft__V1__TrainTrace trace = WEFT__V1__TRAIN_TRACE__INIT;
    Weft__V1__TrainTraceOp ops[2], *pointers[] = {&ops[0], &ops[1]};
    for (uint32_t i = 0; i < 2; i++) {
        weft__v1__train_trace_op__init(&ops[i]);
        ops[i].kind = i == 0 ? 1 : 4;
        ops[i].micro = 1;
        ops[i].begin_us = 1000 + 10 * i;
        ops[i].end_us = 1009 + 10 * i;
    }
    trace.step = at;
    trace.now_us = 1100;
    trace.begin_us = 990;
    trace.end_us = 1050;
    trace.ops = pointers;
    trace.n_ops = 2;
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_TRACE, &trace);
    trace.last = true;
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_TRACE, &trace);
}

static void training(const char *dir)
{
    Weft__V1__TrainDone done = WEFT__V1__TRAIN_DONE__INIT;
    done.digest = binary(SIXTEEN, 16);
    add_wants("weights/token_embd.weight", 16);
    add_loaded();
    add_step(0);
    add_step(1);
    add_part(2);
    add_step(2);
    seed_write(dir, "train", "steps");
    add_loaded();
    add_step(0);
    add_step(1);
    seed_add_byte(T_SAVE, 2);
    add_step(3);
    seed_add_byte(T_SAVE, 4);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_DONE, &done);
    seed_write(dir, "train", "to-the-end");
    add_loaded();
    seed_add_byte(T_SAVE, 2);
    seed_add_byte(T_TIME, 1);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_DONE, &done);
    add_wants("second/token_embd.weight", 16);
    add_wants("second/nothing.weight", 16);
    add_wants("first/token_embd.weight", 16);
    seed_write(dir, "train", "again");
    add_loaded();
    add_trace(0);
    add_step(0);
    add_trace(1);
    add_trace(2);
    seed_write(dir, "train", "traced");
}

/* ---- training, the worker's side ---- */

static void add_command(Weft__V1__TrainCommand__CommandCase which, void *what)
{
    Weft__V1__TrainCommand command = WEFT__V1__TRAIN_COMMAND__INIT;
    command.command_case = which;
    command.load = what; /* any member of the union */
    seed_add(R_COMMAND, &command);
}

/* A training that one rank does at once; the settings are the caller's to change. */
typedef struct TrainSeed {
    Weft__V1__Stamp stamp;
    Weft__V1__TrainLoad load;
    Weft__V1__TrainSettings settings;
    Weft__V1__TrainOptimizer optimizer;
    Weft__V1__TrainScaling scaling;
    Weft__V1__TrainState state;
    uint32_t prompt[1];
    uint32_t world;
} TrainSeed;

static void train_seed_open(TrainSeed *t, uint32_t dp, uint64_t epoch)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = 1,
                                .width = 16,
                                .heads = 2,
                                .vocabulary = 40,
                                .context = 8};
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, NULL);
    g_autoptr(Plan) plan = train_plan_new(spec, dp, 1, 1, NULL);
    PlanRank *first = &plan->replicas[0].stages[0].ranks[0];
    *t = (TrainSeed){WEFT__V1__STAMP__INIT,
                     WEFT__V1__TRAIN_LOAD__INIT,
                     WEFT__V1__TRAIN_SETTINGS__INIT,
                     WEFT__V1__TRAIN_OPTIMIZER__INIT,
                     WEFT__V1__TRAIN_SCALING__INIT,
                     WEFT__V1__TRAIN_STATE__INIT,
                     {3},
                     dp};
    g_free(first->worker);
    first->worker = g_strdup("w0");
    t->stamp.cluster = (char *)"test";
    t->stamp.generation = 1;
    t->stamp.job = (char *)"toy";
    t->stamp.epoch = epoch;
    t->load.stamp = &t->stamp;
    t->load.plan = plan_to_message(plan);
    t->load.model = model_to_message(spec, true);
    t->load.settings = &t->settings;
    t->load.seal = true;
    t->settings.sequences = t->settings.leaves = t->settings.micro_sequences = 2;
    t->settings.length = 8;
    t->settings.steps = 4;
    t->settings.seed = 7;
    t->settings.n_tokens = 64;
    t->settings.checkpoint_every = 2;
    t->settings.optimizer = &t->optimizer;
    t->optimizer.rate = 1e-3;
    t->optimizer.beta1 = 0.9;
    t->optimizer.beta2 = 0.95;
    t->optimizer.eps = 1e-8;
    t->optimizer.warmup = 1;
}

static void train_seed_clear(TrainSeed *t)
{
    weft__v1__plan__free_unpacked(t->load.plan, NULL);
    weft__v1__model__free_unpacked(t->load.model, NULL);
}

static void add_train_load(TrainSeed *t)
{
    add_command(WEFT__V1__TRAIN_COMMAND__COMMAND_LOAD, &t->load);
    seed_add_byte(R_HONEST, 255); /* until it is loaded */
}

static void add_train_start(const TrainSeed *t)
{
    uint8_t secret[32] = {5};
    Weft__V1__TrainStart start = WEFT__V1__TRAIN_START__INIT;
    Weft__V1__RankAddress ranks[2], *pointers[] = {&ranks[0], &ranks[1]};
    for (uint32_t r = 0; r < 2; r++) {
        weft__v1__rank_address__init(&ranks[r]);
        ranks[r].rank = r;
        ranks[r].worker = (char *)(r == 0 ? "w0" : "rank-1");
        ranks[r].data_address = binary("address", 7);
        ranks[r].boot_id = binary(SIXTEEN, 16);
    }
    start.secret = binary(secret, sizeof secret);
    start.ranks = pointers;
    start.n_ranks = t->world;
    add_command(WEFT__V1__TRAIN_COMMAND__COMMAND_START, &start);
}

static void add_taken(uint64_t bytes)
{
    Weft__V1__TrainTaken taken = WEFT__V1__TRAIN_TAKEN__INIT;
    taken.bytes = bytes;
    add_command(WEFT__V1__TRAIN_COMMAND__COMMAND_TAKEN, &taken);
}

static void add_estimate(TrainSeed *t)
{
    uint32_t threads[] = {1, 2};
    Weft__V1__TrainEstimateRequest request = WEFT__V1__TRAIN_ESTIMATE_REQUEST__INIT;
    request.load = &t->load;
    request.threads = threads;
    request.n_threads = 2;
    request.forward_s = 0.25;
    request.backward_s = 0.5;
    request.transfer_s = 0.125;
    seed_add(R_ESTIMATE, &request);
}

static void worker_trains(const char *dir)
{
    TrainSeed t;
    train_seed_open(&t, 1, 1);
    t.settings.n_validation_tokens = 32;
    t.settings.validation_every = 2;
    t.settings.validation_sequences = 1;
    t.settings.sample_every = 4;
    t.settings.trace_first = 1;
    t.settings.trace_steps = 2;
    t.settings.sample_tokens = 3;
    t.settings.sample_prompt = t.prompt;
    t.settings.n_sample_prompt = 1;
    add_train_load(&t);
    add_train_start(&t);
    seed_add_byte(R_HONEST, 255); /* until it is done */
    seed_add_byte(R_CLOSE, 0);
    seed_write(dir, "trainer", "to-the-end");
    train_seed_clear(&t);
}

static void worker_resumes(const char *dir)
{
    Weft__V1__TrainBytes bytes = WEFT__V1__TRAIN_BYTES__INIT;
    TrainSeed t;
    train_seed_open(&t, 1, 3);
    t.settings.first_step = 2;
    t.settings.state = &t.state;
    t.settings.scaling = &t.scaling;
    t.state.updates = 2;
    t.state.scale = t.scaling.start = 1024;
    t.scaling.least = 1;
    t.scaling.dynamic = true;
    t.scaling.growth_steps = 100;
    t.scaling.hysteresis = 2;
    add_train_load(&t);
    add_train_start(&t);
    seed_add_byte(R_HONEST, 6); /* some of its state */
    seed_add_byte(R_CANCEL, 0);
    t.stamp.epoch = 4;
    add_train_load(&t);
    add_train_start(&t);
    seed_add_byte(R_HONEST, 255);
    add_taken(1 << 20); /* nothing is on its way any more */
    train_seed_clear(&t);
    train_seed_open(&t, 2, 5);
    t.settings.steps = UINT64_C(1) << 30;
    add_train_load(&t);
    add_train_start(&t); /* the other rank never comes */
    bytes.want = 77;
    bytes.data = binary(SIXTEEN, 16);
    add_command(WEFT__V1__TRAIN_COMMAND__COMMAND_BYTES, &bytes);
    t.stamp.epoch = 4; /* stale */
    add_train_load(&t);
    add_estimate(&t);
    seed_write(dir, "trainer", "again");
    train_seed_clear(&t);
}

void make_train_seeds(const char *dir)
{
    training(dir);
    worker_trains(dir);
    worker_resumes(dir);
}
