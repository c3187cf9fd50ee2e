/* Engine: gRPC core's one completion queue of the process with its one thread, alive while any
 * server or channel is; and EventSink, which carries completions from that thread to a Loop. */
#pragma once

#include "proto/base/log.h"
#include "proto/base/loop.h"

#include <grpc/grpc.h>
#include <stdbool.h>

/* Starts gRPC at the first use, stops it (joins the thread) at the last release. Any thread. */
grpc_completion_queue *engine_acquire(void);
void engine_release(void);
/* Where gRPC core's own lines go (warnings, at most a few a second, never payload); the latest
 * added wins. NULL: ignored. */
void engine_add_log(Log *log);
/* Between true and false what gRPC core logs is dropped: around calls whose errors we tell
 * ourselves. Nests. */
void engine_mute_log(bool on);
void engine_remove_log(Log *log);

typedef struct EventSink EventSink;
typedef struct EventTag EventTag;
/* One asynchronous operation: give &tag to gRPC after TSAN_RELEASE(&tag); fn runs on the sink's
 * Loop when it completed. The owner keeps the tag alive until then, and submits it again only from
 * there. */
typedef void (*EventFn)(EventTag *tag, bool ok);
struct EventTag {
    EventSink *sink;
    EventFn fn;
    void *owner;
    bool ok;
    EventTag *next;
};

EventSink *event_sink_new(Loop *loop);
/* Nothing is outstanding any more; the Loop may go away after this. */
void event_sink_free(EventSink *sink);
/* Something is still outstanding, for which the sink stays: it runs nowhere when it completes. The
 * Loop may go away after this. */
void event_sink_close(EventSink *sink);
void event_tag_init(EventTag *tag, EventSink *sink, EventFn fn, void *owner);
/* Runs completions on the calling thread (the Loop's own, while it is blocked in a destructor)
 * until until_us of the Loop's clock or until done(user). True when done. */
bool event_sink_run_until(EventSink *sink, bool (*done)(void *user), void *user, int64_t until_us);

/* ThreadSanitizer does not see into libgrpc: say that what happened before a submission happened
 * before its completion. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define TSAN_ACQUIRE(tag) __tsan_acquire(tag)
#define TSAN_RELEASE(tag) __tsan_release(tag)
#else
#define TSAN_ACQUIRE(tag) ((void)(tag))
#define TSAN_RELEASE(tag) ((void)(tag))
#endif

gpr_timespec engine_deadline(int64_t ms); /* <= 0: never */
