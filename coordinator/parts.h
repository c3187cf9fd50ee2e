/* What the services of the coordinator share. Private to coordinator/: filled by coordinator.c,
 * read by admin_service.c, cluster_service.c and requests. */
#pragma once

#include "coordinator/ca/authority.h"
#include "coordinator/ca/join_gate.h"
#include "coordinator/ca/tokens.h"
#include "coordinator/coordinator.h"
#include "coordinator/gateway/openai/api_service.h"
#include "coordinator/gateway/requests/requests.h"
#include "coordinator/jobs/jobs.h"
#include "coordinator/jobs/models.h"
#include "coordinator/jobs/slices_service.h"
#include "coordinator/members.h"
#include "coordinator/submissions.h"
#include "coordinator/work_pool.h"

typedef struct Parts {
    CoordinatorOptions options;
    char *cluster;
    uint64_t generation;
    uint8_t generation_id[16];
    int64_t started_us;
    char *control_address, *join_address; /* as others reach them */
    WorkPool *pool;
    Authority *authority;
    TokenBook *tokens;
    JoinGate *gate;
    Members *members;
    Models *models;
    Jobs *jobs;
    Requests *requests;
    ApiKeys *keys;
    ApiService *api;
    Submissions *submissions;
    GQueue serving; /* ServeModel calls, http_admin.c */
    SlicesService slices;
    RpcServer *control, *health;
} Parts;

void cluster_service_add(RpcServer *server, Parts *parts);
void admin_service_add(RpcServer *server, Parts *parts);

/* plan_training.c: Admin.PlanTraining. */
void plan_training_answer(RpcCall *call, const ProtobufCMessage *message, void *user);

/* why_service.c: Admin.Why. */
void why_service_answer(RpcCall *call, const ProtobufCMessage *message, void *user);

/* submit_service.c: methods of Admin that concern submitted jobs. */
void submit_service_submit(RpcCall *call, const ProtobufCMessage *message, void *user);
void submit_service_list(RpcCall *call, const ProtobufCMessage *message, void *user);
void submit_service_cancel(RpcCall *call, const ProtobufCMessage *message, void *user);
void submit_service_plot(RpcCall *call, const ProtobufCMessage *message, void *user);
void submit_service_logs(RpcCall *call, const ProtobufCMessage *message, void *user);

/* http_admin.c: methods of Admin that concern HTTP. */
void http_admin_serve_model(RpcCall *call, const ProtobufCMessage *message, void *user);
void http_admin_create_key(RpcCall *call, const ProtobufCMessage *message, void *user);
void http_admin_revoke_key(RpcCall *call, const ProtobufCMessage *message, void *user);
void http_admin_list_keys(RpcCall *call, const ProtobufCMessage *message, void *user);
/* Ends the ServeModel calls. Before the api and the control server are freed. */
void http_admin_free(Parts *parts);
