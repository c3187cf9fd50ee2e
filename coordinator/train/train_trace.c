#include "coordinator/train/train_trace.h"

#include "coordinator/train/train_file.h"
#include "proto/base/error.h"
#include "proto/plan/train_layout.h"
#include "proto/plan/train_limits.h"

#include <inttypes.h>
#include <jansson.h>
#include <string.h>

#define TIME_LIMIT (INT64_C(1) << 53) /* of a clock that is believed: no sum of times overflows */

static const char *const op_names[] = {"receive forward",  "forward",  "send forward",
                                       "receive backward", "backward", "send backward",
                                       "weights"};
static const char *const op_categories[] = {"wait",    "compute", "send",   "wait",
                                            "compute", "send",    "compute"};

typedef struct TraceOp {
    uint32_t kind, chunk, micro;
    int64_t begin_us, end_us;
} TraceOp;

typedef struct TraceStep {
    uint64_t step;
    int64_t begin_us, end_us;
    guint first, n; /* of the rank's ops */
} TraceStep;

typedef struct TraceRank {
    TrainPosition at;
    char *worker;
    uint32_t host; /* index of its first rank: what clock it tells times by */
    uint64_t next; /* the step that it is to tell of */
    GArray *steps; /* of TraceStep: whole ones, and the one that is being told */
    GArray *ops;   /* of TraceOp */
    bool told;     /* some of step `next` */
} TraceRank;

struct TrainTrace {
    char *job;
    const char *schedule;
    TrainLayoutChoice layout;
    uint64_t end;   /* the step after the last one traced */
    uint64_t limit; /* steps from here on are left out: there was too much before */
    uint64_t n_ops;
    uint32_t n_ranks;
    TraceRank *ranks;
    int64_t *shifts; /* by host: from its clock to the coordinator's; G_MAXINT64: not known */
};

/* ---- life ---- */

/* The first rank that tells times by the same clock. */
static uint32_t host_of(const char *const *hosts, uint32_t rank)
{
    for (uint32_t r = 0; r < rank && hosts[rank] != NULL; r++) {
        if (g_strcmp0(hosts[r], hosts[rank]) == 0) {
            return r;
        }
    }
    return rank;
}

static void rank_init(TraceRank *r, const Plan *plan, uint32_t index, uint32_t host, uint64_t first)
{
    r->worker = g_strdup(train_plan_rank(plan, index, &r->at)->worker);
    r->host = host;
    r->next = first;
    r->steps = g_array_new(FALSE, FALSE, sizeof(TraceStep));
    r->ops = g_array_new(FALSE, FALSE, sizeof(TraceOp));
}

TrainTrace *train_trace_new(const JobSpec *spec, const TrainLayoutChoice *layout, const Plan *plan,
                            const char *const *hosts, uint64_t first_step)
{
    const uint64_t end = MIN(spec->trace_first - 1 + spec->trace_steps, spec->steps);
    if (spec->trace_file == NULL || first_step >= end) {
        return NULL;
    }
    TrainTrace *t = g_new0(TrainTrace, 1);
    t->job = g_strdup(spec->name);
    t->schedule = train_layout_schedule(layout);
    t->layout = *layout;
    t->end = t->limit = end;
    t->n_ranks = layout->dp * layout->pp * layout->tp;
    t->ranks = g_new0(TraceRank, t->n_ranks);
    t->shifts = g_new0(int64_t, t->n_ranks);
    for (uint32_t r = 0; r < t->n_ranks; r++) {
        t->shifts[r] = G_MAXINT64;
        rank_init(&t->ranks[r], plan, r, host_of(hosts, r), MAX(first_step, spec->trace_first - 1));
    }
    return t;
}

void train_trace_free(TrainTrace *t)
{
    if (t == NULL) {
        return;
    }
    for (uint32_t r = 0; r < t->n_ranks; r++) {
        g_free(t->ranks[r].worker);
        g_array_unref(t->ranks[r].steps);
        g_array_unref(t->ranks[r].ops);
    }
    g_free(t->ranks);
    g_free(t->shifts);
    g_free(t->job);
    g_free(t);
}

/* ---- what ranks tell ---- */

static bool refuse(GError **error, const TraceRank *r, const Weft__V1__TrainTrace *m)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "worker %s tells of step %" PRIu64 " what cannot be: %" PRIu64
                " is traced next, in operations of an order, %u in a message",
                r->worker, m->step, r->next, TRAIN_TRACE_OPS);
    return false;
}

/* Operations of known kinds, one after the other, inside the step. */
static bool check_ops(const Weft__V1__TrainTrace *m)
{
    int64_t at = m->begin_us;
    bool ok = m->begin_us >= 0 && m->end_us >= m->begin_us && m->now_us >= m->end_us &&
              m->now_us <= TIME_LIMIT && m->n_ops <= TRAIN_TRACE_OPS && (m->n_ops > 0 || m->last);
    for (size_t i = 0; ok && i < m->n_ops; i++) {
        const Weft__V1__TrainTraceOp *op = m->ops[i];
        ok = op->kind < G_N_ELEMENTS(op_names) && op->begin_us >= at &&
             op->end_us >= op->begin_us && op->end_us <= m->end_us;
        at = op->end_us;
    }
    return ok;
}

static void keep_ops(TrainTrace *t, TraceRank *r, const Weft__V1__TrainTrace *m)
{
    if (!r->told) {
        const TraceStep step = {m->step, m->begin_us, m->end_us, r->ops->len, 0};
        g_array_append_val(r->steps, step);
    }
    for (size_t i = 0; i < m->n_ops; i++) {
        const Weft__V1__TrainTraceOp *o = m->ops[i];
        const TraceOp op = {o->kind, o->chunk, o->micro, o->begin_us, o->end_us};
        g_array_append_val(r->ops, op);
    }
    g_array_index(r->steps, TraceStep, r->steps->len - 1).n += (guint)m->n_ops;
    t->n_ops += m->n_ops;
}

bool train_trace_add(TrainTrace *t, uint32_t rank, const Weft__V1__TrainTrace *m, int64_t now_us,
                     GError **error)
{
    TraceRank *r = &t->ranks[rank];
    int64_t *shift = &t->shifts[r->host];
    if (m->step != r->next || r->next >= t->end || !check_ops(m)) {
        return refuse(error, r, m);
    }
    *shift = MIN(*shift, now_us - m->now_us);
    if (t->n_ops + m->n_ops > TRAIN_TRACE_OPS_LIMIT) {
        t->limit = MIN(t->limit, m->step);
    }
    if (m->step < t->limit) {
        keep_ops(t, r, m);
    }
    r->told = !m->last;
    r->next += m->last;
    return true;
}

bool train_trace_is_whole(const TrainTrace *t)
{
    for (uint32_t r = 0; r < t->n_ranks; r++) {
        if (t->ranks[r].next < t->end) {
            return false;
        }
    }
    return true;
}

/* ---- the text ---- */

/* When the first of what is told began, by the coordinator's clock. */
static int64_t first_time(const TrainTrace *t)
{
    int64_t first = G_MAXINT64;
    for (uint32_t r = 0; r < t->n_ranks; r++) {
        const TraceRank *rank = &t->ranks[r];
        if (rank->steps->len > 0) {
            first = MIN(first,
                        g_array_index(rank->steps, TraceStep, 0).begin_us + t->shifts[rank->host]);
        }
    }
    return first;
}

static void append_json(GString *out, json_t *object /* taken */)
{
    g_autofree char *text = json_dumps(object, JSON_COMPACT);
    g_string_append(out, text);
    json_decref(object);
}

static uint32_t thread_of(const TraceRank *r)
{
    return r->at.stage * r->at.tp + r->at.rank;
}

static void append_names(GString *out, const TraceRank *r)
{
    g_autofree char *replica = g_strdup_printf("replica %u", r->at.replica),
                    *rank =
                        g_strdup_printf("stage %u rank %u: %s", r->at.stage, r->at.rank, r->worker);
    const int pid = (int)r->at.replica, tid = (int)thread_of(r);
    append_json(out, json_pack("{s:s,s:s,s:i,s:i,s:{s:s}}", "name", "process_name", "ph", "M",
                               "pid", pid, "tid", tid, "args", "name", replica));
    g_string_append(out, ",\n");
    append_json(out, json_pack("{s:s,s:s,s:i,s:i,s:{s:s}}", "name", "thread_name", "ph", "M", "pid",
                               pid, "tid", tid, "args", "name", rank));
}

/* An event that begins and ends, up to its arguments. */
static void append_span(GString *out, const TraceRank *r, const char *name, const char *category,
                        int64_t begin_us, int64_t end_us)
{
    g_string_append_printf(out,
                           ",\n{\"name\":\"%s\",\"cat\":\"%s\",\"ph\":\"X\",\"pid\":%u,\"tid\":%u,"
                           "\"ts\":%" PRId64 ",\"dur\":%" PRId64,
                           name, category, r->at.replica, thread_of(r), begin_us,
                           end_us - begin_us);
}

static void append_step(GString *out, const TraceRank *r, const TraceStep *s, int64_t shift)
{
    const TraceOp *ops = (const TraceOp *)(const void *)r->ops->data + s->first;
    char name[32];
    g_snprintf(name, sizeof name, "step %" PRIu64, s->step + 1);
    append_span(out, r, name, "step", s->begin_us + shift, s->end_us + shift);
    g_string_append_printf(out, ",\"args\":{\"step\":%" PRIu64 "}}", s->step + 1);
    for (guint i = 0; i < s->n; i++) {
        const TraceOp *op = &ops[i];
        append_span(out, r, op_names[op->kind], op_categories[op->kind], op->begin_us + shift,
                    op->end_us + shift);
        g_string_append_printf(out, ",\"args\":{\"step\":%" PRIu64 ",\"micro\":%u,\"chunk\":%u}}",
                               s->step + 1, op->micro, op->chunk);
    }
    const int64_t passed = s->n > 0 ? ops[s->n - 1].end_us : s->begin_us;
    append_span(out, r, "exchange and update", "update", passed + shift, s->end_us + shift);
    g_string_append_printf(out, ",\"args\":{\"step\":%" PRIu64 "}}", s->step + 1);
}

static void append_rank(GString *out, const TrainTrace *t, const TraceRank *r, int64_t first)
{
    append_names(out, r);
    for (guint i = 0; i < r->steps->len; i++) {
        const TraceStep *s = &g_array_index(r->steps, TraceStep, i);
        if (s->step < t->limit) {
            append_step(out, r, s, t->shifts[r->host] - first);
        }
    }
}

char *train_trace_json(const TrainTrace *t)
{
    const int64_t first = first_time(t);
    g_autofree char *layout =
        g_strdup_printf("dp %u, pp %u, tp %u", t->layout.dp, t->layout.pp, t->layout.tp);
    GString *out = g_string_new("{\"version\":1,\"displayTimeUnit\":\"ms\",\"otherData\":");
    append_json(out, json_pack("{s:s,s:s,s:s,s:i}", "job", t->job, "layout", layout, "schedule",
                               t->schedule, "chunks", (int)t->layout.chunks));
    g_string_append(out, ",\n\"traceEvents\":[\n");
    for (uint32_t r = 0; r < t->n_ranks; r++) {
        g_string_append(out, r > 0 ? ",\n" : "");
        append_rank(out, t, &t->ranks[r], first);
    }
    g_string_append(out, "\n]}\n");
    return g_string_free(out, FALSE);
}

/* ---- the file ---- */

char *train_trace_write(const TrainTrace *t, const char *path)
{
    g_autofree char *text = train_trace_json(t);
    g_autoptr(GError) error = NULL;
    if (!train_file_write(path, text, &error)) {
        return g_strdup_printf("no trace: %s", error->message);
    }
    if (t->limit < t->end) {
        return g_strdup_printf("trace %s, without its last %" PRIu64
                               " steps: they have too many operations; name fewer trace.steps",
                               path, t->end - t->limit);
    }
    return g_strdup_printf("trace %s", path);
}
