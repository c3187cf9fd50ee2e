/* Groups of trivial devices: ranks are streams of one process, a collective is a task in each of
 * them.
 *
 *   rank's task at the head of its queue:  (not posted) -> posted -> passed
 *                                             all ranks have posted ---^
 *
 * The rank that posts last does the work of all: the others' streams stand at that very task, so
 * nobody touches the operands meanwhile. Sums are taken in the order of ranks. A world that failed
 * lets every task pass without doing anything, as an aborted one of NCCL does; poll() says why.
 *
 * Fail points: "device-group-fail" = r: rank r's next collective ends the world;
 * "device-group-hold" = r: rank r's stream stands before it. */
#include "kernels/device/cpu.h"
#include "kernels/device/group.h"
#include "kernels/generic/bf16dot.h"

#include "proto/base/failpoint.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

typedef enum Kind { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER } Kind;
static const char *const KIND_NAMES[] = {"all-reduce", "all-gather", "reduce-scatter"};

typedef struct Collective {
    Kind kind;
    const void *in;
    void *out;
    size_t n; /* floats, or bytes gathered from a rank */
} Collective;

/* A transfer that waits for its other end; in the args of its task, which stands. */
typedef struct Transfer {
    struct Transfer *next; /* in World.transfers, in order of posting */
    uint32_t rank;
    bool done;
    DeviceGroupPart part;
} Transfer;

typedef struct World {
    struct World *next;
    DeviceGroupId id;
    uint32_t n_ranks, references;
    uint64_t joined, posted; /* bit r: rank r */
    uint64_t round;          /* collectives done */
    Collective collectives[DEVICE_GROUP_RANKS];
    Transfer *transfers;
    bool failed;
    char text[160];
} World;

struct DeviceGroup {
    DeviceHandle *device;
    World *world;
    uint32_t rank;
};

/* Worlds are found by id from any thread: the ids are what keeps clusters in one process apart. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static World *worlds;

static void world_fail(World *world, const char *text)
{
    if (!world->failed) {
        world->failed = true;
        world->transfers = NULL;
        g_strlcpy(world->text, text, sizeof world->text);
    }
}

/* ---- joining ---- */

static bool usable(char *why)
{
    g_strlcpy(why, "threads of one process", 256);
    return true;
}

static uint64_t process_token;

static void process_name(void)
{
    if (getrandom(&process_token, sizeof process_token, 0) != (ssize_t)sizeof process_token) {
        process_token = (uint64_t)getpid() << 32 ^ (uintptr_t)&process_token;
    }
}

static void seat(DeviceHandle *device, DeviceSeat *out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, process_name);
    *out = (DeviceSeat){.fill = "cpu"};
    snprintf(out->domain, sizeof out->domain, "process %016" PRIx64, process_token);
    snprintf(out->place, sizeof out->place, "%u", device_cpu_index(device));
}

static DeviceStatus make_id(DeviceHandle *device, DeviceGroupId *out)
{
    (void)device;
    return getrandom(out, sizeof *out, 0) == (ssize_t)sizeof *out ? DEVICE_OK : DEVICE_FAILED;
}

static World *world_of(const DeviceGroupId *id, uint32_t n_ranks)
{
    for (World *w = worlds; w != NULL; w = w->next) {
        if (memcmp(&w->id, id, sizeof *id) == 0) {
            return w;
        }
    }
    World *world = calloc(1, sizeof *world);
    if (world != NULL) {
        world->id = *id;
        world->n_ranks = n_ranks;
        world->next = worlds;
        worlds = world;
    }
    return world;
}

static void world_join(World *world, uint32_t n_ranks, uint32_t rank)
{
    const uint64_t bit = (uint64_t)1 << rank;
    char text[96];
    if (n_ranks != world->n_ranks || rank >= n_ranks) {
        snprintf(text, sizeof text, "rank %u of %u joined a group of %u", rank, n_ranks,
                 world->n_ranks);
        world_fail(world, text);
    } else if ((world->joined & bit) != 0) {
        snprintf(text, sizeof text, "rank %u joined twice", rank);
        world_fail(world, text);
    }
    world->joined |= bit;
    world->references++;
}

static DeviceStatus begin(DeviceHandle *device, const DeviceGroupId *id, uint32_t n_ranks,
                          uint32_t rank, DeviceGroup **out)
{
    *out = NULL;
    if (n_ranks == 0 || n_ranks > DEVICE_GROUP_RANKS || rank >= DEVICE_GROUP_RANKS) {
        return DEVICE_UNSUPPORTED;
    }
    DeviceGroup *group = calloc(1, sizeof *group);
    pthread_mutex_lock(&mutex);
    World *world = group != NULL ? world_of(id, n_ranks) : NULL;
    if (world != NULL) {
        world_join(world, n_ranks, rank);
    }
    pthread_mutex_unlock(&mutex);
    if (world == NULL) {
        free(group);
        return DEVICE_OUT_OF_MEMORY;
    }
    *group = (DeviceGroup){.device = device, .world = world, .rank = rank};
    *out = group;
    return DEVICE_OK;
}

static DeviceStatus poll(DeviceGroup *group)
{
    const World *world = group->world;
    char text[sizeof world->text];
    pthread_mutex_lock(&mutex);
    const bool failed = world->failed;
    const bool complete = (uint32_t)__builtin_popcountll(world->joined) == world->n_ranks;
    memcpy(text, world->text, sizeof text);
    pthread_mutex_unlock(&mutex);
    return failed     ? device_cpu_fail(group->device, DEVICE_GROUP_FAILED, text)
           : complete ? DEVICE_OK
                      : DEVICE_NOT_READY;
}

/* ---- collectives ---- */

static float sum_of_ranks(const World *world, size_t at)
{
    float sum = ((const float *)world->collectives[0].in)[at];
    for (uint32_t r = 1; r < world->n_ranks; r++) {
        sum += ((const float *)world->collectives[r].in)[at];
    }
    return sum;
}

/* Element by element, so that an output may be its input. */
static void do_all_reduce(const World *world, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const float sum = sum_of_ranks(world, i);
        for (uint32_t r = 0; r < world->n_ranks; r++) {
            ((float *)world->collectives[r].out)[i] = sum;
        }
    }
}

static void do_reduce_scatter(const World *world, size_t n)
{
    for (uint32_t r = 0; r < world->n_ranks; r++) {
        for (size_t i = 0; i < n; i++) {
            ((float *)world->collectives[r].out)[i] = sum_of_ranks(world, r * n + i);
        }
    }
}

static void do_all_gather(const World *world, size_t bytes)
{
    for (uint32_t r = 0; r < world->n_ranks; r++) {
        for (uint32_t from = 0; from < world->n_ranks; from++) {
            memmove((uint8_t *)world->collectives[r].out + from * bytes,
                    world->collectives[from].in, bytes);
        }
    }
}

/* All have posted: the same thing? Then it is done. */
static void world_do(World *world)
{
    const Collective *first = &world->collectives[0];
    for (uint32_t r = 1; r < world->n_ranks; r++) {
        const Collective *c = &world->collectives[r];
        if (c->kind != first->kind || c->n != first->n) {
            char text[sizeof world->text];
            snprintf(text, sizeof text, "rank %u enqueued %s of %zu, rank 0 %s of %zu", r,
                     KIND_NAMES[c->kind], c->n, KIND_NAMES[first->kind], first->n);
            world_fail(world, text);
            return;
        }
    }
    switch (first->kind) {
    case ALL_REDUCE:
        do_all_reduce(world, first->n);
        break;
    case ALL_GATHER:
        do_all_gather(world, first->n);
        break;
    case REDUCE_SCATTER:
        do_reduce_scatter(world, first->n);
        break;
    }
    world->posted = 0;
    world->round++;
}

static bool fails_here(const DeviceGroup *group)
{
    int64_t rank;
    char text[64];
    if (failpoint("device-group-fail", &rank) && rank == group->rank) {
        snprintf(text, sizeof text, "rank %u: fail point device-group-fail", group->rank);
        world_fail(group->world, text);
    }
    return group->world->failed;
}

typedef struct CollectiveArgs {
    DeviceGroup *group;
    bool posted;
    uint64_t round; /* that it was posted in */
    Collective collective;
} CollectiveArgs;

static bool run_collective(void *args)
{
    CollectiveArgs *a = args;
    World *world = a->group->world;
    int64_t held;
    const bool holds = failpoint("device-group-hold", &held) && held == a->group->rank;
    pthread_mutex_lock(&mutex);
    if (!a->posted && !holds && !fails_here(a->group)) {
        a->posted = true;
        a->round = world->round;
        world->collectives[a->group->rank] = a->collective;
        world->posted |= (uint64_t)1 << a->group->rank;
        if ((uint32_t)__builtin_popcountll(world->posted) == world->n_ranks) {
            world_do(world);
        }
    }
    const bool passes = world->failed || (a->posted && world->round > a->round);
    pthread_mutex_unlock(&mutex);
    return passes;
}

static DeviceStatus collective(DeviceGroup *group, DeviceStream *stream, Kind kind, const void *in,
                               void *out, size_t n)
{
    const CollectiveArgs args = {.group = group,
                                 .collective = {.kind = kind, .in = in, .out = out, .n = n}};
    return device_cpu_enqueue_until(stream, run_collective, &args, sizeof args);
}

static DeviceStatus all_reduce(DeviceGroup *group, DeviceStream *stream, const float *in,
                               float *out, size_t n)
{
    return collective(group, stream, ALL_REDUCE, in, out, n);
}

static DeviceStatus all_gather(DeviceGroup *group, DeviceStream *stream, const void *mine,
                               void *out, size_t bytes)
{
    return collective(group, stream, ALL_GATHER, mine, out, bytes);
}

static DeviceStatus reduce_scatter(DeviceGroup *group, DeviceStream *stream, const float *in,
                                   float *out, size_t n)
{
    return collective(group, stream, REDUCE_SCATTER, in, out, n);
}

/* ---- transfers ---- */

typedef struct ExchangeArgs {
    DeviceGroup *group;
    uint32_t n;
    bool posted;
    Transfer transfers[DEVICE_GROUP_PARTS];
} ExchangeArgs;

static void transfer_post(World *world, Transfer *transfer)
{
    Transfer **end = &world->transfers;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = transfer;
}

static void transfer_remove(World *world, const Transfer *transfer)
{
    for (Transfer **at = &world->transfers; *at != NULL; at = &(*at)->next) {
        if (*at == transfer) {
            *at = transfer->next;
            return;
        }
    }
}

static void transfer_meet(World *world, Transfer *mine)
{
    for (Transfer *other = world->transfers; other != NULL && !mine->done; other = other->next) {
        if (other->done || other->rank != mine->part.peer || other->part.peer != mine->rank ||
            other->part.send == mine->part.send) {
            continue;
        }
        if (other->part.bytes != mine->part.bytes) {
            char text[96];
            snprintf(text, sizeof text, "ranks %u and %u exchange %zu and %zu bytes", mine->rank,
                     other->rank, mine->part.bytes, other->part.bytes);
            world_fail(world, text);
            return;
        }
        const Transfer *from = mine->part.send ? mine : other, *to = mine->part.send ? other : mine;
        memmove(to->part.data, from->part.data, from->part.bytes);
        mine->done = other->done = true;
    }
}

static bool run_exchange(void *args)
{
    ExchangeArgs *a = args;
    World *world = a->group->world;
    bool done = true;
    pthread_mutex_lock(&mutex);
    for (uint32_t i = 0; i < a->n && !a->posted && !fails_here(a->group); i++) {
        transfer_post(world, &a->transfers[i]);
        transfer_meet(world, &a->transfers[i]);
    }
    a->posted = true;
    for (uint32_t i = 0; i < a->n; i++) {
        done = done && a->transfers[i].done;
    }
    for (uint32_t i = 0; i < a->n && done; i++) {
        transfer_remove(world, &a->transfers[i]);
    }
    done = done || world->failed;
    pthread_mutex_unlock(&mutex);
    return done;
}

static DeviceStatus exchange(DeviceGroup *group, DeviceStream *stream, const DeviceGroupPart *parts,
                             uint32_t n)
{
    ExchangeArgs args = {.group = group, .n = n};
    if (n > DEVICE_GROUP_PARTS) {
        return DEVICE_UNSUPPORTED;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (parts[i].peer >= group->world->n_ranks || parts[i].peer == group->rank) {
            return DEVICE_UNSUPPORTED;
        }
        args.transfers[i] = (Transfer){.rank = group->rank, .part = parts[i]};
    }
    return device_cpu_enqueue_until(stream, run_exchange, &args, sizeof args);
}

/* ---- the tree ---- */

typedef struct FoldArgs {
    DeviceTree tree;
    const float *gathered;
    size_t n;
    float *out;
} FoldArgs;

static void run_fold(void *args)
{
    const FoldArgs *a = args;
    float stack[TREE_LEAVES_LIMIT];
    for (size_t i = 0; i < a->n; i++) {
        uint32_t depth = 0;
        for (uint32_t k = 0; k < a->tree.n_operands; k++) {
            stack[depth++] = a->gathered[a->tree.operand[k] * a->n + i];
            for (uint32_t m = a->tree.merges[k]; m > 0; m--) {
                depth--;
                stack[depth - 1] =
                    a->tree.flushes ? add_flushed(stack[depth - 1], stack[depth])
                                    : stack[depth - 1] + stack[depth];
            }
        }
        a->out[i] = stack[0];
    }
}

static DeviceStatus fold(DeviceGroup *group, DeviceStream *stream, const DeviceTree *tree,
                         const float *gathered, size_t n, float *out)
{
    const FoldArgs args = {*tree, gathered, n, out};
    (void)group;
    return device_cpu_enqueue(stream, run_fold, &args, sizeof args);
}

/* ---- the end ---- */

static DeviceStatus register_buffer(DeviceGroup *group, void *memory, size_t bytes)
{
    (void)group;
    (void)memory;
    (void)bytes;
    return DEVICE_OK;
}

static void group_abort(DeviceGroup *group)
{
    char text[64];
    snprintf(text, sizeof text, "rank %u left the group", group->rank);
    pthread_mutex_lock(&mutex);
    world_fail(group->world, text);
    pthread_mutex_unlock(&mutex);
}

static void group_free(DeviceGroup *group)
{
    if (group == NULL) {
        return;
    }
    group_abort(group);
    pthread_mutex_lock(&mutex);
    World *world = group->world;
    if (--world->references == 0) {
        World **at = &worlds;
        while (*at != world) {
            at = &(*at)->next;
        }
        *at = world->next;
        free(world);
    }
    pthread_mutex_unlock(&mutex);
    free(group);
}

const DeviceGroupApi device_cpu_group = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceGroupApi),
    .kind = "cpu",
    .usable = usable,
    .seat = seat,
    .make_id = make_id,
    .begin = begin,
    .poll = poll,
    .all_reduce = all_reduce,
    .all_gather = all_gather,
    .reduce_scatter = reduce_scatter,
    .exchange = exchange,
    .fold = fold,
    .register_buffer = register_buffer,
    .abort = group_abort,
    .free = group_free,
};
