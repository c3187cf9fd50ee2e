/* What run, chat, verify, perplexity and bench share: the options of a request, its message, and
 * collecting its events. */
#pragma once

#include "tools/weft/cli.h"
#include "weft/v1/admin.pb-c.h"
#include "weft/v1/serve.pb-c.h"

typedef struct RequestOptions {
    double temperature, top_p, min_p, repeat_penalty;
    uint64_t top_k, penalty_window, n, context;
    char *seed_text; /* NULL = random */
    uint64_t dp, pp, tp;
    char *numerics, *kv;
} RequestOptions;

void request_defaults(RequestOptions *o);
#define LAYOUT_OPTIONS(type)                                                                       \
    {                                                                                              \
        "dp", 0,    OPTION_COUNT, offsetof(type, request.dp), "N", "replicas", NULL, 1,            \
        64,   NULL, false},                                                                        \
        {"pp", 0,    OPTION_COUNT, offsetof(type, request.pp), "N", "pipeline stages", NULL, 1,    \
         64,   NULL, false},                                                                       \
        {"tp",         0,                                                                          \
         OPTION_COUNT, offsetof(type, request.tp),                                                 \
         "N",          "tensor ranks of a stage",                                                  \
         NULL,         1,                                                                          \
         64,           NULL,                                                                       \
         false},                                                                                   \
        {"context",    'c',                                                                        \
         OPTION_COUNT, offsetof(type, request.context),                                            \
         "N",          "positions a sequence may have",                                            \
         NULL,         1,                                                                          \
         1 << 24,      NULL,                                                                       \
         true},                                                                                    \
        {"kv",                                                                                     \
         0,                                                                                        \
         OPTION_STRING,                                                                            \
         offsetof(type, request.kv),                                                               \
         "TYPE",                                                                                   \
         "what keys and values are rounded to",                                                    \
         NULL,                                                                                     \
         0,                                                                                        \
         0,                                                                                        \
         "f16|bf16|f32|q8",                                                                        \
         true},                                                                                    \
    {                                                                                              \
        "numerics", 0, OPTION_STRING, offsetof(type, request.numerics), "CLASS",                   \
            "bit contract; auto: fast on devices, exact on cores", NULL, 0, 0, "auto|exact|fast",  \
            true                                                                                   \
    }
#define SAMPLER_OPTIONS(type)                                                                      \
    {"temp",        0,                                                                             \
     OPTION_NUMBER, offsetof(type, request.temperature),                                           \
     "T",           "temperature, 0 = most likely token",                                          \
     NULL,          0,                                                                             \
     100,           NULL,                                                                          \
     false},                                                                                       \
        {"top-k",      0,                                                                          \
         OPTION_COUNT, offsetof(type, request.top_k),                                              \
         "K",          "keep the K best, 0 = all",                                                 \
         NULL,         0,                                                                          \
         1 << 24,      NULL,                                                                       \
         false},                                                                                   \
        {"top-p",                                                                                  \
         0,                                                                                        \
         OPTION_NUMBER,                                                                            \
         offsetof(type, request.top_p),                                                            \
         "P",                                                                                      \
         "keep the best that sum to P",                                                            \
         NULL,                                                                                     \
         0,                                                                                        \
         1,                                                                                        \
         NULL,                                                                                     \
         false},                                                                                   \
        {"min-p",                                                                                  \
         0,                                                                                        \
         OPTION_NUMBER,                                                                            \
         offsetof(type, request.min_p),                                                            \
         "P",                                                                                      \
         "keep those at least P as likely as the best",                                            \
         NULL,                                                                                     \
         0,                                                                                        \
         1,                                                                                        \
         NULL,                                                                                     \
         false},                                                                                   \
        {"repeat-penalty",                                                                         \
         0,                                                                                        \
         OPTION_NUMBER,                                                                            \
         offsetof(type, request.repeat_penalty),                                                   \
         "R",                                                                                      \
         "penalty for recent tokens, 1 = none",                                                    \
         NULL,                                                                                     \
         0.01,                                                                                     \
         100,                                                                                      \
         NULL,                                                                                     \
         false},                                                                                   \
        {"repeat-last-n",                                                                          \
         0,                                                                                        \
         OPTION_COUNT,                                                                             \
         offsetof(type, request.penalty_window),                                                   \
         "N",                                                                                      \
         "tokens that count as recent",                                                            \
         NULL,                                                                                     \
         0,                                                                                        \
         1 << 24,                                                                                  \
         NULL,                                                                                     \
         false},                                                                                   \
        {"seed", 's',           OPTION_STRING, offsetof(type, request.seed_text),                  \
         "S",    "random seed", NULL,          0,                                                  \
         0,      NULL,          false},                                                            \
    {                                                                                              \
        "tokens", 'n', OPTION_COUNT, offsetof(type, request.n), "N", "tokens to generate at most", \
            NULL, 1, 1 << 24, NULL, false                                                          \
    }

/* One unary call of Admin on a connection of its own; the response is freed by
 * protobuf_c_message_free_unpacked(). */
bool admin_call(const CommonOptions *common, const char *method, const ProtobufCMessage *request,
                ProtobufCMessage **response, GError **error);
/* Members and jobs now; freed by protobuf_c_message_free_unpacked(). */
Weft__V1__StatusResponse *request_status(Client *client, GError **error);
bool member_is_usable(const Weft__V1__Member *m);

/* A model's path as the coordinator is to open it: relative names that exist here become absolute.
 * Returned. */
char *request_model_path(const char *model);
/* Checks and parses the seed; fills a message whose strings are borrowed from the options. */
bool request_fill(Weft__V1__RunRequest *message, Weft__V1__Sampler *sampler,
                  Weft__V1__Layout *layout, const RequestOptions *o, GError **error);

typedef struct RunOutcome {
    GString *text;
    GArray *ids;                    /* uint32_t */
    GArray *logits;                 /* float, rows one after another */
    GByteArray *row_hashes, *trace; /* 16 bytes a token; as in TokenEvent.trace */
    json_t *logprobs; /* an object a token, where top_logprobs are asked for; else NULL; owned */
    char *finish_reason;
    char digest[33];
    char definition[33];
    const char *numerics; /* "exact" | "fast", static: of what it ran as */
    Weft__V1__Plan *plan; /* as used; owned */
    uint32_t prompt_tokens, prefill_tokens;
    uint64_t seed;
    double load_s, prefill_s, decode_s;
    uint32_t recoveries; /* from losses of workers */
    double stall_s;      /* the longest pause that one made */
    double nll_sum;
    uint32_t tokens_scored;
    uint64_t wire_bytes, epoch;
    uint32_t replica; /* of the plan, that ran it */
} RunOutcome;
void run_outcome_clear(RunOutcome *o);

/* Runs a request; deltas of text are written to `echo` (NULL = silent) as they come. */
bool request_run(Client *client, const CommonOptions *common, const Weft__V1__RunRequest *message,
                 FILE *echo, RunOutcome *out, GError **error);
/* What comes, for who does not want it collected; false + error ends the request. */
typedef struct RequestHooks {
    bool (*started)(const Weft__V1__RunStarted *started, void *user, GError **error);
    /* Instead of collecting it. */
    bool (*delta)(const Weft__V1__RunDelta *delta, void *user, GError **error);
    void *user;
} RequestHooks;
bool request_run_hooked(Client *client, const CommonOptions *common,
                        const Weft__V1__RunRequest *message, const RequestHooks *hooks,
                        RunOutcome *out, GError **error);
/* "dp1 pp2 tp2,3" of a plan message; returned. */
char *plan_message_layout(const Weft__V1__Plan *plan);
/* {"dp":..,"pp":..,"tp":..} */
json_t *plan_message_layout_json(const Weft__V1__Plan *plan);
/* Its class: "exact" | "fast", static. */
const char *plan_message_numerics(const Weft__V1__Plan *plan);
/* Of a job in a table: its layout, and its class where that is fast. Returned. */
char *job_layout_text(const Weft__V1__Job *job);
