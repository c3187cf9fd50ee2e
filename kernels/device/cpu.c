/* The trivial device: host memory, and streams that are queues of closures.
 *
 * Nothing enqueued runs before somebody waits for its stream or an event behind it, and each query
 * of an event lets its stream take one step: what a caller reads, changes or frees too early goes
 * wrong on every run, not on some. A graph is a queue
 * that was kept instead of run. Events count their recordings: one is done when the queue has
 * passed the recording last made. A task that waits for others (a collective, an event of another
 * stream) stays at the head of its queue until it is done; a thread that waits for such a stream
 * yields. There are as many of these devices as somebody opens.
 *
 * Fail points "device-fail" and, of one device, "device-fail-<index>" = n: the next wait returns
 * status -n, and so does everything after it. "device-kind" and "device-kind-<index>" = n: it says
 * that its bits are those of a kind of its own, number n. "device-beside" = n: it has 2^40 bytes,
 * of which n are gone beside what was allocated as soon as anything was.
 */
#include "kernels/device/cpu.h"

#include "kernels/parallel.h"
#include "proto/base/failpoint.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CPU_DEVICES 64u

struct DeviceHandle {
    uint32_t index;
    atomic_size_t bytes; /* allocated */
    DeviceStatus failed; /* OK, or what ended it */
    char text[128];
};

typedef struct Task {
    struct Task *next;
    void (*run)(void *args);   /* or NULL */
    bool (*until)(void *args); /* then this, until it is true */
    size_t bytes;
    _Alignas(max_align_t) uint8_t args[];
} Task;

typedef struct Queue {
    Task *first, **end;
} Queue;

struct DeviceStream {
    DeviceHandle *device;
    Queue queue;
    DeviceGraph *capturing; /* or NULL */
};

struct DeviceGraph {
    Queue queue;
};

struct DeviceEvent {
    DeviceHandle *device;
    DeviceStream *stream; /* of the last recording */
    uint64_t recorded, passed;
};

/* ---- queues ---- */

static void queue_init(Queue *q)
{
    q->first = NULL;
    q->end = &q->first;
}

static DeviceStatus queue_push(Queue *q, const Task *like, const void *args)
{
    Task *task = malloc(sizeof *task + like->bytes);
    if (task == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    *task = (Task){.run = like->run, .until = like->until, .bytes = like->bytes};
    memcpy(task->args, args, like->bytes);
    *q->end = task;
    q->end = &task->next;
    return DEVICE_OK;
}

static Task *queue_pop(Queue *q)
{
    Task *task = q->first;
    q->first = task->next;
    if (q->first == NULL) {
        q->end = &q->first;
    }
    return task;
}

static void queue_clear(Queue *q)
{
    while (q->first != NULL) {
        free(queue_pop(q));
    }
}

typedef enum Turn { TURN_NONE, TURN_DONE, TURN_BLOCKED } Turn;

/* Runs the next task, if there is one and it can go on. */
static Turn stream_turn(DeviceStream *stream)
{
    Task *task = stream->queue.first;
    if (task == NULL) {
        return TURN_NONE;
    }
    if (task->run != NULL) {
        task->run(task->args);
    } else if (!task->until(task->args)) {
        return TURN_BLOCKED;
    }
    free(queue_pop(&stream->queue));
    return TURN_DONE;
}

/* Runs all of it, however long others take. */
static void stream_drain(DeviceStream *stream)
{
    Turn turn;
    while ((turn = stream_turn(stream)) != TURN_NONE) {
        if (turn == TURN_BLOCKED) {
            sched_yield();
        }
    }
}

DeviceStatus device_cpu_fail(DeviceHandle *device, DeviceStatus status, const char *text)
{
    g_strlcpy(device->text, text, sizeof device->text);
    if (device_status_is_fatal(status)) {
        device->failed = status;
    }
    return status;
}

uint32_t device_cpu_index(const DeviceHandle *device)
{
    return device->index;
}

static DeviceStatus enqueue(DeviceStream *stream, const Task *like, const void *args)
{
    if (stream->device->failed != DEVICE_OK) {
        return stream->device->failed;
    }
    return queue_push(stream->capturing != NULL ? &stream->capturing->queue : &stream->queue, like,
                      args);
}

DeviceStatus device_cpu_enqueue(DeviceStream *stream, void (*run)(void *), const void *args,
                                size_t bytes)
{
    return enqueue(stream, &(const Task){.run = run, .bytes = bytes}, args);
}

DeviceStatus device_cpu_enqueue_until(DeviceStream *stream, bool (*run)(void *), const void *args,
                                      size_t bytes)
{
    return enqueue(stream, &(const Task){.until = run, .bytes = bytes}, args);
}

/* A fail point of all trivial devices, or of this one. */
static bool is_set(const DeviceHandle *device, const char *point, int64_t *arg)
{
    char own[32];
    snprintf(own, sizeof own, "%s-%u", point, device->index);
    return failpoint(point, arg) || failpoint(own, arg);
}

/* Before a wait: the fail point, and that no graph is being made. */
static DeviceStatus may_wait(DeviceHandle *device, const DeviceStream *stream)
{
    int64_t n;
    if (device->failed == DEVICE_OK && is_set(device, "device-fail", &n)) {
        return device_cpu_fail(device, (DeviceStatus)-n, "fail point device-fail");
    }
    if (device->failed == DEVICE_OK && stream != NULL && stream->capturing != NULL) {
        return device_cpu_fail(device, DEVICE_FAILED, "a wait inside a graph");
    }
    return device->failed;
}

/* ---- the device ---- */

static uint32_t cpu_count(char *why)
{
    *why = '\0';
    return CPU_DEVICES;
}

static DeviceStatus cpu_open(uint32_t index, DeviceHandle **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    (*out)->index = index;
    return DEVICE_OK;
}

static void cpu_close(DeviceHandle *device)
{
    free(device);
}

static uint64_t host_bytes(int name)
{
    const long pages = sysconf(name), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 0;
}

static DeviceStatus cpu_info(DeviceHandle *device, DeviceInfo *out)
{
    int64_t kind;
    *out = (DeviceInfo){.kind = "cpu",
                        .name = "host",
                        .index = device->index,
                        .units = g_get_num_processors(),
                        .memory_bytes = host_bytes(_SC_PHYS_PAGES)};
    if (is_set(device, "device-kind", &kind)) {
        snprintf(out->exact_kind, sizeof out->exact_kind, "trivial, kind %d", (int)kind);
    }
    return DEVICE_OK;
}

static DeviceStatus cpu_memory(DeviceHandle *device, uint64_t *free_bytes, uint64_t *total_bytes)
{
    const uint64_t taken = atomic_load(&device->bytes);
    int64_t beside;
    *free_bytes = host_bytes(_SC_AVPHYS_PAGES);
    *total_bytes = host_bytes(_SC_PHYS_PAGES);
    if (is_set(device, "device-beside", &beside)) {
        *total_bytes = UINT64_C(1) << 40;
        *free_bytes = *total_bytes - taken - (taken > 0 ? (uint64_t)beside : 0);
    }
    return device->failed;
}

static uint64_t cpu_taken(DeviceHandle *device)
{
    int64_t beside;
    return is_set(device, "device-beside", &beside) ? atomic_load(&device->bytes) : UINT64_MAX;
}

static const char *cpu_error_text(DeviceHandle *device)
{
    return device != NULL ? device->text : "";
}

size_t device_cpu_bytes(const DeviceHandle *device)
{
    return atomic_load(&((DeviceHandle *)device)->bytes);
}

/* All ones: floats that were never written are NaN. */
static DeviceStatus cpu_alloc_pinned(DeviceHandle *device, size_t bytes, void **out)
{
    if (device->failed != DEVICE_OK) {
        return device->failed;
    }
    if (posix_memalign(out, 256, bytes > 0 ? bytes : 1) != 0) {
        char text[64];
        snprintf(text, sizeof text, "%zu bytes", bytes);
        *out = NULL;
        return device_cpu_fail(device, DEVICE_OUT_OF_MEMORY, text);
    }
    memset(*out, 0xff, bytes);
    return DEVICE_OK;
}

static void cpu_free_pinned(DeviceHandle *device, void *memory)
{
    (void)device;
    free(memory);
}

#define HEADER 256u /* in front of what lies on the device: its size */

static DeviceStatus cpu_alloc(DeviceHandle *device, size_t bytes, void **out)
{
    const DeviceStatus status =
        cpu_alloc_pinned(device, bytes < SIZE_MAX - HEADER ? HEADER + bytes : bytes, out);
    if (status == DEVICE_OK) {
        memcpy(*out, &bytes, sizeof bytes);
        *out = (uint8_t *)*out + HEADER;
        atomic_fetch_add(&device->bytes, bytes);
    }
    return status;
}

static void cpu_free(DeviceHandle *device, void *memory)
{
    size_t bytes;
    if (memory != NULL) {
        memory = (uint8_t *)memory - HEADER;
        memcpy(&bytes, memory, sizeof bytes);
        atomic_fetch_sub(&device->bytes, bytes);
        free(memory);
    }
}

/* ---- streams ---- */

static DeviceStatus cpu_stream_new(DeviceHandle *device, DeviceStream **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    (*out)->device = device;
    queue_init(&(*out)->queue);
    return DEVICE_OK;
}

static DeviceStatus cpu_stream_wait(DeviceStream *stream)
{
    const DeviceStatus status = may_wait(stream->device, stream);
    if (status != DEVICE_OK) {
        return status;
    }
    pool_float_control();
    stream_drain(stream);
    return stream->device->failed;
}

static void cpu_graph_free(DeviceGraph *graph)
{
    if (graph != NULL) {
        queue_clear(&graph->queue);
        free(graph);
    }
}

static void cpu_stream_free(DeviceStream *stream)
{
    if (stream == NULL) {
        return;
    }
    cpu_graph_free(stream->capturing);
    if (stream->device->failed == DEVICE_OK) {
        stream_drain(stream);
    }
    queue_clear(&stream->queue);
    free(stream);
}

typedef struct CopyArgs {
    uint8_t *to;
    const uint8_t *from;
    size_t to_pitch, from_pitch, bytes, rows;
} CopyArgs;

static void run_copy(void *args)
{
    const CopyArgs *c = args;
    for (size_t r = 0; r < c->rows && c->bytes > 0; r++) {
        memmove(c->to + r * c->to_pitch, c->from + r * c->from_pitch, c->bytes);
    }
}

static DeviceStatus cpu_copy_rows(DeviceStream *stream, void *to, size_t to_pitch, const void *from,
                                  size_t from_pitch, size_t bytes, size_t rows,
                                  DeviceCopy direction)
{
    const CopyArgs args = {to, from, to_pitch, from_pitch, bytes, rows};
    (void)direction;
    return device_cpu_enqueue(stream, run_copy, &args, sizeof args);
}

static DeviceStatus cpu_copy(DeviceStream *stream, void *to, const void *from, size_t bytes,
                             DeviceCopy direction)
{
    return cpu_copy_rows(stream, to, bytes, from, bytes, bytes, 1, direction);
}

typedef struct FillArgs {
    void *to;
    size_t bytes;
    uint8_t byte;
} FillArgs;

static void run_fill(void *args)
{
    const FillArgs *f = args;
    memset(f->to, f->byte, f->bytes);
}

static DeviceStatus cpu_fill(DeviceStream *stream, void *to, uint8_t byte, size_t bytes)
{
    const FillArgs args = {to, bytes, byte};
    return device_cpu_enqueue(stream, run_fill, &args, sizeof args);
}

/* ---- events ---- */

static DeviceStatus cpu_event_new(DeviceHandle *device, DeviceEvent **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    (*out)->device = device;
    return DEVICE_OK;
}

static void cpu_event_free(DeviceEvent *event)
{
    free(event);
}

static void run_passed(void *args)
{
    (*(DeviceEvent **)args)->passed++;
}

static DeviceStatus cpu_event_record(DeviceEvent *event, DeviceStream *stream)
{
    const DeviceStatus status = device_cpu_enqueue(stream, run_passed, &event, sizeof event);
    if (status == DEVICE_OK && stream->capturing == NULL) {
        event->stream = stream;
        event->recorded++;
    }
    return status;
}

static DeviceStatus cpu_event_query(DeviceEvent *event)
{
    const DeviceStatus status = may_wait(event->device, event->stream);
    if (status != DEVICE_OK) {
        return status;
    }
    pool_float_control();
    if (event->passed < event->recorded && stream_turn(event->stream) == TURN_BLOCKED) {
        sched_yield(); /* to whom it waits for: there may be more ranks than cores */
    }
    return event->passed >= event->recorded ? event->device->failed : DEVICE_NOT_READY;
}

/* Runs the stream up to a recording, or to its end where that was never made; false: it stands. */
static bool event_reach(DeviceEvent *event, uint64_t recording)
{
    Turn turn = TURN_DONE;
    while (event->passed < recording && turn == TURN_DONE) {
        turn = stream_turn(event->stream);
    }
    return turn != TURN_BLOCKED;
}

static DeviceStatus cpu_event_wait(DeviceEvent *event)
{
    const DeviceStatus status = may_wait(event->device, event->stream);
    if (status != DEVICE_OK) {
        return status;
    }
    pool_float_control();
    while (!event_reach(event, event->recorded)) {
        sched_yield();
    }
    return event->device->failed;
}

typedef struct BeforeArgs {
    DeviceEvent *event;
    uint64_t recording;
} BeforeArgs;

static bool run_before(void *args)
{
    const BeforeArgs *b = args;
    return event_reach(b->event, b->recording);
}

static DeviceStatus cpu_event_before(DeviceEvent *event, DeviceStream *stream)
{
    const BeforeArgs args = {event, event->recorded};
    return device_cpu_enqueue_until(stream, run_before, &args, sizeof args);
}

/* ---- graphs ---- */

static DeviceStatus cpu_graph_begin(DeviceStream *stream)
{
    if (stream->device->failed != DEVICE_OK) {
        return stream->device->failed;
    }
    if (stream->capturing != NULL) {
        return device_cpu_fail(stream->device, DEVICE_FAILED, "a graph inside a graph");
    }
    stream->capturing = calloc(1, sizeof *stream->capturing);
    if (stream->capturing == NULL) {
        return DEVICE_OUT_OF_MEMORY;
    }
    queue_init(&stream->capturing->queue);
    return DEVICE_OK;
}

static DeviceStatus cpu_graph_end(DeviceStream *stream, DeviceGraph **out)
{
    *out = stream->capturing;
    stream->capturing = NULL;
    if (*out == NULL) {
        return device_cpu_fail(stream->device, DEVICE_FAILED,
                               "the end of a graph that was not begun");
    }
    if (stream->device->failed != DEVICE_OK) {
        cpu_graph_free(*out);
        *out = NULL;
    }
    return stream->device->failed;
}

static DeviceStatus cpu_graph_launch(DeviceGraph *graph, DeviceStream *stream)
{
    DeviceStatus status = stream->device->failed;
    for (const Task *task = graph->queue.first; task != NULL && status == DEVICE_OK;
         task = task->next) {
        status = enqueue(stream, task, task->args);
    }
    return status;
}

const DeviceApi device_cpu_api = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceApi),
    .kind = "cpu",
    .count = cpu_count,
    .open = cpu_open,
    .close = cpu_close,
    .info = cpu_info,
    .memory = cpu_memory,
    .taken = cpu_taken,
    .error_text = cpu_error_text,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .alloc_pinned = cpu_alloc_pinned,
    .free_pinned = cpu_free_pinned,
    .stream_new = cpu_stream_new,
    .stream_free = cpu_stream_free,
    .stream_wait = cpu_stream_wait,
    .copy = cpu_copy,
    .copy_rows = cpu_copy_rows,
    .fill = cpu_fill,
    .event_new = cpu_event_new,
    .event_free = cpu_event_free,
    .event_record = cpu_event_record,
    .event_query = cpu_event_query,
    .event_wait = cpu_event_wait,
    .event_before = cpu_event_before,
    .graph_begin = cpu_graph_begin,
    .graph_end = cpu_graph_end,
    .graph_launch = cpu_graph_launch,
    .graph_free = cpu_graph_free,
};
