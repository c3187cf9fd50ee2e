#include "coordinator/gateway/requests/request_stats.h"

#include <string.h>

#define MODELS_LIMIT 64u

const char *const stats_reasons[STATS_REASONS] = {"stop",      "length",  "abort",
                                                  "cancelled", "refused", "error"};

/* As dashboards for vLLM expect them. */
static const double first_token_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                            0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                            20,    40,    80,   160,  640,  2560};
static const double inter_token_bounds[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                            0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
static const double request_bounds[] = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                        30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};

static const double token_bounds[] = {1,   2,    5,    10,   20,    50,    100,   200,
                                      500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};
static const double sequence_bounds[] = {1, 2, 5, 10, 20};

struct RequestStats {
    GPtrArray *models; /* of ModelStats */
};

static void model_stats_free(void *data)
{
    ModelStats *stats = data;
    g_free(stats->model);
    g_free(stats);
}

RequestStats *request_stats_new(void)
{
    RequestStats *stats = g_new0(RequestStats, 1);
    stats->models = g_ptr_array_new_with_free_func(model_stats_free);
    return stats;
}

void request_stats_free(RequestStats *stats)
{
    if (stats != NULL) {
        g_ptr_array_unref(stats->models);
        g_free(stats);
    }
}

ModelStats *request_stats_model(RequestStats *stats, const char *model)
{
    const char *name = stats->models->len < MODELS_LIMIT ? model : "other";
    for (guint i = 0; i < stats->models->len; i++) {
        ModelStats *one = g_ptr_array_index(stats->models, i);
        if (strcmp(one->model, model) == 0 || strcmp(one->model, name) == 0) {
            return one;
        }
    }
    ModelStats *one = g_new0(ModelStats, 1);
    one->model = g_strdup(name);
    histogram_init(&one->first_token_s, first_token_bounds, G_N_ELEMENTS(first_token_bounds));
    histogram_init(&one->inter_token_s, inter_token_bounds, G_N_ELEMENTS(inter_token_bounds));
    histogram_init(&one->mean_token_s, inter_token_bounds, G_N_ELEMENTS(inter_token_bounds));
    Histogram *whole[] = {&one->whole_s,  &one->queue_s,     &one->prefill_s,
                          &one->decode_s, &one->inference_s, &one->recovery_s};
    Histogram *tokens[] = {&one->prompt_length, &one->tokens_asked, &one->generated_length,
                           &one->most_generated};
    for (size_t i = 0; i < G_N_ELEMENTS(tokens); i++) {
        histogram_init(tokens[i], token_bounds, G_N_ELEMENTS(token_bounds));
    }
    histogram_init(&one->sequences_asked, sequence_bounds, G_N_ELEMENTS(sequence_bounds));
    for (size_t i = 0; i < G_N_ELEMENTS(whole); i++) {
        histogram_init(whole[i], request_bounds, G_N_ELEMENTS(request_bounds));
    }
    g_ptr_array_add(stats->models, one);
    return one;
}

void request_stats_clear_open(RequestStats *stats)
{
    for (guint i = 0; i < stats->models->len; i++) {
        ModelStats *one = g_ptr_array_index(stats->models, i);
        one->running = one->waiting = 0;
    }
}

void model_stats_end(ModelStats *stats, const char *reason)
{
    for (unsigned i = 0; i < STATS_REASONS; i++) {
        if (strcmp(stats_reasons[i], reason) == 0) {
            stats->ended[i]++;
            return;
        }
    }
}

void request_stats_each(const RequestStats *stats, void (*fn)(const ModelStats *stats, void *user),
                        void *user)
{
    for (guint i = 0; i < stats->models->len; i++) {
        fn(g_ptr_array_index(stats->models, i), user);
    }
}
