/* weft why: who waits for what, since when. */
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/units.h"

#include <stdio.h>
#include <string.h>

#define STALL_MS 1000u /* workers wait for each other all the time; longer is worth a line */

typedef struct WhyOptions {
    CommonOptions common;
} WhyOptions;

static const Option WHY_OPTIONS[] = {COMMON_OPTIONS(WhyOptions), {0}};

/* ---- JSON ---- */

static json_t *waits_json(const Weft__V1__Reason *r)
{
    json_t *waits = json_array();
    for (size_t i = 0; i < r->n_waits; i++) {
        const Weft__V1__Wait *w = r->waits[i];
        json_array_append_new(waits,
                              json_pack("{s:s,s:s,s:s,s:I,s:b}", "waiter", w->waiter, "waits_for",
                                        w->waits_for, "what", w->what, "since_ms",
                                        (json_int_t)w->since_ms, "sink", (int)w->sink));
    }
    return waits;
}

static json_t *resume_json(const Weft__V1__Reason *r)
{
    return r->cause[0] == '\0' ? json_null()
                               : json_pack("{s:s,s:I,s:f,s:I}", "cause", r->cause, "stalled_ms",
                                           (json_int_t)r->stalled_ms, "predicted_s", r->predicted_s,
                                           "tokens_again", (json_int_t)r->tokens_again);
}

static json_t *reason_json(const Weft__V1__Reason *r)
{
    json_t *object = json_pack("{s:s,s:s,s:s,s:I,s:I,s:s,s:s,s:s,s:o,s:o}", "kind", r->kind, "id",
                               r->id, "state", r->state, "state_ms", (json_int_t)r->state_ms,
                               "age_ms", (json_int_t)r->age_ms, "text", r->text, "job", r->job,
                               "model", r->model, "waits", waits_json(r), "resume", resume_json(r));
    if (r->placed) {
        json_object_set_new(object, "replica", json_integer(r->replica));
        json_object_set_new(object, "epoch", json_integer((json_int_t)r->epoch));
    }
    if (strcmp(r->kind, "request") == 0) {
        json_object_set_new(object, "tokens", json_integer(r->tokens));
    }
    if (r->client_id[0] != '\0') {
        json_object_set_new(object, "client_id", json_string(r->client_id));
    }
    return object;
}

static void print_json(const Weft__V1__WhyResponse *response)
{
    json_t *object = cli_json_new(), *reasons = json_array();
    for (size_t i = 0; i < response->n_reasons; i++) {
        json_array_append_new(reasons, reason_json(response->reasons[i]));
    }
    json_object_update_new(object, json_pack("{s:o,s:I}", "reasons", reasons, "left_out",
                                             (json_int_t)response->left_out));
    cli_print_json(object);
}

/* ---- text ---- */

static char *time_text(uint64_t ms)
{
    return units_format_duration((int64_t)ms * 1000);
}

static void print_waits(const Weft__V1__Reason *r)
{
    if (r->n_waits == 0) {
        return;
    }
    printf("\n");
    TextTable *t =
        text_table_new((const char *const[]){"WAITER", "WAITS FOR", "WHAT", "SINCE", NULL});
    for (size_t i = 0; i < r->n_waits; i++) {
        const Weft__V1__Wait *w = r->waits[i];
        g_autofree char *since = time_text(w->since_ms);
        text_table_row(t, w->waiter, w->waits_for, w->what, since, NULL);
    }
    text_table_fit(t, 2);
    text_table_print(t);
}

static void print_resume(const Weft__V1__Reason *r)
{
    if (r->cause[0] == '\0') {
        return;
    }
    g_autofree char *stalled = time_text(r->stalled_ms);
    printf("after: %s\nstalled for %s", r->cause, stalled);
    if (r->predicted_s > 0) {
        printf(", predicted %.2fs", r->predicted_s);
    }
    if (r->tokens_again > 0) {
        printf(", %" G_GUINT64_FORMAT " tokens to compute again", r->tokens_again);
    }
    printf("\n");
}

static void print_reason(const Weft__V1__Reason *r)
{
    g_autofree char *since = time_text(r->state_ms), *age = time_text(r->age_ms);
    printf("%s %s is %s for %s, %s old\n", r->kind, r->id, r->state, since, age);
    if (r->job[0] != '\0' && strcmp(r->job, r->id) != 0) {
        printf("job %s", r->job);
        if (r->placed) {
            printf(" replica %u epoch %" G_GUINT64_FORMAT, r->replica, r->epoch);
        }
        printf("\n");
    }
    if (r->text[0] != '\0') {
        printf("%s\n", r->text);
    }
    print_resume(r);
    for (size_t i = 0; i < r->n_waits; i++) {
        if (r->waits[i]->sink && r->waits[i]->since_ms >= STALL_MS) {
            printf("all wait for worker %s: %s\n", r->waits[i]->waits_for, r->waits[i]->what);
        }
    }
    print_waits(r);
}

/* A row each: what its chain ends at. */
static void print_all(const Weft__V1__WhyResponse *response)
{
    TextTable *t = text_table_new(
        (const char *const[]){"NAME", "KIND", "STATE", "WAITS FOR", "WHAT", "SINCE", "AGE", NULL});
    for (size_t i = 0; i < response->n_reasons; i++) {
        const Weft__V1__Reason *r = response->reasons[i];
        const Weft__V1__Wait *last = r->n_waits > 0 ? r->waits[r->n_waits - 1] : NULL;
        for (size_t k = 0; k < r->n_waits; k++) {
            last = r->waits[k]->sink ? r->waits[k] : last;
        }
        g_autofree char *since = last != NULL ? time_text(last->since_ms) : g_strdup("-");
        g_autofree char *age = time_text(r->age_ms);
        text_table_row(t, r->id, r->kind, r->state, last != NULL ? last->waits_for : "-",
                       last != NULL ? last->what : "-", since, age, NULL);
    }
    text_table_fit(t, 4);
    text_table_print(t);
    if (response->left_out > 0) {
        printf("and %u more\n", response->left_out);
    }
}

static int why_run(const Verb *verb, void *values, GPtrArray *rest)
{
    WhyOptions *o = values;
    GError *error = NULL;
    if (rest->len > 1) {
        return cli_usage(verb, "one request or job is expected");
    }
    Weft__V1__WhyRequest request = WEFT__V1__WHY_REQUEST__INIT;
    Weft__V1__WhyResponse *response;
    request.what = rest->len == 1 ? rest->pdata[0] : (char *)"";
    if (!admin_call(&o->common, "Why", &request.base, (ProtobufCMessage **)&response, &error)) {
        return cli_fail(error);
    }
    if (o->common.json) {
        print_json(response);
    } else if (rest->len == 0) {
        print_all(response);
    } else {
        for (size_t i = 0; i < response->n_reasons; i++) {
            printf("%s", i > 0 ? "\n" : "");
            print_reason(response->reasons[i]);
        }
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return 0;
}

const Verb VERB_WHY = {"why",       "[REQUEST|JOB]",    "who waits for what, since when",
                       WHY_OPTIONS, sizeof(WhyOptions), NULL,
                       why_run};
