/* LeaderRequest: one sequence in the leader's hands: what was asked, its token log (prompt,
 * generated, then what is drawn), and how far it has come. Built on the main loop, then owned by
 * the engine thread: the leader while it waits or runs; the scheduler keeps its slot and pages.
 *
 * Everything that a preempted sequence needs to go on as if nothing had happened is here: tokens,
 * n_known, n_scored, and the trace's position. What is lost with its pages is n_scheduled. */
#pragma once

#include "worker/serve/event_log.h"
#include "worker/serve/prefix_cache.h"
#include "worker/serve/step.h"

struct FairKey;

typedef struct LeaderRequest {
    uint64_t id;
    uint64_t order;  /* of submission: kept through preemption */
    StepAdmit admit; /* slot and uid at admission */
    uint32_t kind, max_tokens, score_from;
    uint32_t *tokens; /* capacity n_known, then MAX(n_limit, n_known) from the first admission on */
    uint32_t n_prompt, n_known;
    uint32_t n_limit; /* tokens that may be known in all */
    SampleBias *bias; /* admit.n_bias */
    uint32_t *end_ids;
    uint32_t n_end_ids;
    EventLog *log;
    bool cached; /* uses and feeds the prefix cache */
    Hash128 salt;
    Hash128 share_key;                           /* whose it is */
    struct FairKey *fair_key;                    /* fair_queue.h: while it is open */
    uint64_t deadline_ms;                        /* 0 = none */
    int64_t submitted_us, deadline_us, first_us; /* 0 = none, not yet */
    uint64_t wire_start;
    uint32_t n_scored; /* targets whose results have come */
    GByteArray *trace; /* rows since the last token; NULL = none */
    uint32_t n_traced; /* positions whose rows were kept */
    /* Scheduler. Running: it has a slot. */
    bool running, was_admitted;
    uint32_t n_scheduled; /* positions in steps, or reused */
    uint32_t n_reusable;  /* positions of reused pages, from 0; not yet announced beyond
                             n_scheduled */
    uint32_t *pages;      /* capacity: pages of the longest course */
    uint32_t n_pages;
    uint64_t n_reserved; /* pages still promised */
    PrefixChain chain;   /* of the first n_chained pages */
    uint32_t n_chained;
    uint32_t source; /* page whose beginning was copied last, and which entry that was; 0 = none */
    uint64_t source_serial;
} LeaderRequest;

/* Main loop. Arrays are copied. */
LeaderRequest *leader_request_new(uint64_t id, const EngineRequest *request, Loop *loop,
                                  EngineTokenFn fn, void *user);
/* Room for the whole course: tokens, pages. Once, before it runs. */
void leader_request_prepare(LeaderRequest *request);
/* The done event; frees the request, which has no slot and no pages. */
void leader_request_end(LeaderRequest *request /* taken */, const char *reason, const GError *error,
                        const EventTimes *times);
/* Ends a request that never reached a leader. */
void leader_request_fail(LeaderRequest *request /* taken */, const GError *error);

/* Positions that can be computed now; the last token of a scored text predicts nothing. */
static inline uint32_t leader_request_pending(const LeaderRequest *q)
{
    return (q->kind == 0 ? q->n_known : q->n_known - 1) - q->n_scheduled;
}
/* One known token is left to compute: the next row draws. */
static inline bool leader_request_decodes(const LeaderRequest *q)
{
    return q->kind == 0 && q->n_known - q->n_scheduled <= 1;
}
/* Positions from the beginning whose rows nobody needs the output of. */
static inline uint32_t leader_request_silent(const LeaderRequest *q)
{
    return q->kind == 0 ? q->n_known - 1 : q->score_from + q->n_scored - 1;
}
