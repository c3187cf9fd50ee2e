/* Health, earned (DESIGN 7.6): looks at the deployments every 250 ms and tells the listeners. ""
 * and Leader: a shard is loaded and every engine moves, and the coordinator is followed. Worker and
 * Slices: the coordinator is followed. Loop thread. */
#pragma once

#include "transport/rpc/rpc.h"
#include "worker/agent/attach.h"
#include "worker/agent/deployments.h"

typedef struct Health Health;
Health *health_new(Loop *loop, Deployments *deployments); /* borrowed */
void health_free(Health *health);                         /* NULL-safe */
/* Who is told; borrowed until health_unlisten(). */
void health_listen(Health *health, RpcServer *server);
void health_unlisten(Health *health, RpcServer *server);
void health_follow(Health *health, Attach *attach /* NULL = followed by nobody */);
bool health_is_serving(const Health *health);
