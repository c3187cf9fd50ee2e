#include "tools/weft/request.h"

#include "proto/base/error.h"
#include "proto/plan/plan.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { ADMIN_DEADLINE_MS = 10000 };

bool admin_call(const CommonOptions *common, const char *method, const ProtobufCMessage *request,
                ProtobufCMessage **response, GError **error)
{
    Client *client = client_new(common, error);
    if (client == NULL) {
        return false;
    }
    const bool ok = client_call(client, &weft__v1__admin__descriptor, method, request,
                                ADMIN_DEADLINE_MS, response, error);
    client_free(client);
    return ok;
}

Weft__V1__StatusResponse *request_status(Client *client, GError **error)
{
    Weft__V1__StatusRequest request = WEFT__V1__STATUS_REQUEST__INIT;
    ProtobufCMessage *response;
    request.details = true;
    return client_call(client, &weft__v1__admin__descriptor, "Status", &request.base,
                       ADMIN_DEADLINE_MS, &response, error)
               ? (Weft__V1__StatusResponse *)response
               : NULL;
}

bool member_is_usable(const Weft__V1__Member *m)
{
    return strcmp(m->state, "ready") == 0 || strcmp(m->state, "serving") == 0;
}

void request_defaults(RequestOptions *o)
{
    *o = (RequestOptions){.repeat_penalty = 1.0, .penalty_window = 64, .n = 128};
}

char *request_model_path(const char *model)
{
    return g_file_test(model, G_FILE_TEST_EXISTS) ? g_canonicalize_filename(model, NULL)
                                                  : g_strdup(model);
}

bool request_fill(Weft__V1__RunRequest *message, Weft__V1__Sampler *sampler,
                  Weft__V1__Layout *layout, const RequestOptions *o, GError **error)
{
    weft__v1__sampler__init(sampler);
    weft__v1__layout__init(layout);
    sampler->temperature = (float)o->temperature;
    sampler->top_k = (uint32_t)o->top_k;
    sampler->top_p = (float)o->top_p;
    sampler->min_p = (float)o->min_p;
    sampler->repeat_penalty = (float)o->repeat_penalty;
    sampler->penalty_window = (uint32_t)o->penalty_window;
    if (o->seed_text != NULL) {
        char *end;
        errno = 0;
        sampler->seed = g_ascii_strtoull(o->seed_text, &end, 10);
        if (errno != 0 || end == o->seed_text || *end != '\0' || o->seed_text[0] == '-') {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "seed '%s' is not a number from 0 to 2^64-1", o->seed_text);
            return false;
        }
        message->seed_given = 1;
    }
    layout->dp = (uint32_t)o->dp;
    layout->pp = (uint32_t)o->pp;
    layout->tp = (uint32_t)o->tp;
    message->sampler = sampler;
    message->layout = layout;
    message->max_tokens = (uint32_t)o->n;
    message->context = (uint32_t)o->context;
    message->numerics = o->numerics != NULL ? o->numerics : "";
    message->kv = o->kv != NULL ? o->kv : "";
    return true;
}

void run_outcome_clear(RunOutcome *o)
{
    if (o->text != NULL) {
        g_string_free(o->text, TRUE);
    }
    g_clear_pointer(&o->ids, g_array_unref);
    g_clear_pointer(&o->logits, g_array_unref);
    g_clear_pointer(&o->row_hashes, g_byte_array_unref);
    g_clear_pointer(&o->trace, g_byte_array_unref);
    json_decref(o->logprobs);
    g_free(o->finish_reason);
    if (o->plan != NULL) {
        weft__v1__plan__free_unpacked(o->plan, NULL);
    }
    *o = (RunOutcome){0};
}

/* ---- events ---- */

typedef struct Collector {
    const CommonOptions *common;
    RunOutcome *out;
    FILE *echo;
    Client *client;
    const RequestHooks *hooks; /* NULL: none */
    GError *error;             /* of a hook; the request is being ended */
} Collector;

static void hex(const ProtobufCBinaryData *bytes, char out[33])
{
    out[0] = '\0';
    for (size_t i = 0; i < bytes->len && i < 16; i++) {
        snprintf(out + 2 * i, 3, "%02x", bytes->data[i]);
    }
}

static Weft__V1__Plan *copy_plan(const Weft__V1__Plan *plan)
{
    const size_t size = weft__v1__plan__get_packed_size(plan);
    g_autofree uint8_t *bytes = g_malloc(size + 1);
    weft__v1__plan__pack(plan, bytes);
    return weft__v1__plan__unpack(NULL, size, bytes);
}

static void take_started(RunOutcome *out, const Weft__V1__RunStarted *s)
{
    if (out->plan == NULL && s->plan != NULL) {
        out->plan = copy_plan(s->plan);
    }
    out->prompt_tokens = s->prompt_tokens;
    out->seed = s->seed;
    out->load_s = s->load_s;
    out->epoch = s->epoch;
    out->replica = s->replica;
    hex(&s->definition, out->definition);
    out->numerics = out->plan != NULL ? plan_message_numerics(out->plan) : "";
}

/* JSON has no infinities: what is impossible gets the least float. */
static double finite_logprob(float logprob)
{
    return fmax((double)logprob, (double)-FLT_MAX);
}

/* {"id", "logprob", "top": [{"id", "logprob", "text"}]} of a delta with one token. */
static json_t *delta_logprobs(const Weft__V1__RunDelta *d)
{
    json_t *list = json_array();
    for (size_t i = 0; i < d->n_top; i++) {
        const Weft__V1__TopLogprob *t = d->top[i];
        g_autofree char *text = g_utf8_make_valid(t->text.len > 0 ? (const char *)t->text.data : "",
                                                  (gssize)t->text.len);
        json_array_append_new(list,
                              json_pack("{s:I,s:f,s:o}", "id", (json_int_t)t->id, "logprob",
                                        finite_logprob(t->logprob), "text", json_string(text)));
    }
    return json_pack("{s:I,s:f,s:o}", "id", (json_int_t)d->ids[0], "logprob",
                     finite_logprob(d->logprobs[0]), "top", list);
}

static void take_delta(Collector *c, const Weft__V1__RunDelta *d)
{
    g_string_append(c->out->text, d->text);
    g_array_append_vals(c->out->ids, d->ids, (guint)d->n_ids);
    g_array_append_vals(c->out->logits, d->logits.data, (guint)(d->logits.len / sizeof(float)));
    g_byte_array_append(c->out->row_hashes, d->row_hash.data, (guint)d->row_hash.len);
    g_byte_array_append(c->out->trace, d->trace.data, (guint)d->trace.len);
    if (c->out->logprobs != NULL && d->n_ids == 1 && d->n_logprobs == 1) {
        json_array_append_new(c->out->logprobs, delta_logprobs(d));
    }
    if (c->echo != NULL) {
        fputs(d->text, c->echo);
        fflush(c->echo);
    }
}

static void take_done(RunOutcome *out, const Weft__V1__RunDone *d)
{
    g_free(out->finish_reason);
    out->finish_reason = g_strdup(d->finish_reason);
    hex(&d->digest, out->digest);
    out->prefill_s = d->prefill_s;
    out->decode_s = d->decode_s;
    out->prefill_tokens = d->prefill_tokens;
    out->nll_sum = d->nll_sum;
    out->tokens_scored = d->tokens_scored;
    out->wire_bytes = d->wire_bytes;
    out->recoveries = d->recoveries;
    out->stall_s = d->stall_s;
}

/* Both end in the same terminal, pipe or file. */
static bool same_place(FILE *a, FILE *b)
{
    struct stat one, other;
    return a != NULL && fstat(fileno(a), &one) == 0 && fstat(fileno(b), &other) == 0 &&
           one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

/* A loss and what became of it: a line of its own, below what was printed of the answer so far. */
static void take_progress(Collector *c, const Weft__V1__RunProgress *p)
{
    if (c->out->plan == NULL) {
        cli_progress(c->common, "%s", p->text);
    } else if (p->notice && !c->common->quiet) {
        const bool in_line = c->out->text->len > 0 && same_place(c->echo, stderr);
        fprintf(stderr, "%s%s\n", in_line ? "\n" : "", p->text);
        fflush(stderr);
    }
}

static void hooked(Collector *c, bool ok)
{
    if (!ok) {
        client_stop(c->client);
    }
}

static void on_event(const ProtobufCMessage *message, void *user)
{
    Collector *c = user;
    const Weft__V1__RunEvent *e = (const Weft__V1__RunEvent *)message;
    if (c->error != NULL) {
        return;
    }
    switch (e->event_case) {
    case WEFT__V1__RUN_EVENT__EVENT_PROGRESS:
        take_progress(c, e->progress);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_STARTED:
        cli_progress_end(c->common);
        take_started(c->out, e->started);
        hooked(c, c->hooks == NULL || c->hooks->started(e->started, c->hooks->user, &c->error));
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DELTA:
        if (c->hooks == NULL) {
            take_delta(c, e->delta);
        } else {
            hooked(c, c->hooks->delta(e->delta, c->hooks->user, &c->error));
        }
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DONE:
        take_done(c->out, e->done);
        break;
    default:
        break; /* an event of a newer release */
    }
}

static bool collect(Client *client, const CommonOptions *common,
                    const Weft__V1__RunRequest *message, FILE *echo, const RequestHooks *hooks,
                    RunOutcome *out, GError **error)
{
    *out = (RunOutcome){.text = g_string_new(NULL),
                        .ids = g_array_new(FALSE, FALSE, sizeof(uint32_t)),
                        .logits = g_array_new(FALSE, FALSE, sizeof(float)),
                        .row_hashes = g_byte_array_new(),
                        .trace = g_byte_array_new(),
                        .logprobs = message->top_logprobs > 0 ? json_array() : NULL};
    Collector c = {common, out, echo, client, hooks, NULL};
    bool ok = client_stream(client, &weft__v1__serve__descriptor, "Run", &message->base, 0,
                            on_event, &c, error);
    cli_progress_end(common);
    if (c.error != NULL) { /* it, not that the request was cancelled */
        g_clear_error(error);
        g_propagate_error(error, c.error);
        ok = false;
    }
    return ok;
}

bool request_run(Client *client, const CommonOptions *common, const Weft__V1__RunRequest *message,
                 FILE *echo, RunOutcome *out, GError **error)
{
    return collect(client, common, message, echo, NULL, out, error);
}

bool request_run_hooked(Client *client, const CommonOptions *common,
                        const Weft__V1__RunRequest *message, const RequestHooks *hooks,
                        RunOutcome *out, GError **error)
{
    return collect(client, common, message, NULL, hooks, out, error);
}

/* ---- layouts ---- */

char *plan_message_layout(const Weft__V1__Plan *plan)
{
    GString *text = g_string_new(NULL);
    const Weft__V1__Replica *r = plan->n_replicas > 0 ? plan->replicas[0] : NULL;
    g_string_append_printf(text, "dp%zu pp%zu tp", plan->n_replicas, r != NULL ? r->n_stages : 0);
    for (size_t s = 0; r != NULL && s < r->n_stages; s++) {
        g_string_append_printf(text, "%s%zu", s > 0 ? "," : "", r->stages[s]->n_ranks);
    }
    return g_string_free(text, FALSE);
}

json_t *plan_message_layout_json(const Weft__V1__Plan *plan)
{
    const Weft__V1__Replica *r = plan->n_replicas > 0 ? plan->replicas[0] : NULL;
    size_t tp = 0;
    for (size_t s = 0; r != NULL && s < r->n_stages; s++) {
        tp = MAX(tp, r->stages[s]->n_ranks);
    }
    return json_pack("{s:I,s:I,s:I}", "dp", (json_int_t)plan->n_replicas, "pp",
                     (json_int_t)(r != NULL ? r->n_stages : 0), "tp", (json_int_t)tp);
}

char *job_layout_text(const Weft__V1__Job *job)
{
    return g_strconcat(job->layout, strcmp(job->numerics, "fast") == 0 ? " fast" : "", NULL);
}

const char *plan_message_numerics(const Weft__V1__Plan *plan)
{
    return numerics_name(plan->definition != NULL ? (NumericsClass)plan->definition->numerics
                                                  : NUMERICS_EXACT);
}
