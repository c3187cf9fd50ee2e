/* weft up, weft down: a cluster on this machine. */
#include "tools/weft/verbs.h"

#include <stdio.h>

typedef struct UpOptions {
    CommonOptions common;
    uint64_t workers, memory;
    bool supervise;
} UpOptions;

static const Option UP_OPTIONS[] = {
    {"workers", 'w', OPTION_COUNT, offsetof(UpOptions, workers), "N", "worker daemons to start",
     NULL, 1, 64, NULL, false},
    {"memory", 0, OPTION_SIZE, offsetof(UpOptions, memory), "SIZE",
     "memory budget of each worker (default: what is available, shared)", NULL, 0, 0, NULL, false},
    {"supervise", 0, OPTION_FLAG, offsetof(UpOptions, supervise), "",
     "stay, and start again what ends (as `up` leaves a process behind to do)", NULL, 0, 0, NULL,
     false},
    COMMON_OPTIONS(UpOptions),
    {0},
};

static void up_defaults(void *values)
{
    ((UpOptions *)values)->workers = 1;
}

static void print_split(const UpOptions *o)
{
    const unsigned cores = daemon_n_cpus(), n = (unsigned)o->workers;
    if (!o->common.quiet) {
        fprintf(stderr, "%u workers on %u cores: %u thread%s each, %s\n", n, cores,
                MAX(1u, cores / n), cores / n > 1 ? "s" : "",
                n <= cores ? "cores of their own" : "sharing cores (waits yield)");
    }
}

static void print_up(const UpOptions *o, const char *state, const GPtrArray *drained)
{
    if (o->common.json) {
        json_t *object = cli_json_new(), *names = json_array();
        for (guint i = 0; i < drained->len; i++) {
            json_array_append_new(names, cli_json_text(drained->pdata[i]));
        }
        json_object_set_new(object, "state", cli_json_text(state));
        json_object_set_new(object, "workers", json_integer((json_int_t)o->workers));
        json_object_set_new(object, "drained", names);
        cli_print_json(object);
    } else if (!o->common.quiet) {
        fprintf(stderr, "cluster is up in %s; `weft down` stops it\n", state);
    }
}

/* Returns the exit code. */
static int tell_of_cluster(const UpOptions *o, const char *state, const LocalCluster *cluster)
{
    const GPtrArray *drained = local_cluster_drained(cluster);
    GError *error = NULL;
    if (!local_cluster_can_work(cluster, &error)) {
        return cli_fail(error);
    }
    for (guint i = 0; i < drained->len && !o->common.quiet; i++) {
        const char *name = drained->pdata[i];
        fprintf(stderr, "%s is drained and gets no work: `weft undrain %s` gives it back\n", name,
                name);
    }
    print_up(o, state, drained);
    return 0;
}

static int up_run(const Verb *verb, void *values, GPtrArray *rest)
{
    UpOptions *o = values;
    if (rest->len > 0) {
        return cli_usage(verb, "'%s' is not expected", (char *)rest->pdata[0]);
    }
    g_autofree char *state = cli_state_directory(&o->common);
    const LocalState found = local_cluster_state(state);
    const LocalOptions options = {.n_workers = (unsigned)o->workers,
                                  .memory_bytes = o->memory,
                                  .detach = true,
                                  .unsupervised = o->supervise};
    if (o->supervise && found != LOCAL_NONE && !o->common.dry_run) {
        return local_supervise(state, &options);
    }
    if (found == LOCAL_WHOLE) {
        if (!o->common.quiet) {
            fprintf(stderr, "a cluster is running already in %s\n", state);
        }
        return 0;
    }
    if (found == LOCAL_PART && !o->common.quiet) {
        fprintf(stderr, "a cluster in %s is alive in part: starting what ended\n", state);
    } else if (found == LOCAL_NONE) {
        print_split(o);
    }
    if (o->common.dry_run && found == LOCAL_PART) {
        printf("would start what ended of the cluster in %s\n", state);
        return 0;
    }
    if (o->common.dry_run) {
        printf("would start a coordinator and %u workers in %s\n", (unsigned)o->workers, state);
        return 0;
    }
    GError *error = NULL;
    LocalCluster *cluster = local_cluster_start(state, &options, &o->common, &error);
    if (cluster == NULL) {
        return cli_fail(error);
    }
    const int code = tell_of_cluster(o, state, cluster);
    local_cluster_free(cluster);
    return o->supervise ? local_supervise(state, &options) : code;
}

const Verb VERB_UP = {"up",       "[--workers N]",   "start a cluster on this machine",
                      UP_OPTIONS, sizeof(UpOptions), up_defaults,
                      up_run};

typedef struct DownOptions {
    CommonOptions common;
} DownOptions;

static const Option DOWN_OPTIONS[] = {COMMON_OPTIONS(DownOptions), {0}};

static int down_run(const Verb *verb, void *values, GPtrArray *rest)
{
    if (rest->len > 0) {
        return cli_usage(verb, "'%s' is not expected", (char *)rest->pdata[0]);
    }
    DownOptions *o = values;
    g_autofree char *state = cli_state_directory(&o->common);
    GError *error = NULL;
    if (o->common.dry_run) {
        printf("would stop the cluster in %s\n", state);
        return 0;
    }
    if (local_cluster_state(state) == LOCAL_NONE && !o->common.quiet) {
        fprintf(stderr, "no cluster of `weft up` runs in %s\n", state);
    }
    return local_cluster_stop(state, &error) ? 0 : cli_fail(error);
}

const Verb VERB_DOWN = {
    "down", "", "stop what `up` started", DOWN_OPTIONS, sizeof(DownOptions), NULL, down_run};
