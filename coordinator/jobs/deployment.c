/* Problem: to bring one plan into force on many workers, any of which may die at any step, so that
 * no two attempts are ever mixed up.
 *
 *                asked            durable          all loaded         all started
 *   IDLE, FAILED ─────▶ PLANNING ───────▶ LOADING ───────────▶ STARTING ──────────▶ READY
 *     ▲   ▲                │ impossible      │ a rank failed      │                 │
 *     │   └────────────────┴─────────────────┴────────────────────┘ deployment_fail │
 *     └─────────────────────────────────────────────────────────────────────────────┘
 *           last replica's epoch ended, or a member drains and its work can be had elsewhere
 *           LOADING and STARTING, too: a member drains
 *
 *   STORED (the coordinator was started again)
 *     ├── every rank is held, ready, under the same epoch ──▶ READY
 *     └── asked, and workers had time to come back ──▶ PLANNING
 *   any ── unload ──▶ STOPPED
 *
 * 1. An epoch is durable before a worker hears of it, and used by one attempt only.
 * 2. live: workers may hold the replica under its epoch. Once it ended, live is false for ever
 * under that epoch; the next attempt has a higher one.
 * 3. READY => at least one replica is live. A request is on a replica that was ready when it was
 * given out.
 * 4. n_pending counts exactly the ranks of LOADING or STARTING that have not answered; no rank call
 * is in flight in other states.
 * 5. The epoch's secret is made in start and erased in start: it is in no state, row or log line.
 * 6. Only deployment_pump() begins planning, adopts or gives out replicas; deployment_enter() alone
 * changes the state.
 * 7. The end of an epoch fails no lease: those on it wait again, before all others, in their old
 * order (recovery.c has how long).
 * 8. A draining member is left as soon as can be: by a plan without it; where there is none, each
 * of its replicas ends when it is idle, and at once when another replica can go on with what is on
 * it. The others serve meanwhile. Only requests that no one else could take hold a member, not a
 * lease that only stands. */
#include "coordinator/jobs/deployment.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/plan/cpu_share.h"
#include "transport/crypto/keys.h"

#include <string.h>

#define SETTLE_US (INT64_C(3) * 1000000)
#define VERDICT_US (INT64_C(700) * 1000)
#define ATTEMPTS_LIMIT 3u

void deployment_enter(Deployment *d, DeploymentState state)
{
    if (state != d->state) {
        d->entered_us = loop_now_us(d->jobs->options.loop);
    }
    d->state = state;
    jobs_settle_members(d->jobs);
}

const char *deployment_state_text(const Deployment *d)
{
    switch (d->state) {
    case DEPLOYMENT_STORED:
        return "replanning";
    case DEPLOYMENT_IDLE:
    case DEPLOYMENT_PLANNING:
        return d->planned_before ? "replanning" : "planning";
    case DEPLOYMENT_LOADING:
    case DEPLOYMENT_STARTING:
        return "loading";
    case DEPLOYMENT_READY:
        return "ready";
    case DEPLOYMENT_FAILED:
        return "failed";
    case DEPLOYMENT_STOPPED:
        break;
    }
    return "stopped";
}

/* ---- layout ---- */

void deployment_clear_replicas(Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        ReplicaState *replica = &d->replicas[r];
        loop_timer_cancel(d->jobs->options.loop, replica->verdict);
        g_clear_error(&replica->suspicion);
        for (uint32_t k = 0; k < replica->n_ranks; k++) {
            rank_forget_call(&replica->ranks[k]);
            g_clear_pointer(&replica->ranks[k].data_address, g_bytes_unref);
        }
        g_free(replica->ranks);
    }
    g_clear_pointer(&d->replicas, g_free);
    d->n_replicas = 0;
}

static void replica_lay_out(Deployment *d, uint32_t index)
{
    const PlanReplica *plan = &d->plan->replicas[index];
    ReplicaState *replica = &d->replicas[index];
    replica->deployment = d;
    replica->index = index;
    for (uint32_t s = 0; s < plan->n_stages; s++) {
        replica->n_ranks += plan->stages[s].n_ranks;
    }
    replica->ranks = g_new0(RankState, replica->n_ranks);
    RankState *rank = replica->ranks;
    for (uint32_t s = 0; s < plan->n_stages; s++) {
        for (uint32_t k = 0; k < plan->stages[s].n_ranks; k++, rank++) {
            *rank = (RankState){.deployment = d,
                                .replica = index,
                                .stage = s,
                                .rank = k,
                                .worker = plan->stages[s].ranks[k].worker};
        }
    }
}

void deployment_lay_out(Deployment *d)
{
    deployment_clear_replicas(d);
    d->n_replicas = d->plan->n_replicas;
    d->replicas = g_new0(ReplicaState, d->n_replicas);
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        replica_lay_out(d, r);
    }
}

Deployment *deployment_new(Jobs *jobs, const char *id)
{
    Deployment *d = g_new0(Deployment, 1);
    d->jobs = jobs;
    d->id = g_strdup(id);
    d->state = DEPLOYMENT_IDLE;
    d->created_us = loop_now_us(jobs->options.loop);
    d->used_us = d->created_us;
    d->entered_us = d->created_us;
    g_queue_init(&d->waiting);
    g_queue_init(&d->active);
    return d;
}

void deployment_free(Deployment *d)
{
    deployment_forget_planning(d);
    loop_timer_cancel(d->jobs->options.loop, d->settle);
    loop_timer_cancel(d->jobs->options.loop, d->kick);
    recovery_clear(d);
    deployment_clear_replicas(d);
    affinity_free(d->affinity);
    if (d->plan != NULL) {
        plan_free(d->plan);
    }
    model_unref(d->model);
    g_clear_error(&d->error);
    g_free(d->model_path);
    g_free(d->id);
    g_free(d);
}

bool deployment_uses(const Deployment *d, const char *worker)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            if (strcmp(d->replicas[r].ranks[k].worker, worker) == 0) {
                return true;
            }
        }
    }
    return false;
}

static const PlanRank *rank_plan(const Deployment *d, const RankState *rank)
{
    return &d->plan->replicas[rank->replica].stages[rank->stage].ranks[rank->rank];
}

uint64_t deployment_bytes_on(const Deployment *d, const char *worker, uint32_t device)
{
    uint64_t bytes = 0;
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; (d->replicas[r].live || d->kept) && k < d->replicas[r].n_ranks; k++) {
            const RankState *rank = &d->replicas[r].ranks[k];
            if (strcmp(rank->worker, worker) == 0 &&
                (device == DEPLOYMENT_ANY_DEVICE || device == rank_plan(d, rank)->device)) {
                bytes += rank_plan(d, rank)->peak_bytes;
            }
        }
    }
    return bytes;
}

/* ---- the end of an epoch ---- */

static bool rank_drains(const Deployment *d, const RankState *rank)
{
    Member *member = members_find(d->jobs->options.members, rank->worker);
    return member != NULL && member_state(member) == MEMBER_DRAINING;
}

static void replica_drop(Deployment *d, ReplicaState *replica, bool keep_weights)
{
    for (uint32_t k = 0; k < replica->n_ranks; k++) {
        RankState *rank = &replica->ranks[k];
        rank_forget_call(rank);
        rank_drop(d, rank, replica->epoch, keep_weights && !rank_drains(d, rank));
    }
    loop_timer_cancel(d->jobs->options.loop, replica->verdict);
    replica->verdict = NULL;
    g_clear_error(&replica->suspicion);
    replica->live = false;
    replica->ready = false;
    d->kept = keep_weights;
    /* Whoever still holds the ended epoch after a restart of this coordinator must not be taken for
     * current. */
    g_autoptr(GArray) changes = g_array_new(FALSE, TRUE, sizeof(StoreChange));
    jobs_next_epoch(d->jobs, d->id, replica->index, changes);
    store_write(d->jobs->options.store, (StoreChange *)changes->data, changes->len, NULL, NULL);
    store_changes_clear(changes);
}

static bool any_live(const Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].live) {
            return true;
        }
    }
    return false;
}

void deployment_end_epoch(Deployment *d, uint32_t index, const GError *why)
{
    ReplicaState *replica = &d->replicas[index];
    if (d->state != DEPLOYMENT_READY || !replica->live) {
        return;
    }
    g_autoptr(GError) own = g_error_copy(why);
    log_warn(d->jobs->options.log, "job %s replica %u epoch %" G_GUINT64_FORMAT " over: %s", d->id,
             index, replica->epoch, own->message);
    replica_drop(d, replica, true);
    if (!any_live(d)) {
        deployment_enter(d, DEPLOYMENT_IDLE);
        jobs_sweep_soon(d->jobs);
    } else {
        jobs_settle_members(d->jobs);
    }
    d->recovery.shrunk = true;
    deployment_interrupt_leases(d, index, own);
    deployment_kick(d);
}

static void replica_on_verdict(void *user)
{
    ReplicaState *replica = user;
    Deployment *d = replica->deployment;
    replica->verdict = NULL;
    g_autoptr(GError) suspicion = g_steal_pointer(&replica->suspicion);
    g_autoptr(GError) culprit = jobs_culprit(d->jobs, d, replica->index);
    deployment_end_epoch(d, replica->index, culprit != NULL ? culprit : suspicion);
}

void deployment_suspect(Deployment *d, uint32_t index, const GError *error)
{
    ReplicaState *replica = &d->replicas[index];
    if (d->state != DEPLOYMENT_READY || !replica->live || replica->verdict != NULL) {
        return;
    }
    replica->ready = false;
    replica->suspicion = g_error_copy(error);
    replica->verdict =
        loop_timer_start(d->jobs->options.loop, VERDICT_US, replica_on_verdict, replica);
}

static void deployment_drop_all(Deployment *d, bool keep_weights)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].live) {
            replica_drop(d, &d->replicas[r], keep_weights);
        }
    }
    d->n_pending = 0;
}

/* Lost, or about to go. */
static bool uses_gone_worker(const Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            Member *member = members_find(d->jobs->options.members, d->replicas[r].ranks[k].worker);
            if (member == NULL || !member_attached(member) ||
                member_state(member) == MEMBER_DRAINING) {
                return true;
            }
        }
    }
    return false;
}

/* A worker that was fenced, restarted or lost another one may say so before this coordinator sees
 * it. */
static bool tells_of_a_loss(const GError *error)
{
    return g_error_matches(error, WEFT_ERROR, WEFT_ERROR_STALE) ||
           g_error_matches(error, WEFT_ERROR, WEFT_ERROR_WORKER_LOST);
}

void deployment_fail(Deployment *d, const GError *why)
{
    bool gone = uses_gone_worker(d) || tells_of_a_loss(why);
    bool again = d->n_attempts < ATTEMPTS_LIMIT && d->waiting.length > 0 && gone;
    if (!recovery_is_patient(d) || d->replicas != NULL) {
        log_warn(d->jobs->options.log, "job %s %s failed: %s", d->id, deployment_state_text(d),
                 why->message);
    }
    deployment_drop_all(d, true);
    g_clear_error(&d->error);
    d->error = g_error_copy(why);
    if (again) {
        deployment_enter(d, DEPLOYMENT_IDLE);
        deployment_tell_waiting(d, why->message, 0, "");
        deployment_kick(d);
        return;
    }
    deployment_enter(d, DEPLOYMENT_FAILED);
    if (d->waiting.length > 0 && recovery_is_patient(d)) {
        recovery_await(d, d->error);
        return;
    }
    d->n_attempts = 0;
    deployment_fail_waiting(d, d->error);
    jobs_sweep_soon(d->jobs);
}

void deployment_unload(Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].live || d->kept) {
            replica_drop(d, &d->replicas[r], false);
        }
    }
    d->kept = false;
    store_put(d->jobs->options.store, STORE_JOBS, d->id, NULL, NULL, NULL);
    log_info(d->jobs->options.log, "job %s unloaded", d->id);
    deployment_enter(d, DEPLOYMENT_STOPPED);
}

/* ---- loading and starting ---- */

static void each_rank(Deployment *d, void (*fn)(RankState *rank))
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            fn(&d->replicas[r].ranks[k]);
        }
    }
}

static void rank_await(RankState *rank)
{
    rank->answered = false;
    rank->deployment->n_pending++;
}

void deployment_begin_loading(Deployment *d)
{
    g_autofree char *layout = plan_layout_text(d->plan);
    log_info(d->jobs->options.log, "job %s planned: %s, epoch %" G_GUINT64_FORMAT, d->id, layout,
             d->replicas[0].epoch);
    d->planned_before = true;
    if (uses_gone_worker(d)) {
        g_autoptr(GError) error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                        "a worker of the plan was lost or drained before load: planning again");
        deployment_fail(d, error);
        return;
    }
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        d->replicas[r].live = true;
    }
    d->n_pending = 0;
    recovery_on_loading(d);
    deployment_enter(d, DEPLOYMENT_LOADING);
    each_rank(d, rank_await);
    each_rank(d, rank_load);
}

void deployment_on_progress(RankState *rank)
{
    Deployment *d = rank->deployment;
    uint64_t done = 0, total = 0;
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            done += d->replicas[r].ranks[k].bytes_done;
            total += d->replicas[r].ranks[k].bytes_total;
        }
    }
    g_autofree char *done_text = units_format_size(done);
    g_autofree char *total_text = units_format_size(total);
    g_autofree char *text = g_strdup_printf("loading %s of %s", done_text, total_text);
    deployment_tell_waiting(d, text, total > 0 ? (double)done / (double)total : 0, rank->worker);
}

static void replica_start(ReplicaState *replica)
{
    Deployment *d = replica->deployment;
    Jobs *jobs = d->jobs;
    g_autofree Weft__V1__RankAddress *addresses = g_new(Weft__V1__RankAddress, replica->n_ranks);
    g_autofree Weft__V1__RankAddress **list = g_new(Weft__V1__RankAddress *, replica->n_ranks);
    for (uint32_t k = 0; k < replica->n_ranks; k++) {
        RankState *rank = &replica->ranks[k];
        gsize size;
        addresses[k] = (Weft__V1__RankAddress)WEFT__V1__RANK_ADDRESS__INIT;
        addresses[k].stage = rank->stage;
        addresses[k].rank = rank->rank;
        addresses[k].worker = (char *)rank->worker;
        addresses[k].data_address.data = (uint8_t *)g_bytes_get_data(rank->data_address, &size);
        addresses[k].data_address.len = size;
        addresses[k].boot_id.data = rank->boot_id;
        addresses[k].boot_id.len = sizeof rank->boot_id;
        const Weft__V1__Hello *hello =
            member_hello(members_find(jobs->options.members, rank->worker));
        addresses[k].host = hello->host;
        addresses[k].threads = cpu_rank_threads(hello->threads, hello->n_devices);
        addresses[k].on_device = hello->n_devices > 0;
        addresses[k].cpus = hello->cpus;
        addresses[k].n_cpus = hello->n_cpus;
        list[k] = &addresses[k];
    }
    uint8_t secret[EPOCH_SECRET_BYTES];
    random_fill(jobs->options.random, secret, sizeof secret);
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    stamp.cluster = jobs->cluster;
    stamp.generation = jobs->options.generation;
    stamp.job = d->id;
    stamp.replica = replica->index;
    stamp.epoch = replica->epoch;
    Weft__V1__StartRequest request = WEFT__V1__START_REQUEST__INIT;
    request.stamp = &stamp;
    request.secret.data = secret;
    request.secret.len = sizeof secret;
    request.ranks = list;
    request.n_ranks = replica->n_ranks;
    for (uint32_t k = 0; k < replica->n_ranks; k++) {
        rank_start(&replica->ranks[k], &request);
    }
    keys_erase(secret, sizeof secret);
}

void deployment_on_loaded(RankState *rank)
{
    Deployment *d = rank->deployment;
    rank->answered = true;
    if (--d->n_pending > 0) {
        return;
    }
    recovery_on_loaded(d);
    deployment_enter(d, DEPLOYMENT_STARTING);
    deployment_tell_waiting(d, "starting", 1, "");
    each_rank(d, rank_await);
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        replica_start(&d->replicas[r]);
    }
}

static void deployment_ready(Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        d->replicas[r].ready = d->replicas[r].live;
    }
    d->n_attempts = 0;
    g_clear_error(&d->error);
    double load_s = (double)(loop_now_us(d->jobs->options.loop) - d->asked_us) / 1e6;
    d->load_s = d->waiting.length > 0 ? load_s : 0; /* nobody asked: nobody waited */
    recovery_on_ready(d);
    deployment_enter(d, DEPLOYMENT_READY);
    log_info(d->jobs->options.log, "job %s ready after %.1f s", d->id, load_s);
    deployment_kick(d);
}

void deployment_on_started(RankState *rank)
{
    rank->answered = true;
    if (--rank->deployment->n_pending == 0) {
        deployment_ready(rank->deployment);
    }
}

void deployment_on_rank_error(RankState *rank, const char *operation, const GError *error)
{
    GError *named = g_error_copy(error);
    g_autofree char *needle = g_strdup_printf("worker %s", rank->worker);
    if (g_error_matches(named, WEFT_ERROR, WEFT_ERROR_NOT_FOUND)) {
        named->code = WEFT_ERROR_STALE; /* fenced or restarted since it loaded: news of a loss */
    }
    if (strstr(named->message, needle) == NULL) {
        g_prefix_error(&named, "%s, %s: ", needle, operation);
    }
    deployment_fail(rank->deployment, named);
    g_error_free(named);
}

/* ---- the pump ---- */

void deployment_try_adopt(Deployment *d)
{
    for (uint32_t r = 0; d->state == DEPLOYMENT_STORED && r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            const RankState *rank = &d->replicas[r].ranks[k];
            Member *member = members_find(d->jobs->options.members, rank->worker);
            const Weft__V1__Held *held =
                member != NULL && member_attached(member)
                    ? member_held(member, d->id, r, rank->stage, rank->rank)
                    : NULL;
            if (held == NULL || held->epoch != d->replicas[r].epoch ||
                strcmp(held->state, "ready") != 0 ||
                held->unsealed !=
                    d->jobs->options
                        .seal_off) { /* links keep the setting that they were opened with */
                return;
            }
        }
    }
    if (d->state == DEPLOYMENT_STORED) {
        d->asked_us = loop_now_us(d->jobs->options.loop);
        log_info(d->jobs->options.log, "job %s adopted: its workers hold epoch %" G_GUINT64_FORMAT,
                 d->id, d->replicas[0].epoch);
        deployment_ready(d);
    }
}

static void deployment_on_kick(void *user)
{
    Deployment *d = user;
    d->kick = NULL;
    deployment_pump(d);
}

void deployment_kick(Deployment *d)
{
    if (d->kick == NULL) {
        d->kick = loop_timer_start(d->jobs->options.loop, 0, deployment_on_kick, d);
    }
}

static void deployment_on_settled(void *user)
{
    Deployment *d = user;
    d->settle = NULL;
    deployment_pump(d);
}

/* Workers that were here when the last coordinator died get a moment to come back before a plan is
 * made without them. */
static bool deployment_settles(Deployment *d)
{
    Jobs *jobs = d->jobs;
    int64_t left = jobs->started_us + SETTLE_US - loop_now_us(jobs->options.loop);
    if (left <= 0 || members_n_missing(jobs->options.members) == 0) {
        return false;
    }
    if (d->settle == NULL) {
        d->settle = loop_timer_start(jobs->options.loop, left, deployment_on_settled, d);
        deployment_tell_waiting(d, "waiting for workers to come back", 0, "");
    }
    return true;
}

/* Its live rank whose worker drains, or NULL. */
static const char *replica_draining(const Deployment *d, const ReplicaState *replica)
{
    for (uint32_t k = 0; replica->live && k < replica->n_ranks; k++) {
        if (rank_drains(d, &replica->ranks[k])) {
            return replica->ranks[k].worker;
        }
    }
    return NULL;
}

const char *deployment_draining(const Deployment *d)
{
    const char *worker = NULL;
    for (uint32_t r = 0; worker == NULL && r < d->n_replicas; r++) {
        worker = replica_draining(d, &d->replicas[r]);
    }
    return worker;
}

void deployment_on_drained(Deployment *d, const char *worker)
{
    const bool begins = d->state == DEPLOYMENT_LOADING || d->state == DEPLOYMENT_STARTING;
    if (!begins || !deployment_uses(d, worker)) {
        return;
    }
    if (d->waiting.length == 0) {
        deployment_drop_all(d, true);
        deployment_enter(d, DEPLOYMENT_IDLE);
        return;
    }
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s drains: planning again", worker);
    deployment_fail(d, error);
}

/* Nobody could tell which workers are really gone: a plan without them would be the second of two
 * that both run, once they are back. */
static bool deployment_is_cut_off(Deployment *d)
{
    g_autofree char *why = members_cut_off(d->jobs->options.members);
    if (why != NULL) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_READY, "%s", why);
        g_clear_error(&d->error);
        d->error = g_error_copy(error);
        recovery_await(d, error);
    }
    return why != NULL;
}

static void count_usable(Member *member, void *user)
{
    *(unsigned *)user += member_usable(member);
}

/* A replica is gone, and there are workers enough to have as many ranks as before. With fewer, the
 * replicas that are left serve on: planning anew could only make it worse. */
static bool deployment_repairable(const Deployment *d)
{
    unsigned n_ranks = 0, n_usable = 0;
    bool degraded = false;
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        n_ranks += d->replicas[r].n_ranks;
        degraded = degraded || !d->replicas[r].live;
    }
    members_each(d->jobs->options.members, count_usable, &n_usable);
    return degraded && n_usable >= n_ranks;
}

void deployment_move(Deployment *d, const GError *why)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        deployment_end_epoch(d, r, why);
    }
}

/* A ready replica that no draining member is part of. */
static bool has_staying_replica(const Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].ready && replica_draining(d, &d->replicas[r]) == NULL) {
            return true;
        }
    }
    return false;
}

/* Invariant 8: there is no plan without the draining members. */
static void leave_draining(Deployment *d)
{
    const bool others = has_staying_replica(d);
    for (uint32_t r = 0; d->state == DEPLOYMENT_READY && r < d->n_replicas; r++) {
        const char *worker = replica_draining(d, &d->replicas[r]);
        if (worker != NULL && (others || d->replicas[r].n_active == 0)) {
            g_autoptr(GError) why =
                g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s drains", worker);
            deployment_end_epoch(d, r, why);
        }
    }
}

static bool has_requests(const Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].n_active > 0) {
            return true;
        }
    }
    return false;
}

/* Nobody is on it; who only stands waits again. */
static void deployment_begin_anew(Deployment *d)
{
    deployment_forget_planning(d);
    if (d->active.length > 0) {
        g_autoptr(GError) why = g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s drains",
                                            deployment_draining(d));
        deployment_move(d, why);
    } else {
        deployment_drop_all(d, true);
        deployment_enter(d, DEPLOYMENT_IDLE);
    }
    d->pump_again = true;
}

/* READY: gives out replicas, or begins anew when members drain or a replica is gone and nobody is
 * on the rest. Requests on a draining member move as soon as there is a plan without it. */
static void deployment_serve(Deployment *d)
{
    const bool moves = deployment_draining(d) != NULL && !d->stays && d->model != NULL;
    if (deployment_draining(d) != NULL && !moves) {
        leave_draining(d);
        if (d->state != DEPLOYMENT_READY) {
            return;
        }
    }
    const bool drains = deployment_draining(d) != NULL;
    const bool is_left = drains && !has_staying_replica(d) && !has_requests(d);
    if (is_left || (d->waiting.length > 0 && d->active.length == 0 && deployment_repairable(d))) {
        deployment_begin_anew(d);
        return;
    }
    if (moves && d->task == NULL) {
        deployment_plan_move(d);
    }
    recovery_on_serving(d);
    while (!drains && d->state == DEPLOYMENT_READY && d->waiting.length > 0 &&
           deployment_grant_next(d)) {
    }
    recovery_on_served(d);
}

static void deployment_step(Deployment *d)
{
    if (d->state == DEPLOYMENT_STORED) {
        deployment_try_adopt(d);
    }
    if (d->state == DEPLOYMENT_READY) {
        deployment_serve(d);
        return;
    }
    bool idle = d->state == DEPLOYMENT_STORED || d->state == DEPLOYMENT_IDLE ||
                d->state == DEPLOYMENT_FAILED;
    if (idle && d->waiting.length > 0 && !deployment_settles(d) && !deployment_is_cut_off(d)) {
        if (d->state == DEPLOYMENT_STORED) {
            deployment_drop_all(d, true);
        }
        deployment_begin_planning(d);
    }
}

void deployment_revive(Deployment *d)
{
    d->asked_us = loop_now_us(d->jobs->options.loop);
    deployment_drop_all(d, true);
    deployment_begin_planning(d);
}

void deployment_pump(Deployment *d)
{
    if (d->pumping) {
        d->pump_again = true;
        return;
    }
    d->pumping = true;
    do {
        d->pump_again = false;
        deployment_step(d);
    } while (d->pump_again);
    d->pumping = false;
}
