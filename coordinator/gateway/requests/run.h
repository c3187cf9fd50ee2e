/* Run: one client's request while it is open. Inside requests/ only; the state machine is described
 * in run.c. */
#pragma once

#include "coordinator/gateway/requests/requests.h"
#include "proto/text/stop.h"

#define N_COUNTERS 12u

typedef enum RunState {
    RUN_OPENING,  /* the model's file is looked at */
    RUN_ENCODING, /* on the pool: text to ids */
    RUN_WAITING,  /* for a replica */
    RUN_RUNNING,  /* leader calls are open */
    RUN_ENDED,    /* the client has its answer; freed when nothing refers to it */
} RunState;

/* One sequence: a choice of a generation, or a window of a scored text. All that a re-submission
 * needs is here until the request ends. */
typedef struct Choice {
    Run *run;
    uint32_t index;
    const uint32_t *prompt; /* of the run's ids */
    uint32_t n_prompt;
    GArray *ids;    /* uint32_t: generated, or scored */
    GArray *hashes; /* 16 bytes each */
    Detokenizer *detokenizer;
    StopMatcher *stop;
    RpcClientCall *call;
    bool done;
    const char *finish_reason; /* static */
    double nll;
    uint64_t prefill_us, decode_us, wire_bytes;
    int64_t begun_us, first_us, last_us;
    int64_t told_us; /* of the last token that the client was sent */
} Choice;

struct Run {
    Requests *owner;
    GList link;          /* of owner->runs */
    const RunSink *sink; /* until ENDED */
    void *sink_user;
    RunState state;
    char id[16];
    Weft__V1__RunRequest *request;
    Model *model;
    Lease *lease;
    LeaseInfo info; /* while RUNNING */
    LoopTimer *deadline;
    bool opening, encoding, reaping; /* models_open(), the pool, a posted run_reap() has it */
    unsigned n_calls;                /* leader calls whose on_done is still to come */
    bool wish_given;
    JobWish wish;    /* if given */
    char *cache_key; /* NULL: none */
    char *stats_name;
    uint64_t seed;
    int64_t begun_us;
    ModelStats *stats; /* from the model's opening on */
    bool leased;       /* once */
    uint32_t context;
    GError *error; /* from the pool */
    uint32_t *ids; /* every choice's prompt, one after another */
    uint32_t n_ids;
    uint32_t n_text; /* tokens of the whole text (SCORE) or the prompt */
    Choice *choices;
    uint32_t n_choices, n_begun, n_done;
    uint32_t score_from;
    uint64_t counters[N_COUNTERS]; /* of the replica's members at the start */
};

struct Requests {
    RequestsOptions options;
    char *cluster;
    GQueue runs; /* of Run, by link */
    RequestStats *stats;
};

/* Ends with an answer or an error; nothing may be sent afterwards. */
void run_fail(Run *run, const GError *error);
/* One choice more is done: begins the next or ends the run. */
void run_choice_done(Choice *choice);
/* Sends an event; false when that ended the run (a client that does not read). */
bool run_send(Run *run, Weft__V1__RunEvent *event);
/* A leader call is over for good. */
void run_call_over(Run *run);

/* encode.c: on the pool. Fills ids, n_ids, n_text, choices and score_from, or error. */
void run_encode(Run *run);
/* choice.c */
void choice_begin(Choice *choice);
void choice_clear(Choice *choice);
