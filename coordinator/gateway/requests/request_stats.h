/* RequestStats: what the requests of each model came to, for /metrics. Loop thread. */
#pragma once

#include "transport/daemon/metrics.h"

#include <glib.h>
#include <stdint.h>

#define STATS_REASONS 6u

typedef struct ModelStats {
    char *model;
    uint64_t prompt_tokens, generation_tokens;
    uint64_t ended[STATS_REASONS]; /* choices, by stats_reasons */
    unsigned running, waiting;     /* open requests, as of the last requests_count() */
    Histogram first_token_s, inter_token_s, mean_token_s, whole_s, queue_s, prefill_s, decode_s,
        inference_s, recovery_s;
    /* of a request: its prompt's tokens, those it asked for at most, its sequences; of a sequence:
     * tokens generated; of a request's sequences the most */
    Histogram prompt_length, tokens_asked, sequences_asked, generated_length, most_generated;
} ModelStats;

/* stop, length, abort (the client left), cancelled (its call or its model is over), refused (its
 * own fault), error. */
extern const char *const stats_reasons[STATS_REASONS];

typedef struct RequestStats RequestStats;
RequestStats *request_stats_new(void);
void request_stats_free(RequestStats *stats); /* NULL-safe */
/* The entry of a model, made if need be; lives as long as the stats. Models beyond a bound share
 * one entry, "other". */
ModelStats *request_stats_model(RequestStats *stats, const char *model);
/* No open request is counted any more. */
void request_stats_clear_open(RequestStats *stats);
void model_stats_end(ModelStats *stats, const char *reason);
void request_stats_each(const RequestStats *stats, void (*fn)(const ModelStats *stats, void *user),
                        void *user);
