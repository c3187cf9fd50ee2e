/* An engine, as the files of its thread see it. Not for others.
 *
 *   engine.c           the thread: opening, turns, closing; diagram and invariants
 *   engine_commands.c  commands of other threads, in order
 *   engine_greeting.c  links and hellos, until the engine runs
 *   engine_group.c     the group of a stage's devices, before the engine runs
 *   engine_links.c     messages and deaths of peers
 *   engine_steps.c     steps, and what the engine waits for between them
 *   engine_report.c    what others see of it: progress, waits, failure
 *   engine_limits.c    sizes that follow from the plan
 *
 * Engine thread (inline_run: the caller of engine_step) unless a line says otherwise. */
#pragma once

#include "kernels/kernels.h"
#include "worker/model/device_team.h"
#include "worker/serve/engine.h"
#include "worker/serve/engine_counters.h"
#include "worker/serve/executor.h"
#include "worker/serve/inbox.h"
#include "worker/serve/leader.h"

#include <pthread.h>
#include <stdatomic.h>

enum {
    ENGINE_STEP_DEADLINE_US = 2000000, /* at least (DESIGN 7.6) */
    ENGINE_IDLE_WAIT_US = 400000,      /* invariant 4 */
    ENGINE_SPIN_US = 200, /* WIRE.md: longer than the usual wait, shorter than a wake-up hurts */
};

typedef enum EngineState {
    STATE_OPENED,
    STATE_GREETING,
    STATE_RUNNING,
    STATE_FAILED,
    STATE_STOPPED
} EngineState;

typedef enum CommandKind {
    COMMAND_START,
    COMMAND_SUBMIT,
    COMMAND_CANCEL,
    COMMAND_CANARY,
    COMMAND_ABORT,
    COMMAND_QUIT
} CommandKind;

typedef struct Greeting {
    uint8_t secret[32], boot_id[16];
    bool seal;
    EnginePeer *peers;
    char **workers;
    uint32_t n_peers;
    Loop *loop;
    void (*ready)(const GError *error, void *user);
    void *user;
} Greeting;

typedef struct Command {
    CommandKind kind;
    Greeting *greeting;
    LeaderRequest *request;
    uint64_t request_id;
    GError *error;
} Command;

struct Engine {
    EngineOptions o;
    Position position;
    StepLimits limits;
    uint32_t n_ranks; /* of the replica */
    GThread *thread;
    /* engine thread */
    EngineState state;
    LinkPort *port;
    Pool *pool;
    Stage *stage;
    Group *group;
    Executor *executor;
    Direct *direct;
    Leader *leader;
    Link *links[PLAN_RANKS_LIMIT];
    char *names[PLAN_RANKS_LIMIT]; /* node ids by global rank */
    bool greeted[PLAN_RANKS_LIMIT];
    Greeting *greeting;
    int64_t greeting_since_us;
    struct {                                      /* engine_group.c */
        DeviceTeamHello hellos[PLAN_RANKS_LIMIT]; /* by rank of the stage; empty: no device */
        bool decided;
        int64_t since_us;
    } devices;
    Step *step;
    Inbox inbox;
    uint32_t steps_in_flight;
    uint64_t waited_us;    /* in executor_wait() */
    uint32_t stalled_step; /* the last whose tokens were late enough to be counted; 0: none */
    int64_t step_deadline_us;
    int64_t idle_since_us;
    bool closed, tell;
    /* shared */
    struct {
        pthread_mutex_t mutex; /* commands, text of status */
        pthread_cond_t opened;
        LinkPort *wake; /* the port, while it may be interrupted */
        GQueue commands;
        bool open_done;
        GError *open_error;
        GBytes *address;
        char error[256];
        char waits_operation[64];
    } shared;
    EngineCounters counters;
    atomic_uint stages_at_once;
    char *cpu_turn; /* engine_set_cpu_turn(), before the thread is told to start; or NULL */
    int64_t no_turn_until_us;
    atomic_bool crowded, abort, running, failed, waiting, wait_expired;
    atomic_ullong step_now; /* number << 32 | rows of the step that is run; 0 = between steps */
    _Atomic(const char *) activations; /* EngineStatus.activations */
    atomic_uint waits_stage, waits_rank;
    atomic_llong waits_since_us;
    atomic_ullong progress, next_request;
};

/* ---- engine_report.c ---- */

/* An op is done; the link moves on. `user` is the engine. */
void engine_report_progress(void *user);
/* Global rank -1: waits for nobody. */
void engine_report_wait(Engine *engine, int global, const char *operation, int64_t since_us);
/* Invariant 2. The first reason stays. Sends nothing itself, so that it may be called inside a link
 * callback; `tell`: the next turn tells the peers. */
void engine_fail(Engine *engine, GError *error /* taken */, bool tell);
void engine_fail_waiting(Engine *engine, uint32_t global, const char *operation, int64_t since_us,
                         const char *how);
const char *engine_worker_name(const Engine *engine, uint32_t global);
static inline const PlanReplica *engine_replica(const Engine *engine)
{
    return &engine->o.plan->replicas[engine->o.replica];
}

static inline int64_t engine_flight_deadline_us(const Engine *engine)
{
    return engine->step_deadline_us * (int64_t)engine->steps_in_flight;
}

/* ---- engine_greeting.c ---- */

void engine_greeting_begin(Engine *engine, Greeting *greeting /* taken */);
void engine_greeting_check(Engine *engine); /* GREETING: goes on to RUNNING, or fails */
/* Tells who started the engine; NULL = it runs. Nothing when that was done. */
void engine_greeting_end(Engine *engine, const GError *error);
void engine_greeting_free(Greeting *greeting); /* NULL-safe; erases its keys */

/* ---- engine_group.c ---- */

/* What this rank's hello says of its device, empty where that is nothing; returned. */
bool engine_group_hello(Engine *engine, GByteArray **out, GError **error);
void engine_group_heard(Engine *engine, uint32_t from, const void *payload, size_t size);
/* All hellos are in: whether the group is there or none is wanted. False: ask again, or failed. */
bool engine_group_open(Engine *engine);

/* ---- engine_links.c ---- */

void engine_links_receive(Link *link, const LinkHeader *header, const void *payload, void *user);
void engine_links_dead(Link *link, const char *why, void *user);
/* What the links have carried goes into the counters. */
void engine_links_count(Engine *engine);
/* Every peer: this engine has failed. */
void engine_links_tell(Engine *engine, const char *why);

/* ---- engine_steps.c ---- */

/* RUNNING: one step, if there is one; true = it was run. */
bool engine_steps_work(Engine *engine);
/* What an idle rank waits for: the coordinator follows these edges to the culprit. */
void engine_steps_report_idle(Engine *engine);
/* The rank that sends a step's tokens to the leader. */
uint32_t engine_steps_token_rank(const Engine *engine);
/* ExecutorOptions.wait. `user` is the engine. */
bool engine_steps_wait(const bool *done, int64_t deadline_us, uint32_t global,
                       const char *operation, void *user);
/* ExecutorOptions.wait_for_room. */
bool engine_steps_wait_for_room(int64_t since_us, uint32_t global, const char *operation,
                                void *user);

/* ---- engine_commands.c ---- */

/* False when the engine is to stop. */
bool engine_commands_run(Engine *engine);
void engine_commands_quit(Engine *engine); /* any thread; the engine's thread ends after it */
/* Those that nobody will run: their requests fail. */
void engine_commands_drop(Engine *engine);

/* ---- engine_limits.c ---- */

StepLimits engine_limits(const Plan *plan, const ModelSpec *spec);
uint32_t engine_limits_flight(const PlanReplica *replica); /* steps */
uint32_t engine_limits_inbox(const PlanReplica *replica);  /* steps */
/* Bytes of the longest message of a step to a rank of `stage`. */
size_t engine_limits_message(const StepLimits *limits, const ModelSpec *spec, uint32_t stage);
