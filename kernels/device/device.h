/* Device: where a rank's weights, KV pages and activations lie and its ops run. The seam is four
 * things: DeviceApi, a table of memory, streams, events and graphs; DeviceOps (ops.h), a table of
 * the forward path's ops; DeviceTrainOps (train_ops.h), those of training; and the loader below,
 * which finds the CPU's fill in this library and CUDA's in a shared module. Nothing above kernels/
 * and worker/ knows a device's kind.
 *
 * Addresses: what alloc() returns may be dereferenced by ops only; pinned memory by the host and
 * by copies. Order: what is enqueued on one stream runs in order; nothing enqueued is done, nor
 * may its operands be changed or freed, before the stream, or an event recorded after it, was
 * waited for. The CPU device holds callers to that: it runs nothing before it is waited
 * for, or an event behind it is asked for.
 *
 * Threads: any thread may call, one at a time for each stream. A status other than OK and NOT_READY
 * is final for the device where device_status_is_fatal() says so: every later call fails likewise,
 * and the owner ends its epoch. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Raised with each change of a table or struct here, in ops.h or in train_ops.h. */
#define DEVICE_ABI 7u

typedef enum DeviceStatus {
    DEVICE_OK = 0,
    DEVICE_NOT_READY = 1,        /* an event that is yet to come */
    DEVICE_OUT_OF_MEMORY = -1,   /* nothing was allocated; the device lives */
    DEVICE_UNSUPPORTED = -2,     /* by this device or this build; nothing was enqueued */
    DEVICE_ILLEGAL_ADDRESS = -3, /* an op read or wrote beside its memory: our bug */
    DEVICE_ECC = -4,             /* an uncorrectable memory error */
    DEVICE_LOST = -5,            /* fallen off the bus, reset, or its driver is gone */
    DEVICE_STUCK = -6,           /* a kernel ran into the driver's time limit */
    DEVICE_FAILED = -7,          /* anything else; api->error_text() says what */
    DEVICE_GROUP_FAILED = -8,    /* a group of devices has ended (group.h); the device lives */
} DeviceStatus;
const char *device_status_name(DeviceStatus status); /* "illegal address"; static */
bool device_status_is_fatal(DeviceStatus status);

#define DEVICE_KIND_BYTES 96u
typedef struct DeviceInfo {
    char kind[16]; /* "cpu" | "cuda" */
    char name[96]; /* "NVIDIA H200" */
    char bus[32];  /* "0000:0f:00.0", empty for the CPU */
    /* Whose bits of class exact these are: devices of equal kinds give the same ones. "NVIDIA H200,
     * sm_90, CUDA 13.0"; empty: the host's own. */
    char exact_kind[DEVICE_KIND_BYTES];
    uint32_t index;            /* among devices of its kind on this host */
    uint32_t major, minor;     /* compute capability; 0 for the CPU */
    uint32_t units;            /* multiprocessors, or threads */
    uint64_t memory_bytes;     /* in all */
    uint64_t driver;           /* version, 13000 = 13.0; 0 for the CPU */
    double memory_bytes_per_s; /* what the memory's clock and width give; 0 = not known */
} DeviceInfo;

typedef enum DeviceCopy { DEVICE_COPY_UP, DEVICE_COPY_DOWN, DEVICE_COPY_WITHIN } DeviceCopy;

typedef struct DeviceHandle DeviceHandle; /* opened device */
typedef struct DeviceStream DeviceStream;
typedef struct DeviceEvent DeviceEvent;
typedef struct DeviceGraph DeviceGraph;

typedef struct DeviceApi {
    uint32_t abi;   /* DEVICE_ABI */
    uint32_t bytes; /* sizeof(DeviceApi): both must agree before anything else is read */
    const char *kind;
    /* How many devices there are. 0: `why` (256 bytes) says why, in one line. */
    uint32_t (*count)(char *why);
    DeviceStatus (*open)(uint32_t index, DeviceHandle **out);
    void (*close)(DeviceHandle *device); /* NULL-safe; frees nothing that was allocated on it */
    DeviceStatus (*info)(DeviceHandle *device, DeviceInfo *out);
    DeviceStatus (*memory)(DeviceHandle *device, uint64_t *free_bytes, uint64_t *total_bytes);
    /* Bytes that alloc() gave and free() did not get; UINT64_MAX: what memory() says to be free
     * tells nothing of this device. */
    uint64_t (*taken)(DeviceHandle *device);
    const char *(*error_text)(
        DeviceHandle *device); /* of the last failure; borrowed until the next */

    DeviceStatus (*alloc)(DeviceHandle *device, size_t bytes, void **out); /* aligned to 256 */
    void (*free)(DeviceHandle *device, void *memory);                      /* NULL-safe */
    DeviceStatus (*alloc_pinned)(DeviceHandle *device, size_t bytes, void **out);
    void (*free_pinned)(DeviceHandle *device, void *memory);

    DeviceStatus (*stream_new)(DeviceHandle *device, DeviceStream **out);
    void (*stream_free)(DeviceStream *stream);         /* waits for it */
    DeviceStatus (*stream_wait)(DeviceStream *stream); /* the host, until all of it is done */
    /* The host side of a copy is pinned memory. */
    DeviceStatus (*copy)(DeviceStream *stream, void *to, const void *from, size_t bytes,
                         DeviceCopy direction);
    /* `rows` runs of `bytes`, to_pitch and from_pitch apart. */
    DeviceStatus (*copy_rows)(DeviceStream *stream, void *to, size_t to_pitch, const void *from,
                              size_t from_pitch, size_t bytes, size_t rows, DeviceCopy direction);
    DeviceStatus (*fill)(DeviceStream *stream, void *to, uint8_t byte, size_t bytes);

    DeviceStatus (*event_new)(DeviceHandle *device, DeviceEvent **out);
    void (*event_free)(DeviceEvent *event);
    DeviceStatus (*event_record)(DeviceEvent *event, DeviceStream *stream);
    DeviceStatus (*event_query)(DeviceEvent *event); /* OK or NOT_READY; never recorded = OK */
    DeviceStatus (*event_wait)(DeviceEvent *event);  /* the host */
    DeviceStatus (*event_before)(DeviceEvent *event,
                                 DeviceStream *stream); /* stream waits for it */

    /* From begin to end what is enqueued on the stream is kept, not run; addresses and numbers are
     * those of that time, what they point to that of each launch. Waiting for the stream or
     * allocating between them is an error. */
    DeviceStatus (*graph_begin)(DeviceStream *stream);
    DeviceStatus (*graph_end)(DeviceStream *stream, DeviceGraph **out);
    DeviceStatus (*graph_launch)(DeviceGraph *graph, DeviceStream *stream);
    void (*graph_free)(DeviceGraph *graph); /* NULL-safe; no launch of it is under way */
} DeviceApi;

struct DeviceOps;
struct DeviceGroupApi;
struct DeviceTrainOps;
struct DeviceUse;

/* What a module gives: the symbol `weft_device_module`, a function without arguments. */
typedef struct DeviceModule {
    uint32_t abi, bytes; /* DEVICE_ABI, sizeof(DeviceModule) */
    const char *version; /* "CUDA 13.0, cuBLAS 13.0.2, NCCL 2.28.9", for --version */
    const DeviceApi *api;
    const struct DeviceOps *ops;
    const struct DeviceGroupApi *group; /* group.h; NULL: this build makes none */
    const struct DeviceTrainOps *train_ops;
} DeviceModule;
typedef const DeviceModule *(*DeviceModuleFn)(void);
#define DEVICE_MODULE_SYMBOL "weft_device_module"

/* An opened device with its tables. */
typedef struct Device {
    const DeviceApi *api;
    const struct DeviceOps *ops;
    const struct DeviceGroupApi *group;
    const struct DeviceTrainOps *train_ops;
    DeviceHandle *handle;
    struct DeviceUse *use; /* use.h; NULL: not asked */
    DeviceInfo info;
} Device;

typedef enum DeviceKind { DEVICE_KIND_CPU, DEVICE_KIND_CUDA, DEVICE_KIND_AUTO } DeviceKind;
#define DEVICES_LIMIT 64u /* that one worker leads */
typedef struct DeviceChoice {
    DeviceKind kind;
    uint32_t index;     /* the first, or the only one */
    bool indexed, all;  /* numbers, or "all" were said */
    uint32_t n_indices; /* 0: none said */
    uint32_t indices[DEVICES_LIMIT];
} DeviceChoice;
/* "cpu", "cuda", "cuda:N", "cuda:0,2,3", "cuda:all", "auto", and in test builds "cpu:N", which is N
 * trivial devices; INVALID with what may be said instead. */
bool device_choice_parse(const char *text, DeviceChoice *out, GError **error);

/* The module of CUDA devices, loaded at most once and never unloaded; NULL + error: no driver, no
 * device, no module, or one of another ABI, each with what to do. `path` NULL: $WEFT_MODULES, the
 * folder it was installed to, or the one beside this program's build. Any thread. */
const DeviceModule *device_module_cuda(const char *path, GError **error);
/* NULL, or why this host's driver cannot serve; the first thing asked, costs microseconds. */
const char *device_driver_missing(void);
/* The CPU's own tables: allocate, copy, stream, event and graph in host memory, ops by `kernels`
 * (cpu_ops.h). Static. */
const DeviceModule *device_module_cpu(void);

/* Opens a device; NULL + error. A CPU choice is the trivial device. */
Device *device_open(const DeviceChoice *choice, GError **error);
/* All that were chosen, in that order; returned, of Device, owned by the array. */
GPtrArray *device_open_all(const DeviceChoice *choice, GError **error);
Device *device_open_module(const DeviceModule *module, uint32_t index, GError **error);
void device_free(Device *device); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Device, device_free)

/* The status as an error of the worker: "cuda:0 (NVIDIA H200): what: illegal address (...): what to
 * do". OK sets nothing and returns true. */
bool device_check(const Device *device, DeviceStatus status, const char *what, GError **error);
/* "cuda:0 (NVIDIA H200, 139.8G)"; returned. */
char *device_describe(const DeviceInfo *info);
