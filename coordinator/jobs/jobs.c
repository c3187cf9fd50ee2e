/* The registry of deployments: who may share one, what members' news mean to them, memory, epochs,
 * and what the store knows. The state machine of each is in deployment.c.
 *
 * 1. Two requests share a deployment iff file, effective context, numerics, KV type and layout wish
 * are equal and it has room for the streams asked. Of numerics a request that asked for none shares
 * what it would get by itself, and one that asked what another got without asking.
 * 2. An epoch number is given out once for ever per (job, replica): the table holds the highest,
 * memory first, disk before use. */
#include "coordinator/jobs/deployment.h"

#include "coordinator/store/records.h"
#include "coordinator/wait_graph.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/plan/cpu_share.h"
#include "proto/plan/plan_context.h"
#include "proto/plan/plan_message.h"

#include <string.h>

#define ENDED_LIMIT 50u

/* ---- epochs ---- */

uint64_t jobs_epoch(const Jobs *jobs, const char *job, uint32_t replica)
{
    g_autofree char *key = g_strdup_printf("%s/%u", job, replica);
    const uint64_t *epoch = g_hash_table_lookup(jobs->epochs, key);
    return epoch != NULL ? *epoch : 0;
}

uint64_t jobs_next_epoch(Jobs *jobs, const char *job, uint32_t replica, GArray *changes)
{
    uint64_t next = jobs_epoch(jobs, job, replica) + 1;
    char *key = g_strdup_printf("%s/%u", job, replica);
    g_hash_table_replace(jobs->epochs, g_strdup(key), g_memdup2(&next, sizeof next));
    StoreChange change = {.table = STORE_EPOCHS, .key = key, .value = counter_record_pack(next)};
    g_array_append_val(changes, change);
    return next;
}

void store_changes_clear(GArray *changes)
{
    for (guint i = 0; i < changes->len; i++) {
        StoreChange *change = &g_array_index(changes, StoreChange, i);
        g_free((char *)change->key);
        if (change->value != NULL) {
            g_bytes_unref(change->value);
        }
    }
    g_array_set_size(changes, 0);
}

Deployment *jobs_find(const Jobs *jobs, const char *id)
{
    for (guint i = 0; i < jobs->deployments->len; i++) {
        Deployment *d = g_ptr_array_index(jobs->deployments, i);
        if (strcmp(d->id, id) == 0) {
            return d;
        }
    }
    return NULL;
}

bool jobs_restore_epoch(Jobs *jobs, const StoreRow *row, GError **error)
{
    uint64_t value;
    if (!counter_record_read(row->key, row->value, &value, error)) {
        return false;
    }
    g_hash_table_replace(jobs->epochs, g_strdup(row->key), g_memdup2(&value, sizeof value));
    const char *slash = strrchr(row->key, '/');
    g_autofree char *id = slash != NULL ? g_strndup(row->key, (gsize)(slash - row->key)) : NULL;
    Deployment *d = id != NULL ? jobs_find(jobs, id) : NULL;
    uint64_t replica = d != NULL ? g_ascii_strtoull(slash + 1, NULL, 10) : 0;
    if (d != NULL && replica < d->n_replicas && d->replicas[replica].epoch != value) {
        d->replicas[replica].live = false; /* it ended before the coordinator did */
        d->state = DEPLOYMENT_IDLE;
    }
    return true;
}

/* ---- what members report ---- */

static void serving_member(Member *member, void *user)
{
    Jobs *jobs = user;
    bool serving = false;
    for (guint i = 0; i < jobs->deployments->len && !serving; i++) {
        const Deployment *d = g_ptr_array_index(jobs->deployments, i);
        serving = d->state == DEPLOYMENT_READY &&
                  deployment_bytes_on(d, member_name(member), DEPLOYMENT_ANY_DEVICE) > 0;
    }
    members_set_serving(member, serving);
}

void jobs_settle_members(Jobs *jobs)
{
    members_each(jobs->options.members, serving_member, jobs);
}

static bool replica_uses(const ReplicaState *replica, const char *worker)
{
    for (uint32_t k = 0; k < replica->n_ranks; k++) {
        if (strcmp(replica->ranks[k].worker, worker) == 0) {
            return true;
        }
    }
    return false;
}

typedef struct EdgeList {
    const Deployment *deployment;
    uint32_t replica;
    GArray *edges; /* of WaitEdge */
} EdgeList;

static void collect_edges(Member *member, void *user)
{
    EdgeList *list = user;
    const Weft__V1__Heartbeat *heartbeat = member_heartbeat(member);
    for (size_t i = 0; heartbeat != NULL && i < heartbeat->n_waiting; i++) {
        const Weft__V1__Waiting *w = heartbeat->waiting[i];
        if (strcmp(w->job, list->deployment->id) == 0 && w->replica == list->replica &&
            w->epoch == list->deployment->replicas[w->replica].epoch) {
            WaitEdge edge = {member_name(member), w->waits_for, w->operation, w->since_ms,
                             w->expired};
            g_array_append_val(list->edges, edge);
        }
    }
}

GArray *jobs_edges(const Jobs *jobs, const Deployment *d, uint32_t replica)
{
    GArray *edges = g_array_new(FALSE, FALSE, sizeof(WaitEdge));
    EdgeList list = {d, replica, edges};
    members_each(jobs->options.members, collect_edges, &list);
    return edges;
}

/* What somebody waits for from `worker`; borrowed from a heartbeat, or NULL. */
static const char *awaited_operation(const Jobs *jobs, const Deployment *d, uint32_t replica,
                                     const char *worker)
{
    g_autoptr(GArray) edges = jobs_edges(jobs, d, replica);
    for (guint i = 0; i < edges->len; i++) {
        if (strcmp(g_array_index(edges, WaitEdge, i).waits_for, worker) == 0) {
            return g_array_index(edges, WaitEdge, i).operation;
        }
    }
    return NULL;
}

GError *jobs_culprit(const Jobs *jobs, const Deployment *d, uint32_t replica)
{
    g_autoptr(GArray) edges = jobs_edges(jobs, d, replica);
    const WaitEdge *sink = wait_graph_sink((const WaitEdge *)edges->data, edges->len, NULL);
    if (sink == NULL) {
        return NULL;
    }
    members_accuse(jobs->options.members, sink->waits_for);
    return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                       "worker %s did not answer in %s: worker %s waited %" G_GUINT64_FORMAT " ms",
                       sink->waits_for, sink->operation, sink->waiter, sink->since_ms);
}

static void deployment_on_lost(Deployment *d, Member *member, const GError *why)
{
    const char *worker = member_name(member);
    recovery_forget_worker(d, worker);
    if (d->state == DEPLOYMENT_LOADING || d->state == DEPLOYMENT_STARTING) {
        if (deployment_uses(d, worker)) {
            g_autoptr(GError) error =
                member_lost_error(member, d->state == DEPLOYMENT_LOADING ? "load" : "start");
            deployment_fail(d, error);
        }
        return;
    }
    for (uint32_t r = 0; d->state == DEPLOYMENT_READY && r < d->n_replicas; r++) {
        if (d->replicas[r].live && replica_uses(&d->replicas[r], worker)) {
            const char *operation = awaited_operation(d->jobs, d, r, worker);
            g_autoptr(GError) error =
                member_lost_error(member, operation != NULL             ? operation
                                          : d->replicas[r].n_active > 0 ? "generate"
                                                                        : NULL);
            deployment_end_epoch(d, r, error);
        }
    }
}

static void on_lost(Member *member, const GError *why, void *user)
{
    Jobs *jobs = user;
    for (guint i = 0; i < jobs->deployments->len; i++) {
        deployment_on_lost(g_ptr_array_index(jobs->deployments, i), member, why);
    }
}

static bool is_current(const Deployment *d, uint32_t replica, uint64_t epoch)
{
    return d != NULL && replica < d->n_replicas && d->replicas[replica].live &&
           d->replicas[replica].epoch == epoch;
}

/* A worker that was away for a while fences itself (DESIGN 7.6): what it does not hold any more is
 * over. */
static void check_held(Deployment *d, Member *member)
{
    for (uint32_t r = 0; d->state == DEPLOYMENT_READY && r < d->n_replicas; r++) {
        for (uint32_t k = 0; d->replicas[r].live && k < d->replicas[r].n_ranks; k++) {
            const RankState *rank = &d->replicas[r].ranks[k];
            if (strcmp(rank->worker, member_name(member)) != 0) {
                continue;
            }
            const Weft__V1__Held *held = member_held(member, d->id, r, rank->stage, rank->rank);
            if (held == NULL || held->epoch != d->replicas[r].epoch) {
                g_autoptr(GError) error =
                    g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                                "worker %s was cut off and has ended its part", rank->worker);
                deployment_end_epoch(d, r, error);
            }
        }
    }
}

static void on_attached(Member *member, bool fresh, void *user)
{
    Jobs *jobs = user;
    for (guint i = 0; i < jobs->deployments->len; i++) {
        Deployment *d = g_ptr_array_index(jobs->deployments, i);
        if (!fresh) {
            check_held(d, member);
        }
        d->stays = false;
        recovery_on_member(d);
        deployment_kick(d);
    }
}

static void on_reported(Member *member, void *user)
{
    Jobs *jobs = user;
    const Weft__V1__Heartbeat *heartbeat = member_heartbeat(member);
    for (size_t i = 0; i < heartbeat->n_held; i++) {
        const Weft__V1__Held *held = heartbeat->held[i];
        Deployment *d = jobs_find(jobs, held->job);
        if (is_current(d, held->replica, held->epoch) && strcmp(held->state, "failed") == 0) {
            g_autoptr(GError) error =
                g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s failed: %s",
                            member_name(member), held->error);
            deployment_suspect(d, held->replica, error);
        }
        if (d != NULL && d->state == DEPLOYMENT_STORED) {
            deployment_try_adopt(d);
        }
    }
    for (size_t i = 0; i < heartbeat->n_waiting; i++) {
        const Weft__V1__Waiting *w = heartbeat->waiting[i];
        Deployment *d = jobs_find(jobs, w->job);
        if (is_current(d, w->replica, w->epoch) && w->expired) {
            g_autoptr(GError) error = g_error_new(
                WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                "worker %s did not answer in %s: worker %s waited %" G_GUINT64_FORMAT " ms",
                w->waits_for, w->operation, member_name(member), w->since_ms);
            deployment_suspect(d, w->replica, error);
        }
    }
}

static void on_drained(Member *member, void *user)
{
    Jobs *jobs = user;
    for (guint i = 0; i < jobs->deployments->len; i++) {
        Deployment *d = g_ptr_array_index(jobs->deployments, i);
        d->stays = false;
        if (member_state(member) == MEMBER_DRAINING) {
            deployment_on_drained(d, member_name(member));
        }
        recovery_on_member(d);
        deployment_kick(d);
    }
}

static void on_keep(const Member *member, GPtrArray *keep, void *user)
{
    Jobs *jobs = user;
    for (guint i = 0; i < jobs->deployments->len; i++) {
        const Deployment *d = g_ptr_array_index(jobs->deployments, i);
        for (uint32_t r = 0; r < d->n_replicas; r++) {
            if (d->replicas[r].live && replica_uses(&d->replicas[r], member_name(member))) {
                Weft__V1__Keep *item = malloc(sizeof *item);
                weft__v1__keep__init(item);
                item->job = strdup(d->id);
                item->replica = r;
                item->epoch = d->replicas[r].epoch;
                g_ptr_array_add(keep, item);
            }
        }
    }
}

/* ---- life ---- */

Jobs *jobs_new(const JobsOptions *options)
{
    Jobs *jobs = g_new0(Jobs, 1);
    jobs->options = *options;
    jobs->cluster = g_strdup(options->cluster);
    jobs->control_address = g_strdup(options->control_address);
    jobs->deployments = g_ptr_array_new_with_free_func((GDestroyNotify)deployment_free);
    jobs->revivals = g_ptr_array_new_with_free_func(recovery_revival_free);
    jobs->writing = g_ptr_array_new_with_free_func(plan_task_free);
    jobs->epochs = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    jobs->started_us = loop_now_us(options->loop);
    MembersListener listener = {.attached = on_attached,
                                .lost = on_lost,
                                .reported = on_reported,
                                .drained = on_drained,
                                .keep = on_keep,
                                .user = jobs};
    members_listen(options->members, &listener);
    return jobs;
}

void jobs_free(Jobs *jobs)
{
    if (jobs == NULL) {
        return;
    }
    MembersListener none = {0};
    members_listen(jobs->options.members, &none);
    loop_timer_cancel(jobs->options.loop, jobs->sweep);
    g_ptr_array_unref(jobs->deployments);
    g_ptr_array_unref(jobs->revivals);
    g_ptr_array_unref(jobs->writing);
    g_hash_table_unref(jobs->epochs);
    g_free(jobs->control_address);
    g_free(jobs->cluster);
    g_free(jobs);
}

static Plan *stored_plan(const StoreRow *row, const JobRecord *record, GError **error)
{
    gsize size;
    const uint8_t *data = g_bytes_get_data(record->plan, &size);
    Weft__V1__Plan *message = weft__v1__plan__unpack(NULL, size, data);
    if (message == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "plan of job %s in the state directory is damaged: it will be planned again",
                    row->key);
        return NULL;
    }
    Plan *plan = plan_from_message(message, error);
    weft__v1__plan__free_unpacked(message, NULL);
    return plan;
}

bool jobs_restore(Jobs *jobs, const StoreRow *row, GError **error)
{
    JobRecord record = {0};
    if (!job_record_read(row->key, row->value, &record, error)) {
        return false;
    }
    Plan *plan = stored_plan(row, &record, error);
    bool ok = plan != NULL && plan->n_replicas == record.n_epochs;
    if (ok) {
        Deployment *d = deployment_new(jobs, row->key);
        d->model_path = g_strdup(record.model);
        d->wish = (JobWish){.dp = record.dp,
                            .pp = record.pp,
                            .tp = record.tp,
                            .context = record.context,
                            .numerics = plan->definition.numerics,
                            .any_numerics = record.numerics == JOB_RECORD_ANY_NUMERICS,
                            .kv_type = plan->definition.kv_type};
        d->context = record.context;
        memcpy(d->file_hash.bytes, record.file_hash, sizeof record.file_hash);
        d->plan = g_steal_pointer(&plan);
        d->state = DEPLOYMENT_STORED;
        d->restored = true;
        d->planned_before = true;
        deployment_lay_out(d);
        for (uint32_t r = 0; r < d->n_replicas; r++) {
            d->replicas[r].epoch = record.epochs[r];
            d->replicas[r].live = true; /* until jobs_restore_epoch says that it ended */
        }
        g_ptr_array_add(jobs->deployments, d);
        recovery_revive(d);
    } else if (plan != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "job %s in the state directory has %u epochs for %u replicas", row->key,
                    record.n_epochs, plan->n_replicas);
        plan_free(plan);
    }
    job_record_clear(&record);
    return ok;
}

/* ---- which deployment ---- */

static bool on_devices(const Jobs *jobs, const Deployment *d)
{
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            const Member *member =
                members_find(jobs->options.members, d->replicas[r].ranks[k].worker);
            const Weft__V1__Hello *hello = member != NULL ? member_hello(member) : NULL;
            if (hello != NULL && hello->n_devices > 0) {
                return true;
            }
        }
    }
    return false;
}

/* Invariant 1. */
static bool same_numerics(const Deployment *d, const JobWish *wish)
{
    if (d->wish.any_numerics == wish->any_numerics) {
        return wish->any_numerics || d->wish.numerics == wish->numerics;
    }
    if (d->plan == NULL) {
        return false;
    }
    return d->plan->definition.numerics ==
           (wish->any_numerics ? numerics_by_place(on_devices(d->jobs, d)) : wish->numerics);
}

static bool deployment_fits(const Deployment *d, const Model *model, const JobWish *wish)
{
    /* Of a wish for memory the streams are a bound, below which the plan may have stayed. */
    bool unknown = d->restored && wish->kv_memory != 0;
    bool room = d->plan == NULL || wish->streams <= d->plan->streams ||
                d->wish.streams >= wish->streams || unknown;
    bool memory = wish->kv_memory == 0 || wish->kv_memory == d->wish.kv_memory || d->restored;
    return d->state != DEPLOYMENT_STOPPED && room && memory &&
           hash128_equal(&d->file_hash, &model->spec->file_hash) &&
           d->context == plan_context(model->spec, wish->context) && same_numerics(d, wish) &&
           d->wish.kv_type == wish->kv_type && d->wish.dp == wish->dp && d->wish.pp == wish->pp &&
           d->wish.tp == wish->tp;
}

/* A short id that people can read: the file's name and four random digits. */
static char *job_id(Jobs *jobs, const Model *model)
{
    g_autofree char *file = g_path_get_basename(model->path);
    g_autoptr(GString) base = g_string_new(NULL);
    for (const char *c = file; *c != '\0' && strcmp(c, ".gguf") != 0 && base->len < 12; c++) {
        char lower = g_ascii_tolower(*c);
        if (g_ascii_isalnum(lower)) {
            g_string_append_c(base, lower);
        } else if (base->len > 0 && base->str[base->len - 1] != '-') {
            g_string_append_c(base, '-');
        }
    }
    for (;;) {
        uint16_t digits = (uint16_t)random_u64(jobs->options.random);
        g_autofree char *id = g_strdup_printf("%s%s%04x", base->len > 0 ? base->str : "model",
                                              g_str_has_suffix(base->str, "-") ? "" : "-", digits);
        if (jobs_find(jobs, id) == NULL && jobs_epoch(jobs, id, 0) == 0) {
            return g_steal_pointer(&id);
        }
    }
}

static Deployment *jobs_deployment(Jobs *jobs, Model *model, const JobWish *wish)
{
    for (guint i = 0; i < jobs->deployments->len; i++) {
        Deployment *d = g_ptr_array_index(jobs->deployments, i);
        if (deployment_fits(d, model, wish)) {
            if (d->restored && wish->kv_memory != 0) {
                d->wish.kv_memory = wish->kv_memory;
                d->wish.streams = wish->streams;
                d->restored = false;
            }
            if (d->model == NULL) {
                d->model = model_ref(model);
                recovery_on_member(d); /* it may grow now */
            }
            return d;
        }
    }
    g_autofree char *id = job_id(jobs, model);
    Deployment *d = deployment_new(jobs, id);
    d->model = model_ref(model);
    d->model_path = g_strdup(model->path);
    d->wish = *wish;
    d->context = plan_context(model->spec, wish->context);
    d->file_hash = model->spec->file_hash;
    g_ptr_array_add(jobs->deployments, d);
    return d;
}

Lease *jobs_acquire(Jobs *jobs, Model *model, const JobWish *wish, LeaseCallbacks callbacks,
                    void *user)
{
    Deployment *d = jobs_deployment(jobs, model, wish);
    Lease *lease = g_new0(Lease, 1);
    lease->deployment = d;
    lease->jobs = jobs;
    lease->callbacks = callbacks;
    lease->user = user;
    lease->since_us = loop_now_us(jobs->options.loop);
    if (d->state != DEPLOYMENT_READY && d->waiting.length == 0) {
        d->asked_us = loop_now_us(jobs->options.loop);
        d->n_attempts = 0;
    }
    g_queue_push_tail(&d->waiting, lease);
    deployment_kick(d);
    return lease;
}

/* ---- memory ---- */

typedef struct SnapshotBuild {
    const Jobs *jobs;
    const char *except;
    GArray *members; /* of PlanMember */
    GPtrArray *strings;
} SnapshotBuild;

static const char *snapshot_string(SnapshotBuild *build, const char *text)
{
    char *copy = g_strdup(text);
    g_ptr_array_add(build->strings, copy);
    return copy;
}

static uint64_t bytes_of_others(const SnapshotBuild *build, const PlanMember *m)
{
    uint64_t bytes = 0;
    for (guint i = 0; i < build->jobs->deployments->len; i++) {
        const Deployment *d = g_ptr_array_index(build->jobs->deployments, i);
        if (build->except == NULL ||
            (strcmp(build->except, JOBS_ALL) != 0 && strcmp(d->id, build->except) != 0)) {
            bytes += deployment_bytes_on(d, m->worker, m->device_index);
        }
    }
    return bytes;
}

static void snapshot_place(SnapshotBuild *build, PlanMember m, uint64_t budget)
{
    const uint64_t taken = bytes_of_others(build, &m);
    m.memory_bytes = budget > taken ? budget - taken : 0;
    g_array_append_val(build->members, m);
}

/* What was measured where it computes; links are the host's. */
static void snapshot_speed(PlanMember *m, const Weft__V1__Measured *measured)
{
    if (measured != NULL) {
        m->read_bytes_per_s = measured->read_bytes_per_s;
        m->int8_ops_per_s = measured->int8_ops_per_s;
        m->f32_ops_per_s = measured->f32_ops_per_s;
    }
}

/* A member for each device, or one for the cores. */
static void snapshot_places(SnapshotBuild *build, const Weft__V1__Hello *hello,
                            const Weft__V1__Heartbeat *heartbeat, PlanMember m)
{
    if (hello->n_devices == 0) {
        snapshot_place(build, m, hello->memory_bytes);
    }
    for (size_t i = 0; i < MIN(hello->n_devices, PLAN_RANKS_LIMIT); i++) {
        const Weft__V1__Device *d = hello->devices[i];
        g_autofree char *size = units_format_size(d->memory_bytes);
        g_autofree char *text =
            g_strdup_printf("%.16s:%u (%.96s, %s)", d->kind, d->index, d->name, size);
        m.device = snapshot_string(build, text);
        m.device_index = (uint32_t)i;
        m.exact_kind = snapshot_string(build, d->exact_kind);
        if (heartbeat != NULL && i < heartbeat->n_device_use) {
            m.device_rank_bytes = heartbeat->device_use[i]->rank_bytes;
            m.device_group_bytes = heartbeat->device_use[i]->group_bytes;
        }
        m.threads = cpu_rank_threads(hello->threads, hello->n_devices);
        snapshot_speed(&m, d->measured);
        if (d->measured != NULL) { /* of each weight type it says nothing */
            memset(m.matmul_ops_per_s, 0, sizeof m.matmul_ops_per_s);
        }
        snapshot_place(build, m, d->budget_bytes != 0 ? d->budget_bytes : hello->memory_bytes);
    }
}

static void snapshot_member(Member *member, void *user)
{
    SnapshotBuild *build = user;
    const Weft__V1__Hello *hello = member_hello(member);
    if (hello == NULL || !member_attached(member)) {
        return;
    }
    PlanMember m = {.worker = snapshot_string(build, member_name(member)),
                    .numerics_version = hello->numerics_version,
                    .numerics_classes = hello->numerics_classes,
                    .threads = hello->threads,
                    .usable = member_usable(member),
                    .host = hello->host[0] != '\0' ? snapshot_string(build, hello->host) : NULL,
                    .n_cpus = (uint32_t)MIN(hello->n_cpus, CPU_LIMIT)};
    m.cpus = g_memdup2(hello->cpus, m.n_cpus * sizeof *m.cpus);
    g_ptr_array_add(build->strings, (void *)(uintptr_t)m.cpus);
    for (size_t i = 0; i < hello->n_packed; i++) {
        if (hello->packed[i]->type < DTYPE_LIMIT) {
            m.packed_block_bytes[hello->packed[i]->type] = hello->packed[i]->block_bytes;
            m.matmul_ops_per_s[hello->packed[i]->type] = hello->packed[i]->ops_per_s;
        }
    }
    snapshot_speed(&m, hello->measured);
    if (hello->measured != NULL) {
        m.link_latency_s = hello->measured->link_latency_s;
        m.link_bytes_per_s = hello->measured->link_bytes_per_s;
    }
    snapshot_places(build, hello, member_heartbeat(member), m);
}

MemberSnapshot jobs_snapshot(const Jobs *jobs, const char *except_job)
{
    SnapshotBuild build = {jobs, except_job, g_array_new(FALSE, TRUE, sizeof(PlanMember)),
                           g_ptr_array_new_with_free_func(g_free)};
    members_each(jobs->options.members, snapshot_member, &build);
    uint32_t n = build.members->len;
    return (MemberSnapshot){(PlanMember *)g_array_free(build.members, FALSE), n, build.strings};
}

void member_snapshot_free(MemberSnapshot *snapshot)
{
    g_clear_pointer(&snapshot->members, g_free);
    g_clear_pointer(&snapshot->strings, g_ptr_array_unref);
}

static bool is_idle(const Deployment *d)
{
    bool busy = d->state == DEPLOYMENT_PLANNING || d->state == DEPLOYMENT_LOADING ||
                d->state == DEPLOYMENT_STARTING;
    return !busy && d->waiting.length == 0 && d->active.length == 0;
}

static void jobs_remove(Jobs *jobs, Deployment *d)
{
    deployment_unload(d);
    g_ptr_array_remove(jobs->deployments, d);
}

/* No worker computes for it, and nobody waits for it. */
static bool has_ended(const Deployment *d)
{
    return is_idle(d) && (d->state == DEPLOYMENT_IDLE || d->state == DEPLOYMENT_FAILED);
}

static void jobs_sweep(void *user)
{
    Jobs *jobs = user;
    jobs->sweep = NULL;
    for (guint i = jobs->deployments->len; i-- > 0;) {
        const Deployment *d = g_ptr_array_index(jobs->deployments, i);
        if (has_ended(d) && !d->planned_before) {
            g_ptr_array_remove_index(jobs->deployments, i);
        }
    }
    for (;;) {
        Deployment *oldest = NULL;
        unsigned n = 0;
        for (guint i = 0; i < jobs->deployments->len; i++) {
            Deployment *d = g_ptr_array_index(jobs->deployments, i);
            n += has_ended(d);
            if (has_ended(d) && (oldest == NULL || d->used_us < oldest->used_us)) {
                oldest = d;
            }
        }
        if (n <= ENDED_LIMIT) {
            return;
        }
        jobs_remove(jobs, oldest);
    }
}

void jobs_sweep_soon(Jobs *jobs)
{
    if (jobs->sweep == NULL) {
        jobs->sweep = loop_timer_start(jobs->options.loop, 0, jobs_sweep, jobs);
    }
}

bool jobs_make_room(Jobs *jobs, const Deployment *d)
{
    Deployment *oldest = NULL;
    for (guint i = 0; i < jobs->deployments->len; i++) {
        Deployment *other = g_ptr_array_index(jobs->deployments, i);
        if (other != d && is_idle(other) && (oldest == NULL || other->used_us < oldest->used_us)) {
            oldest = other;
        }
    }
    if (oldest != NULL) {
        jobs_remove(jobs, oldest);
    }
    return oldest != NULL;
}

static bool is_of_model(const Deployment *d, const char *model)
{
    if (model[0] == '\0' || strcmp(d->id, model) == 0 || strcmp(d->model_path, model) == 0) {
        return true;
    }
    g_autofree char *base = g_path_get_basename(d->model_path);
    g_autofree char *wished = g_path_get_basename(model);
    g_autofree char *with_suffix = g_strconcat(wished, ".gguf", NULL);
    return strcmp(base, wished) == 0 || strcmp(base, with_suffix) == 0;
}

bool jobs_unload(Jobs *jobs, const char *model, uint32_t *n_out, GError **error)
{
    g_autoptr(GPtrArray) found = g_ptr_array_new();
    for (guint i = 0; i < jobs->deployments->len; i++) {
        Deployment *d = g_ptr_array_index(jobs->deployments, i);
        if (!is_of_model(d, model)) {
            continue;
        }
        if (!is_idle(d)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_READY,
                        "job %s runs %u requests: wait for them or cancel them", d->id,
                        d->active.length + d->waiting.length);
            return false;
        }
        g_ptr_array_add(found, d);
    }
    for (guint i = 0; i < found->len; i++) {
        jobs_remove(jobs, g_ptr_array_index(found, i));
    }
    *n_out = found->len;
    return true;
}

void jobs_describe(const Jobs *jobs,
                   void (*fn)(const Weft__V1__Job *job, const Plan *plan, void *user), void *user)
{
    int64_t now = loop_now_us(jobs->options.loop);
    for (guint i = 0; i < jobs->deployments->len; i++) {
        const Deployment *d = g_ptr_array_index(jobs->deployments, i);
        g_autofree char *layout = d->plan != NULL ? plan_layout_text(d->plan) : g_strdup("");
        Weft__V1__Job job = WEFT__V1__JOB__INIT;
        job.id = d->id;
        job.kind = (char *)"serve";
        job.model = d->model_path;
        job.state = (char *)deployment_state_text(d);
        job.layout = layout;
        job.epoch = d->n_replicas > 0 ? d->replicas[0].epoch : 0;
        job.age_ms = (uint64_t)(now - d->created_us) / 1000;
        job.error = d->error != NULL ? d->error->message : (char *)"";
        job.active_requests = d->active.length + d->waiting.length;
        job.numerics = (char *)(d->plan != NULL        ? numerics_name(d->plan->definition.numerics)
                                : d->wish.any_numerics ? ""
                                                       : numerics_name(d->wish.numerics));
        job.recoveries = d->recovery.n_recoveries;
        job.recovered_s = d->recovery.recovered_s;
        fn(&job, d->n_replicas > 0 && d->state == DEPLOYMENT_READY ? d->plan : NULL, user);
    }
}
