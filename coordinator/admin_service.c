/* weft.v1.Admin: the operator's side. Status and Plan also for role submit. */
#include "coordinator/parts.h"

#include "coordinator/message.h"
#include "coordinator/planner/planner.h"
#include "proto/base/error.h"
#include "proto/plan/plan_message.h"
#include "weft/v1/admin.pb-c.h"

#include <string.h>

/* ---- Status ---- */

typedef struct StatusBuild {
    Parts *parts;
    GPtrArray *members; /* of Weft__V1__Member *, owned copies */
    GPtrArray *jobs;    /* of Weft__V1__Job *, owned copies */
    GHashTable *shards; /* worker -> GPtrArray of char * */
    GHashTable *epochs; /* worker -> uint64_t * */
} StatusBuild;

static void message_free_data(void *data)
{
    message_free(data);
}

static void describe_rank(StatusBuild *build, const Weft__V1__Job *job, const Plan *plan,
                          uint32_t replica, const PlanStage *stage, const PlanRank *rank)
{
    GPtrArray *list = g_hash_table_lookup(build->shards, rank->worker);
    if (list == NULL) {
        list = g_ptr_array_new_with_free_func(g_free);
        g_hash_table_insert(build->shards, g_strdup(rank->worker), list);
    }
    g_autofree char *replica_text =
        plan->n_replicas > 1 ? g_strdup_printf(" replica %u", replica) : g_strdup("");
    g_ptr_array_add(list, g_strdup_printf("%s%s layers %u-%u units %u-%u", job->id, replica_text,
                                          stage->layer_first, stage->layer_last, rank->attn_first,
                                          rank->attn_first + rank->attn_count - 1));
    g_hash_table_replace(build->epochs, g_strdup(rank->worker),
                         g_memdup2(&job->epoch, sizeof job->epoch));
}

static void describe_job(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    StatusBuild *build = user;
    g_ptr_array_add(build->jobs, message_copy(&job->base));
    for (uint32_t r = 0; plan != NULL && r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            const PlanStage *stage = &plan->replicas[r].stages[s];
            for (uint32_t k = 0; k < stage->n_ranks; k++) {
                describe_rank(build, job, plan, r, stage, &stage->ranks[k]);
            }
        }
    }
}

static void describe_member(Member *member, void *user)
{
    StatusBuild *build = user;
    Weft__V1__Member message = WEFT__V1__MEMBER__INIT;
    member_describe(member, &message);
    GPtrArray *shards = g_hash_table_lookup(build->shards, message.name);
    const uint64_t *epoch = g_hash_table_lookup(build->epochs, message.name);
    if (shards != NULL) {
        message.shards = (char **)shards->pdata;
        message.n_shards = shards->len;
    }
    message.epoch = epoch != NULL ? *epoch : 0;
    message.certificate_expires =
        (uint64_t)authority_expiry(build->parts->authority, message.name) / 1000000;
    g_ptr_array_add(build->members, message_copy(&message.base));
}

static void on_status(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    g_autoptr(GPtrArray) members = g_ptr_array_new_with_free_func(message_free_data);
    g_autoptr(GPtrArray) jobs = g_ptr_array_new_with_free_func(message_free_data);
    g_autoptr(GHashTable) shards =
        g_hash_table_new_full(g_str_hash, g_str_equal, g_free, (GDestroyNotify)g_ptr_array_unref);
    g_autoptr(GHashTable) epochs = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    StatusBuild build = {parts, members, jobs, shards, epochs};
    jobs_describe(parts->jobs, describe_job, &build);
    members_each(parts->members, describe_member, &build);

    Weft__V1__StatusResponse response = WEFT__V1__STATUS_RESPONSE__INIT;
    response.cluster = parts->cluster;
    response.generation = parts->generation;
    response.release = (char *)WEFT_VERSION;
    response.members = (Weft__V1__Member **)members->pdata;
    response.n_members = members->len;
    response.jobs = (Weft__V1__Job **)jobs->pdata;
    response.n_jobs = jobs->len;
    response.uptime_ms = (uint64_t)(loop_now_us(parts->options.loop) - parts->started_us) / 1000;
    response.control_address = parts->control_address;
    response.join_address = parts->join_address;
    response.ca_hash = (ProtobufCBinaryData){32, (uint8_t *)authority_hash(parts->authority)};
    response.loop_lag_ms =
        parts->options.lag_ms != NULL ? parts->options.lag_ms(parts->options.lag_user) : 0;
    response.seal_off = parts->options.seal_off;
    requests_count(parts->requests, &response.requests_running, &response.requests_waiting);
    g_autoptr(GPtrArray) training = g_ptr_array_new_with_free_func(message_free_data);
    submissions_training(parts->submissions, training);
    response.training = (Weft__V1__TrainingStatus **)training->pdata;
    response.n_training = training->len;
    rpc_call_reply(call, &response.base);
}

/* ---- Plan ---- */

typedef struct PlanCall {
    Parts *parts;
    RpcCall *call;
    Weft__V1__PlanRequest *request;
    Model *model;
    MemberSnapshot members;
    PlanWish wish;
    Plan *plan;
    GPtrArray *violations, *alternatives;
    double roof;
    GError *error;
} PlanCall;

static void plan_call_free(void *user)
{
    PlanCall *p = user;
    rpc_call_unref(p->call);
    message_free(p->request);
    model_unref(p->model);
    member_snapshot_free(&p->members);
    if (p->plan != NULL) {
        plan_free(p->plan);
    }
    g_clear_pointer(&p->violations, g_ptr_array_unref);
    g_clear_pointer(&p->alternatives, g_ptr_array_unref);
    g_clear_error(&p->error);
    g_free(p);
}

static void plan_call_work(void *user)
{
    PlanCall *p = user;
    p->plan = planner_plan(p->model->spec, p->members.members, p->members.n, &p->wish,
                           &p->violations, &p->alternatives, &p->error);
    if (p->plan != NULL) {
        p->roof = planner_roof(p->plan, p->model->spec, p->members.members, p->members.n);
    }
}

static char **string_list(GPtrArray *texts /* may be NULL */, size_t *n)
{
    *n = texts != NULL ? texts->len : 0;
    return texts != NULL ? (char **)texts->pdata : NULL;
}

static void plan_call_done(void *user)
{
    PlanCall *p = user;
    g_autoptr(GPtrArray) violations = g_ptr_array_new();
    for (guint i = 0; p->violations != NULL && i < p->violations->len; i++) {
        g_ptr_array_add(violations, ((PlanViolation *)g_ptr_array_index(p->violations, i))->text);
    }
    if (p->plan == NULL && violations->len == 0) {
        g_ptr_array_add(violations, p->error->message);
    }
    Weft__V1__PlanResponse response = WEFT__V1__PLAN_RESPONSE__INIT;
    response.plan = p->plan != NULL ? plan_to_message(p->plan) : NULL;
    response.model = model_message(p->model, false);
    response.n_attn_units = p->model->spec->n_attn_units;
    response.n_ffn_units = p->model->spec->n_ffn_units;
    response.roof_decode_tokens_per_s = p->roof;
    response.violations = string_list(p->plan == NULL ? violations : NULL, &response.n_violations);
    response.alternatives = string_list(p->alternatives, &response.n_alternatives);
    rpc_call_reply(p->call, &response.base);
    message_free(response.plan);
    message_free(response.model);
    plan_call_free(p);
}

static void plan_call_opened(Model *model, const GError *error, void *user)
{
    PlanCall *p = user;
    if (error != NULL) {
        rpc_call_finish(p->call, error);
        plan_call_free(p);
        return;
    }
    const Weft__V1__Layout *layout = p->request->layout;
    p->model = model_ref(model);
    p->members = jobs_snapshot(p->parts->jobs, JOBS_ALL);
    p->wish.job = "plan";
    p->wish.model = model->path;
    p->wish.context = p->request->context;
    p->wish.streams = p->request->streams;
    p->wish.seal_off = p->parts->options.seal_off;
    if (layout != NULL) {
        p->wish.dp = layout->dp;
        p->wish.pp = layout->pp;
        p->wish.tp = layout->tp;
    }
    work_pool_run(p->parts->pool, plan_call_work, plan_call_done, plan_call_free, p);
}

static void on_plan(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__PlanRequest *request = (const Weft__V1__PlanRequest *)message;
    PlanCall *p = g_new0(PlanCall, 1);
    p->parts = parts;
    p->call = rpc_call_ref(call);
    p->request = (Weft__V1__PlanRequest *)message_copy(message);
    if (!request_numerics(request->numerics, &p->wish.numerics, &p->wish.any_numerics, &p->error) ||
        !request_kv_type(request->kv, &p->wish.kv_type, &p->error)) {
        rpc_call_finish(call, p->error);
        plan_call_free(p);
        return;
    }
    models_open(parts->models, request->model, plan_call_opened, p);
}

/* ---- tokens and members ---- */

typedef struct AdminCall {
    Parts *parts;
    RpcCall *call;
    char *text; /* for the log line */
    uint32_t n;
} AdminCall;

static AdminCall *admin_call_new(Parts *parts, RpcCall *call)
{
    AdminCall *a = g_new0(AdminCall, 1);
    a->parts = parts;
    a->call = rpc_call_ref(call);
    return a;
}

static void admin_call_free(AdminCall *a)
{
    rpc_call_unref(a->call);
    g_free(a->text);
    g_free(a);
}

static void on_token_created(const char *token, int64_t expires_us, const GError *error, void *user)
{
    AdminCall *a = user;
    if (error == NULL) {
        Weft__V1__CreateTokenResponse response = WEFT__V1__CREATE_TOKEN_RESPONSE__INIT;
        response.token = (char *)token;
        response.ca_hash =
            (ProtobufCBinaryData){32, (uint8_t *)authority_hash(a->parts->authority)};
        response.join_address = a->parts->join_address;
        response.expires = (uint64_t)expires_us / 1000000;
        rpc_call_reply(a->call, &response.base);
        log_info(a->parts->options.log, "token for role %s created by %s", a->text,
                 rpc_call_peer(a->call)->name);
    } else {
        rpc_call_finish(a->call, error);
    }
    admin_call_free(a);
}

static void on_create_token(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__CreateTokenRequest *request = (const Weft__V1__CreateTokenRequest *)message;
    g_autoptr(GError) error = NULL;
    AdminCall *a = admin_call_new(parts, call);
    a->text = g_strdup(request->role[0] != '\0' ? request->role : "worker");
    int64_t ttl_us =
        request->ttl_ms < (uint64_t)INT64_MAX / 1000 ? (int64_t)request->ttl_ms * 1000 : INT64_MAX;
    if (!token_book_create(parts->tokens, a->text, ttl_us, request->uses, on_token_created, a,
                           &error)) {
        rpc_call_finish(call, error);
        admin_call_free(a);
    }
}

static void on_revoked(const GError *error, void *user)
{
    AdminCall *a = user;
    if (error == NULL) {
        Weft__V1__RevokeResponse response = WEFT__V1__REVOKE_RESPONSE__INIT;
        response.certificates = a->n;
        rpc_call_reply(a->call, &response.base);
    } else {
        rpc_call_finish(a->call, error);
    }
    admin_call_free(a);
}

static void on_revoke(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__RevokeRequest *request = (const Weft__V1__RevokeRequest *)message;
    if (members_find(parts->members, request->node) == NULL &&
        authority_expiry(parts->authority, request->node) == 0) {
        g_autoptr(GError) error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                        "node %s has no certificate: weft status lists the members", request->node);
        rpc_call_finish(call, error);
        return;
    }
    AdminCall *a = admin_call_new(parts, call);
    log_warn(parts->options.log, "node %s revoked by %s", request->node, rpc_call_peer(call)->name);
    /* Certificates first: from here on nothing new gets in; then the streams that are open end and
     * its deployments' epochs with them. */
    a->n = authority_revoke(parts->authority, request->node, on_revoked, a);
    members_revoke(parts->members, request->node);
    rpc_server_kick(parts->control, request->node);
}

static void on_drained(const GError *error, void *user)
{
    AdminCall *a = user;
    if (error == NULL) {
        Weft__V1__DrainResponse response = WEFT__V1__DRAIN_RESPONSE__INIT;
        rpc_call_reply(a->call, &response.base);
    } else {
        rpc_call_finish(a->call, error);
    }
    admin_call_free(a);
}

static void on_drain(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__DrainRequest *request = (const Weft__V1__DrainRequest *)message;
    g_autoptr(GError) error = NULL;
    AdminCall *a = admin_call_new(parts, call);
    if (!members_drain(parts->members, request->node, request->reason, request->undrain, on_drained,
                       a, &error)) {
        rpc_call_finish(call, error);
        admin_call_free(a);
    }
}

static void on_unload(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__UnloadRequest *request = (const Weft__V1__UnloadRequest *)message;
    g_autoptr(GError) error = NULL;
    Weft__V1__UnloadResponse response = WEFT__V1__UNLOAD_RESPONSE__INIT;
    if (jobs_unload(parts->jobs, request->model, &response.jobs, &error)) {
        rpc_call_reply(call, &response.base);
    } else {
        rpc_call_finish(call, error);
    }
}

static void on_stop(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    Weft__V1__StopResponse response = WEFT__V1__STOP_RESPONSE__INIT;
    log_info(parts->options.log, "stop asked by %s", rpc_call_peer(call)->name);
    rpc_call_reply(call, &response.base);
    if (parts->options.on_stop != NULL) {
        loop_post(parts->options.loop, parts->options.on_stop, parts->options.stop_user);
    }
}

void admin_service_add(RpcServer *server, Parts *parts)
{
    static const RpcMethod methods[] = {
        {"Status", on_status, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"Why", why_service_answer, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"Plan", on_plan, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"PlanTraining", plan_training_answer, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"CreateToken", on_create_token, RPC_ROLE_ADMIN},
        {"Revoke", on_revoke, RPC_ROLE_ADMIN},
        {"Drain", on_drain, RPC_ROLE_ADMIN},
        {"Unload", on_unload, RPC_ROLE_ADMIN},
        {"Stop", on_stop, RPC_ROLE_ADMIN},
        {"ServeModel", http_admin_serve_model, RPC_ROLE_ADMIN},
        {"Submit", submit_service_submit, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"ListJobs", submit_service_list, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"CancelJob", submit_service_cancel, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"Logs", submit_service_logs, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"PlotJob", submit_service_plot, RPC_ROLE_ADMIN | RPC_ROLE_SUBMIT},
        {"CreateKey", http_admin_create_key, RPC_ROLE_ADMIN},
        {"ListKeys", http_admin_list_keys, RPC_ROLE_ADMIN},
        {"RevokeKey", http_admin_revoke_key, RPC_ROLE_ADMIN},
        {NULL},
    };
    rpc_server_add(server, &weft__v1__admin__descriptor, methods, parts);
}
