/* weft serve: keeps a model deployed and offered over HTTP until it is stopped. */
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"

#include <stdio.h>
#include <string.h>

#define ADMIN (&weft__v1__admin__descriptor)
#define RETRY_PAUSE_US (INT64_C(500) * 1000)
#define RETRY_BOUND_US (INT64_C(120) * 1000000) /* away for so long: given up */

typedef struct ServeOptions {
    CommonOptions common;
    RequestOptions request; /* of it: layout, context, numerics */
    char *listen, *name;
    uint64_t streams;
} ServeOptions;

static const Option SERVE_OPTIONS[] = {
    {"listen", 0, OPTION_STRING, offsetof(ServeOptions, listen), "ADDR:PORT",
     "a listener at the coordinator for this command alone (default: its --http, else "
     "127.0.0.1:8080)",
     NULL, 0, 0, NULL, false},
    {"name", 0, OPTION_STRING, offsetof(ServeOptions, name), "NAME",
     "what clients call the model (default: the file's name)", NULL, 0, 0, NULL, false},
    {"streams", 0, OPTION_COUNT, offsetof(ServeOptions, streams), "N",
     "sequences at once (default: as fits)", NULL, 1, 1024, NULL, false},
    LAYOUT_OPTIONS(ServeOptions),
    UP_OPTION(ServeOptions),
    COMMON_OPTIONS(ServeOptions),
    {0},
};

typedef struct Serving {
    const ServeOptions *options;
    bool was_ready;
    bool was_heard;  /* the coordinator, in this call */
    char *address;   /* as shown; NULL: not yet */
    int64_t away_us; /* since when the coordinator says nothing */
} Serving;

static void serving_clear(Serving *s)
{
    g_free(s->address);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Serving, serving_clear)

static void print_ready(const Serving *s, const Weft__V1__ServeModelEvent *e)
{
    if (s->options->common.json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:s,s:s,s:b}", "model", e->name, "address",
                                                 e->address, "keys_required", e->keys_required));
        cli_print_json(object);
        return;
    }
    printf("%s at %s/v1%s\n", e->name, e->address,
           e->keys_required ? ", with an API key (weft key create)" : "");
    fflush(stdout);
}

static void on_event(const ProtobufCMessage *message, void *user)
{
    Serving *s = user;
    const Weft__V1__ServeModelEvent *e = (const Weft__V1__ServeModelEvent *)message;
    s->was_heard = true;
    if (e->ready) {
        cli_progress_end(&s->options->common);
        if (g_strcmp0(s->address, e->address) != 0) {
            print_ready(s, e);
        } else if (!s->was_ready && !s->options->common.quiet) {
            fprintf(stderr, "%s is ready again\n", e->name);
        }
        g_free(s->address);
        s->address = g_strdup(e->address);
    } else {
        cli_progress(&s->options->common, "%s: %s", e->name, e->text);
    }
    s->was_ready = e->ready;
}

static bool serve_once(Serving *s, const Weft__V1__ServeModelRequest *request, bool *interrupted,
                       GError **error)
{
    Client *client = client_new(&s->options->common, error);
    if (client == NULL) {
        return false;
    }
    const bool ok =
        client_stream(client, ADMIN, "ServeModel", &request->base, 0, on_event, s, error);
    *interrupted = client->interrupted;
    client_free(client);
    return ok;
}

/* The coordinator is away, or has just come back and its workers have not: what was served once
 * will be again. */
static bool is_worth_a_retry(const Serving *s, const GError *error)
{
    return s->address != NULL && !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_DENIED) &&
           g_get_monotonic_time() - s->away_us < RETRY_BOUND_US;
}

static void pause_between_tries(void)
{
    MainLoop *loop = main_loop_new();
    const bool never = false;
    main_loop_run_until(loop, &never, RETRY_PAUSE_US);
    main_loop_free(loop);
}

static int serve_until_stopped(const ServeOptions *o, const Weft__V1__ServeModelRequest *request)
{
    g_auto(Serving) s = {.options = o};
    bool interrupted = false, again;
    interrupts_hold(); /* also between two tries */
    do {
        GError *error = NULL;
        s.was_heard = false;
        serve_once(&s, request, &interrupted, &error);
        if (s.was_heard) {
            s.away_us = g_get_monotonic_time();
        }
        cli_progress_end(&o->common);
        again = error != NULL && !interrupted && is_worth_a_retry(&s, error);
        if (!again && !interrupted) {
            return error != NULL ? cli_fail(error) : 0;
        }
        if (again) {
            s.was_ready = false;
            cli_progress(&o->common, "trying again: %s", error->message);
            pause_between_tries();
            again = interrupts_none_waits(NULL);
        }
        g_clear_error(&error);
    } while (again);
    return 130;
}

static int serve_run(const Verb *verb, void *values, GPtrArray *rest)
{
    ServeOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one model is expected");
    }
    g_autofree char *model = request_model_path(rest->pdata[0]);
    if (o->common.dry_run) {
        printf("would serve %s\n", model);
        return 0;
    }
    LocalCluster *cluster = local_cluster_for(&o->common, &error);
    if (error != NULL) {
        return cli_fail(error);
    }
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.dp = (uint32_t)o->request.dp;
    layout.pp = (uint32_t)o->request.pp;
    layout.tp = (uint32_t)o->request.tp;
    Weft__V1__ServeModelRequest request = WEFT__V1__SERVE_MODEL_REQUEST__INIT;
    request.model = model;
    request.name = o->name != NULL ? o->name : "";
    request.listen = o->listen != NULL ? o->listen : "";
    request.layout = &layout;
    request.context = (uint32_t)o->request.context;
    request.numerics = o->request.numerics != NULL ? o->request.numerics : "";
    request.kv = o->request.kv != NULL ? o->request.kv : "";
    request.streams = (uint32_t)o->streams;
    const int code = serve_until_stopped(o, &request);
    local_cluster_free(cluster);
    return code;
}

const Verb VERB_SERVE = {"serve",
                         "MODEL [--listen ADDR:PORT]",
                         "OpenAI-compatible HTTP for a model, until stopped",
                         SERVE_OPTIONS,
                         sizeof(ServeOptions),
                         NULL,
                         serve_run};
