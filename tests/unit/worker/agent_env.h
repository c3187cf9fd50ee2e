/* AgentEnv: one agent under simulated time, with a coordinator that can be spoilt, and the calls
 * that tests make of it. Calls return what fake_reply_free() frees. */
#pragma once

#include "tests/unit/worker/fake_coordinator.h"
#include "worker/agent/agent.h"

#define SECOND 1000000ll

enum { SERVING = 1, NOT_SERVING = 2 };

extern const TinyShape env_shape;

typedef struct Env {
    SimWorld *world;
    RpcTransport *transport;
    LinkFill *fill;
    char *cache; /* NULL = none */
    TinyModel *model;
    FakeCoordinator *c;
    Loop *loop; /* the agent's */
    Agent *agent;
    GError *refused;
    bool stopped;
    unsigned leave_ms;
    const Device *device; /* of the agent; NULL = the host */
} Env;

Env *env_new(void); /* of env_shape, without a cache */
Env *env_new_with(const TinyShape *shape, char *cache /* taken; NULL = none */);
Env *env_new_on(const Device *device);
Env *env_new_leaving(unsigned leave_ms); /* AgentOptions */
void env_free(Env *env);
void env_start_agent(Env *env, const Identity *identity, uint64_t memory);
void env_stopped(void *user); /* for agent_stop(); `user` is the Env */

/* Time goes on and the engines have their turns. */
void env_run(Env *env, int64_t duration_us);
void env_wait_for(Env *env, const bool *done);
void env_wait_attached(Env *env, unsigned n); /* for the n-th time at least */

FakeReply *env_load(Env *env, uint64_t epoch); /* the whole model, from the coordinator */
FakeReply *env_load_from(Env *env, uint64_t epoch, const Plan *plan, uint32_t rank,
                         const char *const *sources, size_t n_sources);
/* Waits; borrowed from the reply. */
const Weft__V1__LoadProgress *env_loaded(Env *env, FakeReply *reply);
FakeReply *env_start(Env *env, uint64_t epoch, const Weft__V1__LoadProgress *of);
void env_make_ready(Env *env, uint64_t epoch); /* loaded and started */
FakeReply *env_drop(Env *env, uint64_t epoch, bool keep);
FakeReply *env_generate(Env *env, uint64_t epoch, uint32_t n_tokens, uint32_t first_id,
                        const char *role);
FakeReply *env_generate_with(Env *env, uint64_t epoch, uint32_t n_tokens, uint32_t first_id,
                             bool logits, const char *role);
/* With a sampler that the leader is to refuse. */
FakeReply *env_generate_biased(Env *env, Weft__V1__Sampler *sampler);
/* Waits for that error, with both words in it; frees the reply. */
void env_assert_fails(Env *env, FakeReply *reply, int code, const char *a, const char *b);
int env_health(Env *env, const char *service); /* SERVING or NOT_SERVING */
