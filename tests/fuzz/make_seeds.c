/* Seeds of fuzz_coordinator, fuzz_train, fuzz_trainer and fuzz_worker: one honest course of each
 * call, so that mutation starts behind every door.
 *
 * usage: make-fuzz-seeds CORPUS_DIR */
#include "proto/base/version.h"
#include "proto/plan/plan_message.h"
#include "tests/fuzz/seeds.h"
#include "tests/unit/worker/tiny_model.h"
#include "weft/v1/admin.pb-c.h"
#include "weft/v1/cluster.pb-c.h"
#include "weft/v1/join.pb-c.h"
#include "weft/v1/serve.pb-c.h"

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
    seed_add(kind, &fetch);
}

static void add_health(uint8_t check, uint8_t watch, const char *service)
{
    Grpc__Health__V1__HealthCheckRequest health = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    health.service = (char *)service;
    seed_add(check, &health);
    seed_add(watch, &health);
}
/* ---- the coordinator ---- */

static void add_run(Weft__V1__RunRequest *run)
{
    run->model = (char *)"tiny.gguf";
    if (run->kind == WEFT__V1__REQUEST_KIND__GENERATE) {
        run->max_tokens = 4;
    }
    seed_add(RUN, run);
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
    seed_add_byte(C_TIME, 20);
    seed_write(dir, "coordinator", "run-prompt");

    Weft__V1__ChatMessage chat = WEFT__V1__CHAT_MESSAGE__INIT, *messages[] = {&chat, &chat};
    chat.role = (char *)"user";
    chat.content = (char *)"hello";
    weft__v1__run_request__init(&run);
    run.messages = messages;
    run.n_messages = 2;
    run.raw_special = true;
    add_run(&run);
    seed_add_byte(C_TIME, 20);
    seed_write(dir, "coordinator", "run-chat");

    weft__v1__run_request__init(&run);
    run.kind = WEFT__V1__REQUEST_KIND__SCORE;
    run.prompt = (char *)"the quick brown fox jumps over";
    run.score_window = 8;
    add_run(&run);
    seed_add_byte(C_TIME, 20);
    seed_write(dir, "coordinator", "run-score");

    weft__v1__run_request__init(&run);
    run.random_prompt = 8;
    run.ignore_end = true;
    run.streams = 3;
    add_run(&run);
    seed_add_byte(C_TIME, 20);
    seed_write(dir, "coordinator", "run-random");
}

/* w0 answers as it likes. */
static void coordinator_answers(const char *dir)
{
    Weft__V1__LoadProgress progress = WEFT__V1__LOAD_PROGRESS__INIT;
    progress.bytes_done = progress.bytes_total = 100;
    seed_add(PROGRESS, &progress);
    progress.loaded = true;
    progress.data_address = binary("w0", 2);
    progress.boot_id = binary(SIXTEEN, 16);
    seed_add(PROGRESS, &progress);
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
        seed_add(TOKEN, &token);
    }
    seed_add(TOKEN, &token); /* the last one again */
    Weft__V1__TokenEvent done = WEFT__V1__TOKEN_EVENT__INIT;
    done.done = true;
    done.finish_reason = (char *)"length";
    done.prefill_us = 10;
    done.decode_us = 20;
    done.wire_bytes = 30;
    seed_add(TOKEN, &done);
    uint32_t ids[] = {1, 2, 3};
    char *stops[] = {(char *)"cd"};
    Weft__V1__RunRequest run = WEFT__V1__RUN_REQUEST__INIT;
    run.prompt_ids = ids;
    run.n_prompt_ids = 3;
    run.stop = stops;
    run.n_stop = 1;
    run.want_logits = run.trace = true;
    add_run(&run);
    seed_add_byte(C_TIME, 10);
    seed_write(dir, "coordinator", "answers");
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
    seed_add(REPORT, &report);
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
    seed_add(REPORT, &report);
    Weft__V1__RenewRequest renew = WEFT__V1__RENEW_REQUEST__INIT;
    renew.csr_pem = binary("CSR", 3);
    seed_add(RENEW, &renew);
    /* w1 is in the plan now, and its address leads nowhere. */
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.pp = 2;
    layout.tp = 1;
    Weft__V1__RunRequest run = WEFT__V1__RUN_REQUEST__INIT;
    run.prompt = (char *)"a";
    run.layout = &layout;
    add_run(&run);
    seed_add(REPORT, &report);
    seed_add_empty(END_OF_REPORTS);
    seed_add_byte(C_TIME, 8);
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HELLO;
    report.hello = &hello;
    seed_add(REPORT, &report); /* on the stream that ended */
    seed_write(dir, "coordinator", "reports");
}

static void coordinator_admin(const char *dir)
{
    Weft__V1__StatusRequest status = WEFT__V1__STATUS_REQUEST__INIT;
    status.details = true;
    seed_add(STATUS, &status);
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.dp = layout.pp = layout.tp = 1;
    Weft__V1__PlanRequest plan = WEFT__V1__PLAN_REQUEST__INIT;
    plan.model = (char *)"tiny";
    plan.layout = &layout;
    plan.context = 32;
    plan.streams = 2;
    plan.numerics = (char *)"exact";
    seed_add(PLAN, &plan);
    Weft__V1__CreateTokenRequest token = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    token.role = (char *)"worker";
    token.ttl_ms = 1000;
    token.uses = 2;
    seed_add(CREATE_TOKEN, &token);
    Weft__V1__DrainRequest drain = WEFT__V1__DRAIN_REQUEST__INIT;
    drain.node = (char *)"w0";
    drain.reason = (char *)"cleaning";
    seed_add(DRAIN, &drain);
    drain.undrain = true;
    seed_add(DRAIN, &drain);
    Weft__V1__UnloadRequest unload = WEFT__V1__UNLOAD_REQUEST__INIT;
    unload.model = (char *)"tiny.gguf";
    seed_add(UNLOAD, &unload);
    Weft__V1__RevokeRequest revoke = WEFT__V1__REVOKE_REQUEST__INIT;
    revoke.node = (char *)"w0";
    seed_add(REVOKE, &revoke);
    Weft__V1__StopRequest stop = WEFT__V1__STOP_REQUEST__INIT;
    seed_add(STOP, &stop);
    seed_write(dir, "coordinator", "admin");
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
    seed_add(JOIN, &join);
    join.csr_pem = binary("no request", 10);
    seed_add(JOIN, &join);
    seed_write(dir, "coordinator", "join");

    Weft__V1__PlanRequest plan = WEFT__V1__PLAN_REQUEST__INIT;
    plan.model = (char *)"tiny";
    seed_add(PLAN, &plan); /* opens the file */
    add_fetch(C_FETCH, 9);
    seed_write(dir, "coordinator", "fetch");

    add_health(C_CHECK, C_WATCH, "weft.v1.Admin");
    Grpc__Reflection__V1__ServerReflectionRequest r =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    r.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
    r.list_services = (char *)"*";
    seed_add(C_REFLECTION, &r);
    r.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    r.file_containing_symbol = (char *)"weft.v1.Admin.Status";
    seed_add(C_REFLECTION, &r);
    seed_write(dir, "coordinator", "health-reflection");
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
    seed_add(LOAD, &load);
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
    seed_add(START, &start);
}

static void worker_loads(const char *dir)
{
    static const double even[] = {1, 1};
    TinyModel *m = model();
    g_autoptr(Plan) alone = tiny_plan(m->spec, 1, (uint32_t[]){1}, even);
    add_load(m, alone, 1);
    seed_add_byte(W_TIME, 10);
    add_start(1, 1);
    seed_add_byte(W_TIME, 5);
    seed_write(dir, "worker", "load-start");

    g_autoptr(Plan) pair = tiny_plan(m->spec, 1, (uint32_t[]){2}, even);
    add_load(m, pair, 2);
    seed_add_byte(W_TIME, 10);
    add_start(2, 2);
    seed_add_byte(W_TIME, 5);
    add_load(m, pair, 3); /* a newer epoch takes over */
    Weft__V1__Stamp stamp;
    fill_stamp(&stamp, 3);
    Weft__V1__DropRequest drop = WEFT__V1__DROP_REQUEST__INIT;
    drop.stamp = &stamp;
    drop.keep_weights = true;
    seed_add(DROP, &drop);
    seed_write(dir, "worker", "load-two-ranks");

    Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
    chunk.data = binary(SIXTEEN, 16);
    seed_add(CHUNK, &chunk);
    chunk.last = true;
    seed_add(CHUNK, &chunk);
    chunk.index = 1;
    chunk.missing = true;
    seed_add(CHUNK, &chunk);
    add_load(m, alone, 1);
    seed_add_byte(W_TIME, 30);
    seed_write(dir, "worker", "load-bad-source");
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
    seed_add_empty(READY);
    seed_add(GENERATE, &g);
    seed_write(dir, "worker", "generate");

    g.kind = WEFT__V1__REQUEST_KIND__SCORE;
    g.trace = false;
    g.score_from = 1;
    g.max_tokens = 0;
    seed_add_empty(READY);
    seed_add(GENERATE, &g);
    g.kind = WEFT__V1__REQUEST_KIND__EMBED;
    seed_add(GENERATE, &g);
    Weft__V1__DropRequest drop = WEFT__V1__DROP_REQUEST__INIT;
    drop.stamp = &stamp;
    seed_add(DROP, &drop);
    seed_write(dir, "worker", "score-embed-drop");
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
    seed_add_empty(READY);
    seed_add(NOTICE, &notice);
    Weft__V1__Welcome welcome = WEFT__V1__WELCOME__INIT;
    welcome.cluster = (char *)"test";
    welcome.generation = 2;
    welcome.generation_id = binary(SIXTEEN, 16);
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME;
    notice.welcome = &welcome;
    seed_add(NOTICE, &notice);
    seed_add_byte(W_TIME, 10);
    seed_write(dir, "worker", "notices");

    add_fetch(W_FETCH, 0);
    add_health(W_CHECK, W_WATCH, "weft.v1.Worker");
    Grpc__Reflection__V1__ServerReflectionRequest r =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    r.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    r.file_by_filename = (char *)"weft/v1/cluster.proto";
    seed_add(W_REFLECTION, &r);
    seed_write(dir, "worker", "fetch-health-reflection");
}
int main(int argc, char **argv)
{
    if (argc != 2) {
        g_printerr("usage: %s CORPUS_DIR\n", argv[0]);
        return 2;
    }
    coordinator_runs(argv[1]);
    coordinator_answers(argv[1]);
    coordinator_reports(argv[1]);
    coordinator_admin(argv[1]);
    coordinator_rest(argv[1]);
    worker_loads(argv[1]);
    worker_generates(argv[1]);
    worker_rest(argv[1]);
    make_train_seeds(argv[1]);
    return 0;
}
