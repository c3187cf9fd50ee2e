/* Slices.Fetch: the bytes of slices from this coordinator's model files, to workers. */
#pragma once

#include "coordinator/jobs/models.h"
#include "coordinator/work_pool.h"
#include "transport/rpc/rpc.h"

typedef struct SlicesService {
    Loop *loop;
    WorkPool *pool;
    Models *models;
} SlicesService;

/* service: borrowed for the server's life. */
void slices_service_add(RpcServer *server, SlicesService *service);
