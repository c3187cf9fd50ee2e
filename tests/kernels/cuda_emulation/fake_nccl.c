/* A library with NCCL's names for tests of kernels/cuda/nccl.c, which loads it as it would the real
 * one. Data goes through the trivial device's groups; what this file adds is NCCL's manner with
 * non-blocking communicators: calls stay in progress for some polls, reach the stream only after
 * the last of them, and must not be overtaken; errors come from polls; an aborted communicator is
 * gone. */
#include "tests/kernels/cuda_emulation/fake_nccl.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static void forget(void);
EXPORT FakeNccl fake_nccl = {.forget = forget};

typedef struct Call {
    enum { NOTHING, REDUCE, GATHER, SCATTER, EXCHANGE } kind;
    const void *in;
    void *out;
    size_t n;
    DeviceStream *stream;
    DeviceGroupPart parts[DEVICE_GROUP_PARTS];
    uint32_t n_parts;
} Call;

struct ncclComm {
    ncclComm_t next; /* in `all` */
    DeviceGroup *group;
    int rank, polls; /* left until the call in progress is done */
    ncclResult_t failed;
    Call call;
};

static _Thread_local struct {
    int depth;
    ncclComm_t comm;
    Call call;
} batch;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static ncclComm_t all; /* aborted ones, too: tasks on streams name their groups */

static void forget(void)
{
    pthread_mutex_lock(&mutex);
    while (all != NULL) {
        ncclComm_t comm = all;
        all = comm->next;
        fake_nccl.cpu->free(comm->group);
        free(comm);
    }
    pthread_mutex_unlock(&mutex);
}

static ncclResult_t violation(void)
{
    fake_nccl.violations++;
    return ncclInvalidUsage;
}

EXPORT ncclResult_t ncclGetVersion(int *version)
{
    *version = 22809;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    DeviceGroupId made;
    if (fake_nccl.cpu->make_id(fake_nccl.current(), &made) != DEVICE_OK) {
        return ncclSystemError;
    }
    memcpy(id, &made, sizeof *id);
    return ncclSuccess;
}

EXPORT const char *ncclGetErrorString(ncclResult_t result)
{
    return result == ncclRemoteError ? "remote process exited or there was a network error"
                                     : "an error of the fake";
}

EXPORT const char *ncclGetLastError(ncclComm_t comm)
{
    return comm != NULL && comm->failed == ncclRemoteError ? "a rank hung up" : "";
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int n_ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t *config)
{
    DeviceGroupId same;
    ncclComm_t made = calloc(1, sizeof *made);
    if (made == NULL) {
        return ncclSystemError;
    }
    if (config->size != sizeof *config || config->blocking != 0) {
        free(made);
        return violation();
    }
    memcpy(&same, &id, sizeof same);
    made->rank = rank;
    made->polls = fake_nccl.slow;
    if (fake_nccl.cpu->begin(fake_nccl.current(), &same, (uint32_t)n_ranks, (uint32_t)rank,
                             &made->group) != DEVICE_OK) {
        free(made);
        return ncclInvalidArgument;
    }
    fake_nccl.joined++;
    pthread_mutex_lock(&mutex);
    made->next = all;
    all = made;
    pthread_mutex_unlock(&mutex);
    *comm = made;
    return ncclInProgress;
}

/* What was called reaches its stream. */
static ncclResult_t enqueue(ncclComm_t comm, const Call *call)
{
    const DeviceGroupApi *cpu = fake_nccl.cpu;
    DeviceStatus status = DEVICE_OK;
    switch (call->kind) {
    case NOTHING:
        break;
    case REDUCE:
        status = cpu->all_reduce(comm->group, call->stream, call->in, call->out, call->n);
        break;
    case GATHER:
        status = cpu->all_gather(comm->group, call->stream, call->in, call->out, call->n);
        break;
    case SCATTER:
        status = cpu->reduce_scatter(comm->group, call->stream, call->in, call->out, call->n);
        break;
    case EXCHANGE:
        status = cpu->exchange(comm->group, call->stream, call->parts, call->n_parts);
        break;
    }
    return status == DEVICE_OK ? ncclSuccess : ncclUnhandledCudaError;
}

static ncclResult_t state_of(ncclComm_t comm)
{
    const DeviceStatus group = fake_nccl.cpu->poll(comm->group);
    if (group == DEVICE_NOT_READY) {
        return ncclInProgress;
    }
    if (group != DEVICE_OK) {
        return ncclRemoteError;
    }
    if (fake_nccl.async_error != 0 && fake_nccl.async_error_rank == comm->rank) {
        const int error = fake_nccl.async_error;
        fake_nccl.async_error = 0;
        return (ncclResult_t)error;
    }
    if (comm->polls > 0 && --comm->polls > 0) {
        return ncclInProgress;
    }
    const Call call = comm->call;
    comm->call = (Call){.kind = NOTHING};
    return enqueue(comm, &call);
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    if (comm->failed == ncclSuccess) {
        const ncclResult_t now = state_of(comm);
        comm->failed = now != ncclInProgress ? now : ncclSuccess;
        *state = now;
        return ncclSuccess;
    }
    *state = comm->failed;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    fake_nccl.aborted++;
    fake_nccl.cpu->abort(comm->group);
    comm->failed = ncclInvalidUsage;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommRegister(const ncclComm_t comm, void *buffer, size_t size,
                                     void **handle)
{
    (void)comm;
    (void)size;
    fake_nccl.registered++;
    *handle = buffer;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle)
{
    (void)handle;
    if (comm->failed != ncclSuccess) {
        return violation();
    }
    fake_nccl.deregistered++;
    return ncclSuccess;
}

static ncclResult_t called(ncclComm_t comm, const Call *call)
{
    if (comm->polls > 0 || comm->call.kind != NOTHING || comm->failed != ncclSuccess) {
        return violation();
    }
    comm->polls = fake_nccl.slow;
    if (comm->polls == 0) {
        return enqueue(comm, call);
    }
    comm->call = *call;
    return ncclInProgress;
}

EXPORT ncclResult_t ncclAllReduce(const void *in, void *out, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    return type == ncclFloat32 && op == ncclSum
               ? called(comm, &(const Call){REDUCE, in, out, count, (DeviceStream *)stream})
               : violation();
}

EXPORT ncclResult_t ncclAllGather(const void *in, void *out, size_t count, ncclDataType_t type,
                                  ncclComm_t comm, cudaStream_t stream)
{
    return type == ncclUint8
               ? called(comm, &(const Call){GATHER, in, out, count, (DeviceStream *)stream})
               : violation();
}

EXPORT ncclResult_t ncclReduceScatter(const void *in, void *out, size_t count, ncclDataType_t type,
                                      ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    return type == ncclFloat32 && op == ncclSum
               ? called(comm, &(const Call){SCATTER, in, out, count, (DeviceStream *)stream})
               : violation();
}

EXPORT ncclResult_t ncclGroupStart(void)
{
    if (batch.depth++ == 0) {
        batch.comm = NULL;
        batch.call = (Call){.kind = EXCHANGE};
    }
    return ncclSuccess;
}

static ncclResult_t part(ncclComm_t comm, cudaStream_t stream, const DeviceGroupPart *one)
{
    if (batch.depth == 0 || batch.call.n_parts == DEVICE_GROUP_PARTS) {
        return violation();
    }
    batch.comm = comm;
    batch.call.stream = (DeviceStream *)stream;
    batch.call.parts[batch.call.n_parts++] = *one;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclSend(const void *data, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream)
{
    return type == ncclUint8
               ? part(comm, stream,
                      &(const DeviceGroupPart){true, (uint32_t)peer, (void *)data, count})
               : violation();
}

EXPORT ncclResult_t ncclRecv(void *data, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream)
{
    return type == ncclUint8
               ? part(comm, stream, &(const DeviceGroupPart){false, (uint32_t)peer, data, count})
               : violation();
}

EXPORT ncclResult_t ncclGroupEnd(void)
{
    if (batch.depth == 0) {
        return violation();
    }
    return --batch.depth > 0 || batch.comm == NULL ? ncclSuccess : called(batch.comm, &batch.call);
}
