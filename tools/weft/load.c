/* One thread, one curl multi handle. A client (connection) is idle, or has one request:
 *
 *     idle --its time has come--> under way --[DONE]--> complete --the transfer ended--> idle
 *                                     `--status, timeout, error event, end too early--> failed
 *
 * Closed loop: the time of a client's next request is when it became idle, or as much later as a
 * Retry-After asked for. Poisson: arrivals have times of their own, drawn from the seed; one that
 * finds no idle client waits for one, and its times count from the arrival (otherwise a server
 * that stalls would look better for having fewer requests).
 *
 * What arrived is noted in the write callback, so that times are those of the bytes. */
#include "tools/weft/load.h"

#include "tools/weft/interrupts.h"
#include "tools/weft/load_http.h"
#include "tools/weft/sse.h"
#include "tools/weft/stream_answer.h"

#include "proto/base/error.h"
#include "proto/base/random.h"

#include <curl/curl.h>
#include <errno.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

enum {
    EVENT_BYTES = 1 << 20, /* one event of a stream */
    SAID_BYTES = 4096,     /* of an answer that is no stream, what is kept */
    PAUSE_MOST_S = 60,     /* of a Retry-After */
    PROGRESS_US = 1000000,
};

typedef struct Load Load;

typedef struct LoadClient {
    Load *load;
    CURL *easy;
    SseReader *events;
    StreamAnswer answer;
    GString *said; /* of an answer that is no stream */
    char *body;
    char why[CURL_ERROR_SIZE];
    bool is_busy, has_head, is_stream, is_too_long;
    int64_t from_us;           /* its request's time */
    int64_t first_us, last_us; /* of events with text; 0: none yet */
    int64_t done_us;           /* of [DONE] */
    int64_t idle_until_us;
} LoadClient;

struct Load {
    const LoadOptions *o;
    LoadResult *r;
    CURLM *multi;
    struct curl_slist *headers;
    LoadClient *clients;
    unsigned n_busy;
    uint64_t n_started;
    RandomSeeded arrivals;
    int64_t begin_us, next_arrival_us, end_us, progress_us;
};

/* ---- what comes back ---- */

static void on_event(const char *data, size_t length, void *user)
{
    LoadClient *c = user;
    const bool was_done = c->answer.done;
    if (stream_answer_take(&c->answer, data, length)) {
        const int64_t now = g_get_monotonic_time();
        if (c->first_us == 0) {
            c->first_us = now;
        } else {
            latency_add(c->load->r->itl, now - c->last_us);
        }
        c->last_us = now;
    }
    if (c->answer.done && !was_done) {
        c->done_us = g_get_monotonic_time();
    }
}

static void look_at_head(LoadClient *c)
{
    static const char stream[] = "text/event-stream";
    long status = 0;
    const char *type = NULL;
    curl_easy_getinfo(c->easy, CURLINFO_RESPONSE_CODE, &status);
    curl_easy_getinfo(c->easy, CURLINFO_CONTENT_TYPE, &type);
    c->has_head = true;
    c->is_stream =
        status == 200 && type != NULL && g_ascii_strncasecmp(type, stream, sizeof stream - 1) == 0;
}

/* Returning another number than it was given ends the transfer. */
static size_t on_bytes(char *bytes, size_t size, size_t n, void *user)
{
    LoadClient *c = user;
    const size_t length = size * n;
    if (!c->has_head) {
        look_at_head(c);
    }
    if (!c->is_stream) {
        g_string_append_len(c->said, bytes, (gssize)MIN(length, (size_t)SAID_BYTES - c->said->len));
        return length;
    }
    c->is_too_long = !sse_reader_feed(c->events, bytes, length);
    return c->is_too_long || c->answer.failed != NULL ? length + 1 : length;
}

/* ---- the end of a request ---- */

static void load_error_free(void *pointer)
{
    LoadError *e = pointer;
    g_free(e->status);
    g_free(e->text);
    g_free(e);
}

static void count_error(LoadResult *r, const char *status, char *text /* taken */)
{
    r->failed++;
    for (guint i = 0; i < r->errors->len; i++) {
        LoadError *e = r->errors->pdata[i];
        if (strcmp(e->status, status) == 0) {
            e->n++;
            g_free(text);
            return;
        }
    }
    LoadError *e = g_new0(LoadError, 1);
    *e = (LoadError){.status = g_strdup(status), .text = text, .n = 1};
    g_ptr_array_add(r->errors, e);
}

static bool is_within(int64_t us, int64_t limit_us)
{
    return limit_us == 0 || us <= limit_us;
}

static void count_completed(LoadClient *c)
{
    const LoadLimits *limits = &c->load->o->limits;
    LoadResult *r = c->load->r;
    StreamAnswer *a = &c->answer;
    const int64_t first_us = (c->first_us != 0 ? c->first_us : c->done_us) - c->from_us,
                  whole_us = c->done_us - c->from_us,
                  mean_us =
                      a->n_texts > 1 ? (c->last_us - c->first_us) / (int64_t)(a->n_texts - 1) : 0;
    latency_add(r->ttft, first_us);
    latency_add(r->e2e, whole_us);
    r->completed++;
    r->good += is_within(first_us, limits->ttft_us) && is_within(mean_us, limits->itl_us) &&
               is_within(whole_us, limits->e2e_us);
    r->prompt_tokens += a->prompt_tokens;
    r->output_tokens += a->has_usage ? a->output_tokens : a->n_texts;
    r->uncounted += !a->has_usage;
    if (r->fingerprint == NULL) {
        r->fingerprint = g_steal_pointer(&a->fingerprint);
    }
}

/* The name under which a failure is counted; what was said in *text, returned. */
static const char *failure(LoadClient *c, CURLcode code, char status_text[12], char **text)
{
    long status = 0;
    curl_easy_getinfo(c->easy, CURLINFO_RESPONSE_CODE, &status);
    if (c->answer.failed != NULL) {
        *text = g_strdup(c->answer.error);
        return c->answer.failed;
    }
    if (c->is_too_long) {
        *text = g_strdup_printf("an event is longer than %d bytes", EVENT_BYTES);
        return "malformed";
    }
    if (code == CURLE_OK && status != 200) {
        g_snprintf(status_text, 12, "%ld", status);
        *text = stream_answer_error_text(c->said->str, c->said->len);
        return status_text;
    }
    if (code == CURLE_OK && !c->is_stream) {
        g_autofree char *said = stream_answer_error_text(c->said->str, c->said->len);
        *text = g_strdup_printf("the answer is no event stream: %s", said);
        return "malformed";
    }
    *text = g_strdup_printf("%s, after %" G_GUINT64_FORMAT " events with text",
                            code == CURLE_OK ? "the stream ended without [DONE]" : c->why,
                            c->answer.n_texts);
    return load_http_failure(code, c->is_stream);
}

static void rest_if_asked(LoadClient *c, int64_t now)
{
    curl_off_t seconds = 0;
    curl_easy_getinfo(c->easy, CURLINFO_RETRY_AFTER, &seconds);
    c->idle_until_us = now + CLAMP(seconds, 0, PAUSE_MOST_S) * G_USEC_PER_SEC;
}

static void request_ended(LoadClient *c, CURLcode code)
{
    Load *l = c->load;
    char status[12], *text = NULL;
    curl_multi_remove_handle(l->multi, c->easy);
    c->is_busy = false;
    l->n_busy--;
    l->end_us = g_get_monotonic_time();
    if (c->answer.done && c->answer.failed == NULL) {
        count_completed(c);
    } else {
        const char *name = failure(c, code, status, &text);
        count_error(l->r, name, text);
        rest_if_asked(c, l->end_us);
    }
}

static bool collect_ended(Load *l)
{
    const CURLMsg *m;
    int left;
    bool any = false;
    while ((m = curl_multi_info_read(l->multi, &left)) != NULL) {
        if (m->msg == CURLMSG_DONE) {
            void *client;
            const CURLcode code = m->data.result;
            curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &client);
            request_ended(client, code);
            any = true;
        }
    }
    return any;
}

/* ---- the begin of a request ---- */

static char *request_body(const Load *l, uint64_t i)
{
    const LoadOptions *o = l->o;
    json_t *prompt = o->prompts->pdata[i % o->prompts->len];
    json_t *body =
        json_pack("{s:s,s:b,s:{s:b},s:I,s:I,s:I}", "model", o->model, "stream", 1, "stream_options",
                  "include_usage", 1, "max_tokens", (json_int_t)o->max_tokens, "temperature",
                  (json_int_t)0, "seed", (json_int_t)((o->seed + i) & G_MAXINT32));
    if (o->chat && json_is_string(prompt)) {
        json_object_set_new(body, "messages",
                            json_pack("[{s:s,s:O}]", "role", "user", "content", prompt));
    } else {
        json_object_set(body, o->chat ? "messages" : "prompt", prompt);
    }
    if (o->more != NULL) {
        const char *key;
        json_t *value;
        json_object_foreach(o->more, key, value)
        {
            if (json_is_null(value)) {
                json_object_del(body, key);
            } else {
                json_object_set(body, key, value);
            }
        }
    }
    char *text = json_dumps(body, JSON_COMPACT);
    json_decref(body);
    return text;
}

static void start_request(LoadClient *c, int64_t from_us)
{
    Load *l = c->load;
    stream_answer_clear(&c->answer);
    sse_reader_reset(c->events);
    g_string_truncate(c->said, 0);
    c->has_head = c->is_stream = c->is_too_long = false;
    c->why[0] = '\0';
    c->from_us = from_us;
    c->first_us = c->last_us = c->done_us = 0;
    free(c->body); /* jansson's */
    c->body = request_body(l, l->n_started);
    curl_easy_setopt(c->easy, CURLOPT_POSTFIELDS, c->body);
    curl_easy_setopt(c->easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)strlen(c->body));
    curl_multi_add_handle(l->multi, c->easy);
    c->is_busy = true;
    l->n_busy++;
    l->n_started++;
}

static void draw_arrival(Load *l)
{
    const double u = (double)(random_u64(&l->arrivals.base) >> 11) / 9007199254740992.0;
    l->next_arrival_us += (int64_t)(-log1p(-u) / l->o->rate * 1e6);
}

/* Gives idle clients what is due. Returns when the next request is, or INT64_MAX: when a client
 * becomes idle. */
static int64_t start_due(Load *l, int64_t now)
{
    const bool is_closed = l->o->rate <= 0;
    int64_t next = INT64_MAX;
    if (!is_closed && now < l->next_arrival_us) {
        return l->n_started < l->o->n_requests ? l->next_arrival_us : INT64_MAX;
    }
    for (unsigned i = 0; l->n_busy < l->o->concurrency && i < l->o->concurrency; i++) {
        LoadClient *c = &l->clients[i];
        if (l->n_started == l->o->n_requests) {
            return INT64_MAX;
        }
        if (c->is_busy) {
            continue;
        }
        if (is_closed && c->idle_until_us > now) {
            next = MIN(next, c->idle_until_us);
        } else if (is_closed) {
            start_request(c, now);
        } else if (l->next_arrival_us <= now) {
            start_request(c, l->next_arrival_us);
            draw_arrival(l);
        } else {
            next = l->next_arrival_us;
        }
    }
    return next;
}

/* ---- the loop ---- */

static void tell_progress(Load *l, int64_t now)
{
    if (l->o->progress != NULL && now - l->progress_us >= PROGRESS_US) {
        l->progress_us = now;
        l->o->progress(l->r->completed, l->r->failed, l->o->user);
    }
}

static bool wait_for_bytes(Load *l, int signal_fd, int64_t next_us, GError **error)
{
    struct curl_waitfd also = {.fd = signal_fd, .events = CURL_WAIT_POLLIN};
    const int64_t now = g_get_monotonic_time(),
                  wait_us =
                      CLAMP(next_us == INT64_MAX ? PROGRESS_US : next_us - now, 0, PROGRESS_US);
    const CURLMcode code = curl_multi_poll(l->multi, &also, 1, (int)((wait_us + 999) / 1000), NULL);
    if (code != CURLM_OK) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "waiting for the server: %s",
                    curl_multi_strerror(code));
        return false;
    }
    l->r->interrupted = also.revents != 0;
    return true;
}

static bool run_loop(Load *l, int signal_fd, GError **error)
{
    while (!l->r->interrupted && (l->n_started < l->o->n_requests || l->n_busy > 0)) {
        int running;
        const int64_t now = g_get_monotonic_time(), next_us = start_due(l, now);
        tell_progress(l, now);
        const CURLMcode code = curl_multi_perform(l->multi, &running);
        if (code != CURLM_OK) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "libcurl: %s", curl_multi_strerror(code));
            return false;
        }
        if (!collect_ended(l) && !wait_for_bytes(l, signal_fd, next_us, error)) {
            return false;
        }
    }
    return true;
}

/* ---- a run from begin to end ---- */

static void client_init(Load *l, LoadClient *c, const char *url)
{
    c->load = l;
    c->easy = load_http_new(l->o);
    c->events = sse_reader_new(EVENT_BYTES, on_event, c);
    c->said = g_string_new(NULL);
    curl_easy_setopt(c->easy, CURLOPT_URL, url);
    curl_easy_setopt(c->easy, CURLOPT_HTTPHEADER, l->headers);
    curl_easy_setopt(c->easy, CURLOPT_POST, 1L);
    curl_easy_setopt(c->easy, CURLOPT_TIMEOUT_MS, (long)(l->o->timeout_us / 1000));
    curl_easy_setopt(c->easy, CURLOPT_ERRORBUFFER, c->why);
    curl_easy_setopt(c->easy, CURLOPT_WRITEFUNCTION, on_bytes);
    curl_easy_setopt(c->easy, CURLOPT_WRITEDATA, c);
    curl_easy_setopt(c->easy, CURLOPT_PRIVATE, c);
}

static void load_init(Load *l, const LoadOptions *o)
{
    g_autofree char *url =
        g_strconcat(o->url, o->chat ? "/chat/completions" : "/completions", NULL);
    l->o = o;
    l->r = g_new0(LoadResult, 1);
    l->r->ttft = latency_new();
    l->r->itl = latency_new();
    l->r->e2e = latency_new();
    l->r->errors = g_ptr_array_new_with_free_func(load_error_free);
    l->multi = curl_multi_init();
    curl_multi_setopt(l->multi, CURLMOPT_MAXCONNECTS, (long)o->concurrency);
    l->headers = load_http_headers(o);
    l->clients = g_new0(LoadClient, o->concurrency);
    for (unsigned i = 0; i < o->concurrency; i++) {
        client_init(l, &l->clients[i], url);
    }
    random_seeded_init(&l->arrivals, o->seed);
    l->begin_us = l->end_us = l->progress_us = l->next_arrival_us = g_get_monotonic_time();
}

static void load_clear(Load *l)
{
    for (unsigned i = 0; i < l->o->concurrency; i++) {
        LoadClient *c = &l->clients[i];
        if (c->is_busy) {
            curl_multi_remove_handle(l->multi, c->easy);
        }
        curl_easy_cleanup(c->easy);
        sse_reader_free(c->events);
        stream_answer_clear(&c->answer);
        g_string_free(c->said, TRUE);
        free(c->body);
    }
    g_free(l->clients);
    curl_slist_free_all(l->headers);
    curl_multi_cleanup(l->multi);
}

LoadResult *load_run(const LoadOptions *o, GError **error)
{
    Load l = {0};
    Interrupts interrupts;
    if (!interrupts_open(&interrupts, error)) {
        return NULL;
    }
    load_init(&l, o);
    const bool ok = run_loop(&l, interrupts.fd, error);
    l.r->cancelled = l.n_busy;
    if (l.n_busy > 0) {
        l.end_us = g_get_monotonic_time();
    }
    l.r->duration_s = (double)(l.end_us - l.begin_us) / 1e6;
    load_clear(&l);
    interrupts_close(&interrupts);
    if (!ok) {
        load_result_free(l.r);
        return NULL;
    }
    return l.r;
}

void load_result_free(LoadResult *r)
{
    if (r == NULL) {
        return;
    }
    latency_free(r->ttft);
    latency_free(r->itl);
    latency_free(r->e2e);
    g_ptr_array_unref(r->errors);
    g_free(r->fingerprint);
    g_free(r);
}
