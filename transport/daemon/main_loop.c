/* The real Loop: one GMainContext per daemon object, never the default one.
 *
 * Problem. GLib's own timeouts count CLOCK_MONOTONIC, which stands still while a host sleeps, and
 * round to milliseconds. Fencing (DESIGN 7.6) needs a clock that goes on: a worker that was
 * suspended for a minute must see that minute. So the timers are a heap of our own, armed by one
 * timerfd on CLOCK_BOOTTIME.
 *
 * Invariants
 *   1. `heap` is ordered by (due, id): timers that are due at the same time run in the order they
 *      were started.
 *   2. heap[i]->index == i, so that cancelling is O(log n).
 *   3. The timerfd is armed for heap[0], or disarmed when the heap is empty, whenever the loop is
 *      about to wait.
 *   4. Posted functions run in order of posting; each runs exactly once, at the latest in
 *      main_loop_free().
 *   5. lag[] holds the worst of each second: of a round's length, for which whatever came then
 *      waited, and of its timers' lateness.
 *   6. A round runs only what was posted or due when it began, so neither posts nor timers starve
 *      the other. */
#include "transport/daemon/daemon.h"

#include <errno.h>
#include <glib-unix.h>
#include <pthread.h>
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define LAG_SECONDS 60
/* Bound on what main_loop_free() still runs: a function that posts itself for ever is a bug of its
 * owner. */
#define FINAL_ROUNDS 1000

struct LoopTimer {
    int64_t due_us;
    uint64_t id;
    unsigned index;
    LoopFn fn;
    void *user;
};

typedef struct Post {
    LoopFn fn;
    void *user;
} Post;

typedef struct LagSecond {
    int64_t second;
    int64_t worst_us;
} LagSecond;

typedef struct Watch {
    MainLoop *owner;
    LoopFn fn;
    void *user;
    GSource *source;
} Watch;

typedef struct MainLoopSource {
    GSource base;
    MainLoop *owner;
} MainLoopSource;

struct MainLoop {
    Loop loop; /* first: the seam is the object */
    GMainContext *context;
    GSource *source;
    int timer_fd;
    void *timer_tag; /* of the source: what was polled of timer_fd */

    pthread_mutex_t mutex; /* guards posts and quit */
    GArray *posts;
    bool quit;

    GPtrArray *heap;
    uint64_t next_timer_id;
    int64_t armed_us; /* INT64_MAX: disarmed */

    GHashTable *watches; /* id -> Watch */
    unsigned next_watch_id;
    LagSecond lag[LAG_SECONDS];
    int64_t late_us;     /* of this round's timers, the worst */
    int64_t computed_us; /* by the loop's thread, when the last round ended */
    MainLoopStallFn stalled;
    void *stalled_user;
};

static int64_t clock_us(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int64_t real_now_us(Loop *loop)
{
    return clock_us(CLOCK_BOOTTIME);
}
static int64_t real_wall_us(Loop *loop)
{
    return clock_us(CLOCK_REALTIME);
}

static void real_post(Loop *loop, LoopFn fn, void *user)
{
    MainLoop *self = (MainLoop *)loop;
    Post post = {fn, user};
    pthread_mutex_lock(&self->mutex);
    bool first = self->posts->len == 0;
    g_array_append_val(self->posts, post);
    pthread_mutex_unlock(&self->mutex);
    if (first && !g_main_context_is_owner(self->context)) { /* a round looks again at its end */
        g_main_context_wakeup(self->context);
    }
}

/* ---- timers ---------------------------------------------------------------------------------- */

static LoopTimer *heap_at(MainLoop *self, unsigned i)
{
    return g_ptr_array_index(self->heap, i);
}

static bool timer_before(const LoopTimer *a, const LoopTimer *b)
{
    return a->due_us != b->due_us ? a->due_us < b->due_us : a->id < b->id;
}

static void heap_set(MainLoop *self, unsigned i, LoopTimer *timer)
{
    g_ptr_array_index(self->heap, i) = timer;
    timer->index = i;
}

static void heap_up(MainLoop *self, unsigned i)
{
    LoopTimer *timer = heap_at(self, i);
    while (i > 0 && timer_before(timer, heap_at(self, (i - 1) / 2))) {
        heap_set(self, i, heap_at(self, (i - 1) / 2));
        i = (i - 1) / 2;
    }
    heap_set(self, i, timer);
}

static void heap_down(MainLoop *self, unsigned i)
{
    LoopTimer *timer = heap_at(self, i);
    for (;;) {
        unsigned child = 2 * i + 1;
        if (child >= self->heap->len) {
            break;
        }
        if (child + 1 < self->heap->len &&
            timer_before(heap_at(self, child + 1), heap_at(self, child))) {
            child++;
        }
        if (!timer_before(heap_at(self, child), timer)) {
            break;
        }
        heap_set(self, i, heap_at(self, child));
        i = child;
    }
    heap_set(self, i, timer);
}

static void heap_remove(MainLoop *self, LoopTimer *timer)
{
    unsigned i = timer->index;
    LoopTimer *last = heap_at(self, self->heap->len - 1);
    g_ptr_array_set_size(self->heap, (int)self->heap->len - 1);
    if (last != timer) {
        heap_set(self, i, last);
        heap_up(self, i);
        heap_down(self, last->index);
    }
}

static LoopTimer *real_timer_start(Loop *loop, int64_t delay_us, LoopFn fn, void *user)
{
    MainLoop *self = (MainLoop *)loop;
    LoopTimer *timer = g_new0(LoopTimer, 1);
    timer->due_us = clock_us(CLOCK_BOOTTIME) + MAX(delay_us, 0);
    timer->id = self->next_timer_id++;
    timer->fn = fn;
    timer->user = user;
    g_ptr_array_add(self->heap, timer);
    timer->index = self->heap->len - 1;
    heap_up(self, timer->index);
    return timer;
}

static void real_timer_cancel(Loop *loop, LoopTimer *timer)
{
    if (timer) {
        heap_remove((MainLoop *)loop, timer);
        g_free(timer);
    }
}

static const LoopOps real_ops = {
    .now_us = real_now_us,
    .wall_us = real_wall_us,
    .post = real_post,
    .timer_start = real_timer_start,
    .timer_cancel = real_timer_cancel,
};

static void arm_timer_fd(MainLoop *self)
{
    int64_t due = self->heap->len > 0 ? MAX(heap_at(self, 0)->due_us, 1) : INT64_MAX;
    if (due == self->armed_us) {
        return;
    }
    struct itimerspec spec = {0};
    if (due != INT64_MAX) {
        spec.it_value.tv_sec = due / 1000000;
        spec.it_value.tv_nsec = due % 1000000 * 1000;
    }
    timerfd_settime(self->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
    self->armed_us = due;
}

static void note_lag(MainLoop *self, int64_t now_us, int64_t late_us)
{
    if (late_us >= MAIN_LOOP_STALL_MS * 1000 && self->stalled != NULL) {
        const int64_t computed_us = clock_us(CLOCK_THREAD_CPUTIME_ID) - self->computed_us;
        self->stalled((double)late_us / 1000, (double)computed_us / 1000, self->stalled_user);
    }
    LagSecond *slot = &self->lag[now_us / 1000000 % LAG_SECONDS];
    if (slot->second != now_us / 1000000) {
        *slot = (LagSecond){now_us / 1000000, 0};
    }
    slot->worst_us = MAX(slot->worst_us, late_us);
}

/* What began then has ended. */
static void note_time(MainLoop *self, int64_t began_us)
{
    const int64_t now_us = clock_us(CLOCK_BOOTTIME);
    note_lag(self, now_us, MAX(now_us - began_us, self->late_us));
    self->late_us = 0;
    self->computed_us = clock_us(CLOCK_THREAD_CPUTIME_ID);
}

static void run_due_timers(MainLoop *self)
{
    int64_t began_us = clock_us(CLOCK_BOOTTIME);
    uint64_t newest = self->next_timer_id;
    while (self->heap->len > 0) {
        LoopTimer *timer = heap_at(self, 0);
        if (timer->due_us > began_us || timer->id >= newest) {
            return;
        }
        self->late_us = MAX(self->late_us, clock_us(CLOCK_BOOTTIME) - timer->due_us);
        heap_remove(self, timer);
        LoopFn fn = timer->fn;
        void *user = timer->user;
        g_free(timer);
        fn(user);
    }
}

/* ---- the source ------------------------------------------------------------------------------ */

static bool have_posts(MainLoop *self)
{
    pthread_mutex_lock(&self->mutex);
    bool have = self->posts->len > 0;
    pthread_mutex_unlock(&self->mutex);
    return have;
}

static void run_posts(MainLoop *self)
{
    pthread_mutex_lock(&self->mutex);
    GArray *batch = self->posts;
    self->posts = g_array_new(FALSE, FALSE, sizeof(Post));
    pthread_mutex_unlock(&self->mutex);
    for (unsigned i = 0; i < batch->len; i++) {
        Post *post = &g_array_index(batch, Post, i);
        post->fn(post->user);
    }
    g_array_free(batch, TRUE);
}

static bool timer_due(MainLoop *self)
{
    return self->heap->len > 0 && heap_at(self, 0)->due_us <= clock_us(CLOCK_BOOTTIME);
}

static gboolean source_prepare(GSource *source, int *timeout_ms)
{
    MainLoop *self = ((MainLoopSource *)source)->owner;
    *timeout_ms = -1;
    if (have_posts(self) || timer_due(self)) {
        return TRUE;
    }
    arm_timer_fd(self);
    return FALSE;
}

static gboolean source_check(GSource *source)
{
    MainLoop *self = ((MainLoopSource *)source)->owner;
    return have_posts(self) || timer_due(self);
}

static gboolean source_dispatch(GSource *source, GSourceFunc callback, void *data)
{
    MainLoop *self = ((MainLoopSource *)source)->owner;
    uint64_t expirations;
    if (g_source_query_unix_fd(source, self->timer_tag) != 0 &&
        read(self->timer_fd, &expirations, sizeof expirations) > 0) {
        self->armed_us = INT64_MAX; /* it fired: one-shot */
    }
    const int64_t began_us = clock_us(CLOCK_BOOTTIME);
    run_posts(self);
    run_due_timers(self);
    note_time(self, began_us);
    return G_SOURCE_CONTINUE;
}

static GSourceFuncs source_funcs = {source_prepare, source_check, source_dispatch,
                                    NULL,           NULL,         NULL};

/* ---- life ------------------------------------------------------------------------------------ */

static void watch_free(void *data)
{
    Watch *watch = data;
    g_source_destroy(watch->source);
    g_source_unref(watch->source);
    g_free(watch);
}

MainLoop *main_loop_new(void)
{
    MainLoop *self = g_new0(MainLoop, 1);
    self->loop.ops = &real_ops;
    self->context = g_main_context_new();
    self->timer_fd = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK | TFD_CLOEXEC);
    if (self->timer_fd < 0) {
        g_error("cannot create a timer: %s; raise the limit on open files", g_strerror(errno));
    }
    pthread_mutex_init(&self->mutex, NULL);
    self->posts = g_array_new(FALSE, FALSE, sizeof(Post));
    self->heap = g_ptr_array_new();
    self->armed_us = INT64_MAX;
    self->watches = g_hash_table_new_full(NULL, NULL, NULL, watch_free);
    self->next_watch_id = 1;
    self->source = g_source_new(&source_funcs, sizeof(MainLoopSource));
    ((MainLoopSource *)self->source)->owner = self;
    self->timer_tag = g_source_add_unix_fd(self->source, self->timer_fd, G_IO_IN);
    g_source_attach(self->source, self->context);
    return self;
}

void main_loop_free(MainLoop *self)
{
    if (!self) {
        return;
    }
    for (int round = 0; round < FINAL_ROUNDS && have_posts(self); round++) {
        run_posts(self);
    }
    g_hash_table_unref(self->watches);
    g_source_destroy(self->source);
    g_source_unref(self->source);
    g_main_context_unref(self->context);
    for (unsigned i = 0; i < self->heap->len; i++) {
        g_free(heap_at(self, i));
    }
    g_ptr_array_free(self->heap, TRUE);
    g_array_free(self->posts, TRUE);
    pthread_mutex_destroy(&self->mutex);
    close(self->timer_fd);
    g_free(self);
}

Loop *main_loop_loop(MainLoop *self)
{
    return &self->loop;
}

static bool take_quit(MainLoop *self)
{
    pthread_mutex_lock(&self->mutex);
    bool quit = self->quit;
    self->quit = false;
    pthread_mutex_unlock(&self->mutex);
    return quit;
}

void main_loop_run(MainLoop *self)
{
    while (!take_quit(self)) {
        g_main_context_iteration(self->context, TRUE);
    }
}

void main_loop_quit(MainLoop *self)
{
    pthread_mutex_lock(&self->mutex);
    self->quit = true;
    pthread_mutex_unlock(&self->mutex);
    g_main_context_wakeup(self->context);
}

static void set_expired(void *user)
{
    *(bool *)user = true;
}

bool main_loop_run_until(MainLoop *self, const bool *done, int64_t timeout_us)
{
    bool expired = false;
    LoopTimer *timer = NULL;
    if (timeout_us >= 0) {
        timer = real_timer_start(&self->loop, timeout_us, set_expired, &expired);
    }
    while (!*done && !expired && !take_quit(self)) {
        g_main_context_iteration(self->context, TRUE);
    }
    if (!expired) {
        real_timer_cancel(&self->loop, timer);
    }
    return *done;
}

/* ---- signals and file descriptors ------------------------------------------------------------ */

static unsigned add_watch(MainLoop *self, Watch *watch)
{
    unsigned id = self->next_watch_id++;
    watch->owner = self;
    g_hash_table_insert(self->watches, GUINT_TO_POINTER(id), watch);
    g_source_attach(watch->source, self->context);
    return id;
}

static gboolean on_signal(void *data)
{
    Watch *watch = data; /* which its function may remove */
    MainLoop *owner = watch->owner;
    const int64_t began_us = clock_us(CLOCK_BOOTTIME);
    watch->fn(watch->user);
    note_time(owner, began_us);
    return G_SOURCE_CONTINUE;
}

void main_loop_on_signal(MainLoop *self, int signal_number, LoopFn fn, void *user)
{
    Watch *watch = g_new0(Watch, 1);
    watch->fn = fn;
    watch->user = user;
    watch->source = g_unix_signal_source_new(signal_number);
    g_source_set_callback(watch->source, on_signal, watch, NULL);
    add_watch(self, watch);
}

static gboolean on_fd(int fd, GIOCondition condition, void *data)
{
    return on_signal(data);
}

unsigned main_loop_watch_fd(MainLoop *self, int fd, LoopFn fn, void *user)
{
    Watch *watch = g_new0(Watch, 1);
    watch->fn = fn;
    watch->user = user;
    watch->source = g_unix_fd_source_new(fd, G_IO_IN | G_IO_HUP | G_IO_ERR);
    g_source_set_callback(watch->source, G_SOURCE_FUNC(on_fd), watch, NULL);
    return add_watch(self, watch);
}

void main_loop_unwatch(MainLoop *self, unsigned id)
{
    g_hash_table_remove(self->watches, GUINT_TO_POINTER(id));
}

void main_loop_on_stall(MainLoop *self, MainLoopStallFn fn, void *user)
{
    self->stalled = fn;
    self->stalled_user = user;
}

double main_loop_lag_ms(MainLoop *self)
{
    int64_t now_s = clock_us(CLOCK_BOOTTIME) / 1000000, worst_us = 0;
    for (int i = 0; i < LAG_SECONDS; i++) {
        if (self->lag[i].second > now_s - LAG_SECONDS) {
            worst_us = MAX(worst_us, self->lag[i].worst_us);
        }
    }
    return (double)worst_us / 1000.0;
}
