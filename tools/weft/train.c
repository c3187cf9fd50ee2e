/* weft train: submit a job of kind train and follow it to its end. */
#include "tools/weft/job_file.h"
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <stdio.h>
#include <string.h>

#define ADMIN (&weft__v1__admin__descriptor)
#define CALL_DEADLINE_MS 30000

typedef struct TrainOptions {
    CommonOptions common;
} TrainOptions;

static const Option TRAIN_OPTIONS[] = {UP_OPTION(TrainOptions), COMMON_OPTIONS(TrainOptions), {0}};

typedef struct Follow {
    const TrainOptions *o;
    const JobSpec *spec;
} Follow;

static double number_of(const json_t *object, const char *name)
{
    return json_number_value(json_object_get(object, name));
}

/* On one line, whatever is in it. */
static void print_sample(const Follow *f, const char *sample)
{
    if (sample != NULL) {
        g_autofree char *text = g_strconcat(f->spec->sample_prompt, sample, NULL);
        printf("  sample: %s\n", g_strdelimit(text, "\n\r\t\v\f\x1b", ' '));
    }
}

/* What else is known of its speed. */
static char *course_of(const Follow *f, const json_t *object)
{
    const double speed = number_of(object, "tokens_per_s"),
                 tokens = (double)(f->spec->sequences * f->spec->length);
    const json_t *mfu = json_object_get(object, "mfu"), *left = json_object_get(object, "eta_s");
    g_autoptr(GString) text = g_string_new(NULL);
    if (mfu != NULL) {
        g_string_append_printf(text, ", MFU %.0f %%", json_number_value(mfu) * 100);
    }
    if (number_of(object, "waited_s") > 0 && speed > 0) {
        g_string_append_printf(text, ", waited %.0f %%",
                               number_of(object, "waited_s") * speed / tokens * 100);
    }
    if (left != NULL) {
        g_autofree char *time = units_format_duration((int64_t)json_number_value(left) * 1000000);
        g_string_append_printf(text, ", %s left", time);
    }
    return g_strdup(text->str);
}

static void print_step(const Follow *f, const json_t *object)
{
    const json_t *validation = json_object_get(object, "validation_loss");
    g_autofree char *validated =
        validation != NULL ? g_strdup_printf(", validation %.4f", json_number_value(validation))
                           : g_strdup("");
    g_autofree char *course = course_of(f, object);
    printf("step %.0f/%" G_GUINT64_FORMAT
           ": loss %.4f%s, lr %.3g, grad norm %.3g, %.0f tokens/s%s\n",
           number_of(object, "step"), f->spec->steps, number_of(object, "loss"), validated,
           number_of(object, "lr"), number_of(object, "grad_norm"),
           number_of(object, "tokens_per_s"), course);
    print_sample(f, json_string_value(json_object_get(object, "sample")));
}

static void print_end(const json_t *object)
{
    const char *checkpoint = json_string_value(json_object_get(object, "checkpoint")),
               *curves = json_string_value(json_object_get(object, "curves"));
    printf("done: weights %s", json_string_value(json_object_get(object, "weights_digest")));
    printf("%s%s", checkpoint != NULL ? ", " : "", checkpoint != NULL ? checkpoint : "");
    printf("%s%s\n", curves != NULL ? ", curves " : "", curves != NULL ? curves : "");
    if (json_is_number(json_object_get(object, "step_s"))) {
        printf("a step took %.3g s, predicted were %.3g s\n", number_of(object, "step_s"),
               number_of(object, "predicted_step_s"));
    }
}

/* A line of the job's log: an object is data, words are messages. */
static void on_line(const ProtobufCMessage *message, void *user)
{
    const Follow *f = user;
    const char *text = ((const Weft__V1__JobLine *)message)->text;
    json_t *object = text[0] == '{' ? json_loads(text, 0, NULL) : NULL;
    if (object == NULL) {
        if (!f->o->common.quiet && !g_str_has_prefix(text, "failed: ")) { /* the error says it */
            fprintf(stderr, "%s\n", text);
        }
    } else if (f->o->common.json) {
        printf("%s\n", text);
    } else if (json_object_get(object, "weights_digest") != NULL) {
        print_end(object);
    } else if (!f->o->common.quiet) {
        print_step(f, object);
    }
    fflush(stdout);
    json_decref(object);
}

static bool cancel_job(Client *client, const char *name, GError **error)
{
    Weft__V1__CancelJobRequest request = WEFT__V1__CANCEL_JOB_REQUEST__INIT;
    ProtobufCMessage *response;
    request.name = (char *)name;
    if (!client_call(client, ADMIN, "CancelJob", &request.base, CALL_DEADLINE_MS, &response,
                     error)) {
        return false;
    }
    protobuf_c_message_free_unpacked(response, NULL);
    return true;
}

static bool submit_job(Client *client, const char *text, GError **error)
{
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    ProtobufCMessage *response;
    request.spec = (char *)text;
    if (!client_call(client, ADMIN, "Submit", &request.base, CALL_DEADLINE_MS, &response, error)) {
        return false;
    }
    protobuf_c_message_free_unpacked(response, NULL);
    return true;
}

/* Exit code. Interrupted: the job ends on the cluster, too; its checkpoints stay. */
static int follow(Client *client, const TrainOptions *o, const JobSpec *spec)
{
    Follow f = {o, spec};
    GError *error = NULL;
    Weft__V1__LogsRequest request = WEFT__V1__LOGS_REQUEST__INIT;
    request.name = spec->name;
    request.follow = true;
    if (client_stream(client, ADMIN, "Logs", &request.base, 0, on_line, &f, &error)) {
        return 0;
    }
    if (!client->interrupted) {
        return cli_fail(error);
    }
    g_clear_error(&error);
    client->interrupted = false;
    if (!cancel_job(client, spec->name, &error)) {
        cli_fail(error);
    } else if (!o->common.quiet) {
        fprintf(stderr, "%s is cancelled; its checkpoints stay\n", spec->name);
    }
    return 130;
}

static int train_on(const TrainOptions *o, const JobSpec *spec, const char *text)
{
    GError *error = NULL;
    Client *client = client_new(&o->common, &error);
    if (client == NULL) {
        return cli_fail(error);
    }
    const int code = submit_job(client, text, &error) ? follow(client, o, spec) : cli_fail(error);
    client_free(client);
    return code;
}

static int train_run(const Verb *verb, void *values, GPtrArray *rest)
{
    TrainOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one job file is expected");
    }
    g_autoptr(JobSpec) spec = job_file_read(rest->pdata[0], &error);
    if (spec != NULL && spec->kind != JOB_TRAIN) {
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_INVALID,
                            "job %s is of kind serve: weft submit keeps it running", spec->name);
    }
    if (error != NULL) {
        return cli_fail(error);
    }
    g_autoptr(GString) text = g_string_new(NULL);
    job_spec_print(spec, text);
    if (o->common.dry_run) {
        printf("%s", text->str);
        return 0;
    }
    LocalCluster *local = local_cluster_for(&o->common, &error);
    if (error != NULL) {
        return cli_fail(error);
    }
    const int code = train_on(o, spec, text->str);
    local_cluster_free(local);
    return code;
}

const Verb VERB_TRAIN = {"train",       "SPEC.yaml",          "train a model as a job file says",
                         TRAIN_OPTIONS, sizeof(TrainOptions), NULL,
                         train_run};
