/* Requests: clients' runs, from their text to tokens of a replica and back (service Serve). Knows
 * deployments by lease and workers by RPC only. Loop thread. */
#pragma once

#include "coordinator/gateway/requests/request_check.h"
#include "coordinator/jobs/jobs.h"
#include "coordinator/jobs/models.h"
#include "coordinator/members.h"
#include "coordinator/work_pool.h"
#include "proto/base/random.h"
#include "transport/rpc/rpc.h"

#include <glib.h>

typedef struct RequestsOptions {
    Loop *loop;
    Log *log;
    Random *random;
    WorkPool *pool;
    Members *members;
    Models *models;
    Jobs *jobs;
    const char *cluster; /* copied */
    uint64_t generation;
} RequestsOptions;

typedef struct Requests Requests;
Requests *requests_new(const RequestsOptions *options);
/* Ends what is open. Before jobs, members and models are freed. NULL-safe. */
void requests_free(Requests *requests);
void requests_add(Requests *requests, RpcServer *server);
