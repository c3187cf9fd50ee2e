/* The thread of a training engine; diagram: train_engine.h. Invariants
 *   1. Everything but `shared` and the atomics belongs to the engine thread.
 *   2. No wait outlives an abort, a dead peer or its deadline; what ends the epoch here is told to
 *      the peers (LINK_OP_ABORT), so that all of them end it.
 *   3. The first reason is the one that is reported: an abort's text before the error of a wait
 * that it broke off.
 *   4. The port stays open, and is progressed, after the last step: peers may still need what was
 *      sent. */
#include "worker/train/train_engine_state.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "transport/crypto/keys.h"

#include <string.h>
#include <unistd.h>

/* ---- posts to the owner ---- */

typedef struct EventPost {
    TrainEvents events;
    void (*plain)(void *user);
    Hash128 digest;
    GError *error;
} EventPost;

static void deliver_plain(void *user)
{
    EventPost *p = user;
    p->plain(p->events.user);
    g_free(p);
}

static void deliver_ended(void *user)
{
    EventPost *p = user;
    p->events.ended(p->error == NULL ? &p->digest : NULL, p->error, p->events.user);
    g_clear_error(&p->error);
    g_free(p);
}

static void post_plain(TrainEngine *e, void (*fn)(void *user))
{
    EventPost *p = g_new0(EventPost, 1);
    *p = (EventPost){.events = e->o.events, .plain = fn};
    loop_post(e->o.loop, deliver_plain, p);
}

static void post_ended(TrainEngine *e, const Hash128 *digest, GError *error /* taken */)
{
    EventPost *p = g_new0(EventPost, 1);
    *p = (EventPost){.events = e->o.events, .digest = *digest, .error = error};
    loop_post(e->o.loop, deliver_ended, p);
}

/* ---- waiting and stopping ---- */

static void wake(TrainEngine *e)
{
    pthread_mutex_lock(&e->shared.mutex);
    if (e->shared.wake != NULL) { /* under the lock: the thread may be closing the port */
        link_port_interrupt(e->shared.wake);
    }
    pthread_mutex_unlock(&e->shared.mutex);
}

void train_engine_stop_with(TrainEngine *e, GError *error)
{
    pthread_mutex_lock(&e->shared.mutex);
    if (e->shared.why == NULL) {
        e->shared.why = g_steal_pointer(&error);
    }
    pthread_mutex_unlock(&e->shared.mutex);
    g_clear_error(&error);
    atomic_store(&e->abort, true);
}

void train_engine_rest(TrainEngine *e)
{
    if (link_port_progress(e->port) == 0) {
        link_port_wait(e->port, TRAIN_IDLE_WAIT_US, 0);
    }
}

static TrainGreeting *take_greeting(TrainEngine *e)
{
    pthread_mutex_lock(&e->shared.mutex);
    TrainGreeting *g = g_steal_pointer(&e->shared.greeting);
    pthread_mutex_unlock(&e->shared.mutex);
    return g;
}

/* ---- loading ---- */

static const char *data_name(bool validation)
{
    return validation ? "validation" : "train";
}

/* Ids index the embedding: none may be beyond it. */
static bool check_ids(const TrainEngine *e, bool validation, const Documents *d, GError **error)
{
    const uint32_t vocabulary = e->o.spec->vocab_size;
    for (uint64_t i = 0; i < d->n; i++) {
        if (d->ids[i] >= vocabulary) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "data.%s: token %" G_GUINT64_FORMAT
                        " has id %u, and the model a vocabulary of %u ids; use the model's "
                        "tokenizer, or a larger model.config.vocabulary",
                        data_name(validation), i, d->ids[i], vocabulary);
            return false;
        }
    }
    return true;
}

static TokenData *read_tokens(TrainEngine *e, bool validation, uint64_t n, GError **error)
{
    Documents d = {.n = n, .capacity = n};
    TokenData *data = NULL;
    d.ids = weft_alloc(n, sizeof *d.ids, "the data's tokens", error);
    d.flags = d.ids != NULL ? weft_alloc(n, sizeof *d.flags, "the data's tokens", error) : NULL;
    if (d.flags != NULL && e->o.feed.tokens(e->o.feed.user, validation, 0, n, d.ids, error)) {
        for (uint64_t i = 0; i < n; i++) {
            d.flags[i] = (uint8_t)(d.ids[i] >> TRAIN_ID_BITS);
            d.ids[i] &= (1u << TRAIN_ID_BITS) - 1;
        }
        if (check_ids(e, validation, &d, error)) {
            data = token_data_from(&d, e->o.work.length, e->o.work.packing, error);
            if (data == NULL) {
                g_prefix_error(error, "data.%s: ", data_name(validation));
            }
        }
    }
    weft_free(d.ids);
    weft_free(d.flags);
    return data;
}

/* A batch has each of its samples once. */
static bool check_batch(const TrainEngine *e, GError **error)
{
    const TrainWork *w = &e->o.work;
    const uint64_t n = token_data_windows(e->data);
    if (n < w->sequences) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "data.train: %" G_GUINT64_FORMAT " tokens are %" G_GUINT64_FORMAT
                    " sequences of %u, fewer than a batch of %u; give more text, shorter sequences "
                    "or a smaller batch (batch.sequences)",
                    w->n_tokens, n, w->length, w->sequences);
    }
    return n >= w->sequences;
}

static bool load_data(TrainEngine *e, GError **error)
{
    const TrainWork *w = &e->o.work;
    e->data = read_tokens(e, false, w->n_tokens, error);
    if (e->data == NULL || !check_batch(e, error)) {
        return false;
    }
    e->samples = (TokenSamples){.data = e->data, .seed = w->seed, .bounds = w->bounds};
    e->source = token_samples_source(&e->samples);
    if (w->n_validation_tokens == 0) {
        return true;
    }
    e->validation = read_tokens(e, true, w->n_validation_tokens, error);
    if (e->validation == NULL) {
        return false;
    }
    e->validation_samples =
        (TokenSamples){.data = e->validation, .in_order = true, .bounds = w->bounds};
    e->validation_source = token_samples_source(&e->validation_samples);
    return true;
}

static bool open_port(TrainEngine *e, GError **error)
{
    const LinkPortOptions port = {.fill = e->o.fill,
                                  .receive = train_links_on_message,
                                  .dead = train_links_on_dead,
                                  .user = e,
                                  .crowded = e->o.crowded};
    e->port = link_port_open(&port, error);
    if (e->port != NULL) {
        e->shared.address = link_port_address(e->port);
        e->shared.wake = e->port;
    }
    return e->port != NULL;
}

TrainRankOptions train_work_options(const TrainWork *w, const ModelSpec *spec, const Plan *plan,
                                    uint32_t replica, uint32_t stage, uint32_t rank)
{
    return (TrainRankOptions){.spec = spec,
                              .sequences = w->sequences,
                              .precision = w->precision,
                              .scaling = w->scaling,
                              .skip_nonfinite = w->skip_nonfinite,
                              .leaves = w->leaves,
                              .micro_sequences = w->micro_sequences,
                              .optimizer = w->optimizer,
                              .dropout = {(float)w->dropout, w->seed},
                              .smoothing = w->smoothing,
                              .fast = w->fast,
                              .devices = w->devices,
                              .plan = plan,
                              .replica = replica,
                              .stage = stage,
                              .rank = rank,
                              .whole_optimizer = w->whole_optimizer,
                              .data_bytes = token_data_bytes(w->n_tokens + w->n_validation_tokens),
                              .saves = w->checkpoint_every > 0,
                              .schedule = w->schedule,
                              .recompute = w->recompute};
}

/* Floating-point operations a second of all ranks together: of a core or two, of a small device. */
#define SLOWEST_HOSTS 4e9
#define SLOWEST_DEVICES 4e11
#define LONGEST_WAIT_S 1e9

/* A forward pass has two operations a parameter and token, a step three times as many (Kaplan et
 * al. 2020, arXiv 2001.08361, section 2.1). */
int64_t train_work_wait_us(const TrainWork *w, const ModelSpec *spec)
{
    const double parameters = (double)model_spec_parameters(spec), step = 3.0 * w->sequences,
                 validation = w->validation_every > 0 ? (double)w->validation_sequences : 0,
                 text = w->sample_every > 0 ? (double)w->sample.n_tokens : 0,
                 operations = 2 * parameters * w->length * MAX(step, MAX(validation, text)),
                 seconds = operations / (w->devices ? SLOWEST_DEVICES : SLOWEST_HOSTS);
    return MAX((int64_t)(MIN(seconds, LONGEST_WAIT_S) * 1e6), TRAIN_WAIT_DEADLINE_US);
}

static bool make_rank(TrainEngine *e, Parameters *weights /* taken on success */, GError **error)
{
    TrainRankOptions options =
        train_work_options(&e->o.work, e->o.spec, e->o.plan, e->o.replica, e->o.stage, e->o.rank);
    options.kernels = e->o.kernels;
    options.device = e->o.device;
    options.pool = e->pool;
    options.source = &e->source;
    options.links = e->links;
    e->trace = e->o.work.trace_steps > 0 ? g_array_new(FALSE, FALSE, sizeof(PipelineOpTime)) : NULL;
    options.trace = e->trace;
    e->rank = train_rank_new(&options, weights, error);
    return e->rank != NULL;
}

uint64_t train_engine_resident(void)
{
    g_autofree char *text = NULL; /* statm: pages in all, resident, ... */
    const char *resident =
        g_file_get_contents("/proc/self/statm", &text, NULL, NULL) ? strchr(text, ' ') : NULL;
    return resident != NULL ? g_ascii_strtoull(resident, NULL, 10) * (uint64_t)getpagesize() : 0;
}

/* The TrainRank with its weights; `links` are there. */
static bool build(TrainEngine *e, GError **error)
{
    const TrainWork *w = &e->o.work;
    e->resident_before = train_engine_resident();
    e->pool = pool_new(e->o.threads, e->o.cpus, e->o.cpus != NULL,
                       atomic_load(&e->crowded) ? 0 : TRAIN_SPIN_US);
    if (e->pool == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY, "%u compute threads cannot be had",
                    e->o.threads);
        return false;
    }
    if (e->n_roam > 0 && e->o.cpus != NULL) {
        pool_roam(e->pool, e->roam, e->n_roam);
    }
    e->holding = holding_new(e->o.spec, e->o.plan, e->o.replica, e->o.stage, e->o.rank);
    g_autoptr(Parameters) weights = parameters_new_part(e->holding, false, error);
    if (weights == NULL) {
        return false;
    }
    if (w->from.step == 0 && !w->given) {
        parameters_initialise(weights, w->seed, e->pool);
    }
    if (!make_rank(e, weights, error)) {
        return false;
    }
    weights = NULL;
    if (w->from.step == 0) {
        return !w->given || train_snapshot_read_weights(e->rank, e->o.spec, e->o.feed.floats,
                                                        e->o.feed.user, error);
    }
    return train_snapshot_restore(e->rank, e->o.spec, &w->from, e->o.feed.floats, e->o.feed.user,
                                  error);
}

/* ---- the thread ---- */

static bool run_all(TrainEngine *e, Hash128 *digest, GError **error)
{
    TrainGreeting *greeting = NULL;
    if (!load_data(e, error)) {
        return false;
    }
    post_plain(e, e->o.events.loaded);
    while (!atomic_load(&e->abort) && (greeting = take_greeting(e)) == NULL) {
        train_engine_rest(e);
    }
    const bool greeted = greeting != NULL && train_greeting_run(e, greeting, error);
    train_greeting_free(greeting);
    if (!greeted || !build(e, error) || !train_greeting_built(e, error)) {
        return false;
    }
    post_plain(e, e->o.events.running);
    return train_run(e, digest, error);
}

/* Invariant 3; error is what broke off here, taken. */
static GError *first_reason(TrainEngine *e, GError *error)
{
    pthread_mutex_lock(&e->shared.mutex);
    if (e->shared.why != NULL) {
        g_clear_error(&error);
        error = g_error_copy(e->shared.why);
    }
    pthread_mutex_unlock(&e->shared.mutex);
    if (atomic_load(&e->quit)) {
        const PlanStage *stage = &e->o.plan->replicas[e->o.replica].stages[e->o.stage];
        g_clear_error(&error);
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_CANCELLED, "worker %s left the job",
                            stage->ranks[e->o.rank].worker);
    }
    return error;
}

static void close_all(TrainEngine *e)
{
    pthread_mutex_lock(&e->shared.mutex);
    e->shared.wake = NULL;
    pthread_mutex_unlock(&e->shared.mutex);
    train_rank_free(e->rank);
    g_clear_pointer(&e->trace, g_array_unref);
    train_links_free(e->links);
    link_port_close(e->port);
    pool_free(e->pool);
    holding_free(e->holding);
    token_data_free(e->data);
    token_data_free(e->validation);
}

static gpointer thread_main(gpointer user)
{
    TrainEngine *e = user;
    GError *error = NULL;
    Hash128 digest = {{0}};
    const bool open = open_port(e, &error);
    pthread_mutex_lock(&e->shared.mutex);
    e->shared.open_done = true;
    e->shared.open_error = g_steal_pointer(&error);
    pthread_cond_signal(&e->shared.changed);
    pthread_mutex_unlock(&e->shared.mutex);
    if (open) {
        const bool done = run_all(e, &digest, &error);
        e->ended = true;
        if (!done) {
            error = first_reason(e, error);
            train_greeting_tell(e, error);
        }
        post_ended(e, &digest, error);
        while (!atomic_load(&e->quit)) {
            train_engine_rest(e);
        }
    }
    close_all(e);
    return NULL;
}

/* ---- what the owner asks ---- */

TrainEngine *train_engine_new(const TrainEngineOptions *options, GError **error)
{
    TrainEngine *e = g_new0(TrainEngine, 1);
    e->o = *options;
    e->position = train_position(options->plan, options->replica, options->stage, options->rank);
    e->wait_us = options->wait_deadline_us > 0 ? options->wait_deadline_us
                                               : train_work_wait_us(&options->work, options->spec);
    e->own = train_global(&e->position, options->replica, options->stage, options->rank);
    atomic_init(&e->crowded, options->crowded);
    pthread_mutex_init(&e->shared.mutex, NULL);
    pthread_cond_init(&e->shared.changed, NULL);
    e->thread = g_thread_new("train", thread_main, e);
    pthread_mutex_lock(&e->shared.mutex);
    while (!e->shared.open_done) {
        pthread_cond_wait(&e->shared.changed, &e->shared.mutex);
    }
    GError *failed = g_steal_pointer(&e->shared.open_error);
    pthread_mutex_unlock(&e->shared.mutex);
    if (failed != NULL) {
        g_propagate_error(error, failed);
        train_engine_free(e);
        return NULL;
    }
    return e;
}

void train_engine_free(TrainEngine *e)
{
    if (e == NULL) {
        return;
    }
    atomic_store(&e->quit, true);
    atomic_store(&e->abort, true);
    wake(e);
    g_thread_join(e->thread);
    train_greeting_free(e->shared.greeting);
    g_clear_error(&e->shared.why);
    g_free(e->roam);
    g_clear_pointer(&e->shared.address, g_bytes_unref);
    pthread_mutex_destroy(&e->shared.mutex);
    pthread_cond_destroy(&e->shared.changed);
    g_free(e);
}

GBytes *train_engine_address(TrainEngine *e)
{
    return g_bytes_ref(e->shared.address);
}

void train_engine_set_crowded(TrainEngine *e)
{
    atomic_store(&e->crowded, true);
}

void train_engine_set_roam(TrainEngine *e, const uint32_t *cpus, uint32_t n_cpus)
{
    g_free(e->roam);
    e->roam = g_memdup2(cpus, n_cpus * sizeof *cpus);
    e->n_roam = n_cpus;
}

void train_engine_start(TrainEngine *e, const uint8_t secret[32], const uint8_t own_boot_id[16],
                        bool seal, const TrainPeer *peers, uint32_t n_peers)
{
    TrainGreeting *g = g_new0(TrainGreeting, 1);
    memcpy(g->secret, secret, sizeof g->secret);
    memcpy(g->boot_id, own_boot_id, sizeof g->boot_id);
    g->seal = seal;
    g->n_peers = n_peers;
    g->peers = g_memdup2(peers, sizeof *peers * n_peers);
    g->workers = g_new0(char *, n_peers);
    for (uint32_t i = 0; i < n_peers; i++) {
        g_bytes_ref(g->peers[i].address);
        g->workers[i] = g_strdup(peers[i].worker);
        g->peers[i].worker = g->workers[i];
    }
    pthread_mutex_lock(&e->shared.mutex);
    TrainGreeting *old = e->shared.greeting;
    e->shared.greeting = g;
    pthread_mutex_unlock(&e->shared.mutex);
    train_greeting_free(old);
    wake(e);
}

void train_engine_abort(TrainEngine *e, const GError *why)
{
    train_engine_stop_with(e, g_error_copy(why));
    wake(e);
}

void train_engine_taken(TrainEngine *e)
{
    atomic_store(&e->snapshot_out, false);
    wake(e);
}
