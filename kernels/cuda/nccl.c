/* DeviceGroup by NCCL, without a blocking call.
 *
 *   begin ─► JOINING ──poll: success──► READY ──enqueue: in progress──► ENQUEUING ──poll──► READY
 *               │                         │                                │
 *               └───────── an error, from poll() or any call ──────────────┘──► ENDED ◄── abort
 *
 * Invariants
 *   1. The communicator is non-blocking: between a call that said "in progress" and a poll that
 * says success nothing else is asked of it, nor of the stream (the seam's rule, which is NCCL's).
 *   2. ENDED is final: the communicator was aborted at once, so that kernels of this rank which
 * wait for others leave the device, and only free() follows.
 *   3. Nothing is finalised: a group ends with its epoch, and what it still does then is of no use.
 *      Graphs are freed before, or the abort would wait for them. */
#include "kernels/cuda/module.h"
#include "kernels/cuda/nccl_library.h"

#include "kernels/cuda/launch.h"
#include "kernels/device/group.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUFFERS 8u
#define RUNNING_SYSTEM "/proc/sys/kernel/random/boot_id"

_Static_assert(sizeof(ncclUniqueId) == DEVICE_GROUP_ID_BYTES, "one size of ids");

struct DeviceGroup {
    DeviceHandle *device;
    const NcclLibrary *nccl;
    ncclComm_t comm;
    uint32_t n_ranks, rank;
    pthread_mutex_t mutex; /* of `ended`: abort() may come from any thread */
    bool ended;
    char why[160];
    void *buffers[BUFFERS];
    uint32_t n_buffers;
};

/* ---- what there is ---- */

static bool usable(char *why)
{
    const char *missing;
    const NcclLibrary *nccl = nccl_library(&missing);
    if (nccl == NULL) {
        snprintf(why, 256, "%s", missing);
        return false;
    }
    snprintf(why, 256, "NCCL %d.%d.%d", nccl->version / 10000, nccl->version / 100 % 100,
             nccl->version % 100);
    return true;
}

/* The host as NCCL tells hosts apart; NCCL_HOSTID makes several of one, and then two ranks may
 * share a device. */
static void seat(DeviceHandle *device, DeviceSeat *out)
{
    const char *missing, *host = getenv("NCCL_HOSTID");
    char bus[32];
    *out = (DeviceSeat){0};
    FILE *file = fopen(RUNNING_SYSTEM, "re");
    if (file != NULL && fgets(out->domain, sizeof out->domain, file) != NULL &&
        nccl_library(&missing) != NULL) {
        snprintf(out->fill, sizeof out->fill, "nccl");
    }
    if (file != NULL) {
        fclose(file);
    }
    cuda_bus(device, bus, sizeof bus);
    snprintf(out->place, sizeof out->place, "%.16s%s%.30s", bus, host != NULL ? " " : "",
             host != NULL ? host : "");
}

/* ---- results ---- */

static void finish(DeviceGroup *group, const char *why)
{
    pthread_mutex_lock(&group->mutex);
    if (!group->ended) {
        group->ended = true;
        snprintf(group->why, sizeof group->why, "%s", why);
        cuda_use(group->device);
        (void)group->nccl->CommAbort(group->comm);
    }
    pthread_mutex_unlock(&group->mutex);
}

/* What it ended of, once it has. */
static DeviceStatus failed(DeviceGroup *group)
{
    return cuda_say(group->device, DEVICE_GROUP_FAILED, group->why);
}

static bool has_ended(DeviceGroup *group)
{
    pthread_mutex_lock(&group->mutex);
    const bool ended = group->ended;
    pthread_mutex_unlock(&group->mutex);
    return ended;
}

static void describe(const NcclLibrary *nccl, ncclComm_t comm, ncclResult_t result, char *out,
                     size_t bytes)
{
    const char *detail = nccl->GetLastError(comm);
    snprintf(out, bytes, "NCCL: %s%s%s", nccl->GetErrorString(result),
             detail != NULL && *detail != '\0' ? ": " : "", detail != NULL ? detail : "");
}

static DeviceStatus result_of(DeviceGroup *group, ncclResult_t result)
{
    char text[160];
    if (result == ncclSuccess || result == ncclInProgress) {
        return result == ncclSuccess ? DEVICE_OK : DEVICE_NOT_READY;
    }
    describe(group->nccl, group->comm, result, text, sizeof text);
    finish(group, text);
    return failed(group);
}

/* ---- joining ---- */

static DeviceStatus make_id(DeviceHandle *device, DeviceGroupId *out)
{
    const char *missing;
    const NcclLibrary *nccl = nccl_library(&missing);
    if (nccl == NULL) {
        return cuda_say(device, DEVICE_UNSUPPORTED, missing);
    }
    ncclUniqueId id;
    cuda_use(device);
    const ncclResult_t result = nccl->GetUniqueId(&id);
    if (result != ncclSuccess) {
        char text[160];
        describe(nccl, NULL, result, text, sizeof text);
        return cuda_say(device, DEVICE_GROUP_FAILED, text);
    }
    memcpy(out, &id, sizeof *out);
    return DEVICE_OK;
}

static DeviceStatus begin(DeviceHandle *device, const DeviceGroupId *id, uint32_t n_ranks,
                          uint32_t rank, DeviceGroup **out)
{
    const char *missing;
    const NcclLibrary *nccl = nccl_library(&missing);
    *out = NULL;
    if (nccl == NULL) {
        return cuda_say(device, DEVICE_UNSUPPORTED, missing);
    }
    DeviceGroup *group = calloc(1, sizeof *group);
    if (group == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId unique;
    config.blocking = 0;
    memcpy(&unique, id, sizeof unique);
    *group = (DeviceGroup){.device = device, .nccl = nccl, .n_ranks = n_ranks, .rank = rank};
    pthread_mutex_init(&group->mutex, NULL);
    cuda_use(device);
    const ncclResult_t result =
        nccl->CommInitRankConfig(&group->comm, (int)n_ranks, unique, (int)rank, &config);
    if (result != ncclSuccess && result != ncclInProgress) {
        char text[160];
        describe(nccl, NULL, result, text, sizeof text);
        pthread_mutex_destroy(&group->mutex);
        free(group);
        return cuda_say(device, DEVICE_GROUP_FAILED, text);
    }
    *out = group;
    return DEVICE_OK;
}

static DeviceStatus poll(DeviceGroup *group)
{
    ncclResult_t state = ncclSuccess;
    if (has_ended(group)) {
        return failed(group);
    }
    const ncclResult_t asked = group->nccl->CommGetAsyncError(group->comm, &state);
    return result_of(group, asked != ncclSuccess ? asked : state);
}

/* ---- collectives ---- */

/* Whether anything may be enqueued; makes the device the thread's own. */
static bool may_enqueue(DeviceGroup *group)
{
    cuda_use(group->device);
    return !has_ended(group);
}

static DeviceStatus all_reduce(DeviceGroup *group, DeviceStream *stream, const float *in,
                               float *out, size_t n)
{
    return may_enqueue(group)
               ? result_of(group, group->nccl->AllReduce(in, out, n, ncclFloat32, ncclSum,
                                                         group->comm, cuda_stream(stream)))
               : failed(group);
}

static DeviceStatus all_gather(DeviceGroup *group, DeviceStream *stream, const void *mine,
                               void *out, size_t bytes)
{
    return may_enqueue(group)
               ? result_of(group, group->nccl->AllGather(mine, out, bytes, ncclUint8, group->comm,
                                                         cuda_stream(stream)))
               : failed(group);
}

static DeviceStatus reduce_scatter(DeviceGroup *group, DeviceStream *stream, const float *in,
                                   float *out, size_t n)
{
    return may_enqueue(group)
               ? result_of(group, group->nccl->ReduceScatter(in, out, n, ncclFloat32, ncclSum,
                                                             group->comm, cuda_stream(stream)))
               : failed(group);
}

/* Inside a group of calls each says success or why not; "in progress" comes with its end. */
static ncclResult_t enqueue_part(DeviceGroup *group, struct CUstream_st *stream,
                                 const DeviceGroupPart *part)
{
    return part->send ? group->nccl->Send(part->data, part->bytes, ncclUint8, (int)part->peer,
                                          group->comm, stream)
                      : group->nccl->Recv(part->data, part->bytes, ncclUint8, (int)part->peer,
                                          group->comm, stream);
}

static DeviceStatus exchange(DeviceGroup *group, DeviceStream *stream, const DeviceGroupPart *parts,
                             uint32_t n)
{
    if (n > DEVICE_GROUP_PARTS) {
        return DEVICE_UNSUPPORTED;
    }
    if (!may_enqueue(group)) {
        return failed(group);
    }
    struct CUstream_st *on = cuda_stream(stream);
    ncclResult_t result = group->nccl->GroupStart();
    if (result != ncclSuccess) {
        return result_of(group, result);
    }
    for (uint32_t i = 0; i < n && (result == ncclSuccess || result == ncclInProgress); i++) {
        result = enqueue_part(group, on, &parts[i]);
    }
    const ncclResult_t ended = group->nccl->GroupEnd();
    return result_of(group, result != ncclSuccess && result != ncclInProgress ? result : ended);
}

static DeviceStatus fold(DeviceGroup *group, DeviceStream *stream, const DeviceTree *tree,
                         const float *gathered, size_t n, float *out)
{
    cuda_use(group->device);
    return cuda_result(stream, weft_cuda_fold(tree->operand, tree->merges, tree->n_operands,
                                              tree->flushes, gathered, n, out,
                                              cuda_stream(stream)));
}

/* ---- buffers, the end ---- */

static DeviceStatus register_buffer(DeviceGroup *group, void *memory, size_t bytes)
{
    if (!may_enqueue(group)) {
        return failed(group);
    }
    if (group->n_buffers == BUFFERS) {
        return DEVICE_OK; /* served unregistered */
    }
    void *handle = NULL;
    const ncclResult_t result = group->nccl->CommRegister(group->comm, memory, bytes, &handle);
    if (result == ncclSuccess && handle != NULL) {
        group->buffers[group->n_buffers++] = handle;
    }
    return result == ncclSuccess || result == ncclInProgress ? result_of(group, result) : DEVICE_OK;
}

static void group_abort(DeviceGroup *group)
{
    char text[64];
    snprintf(text, sizeof text, "rank %u left the group", group->rank);
    finish(group, text);
}

static void group_free(DeviceGroup *group)
{
    if (group == NULL) {
        return;
    }
    cuda_use(group->device);
    for (uint32_t i = 0; i < group->n_buffers && !has_ended(group); i++) {
        (void)group->nccl->CommDeregister(group->comm, group->buffers[i]);
    }
    group_abort(group);
    pthread_mutex_destroy(&group->mutex);
    free(group);
}

const DeviceGroupApi cuda_group = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceGroupApi),
    .kind = "nccl",
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
