/* LeaderService: Generate on the replicas that this worker leads. One call = one sequence; ending
 * the call cancels it. Loop thread. */
#pragma once

#include "transport/rpc/rpc.h"
#include "weft/v1/serve.pb-c.h"
#include "worker/agent/deployments.h"

/* A reader with more than this waiting loses its stream (FULL, behind the tokens that wait): they
 * must not pile up in memory. It may ask for the rest. */
#define LEADER_PENDING_LIMIT (4u << 20)

typedef struct LeaderService LeaderService;

/* Borrowed for the service's life. */
LeaderService *leader_service_new(Loop *loop, Log *log, Deployments *deployments);
void leader_service_free(
    LeaderService *service); /* after its calls ended: deployments_is_empty(); NULL-safe */
/* Handler of Leader.Generate; answers now or later. */
void leader_service_generate(LeaderService *service, RpcCall *call,
                             const Weft__V1__GenerateRequest *request);
