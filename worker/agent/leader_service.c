/* A Generation stands between an RPC call and a request of the engine; either may end first.
 *
 *   RUNNING --done event----------------------> call finished, freed
 *      |----deployment ended (no event comes)-> call finished with why, freed
 *      '----call cancelled | reader too slow--> DEAF --done event | deployment ended--> freed
 *
 * Invariant: the engine's `user` is the Generation, so it lives until the done event or until its
 * deployment's engine is gone. */
#include "worker/agent/leader_service.h"

#include "proto/base/error.h"
#include "proto/plan/logits_limits.h"
#include "worker/serve/trace.h"
#include "weft/v1/serve.pb-c.h"

#include <math.h>
#include <string.h>

#define END_IDS_LIMIT 1024u
#define TOP_LOGPROBS_LIMIT 64u
#define KEY_BYTES_LIMIT 64u

struct LeaderService {
    Loop *loop;
    Log *log;
    Deployments *deployments;
    unsigned n_open;
};

typedef struct Generation {
    LeaderService *service;
    RpcCall *call; /* referenced; NULL = DEAF */
    Deployment *deployment;
    uint64_t watch, engine_request;
    char *request;
    uint32_t choice;
} Generation;

static void generation_free(Generation *g)
{
    g->service->n_open--;
    g_free(g->request);
    g_free(g);
}

static void end_call(Generation *g, const GError *error)
{
    if (g->call) {
        rpc_call_on_cancel(g->call, NULL, NULL);
        rpc_call_finish(g->call, error);
        rpc_call_unref(g_steal_pointer(&g->call));
    }
}

static void cancelled(void *user)
{
    Generation *g = user;
    rpc_call_unref(g_steal_pointer(&g->call));
    deployment_cancel(g->deployment, g->engine_request);
}

static void deployment_ended(void *user)
{
    Generation *g = user;
    end_call(g, deployment_error(g->deployment));
    generation_free(g);
}

static void fill_event(const Generation *g, const EngineToken *token, Weft__V1__TokenEvent *event)
{
    event->request = g->request;
    event->choice = g->choice;
    event->done = token->done;
    if (token->done) {
        event->finish_reason = (char *)(token->finish_reason ? token->finish_reason : "stop");
        event->prefill_us = token->prefill_us;
        event->decode_us = token->decode_us;
        event->wire_bytes = token->wire_bytes;
        return;
    }
    event->position = token->position;
    event->id = token->id;
    event->logprob = token->logprob;
    event->row_hash = (ProtobufCBinaryData){sizeof token->row_hash, (uint8_t *)token->row_hash};
    if (token->logits) {
        size_t size;
        const uint8_t *logits = g_bytes_get_data(token->logits, &size);
        event->logits = (ProtobufCBinaryData){size, (uint8_t *)logits};
    }
    if (token->trace) {
        size_t size;
        const uint8_t *trace = g_bytes_get_data(token->trace, &size);
        event->trace = (ProtobufCBinaryData){size, (uint8_t *)trace};
    }
}

/* Sends the event; returns the bytes that wait in the call. */
static size_t send_event(const Generation *g, const EngineToken *token)
{
    Weft__V1__TokenEvent event = WEFT__V1__TOKEN_EVENT__INIT;
    Weft__V1__TopLogprob top[TOP_LOGPROBS_LIMIT], *pointers[TOP_LOGPROBS_LIMIT];
    fill_event(g, token, &event);
    event.n_top = token->done ? 0 : MIN(token->n_top, TOP_LOGPROBS_LIMIT);
    event.top = pointers;
    for (size_t i = 0; i < event.n_top; i++) {
        weft__v1__top_logprob__init(&top[i]);
        top[i].id = token->top_ids[i];
        top[i].logprob = token->top_logprobs[i];
        pointers[i] = &top[i];
    }
    return rpc_call_send(g->call, &event.base);
}

static void on_token(const EngineToken *token, void *user)
{
    Generation *g = user;
    if (g->call) {
        size_t waiting = send_event(g, token);
        if (waiting > LEADER_PENDING_LIMIT && !token->done) {
            g_autoptr(GError) why = g_error_new(
                WEFT_ERROR, WEFT_ERROR_FULL,
                "request %s: the reader is too slow, %zu bytes wait for it", g->request, waiting);
            log_warn(g->service->log, "%s: its stream is ended", why->message);
            end_call(g, why);
            deployment_cancel(g->deployment, g->engine_request);
        }
    }
    if (token->done) {
        /* Of an engine that was ended, the deployment knows why. */
        const GError *why = token->error ? deployment_error(g->deployment) : NULL;
        end_call(g, why ? why : token->error);
        deployment_unwatch(g->deployment, g->watch);
        generation_free(g);
    }
}

/* ---- the request ---- */

static bool check_ids(const char *what, const uint32_t *ids, size_t n, uint32_t vocab_size,
                      GError **error)
{
    for (size_t i = 0; i < n; i++) {
        if (ids[i] >= vocab_size) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "%s %zu is id %u, the vocabulary has %u", what, i, ids[i], vocab_size);
            return false;
        }
    }
    return true;
}

static bool check_number(const char *what, float value, float most, GError **error)
{
    if (value >= 0 && value <= most) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s is %g, not 0 to %g", what, (double)value,
                (double)most);
    return false;
}

static bool check_signed(const char *what, float value, float most, GError **error)
{
    if (value >= -most && value <= most) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s is %g, not %g to %g", what,
                (double)value, (double)-most, (double)most);
    return false;
}

static bool check_bias(const Weft__V1__Sampler *s, uint32_t vocab_size, GError **error)
{
    if (s->n_logit_bias > SAMPLE_BIAS_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%zu logit biases: at most %u",
                    s->n_logit_bias, SAMPLE_BIAS_LIMIT);
        return false;
    }
    for (size_t i = 0; i < s->n_logit_bias; i++) {
        if (!check_ids("logit bias of token", &s->logit_bias[i]->id, 1, vocab_size, error) ||
            !check_signed("logit bias", s->logit_bias[i]->bias, 1000, error)) {
            return false;
        }
    }
    return true;
}

static bool check_sampler(const Weft__V1__Sampler *s, uint32_t vocab_size, GError **error)
{
    return check_number("temperature", s->temperature, 1e4f, error) &&
           check_number("top-p", s->top_p, 1, error) && check_number("min-p", s->min_p, 1, error) &&
           check_number("repeat penalty", s->repeat_penalty, 1e4f, error) &&
           check_signed("presence penalty", s->presence_penalty, 100, error) &&
           check_signed("frequency penalty", s->frequency_penalty, 100, error) &&
           check_bias(s, vocab_size, error);
}

/* All rows of a scored sequence may come from one step. */
static bool check_logits(const Weft__V1__GenerateRequest *r, uint32_t vocab_size, GError **error)
{
    const size_t from = MAX(r->score_from, 1u), n = r->n_prompt > from ? r->n_prompt - from : 0;
    const uint32_t most = logits_rows(LOGITS_SEQUENCE_BYTES, vocab_size);
    if (!r->want_logits || r->kind != WEFT__V1__REQUEST_KIND__SCORE || n <= most) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "logits of %zu scored tokens of a vocabulary of %u: at most %u rows at once: ask "
                "for fewer",
                n, vocab_size, most);
    return false;
}

static bool check_request(const Weft__V1__GenerateRequest *r, const ModelSpec *spec,
                          const Plan *plan, GError **error)
{
    uint32_t context = plan->definition.context;
    if (r->n_prompt > context || r->n_generated > context - r->n_prompt) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "prompt of %zu tokens and %zu generated are longer than the context of %u: shorten it",
            r->n_prompt, r->n_generated, context);
        return false;
    }
    if (r->n_end_ids > END_IDS_LIMIT || r->top_logprobs > TOP_LOGPROBS_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%zu end ids and %u top logprobs: at most %u and %u", r->n_end_ids,
                    r->top_logprobs, END_IDS_LIMIT, TOP_LOGPROBS_LIMIT);
        return false;
    }
    const size_t key_bytes = MAX(r->cache_key.len, r->share_key.len);
    if (key_bytes > KEY_BYTES_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "a cache key or share key of %zu bytes: at most %u", key_bytes,
                    KEY_BYTES_LIMIT);
        return false;
    }
    if (r->trace && (r->kind != WEFT__V1__REQUEST_KIND__GENERATE ||
                     r->n_prompt + r->n_generated > TRACE_PROMPT_LIMIT)) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "a trace of %zu tokens: only generations are traced, and prompts of at most %u tokens",
            r->n_prompt + r->n_generated, TRACE_PROMPT_LIMIT);
        return false;
    }
    if (!check_logits(r, spec->vocab_size, error)) {
        return false;
    }
    const Weft__V1__Sampler *s = r->sampler;
    return check_ids("prompt token", r->prompt, r->n_prompt, spec->vocab_size, error) &&
           check_ids("generated token", r->generated, r->n_generated, spec->vocab_size, error) &&
           check_ids("end token", r->end_ids, r->n_end_ids, spec->vocab_size, error) &&
           (!s || check_sampler(s, spec->vocab_size, error));
}

static int by_id(const void *a, const void *b)
{
    const SampleBias *x = a, *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

/* Sorted as the sampler wants them; an id that is there twice is refused. */
static bool take_bias(const Weft__V1__GenerateRequest *r, SampleBias *out, GError **error)
{
    const size_t n = r->sampler ? r->sampler->n_logit_bias : 0;
    for (size_t i = 0; i < n; i++) {
        out[i] = (SampleBias){r->sampler->logit_bias[i]->id, r->sampler->logit_bias[i]->bias};
    }
    qsort(out, n, sizeof *out, by_id);
    for (size_t i = 1; i < n; i++) {
        if (out[i].id == out[i - 1].id) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "two logit biases of token %u: give one", out[i].id);
            return false;
        }
    }
    return true;
}

static void fill_request(const Weft__V1__GenerateRequest *r, uint32_t context,
                         const SampleBias *bias, EngineRequest *out)
{
    *out = (EngineRequest){
        .kind = (uint32_t)r->kind,
        .prompt = r->prompt,
        .n_prompt = (uint32_t)r->n_prompt,
        .generated = r->generated,
        .n_generated = (uint32_t)r->n_generated,
        .choice = r->choice,
        .max_tokens = MIN(r->max_tokens, context - (uint32_t)r->n_prompt),
        .score_from = r->score_from,
        .top_logprobs = r->top_logprobs,
        .end_ids = r->end_ids,
        .n_end_ids = (uint32_t)r->n_end_ids,
        .want_logits = r->want_logits,
        .trace = r->trace,
        .fresh = r->fresh,
        .cache_salt = hash128(r->cache_key.data, r->cache_key.len),
        .share_key = hash128(r->share_key.data, r->share_key.len),
        .deadline_ms = r->deadline_ms,
    };
    if (r->sampler) {
        out->temperature = r->sampler->temperature;
        out->top_k = r->sampler->top_k;
        out->top_p = r->sampler->top_p;
        out->min_p = r->sampler->min_p;
        out->repeat_penalty = r->sampler->repeat_penalty;
        out->presence_penalty = r->sampler->presence_penalty;
        out->frequency_penalty = r->sampler->frequency_penalty;
        out->bias = bias;
        out->n_bias = (uint32_t)r->sampler->n_logit_bias;
        out->penalty_window = MIN(r->sampler->penalty_window, context);
        out->seed = r->sampler->seed;
    }
}

void leader_service_generate(LeaderService *service, RpcCall *call,
                             const Weft__V1__GenerateRequest *r)
{
    g_autoptr(GError) error = NULL;
    SampleBias bias[SAMPLE_BIAS_LIMIT];
    Deployment *d = deployments_leader(service->deployments, r->stamp, &error);
    if (!d || !check_request(r, deployment_spec(d), deployment_plan(d), &error) ||
        !take_bias(r, bias, &error)) {
        rpc_call_finish(call, error);
        return;
    }
    Generation *g = g_new0(Generation, 1);
    *g = (Generation){.service = service,
                      .call = rpc_call_ref(call),
                      .deployment = d,
                      .request = g_strdup(r->request),
                      .choice = r->choice};
    service->n_open++;
    g->watch = deployment_watch_end(d, deployment_ended, g);
    EngineRequest request;
    fill_request(r, deployment_plan(d)->definition.context, bias, &request);
    g->engine_request = deployment_submit(d, &request, on_token, g);
    rpc_call_on_cancel(call, cancelled, g);
}

LeaderService *leader_service_new(Loop *loop, Log *log, Deployments *deployments)
{
    LeaderService *service = g_new0(LeaderService, 1);
    *service = (LeaderService){.loop = loop, .log = log, .deployments = deployments};
    return service;
}

void leader_service_free(LeaderService *service)
{
    g_assert(!service || service->n_open == 0);
    g_free(service);
}
