/* What every verb of `weft` shares: where the cluster is, a connection, calls that wait, output
 * manners (CONTRACT). Data on stdout, progress and messages on stderr; an error is one line, `weft:
 * what failed: the values: what to do`. */
#pragma once

#include "tools/weft/interrupts.h"

#include "proto/config/options.h"
#include "transport/daemon/daemon.h"
#include "transport/rpc/rpc.h"

#include <glib.h>
#include <jansson.h>
#include <stdbool.h>

/* Options that every verb understands; the first member of each verb's own structure. */
typedef struct CommonOptions {
    char *cluster; /* host:port of the control listener */
    char *state;   /* state directory */
    char *config;
    bool json, quiet, verbose, dry_run;
    uint64_t up; /* --up N: a cluster for this command alone */
} CommonOptions;
/* Rows for the verb's table; `type` has a member `common`. Without --dry-run, for a verb that does
 * what it does only while it runs: */
#define COMMON_OPTIONS_BUT_DRY_RUN(type)                                                           \
    {"cluster",                                                                                    \
     0,                                                                                            \
     OPTION_STRING,                                                                                \
     offsetof(type, common.cluster),                                                               \
     "ADDR",                                                                                       \
     "the coordinator, host:port",                                                                 \
     "WEFT_CLUSTER",                                                                               \
     0,                                                                                            \
     0,                                                                                            \
     NULL,                                                                                         \
     false},                                                                                       \
        {"state",                                                                                  \
         0,                                                                                        \
         OPTION_STRING,                                                                            \
         offsetof(type, common.state),                                                             \
         "DIR",                                                                                    \
         "state directory",                                                                        \
         "WEFT_STATE",                                                                             \
         0,                                                                                        \
         0,                                                                                        \
         NULL,                                                                                     \
         false},                                                                                   \
        {"config",                                                                                 \
         0,                                                                                        \
         OPTION_STRING,                                                                            \
         offsetof(type, common.config),                                                            \
         "FILE",                                                                                   \
         "options from a YAML file",                                                               \
         NULL,                                                                                     \
         0,                                                                                        \
         0,                                                                                        \
         NULL,                                                                                     \
         false},                                                                                   \
        {"json",      0,                                                                           \
         OPTION_FLAG, offsetof(type, common.json),                                                 \
         "",          "one JSON object on stdout",                                                 \
         NULL,        0,                                                                           \
         0,           NULL,                                                                        \
         false},                                                                                   \
        {"quiet", 'q',  OPTION_FLAG, offsetof(type, common.quiet), "", "no progress", NULL, 0,     \
         0,       NULL, false},                                                                    \
    {                                                                                              \
        "verbose", 'v', OPTION_FLAG, offsetof(type, common.verbose), "", "details of errors",      \
            NULL, 0, 0, NULL, false                                                                \
    }
/* With it: the verb says what it would do. */
#define COMMON_OPTIONS(type)                                                                       \
    COMMON_OPTIONS_BUT_DRY_RUN(type),                                                              \
    {                                                                                              \
        "dry-run", 0, OPTION_FLAG, offsetof(type, common.dry_run), "", "say what would be done",   \
            NULL, 0, 0, NULL, false                                                                \
    }
#define UP_OPTION(type)                                                                            \
    {                                                                                              \
        "up", 0, OPTION_COUNT, offsetof(type, common.up), "N",                                     \
            "start N workers for this command alone", NULL, 1, 64, NULL, false                     \
    }

typedef struct Verb {
    const char *name, *arguments, *summary;
    const Option *options;
    size_t values_size;
    /* values: zeroed, defaults() applied, parsed. Returns the exit code; reports its own errors
     * with cli_fail(). */
    void (*defaults)(void *values);
    int (*run)(const struct Verb *verb, void *values, GPtrArray *rest);
} Verb;
extern const Verb *const VERBS[]; /* NULL-ended, in the order of --help */

/* Prints `weft: message` to stderr, returns the error's exit code; frees the error. */
int cli_fail(GError *error /* taken */);
/* No legal plan: every violation, then what would be legal, in one line. 2. */
int cli_no_plan(char *const *violations, size_t n_violations, char *const *alternatives,
                size_t n_alternatives);
int cli_usage(const Verb *verb, const char *format, ...) G_GNUC_PRINTF(2, 3); /* 2 */

/* The state directory: --state, WEFT_STATE, $XDG_STATE_HOME/weft, ~/.local/state/weft. Returned. */
char *cli_state_directory(const CommonOptions *common);

/* One connection to the coordinator. */
typedef struct Client {
    MainLoop *loop;
    RpcChannel *channel;
    char *address;
    Interrupts interrupts;
    bool interrupted; /* SIGINT or SIGTERM arrived */
    bool verbose;     /* errors in full */
    void (*on_interrupt)(void *user);
    void *interrupt_user;
} Client;
/* Finds the cluster (common options or the one that `weft up` runs in the state directory), reads
 * this account's certificate; UNREACHABLE with how to start one when there is none. */
Client *client_new(const CommonOptions *common, GError **error);
/* Plain pieces: for doctor and probe. NULL pem = plaintext. */
Client *client_new_with(const char *address, const char *ca_pem, const char *certificate_pem,
                        const char *key_pem, const char *server_name, GError **error);
void client_free(Client *client);

/* Unary call that waits; the response is unpacked into *response (free with
 * protobuf_c_message_free_unpacked). */
bool client_call(Client *client, const ProtobufCServiceDescriptor *service, const char *method,
                 const ProtobufCMessage *request, int64_t deadline_ms, ProtobufCMessage **response,
                 GError **error);
/* Server stream: on_message for each, until it ends. SIGINT cancels the call (and its work on the
 * cluster): CANCELLED. */
bool client_stream(Client *client, const ProtobufCServiceDescriptor *service, const char *method,
                   const ProtobufCMessage *request, int64_t deadline_ms,
                   void (*on_message)(const ProtobufCMessage *message, void *user), void *user,
                   GError **error);

/* Inside on_message: cancels the stream that is open; client_stream() then returns false. */
void client_stop(Client *client);

/* Prints an object with "version": 1 first, and frees it. */
void cli_print_json(json_t *object /* taken */);
json_t *cli_json_new(void);
/* A string of bytes that may be no UTF-8 (a file's name): what is none becomes U+FFFD. Returned. */
json_t *cli_json_text(const char *text);
/* Progress line on stderr: overwritten on a terminal, one line a change else; nothing with --quiet.
 */
void cli_progress(const CommonOptions *common, const char *format, ...) G_GNUC_PRINTF(2, 3);
void cli_progress_end(const CommonOptions *common);

/* A table of text, columns padded; header first. */
typedef struct TextTable TextTable;
TextTable *text_table_new(const char *const *header);
void text_table_row(TextTable *t,
                    ...) G_GNUC_NULL_TERMINATED; /* const char *, as many as the header has */
/* Cuts the texts of one column so that a row fits 80 columns, if it is wide enough for that. */
void text_table_fit(TextTable *t, unsigned column);
void text_table_print(TextTable *t /* taken */);
void text_table_free(TextTable *t);

/* local.c: the cluster on this machine (up, down, --up N). */
/* A daemon's binary: beside this one, in the build tree, or on the PATH; returned, NULL = nowhere.
 */
char *local_find_program(const char *name);
bool local_process_exists(int pid); /* and has not ended, though its parent may not know yet */
typedef struct LocalCluster LocalCluster;
typedef struct LocalOptions {
    unsigned n_workers;
    unsigned n_threads;    /* of each worker, at most as many as CPUs; 0 = its share of the CPUs */
    uint64_t memory_bytes; /* budget of each worker; 0 = what is available, shared */
    bool detach;           /* the daemons outlive this command */
    bool unsupervised;     /* with detach: this process will supervise them itself */
} LocalOptions;
/* Starts coordinator and workers with their state in `state`, waits until all are ready. Of a
 * cluster that is alive in part, what has ended is started again, as many workers as there were.
 * Holds signals (interrupts.h): one that comes meanwhile is CANCELLED. */
LocalCluster *local_cluster_start(const char *state, const LocalOptions *o,
                                  const CommonOptions *common, GError **error);
/* Whether the processes recorded in `state` are alive. */
typedef enum LocalState { LOCAL_NONE, LOCAL_PART, LOCAL_WHOLE } LocalState;
LocalState local_cluster_state(const char *state);
bool local_cluster_stop(const char *state, GError **error);
/* Names of the daemons that ended although `up` knows them; NULL: this process is not the
 * supervisor of `state` (any more), or nothing is up there. */
GPtrArray *local_cluster_ended(const char *state);
/* Starts one of them again; it has its certificate, and the coordinator its port. */
bool local_cluster_revive(const char *state, const char *name, const LocalOptions *o,
                          GError **error);
/* supervise.c: starts again what ends until SIGTERM, SIGINT or `weft down`. This process becomes
 * the supervisor. Returns the exit code. */
int local_supervise(const char *state, const LocalOptions *o);
bool local_become_supervisor(const char *state, GError **error);
void local_cluster_free(LocalCluster *cluster); /* stops what was started with detach = false */
/* Names of its workers that an administrator had drained, char *; borrowed. */
const GPtrArray *local_cluster_drained(const LocalCluster *cluster);
/* NOT_READY: they all were. */
bool local_cluster_can_work(const LocalCluster *cluster, GError **error);
/* For verbs with UP_OPTION: starts one when --up was given; sets common->state to it. NULL without
 * error = not asked for. */
LocalCluster *local_cluster_for(CommonOptions *common, GError **error);
/* The same with so many threads a worker (LocalOptions). */
LocalCluster *local_cluster_with(CommonOptions *common, unsigned n_threads, GError **error);
