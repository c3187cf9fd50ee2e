/* The workers' side of the watch: what is admitted by which stamp, fences, what is left behind. */
#include "tests/sim/bugs.h"
#include "tests/sim/watch.h"

#include "worker/agent/attach.h"
#include "worker/agent/deployment.h"
#include "worker/agent/leader_service.h"
#include "worker/serve/executor.h"
#include "worker/serve/page_pool.h"

#include <string.h>

#define CANCEL_US (WHOLE_SECOND / 2) /* two messages and a step */
#define FENCE_SLACK_US (WHOLE_SECOND / 2)
#define WORD_UNDER_WAY_US (WHOLE_SECOND / 10) /* three of the longest jitter */

/* What is known of one worker's process. */
typedef struct Process {
    int64_t word_us; /* the coordinator was heard last */
    uint64_t generation;
    GHashTable *newest; /* "job/replica" -> uint64_t, by Loads and Drops that came */
} Process;

typedef struct LoadSeen {
    uint64_t epoch, generation;
} LoadSeen;

/* A request of an engine, between the leader service and the engine. */
typedef struct Submission {
    EngineTokenFn fn;
    void *user;
    char *request;
    unsigned worker;
    uint32_t replica;
    uint64_t epoch;
} Submission;

static struct {
    GHashTable *processes;                     /* SimNode -> Process */
    GHashTable *generations;                   /* generation -> incarnation that said it */
    GHashTable *loads;                         /* "job/replica" -> LoadSeen */
    const Weft__V1__GenerateRequest *generate; /* being handled */
    GPtrArray *receivers;                      /* of a bug */
} now;

void __wrap_deployments_load(Deployments *table, RpcCall *call,
                             const Weft__V1__LoadRequest *request);
void __real_deployments_load(Deployments *table, RpcCall *call,
                             const Weft__V1__LoadRequest *request);
void __wrap_deployments_drop(Deployments *table, RpcCall *call,
                             const Weft__V1__DropRequest *request);
void __real_deployments_drop(Deployments *table, RpcCall *call,
                             const Weft__V1__DropRequest *request);
void __wrap_deployments_fence(Deployments *table, int64_t silent_us);
void __real_deployments_fence(Deployments *table, int64_t silent_us);
void __wrap_deployments_keep(Deployments *table, Weft__V1__Keep *const *keep, size_t n_keep,
                             uint64_t sequence);
void __real_deployments_keep(Deployments *table, Weft__V1__Keep *const *keep, size_t n_keep,
                             uint64_t sequence);
void __wrap_deployments_set_generation(Deployments *table, const char *cluster,
                                       uint64_t generation);
void __real_deployments_set_generation(Deployments *table, const char *cluster,
                                       uint64_t generation);
void __wrap_leader_service_generate(LeaderService *service, RpcCall *call,
                                    const Weft__V1__GenerateRequest *request);
void __real_leader_service_generate(LeaderService *service, RpcCall *call,
                                    const Weft__V1__GenerateRequest *request);
uint64_t __wrap_deployment_submit(Deployment *d, const EngineRequest *request, EngineTokenFn fn,
                                  void *user);
uint64_t __real_deployment_submit(Deployment *d, const EngineRequest *request, EngineTokenFn fn,
                                  void *user);
void __wrap_deployment_cancel(Deployment *d, uint64_t engine_request);
void __real_deployment_cancel(Deployment *d, uint64_t engine_request);
Executor *__wrap_executor_new(const ExecutorOptions *options);
Executor *__real_executor_new(const ExecutorOptions *options);
uint32_t __wrap_page_pool_take(PagePool *pool, bool *was_kept);
uint32_t __real_page_pool_take(PagePool *pool, bool *was_kept);
LinkPort *__wrap_link_port_open(const LinkPortOptions *options, GError **error);
LinkPort *__real_link_port_open(const LinkPortOptions *options, GError **error);

/* ---- processes ------------------------------------------------------------------------------- */

static void process_free(void *data)
{
    Process *p = data;
    g_hash_table_unref(p->newest);
    g_free(p);
}

static int64_t now_us(void)
{
    return sim_world_now_us(watch_history()->whole->world);
}

static const WholeWorker *worker_of(const Deployments *table)
{
    return &watch_history()->whole->workers[table->o.name[1] - '0'];
}

static Process *process_of(Deployments *table)
{
    SimNode *node = worker_of(table)->node;
    Process *p = g_hash_table_lookup(now.processes, node);
    if (!p) {
        p = g_new0(Process, 1);
        p->newest = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
        g_hash_table_insert(now.processes, node, p);
    }
    return p;
}

static bool is_watched(const Deployments *table)
{
    return watch_history() && !worker_of(table)->dying;
}

static uint64_t number(GHashTable *table, const char *key)
{
    const uint64_t *value = g_hash_table_lookup(table, key);
    return value ? *value : 0;
}

static void set_number(GHashTable *table, const char *key, uint64_t value)
{
    g_hash_table_replace(table, g_strdup(key), g_memdup2(&value, sizeof value));
}

/* ---- stamps ---------------------------------------------------------------------------------- */

static char *replica_key(const Weft__V1__Stamp *stamp)
{
    return g_strdup_printf("%s/%u", stamp->job, stamp->replica);
}

static bool is_old(Deployments *table, const Weft__V1__Stamp *stamp)
{
    const Process *p = process_of(table);
    g_autofree char *key = replica_key(stamp);
    return stamp->generation != p->generation || stamp->epoch < number(p->newest, key);
}

static void saw_epoch(Deployments *table, const Weft__V1__Stamp *stamp)
{
    Process *p = process_of(table);
    g_autofree char *key = replica_key(stamp);
    if (stamp->generation == p->generation && stamp->epoch > number(p->newest, key)) {
        set_number(p->newest, key, stamp->epoch);
    }
}

/* A coordinator's epochs are higher than all of those before it, and never come again. */
static void check_first_load(const Weft__V1__Stamp *stamp)
{
    g_autofree char *key = replica_key(stamp);
    const LoadSeen *seen = g_hash_table_lookup(now.loads, key);
    if (seen && seen->generation < stamp->generation && seen->epoch >= stamp->epoch) {
        history_violate(watch_history(), "an epoch is used once",
                        "job %s replica %u epoch %" G_GUINT64_FORMAT
                        " is loaded under generation %" G_GUINT64_FORMAT
                        ", epoch %" G_GUINT64_FORMAT " was under %" G_GUINT64_FORMAT,
                        stamp->job, stamp->replica, stamp->epoch, stamp->generation, seen->epoch,
                        seen->generation);
    }
    if (!seen || seen->epoch < stamp->epoch) {
        const LoadSeen newest = {stamp->epoch, stamp->generation};
        g_hash_table_replace(now.loads, g_steal_pointer(&key), g_memdup2(&newest, sizeof newest));
    }
}

static void check_drained(Deployments *table, const Weft__V1__Stamp *stamp)
{
    History *h = watch_history();
    const WholeWorker *worker = worker_of(table);
    const int64_t taken_us = watch_epoch_us(stamp->job, stamp->replica, stamp->epoch);
    if (worker->draining && taken_us > worker->drained_us) {
        history_violate(h, "a draining worker gets no new work",
                        "w%u drains since %.4f s, and job %s replica %u epoch %" G_GUINT64_FORMAT
                        " of %.4f s is loaded there",
                        worker->index, (double)worker->drained_us / 1e6, stamp->job, stamp->replica,
                        stamp->epoch, (double)taken_us / 1e6);
    }
}

void __wrap_deployments_load(Deployments *table, RpcCall *call,
                             const Weft__V1__LoadRequest *request)
{
    const Weft__V1__Stamp *stamp = request->stamp;
    const bool watched = is_watched(table), old = watched && is_old(table, stamp);
    if (watched) { /* also when it will be refused: it should not have been asked */
        check_first_load(stamp);
    }
    if (watched && !old) {
        check_drained(table, stamp);
        saw_epoch(table, stamp);
    }
    const bool before = deployments_find(table, stamp->job, stamp->replica, stamp->epoch) != NULL;
    __real_deployments_load(table, call, request);
    if (old && !before && deployments_find(table, stamp->job, stamp->replica, stamp->epoch)) {
        history_violate(watch_history(), "nothing of an old epoch has an effect",
                        "%s loads job %s replica %u epoch %" G_GUINT64_FORMAT
                        ", which is over, on request",
                        table->o.name, stamp->job, stamp->replica, stamp->epoch);
    }
}

void __wrap_deployments_drop(Deployments *table, RpcCall *call,
                             const Weft__V1__DropRequest *request)
{
    const Weft__V1__Stamp *stamp = request->stamp;
    if (!is_watched(table)) {
        __real_deployments_drop(table, call, request);
        return;
    }
    g_autofree char *key = replica_key(stamp);
    const bool old = is_old(table, stamp);
    const uint64_t newest = number(process_of(table)->newest, key);
    const bool before = deployments_find(table, stamp->job, stamp->replica, newest) != NULL;
    saw_epoch(table, stamp);
    Weft__V1__Stamp other = *stamp;
    Weft__V1__DropRequest mutant = *request;
    mutant.stamp = &other;
    if (bug_is(BUG_OLD_DROP_OBEYED)) {
        other.epoch = MAX(other.epoch, newest);
    }
    __real_deployments_drop(table, call, &mutant);
    if (old && before && !deployments_find(table, stamp->job, stamp->replica, newest)) {
        history_violate(watch_history(), "nothing of an old epoch has an effect",
                        "%s drops job %s replica %u epoch %" G_GUINT64_FORMAT
                        " because of a call for epoch %" G_GUINT64_FORMAT,
                        table->o.name, stamp->job, stamp->replica, newest, stamp->epoch);
    }
}

/* ---- the fence ------------------------------------------------------------------------------- */

void __wrap_deployments_set_generation(Deployments *table, const char *cluster, uint64_t generation)
{
    if (is_watched(table)) {
        History *h = watch_history();
        Process *p = process_of(table);
        const uint64_t incarnation = h->whole->n_incarnations;
        g_autofree char *key = g_strdup_printf("%" G_GUINT64_FORMAT, generation);
        const uint64_t first = number(now.generations, key);
        p->word_us = now_us();
        p->generation = generation;
        /* what the one before said may still be under way */
        const bool late =
            first + 1 == incarnation && now_us() - h->whole->coordinator_up_us < WORD_UNDER_WAY_US;
        if (first != 0 && first != incarnation && !late) {
            history_violate(h, "a generation is one coordinator's",
                            "coordinator %" G_GUINT64_FORMAT " speaks as generation %s, as "
                            "coordinator %" G_GUINT64_FORMAT " did",
                            incarnation, key, first);
        }
        if (!late) {
            set_number(now.generations, key, incarnation);
        }
    }
    __real_deployments_set_generation(table, cluster, generation);
}

void __wrap_deployments_keep(Deployments *table, Weft__V1__Keep *const *keep, size_t n_keep,
                             uint64_t sequence)
{
    if (is_watched(table)) {
        process_of(table)->word_us = now_us();
    }
    if (!bug_is(BUG_KEEP_LIST_IGNORED)) {
        __real_deployments_keep(table, keep, n_keep, sequence);
    }
}

void __wrap_deployments_fence(Deployments *table, int64_t silent_us)
{
    if (!bug_is(BUG_FENCE_IGNORED)) {
        __real_deployments_fence(table, silent_us);
    }
}

/* How long it has had no word from the coordinator, beyond what the fence allows. */
static int64_t beyond_fence_us(Deployments *table)
{
    const WholeWorker *worker = worker_of(table);
    const Process *p = process_of(table);
    const int64_t silent = now_us() - p->word_us - ATTACH_FENCE_US - FENCE_SLACK_US;
    return p->word_us == 0 || worker->frozen || now_us() - worker->thawed_us < FENCE_SLACK_US
               ? 0
               : silent;
}

static void check_fenced(History *h, Deployments *table)
{
    const int64_t beyond = beyond_fence_us(table);
    for (guint i = 0; beyond > 0 && i < table->all->len; i++) {
        const Deployment *d = g_ptr_array_index(table->all, i);
        if (d->state != DEPLOY_CLOSING && d->state != DEPLOY_FAILED && d->engine) {
            history_violate(h, "a worker without a coordinator stops",
                            "%s has had no word for %.1f s and runs job %s replica %u epoch "
                            "%" G_GUINT64_FORMAT,
                            table->o.name,
                            (double)(beyond + ATTACH_FENCE_US + FENCE_SLACK_US) / 1e6, d->job,
                            d->replica, d->epoch);
        }
    }
}

/* ---- requests -------------------------------------------------------------------------------- */

void __wrap_leader_service_generate(LeaderService *service, RpcCall *call,
                                    const Weft__V1__GenerateRequest *request)
{
    now.generate = request;
    __real_leader_service_generate(service, call, request);
    now.generate = NULL;
}

static void check_submission(Deployment *d, const Weft__V1__GenerateRequest *generate)
{
    const Weft__V1__Stamp *stamp = generate->stamp;
    if (stamp->epoch != d->epoch || stamp->generation != d->table->generation ||
        stamp->replica != d->replica || strcmp(stamp->job, d->job) != 0) {
        history_violate(watch_history(), "nothing of an old epoch has an effect",
                        "%s runs request %s of epoch %" G_GUINT64_FORMAT
                        " generation %" G_GUINT64_FORMAT " under epoch %" G_GUINT64_FORMAT
                        " generation %" G_GUINT64_FORMAT,
                        d->table->o.name, generate->request, stamp->epoch, stamp->generation,
                        d->epoch, d->table->generation);
    }
}

/* The gateway ended the call, both were connected all the while, and it still computes. */
static void check_cancelled(const Submission *s)
{
    History *h = watch_history();
    const int64_t over_us = watch_call_over_us(s->request, s->replica, s->epoch);
    const Whole *w = h->whole;
    const bool connected = w->coordinator && !w->coordinator_frozen &&
                           w->workers[s->worker].link == RPC_INPROC_UP &&
                           w->last_fault_us < over_us - CANCEL_US;
    if (over_us != 0 && connected && now_us() - over_us > CANCEL_US) {
        history_violate(h, "a cancelled request stops",
                        "w%u computes a token of request %s, whose call ended %.3f s ago",
                        s->worker, s->request, (double)(now_us() - over_us) / 1e6);
    }
}

static void on_token(const EngineToken *token, void *user)
{
    Submission *s = user;
    if (!token->done && watch_history()) {
        check_cancelled(s);
    }
    const bool done = token->done;
    s->fn(token, s->user);
    if (done) {
        g_free(s->request);
        g_free(s);
    }
}

uint64_t __wrap_deployment_submit(Deployment *d, const EngineRequest *request, EngineTokenFn fn,
                                  void *user)
{
    if (!now.generate || !is_watched(d->table)) {
        return __real_deployment_submit(d, request, fn, user);
    }
    check_submission(d, now.generate);
    Submission *s = g_new0(Submission, 1);
    *s = (Submission){.fn = fn,
                      .user = user,
                      .request = watch_sequence(now.generate),
                      .worker = worker_of(d->table)->index,
                      .replica = d->replica,
                      .epoch = d->epoch};
    return __real_deployment_submit(d, request, on_token, s);
}

void __wrap_deployment_cancel(Deployment *d, uint64_t engine_request)
{
    if (!bug_is(BUG_CANCEL_LOST)) {
        __real_deployment_cancel(d, engine_request);
    }
}

/* ---- bugs below the agent -------------------------------------------------------------------- */

Executor *__wrap_executor_new(const ExecutorOptions *options)
{
    ExecutorOptions own = *options;
    if (bug_is(BUG_WAIT_WITHOUT_END)) {
        own.deadline_us = 3600 * WHOLE_SECOND;
    }
    return __real_executor_new(&own);
}

uint32_t __wrap_page_pool_take(PagePool *pool, bool *was_kept)
{
    static uint32_t last;
    const uint32_t page = __real_page_pool_take(pool, was_kept), before = last;
    last = page;
    if (before != page && before < pool->n_pages && pool->references[before] > 0 &&
        bug_strikes(BUG_PAGE_GIVEN_TWICE, 2)) {
        pool->references[before]++;
        return before;
    }
    return page;
}

typedef struct TwiceReceiver {
    LinkReceive receive;
    LinkDead dead;
    void *user;
} TwiceReceiver;

static void receive_twice(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    const TwiceReceiver *r = user;
    r->receive(link, header, payload, r->user);
    if (bug_strikes(BUG_DATAGRAM_DELIVERED_TWICE, 50)) {
        r->receive(link, header, payload, r->user);
    }
}

static void dead_once(Link *link, const char *why, void *user)
{
    const TwiceReceiver *r = user;
    r->dead(link, why, r->user);
}

LinkPort *__wrap_link_port_open(const LinkPortOptions *options, GError **error)
{
    if (!bug_is(BUG_DATAGRAM_DELIVERED_TWICE) || !watch_history()) {
        return __real_link_port_open(options, error);
    }
    TwiceReceiver *r = g_new(TwiceReceiver, 1);
    *r = (TwiceReceiver){options->receive, options->dead, options->user};
    g_ptr_array_add(now.receivers, r);
    LinkPortOptions own = *options;
    own.receive = receive_twice;
    own.dead = dead_once;
    own.user = r;
    return __real_link_port_open(&own, error);
}

/* ---- any time, and quiet --------------------------------------------------------------------- */

static void each_worker(History *h, void (*fn)(History *h, Deployments *table))
{
    for (unsigned i = 0; i < h->whole->n_workers; i++) {
        WholeWorker *worker = &h->whole->workers[i];
        if (worker->agent && !worker->dying) {
            fn(h, agent_deployments(worker->agent));
        }
    }
}

void watch_worker_look(History *h)
{
    each_worker(h, check_fenced);
}

static void check_quiet(History *h, Deployments *table)
{
    for (guint i = 0; i < table->all->len; i++) {
        const Deployment *d = g_ptr_array_index(table->all, i);
        if (d->state == DEPLOY_CLOSING) {
            continue;
        }
        if (!watch_is_live(d->job, d->replica, d->epoch)) {
            history_violate(h, "nothing is held for what is over",
                            "%s holds job %s replica %u epoch %" G_GUINT64_FORMAT
                            " (%s), of which the coordinator knows nothing",
                            table->o.name, d->job, d->replica, d->epoch,
                            deployment_state_name(d->state));
        }
        unsigned n_open = 0;
        for (guint k = 0; k < d->watches->len; k++) {
            n_open += g_array_index(d->watches, EndWatch, k).ended != NULL;
        }
        if (n_open > 0 || d->load_calls->len > 0 || d->start_calls->len > 0) {
            history_violate(h, "no request is forgotten",
                            "%s has %u generations, %u loads and %u starts open in job %s epoch "
                            "%" G_GUINT64_FORMAT ", and nobody waits for them",
                            table->o.name, n_open, d->load_calls->len, d->start_calls->len, d->job,
                            d->epoch);
        }
    }
}

void watch_worker_quiet(History *h)
{
    each_worker(h, check_quiet);
}

void watch_worker_begin(void)
{
    g_clear_pointer(&now.receivers, g_ptr_array_unref); /* the last world's ports are gone */
    now.receivers = g_ptr_array_new_with_free_func(g_free);
    now.processes = g_hash_table_new_full(NULL, NULL, NULL, process_free);
    now.generations = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    now.loads = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
}

void watch_worker_end(void)
{
    g_clear_pointer(&now.processes, g_hash_table_unref);
    g_clear_pointer(&now.generations, g_hash_table_unref);
    g_clear_pointer(&now.loads, g_hash_table_unref);
}
