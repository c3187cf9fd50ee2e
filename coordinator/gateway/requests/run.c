/* Problem: a client's request goes through four hands (file, pool, deployment, leader), each of
 * which may fail or be slow, and the client may leave at any time.
 *
 *             model opened      ids there       lease ready      all choices done
 *   OPENING ────────────▶ ENCODING ──────▶ WAITING ────────▶ RUNNING ────────▶ ENDED
 *      │                     │                ▲                 │                ▲
 *      │                     │                └─────────────────┘                │
 *      │                     │                 its epoch is over                 │
 *      └─────────────────────┴────────────────┴─────────────────┴────────────────┘
 *                                error, cancel, deadline
 *
 * 1. A run is answered exactly once (run_fail, run_complete: sink.finish) or was cancelled by whose
 * it is (run_cancel); then it is ENDED and its sink is not touched again.
 * 2. It is freed when ENDED and nobody (opening, encoding, reaping, n_calls) refers to it.
 * 3. The lease is held from WAITING to ENDED and released exactly once; a failed lease ends the
 * run, an interrupted one does not (resume.c).
 * 4. Prompts, texts and tokens are in no log line. */
#include "coordinator/gateway/requests/run.h"

#include "coordinator/message.h"
#include "proto/base/error.h"
#include "proto/plan/plan_context.h"
#include "proto/plan/plan_message.h"

#include <stdio.h>
#include <string.h>

#define WINDOWS_AT_ONCE 4u
#define SHARE_KEY_BYTES 64u
#define SEED_MASK ((UINT64_C(1) << 53) - 1) /* exact in JSON */

static void run_free(Run *run)
{
    if (run->owner != NULL) {
        g_queue_unlink(&run->owner->runs, &run->link);
    }
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        choice_clear(&run->encoded.choices[i]);
    }
    g_free(run->encoded.choices);
    g_free(run->encoded.ids);
    g_clear_error(&run->encoded.error);
    g_free(run->cache_key);
    g_free(run->share_key);
    g_free(run->client_id);
    model_unref(run->model);
    message_free(run->request);
    g_free(run);
}

static void run_free_if_unused(Run *run)
{
    if (run->state == RUN_ENDED && !run->opening && !run->encoding && !run->reaping &&
        run->n_calls == 0) {
        run_free(run);
    }
}

/* Everything but the answer. The run may be freed by the caller's next run_free_if_unused(). */
static void run_end(Run *run)
{
    run->state = RUN_ENDED;
    if (run->owner != NULL) {
        loop_timer_cancel(run->owner->options.loop, run->deadline);
        run->deadline = NULL;
    }
    if (run->lease != NULL) {
        lease_release(g_steal_pointer(&run->lease));
    }
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        choice_detach(&run->encoded.choices[i]);
    }
}

/* Freed later on the loop: callers up the stack may still look at the run. */
static void run_reap(void *user)
{
    Run *run = user;
    run->reaping = false;
    run_free_if_unused(run);
}

static void run_end_and_reap(Run *run)
{
    if (run->state == RUN_ENDED) {
        return;
    }
    run->reaping = true;
    run_end(run);
    loop_post(run->owner->options.loop, run_reap, run);
}

/* ---- what is counted ---- */

static void run_count_lease(Run *run)
{
    if (!run->leased) {
        run->leased = true;
        histogram_add(&run->stats->queue_s,
                      (double)(loop_now_us(run->owner->options.loop) - run->begun_us) / 1e6);
    }
}

static void run_count_tokens(Run *run, const Weft__V1__RunEvent *event)
{
    if (event->event_case != WEFT__V1__RUN_EVENT__EVENT_DELTA || event->delta->n_ids == 0 ||
        run->request->kind != WEFT__V1__REQUEST_KIND__GENERATE) {
        return;
    }
    Choice *c = &run->encoded.choices[event->delta->choice];
    int64_t now = loop_now_us(run->owner->options.loop);
    if (c->told_us == 0) {
        histogram_add(&run->stats->first_token_s, (double)(now - run->begun_us) / 1e6);
        histogram_add(&run->stats->prefill_s, (double)(now - c->begun_us) / 1e6);
        run->stats->prompt_tokens += c->index == 0 ? run->encoded.n_text : 0;
    } else {
        histogram_add(&run->stats->inter_token_s, (double)(now - c->told_us) / 1e6);
    }
    c->told_us = now;
    run->stats->generation_tokens += event->delta->n_ids;
}

static void run_count_choice(Run *run, const Choice *c)
{
    if (c->last_us > c->first_us) {
        const double decode_s = (double)(c->last_us - c->first_us) / 1e6;
        histogram_add(&run->stats->decode_s, decode_s);
        histogram_add(&run->stats->mean_token_s, decode_s / MAX(c->ids->len - 1, 1));
    }
    if (c->last_us > c->begun_us) {
        histogram_add(&run->stats->inference_s, (double)(c->last_us - c->begun_us) / 1e6);
    }
    if (run->request->kind == WEFT__V1__REQUEST_KIND__GENERATE) {
        histogram_add(&run->stats->generated_length, c->ids->len);
    }
}

static void run_count_lengths(Run *run)
{
    unsigned most = 0;
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        const Choice *c = &run->encoded.choices[i];
        most = MAX(most, c->ids != NULL ? c->ids->len : 0);
    }
    histogram_add(&run->stats->prompt_length, run->encoded.n_text);
    histogram_add(&run->stats->tokens_asked, run->request->max_tokens);
    histogram_add(&run->stats->sequences_asked, run->encoded.n_choices);
    histogram_add(&run->stats->most_generated, most);
}

/* reason: of the whole, where the choices have none of their own. */
static void run_count_end(Run *run, const char *reason)
{
    if (run->stats == NULL) {
        return;
    }
    int64_t now = loop_now_us(run->owner->options.loop);
    for (uint32_t i = 0; i < MAX(run->encoded.n_choices, 1); i++) {
        const Choice *c = run->encoded.n_choices > 0 ? &run->encoded.choices[i] : NULL;
        model_stats_end(run->stats, c != NULL && c->done ? c->finish_reason : reason);
        if (c != NULL && c->done) {
            run_count_choice(run, c);
        }
    }
    histogram_add(&run->stats->whole_s, (double)(now - run->begun_us) / 1e6);
    if (run->n_done > 0 && run->request->kind == WEFT__V1__REQUEST_KIND__GENERATE) {
        run_count_lengths(run);
    }
}

/* What is wrong with a request may quote it, which is no matter for a log. */
static bool is_refusal(const GError *error)
{
    return g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) ||
           g_error_matches(error, WEFT_ERROR, WEFT_ERROR_TOO_LONG);
}

void run_fail(Run *run, const GError *error)
{
    if (run->state == RUN_ENDED) {
        return;
    }
    run_count_end(run, is_refusal(error) ? "refused" : "error");
    g_autoptr(GError) own = g_error_copy(error);
    log_info(run->owner->options.log, "request %s failed: %s", run->id,
             is_refusal(own) ? "refused" : own->message);
    run_end_and_reap(run);
    run->sink->finish(run->sink_user, own);
}

void run_cancel(Run *run, const char *why)
{
    log_info(run->owner->options.log, "request %s cancelled%s%s", run->id,
             why != NULL ? ": " : " by its client", why != NULL ? why : "");
    run_count_end(run, why != NULL ? "cancelled" : "abort");
    run_end_and_reap(run);
}

static void run_on_deadline(void *user)
{
    Run *run = user;
    run->deadline = NULL;
    g_autoptr(GError) error = g_error_new(
        WEFT_ERROR, WEFT_ERROR_DEADLINE,
        "request %s did not finish within %" G_GUINT64_FORMAT " ms (%u of %u sequences done)",
        run->id, run->request->deadline_ms, run->n_done, run->encoded.n_choices);
    run_fail(run, error);
}

void run_call_over(Run *run)
{
    run->n_calls--;
    run_free_if_unused(run);
}

bool run_send(Run *run, Weft__V1__RunEvent *event)
{
    if (run->state == RUN_ENDED) {
        return false;
    }
    run_count_tokens(run, event);
    if (run->sink->send(run->sink_user, event)) {
        return true;
    }
    g_autoptr(GError) error = g_error_new(
        WEFT_ERROR, WEFT_ERROR_DEADLINE,
        "request %s: the client does not read its stream: read while it is written", run->id);
    run_fail(run, error);
    return false;
}

static void run_progress(const char *text, double fraction, const char *worker, void *user)
{
    Weft__V1__RunProgress progress = WEFT__V1__RUN_PROGRESS__INIT;
    progress.text = (char *)text;
    progress.fraction = fraction;
    progress.worker = (char *)worker;
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_PROGRESS;
    event.progress = &progress;
    run_send(user, &event);
}

/* ---- counters ---- */

void run_add_counters(const Run *run, uint64_t sum[N_COUNTERS])
{
    const PlanReplica *replica = &run->info.plan->replicas[run->info.replica];
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        for (uint32_t k = 0; k < replica->stages[s].n_ranks; k++) {
            const Member *member =
                members_find(run->owner->options.members, replica->stages[s].ranks[k].worker);
            const Weft__V1__Heartbeat *heartbeat = member != NULL ? member_heartbeat(member) : NULL;
            const Weft__V1__Counters *c = heartbeat != NULL ? heartbeat->counters : NULL;
            if (c != NULL) {
                const uint64_t values[N_COUNTERS] = {c->steps,
                                                     c->rows,
                                                     c->wire_bytes_sent,
                                                     c->wire_bytes_received,
                                                     c->wire_messages_sent,
                                                     c->dropped_stale,
                                                     c->dropped_replayed,
                                                     c->dropped_corrupt,
                                                     c->compute_us,
                                                     c->wait_us,
                                                     c->wire_us,
                                                     c->seal_us};
                for (uint32_t i = 0; i < N_COUNTERS; i++) {
                    sum[i] += values[i];
                }
            }
        }
    }
}

static Weft__V1__Counters counters_since(const Run *run)
{
    uint64_t now[N_COUNTERS] = {0};
    run_add_counters(run, now);
    for (uint32_t i = 0; i < N_COUNTERS; i++) {
        now[i] = run->spent[i] + (now[i] > run->counters[i] ? now[i] - run->counters[i] : 0);
    }
    Weft__V1__Counters c = WEFT__V1__COUNTERS__INIT;
    c.steps = now[0];
    c.rows = now[1];
    c.wire_bytes_sent = now[2];
    c.wire_bytes_received = now[3];
    c.wire_messages_sent = now[4];
    c.dropped_stale = now[5];
    c.dropped_replayed = now[6];
    c.dropped_corrupt = now[7];
    c.compute_us = now[8];
    c.wait_us = now[9];
    c.wire_us = now[10];
    c.seal_us = now[11];
    return c;
}

/* ---- the end of a good run ---- */

/* NUMERICS 13: hash of the row hashes, sequences in order. */
static Hash128 run_digest(const Run *run)
{
    Hasher *hasher = hasher_new();
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        hasher_update(hasher, run->encoded.choices[i].hashes->data,
                      run->encoded.choices[i].hashes->len);
    }
    Hash128 digest = hasher_finish(hasher);
    hasher_free(hasher);
    return digest;
}

/* A sequence that a stop string ended has no times from its leader, one that had several leaders
 * has none from the first: the gateway's own are taken. */
static void choice_times(const Choice *c, double *prefill_s, double *decode_s)
{
    bool told = !c->resumed && (c->prefill_us != 0 || c->decode_us != 0);
    double prefill = told ? (double)c->prefill_us / 1e6 : (double)(c->first_us - c->begun_us) / 1e6;
    double decode = told ? (double)c->decode_us / 1e6 : (double)(c->last_us - c->first_us) / 1e6;
    *prefill_s = MAX(*prefill_s, prefill);
    *decode_s = MAX(*decode_s, decode);
}

static void run_complete(Run *run)
{
    Hash128 digest = run_digest(run);
    Weft__V1__RunDone done = WEFT__V1__RUN_DONE__INIT;
    Weft__V1__Counters counters = counters_since(run);
    bool score = run->request->kind == WEFT__V1__REQUEST_KIND__SCORE;
    done.finish_reason = (char *)run->encoded.choices[0].finish_reason;
    done.digest = (ProtobufCBinaryData){sizeof digest.bytes, digest.bytes};
    done.counters = &counters;
    done.recoveries = run->resume.n_recoveries;
    done.stall_s = run->resume.stall_s;
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        const Choice *c = &run->encoded.choices[i];
        done.prefill_tokens +=
            i % run->encoded.n_pieces == 0 ? c->n_prompt : c->n_prompt - c->score_from;
        done.wire_bytes += c->wire_bytes;
        choice_times(c, &done.prefill_s, &done.decode_s);
        if (score) {
            done.nll_sum += c->nll;
            done.tokens_scored += c->ids->len;
        } else {
            done.tokens += c->ids->len;
        }
    }
    log_info(run->owner->options.log,
             "request %s job %s epoch %" G_GUINT64_FORMAT
             ": %u prompt tokens, %u tokens, %s, %.2f s",
             run->id, run->info.job, run->info.epoch, done.prefill_tokens,
             score ? done.tokens_scored : done.tokens, done.finish_reason,
             (double)(loop_now_us(run->owner->options.loop) - run->begun_us) / 1e6);
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_DONE;
    event.done = &done;
    run_count_end(run, "");
    run_end_and_reap(run);
    run->sink->send(run->sink_user, &event);
    run->sink->finish(run->sink_user, NULL);
}

static uint32_t choices_at_once(const Run *run)
{
    if (run->request->kind == WEFT__V1__REQUEST_KIND__SCORE) {
        return MIN(run->encoded.n_choices, CLAMP(run->info.plan->streams, 1, WINDOWS_AT_ONCE));
    }
    return run->encoded.n_choices;
}

/* The choice that is begun as the k-th. Windows in pieces are taken n_abreast at a time, a piece of
 * each in turn: a piece needs the keys that the one before it left (worker/serve/prefix_cache.h).
 */
static Choice *run_choice_at(const Run *run, uint32_t k)
{
    const uint32_t group = run->n_abreast * run->encoded.n_pieces,
                   first = k / group * run->n_abreast,
                   n_windows = run->encoded.n_choices / run->encoded.n_pieces,
                   n = MIN(run->n_abreast, n_windows - first), window = first + k % group % n,
                   piece = k % group / n;
    return &run->encoded.choices[window * run->encoded.n_pieces + piece];
}

static void run_begin_choices(Run *run);

static void run_on_room(void *user)
{
    Run *run = user;
    run->waits_for_room = false;
    run_begin_choices(run);
}

/* Logits are begun only as fast as the client reads. */
static bool run_has_room(Run *run)
{
    if (!run->request->want_logits || run->sink->has_room == NULL) {
        return true;
    }
    if (!run->waits_for_room) {
        run->waits_for_room = !run->sink->has_room(run->sink_user, run_on_room, run);
    }
    return !run->waits_for_room;
}

/* As many as may be open. */
static void run_begin_choices(Run *run)
{
    while (run->state == RUN_RUNNING && run->n_begun < run->encoded.n_choices &&
           run->n_begun - run->n_done < choices_at_once(run) && run_has_room(run)) {
        choice_submit(run_choice_at(run, run->n_begun++));
    }
}

static bool run_send_choice_done(Run *run, const Choice *choice)
{
    Weft__V1__RunChoiceDone done = WEFT__V1__RUN_CHOICE_DONE__INIT;
    done.choice = choice->index;
    done.finish_reason = (char *)choice->finish_reason;
    done.tokens = choice->ids->len;
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_CHOICE_DONE;
    event.choice_done = &done;
    return run_send(run, &event);
}

void run_choice_done(Choice *choice)
{
    Run *run = choice->run;
    run->n_done++;
    if (run->request->kind == WEFT__V1__REQUEST_KIND__GENERATE &&
        !run_send_choice_done(run, choice)) {
        return;
    }
    if (run->n_done == run->encoded.n_choices) {
        run_complete(run);
        return;
    }
    if (run->n_begun < run->encoded.n_choices) {
        g_autofree char *text =
            g_strdup_printf("scored %u of %u windows", run->n_done / run->encoded.n_pieces,
                            run->encoded.n_choices / run->encoded.n_pieces);
        run_progress(text, (double)run->n_done / run->encoded.n_choices, "", run);
        run_begin_choices(run);
    }
}

/* ---- on the way ---- */

static void run_send_started(Run *run)
{
    Hash128 definition = definition_hash(&run->info.plan->definition);
    Weft__V1__RunStarted started = WEFT__V1__RUN_STARTED__INIT;
    started.request = run->id;
    started.plan = plan_to_message(run->info.plan);
    started.prompt_tokens = run->encoded.n_text;
    started.definition = (ProtobufCBinaryData){sizeof definition.bytes, definition.bytes};
    started.seed = run->seed;
    started.load_s = run->info.load_s;
    started.epoch = run->info.epoch;
    started.replica = run->info.replica;
    if (run->request->want_logits && run->request->score_window > 0) {
        started.vocab_size = run->model->spec->vocab_size;
        started.vocabulary = (ProtobufCBinaryData){sizeof run->encoded.vocabulary.bytes,
                                                   run->encoded.vocabulary.bytes};
        started.windows =
            (ProtobufCBinaryData){sizeof run->encoded.windows.bytes, run->encoded.windows.bytes};
    }
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_STARTED;
    event.started = &started;
    run_send(run, &event);
    message_free(started.plan);
}

static void run_on_lease(const LeaseInfo *info, void *user)
{
    Run *run = user;
    run->info = *info;
    run->state = RUN_RUNNING;
    run_count_lease(run);
    memset(run->counters, 0, sizeof run->counters);
    run_add_counters(run, run->counters);
    if (run->resume.started) {
        if (!run_resume(run)) {
            return;
        }
    } else {
        run->resume.started = true;
        run->resume.definition = definition_hash(&info->plan->definition);
        run->resume.last_us = loop_now_us(run->owner->options.loop);
        run->n_abreast = choices_at_once(run);
        run_send_started(run);
    }
    for (uint32_t i = 0; run->state == RUN_RUNNING && i < run->n_begun; i++) {
        Choice *c = run_choice_at(run, i);
        if (!c->done) {
            choice_submit(c);
        }
    }
    run_begin_choices(run);
}

static void run_on_lease_failed(const GError *error, void *user)
{
    run_fail(user, error);
}

/* The deployment that it goes to: the one that was given beside the request, else as it says. */
static JobWish run_job_wish(const Run *run)
{
    const Weft__V1__RunRequest *r = run->request;
    if (run->wish_given) {
        return run->wish;
    }
    JobWish wish = {.context = r->context, .streams = r->streams > 1 ? r->streams : 0};
    request_numerics(r->numerics, &wish.numerics, &wish.any_numerics, NULL);
    request_kv_type(r->kv, &wish.kv_type, NULL);
    if (r->layout != NULL) {
        wish.dp = r->layout->dp;
        wish.pp = r->layout->pp;
        wish.tp = r->layout->tp;
    }
    return wish;
}

static void run_acquire(Run *run)
{
    const JobWish wish = run_job_wish(run);
    LeaseCallbacks callbacks = {
        .progress = run_progress,
        .ready = run_on_lease,
        .interrupted = run_on_interrupted,
        .failed = run_on_lease_failed,
    };
    run->state = RUN_WAITING;
    run->lease = jobs_acquire(run->owner->options.jobs, run->model, &wish, callbacks, run);
    if (!run->request->fresh && run->encoded.n_choices > 0) {
        lease_expect(run->lease, run->encoded.choices[0].prompt, run->encoded.choices[0].n_prompt,
                     run->cache_key);
    }
}

static void encode_work(void *user)
{
    Run *run = user;
    run_encode(run, &run->encoding_out);
}

/* The pool is done with it. */
static void run_take_encoded(Run *run)
{
    run->encoding = false;
    run->encoded = run->encoding_out;
}

static void encode_done(void *user)
{
    Run *run = user;
    run_take_encoded(run);
    if (run->state == RUN_ENDED) {
        run_free_if_unused(run);
    } else if (run->encoded.error != NULL) {
        run_fail(run, run->encoded.error);
    } else {
        run_acquire(run);
    }
}

/* The pool is gone, and with it the coordinator: the run was orphaned by requests_free(). */
static void encode_dropped(void *user)
{
    Run *run = user;
    run_take_encoded(run);
    run_free_if_unused(run);
}

static bool run_check_context(Run *run, GError **error)
{
    uint32_t limit = run->model->spec->context;
    if (run->request->context > limit) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "context %u is beyond the model's %u",
                    run->request->context, limit);
        return false;
    }
    run->context = plan_context(run->model->spec, run->request->context);
    return true;
}

static void run_on_model(Model *model, const GError *error, void *user)
{
    Run *run = user;
    g_autoptr(GError) own = NULL;
    run->opening = false;
    if (run->state == RUN_ENDED) {
        run_free_if_unused(run);
        return;
    }
    run->state = RUN_ENCODING;
    if (error != NULL) {
        run_fail(run, error);
        return;
    }
    run->model = model_ref(model);
    if (run->stats == NULL) {
        run->stats = request_stats_model(run->owner->stats, model->name);
    }
    if (!run_check_context(run, &own)) {
        run_fail(run, own);
        return;
    }
    run->encoding = true;
    if (protobuf_c_message_get_packed_size(&run->request->base) > WORK_HEAVY_BYTES) {
        work_pool_run_heavy(run->owner->options.pool, encode_work, encode_done, encode_dropped,
                            run);
    } else {
        work_pool_run(run->owner->options.pool, encode_work, encode_done, encode_dropped, run);
    }
}

Run *requests_start(Requests *requests, const Weft__V1__RunRequest *request,
                    const RunSetting *setting, const RunSink *sink, void *sink_user, GError **error)
{
    if (!request_check(request, error)) {
        return NULL;
    }
    Run *run = g_new0(Run, 1);
    run->owner = requests;
    run->link.data = run;
    g_queue_push_tail_link(&requests->runs, &run->link);
    run->sink = sink;
    run->sink_user = sink_user;
    run->request = (Weft__V1__RunRequest *)message_copy(&request->base);
    run->begun_us = loop_now_us(requests->options.loop);
    if (setting != NULL) {
        run->wish_given = setting->wish != NULL;
        run->wish = setting->wish != NULL ? *setting->wish : (JobWish){0};
        run->cache_key = g_strdup(setting->cache_key);
        run->share_key = g_strndup(setting->share_key, SHARE_KEY_BYTES);
        run->stats =
            setting->name != NULL ? request_stats_model(requests->stats, setting->name) : NULL;
        run->client_id = g_strdup(setting->client_id);
    }
    run->seed = request->seed_given && request->sampler != NULL
                    ? request->sampler->seed
                    : random_u64(requests->options.random) & SEED_MASK;
    run->ids_seed = request->random_prompt > 0 ? random_u64(requests->options.random) : 0;
    snprintf(run->id, sizeof run->id, "r-%08x", (unsigned)random_u64(requests->options.random));
    const uint64_t longest_ms = (uint64_t)(INT64_MAX - run->begun_us) / 1000; /* beyond: no end */
    if (request->deadline_ms > 0 && request->deadline_ms < longest_ms) {
        run->deadline = loop_timer_start(
            requests->options.loop, (int64_t)request->deadline_ms * 1000, run_on_deadline, run);
    }
    run->opening = true;
    models_open(requests->options.models, request->model, run_on_model, run);
    return run;
}

const char *run_id(const Run *run)
{
    return run->id;
}

void requests_count(const Requests *requests, unsigned *running_out, unsigned *waiting_out)
{
    *running_out = *waiting_out = 0;
    request_stats_clear_open(requests->stats);
    for (GList *l = requests->runs.head; l != NULL; l = l->next) {
        const Run *run = l->data;
        bool running = run->state == RUN_RUNNING, waiting = run->state < RUN_RUNNING;
        *running_out += running;
        *waiting_out += waiting;
        if (run->stats != NULL) {
            run->stats->running += running;
            run->stats->waiting += waiting;
        }
    }
}

const RequestStats *requests_stats(const Requests *requests)
{
    return requests->stats;
}

/* ---- all of them ---- */

Requests *requests_new(const RequestsOptions *options)
{
    Requests *requests = g_new0(Requests, 1);
    requests->options = *options;
    requests->cluster = g_strdup(options->cluster);
    g_queue_init(&requests->runs);
    requests->stats = request_stats_new();
    return requests;
}

void requests_free(Requests *requests)
{
    if (requests == NULL) {
        return;
    }
    while (requests->runs.head != NULL) {
        Run *run = requests->runs.head->data;
        g_autoptr(GError) error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_UNREACHABLE,
                        "the coordinator is stopping: start the request again when it is back");
        if (run->state != RUN_ENDED) {
            run_end(run);
            run->sink->finish(run->sink_user, error);
        }
        g_queue_unlink(&requests->runs, &run->link);
        run->owner = NULL;
        run->opening = false; /* models are freed before the loop runs again */
        run_free_if_unused(run);
    }
    request_stats_free(requests->stats);
    g_free(requests->cluster);
    g_free(requests);
}
