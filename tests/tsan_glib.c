/* Tells ThreadSanitizer what GLib's own locks, queues, joins and reference counts order: they are
 * futexes and atomics of a library that is not built with it. A shared object to be preloaded; each
 * function calls GLib's. Programs without ThreadSanitizer do not notice it. */
#include <dlfcn.h>
#include <glib.h>

void __tsan_acquire(void *address) __attribute__((weak));
void __tsan_release(void *address) __attribute__((weak));

static void acquire(void *object)
{
    if (__tsan_acquire != NULL) {
        __tsan_acquire(object);
    }
}

static void release(void *object)
{
    if (__tsan_release != NULL) {
        __tsan_release(object);
    }
}

/* GLib's function of this name, with the type of ours. */
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void(g_mutex_lock)(GMutex *mutex)
{
    REAL(g_mutex_lock)(mutex);
    acquire(mutex);
}

void(g_mutex_unlock)(GMutex *mutex)
{
    release(mutex);
    REAL(g_mutex_unlock)(mutex);
}

void(g_cond_wait)(GCond *cond, GMutex *mutex)
{
    release(mutex);
    REAL(g_cond_wait)(cond, mutex);
    acquire(mutex);
}

gboolean(g_cond_wait_until)(GCond *cond, GMutex *mutex, gint64 end_time)
{
    release(mutex);
    const gboolean signalled = REAL(g_cond_wait_until)(cond, mutex, end_time);
    acquire(mutex);
    return signalled;
}

void(g_async_queue_push)(GAsyncQueue *queue, gpointer data)
{
    release(queue);
    REAL(g_async_queue_push)(queue, data);
}

gpointer(g_async_queue_pop)(GAsyncQueue *queue)
{
    gpointer data = REAL(g_async_queue_pop)(queue);
    acquire(queue);
    return data;
}

void(g_atomic_ref_count_inc)(gatomicrefcount *count)
{
    REAL(g_atomic_ref_count_inc)(count);
}

gboolean(g_atomic_ref_count_dec)(gatomicrefcount *count)
{
    release((void *)count);
    const gboolean last = REAL(g_atomic_ref_count_dec)(count);
    if (last) {
        acquire((void *)count);
    }
    return last;
}

/* ---- a thread's end, and work of a pool: by the word that both sides know ---- */

typedef struct Started {
    GThreadFunc fn;
    gpointer data;
    char ended; /* its address */
} Started;

static GHashTable *started; /* GThread -> Started; guarded */
static GMutex guard;

static gpointer run(gpointer user)
{
    Started *s = user;
    gpointer result = s->fn(s->data);
    release(&s->ended);
    return result;
}

static Started *started_new(GThreadFunc fn, gpointer data)
{
    Started *s = g_new0(Started, 1);
    *s = (Started){fn, data, 0};
    return s;
}

static void keep(GThread *thread, Started *s)
{
    REAL(g_mutex_lock)(&guard);
    if (started == NULL) {
        started = g_hash_table_new(NULL, NULL);
    }
    g_hash_table_insert(started, thread, s);
    REAL(g_mutex_unlock)(&guard);
}

GThread *(g_thread_new)(const char *name, GThreadFunc fn, gpointer data)
{
    Started *s = started_new(fn, data);
    GThread *thread = REAL(g_thread_new)(name, run, s);
    keep(thread, s);
    return thread;
}

GThread *(g_thread_try_new)(const char *name, GThreadFunc fn, gpointer data, GError **error)
{
    Started *s = started_new(fn, data);
    GThread *thread = REAL(g_thread_try_new)(name, run, s, error);
    if (thread == NULL) {
        g_free(s);
        return NULL;
    }
    keep(thread, s);
    return thread;
}

gpointer(g_thread_join)(GThread *thread)
{
    REAL(g_mutex_lock)(&guard);
    Started *s = started != NULL ? g_hash_table_lookup(started, thread) : NULL;
    if (s != NULL) {
        g_hash_table_remove(started, thread);
    }
    REAL(g_mutex_unlock)(&guard);
    gpointer result = REAL(g_thread_join)(thread);
    if (s != NULL) {
        acquire(&s->ended);
        g_free(s);
    }
    return result;
}

typedef struct Pooled {
    GFunc fn;
    gpointer user;
} Pooled;

static void run_pooled(gpointer data, gpointer user)
{
    Pooled *p = user;
    acquire(data);
    p->fn(data, p->user);
    release(p);
}

GThreadPool *(g_thread_pool_new)(GFunc fn, gpointer user, gint most, gboolean exclusive,
                                 GError **error)
{
    Pooled *p = g_new0(Pooled, 1); /* for as long as the program runs */
    *p = (Pooled){fn, user};
    return REAL(g_thread_pool_new)(run_pooled, p, most, exclusive, error);
}

gboolean(g_thread_pool_push)(GThreadPool *pool, gpointer data, GError **error)
{
    release(data);
    return REAL(g_thread_pool_push)(pool, data, error);
}

void(g_thread_pool_free)(GThreadPool *pool, gboolean at_once, gboolean waits)
{
    Pooled *p = pool->user_data;
    REAL(g_thread_pool_free)(pool, at_once, waits);
    if (waits) {
        acquire(p);
    }
}
