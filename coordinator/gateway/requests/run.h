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
    uint32_t n_prompt, score_from;
    GArray *ids;    /* uint32_t: generated, or scored; NULL before it began */
    GArray *hashes; /* 16 bytes each */
    Detokenizer *detokenizer;
    StopMatcher *stop;
    struct Attempt *attempt; /* its call under the current epoch; NULL: none */
    bool done, resumed;
    const char *finish_reason; /* static */
    double nll;
    uint64_t prefill_us, decode_us, wire_bytes;
    int64_t begun_us, first_us, last_us;
    int64_t submitted_us; /* to its present leader */
    int64_t told_us;      /* of the last token that the client was sent */
} Choice;

static inline bool choice_has_begun(const Choice *choice)
{
    return choice->ids != NULL;
}

/* What a run knows of the losses that it lived through. resume.c */
typedef struct RunResume {
    bool started; /* it had a lease: the client knows plan and definition */
    Hash128 definition;
    unsigned n_recoveries, n_fruitless; /* leases had again; in a row without a new token */
    bool stalled;                       /* interrupted, and no new token since */
    int64_t last_us;                    /* of the newest token, or of the first lease */
    int64_t interrupted_us;
    double stall_s; /* the longest */
} RunResume;

/* What the pool makes of a request. Its own until the loop has it back: others may end, count or
 * explain the run meanwhile, and see no choice yet. */
typedef struct Encoded {
    GError *error;
    uint32_t *ids; /* every choice's prompt, one after another */
    uint32_t n_ids;
    uint32_t n_text; /* tokens of the whole text (SCORE) or the prompt */
    /* Of a scored text with its logits each window comes in pieces of so few rows as are on their
     * way at once; a window's are neighbours here, and each begins where the last one has ended. */
    Choice *choices;
    uint32_t n_choices;
    uint32_t n_pieces;           /* of a window; else 1 */
    Hash128 vocabulary, windows; /* of a scored text with its logits */
} Encoded;

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
    char *share_key; /* NULL: none */
    char *client_id; /* NULL: none */
    uint64_t seed;
    uint64_t ids_seed; /* of a random prompt */
    int64_t begun_us;
    ModelStats
        *stats;  /* from the model's opening on, or, where it was given a name, from its start */
    bool leased; /* once */
    uint32_t context;
    Encoded encoding_out;     /* the pool's, while encoding */
    Encoded encoded;          /* afterwards; all zero before */
    uint32_t n_begun, n_done; /* of its choices */
    uint32_t n_abreast;       /* windows whose pieces are begun in turn; set with the first lease */
    bool waits_for_room;      /* the sink tells when the next piece may begin */
    uint64_t counters[N_COUNTERS]; /* of the replica's members when it was given */
    uint64_t spent[N_COUNTERS];    /* of replicas that it ran on before */
    RunResume resume;
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
/* Into sum: what the replica's members count now. While RUNNING. */
void run_add_counters(const Run *run, uint64_t sum[N_COUNTERS]);

/* resume.c */
/* LeaseCallbacks.interrupted: RUNNING becomes WAITING, or the run ends when it goes in circles. */
bool run_on_interrupted(const GError *why, void *user, uint64_t *n_tokens);
/* A lease was had again: false if its tokens would be others, and the run has ended. */
bool run_resume(Run *run);
/* A new token has come. */
void run_advanced(Run *run, int64_t now_us);

/* encode.c: on the pool. Fills *out, which is all zero, or its error. */
void run_encode(Run *run, Encoded *out);
/* choice.c */
/* Calls the leader: from the prompt, or from the last token that came. */
void choice_submit(Choice *choice);
/* Its epoch is over: the call is cancelled, what still comes of it is dropped. NULL-safe members.
 */
void choice_detach(Choice *choice);
void choice_clear(Choice *choice);
/* Tokens that a new leader has to compute before the next one. */
uint64_t choice_tokens(const Choice *choice);
