/* Seeds of fuzz_coordinator, fuzz_train, fuzz_trainer and fuzz_worker: one honest course of each
 * call, so that mutation starts behind every door.
 *
 * usage: make-fuzz-seeds CORPUS_DIR */
#include "proto/base/version.h"
#include "proto/model/model_config.h"
#include "proto/model/model_message.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"
#include "tests/fuzz/calls.h"
#include "tests/unit/worker/tiny_model.h"
#include "weft/v1/admin.pb-c.h"
#include "weft/v1/cluster.pb-c.h"
#include "weft/v1/join.pb-c.h"
#include "weft/v1/serve.pb-c.h"
#include "weft/v1/train.pb-c.h"

#include "grpc/health.pb-c.h"
#include "grpc/reflection_v1.pb-c.h"

#include <glib/gstdio.h>
#include <string.h>

/* The kinds of the targets. */
enum {
    STATUS,
    PLAN,
    CREATE_TOKEN,
    REVOKE,
    DRAIN,
    UNLOAD,
    STOP,
    RUN,
    C_FETCH,
    RENEW,
    JOIN,
    C_CHECK,
    C_WATCH,
    C_REFLECTION,
    REPORT,
    END_OF_REPORTS,
    PROGRESS,
    TOKEN,
    C_TIME
};
enum {
    LOAD,
    START,
    DROP,
    GENERATE,
    W_FETCH,
    W_CHECK,
    W_WATCH,
    W_REFLECTION,
    NOTICE,
    CHUNK,
    READY,
    W_TIME
};
enum { T_REPORT, T_SAVE, T_TIME };
enum { R_COMMAND, R_ESTIMATE, R_CLOSE, R_CANCEL, R_HONEST };

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

static GByteArray *seed;

static void add(uint8_t kind, const void *message)
{
    const ProtobufCMessage *base = message;
    const size_t size = protobuf_c_message_get_packed_size(base);
    g_autofree uint8_t *bytes = g_malloc(size + 1);
    protobuf_c_message_pack(base, bytes);
    records_append(seed, kind, bytes, size);
}

static void add_bytes(uint8_t kind, uint8_t byte)
{
    records_append(seed, kind, &byte, 1);
}

static void write_seed(const char *dir, const char *target, const char *name)
{
    g_autofree char *folder = g_build_filename(dir, target, NULL);
    g_autofree char *path = g_build_filename(folder, name, NULL);
    g_autoptr(GError) error = NULL;
    g_mkdir_with_parents(folder, 0755);
    if (!g_file_set_contents(path, (const char *)seed->data, seed->len, &error)) {
        g_error("%s", error->message);
    }
    g_byte_array_set_size(seed, 0);
}

static ProtobufCBinaryData binary(const void *data, size_t size)
{
    return (ProtobufCBinaryData){size, (uint8_t *)data};
}

static const uint8_t SIXTEEN[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

/* Two slices of one tensor of the file SIXTEEN. */
static void add_fetch(uint8_t kind, uint64_t slice_key)
{
    Weft__V1__SliceRef ref = WEFT__V1__SLICE_REF__INIT, *refs[] = {&ref, &ref};
    ref.tensor = 1;
    Weft__V1__FetchRequest fetch = WEFT__V1__FETCH_REQUEST__INIT;
    fetch.file_hash = binary(SIXTEEN, 16);
    fetch.slices = refs;
    fetch.n_slices = 2;
    fetch.slice_key = slice_key;
    add(kind, &fetch);
}

static void add_health(uint8_t check, uint8_t watch, const char *service)
{
    Grpc__Health__V1__HealthCheckRequest health = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    health.service = (char *)service;
    add(check, &health);
    add(watch, &health);
}

/* ---- the coordinator ---- */

static void add_run(Weft__V1__RunRequest *run)
{
    run->model = (char *)"tiny.gguf";
    if (run->kind == WEFT__V1__REQUEST_KIND__GENERATE) {
        run->max_tokens = 4;
    }
    add(RUN, run);
}

static void coordinator_runs(const char *dir)
{
    Weft__V1__Sampler sampler = WEFT__V1__SAMPLER__INIT;
    sampler.temperature = 0.8f;
    sampler.top_k = 40;
    sampler.top_p = 0.9f;
    sampler.repeat_penalty = 1.1f;
    sampler.penalty_window = 64;
    sampler.seed = 7;
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.dp = layout.pp = layout.tp = 1;
    char *stops[] = {(char *)"zz", (char *)"\n\n"};
    Weft__V1__RunRequest run = WEFT__V1__RUN_REQUEST__INIT;
    run.prompt = (char *)"abc";
    run.sampler = &sampler;
    run.seed_given = true;
    run.layout = &layout;
    run.stop = stops;
    run.n_stop = 2;
    run.numerics = (char *)"exact";
    run.context = 32;
    run.streams = 2;
    run.top_logprobs = 2;
    run.deadline_ms = 4000;
    add_run(&run);
    add_bytes(C_TIME, 20);
    write_seed(dir, "coordinator", "run-prompt");

    Weft__V1__ChatMessage chat = WEFT__V1__CHAT_MESSAGE__INIT, *messages[] = {&chat, &chat};
    chat.role = (char *)"user";
    chat.content = (char *)"hello";
    weft__v1__run_request__init(&run);
    run.messages = messages;
    run.n_messages = 2;
    run.raw_special = true;
    add_run(&run);
    add_bytes(C_TIME, 20);
    write_seed(dir, "coordinator", "run-chat");

    weft__v1__run_request__init(&run);
    run.kind = WEFT__V1__REQUEST_KIND__SCORE;
    run.prompt = (char *)"the quick brown fox jumps over";
    run.score_window = 8;
    add_run(&run);
    add_bytes(C_TIME, 20);
    write_seed(dir, "coordinator", "run-score");

    weft__v1__run_request__init(&run);
    run.random_prompt = 8;
    run.ignore_end = true;
    run.streams = 3;
    add_run(&run);
    add_bytes(C_TIME, 20);
    write_seed(dir, "coordinator", "run-random");
}

/* w0 answers as it likes. */
static void coordinator_answers(const char *dir)
{
    Weft__V1__LoadProgress progress = WEFT__V1__LOAD_PROGRESS__INIT;
    progress.bytes_done = progress.bytes_total = 100;
    add(PROGRESS, &progress);
    progress.loaded = true;
    progress.data_address = binary("w0", 2);
    progress.boot_id = binary(SIXTEEN, 16);
    add(PROGRESS, &progress);
    Weft__V1__TokenEvent token = WEFT__V1__TOKEN_EVENT__INIT;
    Weft__V1__TopLogprob top = WEFT__V1__TOP_LOGPROB__INIT, *tops[] = {&top};
    top.id = 5;
    top.logprob = -2;
    token.row_hash = binary(SIXTEEN, 16);
    token.logits = binary(SIXTEEN, 16);
    token.trace = binary(SIXTEEN, 16);
    token.top = tops;
    token.n_top = 1;
    for (uint32_t i = 0; i < 3; i++) {
        token.position = 3 + i;
        token.id = 'a' + i;
        token.logprob = -1;
        add(TOKEN, &token);
    }
    add(TOKEN, &token); /* the last one again */
    Weft__V1__TokenEvent done = WEFT__V1__TOKEN_EVENT__INIT;
    done.done = true;
    done.finish_reason = (char *)"length";
    done.prefill_us = 10;
    done.decode_us = 20;
    done.wire_bytes = 30;
    add(TOKEN, &done);
    uint32_t ids[] = {1, 2, 3};
    char *stops[] = {(char *)"cd"};
    Weft__V1__RunRequest run = WEFT__V1__RUN_REQUEST__INIT;
    run.prompt_ids = ids;
    run.n_prompt_ids = 3;
    run.stop = stops;
    run.n_stop = 1;
    run.want_logits = run.trace = true;
    add_run(&run);
    add_bytes(C_TIME, 10);
    write_seed(dir, "coordinator", "answers");
}

static void coordinator_reports(const char *dir)
{
    Weft__V1__Held held = WEFT__V1__HELD__INIT, *helds[] = {&held};
    held.job = (char *)"tiny-0001";
    held.epoch = 1;
    held.state = (char *)"failed";
    held.error = (char *)"engine stuck";
    Weft__V1__PackedSize packed = WEFT__V1__PACKED_SIZE__INIT, *packeds[] = {&packed};
    packed.block_bytes = 4;
    Weft__V1__Measured measured = WEFT__V1__MEASURED__INIT;
    measured.read_bytes_per_s = 1e10;
    measured.int8_ops_per_s = 1e11;
    measured.f32_ops_per_s = 5e10;
    measured.link_latency_s = 1e-5;
    measured.link_bytes_per_s = 1e9;
    Weft__V1__Hello hello = WEFT__V1__HELLO__INIT;
    hello.protocol_version = WEFT_PROTOCOL_VERSION;
    hello.release = (char *)"1";
    hello.numerics_version = WEFT_NUMERICS_VERSION;
    hello.numerics_classes = 1;
    hello.boot_id = binary(SIXTEEN, 16);
    hello.control_address = (char *)"w1:1";
    hello.host = (char *)"host";
    hello.isa = (char *)"generic";
    hello.cpu = (char *)"cpu";
    hello.threads = 2;
    hello.memory_bytes = 1u << 30;
    hello.packed = packeds;
    hello.n_packed = 1;
    hello.measured = &measured;
    hello.held = helds;
    hello.n_held = 1;
    Weft__V1__WorkerReport report = WEFT__V1__WORKER_REPORT__INIT;
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HELLO;
    report.hello = &hello;
    add(REPORT, &report);
    Weft__V1__Counters counters = WEFT__V1__COUNTERS__INIT;
    counters.steps = counters.rows = 3;
    Weft__V1__Waiting waiting = WEFT__V1__WAITING__INIT, *waitings[] = {&waiting};
    waiting.job = (char *)"tiny-0001";
    waiting.epoch = 1;
    waiting.waits_for = (char *)"w0";
    waiting.operation = (char *)"a step";
    waiting.since_ms = 3000;
    waiting.expired = true;
    Weft__V1__Heartbeat heartbeat = WEFT__V1__HEARTBEAT__INIT;
    heartbeat.sequence = 1;
    heartbeat.held = helds;
    heartbeat.n_held = 1;
    heartbeat.waiting = waitings;
    heartbeat.n_waiting = 1;
    heartbeat.counters = &counters;
    heartbeat.serving = true;
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HEARTBEAT;
    report.heartbeat = &heartbeat;
    add(REPORT, &report);
    Weft__V1__RenewRequest renew = WEFT__V1__RENEW_REQUEST__INIT;
    renew.csr_pem = binary("CSR", 3);
    add(RENEW, &renew);
    /* w1 is in the plan now, and its address leads nowhere. */
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.pp = 2;
    layout.tp = 1;
    Weft__V1__RunRequest run = WEFT__V1__RUN_REQUEST__INIT;
    run.prompt = (char *)"a";
    run.layout = &layout;
    add_run(&run);
    add(REPORT, &report);
    records_append(seed, END_OF_REPORTS, NULL, 0);
    add_bytes(C_TIME, 8);
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HELLO;
    report.hello = &hello;
    add(REPORT, &report); /* on the stream that ended */
    write_seed(dir, "coordinator", "reports");
}

static void coordinator_admin(const char *dir)
{
    Weft__V1__StatusRequest status = WEFT__V1__STATUS_REQUEST__INIT;
    status.details = true;
    add(STATUS, &status);
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.dp = layout.pp = layout.tp = 1;
    Weft__V1__PlanRequest plan = WEFT__V1__PLAN_REQUEST__INIT;
    plan.model = (char *)"tiny";
    plan.layout = &layout;
    plan.context = 32;
    plan.streams = 2;
    plan.numerics = (char *)"exact";
    add(PLAN, &plan);
    Weft__V1__CreateTokenRequest token = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    token.role = (char *)"worker";
    token.ttl_ms = 1000;
    token.uses = 2;
    add(CREATE_TOKEN, &token);
    Weft__V1__DrainRequest drain = WEFT__V1__DRAIN_REQUEST__INIT;
    drain.node = (char *)"w0";
    drain.reason = (char *)"cleaning";
    add(DRAIN, &drain);
    drain.undrain = true;
    add(DRAIN, &drain);
    Weft__V1__UnloadRequest unload = WEFT__V1__UNLOAD_REQUEST__INIT;
    unload.model = (char *)"tiny.gguf";
    add(UNLOAD, &unload);
    Weft__V1__RevokeRequest revoke = WEFT__V1__REVOKE_REQUEST__INIT;
    revoke.node = (char *)"w0";
    add(REVOKE, &revoke);
    Weft__V1__StopRequest stop = WEFT__V1__STOP_REQUEST__INIT;
    add(STOP, &stop);
    write_seed(dir, "coordinator", "admin");
}

static void coordinator_rest(const char *dir)
{
    char *addresses[] = {(char *)"127.0.0.1", (char *)"::1"};
    Weft__V1__JoinRequest join = WEFT__V1__JOIN_REQUEST__INIT;
    join.protocol_version = WEFT_PROTOCOL_VERSION;
    join.release = (char *)"1";
    join.token = (char *)"TOKEN";
    join.name = (char *)"w7";
    join.csr_pem = binary("CSR", 3);
    join.addresses = addresses;
    join.n_addresses = 2;
    join.caller = (char *)"worker";
    add(JOIN, &join);
    join.csr_pem = binary("no request", 10);
    add(JOIN, &join);
    write_seed(dir, "coordinator", "join");

    Weft__V1__PlanRequest plan = WEFT__V1__PLAN_REQUEST__INIT;
    plan.model = (char *)"tiny";
    add(PLAN, &plan); /* opens the file */
    add_fetch(C_FETCH, 9);
    write_seed(dir, "coordinator", "fetch");

    add_health(C_CHECK, C_WATCH, "weft.v1.Admin");
    Grpc__Reflection__V1__ServerReflectionRequest r =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    r.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
    r.list_services = (char *)"*";
    add(C_REFLECTION, &r);
    r.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    r.file_containing_symbol = (char *)"weft.v1.Admin.Status";
    add(C_REFLECTION, &r);
    write_seed(dir, "coordinator", "health-reflection");
}

/* ---- the worker ---- */

static TinyModel *model(void)
{
    static const TinyShape shape = {1,          64,         2,          1,    32,    64,   600,
                                    DTYPE_Q8_0, DTYPE_Q8_0, DTYPE_Q8_0, true, false, false};
    return tiny_model_new(&shape, 5); /* fuzz_worker.c has the same */
}

static void fill_stamp(Weft__V1__Stamp *stamp, uint64_t epoch)
{
    weft__v1__stamp__init(stamp);
    stamp->cluster = (char *)"test";
    stamp->generation = 1;
    stamp->job = (char *)"job";
    stamp->epoch = epoch;
}

static void add_load(const TinyModel *m, const Plan *plan, uint64_t epoch)
{
    char *sources[] = {(char *)"peer", (char *)"coordinator"};
    Weft__V1__Stamp stamp;
    fill_stamp(&stamp, epoch);
    Weft__V1__LoadRequest load = WEFT__V1__LOAD_REQUEST__INIT;
    load.stamp = &stamp;
    load.plan = plan_to_message(plan);
    load.model = tiny_model_message(m, "tiny.gguf");
    load.sources = sources;
    load.n_sources = 2;
    load.seal = true;
    load.slice_key = 3;
    add(LOAD, &load);
    weft__v1__plan__free_unpacked(load.plan, NULL);
    weft__v1__model__free_unpacked(load.model, NULL);
}

static void add_start(uint64_t epoch, uint32_t n_ranks)
{
    static const uint8_t secret[32] = {9};
    Weft__V1__Stamp stamp;
    fill_stamp(&stamp, epoch);
    Weft__V1__RankAddress ranks[2], *pointers[2];
    for (uint32_t i = 0; i < n_ranks; i++) {
        weft__v1__rank_address__init(&ranks[i]);
        ranks[i].rank = i;
        ranks[i].worker = (char *)(i == 0 ? "w0" : "w1");
        ranks[i].data_address = binary(SIXTEEN, 8); /* an address of inproc */
        ranks[i].boot_id = binary(SIXTEEN, 16);
        ranks[i].host = (char *)"host";
        pointers[i] = &ranks[i];
    }
    Weft__V1__StartRequest start = WEFT__V1__START_REQUEST__INIT;
    start.stamp = &stamp;
    start.secret = binary(secret, sizeof secret);
    start.ranks = pointers;
    start.n_ranks = n_ranks;
    add(START, &start);
}

static void worker_loads(const char *dir)
{
    static const double even[] = {1, 1};
    TinyModel *m = model();
    g_autoptr(Plan) alone = tiny_plan(m->spec, 1, (uint32_t[]){1}, even);
    add_load(m, alone, 1);
    add_bytes(W_TIME, 10);
    add_start(1, 1);
    add_bytes(W_TIME, 5);
    write_seed(dir, "worker", "load-start");

    g_autoptr(Plan) pair = tiny_plan(m->spec, 1, (uint32_t[]){2}, even);
    add_load(m, pair, 2);
    add_bytes(W_TIME, 10);
    add_start(2, 2);
    add_bytes(W_TIME, 5);
    add_load(m, pair, 3); /* a newer epoch takes over */
    Weft__V1__Stamp stamp;
    fill_stamp(&stamp, 3);
    Weft__V1__DropRequest drop = WEFT__V1__DROP_REQUEST__INIT;
    drop.stamp = &stamp;
    drop.keep_weights = true;
    add(DROP, &drop);
    write_seed(dir, "worker", "load-two-ranks");

    Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
    chunk.data = binary(SIXTEEN, 16);
    add(CHUNK, &chunk);
    chunk.last = true;
    add(CHUNK, &chunk);
    chunk.index = 1;
    chunk.missing = true;
    add(CHUNK, &chunk);
    add_load(m, alone, 1);
    add_bytes(W_TIME, 30);
    write_seed(dir, "worker", "load-bad-source");
    tiny_model_free(m);
}

static void worker_generates(const char *dir)
{
    uint32_t prompt[] = {0, 5, 77, 500}, generated[] = {7, 8, 9}, ends[] = {3};
    Weft__V1__Sampler sampler = WEFT__V1__SAMPLER__INIT;
    sampler.temperature = 0.7f;
    sampler.top_k = 20;
    sampler.top_p = 0.9f;
    sampler.min_p = 0.05f;
    sampler.repeat_penalty = 1.2f;
    sampler.penalty_window = 4;
    sampler.seed = 5;
    Weft__V1__Stamp stamp;
    fill_stamp(&stamp, 1);
    Weft__V1__GenerateRequest g = WEFT__V1__GENERATE_REQUEST__INIT;
    g.stamp = &stamp;
    g.request = (char *)"r-1";
    g.prompt = prompt;
    g.n_prompt = 4;
    g.generated = generated;
    g.n_generated = 3;
    g.max_tokens = 6;
    g.sampler = &sampler;
    g.end_ids = ends;
    g.n_end_ids = 1;
    g.want_logits = true;
    g.top_logprobs = 2;
    g.trace = true;
    records_append(seed, READY, NULL, 0);
    add(GENERATE, &g);
    write_seed(dir, "worker", "generate");

    g.kind = WEFT__V1__REQUEST_KIND__SCORE;
    g.trace = false;
    g.score_from = 1;
    g.max_tokens = 0;
    records_append(seed, READY, NULL, 0);
    add(GENERATE, &g);
    g.kind = WEFT__V1__REQUEST_KIND__EMBED;
    add(GENERATE, &g);
    Weft__V1__DropRequest drop = WEFT__V1__DROP_REQUEST__INIT;
    drop.stamp = &stamp;
    add(DROP, &drop);
    write_seed(dir, "worker", "score-embed-drop");
}

static void worker_rest(const char *dir)
{
    char *revoked[] = {(char *)"99"};
    Weft__V1__Keep keep = WEFT__V1__KEEP__INIT, *keeps[] = {&keep};
    keep.job = (char *)"job";
    keep.epoch = 1;
    Weft__V1__Ack ack = WEFT__V1__ACK__INIT;
    ack.sequence = 1;
    ack.keep = keeps;
    ack.n_keep = 1;
    ack.revoked = revoked;
    ack.n_revoked = 1;
    ack.draining = true;
    Weft__V1__CoordinatorNotice notice = WEFT__V1__COORDINATOR_NOTICE__INIT;
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_ACK;
    notice.ack = &ack;
    records_append(seed, READY, NULL, 0);
    add(NOTICE, &notice);
    Weft__V1__Welcome welcome = WEFT__V1__WELCOME__INIT;
    welcome.cluster = (char *)"test";
    welcome.generation = 2;
    welcome.generation_id = binary(SIXTEEN, 16);
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME;
    notice.welcome = &welcome;
    add(NOTICE, &notice);
    add_bytes(W_TIME, 10);
    write_seed(dir, "worker", "notices");

    add_fetch(W_FETCH, 0);
    add_health(W_CHECK, W_WATCH, "weft.v1.Worker");
    Grpc__Reflection__V1__ServerReflectionRequest r =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    r.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    r.file_by_filename = (char *)"weft/v1/cluster.proto";
    add(W_REFLECTION, &r);
    write_seed(dir, "worker", "fetch-health-reflection");
}

/* ---- training ---- */

static void add_report(Weft__V1__TrainReport__ReportCase which, void *what)
{
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    report.report_case = which;
    report.want = what; /* any member of the union */
    add(T_REPORT, &report);
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
    write_seed(dir, "train", "steps");
    add_loaded();
    add_step(0);
    add_step(1);
    add_bytes(T_SAVE, 2);
    add_step(3);
    add_bytes(T_SAVE, 4);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_DONE, &done);
    write_seed(dir, "train", "to-the-end");
    add_loaded();
    add_bytes(T_SAVE, 2);
    add_bytes(T_TIME, 1);
    add_report(WEFT__V1__TRAIN_REPORT__REPORT_DONE, &done);
    add_wants("second/token_embd.weight", 16);
    add_wants("second/nothing.weight", 16);
    add_wants("first/token_embd.weight", 16);
    write_seed(dir, "train", "again");
    add_loaded();
    add_trace(0);
    add_step(0);
    add_trace(1);
    add_trace(2);
    write_seed(dir, "train", "traced");
}

/* ---- training, the worker's side ---- */

static void add_command(Weft__V1__TrainCommand__CommandCase which, void *what)
{
    Weft__V1__TrainCommand command = WEFT__V1__TRAIN_COMMAND__INIT;
    command.command_case = which;
    command.load = what; /* any member of the union */
    add(R_COMMAND, &command);
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
    add_bytes(R_HONEST, 255); /* until it is loaded */
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
    add(R_ESTIMATE, &request);
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
    add_bytes(R_HONEST, 255); /* until it is done */
    add_bytes(R_CLOSE, 0);
    write_seed(dir, "trainer", "to-the-end");
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
    add_bytes(R_HONEST, 6); /* some of its state */
    add_bytes(R_CANCEL, 0);
    t.stamp.epoch = 4;
    add_train_load(&t);
    add_train_start(&t);
    add_bytes(R_HONEST, 255);
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
    write_seed(dir, "trainer", "again");
    train_seed_clear(&t);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        g_printerr("usage: %s CORPUS_DIR\n", argv[0]);
        return 2;
    }
    seed = g_byte_array_new();
    coordinator_runs(argv[1]);
    coordinator_answers(argv[1]);
    coordinator_reports(argv[1]);
    coordinator_admin(argv[1]);
    coordinator_rest(argv[1]);
    worker_loads(argv[1]);
    worker_generates(argv[1]);
    worker_rest(argv[1]);
    training(argv[1]);
    worker_trains(argv[1]);
    worker_resumes(argv[1]);
    g_byte_array_unref(seed);
    return 0;
}
