/* Problem: clients expect a model to be there before they ask, and to come back by itself.
 *
 *           model opened         lease ready
 *   OPENING ────────────▶ LOADING ──────────▶ READY
 *      │ cannot be          │ ▲ ▲               │
 *      ▼                    │ │ └─ interrupted ─┘
 *    FAILED ◀── for good ───┤ └─ a pause ─┐
 *                           └─ failed ▶ WAITING
 *
 * 1. A lease is held in LOADING and READY; it keeps the deployment from being given up for another.
 * 2. WAITING has a timer and nothing else; the pause grows to a bound. Where no file has the
 * model's bytes any more, the next try begins with OPENING: it is served as it is then. */
#include "coordinator/gateway/openai/served.h"

#include "coordinator/gateway/openai/key_shares.h"
#include "proto/base/error.h"
#include "proto/plan/plan_context.h"

#include <string.h>

#define NAME_LIMIT 128u
#define RETRY_LEAST_US (INT64_C(200) * 1000)
#define RETRY_MOST_US (INT64_C(5000) * 1000)

typedef enum ServedState {
    SERVED_OPENING,
    SERVED_LOADING,
    SERVED_READY,
    SERVED_WAITING,
    SERVED_FAILED,
} ServedState;

struct ServedBook {
    Loop *loop;
    Log *log;
    Models *models;
    Jobs *jobs;
    GPtrArray *all; /* of Served, not owned: they are their owners' */
};

struct Served {
    ServedBook *book; /* NULL: removed while the model is being opened */
    char *name, *asked;
    JobWish wish;
    ServedCallbacks callbacks;
    void *user;
    ServedState state;
    bool opening, was_ready, patient;
    uint64_t queue, n_slots; /* n_slots: of the plan that it was last ready with */
    KeyShares *open;         /* sequences */
    Model *model;
    Lease *lease;
    LoopTimer *retry;
    int64_t pause_us, since_s;
    char *problem;
};

ServedBook *served_book_new(Loop *loop, Log *log, Models *models, Jobs *jobs)
{
    ServedBook *book = g_new0(ServedBook, 1);
    book->loop = loop;
    book->log = log;
    book->models = models;
    book->jobs = jobs;
    book->all = g_ptr_array_new();
    return book;
}

static void served_free(Served *s)
{
    model_unref(s->model);
    g_free(s->name);
    g_free(s->asked);
    key_shares_free(s->open);
    g_free(s->problem);
    g_free(s);
}

static void served_give_up(Served *s)
{
    loop_timer_cancel(s->book->loop, s->retry);
    s->retry = NULL;
    if (s->lease != NULL) {
        lease_release(g_steal_pointer(&s->lease));
    }
    g_ptr_array_remove(s->book->all, s);
}

void served_remove(Served *s)
{
    served_give_up(s);
    s->book = NULL;
    if (!s->opening) {
        served_free(s);
    }
}

void served_book_free(ServedBook *book)
{
    if (book == NULL) {
        return;
    }
    while (book->all->len > 0) {
        Served *s = g_ptr_array_index(book->all, 0);
        s->opening = false; /* models are freed before the loop runs again */
        served_remove(s);
    }
    g_ptr_array_unref(book->all);
    g_free(book);
}

/* ---- the lease ---- */

static void served_acquire(Served *s);
static void served_open(Served *s);

static void on_retry(void *user)
{
    Served *s = user;
    s->retry = NULL;
    if (models_by_hash(s->book->models, s->model->spec->file_hash.bytes, NULL) != NULL) {
        served_acquire(s);
    } else {
        served_open(s);
    }
}

static void set_problem(Served *s, const char *text)
{
    g_free(s->problem);
    s->problem = g_strdup(text);
}

/* Trying again mends what workers and hosts can mend, not what is wrong with the wish. */
static bool is_final(const Served *s, const GError *error)
{
    bool may_come = s->patient && !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID);
    return !s->was_ready && !may_come && weft_error_group(error) == WEFT_GROUP_REQUEST;
}

static void on_failed(const GError *error, void *user)
{
    Served *s = user;
    g_autoptr(GError) own = g_error_copy(error);
    bool final = is_final(s, own);
    log_warn(s->book->log, "model %s is not ready: %s", s->name, own->message);
    set_problem(s, own->message);
    if (s->lease != NULL) {
        lease_release(g_steal_pointer(&s->lease));
    }
    s->state = final ? SERVED_FAILED : SERVED_WAITING;
    if (!final) {
        s->retry = loop_timer_start(s->book->loop, s->pause_us, on_retry, s);
        s->pause_us = MIN(s->pause_us * 2, RETRY_MOST_US);
    }
    s->callbacks.waiting(own, final, s->user);
}

/* Its replica's epoch is over: the lease waits for the next one. */
static bool on_interrupted(const GError *why, void *user, uint64_t *n_tokens)
{
    Served *s = user;
    *n_tokens = 0;
    s->state = SERVED_LOADING;
    set_problem(s, why->message);
    s->callbacks.waiting(why, false, s->user);
    return true;
}

static void on_ready(const LeaseInfo *info, void *user)
{
    Served *s = user;
    s->state = SERVED_READY;
    s->was_ready = true;
    s->n_slots = (uint64_t)info->plan->streams * info->plan->n_replicas;
    s->pause_us = RETRY_LEAST_US;
    set_problem(s, NULL);
    log_info(s->book->log, "model %s is ready: job %s epoch %" G_GUINT64_FORMAT, s->name, info->job,
             info->epoch);
    s->callbacks.ready(s->user);
}

static void on_progress(const char *text, double fraction, const char *worker, void *user)
{
    Served *s = user;
    s->callbacks.progress(text, fraction, worker, s->user);
}

static void served_acquire(Served *s)
{
    LeaseCallbacks callbacks = {.progress = on_progress,
                                .ready = on_ready,
                                .interrupted = on_interrupted,
                                .failed = on_failed,
                                .stands = true};
    s->state = SERVED_LOADING;
    s->lease = jobs_acquire(s->book->jobs, s->model, &s->wish, callbacks, s);
}

static void on_opened(Model *model, const GError *error, void *user)
{
    Served *s = user;
    s->opening = false;
    if (s->book == NULL) {
        served_free(s);
        return;
    }
    if (error != NULL && s->model != NULL) {
        on_failed(error, s); /* the file may come back */
        return;
    }
    if (error != NULL) {
        s->state = SERVED_FAILED;
        set_problem(s, error->message);
        s->callbacks.waiting(error, true, s->user);
        return;
    }
    model_unref(s->model);
    s->model = model_ref(model);
    served_acquire(s);
}

static void served_open(Served *s)
{
    s->state = SERVED_OPENING;
    s->opening = true;
    models_open(s->book->models, s->asked, on_opened, s);
}

/* ---- making ---- */

/* "dir/Model.Q4_1.gguf" -> "Model.Q4_1" */
static char *name_of_file(const char *model)
{
    char *base = g_path_get_basename(model);
    if (g_str_has_suffix(base, ".gguf")) {
        base[strlen(base) - strlen(".gguf")] = '\0';
    }
    return base;
}

static bool check_name(const ServedBook *book, const char *name, GError **error)
{
    size_t length = strlen(name);
    bool usable = length > 0 && length <= NAME_LIMIT && g_utf8_validate(name, -1, NULL);
    for (const char *c = name; *c != '\0'; c++) {
        usable = usable && (unsigned char)*c > ' ' && *c != 0x7f;
    }
    if (!usable || served_find(book, name) != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    usable ? "a model named %s is served already: give another --name"
                           : "model name '%s' is unusable: 1 to 128 bytes without blanks",
                    name);
        return false;
    }
    return true;
}

Served *served_add(ServedBook *book, const char *model, const char *name, const JobWish *wish,
                   ServedCallbacks callbacks, void *user, GError **error)
{
    g_autofree char *chosen =
        name != NULL && name[0] != '\0' ? g_strdup(name) : name_of_file(model);
    if (!check_name(book, chosen, error)) {
        return NULL;
    }
    Served *s = g_new0(Served, 1);
    s->book = book;
    s->name = g_steal_pointer(&chosen);
    s->asked = g_strdup(model);
    s->wish = *wish;
    s->callbacks = callbacks;
    s->user = user;
    s->pause_us = RETRY_LEAST_US;
    s->since_s = loop_wall_us(book->loop) / G_USEC_PER_SEC;
    s->problem = g_strdup("it is being opened");
    s->open = key_shares_new();
    g_ptr_array_add(book->all, s);
    served_open(s);
    return s;
}

/* ---- reading ---- */

Served *served_find(const ServedBook *book, const char *name)
{
    for (guint i = 0; i < book->all->len; i++) {
        Served *s = g_ptr_array_index(book->all, i);
        if (strcmp(s->name, name) == 0) {
            return s;
        }
    }
    return NULL;
}

Served *served_only(const ServedBook *book)
{
    return book->all->len == 1 ? g_ptr_array_index(book->all, 0) : NULL;
}

unsigned served_count(const ServedBook *book)
{
    return book->all->len;
}

void served_each(const ServedBook *book, void (*fn)(const Served *served, void *user), void *user)
{
    for (guint i = 0; i < book->all->len; i++) {
        fn(g_ptr_array_index(book->all, i), user);
    }
}

const char *served_name(const Served *s)
{
    return s->name;
}

const char *served_path(const Served *s)
{
    return s->model != NULL ? s->model->path : NULL;
}

const char *served_job(const Served *s)
{
    return s->lease != NULL ? lease_job(s->lease) : NULL;
}

const JobWish *served_wish(const Served *s)
{
    return &s->wish;
}

Model *served_model(const Served *s)
{
    return s->model;
}

uint32_t served_context(const Served *s)
{
    return s->model != NULL ? plan_context(s->model->spec, s->wish.context) : s->wish.context;
}

bool served_is_ready(const Served *s)
{
    return s->state == SERVED_READY;
}

void served_set_patient(Served *s)
{
    s->patient = true;
}

void served_set_queue(Served *s, uint64_t queue)
{
    s->queue = queue;
}

bool served_open_sequences(Served *s, const char *key, unsigned n)
{
    return key_shares_open(s->open, key, n, s->queue != 0 ? s->n_slots + s->queue : UINT64_MAX);
}

void served_close_sequences(Served *s, const char *key, unsigned n)
{
    key_shares_close(s->open, key, n);
}

const char *served_state_text(const Served *s)
{
    static const char *const texts[] = {"opening", "loading", "ready", "waiting", "failed"};
    return texts[s->state];
}

const char *served_problem(const Served *s)
{
    return s->problem != NULL ? s->problem : "its shards are being loaded";
}

int64_t served_since_s(const Served *s)
{
    return s->since_s;
}
