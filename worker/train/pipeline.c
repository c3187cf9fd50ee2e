/* Schedules are made by orders of F, B and W per stage; sends and receives stand where they must.
 *
 *   1F1B  stage r of p: min(m, p-r-1) forwards, then one forward and one backward in turn, then the
 *         backwards that are left (Narayanan et al. 2021, arXiv 2104.04473)
 *   GPipe all forwards, then all backwards (Huang et al. 2019)
 *   ZB-H1 stage r: p-r forwards, then one backward, one W and one forward in turn; W is r
 *         micro-batches late, so that no stage keeps more than p (Qi et al. 2023)
 *   interleaved, v chunks: forwards go p micro-batches at a time through chunk 0, 1, ..., backwards
 *         so through the chunks in reverse; stage r: 2(p-r-1) + (v-1)p forwards, then in turn as
 *         1F1B (Narayanan et al. 2021, 2.2). Where p does not divide m the order is that of the
 *         next multiple, without the micro-batches that are not there: what is left out needs
 *         nothing and is needed by nothing that is left. */
#include "worker/train/pipeline.h"

#include "proto/base/error.h"

static const char *const names[PIPELINE_KIND_LIMIT] = {"1f1b", "gpipe", "zero-bubble",
                                                       "interleaved"};

const char *pipeline_name(PipelineKind kind)
{
    return names[kind];
}

/* ---- making ---- */

/* Where a chunk stands on a micro-batch's way through all of them. */
static uint32_t place_of(const Pipeline *p, uint32_t stage, uint32_t chunk)
{
    return chunk * p->n_stages + stage;
}

static bool is_first(const Pipeline *p, uint32_t stage, uint32_t chunk)
{
    return place_of(p, stage, chunk) == 0;
}

static bool is_last(const Pipeline *p, uint32_t stage, uint32_t chunk)
{
    return place_of(p, stage, chunk) + 1 == p->n_stages * p->n_chunks;
}

static void add(Pipeline *p, uint32_t stage, PipelineOpKind kind, uint32_t chunk, uint32_t micro)
{
    const PipelineOp op = {kind, chunk, micro};
    g_array_append_val(p->stages[stage], op);
}

static void add_forward(Pipeline *p, uint32_t stage, uint32_t chunk, uint32_t micro)
{
    if (!is_first(p, stage, chunk)) {
        add(p, stage, PIPELINE_RECEIVE_FORWARD, chunk, micro);
    }
    add(p, stage, PIPELINE_FORWARD, chunk, micro);
    if (!is_last(p, stage, chunk)) {
        add(p, stage, PIPELINE_SEND_FORWARD, chunk, micro);
    }
}

static void add_backward(Pipeline *p, uint32_t stage, uint32_t chunk, uint32_t micro)
{
    if (!is_last(p, stage, chunk)) {
        add(p, stage, PIPELINE_RECEIVE_BACKWARD, chunk, micro);
    }
    add(p, stage, PIPELINE_BACKWARD, chunk, micro);
    if (!is_first(p, stage, chunk)) {
        add(p, stage, PIPELINE_SEND_BACKWARD, chunk, micro);
    }
}

/* `warm` forwards ahead of the backwards. */
static void add_in_turn(Pipeline *p, uint32_t stage, uint32_t warm)
{
    for (uint32_t i = 0; i < warm; i++) {
        add_forward(p, stage, 0, i);
    }
    for (uint32_t i = 0; i < p->n_micro; i++) {
        if (warm + i < p->n_micro) {
            add_forward(p, stage, 0, warm + i);
        }
        add_backward(p, stage, 0, i);
    }
}

/* Number i of all forwards (or backwards) of a stage; nothing for a micro-batch that only fills a
 * group up. */
static void add_interleaved_pass(Pipeline *p, uint32_t stage, uint32_t i, bool forward)
{
    const uint32_t group = p->n_stages * p->n_chunks,
                   micro = i / group * p->n_stages + i % p->n_stages,
                   chunk = i % group / p->n_stages;
    if (micro >= p->n_micro) {
        return;
    }
    if (forward) {
        add_forward(p, stage, chunk, micro);
    } else {
        add_backward(p, stage, p->n_chunks - 1 - chunk, micro);
    }
}

static void add_interleaved(Pipeline *p, uint32_t stage)
{
    const uint32_t groups = (p->n_micro + p->n_stages - 1) / p->n_stages,
                   total = groups * p->n_stages * p->n_chunks,
                   ahead = 2 * (p->n_stages - stage - 1) + (p->n_chunks - 1) * p->n_stages,
                   warm = MIN(total, ahead);
    for (uint32_t i = 0; i < warm; i++) {
        add_interleaved_pass(p, stage, i, true);
    }
    for (uint32_t i = 0; i < total; i++) {
        if (warm + i < total) {
            add_interleaved_pass(p, stage, warm + i, true);
        }
        add_interleaved_pass(p, stage, i, false);
    }
}

/* W of a micro-batch comes `stage` backwards later. */
static void add_zero_bubble(Pipeline *p, uint32_t stage)
{
    uint32_t forwards = 0, weights = 0;
    while (forwards < MIN(p->n_micro, p->n_stages - stage)) {
        add_forward(p, stage, 0, forwards++);
    }
    for (uint32_t i = 0; i < p->n_micro; i++) {
        add_backward(p, stage, 0, i);
        if (i >= stage) {
            add(p, stage, PIPELINE_WEIGHTS, 0, weights++);
        }
        if (forwards < p->n_micro) {
            add_forward(p, stage, 0, forwards++);
        }
    }
    while (weights < p->n_micro) {
        add(p, stage, PIPELINE_WEIGHTS, 0, weights++);
    }
}

Pipeline *pipeline_new(PipelineKind kind, uint32_t n_stages, uint32_t n_chunks, uint32_t n_micro)
{
    Pipeline *p = g_new0(Pipeline, 1);
    g_assert(n_chunks == 1 || kind == PIPELINE_INTERLEAVED);
    p->kind = kind;
    p->n_stages = n_stages;
    p->n_chunks = n_chunks;
    p->n_micro = n_micro;
    p->stages = g_new0(GArray *, n_stages);
    for (uint32_t s = 0; s < n_stages; s++) {
        p->stages[s] = g_array_new(FALSE, FALSE, sizeof(PipelineOp));
    }
    for (uint32_t s = 0; s < n_stages; s++) {
        if (kind == PIPELINE_ZERO_BUBBLE) {
            add_zero_bubble(p, s);
        } else if (kind == PIPELINE_INTERLEAVED) {
            add_interleaved(p, s);
        } else {
            add_in_turn(p, s, kind == PIPELINE_GPIPE ? n_micro : MIN(n_micro, n_stages - s - 1));
        }
    }
    return p;
}

void pipeline_free(Pipeline *p)
{
    if (p == NULL) {
        return;
    }
    for (uint32_t s = 0; s < p->n_stages; s++) {
        g_array_unref(p->stages[s]);
    }
    g_free(p->stages);
    g_free(p);
}

static const PipelineOp *op_at(const Pipeline *p, uint32_t stage, uint32_t i)
{
    return &g_array_index(p->stages[stage], PipelineOp, i);
}

/* The last op that reads what a micro-batch's forward pass kept. */
static PipelineOpKind last_kind(const Pipeline *p)
{
    return p->kind == PIPELINE_ZERO_BUBBLE ? PIPELINE_WEIGHTS : PIPELINE_BACKWARD;
}

uint32_t pipeline_in_flight(const Pipeline *p, uint32_t stage)
{
    const PipelineOpKind ends = last_kind(p);
    uint32_t now = 0, most = 0;
    for (uint32_t i = 0; i < p->stages[stage]->len; i++) {
        const PipelineOpKind kind = op_at(p, stage, i)->kind;
        now += kind == PIPELINE_FORWARD;
        most = MAX(most, now);
        now -= kind == ends;
    }
    return most;
}

void pipeline_slots(const Pipeline *p, uint32_t stage, uint32_t *slots)
{
    const uint32_t n = pipeline_in_flight(p, stage);
    g_autofree bool *taken = g_new0(bool, n + 1); /* the last one stays free */
    for (uint32_t i = 0; i < p->stages[stage]->len; i++) {
        const PipelineOp *op = op_at(p, stage, i);
        uint32_t *slot = &slots[op->chunk * p->n_micro + op->micro];
        const bool begins = is_first(p, stage, op->chunk) ? op->kind == PIPELINE_FORWARD
                                                          : op->kind == PIPELINE_RECEIVE_FORWARD;
        for (*slot = begins ? 0 : *slot; begins && taken[*slot];) {
            ++*slot;
        }
        g_assert(!begins || *slot < n);
        if (begins || op->kind == last_kind(p)) {
            taken[*slot] = begins;
        }
    }
}

/* ---- playing it through ---- */

/* All stages advance as far as what they need has happened. */
typedef struct Simulation {
    const Pipeline *p;
    PipelineTimes times;
    GArray *const *traces; /* instead of `times`; NULL: none */
    uint32_t *next;        /* by stage */
    double *clock, *busy;
    double *forward_at, *backward_at; /* [place][micro]: when what was sent can be received; -1 */
} Simulation;

static double *arrival(const Simulation *m, uint32_t stage, const PipelineOp *op)
{
    const uint32_t place = place_of(m->p, stage, op->chunk);
    switch (op->kind) {
    case PIPELINE_SEND_FORWARD:
        return &m->forward_at[(place + 1) * m->p->n_micro + op->micro];
    case PIPELINE_RECEIVE_FORWARD:
        return &m->forward_at[place * m->p->n_micro + op->micro];
    case PIPELINE_SEND_BACKWARD:
        return &m->backward_at[(place - 1) * m->p->n_micro + op->micro];
    case PIPELINE_RECEIVE_BACKWARD:
        return &m->backward_at[place * m->p->n_micro + op->micro];
    default:
        return NULL;
    }
}

static bool is_receive(PipelineOpKind kind)
{
    return kind == PIPELINE_RECEIVE_FORWARD || kind == PIPELINE_RECEIVE_BACKWARD;
}

static double traced_seconds(GArray *const *traces, uint32_t stage, uint32_t i)
{
    const PipelineOpTime *t = &g_array_index(traces[stage], PipelineOpTime, i);
    return is_receive(t->op.kind) ? 0.0 : (double)(t->end_us - t->begin_us) * 1e-6;
}

/* Of the stage's next op. */
static double duration(const Simulation *m, uint32_t stage)
{
    const PipelineOpKind kind = op_at(m->p, stage, m->next[stage])->kind;
    if (m->traces != NULL) {
        return traced_seconds(m->traces, stage, m->next[stage]);
    }
    const double whole = kind == PIPELINE_FORWARD    ? m->times.forward
                         : kind == PIPELINE_BACKWARD ? m->times.backward
                         : kind == PIPELINE_WEIGHTS  ? m->times.weights
                                                     : 0.0;
    return whole / m->p->n_chunks;
}

/* False: the stage waits. */
static bool advance(Simulation *m, uint32_t stage)
{
    const PipelineOp *op = op_at(m->p, stage, m->next[stage]);
    double *at = arrival(m, stage, op);
    const double takes = duration(m, stage);
    if (is_receive(op->kind)) {
        if (*at < 0.0) {
            return false;
        }
        m->clock[stage] = MAX(m->clock[stage], *at);
    }
    m->clock[stage] += takes;
    m->busy[stage] += takes;
    if (at != NULL && !is_receive(op->kind)) {
        *at = m->clock[stage] + m->times.transfer;
    }
    m->next[stage]++;
    return true;
}

/* False: some stage waits for ever. */
static bool simulate(Simulation *m)
{
    bool moved = true;
    uint32_t done = 0;
    while (moved) {
        moved = false;
        for (uint32_t s = 0; s < m->p->n_stages; s++) {
            while (m->next[s] < m->p->stages[s]->len && advance(m, s)) {
                moved = true;
                done += m->next[s] == m->p->stages[s]->len;
            }
        }
    }
    return done == m->p->n_stages;
}

static void simulation_init(Simulation *m, const Pipeline *p, const PipelineTimes *times)
{
    const size_t n = (size_t)p->n_stages * p->n_chunks * p->n_micro;
    *m = (Simulation){.p = p,
                      .times = *times,
                      .next = g_new0(uint32_t, p->n_stages),
                      .clock = g_new0(double, p->n_stages),
                      .busy = g_new0(double, p->n_stages),
                      .forward_at = g_new(double, n),
                      .backward_at = g_new(double, n)};
    for (size_t i = 0; i < n; i++) {
        m->forward_at[i] = m->backward_at[i] = -1.0;
    }
}

static void simulation_clear(Simulation *m)
{
    g_free(m->next);
    g_free(m->clock);
    g_free(m->busy);
    g_free(m->forward_at);
    g_free(m->backward_at);
}

PipelineCost pipeline_simulate(const Pipeline *p, const PipelineTimes *times)
{
    Simulation m;
    PipelineCost cost = {0};
    simulation_init(&m, p, times);
    const bool ends = simulate(&m);
    g_assert(ends);
    for (uint32_t s = 0; s < p->n_stages; s++) {
        cost.makespan = MAX(cost.makespan, m.clock[s]);
    }
    cost.bubble = cost.makespan - m.busy[0];
    simulation_clear(&m);
    return cost;
}

/* ---- beside a real run ---- */

static bool is_of(const Pipeline *p, GArray *const *traces, uint32_t stage)
{
    bool same = traces[stage]->len == p->stages[stage]->len;
    for (uint32_t i = 0; same && i < p->stages[stage]->len; i++) {
        const PipelineOp *got = &g_array_index(traces[stage], PipelineOpTime, i).op,
                         *want = op_at(p, stage, i);
        same = got->kind == want->kind && got->chunk == want->chunk && got->micro == want->micro;
    }
    return same;
}

static const PipelineOpTime *time_at(GArray *const *traces, uint32_t stage, uint32_t i)
{
    return &g_array_index(traces[stage], PipelineOpTime, i);
}

/* The step begins with the first stage's first forward: others may have begun to wait for it while
 * that stage was still at the end of the step before. Returned, like the last end. */
static int64_t traced_begin(GArray *const *traces, int64_t *end_us, uint32_t n_stages)
{
    *end_us = INT64_MIN;
    for (uint32_t s = 0; s < n_stages; s++) {
        *end_us = MAX(*end_us, time_at(traces, s, traces[s]->len - 1)->end_us);
    }
    return time_at(traces, 0, 0)->begin_us;
}

bool pipeline_compare(const Pipeline *p, GArray *const *traces, PipelineComparison *out,
                      GError **error)
{
    Simulation m;
    double busy = 0.0;
    int64_t end_us;
    for (uint32_t s = 0; s < p->n_stages; s++) {
        if (!is_of(p, traces, s)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "the trace of stage %u (%u ops) is not one of schedule %s with %u stages "
                        "and %u micro-batches",
                        s, traces[s]->len, names[p->kind], p->n_stages, p->n_micro);
            return false;
        }
    }
    simulation_init(&m, p, &(const PipelineTimes){0});
    m.traces = traces;
    const int64_t begin_us = traced_begin(traces, &end_us, p->n_stages);
    for (uint32_t s = 0; s < p->n_stages; s++) { /* late for reasons that are not the schedule's */
        m.clock[s] = (double)MAX(time_at(traces, s, 0)->begin_us - begin_us, 0) * 1e-6;
    }
    *out = (PipelineComparison){.makespan = (double)(end_us - begin_us) * 1e-6};
    const bool ends = simulate(&m);
    g_assert(ends);
    for (uint32_t s = 0; s < p->n_stages; s++) {
        busy += m.busy[s];
        out->simulated_makespan = MAX(out->simulated_makespan, m.clock[s]);
    }
    out->idle = 1.0 - busy / (p->n_stages * out->makespan);
    out->simulated_idle = 1.0 - busy / (p->n_stages * out->simulated_makespan);
    simulation_clear(&m);
    return true;
}

/* ---- checking ---- */

static bool refuse(GError **error, const Pipeline *p, uint32_t stage, uint32_t micro,
                   const char *what)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "schedule %s, stage %u of %u, micro-batch %u: %s", names[p->kind], stage,
                p->n_stages, micro, what);
    return false;
}

/* Of one chunk: each kind of op once a micro-batch, in their order, each after what it needs here.
 */
static bool check_chunk(const Pipeline *p, uint32_t stage, uint32_t chunk, GError **error)
{
    static const PipelineOpKind needs[] = {
        [PIPELINE_FORWARD] = PIPELINE_RECEIVE_FORWARD,
        [PIPELINE_SEND_FORWARD] = PIPELINE_FORWARD,
        [PIPELINE_BACKWARD] = PIPELINE_RECEIVE_BACKWARD,
        [PIPELINE_SEND_BACKWARD] = PIPELINE_BACKWARD,
        [PIPELINE_WEIGHTS] = PIPELINE_BACKWARD,
    };
    const bool first = is_first(p, stage, chunk), last = is_last(p, stage, chunk);
    const bool has[] = {!first, true, !last, !last, true, !first, p->kind == PIPELINE_ZERO_BUBBLE};
    uint32_t done[PIPELINE_WEIGHTS + 1] = {0};
    for (uint32_t i = 0; i < p->stages[stage]->len; i++) {
        const PipelineOp *op = op_at(p, stage, i);
        if (op->chunk != chunk) {
            continue;
        }
        if (!has[op->kind] || op->micro != done[op->kind]) {
            return refuse(error, p, stage, op->micro, "out of order, twice, or not its work");
        }
        if (!is_receive(op->kind) && has[needs[op->kind]] && done[needs[op->kind]] <= op->micro) {
            return refuse(error, p, stage, op->micro, "before what it needs");
        }
        if (op->kind == PIPELINE_BACKWARD && done[PIPELINE_FORWARD] <= op->micro) {
            return refuse(error, p, stage, op->micro, "backward before forward");
        }
        done[op->kind]++;
    }
    for (uint32_t k = 0; k <= PIPELINE_WEIGHTS; k++) {
        if (has[k] && done[k] != p->n_micro) {
            return refuse(error, p, stage, done[k], "something is never done");
        }
    }
    return true;
}

/* The next op of a kind from number *i on; NULL: there is none. */
static const PipelineOp *next_of(const Pipeline *p, uint32_t stage, PipelineOpKind kind,
                                 uint32_t *i)
{
    while (*i < p->stages[stage]->len) {
        const PipelineOp *op = op_at(p, stage, (*i)++);
        if (op->kind == kind) {
            return op;
        }
    }
    return NULL;
}

/* What `from` sends is what `to` receives, in that order: the stages are in a ring, and there is
 * one channel each way between neighbours. */
static bool check_channel(const Pipeline *p, uint32_t from, bool forward, GError **error)
{
    const uint32_t n = p->n_stages, to = forward ? (from + 1) % n : (from + n - 1) % n;
    const PipelineOpKind sends = forward ? PIPELINE_SEND_FORWARD : PIPELINE_SEND_BACKWARD,
                         receives = forward ? PIPELINE_RECEIVE_FORWARD : PIPELINE_RECEIVE_BACKWARD;
    uint32_t i = 0, j = 0;
    for (;;) {
        const PipelineOp *sent = next_of(p, from, sends, &i), *got = next_of(p, to, receives, &j);
        if (sent == NULL || got == NULL) {
            return (sent == NULL && got == NULL) ||
                   refuse(error, p, to, 0, "another number of messages than are sent to it");
        }
        const uint32_t place = place_of(p, from, sent->chunk);
        if (sent->micro != got->micro ||
            place_of(p, to, got->chunk) != (forward ? place + 1 : place - 1)) {
            return refuse(error, p, to, got->micro, "received in another order than sent");
        }
    }
}

static bool check_stage(const Pipeline *p, uint32_t stage, GError **error)
{
    for (uint32_t c = 0; c < p->n_chunks; c++) {
        if (!check_chunk(p, stage, c, error)) {
            return false;
        }
    }
    return true;
}

bool pipeline_check(const Pipeline *p, GError **error)
{
    for (uint32_t s = 0; s < p->n_stages; s++) {
        if (!check_stage(p, s, error)) {
            return false;
        }
    }
    for (uint32_t s = 0; s < p->n_stages; s++) {
        if (!check_channel(p, s, true, error) || !check_channel(p, s, false, error)) {
            return false;
        }
    }
    Simulation m;
    simulation_init(&m, p, &(const PipelineTimes){1.0, 1.0, 1.0, 0.0});
    const bool ends = simulate(&m);
    simulation_clear(&m);
    return ends || refuse(error, p, 0, 0, "stages wait for each other for ever");
}
