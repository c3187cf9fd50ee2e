/* Problem: one POST becomes a run for each of its prompts, after two pieces of work that must not
 * be done on the loop, for a client that may leave at any time.
 *
 *            parsed             ids there (echo,          a run each prompt:
 *   PARSING ───────▶ checked ──  tokenize) ─▶ ENCODING ──▶ [score ▶] generate ──▶ over
 *                       └────────── else ─────────────────▶
 *
 * 1. The exchange is answered exactly once, or gone; then the call is over: it has no run any more.
 * 2. A call that is over is freed when nobody holds it.
 * 3. The head of a stream is sent with its first frame, so that what fails before has a status of
 * its own; a stream that says nothing for long sends comments instead.
 * 4. Bodies and texts are in no log line. */
#include "coordinator/gateway/openai/api_internal.h"

#include "coordinator/gateway/openai/api_answer.h"
#include "coordinator/gateway/openai/json_body.h"
#include "coordinator/gateway/openai/json_text.h"
#include "coordinator/gateway/requests/request_check.h"
#include "proto/base/error.h"

#include <string.h>

typedef struct ApiCall ApiCall;

/* One prompt's way. */
typedef struct ApiPart {
    ApiCall *call;
    guint index;
    Run *run; /* NULL: not open */
    enum { PART_NEW, PART_SCORING, PART_GENERATING } stage;
} ApiPart;

struct ApiCall {
    ApiService *service;
    GList link; /* of service->calls, while not over */
    HttpExchange *x;
    ApiKind kind;
    char *key;    /* its name, or NULL */
    char *id;     /* X-Request-Id */
    GBytes *body; /* until it is parsed */
    size_t body_bytes;
    bool held, over; /* held: by the pool, or by a function up the stack */
    ApiRequest *request;
    ApiError *error; /* of the pool */
    Served *served;  /* borrowed: dropping it drops the call */
    Model *model;
    char *model_name;
    ApiLimits limits; /* for the pool: the service may be gone */
    uint32_t context; /* that has to hold the prompts; 0: they are not for the model */
    char *text;       /* of tokenize and detokenize */
    ApiAnswer *answer;
    ApiPart *parts;
    guint n_parts, n_open;
    unsigned n_sequences;
    bool streaming; /* the head was sent */
    bool stuck;     /* its client does not read */
    int64_t sent_us;
    LoopTimer *keep_alive;
};

static void call_free(ApiCall *c)
{
    api_answer_free(c->answer);
    api_request_free(c->request);
    api_error_free(c->error);
    g_clear_pointer(&c->body, g_bytes_unref);
    model_unref(c->model);
    g_free(c->model_name);
    g_free(c->key);
    g_free(c->id);
    g_free(c->text);
    g_free(c->parts);
    g_free(c);
}

/* The exchange is answered or gone. The call may be freed here. why: of runs that are still open,
 * for the log; NULL: the client left, or none is. */
static void call_over(ApiCall *c, const char *why)
{
    ApiService *service = c->service;
    c->over = true;
    for (guint i = 0; i < c->n_parts; i++) {
        if (c->parts[i].run != NULL) {
            run_cancel(g_steal_pointer(&c->parts[i].run), why);
        }
    }
    loop_timer_cancel(service->options.loop, c->keep_alive);
    c->keep_alive = NULL;
    if (c->n_sequences > 0) {
        key_shares_close(service->sequences, c->key, c->n_sequences);
        served_close_sequences(c->served, c->key, c->n_sequences);
    }
    g_queue_unlink(&service->calls, &c->link);
    if (!c->held) {
        call_free(c);
    }
}

static void on_gone(void *user)
{
    ApiCall *c = user;
    c->service->n_gone++;
    call_over(c, NULL);
}

/* ---- what is sent ---- */

static void on_keep_alive(void *user);

static void arm_keep_alive(ApiCall *c, int64_t delay_us)
{
    c->keep_alive = loop_timer_start(c->service->options.loop, delay_us, on_keep_alive, c);
}

static void send_frames(ApiCall *c, const GString *frames)
{
    if (!c->streaming) {
        c->streaming = true;
        api_count(c->service, 200);
        http_add_header(c->x, "Cache-Control", "no-cache");
        http_add_header(c->x, "X-Accel-Buffering", "no");
        http_stream(c->x, 200, "text/event-stream; charset=utf-8");
    }
    const size_t waiting = http_write(c->x, frames->str, frames->len);
    c->stuck = api_limits_is_stuck(&c->service->options.limits, waiting, http_stalled_us(c->x));
    c->sent_us = loop_now_us(c->service->options.loop);
}

/* Something between the client and here may close what says nothing. */
static void on_keep_alive(void *user)
{
    ApiCall *c = user;
    const ApiServiceOptions *o = &c->service->options;
    int64_t interval = (int64_t)o->limits.keep_alive_ms * 1000;
    int64_t silent = loop_now_us(o->loop) - c->sent_us;
    c->keep_alive = NULL;
    if (silent >= interval) {
        g_autoptr(GString) comment = g_string_new(": keep-alive\n\n");
        send_frames(c, comment);
        silent = 0;
    }
    arm_keep_alive(c, interval - silent);
}

static void call_end(ApiCall *c, const ApiError *error, const char *why)
{
    if (!c->streaming) {
        api_reply_error(c->service, c->x, error);
    } else if (c->stuck) {
        http_abort(c->x); /* it does not read; a frame more would not be read either */
    } else {
        g_autoptr(GString) frames = g_string_new(NULL);
        api_answer_fail(c->answer, error, frames);
        send_frames(c, frames);
        http_end(c->x);
    }
    call_over(c, why);
}

static void call_fail(ApiCall *c, const ApiError *error)
{
    call_end(c, error, "another prompt of its call failed");
}

static void call_finish(ApiCall *c)
{
    GString *text = g_string_new(NULL);
    api_answer_end(c->answer, text);
    if (c->request->stream) {
        send_frames(c, text);
        g_string_free(text, TRUE);
        http_end(c->x);
    } else {
        api_reply(c->service, c->x, 200, JSON_TYPE, g_string_free(text, FALSE));
    }
    call_over(c, NULL);
}

/* ---- runs ---- */

static void part_generate(ApiPart *part);

static bool on_run_event(void *user, const Weft__V1__RunEvent *event)
{
    ApiPart *part = user;
    ApiCall *c = part->call;
    if (part->stage == PART_SCORING) {
        api_answer_score(c->answer, part->index, event);
        return true;
    }
    g_autoptr(GString) frames = g_string_new(NULL);
    api_answer_event(c->answer, part->index, event, frames);
    if (frames->len > 0) {
        send_frames(c, frames);
    }
    return !c->stuck;
}

static void on_run_finish(void *user, const GError *error)
{
    ApiPart *part = user;
    ApiCall *c = part->call;
    g_autofree char *id = g_strdup(run_id(part->run));
    part->run = NULL;
    if (error != NULL) {
        g_autoptr(ApiError) said = api_error_from(error, id);
        call_fail(c, said);
    } else if (part->stage == PART_SCORING) {
        part_generate(part);
    } else if (--c->n_open == 0) {
        call_finish(c);
    }
}

static const RunSink sink = {on_run_event, on_run_finish};

static void part_start_run(ApiPart *part, Weft__V1__RunRequest *request)
{
    ApiCall *c = part->call;
    const ApiServiceOptions *o = &c->service->options;
    const JobWish *wish = served_wish(c->served);
    const char *cache_key = o->isolate_keys ? (c->key != NULL ? c->key : "") : NULL;
    RunSetting setting = {.wish = wish,
                          .name = c->model_name,
                          .client_id = c->id,
                          .cache_key = cache_key,
                          .share_key = c->key};
    g_autoptr(GError) error = NULL;
    request->model = (char *)served_path(c->served);
    request->context = wish->context;
    request->deadline_ms = o->limits.deadline_s * 1000;
    part->run = requests_start(o->requests, request, &setting, &sink, part, &error);
    if (part->run == NULL) {
        g_autoptr(ApiError) said = api_error_from(error, NULL);
        call_fail(c, said);
    } else {
        log_info(o->log, "request %s is %s of %s, key %s", run_id(part->run), c->id,
                 http_source(c->x), c->key != NULL ? c->key : "none");
    }
}

static void part_nothing_more(ApiPart *part)
{
    ApiCall *c = part->call;
    g_autoptr(GString) frames = g_string_new(NULL);
    api_answer_nothing(c->answer, part->index, frames);
    if (frames->len > 0) {
        send_frames(c, frames);
    }
    if (--c->n_open == 0) {
        call_finish(c);
    }
}

static void part_generate(ApiPart *part)
{
    ApiCall *c = part->call;
    part->stage = PART_GENERATING;
    if (c->request->echo) {
        g_autoptr(GString) frames = g_string_new(NULL);
        api_answer_echo(c->answer, part->index, frames);
        if (frames->len > 0) {
            send_frames(c, frames);
        }
    }
    if (c->request->max_tokens == 0) {
        part_nothing_more(part);
        return;
    }
    Weft__V1__RunRequest request;
    api_request_generate(c->request, part->index, &request);
    part_start_run(part, &request);
}

/* Where the prompt's own logprobs are echoed it is scored first. */
static void part_begin(ApiPart *part)
{
    const ApiRequest *r = part->call->request;
    const ApiPrompt *prompt = g_ptr_array_index(r->prompts, part->index);
    if (r->echo && r->logprobs && prompt->ids->len > 1) {
        Weft__V1__RunRequest request;
        part->stage = PART_SCORING;
        api_request_score(r, part->index, &request);
        part_start_run(part, &request);
    } else {
        part_generate(part);
    }
}

static char *answer_id(const ApiCall *c)
{
    return g_strdup_printf("%s-%016" G_GINT64_MODIFIER "x%016" G_GINT64_MODIFIER "x",
                           c->kind == API_CHAT ? "chatcmpl" : "cmpl",
                           random_u64(c->service->options.random),
                           random_u64(c->service->options.random));
}

static void call_run(ApiCall *c)
{
    Loop *loop = c->service->options.loop;
    g_autofree char *id = answer_id(c);
    if (!c->request->max_given) {
        c->request->max_tokens = served_context(c->served);
    }
    c->answer = api_answer_new(c->request, c->model->tokenizer, id, c->model_name,
                               loop_wall_us(loop) / G_USEC_PER_SEC);
    c->n_parts = c->n_open = c->request->prompts->len;
    c->parts = g_new0(ApiPart, c->n_parts);
    c->sent_us = loop_now_us(loop);
    if (c->request->stream) {
        arm_keep_alive(c, (int64_t)c->service->options.limits.keep_alive_ms * 1000);
    }
    c->held = true;
    for (guint i = 0; i < c->n_parts && !c->over; i++) {
        c->parts[i].call = c;
        c->parts[i].index = i;
        part_begin(&c->parts[i]);
    }
    c->held = false;
    if (c->over) {
        call_free(c);
    }
}

/* ---- tokens alone ---- */

static char *ids_json(const GArray *ids, uint32_t context)
{
    GString *out = g_string_new(NULL);
    g_string_append_printf(out, "{\"count\":%u,\"max_model_len\":%u,\"tokens\":[", ids->len,
                           context);
    for (guint i = 0; i < ids->len; i++) {
        g_string_append_printf(out, "%s%u", i > 0 ? "," : "", g_array_index(ids, uint32_t, i));
    }
    g_string_append(out, "]}");
    return g_string_free(out, FALSE);
}

static char *text_json(const Tokenizer *tokenizer, const GArray *ids)
{
    g_autoptr(GString) text = g_string_new(NULL);
    Detokenizer *d = detokenizer_new(tokenizer, true);
    for (guint i = 0; i < ids->len; i++) {
        detokenizer_push(d, g_array_index(ids, uint32_t, i), text);
    }
    detokenizer_finish(d, text);
    detokenizer_free(d);
    GString *out = g_string_new("{\"prompt\":");
    json_text_bytes(out, text->str, text->len);
    g_string_append_c(out, '}');
    return g_string_free(out, FALSE);
}

/* ---- on the pool ---- */

static void parse_work(void *user)
{
    ApiCall *c = user;
    const ApiLimits *limits = &c->limits;
    gsize length;
    const char *bytes = g_bytes_get_data(c->body, &length);
    json_t *body = json_body_parse(bytes, length, limits, &c->error);
    if (body != NULL) {
        c->request = api_request_parse(c->kind, body, limits, &c->error);
        json_decref(body);
    }
    g_clear_pointer(&c->body, g_bytes_unref);
}

/* The ids of one prompt (or of messages), where an answer has to have them. */
static GArray *encode_prompt(const ApiCall *c, guint index, GError **error)
{
    const ApiRequest *r = c->request;
    RequestEncoding how = {.context = c->context};
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    if (c->kind == API_TOKENIZE && r->messages->len > 0) {
        request.messages = (Weft__V1__ChatMessage **)r->messages->pdata;
        request.n_messages = r->messages->len;
        how.no_answer_follows = !r->add_generation_prompt;
    } else {
        api_request_generate(r, index, &request);
        how.no_bos = c->kind == API_TOKENIZE && !r->add_special;
    }
    return request_encode(c->model, &request, how, error);
}

static bool encode_one(ApiCall *c, guint index, GError **error)
{
    GArray *ids = encode_prompt(c, index, error);
    if (ids == NULL) {
        return false;
    }
    if (c->kind == API_TOKENIZE) {
        c->text = ids_json(ids, c->model->spec->context);
        g_array_unref(ids);
        return true;
    }
    if (c->kind == API_DETOKENIZE) {
        c->text = text_json(c->model->tokenizer, ids);
        g_array_unref(ids);
        return true;
    }
    ApiPrompt *prompt = g_ptr_array_index(c->request->prompts, index);
    g_clear_pointer(&prompt->ids, g_array_unref);
    prompt->ids = ids;
    return true;
}

static void encode_work(void *user)
{
    ApiCall *c = user;
    g_autoptr(GError) error = NULL;
    if (c->model->tokenizer == NULL) {
        api_error_field(&c->error, NULL, "model %s has no usable vocabulary", c->model_name);
        return;
    }
    guint n = MAX(c->request->prompts->len, 1);
    for (guint i = 0; i < n && error == NULL; i++) {
        encode_one(c, i, &error);
    }
    if (error != NULL) {
        c->error = api_error_from(error, NULL);
    }
}

/* ---- on the way ---- */

/* Back from the pool: false if the call was over meanwhile, or is now. */
static bool call_back(ApiCall *c)
{
    c->held = false;
    if (c->over) {
        call_free(c);
        return false;
    }
    if (c->error != NULL) {
        call_fail(c, c->error);
        return false;
    }
    return true;
}

/* The pool is gone, and with it the coordinator: the call was dropped by api_service_free(). */
static void pool_dropped(void *user)
{
    ApiCall *c = user;
    c->held = false;
    call_free(c);
}

static void to_pool(ApiCall *c, WorkFn work, WorkFn done)
{
    c->held = true;
    if (c->body_bytes > WORK_HEAVY_BYTES) {
        work_pool_run_heavy(c->service->options.pool, work, done, pool_dropped, c);
    } else {
        work_pool_run(c->service->options.pool, work, done, pool_dropped, c);
    }
}

/* Before anything is sent: a stream's head would be there with the echo. */
static bool check_echo(const ApiCall *c, GError **error)
{
    const guint answer = c->request->max_tokens > 0;
    for (guint i = 0; i < c->request->prompts->len; i++) {
        const ApiPrompt *prompt = g_ptr_array_index(c->request->prompts, i);
        const guint n = prompt->ids->len + answer;
        if (n > 0 && !request_check_length(n - 1, c->context, error)) {
            return false;
        }
    }
    return true;
}

static void encode_done(void *user)
{
    ApiCall *c = user;
    g_autoptr(GError) error = NULL;
    if (!call_back(c)) {
        return;
    }
    if (c->text == NULL && !check_echo(c, &error)) {
        g_autoptr(ApiError) said = api_error_from(error, NULL);
        call_fail(c, said);
    } else if (c->text != NULL) {
        api_reply(c->service, c->x, 200, JSON_TYPE, g_steal_pointer(&c->text));
        call_over(c, NULL);
    } else {
        call_run(c);
    }
}

static bool find_model(ApiCall *c, ApiError **error)
{
    ServedBook *book = c->service->served;
    const char *name = c->request->model;
    c->served = name != NULL ? served_find(book, name) : served_only(book);
    if (c->served == NULL) {
        api_error_set(error, name != NULL ? 404 : 400, "invalid_request_error",
                      name != NULL ? "model_not_found" : NULL, "model",
                      "%s: GET /v1/models lists what is served",
                      name != NULL ? "there is no such model here" : "model is missing");
        return false;
    }
    c->model_name = g_strdup(served_name(c->served));
    return true;
}

static bool has_to_generate(const ApiCall *c)
{
    return c->kind == API_CHAT || c->kind == API_COMPLETION;
}

static bool check_ready(const ApiCall *c, ApiError **error)
{
    bool usable = has_to_generate(c) ? served_is_ready(c->served) : served_model(c->served) != NULL;
    if (!usable) {
        api_error_set(error, 503, "server_error", "not_ready", NULL,
                      "the model %s is not ready yet: ask again soon, GET /ready says more",
                      c->model_name);
        (*error)->retry_after_s = RETRY_AFTER_S;
    }
    return usable;
}

static bool check_room(ApiCall *c, ApiError **error)
{
    ApiService *service = c->service;
    guint n = has_to_generate(c) ? c->request->prompts->len * c->request->n : 0;
    const uint64_t bound = service->options.limits.queue;
    if (!key_shares_open(service->sequences, c->key, n, bound)) {
        api_error_set(error, 429, "rate_limit_error", "queue_full", NULL,
                      "%" G_GUINT64_FORMAT " sequences are open, %" G_GUINT64_FORMAT
                      " of this key, and %" G_GUINT64_FORMAT
                      " is the bound, of which a key has its share: ask again in a moment",
                      key_shares_count(service->sequences),
                      key_shares_count_of(service->sequences, c->key), bound);
    } else if (!served_open_sequences(c->served, c->key, n)) {
        key_shares_close(service->sequences, c->key, n);
        api_error_set(error, 429, "rate_limit_error", "queue_full", NULL,
                      "model %s has all the sequences open that its job file allows "
                      "(limits.queue), or this key its share of them: ask again in a moment",
                      c->model_name);
    } else {
        c->n_sequences = n;
        return true;
    }
    service->n_refused_full++;
    (*error)->retry_after_s = RETRY_AFTER_S;
    return false;
}

static void parse_done(void *user)
{
    ApiCall *c = user;
    if (!call_back(c)) {
        return;
    }
    g_autoptr(ApiError) error = NULL;
    if (!find_model(c, &error) || !check_ready(c, &error) || !check_room(c, &error)) {
        call_fail(c, error);
        return;
    }
    c->model = model_ref(served_model(c->served));
    c->context = has_to_generate(c) ? served_context(c->served) : 0;
    if (has_to_generate(c) && !c->request->echo) {
        call_run(c);
    } else {
        to_pool(c, encode_work, encode_done);
    }
}

void api_call_begin(ApiService *service, HttpExchange *x, ApiKind kind, const char *key,
                    const char *id)
{
    ApiCall *c = g_new0(ApiCall, 1);
    c->service = service;
    c->x = x;
    c->kind = kind;
    c->key = g_strdup(key);
    c->id = g_strdup(id);
    c->body = g_bytes_ref(http_body(x));
    c->body_bytes = g_bytes_get_size(c->body);
    c->limits = service->options.limits;
    c->link.data = c;
    g_queue_push_tail_link(&service->calls, &c->link);
    http_on_gone(x, on_gone, c);
    to_pool(c, parse_work, parse_done);
}

void api_calls_drop(ApiService *service, const Served *served)
{
    GList *next;
    for (GList *l = service->calls.head; l != NULL; l = next) {
        ApiCall *c = l->data;
        next = l->next;
        if (served == NULL || c->served == served) {
            g_autoptr(ApiError) error = NULL;
            api_error_set(&error, 503, "server_error", "stopped", NULL,
                          served != NULL ? "the model is no longer served"
                                         : "the server is stopping");
            call_end(c, error, error->message);
        }
    }
}
