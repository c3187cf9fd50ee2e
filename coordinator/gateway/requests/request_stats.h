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
    Histogram first_token_s, inter_token_s, whole_s, queue_s, prefill_s, decode_s, recovery_s;
} ModelStats;

/* stop, length, abort (the client left), cancelled, refused (its own fault), error. */
extern const char *const stats_reasons[STATS_REASONS];

typedef struct RequestStats RequestStats;
RequestStats *request_stats_new(void);
void request_stats_free(RequestStats *stats); /* NULL-safe */
/* The entry of a model, made if need be; lives as long as the stats. Models beyond a bound share
 * one entry, "other". */
ModelStats *request_stats_model(RequestStats *stats, const char *model);
void model_stats_end(ModelStats *stats, const char *reason);
void request_stats_each(const RequestStats *stats, void (*fn)(const ModelStats *stats, void *user),
                        void *user);
