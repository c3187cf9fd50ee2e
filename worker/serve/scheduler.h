/* Scheduler: which sequence gets a slot, pages and rows of the next Step. Bookkeeping on the engine
 * thread; leader.h feeds it and takes the results.
 *
 * Invariants
 *   1. Order. Requests of one key are admitted in the order of submission; of several keys the one
 * that was served least is next, and what has begun goes on before anything begins (fair_queue.h):
 * a key's flood waits for itself. Nobody overtakes the next one, however little it needs. A
 * sequence is preempted only in favour of an older one, so the oldest that runs always goes on.
 *   2. Pages. A sequence is admitted when the pages of all its known tokens are reserved (those
 * that the prefix cache holds apart), and one page for each running sequence is left beside. While
 * it decodes it takes pages one by one; when there is none, the youngest running sequence gives up
 * its slot and pages, waits again in its old place and is computed anew later (Kwon et al.
 * 2023, 4.5). A request that could not run alone is refused before it gets here, so an only
 * sequence always has its pages.
 *   3. A slot is given to a sequence only in a Step after the one that released it.
 *   4. Rows of a Step: first those that draw a token, then chunks of prompts, the first chunk going
 * round the sequences. While any sequence decodes the chunks together are bounded by step_pace.h. A
 * prompt of which one row is left, because the cache has the others, draws with that row: it counts
 * as one that decodes, so that all of them get their first token from one step.
 *   5. With S stages the decoding sequences are spread over S steps in flight: a step takes at most
 * ceil(n / S) of them, so that each stage has one of the S steps to work on. Where stages share
 * CPUs, over as many steps as find CPUs at once: each more would only read the weights once more
 * (scheduler_set_stages_at_once()). While none decodes the
 * prompts go in equal steps, for the stages idle as long as the longest one takes: of a
 * PIPELINE_CHUNKS (S - 1)-th of the rows of all prompts that are being read, in whole pages; of
 * half a page where these are fewer than PIPELINE_FEW_PAGES (S - 1) pages.
 *   6. Of sequences whose logits are wanted a step has at most LOGITS_STEP_BYTES of rows with an
 * output: what is beyond waits for a later step, rows without an output do not.
 *   7. A page that is shared is full and never written again; a sequence writes only to pages that
 * it took itself. Of a page that it shares in part, it takes a copy (prefix_cache.h).
 *
 *   enqueue --> WAITING --admit--> RUNNING --remove--> gone
 *                  ^  '--remove--> gone  |
 *                  '------preempt--------'  */
#pragma once

#include "worker/serve/leader_request.h"
#include "worker/serve/step_pace.h"

enum {
    PIPELINE_CHUNKS = 32, /* steps of a prompt over two stages: 3 % of the time one of them idles */
    /* A row takes 10 % longer in steps of half a page than in whole ones (hot-loops.md), which with
     * fewer pages than these is less than the idling that they save. */
    PIPELINE_FEW_PAGES = 6,
};

typedef struct Scheduler Scheduler;

typedef struct SchedulerOptions {
    StepLimits limits;
    uint64_t kv_pages;
    Hash128 definition;
    uint32_t n_stages;
    uint32_t steps_in_flight;
} SchedulerOptions;

Scheduler *scheduler_new(const SchedulerOptions *options);
/* Empty: all requests were removed. */
void scheduler_free(Scheduler *scheduler);
/* Bytes that scheduler_new() allocates for pages. */
size_t scheduler_bytes(uint64_t kv_pages);

/* Requests that wait and never ran, and their tokens. */
typedef struct SchedulerQueue {
    uint32_t n_requests;
    uint64_t n_tokens;
} SchedulerQueue;
SchedulerQueue scheduler_queue(const Scheduler *scheduler);

/* Of the stages only so many find CPUs at the same time; before, all of them. */
void scheduler_set_stages_at_once(Scheduler *scheduler, uint32_t n);

/* The request waits; it stays its owner's. */
void scheduler_enqueue(Scheduler *scheduler, LeaderRequest *request);
/* Its slot and pages are free for others at once; rows of it that are on their way do no harm. */
void scheduler_remove(Scheduler *scheduler, LeaderRequest *request);
/* What it computed must not serve others, nor what it copied. */
void scheduler_distrust(Scheduler *scheduler, LeaderRequest *request);

LeaderRequest *scheduler_find(Scheduler *scheduler, uint64_t id);       /* or NULL */
LeaderRequest *scheduler_at(const Scheduler *scheduler, uint32_t slot); /* running, or NULL */
LeaderRequest *scheduler_any(Scheduler *scheduler);                     /* NULL: none is open */
/* One whose deadline has passed, or NULL; then *next_us is the next deadline, INT64_MAX = none. */
LeaderRequest *scheduler_expired(Scheduler *scheduler, int64_t now_us, int64_t *next_us);

/* Builds the next Step but its number; false if there is nothing to do now. decoding_steps: those
 * in flight that carry rows of decoding sequences; *n_decoding: its rows of such. */
bool scheduler_next(Scheduler *scheduler, Step *step, uint32_t decoding_steps,
                    uint32_t *n_decoding);
/* A step came back: step_pace.h. */
void scheduler_note(Scheduler *scheduler, uint32_t n_rows, uint32_t n_decoding, int64_t built_us,
                    int64_t now_us);

/* Fills what it knows of out. */
void scheduler_load(const Scheduler *scheduler, EngineLoad *out);
