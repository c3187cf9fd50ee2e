/* The part of weft.v1.Admin that concerns submitted jobs: Submit, ListJobs, CancelJob, Logs,
 * PlotJob. */
#include "coordinator/parts.h"

#include "coordinator/message.h"
#include "coordinator/submissions.h"
#include "proto/base/error.h"

/* Both answers are empty: the message to reply with is all that differs. */
typedef struct SubmitCall {
    RpcCall *call;
    const ProtobufCMessage *response; /* static */
} SubmitCall;

static SubmitCall *submit_call_new(RpcCall *call, const ProtobufCMessage *response)
{
    SubmitCall *s = g_new(SubmitCall, 1);
    *s = (SubmitCall){rpc_call_ref(call), response};
    return s;
}

static void submit_call_end(const GError *error, void *user)
{
    SubmitCall *s = user;
    if (error == NULL) {
        rpc_call_reply(s->call, s->response);
    } else {
        rpc_call_finish(s->call, error);
    }
    rpc_call_unref(s->call);
    g_free(s);
}

void submit_service_submit(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    static const Weft__V1__SubmitResponse response = WEFT__V1__SUBMIT_RESPONSE__INIT;
    Parts *parts = user;
    const Weft__V1__SubmitRequest *r = (const Weft__V1__SubmitRequest *)message;
    const RpcPeer *peer = rpc_call_peer(call);
    SubmitCall *s = submit_call_new(call, &response.base);
    g_autoptr(GError) error = NULL;
    if (!submissions_submit(parts->submissions, r->spec, peer->name,
                            (peer->role & RPC_ROLE_ADMIN) != 0, submit_call_end, s, &error)) {
        submit_call_end(error, s);
    }
}

void submit_service_cancel(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    static const Weft__V1__CancelJobResponse response = WEFT__V1__CANCEL_JOB_RESPONSE__INIT;
    Parts *parts = user;
    const Weft__V1__CancelJobRequest *r = (const Weft__V1__CancelJobRequest *)message;
    const RpcPeer *peer = rpc_call_peer(call);
    SubmitCall *s = submit_call_new(call, &response.base);
    g_autoptr(GError) error = NULL;
    if (!submissions_cancel(parts->submissions, r->name, peer->name,
                            (peer->role & RPC_ROLE_ADMIN) != 0, submit_call_end, s, &error)) {
        submit_call_end(error, s);
    }
}

static void add_job(const Weft__V1__Submission *job, void *user)
{
    g_ptr_array_add(user, message_copy(&job->base));
}

static void job_free(void *job)
{
    message_free(job);
}

void submit_service_list(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    g_autoptr(GPtrArray) jobs = g_ptr_array_new_with_free_func(job_free);
    submissions_each(parts->submissions, add_job, jobs);
    Weft__V1__ListJobsResponse response = WEFT__V1__LIST_JOBS_RESPONSE__INIT;
    response.jobs = (Weft__V1__Submission **)jobs->pdata;
    response.n_jobs = jobs->len;
    rpc_call_reply(call, &response.base);
}

void submit_service_logs(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__LogsRequest *r = (const Weft__V1__LogsRequest *)message;
    submissions_logs(parts->submissions, r->name, r->follow, call);
}

void submit_service_plot(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__PlotJobRequest *r = (const Weft__V1__PlotJobRequest *)message;
    Weft__V1__PlotJobResponse response = WEFT__V1__PLOT_JOB_RESPONSE__INIT;
    g_autoptr(GError) error = NULL;
    g_autofree char *svg = submissions_plot(parts->submissions, r->name, &response.steps, &error);
    if (svg == NULL) {
        rpc_call_finish(call, error);
        return;
    }
    response.svg = svg;
    rpc_call_reply(call, &response.base);
}
