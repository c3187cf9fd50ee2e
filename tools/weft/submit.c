/* weft submit, jobs, logs, cancel: jobs that the coordinator keeps until they are cancelled. */
#include "tools/weft/job_file.h"
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/config/job_spec.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define ADMIN (&weft__v1__admin__descriptor)

typedef struct JobOptions {
    CommonOptions common;
    bool follow;
} JobOptions;

static const Option PLAIN_OPTIONS[] = {COMMON_OPTIONS(JobOptions), {0}};
static const Option LOGS_OPTIONS[] = {
    {"follow", 'f', OPTION_FLAG, offsetof(JobOptions, follow), "",
     "go on with what happens from now, until the job ends", NULL, 0, 0, NULL, false},
    COMMON_OPTIONS(JobOptions),
    {0},
};

/* ---- submit ---- */

static int submit_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const JobOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one job file is expected");
    }
    g_autoptr(JobSpec) spec = job_file_read(rest->pdata[0], &error);
    if (spec == NULL) {
        return cli_fail(error);
    }
    g_autoptr(GString) text = g_string_new(NULL);
    job_spec_print(spec, text);
    if (o->common.dry_run) {
        printf("%s", text->str);
        return 0;
    }
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    ProtobufCMessage *response;
    request.spec = text->str;
    if (!admin_call(&o->common, "Submit", &request.base, &response, &error)) {
        return cli_fail(error);
    }
    protobuf_c_message_free_unpacked(response, NULL);
    if (o->common.json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:s,s:s}", "name", spec->name, "kind",
                                                 spec->kind == JOB_TRAIN ? "train" : "serve"));
        cli_print_json(object);
    } else {
        printf("%s\n", spec->name);
        if (!o->common.quiet) {
            fprintf(stderr, "submitted: weft jobs shows it, weft logs %s -f follows it\n",
                    spec->name);
        }
    }
    return 0;
}

/* ---- jobs ---- */

static void print_jobs_json(const Weft__V1__ListJobsResponse *response)
{
    json_t *object = cli_json_new(), *jobs = json_array();
    for (size_t i = 0; i < response->n_jobs; i++) {
        const Weft__V1__Submission *j = response->jobs[i];
        json_array_append_new(
            jobs,
            json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:I,s:I,s:s,s:s}", "name", j->name, "kind",
                      j->kind, "state", j->state, "reason", j->reason, "job", j->job, "model",
                      j->model, "owner", j->owner, "submitted", (json_int_t)j->submitted, "age_ms",
                      (json_int_t)j->age_ms, "address", j->address, "spec", j->spec));
    }
    json_object_set_new(object, "jobs", jobs);
    cli_print_json(object);
}

static void print_jobs(const Weft__V1__ListJobsResponse *response)
{
    TextTable *t = text_table_new(
        (const char *const[]){"NAME", "KIND", "STATE", "JOB", "OWNER", "REASON", "AGE", NULL});
    for (size_t i = 0; i < response->n_jobs; i++) {
        const Weft__V1__Submission *j = response->jobs[i];
        g_autofree char *age = units_format_duration((int64_t)j->age_ms / 1000 * 1000000);
        text_table_row(t, j->name, j->kind, j->state, j->job[0] != '\0' ? j->job : "-", j->owner,
                       j->reason[0] != '\0' ? j->reason : "-", age, NULL);
    }
    text_table_fit(t, 5);
    text_table_print(t);
    if (response->n_jobs > 0 && response->jobs[0]->address[0] != '\0') {
        printf("\noffered at %s/v1\n", response->jobs[0]->address);
    }
}

static int jobs_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const JobOptions *o = values;
    GError *error = NULL;
    if (rest->len > 0) {
        return cli_usage(verb, "'%s' is not expected", (char *)rest->pdata[0]);
    }
    Weft__V1__ListJobsRequest request = WEFT__V1__LIST_JOBS_REQUEST__INIT;
    Weft__V1__ListJobsResponse *response;
    if (!admin_call(&o->common, "ListJobs", &request.base, (ProtobufCMessage **)&response,
                    &error)) {
        return cli_fail(error);
    }
    if (o->common.json) {
        print_jobs_json(response);
    } else {
        print_jobs(response);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return 0;
}

/* ---- logs ---- */

static void print_line(const ProtobufCMessage *message, void *user)
{
    const JobOptions *o = user;
    const Weft__V1__JobLine *line = (const Weft__V1__JobLine *)message;
    g_autoptr(GDateTime) then = g_date_time_new_from_unix_utc((gint64)(line->time_ms / 1000));
    g_autofree char *seconds = g_date_time_format(then, "%Y-%m-%dT%H:%M:%S");
    if (o->common.json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:I,s:s}", "time_ms", (json_int_t)line->time_ms,
                                                 "text", line->text));
        cli_print_json(object);
    } else {
        printf("%s.%03uZ %s\n", seconds, (unsigned)(line->time_ms % 1000), line->text);
        fflush(stdout);
    }
}

static int logs_run(const Verb *verb, void *values, GPtrArray *rest)
{
    JobOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one job is expected");
    }
    Client *client = client_new(&o->common, &error);
    if (client == NULL) {
        return cli_fail(error);
    }
    Weft__V1__LogsRequest request = WEFT__V1__LOGS_REQUEST__INIT;
    request.name = rest->pdata[0];
    request.follow = o->follow;
    const bool ok = client_stream(client, ADMIN, "Logs", &request.base, 0, print_line, o, &error);
    const bool interrupted = client->interrupted;
    client_free(client);
    if (interrupted) {
        g_clear_error(&error);
        return 130;
    }
    if (g_error_matches(error, WEFT_ERROR, WEFT_ERROR_CANCELLED)) { /* its last line says so */
        g_clear_error(&error);
        return 0;
    }
    return ok ? 0 : cli_fail(error);
}

/* ---- cancel ---- */

static int cancel_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const JobOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one job is expected");
    }
    Weft__V1__CancelJobRequest request = WEFT__V1__CANCEL_JOB_REQUEST__INIT;
    ProtobufCMessage *response;
    request.name = rest->pdata[0];
    if (o->common.dry_run) {
        printf("would cancel %s\n", request.name);
        return 0;
    }
    if (!admin_call(&o->common, "CancelJob", &request.base, &response, &error)) {
        return cli_fail(error);
    }
    protobuf_c_message_free_unpacked(response, NULL);
    if (!o->common.quiet) {
        fprintf(stderr, "%s is cancelled\n", request.name);
    }
    return 0;
}

const Verb VERB_SUBMIT = {"submit",
                          "SPEC.yaml [--dry-run]",
                          "hand a job over: serve until it is cancelled, or train",
                          PLAIN_OPTIONS,
                          sizeof(JobOptions),
                          NULL,
                          submit_run};
const Verb VERB_JOBS = {
    "jobs", "", "the jobs that were submitted", PLAIN_OPTIONS, sizeof(JobOptions), NULL, jobs_run};
const Verb VERB_LOGS = {"logs",
                        "JOB [-f]",
                        "what happened to a job since the coordinator "
                        "started",
                        LOGS_OPTIONS,
                        sizeof(JobOptions),
                        NULL,
                        logs_run};
const Verb VERB_CANCEL = {
    "cancel", "JOB",     "end a submitted job and its requests", PLAIN_OPTIONS, sizeof(JobOptions),
    NULL,     cancel_run};
