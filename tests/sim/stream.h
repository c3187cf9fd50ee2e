/* Stream: a client with one request. What breaks on the way must not end it once it has begun, but
 * for the coordinator's death; then, and when it is refused, it repeats the request until it has
 * its answer. Every token that it is shown is held against the reference at once. */
#pragma once

#include "tests/sim/history.h"

typedef enum StreamState {
    STREAM_WAITING, /* not begun, or about to try again */
    STREAM_OPEN,
    STREAM_DONE, /* or its deadline passed */
    STREAM_CANCELLED,
} StreamState;

typedef struct StreamPlan {
    unsigned request;   /* of the foundation */
    bool score;         /* its text is scored; else it is generated */
    uint32_t n_choices; /* sequences of a generation, 1 to REFERENCE_CHOICES; of a score 1 */
    uint32_t n_tokens;  /* of each that are shown: at most REFERENCE_TOKENS; of a score all */
    uint32_t dp, pp, tp;
    int64_t begin_us;
    uint32_t deadline_ms; /* 0 = none */
    int64_t cancel_us;    /* after its begin; 0 = never */
} StreamPlan;

typedef struct Stream {
    History *history;
    StreamPlan plan;
    unsigned index;
    StreamState state;
    RpcClientCall *call;
    char run[16]; /* the request's id at the coordinator, "" before it said so */
    uint32_t n_got[REFERENCE_CHOICES]; /* of each sequence, in this attempt */
    int64_t token_us[REFERENCE_CHOICES];
    unsigned n_attempts;
    LoopTimer *timer, *cancel;
    int64_t begun_us, newest_us; /* of this attempt; of its last token */
    int64_t heard_us;            /* progress, a token or an end was heard last */
    int64_t stall_us;            /* the longest between two tokens of an attempt */
    int64_t ended_us;
    char *last_error;
} Stream;

/* Begins when its plan says so. */
void stream_begin(Stream *stream, History *history, unsigned index, const StreamPlan *plan);
/* Not while its call is open. */
void stream_clear(Stream *stream);
bool stream_is_over(const Stream *stream);
