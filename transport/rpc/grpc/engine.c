/* Problem. gRPC core completes operations on the threads that poll its queue; weft's state lives on
 * Loops. One thread polls for the whole process and hands each completion to the Loop of the object
 * that asked for it.
 *
 * Invariants
 *   1. The queue outlives every tag: an owner releases the engine only when nothing of it is
 *      outstanding.
 *   2. A sink posts to its Loop only under its mutex while it is open, so that nothing reaches a
 *      Loop that may be gone.
 *   3. At most one drain is posted at a time; completions run in the order in which gRPC gave them.
 *   4. Somebody always polls: without it reconnects and deaths would be noticed only every 5 s.
 *   5. A process that exits while the engine is in use (a channel whose calls did not end in time)
 *      leaves at once: the polling thread is inside gRPC, whose globals exit() would take away. */
#include "transport/rpc/grpc/engine.h"

#include "proto/base/failpoint.h"
#include "transport/crypto/x509.h"

#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOG_LINES_PER_SECOND 5
#define DRAIN_BATCH 256

static struct {
    pthread_mutex_t mutex;
    unsigned users;
    bool watches_exit;
    grpc_completion_queue *queue;
    GThread *thread;
} engine = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static struct {
    pthread_mutex_t mutex;
    GSList *logs;
    time_t second;
    unsigned lines;
    int muted;
} core_log = {.mutex = PTHREAD_MUTEX_INITIALIZER};

struct EventSink {
    atomic_uint refs; /* owner, the polling thread while it pushes, a posted drain */
    pthread_mutex_t mutex;
    pthread_cond_t arrived;
    Loop *loop; /* NULL: closed */
    EventTag *head, **tail;
    bool posted;
};

/* ---- gRPC core's log ------------------------------------------------------------------------- */

static bool may_log(void)
{
    time_t now = time(NULL);
    if (now != core_log.second) {
        core_log.second = now;
        core_log.lines = 0;
    }
    return core_log.lines++ < LOG_LINES_PER_SECOND;
}

/* A client that tries by which of our names a server goes: its own check of the certificate
 * decides, and there is nothing to do about it here. */
static bool is_of_the_client(const char *message)
{
    return strncmp(message, "No match found for server name", 30) == 0;
}

static void on_core_log(gpr_log_func_args *arguments)
{
    pthread_mutex_lock(&core_log.mutex);
    if (core_log.logs && core_log.muted == 0 && !is_of_the_client(arguments->message) &&
        may_log()) {
        log_warn(core_log.logs->data, "grpc: %s", arguments->message);
    }
    pthread_mutex_unlock(&core_log.mutex);
}

void engine_mute_log(bool on)
{
    pthread_mutex_lock(&core_log.mutex);
    core_log.muted += on ? 1 : -1;
    pthread_mutex_unlock(&core_log.mutex);
}

void engine_add_log(Log *log)
{
    if (log) {
        pthread_mutex_lock(&core_log.mutex);
        core_log.logs = g_slist_prepend(core_log.logs, log);
        pthread_mutex_unlock(&core_log.mutex);
    }
}

void engine_remove_log(Log *log)
{
    pthread_mutex_lock(&core_log.mutex);
    core_log.logs = g_slist_remove(core_log.logs, log);
    pthread_mutex_unlock(&core_log.mutex);
}

/* ---- the sink -------------------------------------------------------------------------------- */

static void sink_unref(EventSink *sink)
{
    if (atomic_fetch_sub(&sink->refs, 1) == 1) {
        pthread_mutex_destroy(&sink->mutex);
        pthread_cond_destroy(&sink->arrived);
        g_free(sink);
    }
}

EventSink *event_sink_new(Loop *loop)
{
    EventSink *sink = g_new0(EventSink, 1);
    atomic_init(&sink->refs, 1);
    pthread_mutex_init(&sink->mutex, NULL);
    pthread_cond_init(&sink->arrived, NULL);
    sink->loop = loop;
    sink->tail = &sink->head;
    return sink;
}

void event_sink_close(EventSink *sink)
{
    pthread_mutex_lock(&sink->mutex);
    sink->loop = NULL;
    pthread_mutex_unlock(&sink->mutex);
}

void event_sink_free(EventSink *sink)
{
    event_sink_close(sink);
    g_assert(!sink->head);
    sink_unref(sink);
}

void event_tag_init(EventTag *tag, EventSink *sink, EventFn fn, void *owner)
{
    *tag = (EventTag){.sink = sink, .fn = fn, .owner = owner};
}

static EventTag *sink_pop(EventSink *sink)
{
    EventTag *tag = sink->head;
    if (tag) {
        sink->head = tag->next;
        if (!sink->head) {
            sink->tail = &sink->head;
        }
    }
    return tag;
}

static void drain(void *user);

/* with the mutex held */
static void post_drain(EventSink *sink)
{
    if (sink->loop && !sink->posted) {
        sink->posted = true;
        atomic_fetch_add(&sink->refs, 1);
        loop_post(sink->loop, drain, sink);
    }
}

static void drain(void *user)
{
    EventSink *sink = user;
    pthread_mutex_lock(&sink->mutex);
    sink->posted = false;
    for (int n = 0; n < DRAIN_BATCH && sink->loop && sink->head; n++) {
        EventTag *tag = sink_pop(sink);
        pthread_mutex_unlock(&sink->mutex);
        tag->fn(tag, tag->ok);
        pthread_mutex_lock(&sink->mutex);
    }
    if (sink->head) {
        post_drain(sink);
    }
    pthread_mutex_unlock(&sink->mutex);
    sink_unref(sink);
}

static void sink_push(EventTag *tag, bool ok)
{
    EventSink *sink = tag->sink;
    atomic_fetch_add(&sink->refs, 1);
    pthread_mutex_lock(&sink->mutex);
    tag->ok = ok;
    tag->next = NULL;
    *sink->tail = tag;
    sink->tail = &tag->next;
    pthread_cond_signal(&sink->arrived);
    post_drain(sink);
    pthread_mutex_unlock(&sink->mutex);
    sink_unref(sink);
}

static void wait_arrived(EventSink *sink, int64_t at_most_us)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    int64_t ns = until.tv_nsec + at_most_us % 1000000 * 1000;
    until.tv_sec += at_most_us / 1000000 + ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    pthread_cond_clockwait(&sink->arrived, &sink->mutex, CLOCK_MONOTONIC, &until);
}

bool event_sink_run_until(EventSink *sink, bool (*done)(void *user), void *user, int64_t until_us)
{
    while (!done(user)) {
        pthread_mutex_lock(&sink->mutex);
        int64_t left_us = until_us - loop_now_us(sink->loop);
        if (!sink->head && left_us > 0) {
            wait_arrived(sink, left_us);
        }
        EventTag *tag = sink_pop(sink);
        pthread_mutex_unlock(&sink->mutex);
        if (tag) {
            tag->fn(tag, tag->ok);
        } else if (left_us <= 0) {
            return false;
        }
    }
    return true;
}

/* ---- the engine ------------------------------------------------------------------------------ */

static void *poll_queue(void *user)
{
    grpc_completion_queue *queue = user;
    for (;;) {
        grpc_event event =
            grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.type == GRPC_OP_COMPLETE) {
            TSAN_ACQUIRE(event.tag);
            while (failpoint("grpc-late", NULL)) {
                g_usleep(1000);
            }
            sink_push(event.tag, event.success != 0);
        }
    }
}

static void leave_in_use(int status, void *user)
{
    (void)user;
    if (pthread_mutex_trylock(&engine.mutex) != 0 || engine.users > 0) {
        fflush(NULL);
        _exit(status);
    }
    pthread_mutex_unlock(&engine.mutex);
}

grpc_completion_queue *engine_acquire(void)
{
    pthread_mutex_lock(&engine.mutex);
    if (!engine.watches_exit) {
        x509_init(); /* gRPC's threads may be in a handshake: we leave before OpenSSL ends */
        engine.watches_exit = on_exit(leave_in_use, NULL) == 0;
    }
    if (engine.users++ == 0) {
        gpr_set_log_function(on_core_log);
        gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
        grpc_init();
        engine.queue = grpc_completion_queue_create_for_next(NULL);
        engine.thread = g_thread_new("grpc", poll_queue, engine.queue);
    }
    pthread_mutex_unlock(&engine.mutex);
    return engine.queue;
}

void engine_release(void)
{
    pthread_mutex_lock(&engine.mutex);
    if (--engine.users == 0) {
        grpc_completion_queue_shutdown(engine.queue);
        g_thread_join(engine.thread);
        grpc_completion_queue_destroy(engine.queue);
        engine.queue = NULL;
        grpc_shutdown_blocking();
    }
    pthread_mutex_unlock(&engine.mutex);
}

gpr_timespec engine_deadline(int64_t ms)
{
    if (ms <= 0) {
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    }
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(ms, GPR_TIMESPAN));
}
