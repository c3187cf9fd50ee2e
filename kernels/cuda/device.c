/* DeviceApi by the CUDA runtime. Every call names its device first, so that any thread may make it;
 * a failure is named once, with CUDA's own text kept for error_text(). The driver is asked before
 * anything else, so that a host without one costs nothing and fails in one line. */
#include "kernels/cuda/dense.h"
#include "kernels/cuda/module.h"

#include "kernels/device/group.h"
#include "kernels/device/ops.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct DeviceHandle {
    int index;
    char text[160];
    GMutex mutex;      /* of the two below */
    GHashTable *sizes; /* of what was allocated, by address */
    uint64_t taken;    /* their sum */
};

struct DeviceStream {
    DeviceHandle *device;
    cudaStream_t stream;
    CudaDense *dense; /* or NULL */
    bool dense_asked;
};

struct DeviceEvent {
    DeviceHandle *device;
    cudaEvent_t event;
};

struct DeviceGraph {
    cudaGraphExec_t exec;
};

static DeviceStatus status_of(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return DEVICE_OK;
    case cudaErrorNotReady:
        return DEVICE_NOT_READY;
    case cudaErrorMemoryAllocation:
        return DEVICE_OUT_OF_MEMORY;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNotSupported:
    case cudaErrorUnsupportedPtxVersion:
        return DEVICE_UNSUPPORTED;
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
        return DEVICE_ILLEGAL_ADDRESS;
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
        return DEVICE_ECC;
    case cudaErrorNoDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorInvalidDevice:
    case cudaErrorSystemNotReady:
    case cudaErrorInsufficientDriver:
    case cudaErrorDeviceUninitialized:
    case cudaErrorContained:
        return DEVICE_LOST;
    case cudaErrorLaunchTimeout:
        return DEVICE_STUCK;
    default:
        return DEVICE_FAILED;
    }
}

static DeviceStatus named(DeviceHandle *device, cudaError_t error)
{
    const DeviceStatus status = status_of(error);
    if (status < DEVICE_OK) {
        snprintf(device->text, sizeof device->text, "%s: %s", cudaGetErrorName(error),
                 cudaGetErrorString(error));
        (void)cudaGetLastError(); /* what is not sticky is told once */
    }
    return status;
}

DeviceStatus cuda_result(DeviceStream *stream, int error)
{
    return named(stream->device, (cudaError_t)error);
}

struct CUstream_st *cuda_stream(DeviceStream *stream)
{
    cudaSetDevice(stream->device->index);
    return stream->stream;
}

void cuda_use(DeviceHandle *device)
{
    cudaSetDevice(device->index);
}

DeviceStatus cuda_say(DeviceHandle *device, DeviceStatus status, const char *text)
{
    snprintf(device->text, sizeof device->text, "%s", text);
    return status;
}

void cuda_bus(DeviceHandle *device, char *out, int bytes)
{
    if (cudaDeviceGetPCIBusId(out, bytes, device->index) != cudaSuccess) {
        out[0] = '\0';
    }
}

struct CudaDense *cuda_dense(DeviceStream *stream)
{
    int status;
    if (!stream->dense_asked) {
        stream->dense_asked = true;
        cudaSetDevice(stream->device->index);
        stream->dense = cuda_dense_new(&status);
    }
    return stream->dense;
}

/* ---- the device ---- */

static uint32_t cuda_count(char *why)
{
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaSuccess && n > 0) {
        *why = '\0';
        return (uint32_t)n;
    }
    snprintf(why, 256, "%s",
             error == cudaSuccess ? "the driver knows no device" : cudaGetErrorString(error));
    return 0;
}

static DeviceStatus cuda_open(uint32_t index, DeviceHandle **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    (*out)->index = (int)index;
    g_mutex_init(&(*out)->mutex);
    (*out)->sizes = g_hash_table_new(NULL, NULL);
    cudaError_t error = cudaSetDevice((int)index);
    return named(*out, error == cudaSuccess ? cudaFree(NULL) : error);
}

static void cuda_close(DeviceHandle *device)
{
    if (device != NULL) {
        g_hash_table_unref(device->sizes);
        g_mutex_clear(&device->mutex);
        free(device);
    }
}

static DeviceStatus cuda_info(DeviceHandle *device, DeviceInfo *out)
{
    struct cudaDeviceProp prop;
    int driver = 0, clock_khz = 0, width_bits = 0;
    cudaError_t error = cudaGetDeviceProperties(&prop, device->index);
    if (error == cudaSuccess) {
        error = cudaDriverGetVersion(&driver);
    }
    if (error != cudaSuccess) {
        return named(device, error);
    }
    *out = (DeviceInfo){.kind = "cuda",
                        .index = (uint32_t)device->index,
                        .major = (uint32_t)prop.major,
                        .minor = (uint32_t)prop.minor,
                        .units = (uint32_t)prop.multiProcessorCount,
                        .memory_bytes = prop.totalGlobalMem,
                        .driver = (uint64_t)driver};
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, prop.name);
    snprintf(out->exact_kind, sizeof out->exact_kind, "%.56s, sm_%d%d, CUDA %d.%d", prop.name,
             prop.major, prop.minor, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    snprintf(out->bus, sizeof out->bus, "%04x:%02x:%02x.0", (unsigned)prop.pciDomainID,
             (unsigned)prop.pciBusID, (unsigned)prop.pciDeviceID);
    if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device->index) ==
            cudaSuccess &&
        cudaDeviceGetAttribute(&width_bits, cudaDevAttrGlobalMemoryBusWidth, device->index) ==
            cudaSuccess) {
        out->memory_bytes_per_s = 2e3 * clock_khz * width_bits / 8;
    }
    return DEVICE_OK;
}

static DeviceStatus cuda_memory(DeviceHandle *device, uint64_t *free_bytes, uint64_t *total_bytes)
{
    size_t left = 0, total = 0;
    cudaSetDevice(device->index);
    const cudaError_t error = cudaMemGetInfo(&left, &total);
    *free_bytes = left;
    *total_bytes = total;
    return named(device, error);
}

static uint64_t cuda_taken(DeviceHandle *device)
{
    g_mutex_lock(&device->mutex);
    const uint64_t bytes = device->taken;
    g_mutex_unlock(&device->mutex);
    return bytes;
}

static const char *cuda_error_text(DeviceHandle *device)
{
    return device != NULL ? device->text : "";
}

/* Under the mutex, so that nobody sees the bytes gone and not yet counted (kernels/device/use.h).
 */
static DeviceStatus cuda_alloc(DeviceHandle *device, size_t bytes, void **out)
{
    cudaSetDevice(device->index);
    *out = NULL;
    g_mutex_lock(&device->mutex);
    const DeviceStatus status = named(device, cudaMalloc(out, bytes > 0 ? bytes : 1));
    if (status == DEVICE_OK) {
        g_hash_table_insert(device->sizes, *out, GSIZE_TO_POINTER(bytes));
        device->taken += bytes;
    }
    g_mutex_unlock(&device->mutex);
    return status;
}

static void cuda_free(DeviceHandle *device, void *memory)
{
    if (memory == NULL) {
        return;
    }
    cudaSetDevice(device->index);
    g_mutex_lock(&device->mutex);
    device->taken -= GPOINTER_TO_SIZE(g_hash_table_lookup(device->sizes, memory));
    g_hash_table_remove(device->sizes, memory);
    (void)cudaFree(memory);
    g_mutex_unlock(&device->mutex);
}

/* Known to every device of the process: several ranks may copy from one buffer. */
static DeviceStatus cuda_alloc_pinned(DeviceHandle *device, size_t bytes, void **out)
{
    cudaSetDevice(device->index);
    *out = NULL;
    return named(device, cudaHostAlloc(out, bytes > 0 ? bytes : 1, cudaHostAllocPortable));
}

static void cuda_free_pinned(DeviceHandle *device, void *memory)
{
    cudaSetDevice(device->index);
    (void)cudaFreeHost(memory);
}

/* ---- streams ---- */

static DeviceStatus cuda_stream_new(DeviceHandle *device, DeviceStream **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    (*out)->device = device;
    cudaSetDevice(device->index);
    const DeviceStatus status =
        named(device, cudaStreamCreateWithFlags(&(*out)->stream, cudaStreamNonBlocking));
    if (status != DEVICE_OK) {
        free(*out);
        *out = NULL;
    }
    return status;
}

static DeviceStatus cuda_stream_wait(DeviceStream *stream)
{
    return named(stream->device, cudaStreamSynchronize(cuda_stream(stream)));
}

static void cuda_stream_free(DeviceStream *stream)
{
    if (stream != NULL) {
        (void)cudaStreamSynchronize(cuda_stream(stream));
        (void)cudaStreamDestroy(stream->stream);
        cuda_dense_free(stream->dense);
        free(stream);
    }
}

static enum cudaMemcpyKind kind_of(DeviceCopy direction)
{
    return direction == DEVICE_COPY_UP     ? cudaMemcpyHostToDevice
           : direction == DEVICE_COPY_DOWN ? cudaMemcpyDeviceToHost
                                           : cudaMemcpyDeviceToDevice;
}

static DeviceStatus cuda_copy(DeviceStream *stream, void *to, const void *from, size_t bytes,
                              DeviceCopy direction)
{
    return named(stream->device,
                 cudaMemcpyAsync(to, from, bytes, kind_of(direction), cuda_stream(stream)));
}

static DeviceStatus cuda_copy_rows(DeviceStream *stream, void *to, size_t to_pitch,
                                   const void *from, size_t from_pitch, size_t bytes, size_t rows,
                                   DeviceCopy direction)
{
    return named(stream->device, cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows,
                                                   kind_of(direction), cuda_stream(stream)));
}

static DeviceStatus cuda_fill(DeviceStream *stream, void *to, uint8_t byte, size_t bytes)
{
    return named(stream->device, cudaMemsetAsync(to, byte, bytes, cuda_stream(stream)));
}

/* ---- events ---- */

static DeviceStatus cuda_event_new(DeviceHandle *device, DeviceEvent **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    (*out)->device = device;
    cudaSetDevice(device->index);
    const DeviceStatus status =
        named(device, cudaEventCreateWithFlags(&(*out)->event, cudaEventDisableTiming));
    if (status != DEVICE_OK) {
        free(*out);
        *out = NULL;
    }
    return status;
}

static void cuda_event_free(DeviceEvent *event)
{
    if (event != NULL) {
        (void)cudaEventDestroy(event->event);
        free(event);
    }
}

static DeviceStatus cuda_event_record(DeviceEvent *event, DeviceStream *stream)
{
    return named(stream->device, cudaEventRecord(event->event, cuda_stream(stream)));
}

static DeviceStatus cuda_event_query(DeviceEvent *event)
{
    const cudaError_t error = cudaEventQuery(event->event);
    if (error == cudaErrorNotReady) {
        (void)cudaGetLastError(); /* or the next launch would be told it */
    }
    return named(event->device, error);
}

static DeviceStatus cuda_event_wait(DeviceEvent *event)
{
    return named(event->device, cudaEventSynchronize(event->event));
}

static DeviceStatus cuda_event_before(DeviceEvent *event, DeviceStream *stream)
{
    return named(stream->device, cudaStreamWaitEvent(cuda_stream(stream), event->event, 0));
}

/* ---- graphs ---- */

static DeviceStatus cuda_graph_begin(DeviceStream *stream)
{
    return named(stream->device,
                 cudaStreamBeginCapture(cuda_stream(stream), cudaStreamCaptureModeThreadLocal));
}

static DeviceStatus cuda_graph_end(DeviceStream *stream, DeviceGraph **out)
{
    cudaGraph_t graph = NULL;
    *out = NULL;
    cudaError_t error = cudaStreamEndCapture(cuda_stream(stream), &graph);
    if (error != cudaSuccess) {
        return named(stream->device, error);
    }
    DeviceGraph *made = calloc(1, sizeof *made);
    error = made != NULL ? cudaGraphInstantiate(&made->exec, graph, 0) : cudaErrorMemoryAllocation;
    (void)cudaGraphDestroy(graph);
    if (error != cudaSuccess) {
        free(made);
        return named(stream->device, error);
    }
    *out = made;
    return DEVICE_OK;
}

static DeviceStatus cuda_graph_launch(DeviceGraph *graph, DeviceStream *stream)
{
    return named(stream->device, cudaGraphLaunch(graph->exec, cuda_stream(stream)));
}

static void cuda_graph_free(DeviceGraph *graph)
{
    if (graph != NULL) {
        (void)cudaGraphExecDestroy(graph->exec);
        free(graph);
    }
}

static const DeviceApi cuda_api = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceApi),
    .kind = "cuda",
    .count = cuda_count,
    .open = cuda_open,
    .close = cuda_close,
    .info = cuda_info,
    .memory = cuda_memory,
    .taken = cuda_taken,
    .error_text = cuda_error_text,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .alloc_pinned = cuda_alloc_pinned,
    .free_pinned = cuda_free_pinned,
    .stream_new = cuda_stream_new,
    .stream_free = cuda_stream_free,
    .stream_wait = cuda_stream_wait,
    .copy = cuda_copy,
    .copy_rows = cuda_copy_rows,
    .fill = cuda_fill,
    .event_new = cuda_event_new,
    .event_free = cuda_event_free,
    .event_record = cuda_event_record,
    .event_query = cuda_event_query,
    .event_wait = cuda_event_wait,
    .event_before = cuda_event_before,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_launch = cuda_graph_launch,
    .graph_free = cuda_graph_free,
};

__attribute__((visibility("default"))) const DeviceModule *weft_device_module(void);
const DeviceModule *weft_device_module(void)
{
    static char version[64];
    static const DeviceModule module = {.abi = DEVICE_ABI,
                                        .bytes = sizeof(DeviceModule),
                                        .version = version,
                                        .api = &cuda_api,
#ifdef WEFT_WITH_NCCL /* nccl.h was there */
                                        .group = &cuda_group,
#endif
                                        .ops = &cuda_ops,
                                        .train_ops = &cuda_train_ops};
    char nccl[256] = "";
    const bool usable = module.group != NULL && module.group->usable(nccl);
    snprintf(version, sizeof version, "CUDA %d.%d, %.32s", CUDART_VERSION / 1000,
             CUDART_VERSION % 1000 / 10, usable ? nccl : "no NCCL");
    return &module;
}
