#include "worker/serve/leader_request.h"

#include <string.h>

LeaderRequest *leader_request_new(uint64_t id, const EngineRequest *r, Loop *loop, EngineTokenFn fn,
                                  void *user)
{
    LeaderRequest *q = g_new0(LeaderRequest, 1);
    q->id = id;
    q->kind = r->kind;
    q->max_tokens = r->kind == 0 ? r->max_tokens : 0;
    q->score_from = MAX(r->score_from, 1);
    q->n_prompt = r->n_prompt;
    q->n_known = r->n_prompt + r->n_generated;
    q->n_limit = r->n_prompt + q->max_tokens;
    q->tokens = g_new0(uint32_t, q->n_known);
    if (r->n_prompt > 0) {
        memcpy(q->tokens, r->prompt, sizeof(uint32_t) * r->n_prompt);
    }
    if (r->n_generated > 0) {
        memcpy(q->tokens + r->n_prompt, r->generated, sizeof(uint32_t) * r->n_generated);
    }
    q->end_ids = g_memdup2(r->end_ids, sizeof(uint32_t) * r->n_end_ids);
    q->n_end_ids = r->n_end_ids;
    q->bias = g_memdup2(r->bias, sizeof(SampleBias) * r->n_bias);
    q->admit = (StepAdmit){.n_prompt = r->n_prompt,
                           .temperature = r->temperature,
                           .top_p = r->top_p,
                           .min_p = r->min_p,
                           .repeat_penalty = r->repeat_penalty,
                           .presence_penalty = r->presence_penalty,
                           .frequency_penalty = r->frequency_penalty,
                           .n_bias = r->n_bias,
                           .top_k = r->top_k,
                           .penalty_window = r->penalty_window,
                           .choice = r->choice,
                           .top_logprobs = r->top_logprobs,
                           .seed = r->seed,
                           .want_logits = r->want_logits,
                           .trace = r->trace && r->kind == 0};
    q->cached = !r->fresh && !q->admit.trace; /* traced rows are to be computed */
    q->salt = r->cache_salt;
    q->share_key = r->share_key;
    q->deadline_ms = r->deadline_ms;
    q->log = event_log_new(r->top_logprobs, loop, fn, user);
    return q;
}

void leader_request_prepare(LeaderRequest *q)
{
    const uint32_t course = MAX(q->n_limit, q->n_known);
    q->tokens = g_renew(uint32_t, q->tokens, course);
    q->pages = g_new0(uint32_t, course / KV_BLOCK + 1);
}

static void request_free(LeaderRequest *q)
{
    g_clear_pointer(&q->trace, g_byte_array_unref);
    g_free(q->tokens);
    g_free(q->end_ids);
    g_free(q->bias);
    g_free(q->pages);
    g_free(q);
}

void leader_request_end(LeaderRequest *q, const char *reason, const GError *error,
                        const EventTimes *times)
{
    event_log_finish(q->log, reason, error, times);
    request_free(q);
}

void leader_request_fail(LeaderRequest *q, const GError *error)
{
    const EventTimes none = {0};
    leader_request_end(q, "error", error, &none);
}
