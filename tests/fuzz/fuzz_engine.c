/* Any messages of its peer at a real engine of a pipeline of two: the leader (what comes back from
 * the last stage) or the last stage (what comes from the leader). First byte: which of them, and
 * whether it was started. Records: low bits of the kind = op of the message, its bytes = u32 step,
 * payload; the kind's high bits say what else is done. */
#include "tests/fuzz/calls.h"
#include "tests/sim/sim_loop.h"
#include "tests/unit/worker/tiny_model.h"
#include "transport/crypto/keys.h"
#include "worker/serve/direct.h"
#include "worker/serve/engine.h"
#include "worker/shard/shard.h"

#include "kernels/kernels.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
    OP_MASK = 15,
    WITH_ACTIVATIONS = 16, /* zeroes for as many rows as the step message says */
    SUBMIT = 32,           /* two requests at the leader first */
    CANCEL = 64,           /* the first of them afterwards */
    APART = 128,           /* activations are to come apart, which was not agreed */
    STEP_N_ROWS_AT = 12    /* of a step message */
};
enum { SECOND_STAGE = 1, NOT_GREETED = 2 };

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

/* What every input shares. */
typedef struct Parts {
    TinyModel *model;
    Plan *plan;
    Shard *shards[2];
} Parts;

typedef struct World {
    const Parts *parts;
    SimWorld *sim;
    Loop *loop;
    LinkFill *fill;
    Engine *engine;
    LinkPort *peer;
    Link *link;
    unsigned n_submitted, n_done;
    uint64_t first;
} World;

static const uint8_t secret[32] = {3}, boot_ids[2][16] = {{1}, {2}};

static const Parts *parts(void)
{
    static const TinyShape shape = {2,          64,         2,          1,    32,    64,   600,
                                    DTYPE_Q8_0, DTYPE_Q8_0, DTYPE_Q8_0, true, false, false};
    static const double even[] = {1, 1};
    static Parts p;
    if (p.model != NULL) {
        return &p;
    }
    p.model = tiny_model_new(&shape, 5);
    p.plan = tiny_plan(p.model->spec, 2, (uint32_t[]){1, 1}, even);
    for (uint32_t s = 0; s < 2; s++) {
        g_autoptr(GArray) slices = plan_rank_slices(p.plan, p.model->spec, 0, s, 0);
        p.shards[s] = shard_new(NULL, p.model->spec, p.plan, 0, s, 0, NULL);
        for (guint i = 0; i < slices->len; i++) {
            const SliceRef ref = g_array_index(slices, SliceRef, i);
            size_t size;
            g_autofree void *bytes = tiny_model_slice(p.model, ref.tensor, ref.slice, &size);
            shard_put(p.shards[s], ref.tensor, ref.slice, bytes);
        }
    }
    return &p;
}

static void peer_receive(Link *link, const LinkHeader *header, const void *payload, void *user) {}
static void peer_dead(Link *link, const char *why, void *user) {}
static void on_ready(const GError *error, void *user) {}

static void turn(World *w)
{
    for (int i = 0; i < 4; i++) {
        engine_step(w->engine);
        link_port_progress(w->peer);
    }
    sim_world_run_for(w->sim, 1000);
}

static void send(World *w, uint8_t kind, uint32_t step, const LinkPart *bodies, unsigned n)
{
    if (w->link != NULL) {
        const uint16_t flags = kind & APART ? DIRECT_STEP_APART : 0;
        link_send_try(w->link, kind & OP_MASK, flags, step, bodies, n);
    }
}

static void world_open(World *w, unsigned how)
{
    const uint32_t stage = how & SECOND_STAGE;
    w->parts = parts();
    w->sim = sim_world_new(1);
    w->loop = sim_world_loop(w->sim);
    w->fill = link_fill_inproc_new();
    EngineOptions options = {.spec = w->parts->model->spec,
                             .plan = w->parts->plan,
                             .shard = w->parts->shards[stage],
                             .stage = stage,
                             .generation = 1,
                             .epoch = 1,
                             .threads = 1,
                             .isa = ISA_GENERIC,
                             .fill = w->fill,
                             .inline_run = true};
    w->engine = engine_new(&options, NULL);
    LinkPortOptions port = {.fill = w->fill, .receive = peer_receive, .dead = peer_dead, .user = w};
    w->peer = link_port_open(&port, NULL);
    EnginePeer peers[2] = {{.stage = 0, .worker = "w0"}, {.stage = 1, .worker = "w1"}};
    for (uint32_t i = 0; i < 2; i++) {
        peers[i].address = i == stage ? engine_address(w->engine) : link_port_address(w->peer);
        memcpy(peers[i].boot_id, boot_ids[i], 16);
    }
    const KeyScope scope = {.generation = 1, .epoch = 1, .job = w->parts->plan->job, .replica = 0};
    LinkConnect connect = {.address = peers[stage].address,
                           .handle = keys_handle(secret, &scope, 0, 1),
                           .peer = stage};
    w->link = link_connect(w->peer, &connect, NULL);
    engine_start(w->engine, secret, boot_ids[stage], false, peers, 2, w->loop, on_ready, w);
    g_bytes_unref(peers[0].address);
    g_bytes_unref(peers[1].address);
    if (!(how & NOT_GREETED)) {
        turn(w);
        send(w, LINK_OP_HELLO, 0, NULL, 0);
    }
    turn(w);
}

static void world_close(World *w)
{
    g_autoptr(GError) why = g_error_new_literal(g_quark_from_string("fuzz"), 0, "the end");
    engine_abort(w->engine, why);
    turn(w);
    engine_free(w->engine);
    link_port_close(w->peer);
    sim_world_run_for(w->sim, 1000);
    g_assert(w->n_done == w->n_submitted); /* each request has its one end */
    sim_world_free(w->sim);
    link_fill_free(w->fill);
}

static void on_token(const EngineToken *token, void *user)
{
    ((World *)user)->n_done += token->done;
}

static void submit(World *w)
{
    static const uint32_t prompt[] = {1, 2, 3, 4, 5};
    EngineRequest request = {.prompt = prompt,
                             .n_prompt = G_N_ELEMENTS(prompt),
                             .max_tokens = 4,
                             .top_logprobs = 2,
                             .want_logits = true,
                             .trace = true};
    w->first = engine_submit(w->engine, &request, w->loop, on_token, w);
    request.kind = 1;
    request.trace = false;
    engine_submit(w->engine, &request, w->loop, on_token, w);
    w->n_submitted += 2;
    turn(w);
}

static void play(World *w, const Record *record)
{
    if (record->kind & SUBMIT && w->n_submitted < 16) {
        submit(w);
    }
    if (record->size >= 4) {
        const uint32_t width = w->parts->model->spec->width;
        uint32_t step, n_rows = 0;
        memcpy(&step, record->bytes, 4);
        if (record->kind & WITH_ACTIVATIONS && record->size >= 4 + STEP_N_ROWS_AT + 4) {
            memcpy(&n_rows, record->bytes + 4 + STEP_N_ROWS_AT, 4);
            n_rows = MIN(n_rows, 4096);
        }
        g_autofree float *zeroes = g_new0(float, (gsize)n_rows *width + 1);
        const LinkPart bodies[2] = {{record->bytes + 4, record->size - 4},
                                    {zeroes, sizeof(float) * n_rows * width}};
        send(w, record->kind, step, bodies, 2);
    }
    turn(w);
    if (record->kind & CANCEL) {
        engine_cancel(w->engine, w->first);
        turn(w);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    World w = {0};
    Record record;
    if (size == 0) {
        return 0;
    }
    world_open(&w, data[0]);
    for (Records r = {data, size, 1}; records_next(&r, &record);) {
        play(&w, &record);
    }
    world_close(&w);
    return 0;
}
