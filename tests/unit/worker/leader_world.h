/* A leader with a pretended replica (fake_replica.h), whose results come back in order whenever the
 * test lets them, and clients that hold what they are told. */
#pragma once

#include "tests/unit/worker/fake_replica.h"
#include "transport/daemon/daemon.h"
#include "worker/serve/leader.h"

typedef struct Client {
    uint32_t ids[512], positions[512], n, n_done;
    float logprobs[512];
    char reason[16], error[200];
    int code;
} Client;

typedef struct World {
    StepLimits limits;
    Leader *leader;
    FakeReplica *replica;
    MainLoop *loop;
    Step *step;
    GQueue flights; /* FakeFlight * */
    int64_t now_us;
} World;

void world_open(World *world, const StepLimits *limits, uint32_t n_pages, uint32_t n_stages);
void world_close(World *world);
/* Builds a step and runs it; false if there is none now. */
bool world_build(World *world);
/* The oldest step in flight comes back. */
void world_return(World *world);
/* Full pipelines until nothing is left. */
void world_run(World *world);
EngineLoad world_load(const World *world);
void world_submit(World *world, uint64_t id, const EngineRequest *request, Client *client);
/* Until the client's request is done. */
void world_drain(World *world, const Client *client);
/* What the request gets alone, after its first tokens: n of them. */
void world_assert_tokens(const World *world, const Client *client, const EngineRequest *request,
                         uint32_t n);
void world_assert_scores(const World *world, const Client *client, const EngineRequest *request);
/* Of n_prompt zeros. */
EngineRequest world_request(uint32_t n_prompt, uint32_t n);
