#include "tests/unit/coordinator/sim_trainer.h"

#include "tests/unit/coordinator/sim_cluster.h"

#include "proto/base/error.h"
#include "proto/base/hash.h"
#include "proto/model/model_message.h"
#include "weft/v1/train.pb-c.h"

#include <math.h>
#include <string.h>

#define STEP_US 50000

struct SimRank {
    SimTrainer *owner;
    RpcCall *call; /* referenced */
    LoopTimer *timer;
    ModelSpec *spec;
    char *job;
    uint64_t epoch, step, first_step, steps, checkpoint_every, n_tokens;
    uint32_t index, n, sequences;
    uint64_t trace_first, trace_steps;
    uint32_t asked; /* tensors of the state, three times the model's; then the tokens */
    bool loaded, started;
};

struct SimTrainer {
    FakeWorker *worker;
    SimTraining *training;
    GPtrArray *ranks; /* of SimRank, owned */
    uint64_t newest;  /* epoch that this worker was told of */
};

/* ---- what there is to learn ---- */

static const char *const kinds[] = {"weights", "first", "second"};

static float value_of(uint32_t tensor, uint32_t row, uint32_t column, uint64_t step)
{
    return (float)(tensor % 7) + (float)row / 64 + (float)column / 4096 + (float)step * 8;
}

float sim_training_loss(uint64_t step)
{
    return 1.0f + 4.0f / (float)(step + 1);
}

static Hash128 digest_of(uint64_t step)
{
    return hash128(&step, sizeof step);
}

/* Of the last rank, if so wished, that of other weights. */
static Hash128 digest_told(const SimRank *r, bool other)
{
    return digest_of(r->step + (other && r->index + 1 == r->n ? 1 : 0));
}

static SliceRect share(const SimRank *r, const TensorSpec *t)
{
    const uint32_t first = (uint32_t)((uint64_t)t->rows * r->index / r->n);
    const uint32_t last = (uint32_t)((uint64_t)t->rows * (r->index + 1) / r->n);
    return (SliceRect){first, last - first, 0, t->columns};
}

/* ---- a rank's life ---- */

static void rank_free(void *data)
{
    SimRank *r = data;
    g_ptr_array_remove_fast(r->owner->training->ranks, r);
    loop_timer_cancel(r->owner->worker->loop, r->timer);
    rpc_call_on_cancel(r->call, NULL, NULL);
    rpc_call_set_data(r->call, NULL, NULL);
    rpc_call_unref(r->call);
    model_spec_free(r->spec);
    g_free(r->job);
    g_free(r);
}

/* NULL: its end is no error. */
static void rank_end(SimRank *r, const GError *why)
{
    rpc_call_on_cancel(r->call, NULL, NULL);
    rpc_call_finish(r->call, why);
    g_ptr_array_remove_fast(r->owner->ranks, r);
}

static void rank_cancelled(void *user)
{
    SimRank *r = user;
    g_ptr_array_remove_fast(r->owner->ranks, r);
}

static void tell(SimRank *r, Weft__V1__TrainReport__ReportCase which, void *what)
{
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    report.report_case = which;
    report.want = what; /* any member of the union */
    rpc_call_send(r->call, &report.base);
}

/* ---- loading ---- */

static void tell_loaded(SimRank *r)
{
    FakeWorker *w = r->owner->worker;
    Weft__V1__TrainLoaded loaded = WEFT__V1__TRAIN_LOADED__INIT;
    loaded.data_address = (ProtobufCBinaryData){strlen(w->name), (uint8_t *)w->name};
    loaded.boot_id = (ProtobufCBinaryData){sizeof w->boot_id, w->boot_id};
    r->loaded = true;
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_LOADED, &loaded);
}

/* The next piece of its state, when it goes on from a checkpoint; then some tokens. */
static void ask_next(SimRank *r)
{
    Weft__V1__TrainWant want = WEFT__V1__TRAIN_WANT__INIT;
    Weft__V1__TrainRect rect = WEFT__V1__TRAIN_RECT__INIT;
    g_autofree char *name = NULL;
    const uint32_t n_state = r->first_step > 0 ? 3 * r->spec->n_tensors : 0;
    for (; r->asked < n_state; r->asked++) {
        const TensorSpec *t = &r->spec->tensors[r->asked / 3];
        const SliceRect s = share(r, t);
        if (s.n_rows > 0) {
            name = g_strdup_printf("%s/%s", kinds[r->asked % 3], t->name);
            rect.row0 = s.row0;
            rect.n_rows = s.n_rows;
            rect.n_cols = s.n_cols;
            want.n = (uint64_t)s.n_rows * s.n_cols;
            want.tensor = name;
            want.rect = &rect;
            break;
        }
    }
    if (r->asked > n_state) {
        tell_loaded(r);
        return;
    }
    if (want.rect == NULL) {
        want.n = MIN(r->n_tokens, 64);
        want.first = r->n_tokens - want.n;
    }
    want.id = ++r->asked;
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_WANT, &want);
}

static void check_bytes(SimRank *r, const Weft__V1__TrainBytes *bytes)
{
    g_assert_cmpuint(bytes->want, ==, r->asked);
    const uint32_t at = r->asked - 1;
    const float *floats = (const float *)(const void *)bytes->data.data;
    if (r->first_step > 0 && at < 3 * r->spec->n_tensors) {
        const TensorSpec *t = &r->spec->tensors[at / 3];
        const SliceRect s = share(r, t);
        g_assert_cmpuint(bytes->data.len, ==, sizeof(float) * s.n_rows * s.n_cols);
        for (uint32_t i = 0; i < s.n_rows * s.n_cols; i++) {
            g_assert_cmpfloat(floats[i], ==,
                              value_of(at, s.row0 + i / s.n_cols, i % s.n_cols, r->first_step));
        }
    }
    ask_next(r);
}

static void load(SimTrainer *owner, RpcCall *call, const Weft__V1__TrainLoad *m)
{
    SimTraining *all = owner->training;
    g_assert_cmpuint(m->stamp->epoch, >, owner->newest); /* a number is used once */
    owner->newest = m->stamp->epoch;
    all->n_epochs += m->stamp->epoch > all->newest_epoch;
    all->newest_epoch = MAX(all->newest_epoch, m->stamp->epoch);
    SimRank *r = g_new0(SimRank, 1);
    *r = (SimRank){.owner = owner,
                   .call = rpc_call_ref(call),
                   .spec = model_from_message(m->model, NULL),
                   .job = g_strdup(m->stamp->job),
                   .epoch = m->stamp->epoch,
                   .step = m->settings->first_step,
                   .first_step = m->settings->first_step,
                   .steps = m->settings->steps,
                   .checkpoint_every = m->settings->checkpoint_every,
                   .n_tokens = m->settings->n_tokens,
                   .sequences = m->settings->sequences,
                   .trace_first = m->settings->trace_first,
                   .trace_steps = m->settings->trace_steps};
    g_assert_nonnull(r->spec);
    for (size_t d = 0; d < m->plan->n_replicas; d++) {
        const Weft__V1__Replica *replica = m->plan->replicas[d];
        for (size_t s = 0; s < replica->n_stages; s++) {
            for (size_t t = 0; t < replica->stages[s]->n_ranks; t++, r->n++) {
                if (d == m->replica && s == m->stage && t == m->rank) {
                    r->index = r->n;
                    g_assert_cmpstr(replica->stages[s]->ranks[t]->worker, ==, owner->worker->name);
                }
            }
        }
    }
    all->n_restored += r->index == 0 && r->first_step > 0;
    g_ptr_array_add(owner->ranks, r);
    g_ptr_array_add(all->ranks, r);
    rpc_call_set_data(call, r, NULL);
    rpc_call_on_cancel(call, rank_cancelled, r);
    if (!all->puppets) {
        ask_next(r);
    }
}

/* ---- steps ---- */

/* All ranks of the epoch are there and none is a step behind this one: what a step's exchanges
 * see. */
static bool may_go_on(const SimRank *r)
{
    const SimTraining *all = r->owner->training;
    uint32_t n = 0;
    for (guint i = 0; i < all->ranks->len; i++) {
        const SimRank *other = all->ranks->pdata[i];
        n += other->epoch == r->epoch && strcmp(other->job, r->job) == 0 && other->started &&
             other->step >= r->step && !other->owner->worker->cut;
    }
    return n == r->n;
}

/* Where the rank's pieces lie: its share of every tensor, the first of them twice if so wished. */
static GArray *piece_tensors(const SimRank *r, bool twice)
{
    GArray *list = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    for (uint32_t i = 0; i < 3 * r->spec->n_tensors; i++) {
        if (share(r, &r->spec->tensors[i / 3]).n_rows > 0) {
            g_array_append_val(list, i);
        }
        if (twice && list->len == 1) {
            g_array_append_val(list, i);
        }
    }
    return list;
}

static char *piece_name(const SimRank *r, uint32_t at)
{
    return g_strdup_printf("%s/%s", kinds[at % 3], r->spec->tensors[at / 3].name);
}

static void tell_begin(SimRank *r, const GArray *tensors)
{
    Weft__V1__TrainPartBegin begin = WEFT__V1__TRAIN_PART_BEGIN__INIT;
    g_autofree Weft__V1__TrainPlace *places = g_new(Weft__V1__TrainPlace, tensors->len + 1);
    g_autofree Weft__V1__TrainPlace **pointers = g_new(Weft__V1__TrainPlace *, tensors->len + 1);
    g_autofree Weft__V1__TrainRect *rects = g_new(Weft__V1__TrainRect, tensors->len + 1);
    for (guint i = 0; i < tensors->len; i++) {
        const uint32_t at = g_array_index(tensors, uint32_t, i);
        const SliceRect s = share(r, &r->spec->tensors[at / 3]);
        weft__v1__train_place__init(&places[i]);
        weft__v1__train_rect__init(&rects[i]);
        rects[i].row0 = s.row0;
        rects[i].n_rows = s.n_rows;
        rects[i].n_cols = s.n_cols;
        places[i].tensor = piece_name(r, at);
        places[i].rect = &rects[i];
        pointers[i] = &places[i];
    }
    begin.step = r->step;
    begin.places = pointers;
    begin.n_places = tensors->len;
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_BEGIN, &begin);
    for (guint i = 0; i < tensors->len; i++) {
        g_free(places[i].tensor);
    }
}

static void send_piece(SimRank *r, uint32_t at)
{
    const SliceRect s = share(r, &r->spec->tensors[at / 3]);
    const uint32_t n = s.n_rows * s.n_cols;
    g_autofree float *floats = g_new(float, n);
    g_autofree char *name = piece_name(r, at);
    Weft__V1__TrainPiece piece = WEFT__V1__TRAIN_PIECE__INIT;
    for (uint32_t i = 0; i < n; i++) {
        floats[i] = value_of(at, s.row0 + i / s.n_cols, i % s.n_cols, r->step);
    }
    piece.step = r->step;
    piece.tensor = name;
    piece.data = (ProtobufCBinaryData){n * sizeof *floats, (uint8_t *)(void *)floats};
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_PIECE, &piece);
}

static void save(SimRank *r)
{
    SimTraining *all = r->owner->training;
    Hash128 digest = digest_told(r, all->other_part);
    Weft__V1__TrainPart part = WEFT__V1__TRAIN_PART__INIT;
    Weft__V1__TrainState state = WEFT__V1__TRAIN_STATE__INIT;
    g_autoptr(GArray) tensors = piece_tensors(r, all->piece_twice);
    all->piece_twice = false;
    all->other_part = all->other_part && r->index + 1 != r->n;
    tell_begin(r, tensors);
    for (guint i = 0; i < tensors->len; i++) {
        send_piece(r, g_array_index(tensors, uint32_t, i));
    }
    part.step = r->step;
    part.state = &state;
    state.updates = r->step;
    state.scale = 1;
    part.samples = r->step * r->sequences;
    part.digest = (ProtobufCBinaryData){sizeof digest.bytes, digest.bytes};
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_PART, &part);
}

static void tell_step(SimRank *r)
{
    SimTraining *all = r->owner->training;
    Weft__V1__TrainProgress step = WEFT__V1__TRAIN_PROGRESS__INIT;
    step.step = r->step - 1; /* counted from 0 */
    step.samples_seen = r->step * r->sequences;
    step.loss = sim_training_loss(r->step);
    if (all->wrong_loss) {
        step.loss = nextafterf(step.loss, 0);
    }
    if (all->wrong_step) {
        step.step = r->steps;
        all->wrong_step = false;
    }
    step.seconds = STEP_US / 1e6;
    all->steps_computed++;
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_STEP, &step);
}

/* Of a step that took half the time between two: one forward and one backward pass. */
static void tell_trace(SimRank *r, uint64_t step)
{
    const int64_t now_us = loop_now_us(r->owner->worker->loop), begin_us = now_us - STEP_US / 2;
    Weft__V1__TrainTrace trace = WEFT__V1__TRAIN_TRACE__INIT;
    Weft__V1__TrainTraceOp ops[2];
    Weft__V1__TrainTraceOp *pointers[] = {&ops[0], &ops[1]};
    for (uint32_t i = 0; i < 2; i++) {
        weft__v1__train_trace_op__init(&ops[i]);
        ops[i].kind = i == 0 ? 1 : 4;
        ops[i].begin_us = begin_us + i * 100;
        ops[i].end_us = ops[i].begin_us + 100;
    }
    trace.step = step;
    trace.now_us = trace.end_us = now_us;
    trace.begin_us = begin_us;
    trace.ops = pointers;
    trace.n_ops = 2;
    trace.last = true;
    if (r->owner->training->wrong_trace) {
        r->owner->training->wrong_trace = false;
        ops[1].end_us = now_us + 1;
    }
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_TRACE, &trace);
}

/* True: the rank is gone. */
static bool fail_as_wished(SimRank *r)
{
    SimTraining *all = r->owner->training;
    if (all->fails == 0 || r->index + 1 != r->n) {
        return false;
    }
    g_autoptr(GError) why = g_error_new_literal(WEFT_ERROR, all->fails, "so it was wished");
    all->fails = 0;
    rank_end(r, why);
    return true;
}

static void tick(void *user)
{
    SimRank *r = user;
    r->timer = NULL;
    if (fail_as_wished(r)) {
        return;
    }
    if (!may_go_on(r)) {
        r->timer = loop_timer_start(r->owner->worker->loop, STEP_US / 10, tick, r);
        return;
    }
    r->step++;
    if (r->index == 0) {
        tell_step(r);
    }
    if (r->step > r->trace_first && r->step <= r->trace_first + r->trace_steps) {
        tell_trace(r, r->step - 1);
    }
    if (r->step == r->steps || (r->checkpoint_every > 0 && r->step % r->checkpoint_every == 0)) {
        save(r);
    }
    if (r->step < r->steps) {
        r->timer = loop_timer_start(r->owner->worker->loop, STEP_US, tick, r);
        return;
    }
    if (r->owner->training->ends_unsaid) {
        return;
    }
    Hash128 digest = digest_told(r, r->owner->training->other_end);
    Weft__V1__TrainDone done = WEFT__V1__TRAIN_DONE__INIT;
    done.digest = (ProtobufCBinaryData){sizeof digest.bytes, digest.bytes};
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_DONE, &done);
}

static void start(SimRank *r, const Weft__V1__TrainStart *m)
{
    g_assert_true(r->loaded && !r->started);
    g_assert_cmpuint(m->secret.len, ==, 32);
    g_assert_cmpuint(m->n_ranks, ==, r->n);
    g_assert_cmpstr(m->ranks[r->index]->worker, ==, r->owner->worker->name);
    Weft__V1__TrainRunning running = WEFT__V1__TRAIN_RUNNING__INIT;
    r->started = true;
    tell(r, WEFT__V1__TRAIN_REPORT__REPORT_RUNNING, &running);
    r->timer = loop_timer_start(r->owner->worker->loop, STEP_US, tick, r);
}

static void on_train(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    SimRank *r = rpc_call_data(call);
    const Weft__V1__TrainCommand *command = (const Weft__V1__TrainCommand *)message;
    if (command == NULL) {
        if (r != NULL) {
            rank_end(r, NULL);
        }
    } else if (r == NULL) {
        if (command->command_case == WEFT__V1__TRAIN_COMMAND__COMMAND_LOAD) {
            load(user, call, command->load);
        }
    } else if (r->owner->training->puppets) {
        return;
    } else if (command->command_case == WEFT__V1__TRAIN_COMMAND__COMMAND_BYTES) {
        check_bytes(r, command->bytes);
    } else if (command->command_case == WEFT__V1__TRAIN_COMMAND__COMMAND_START) {
        start(r, command->start);
    }
}

/* ---- puppets ---- */

void sim_rank_say(SimRank *r, const ProtobufCMessage *report)
{
    rpc_call_send(r->call, report);
}

void sim_rank_save(SimRank *r, uint64_t step)
{
    r->step = step;
    save(r);
}

/* ---- the worker's side ---- */

SimTrainer *sim_trainer_new(FakeWorker *w, SimTraining *training)
{
    SimTrainer *t = g_new0(SimTrainer, 1);
    t->worker = w;
    t->training = training;
    t->ranks = g_ptr_array_new_with_free_func(rank_free);
    if (training->ranks == NULL) {
        training->ranks = g_ptr_array_new();
    }
    return t;
}

/* Of each rank its part of 16 bytes a parameter, of 8 with all activations made again; zero-bubble
 * is a fifth shorter. */
static void on_estimate(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    const Weft__V1__TrainEstimateRequest *r = (const Weft__V1__TrainEstimateRequest *)message;
    Weft__V1__TrainEstimate answer = WEFT__V1__TRAIN_ESTIMATE__INIT;
    Weft__V1__TrainMemory memory = WEFT__V1__TRAIN_MEMORY__INIT, *ranks[64];
    const Weft__V1__Plan *plan = r->load->plan;
    uint64_t parameters = 0;
    for (size_t i = 0; i < r->load->model->n_tensors; i++) {
        const Weft__V1__Tensor *t = r->load->model->tensors[i];
        parameters += (uint64_t)t->rows * t->columns;
    }
    answer.n_ranks =
        plan->n_replicas * plan->replicas[0]->n_stages * plan->replicas[0]->stages[0]->n_ranks;
    g_assert_cmpuint(answer.n_ranks, <=, G_N_ELEMENTS(ranks));
    memory.weights = (r->load->settings->recompute == 2 ? 8 : 16) * parameters * plan->n_replicas /
                     answer.n_ranks;
    for (size_t i = 0; i < answer.n_ranks; i++) {
        ranks[i] = &memory;
    }
    answer.ranks = ranks;
    answer.makespan_s = STEP_US / 1e6 * (r->load->settings->schedule == 2 ? 0.8 : 1);
    answer.micro_batches = 4;
    rpc_call_reply(call, &answer.base);
}

void sim_trainer_serve(SimTrainer *t, RpcServer *server)
{
    static const RpcMethod methods[] = {{"Train", on_train, RPC_ROLE_COORDINATOR},
                                        {"Estimate", on_estimate, RPC_ROLE_COORDINATOR},
                                        {NULL}};
    rpc_server_add(server, &weft__v1__trainer__descriptor, methods, t);
}

void sim_trainer_fence(SimTrainer *t)
{
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s was fenced", t->worker->name);
    while (t->ranks->len > 0) {
        rank_end(t->ranks->pdata[0], why);
    }
}

void sim_trainer_free(SimTrainer *t)
{
    if (t != NULL) {
        g_ptr_array_unref(t->ranks);
        g_free(t);
    }
}

void sim_training_clear(SimTraining *training)
{
    g_clear_pointer(&training->ranks, g_ptr_array_unref);
}
