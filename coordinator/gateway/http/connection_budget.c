#include "coordinator/gateway/http/connection_budget.h"

#include <errno.h>
#include <stdint.h>
#include <sys/resource.h>
#include <unistd.h>

#define FILES_KEPT 256u

struct ConnectionBudget {
    gatomicrefcount refs;
    GMutex lock;
    unsigned size, taken;
    GArray *waiting; /* int: eventfds of those who found none left, each once */
};

ConnectionBudget *connection_budget_new(unsigned connections)
{
    ConnectionBudget *b = g_new0(ConnectionBudget, 1);
    g_atomic_ref_count_init(&b->refs);
    g_mutex_init(&b->lock);
    b->size = connections;
    b->waiting = g_array_new(FALSE, FALSE, sizeof(int));
    return b;
}

unsigned connection_budget_of_files(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur == RLIM_INFINITY) {
        return UINT32_MAX;
    }
    const rlim_t most = files.rlim_cur - MIN(FILES_KEPT, files.rlim_cur / 2);
    return (unsigned)MIN(most, UINT32_MAX);
}

ConnectionBudget *connection_budget_ref(ConnectionBudget *b)
{
    g_atomic_ref_count_inc(&b->refs);
    return b;
}

void connection_budget_unref(ConnectionBudget *b)
{
    if (b != NULL && g_atomic_ref_count_dec(&b->refs)) {
        g_mutex_clear(&b->lock);
        g_array_unref(b->waiting);
        g_free(b);
    }
}

unsigned connection_budget_size(const ConnectionBudget *b)
{
    return b->size;
}

/* Where it waits, or waiting->len. */
static guint place_of(const ConnectionBudget *b, int wake_fd)
{
    guint i = 0;
    while (i < b->waiting->len && g_array_index(b->waiting, int, i) != wake_fd) {
        i++;
    }
    return i;
}

bool connection_budget_take(ConnectionBudget *b, int wake_fd)
{
    g_mutex_lock(&b->lock);
    const bool left = b->taken < b->size;
    if (left) {
        b->taken++;
    } else if (place_of(b, wake_fd) == b->waiting->len) {
        g_array_append_val(b->waiting, wake_fd);
    }
    g_mutex_unlock(&b->lock);
    return left;
}

void connection_budget_give(ConnectionBudget *b)
{
    const uint64_t one = 1;
    g_mutex_lock(&b->lock);
    b->taken--;
    for (guint i = 0; i < b->waiting->len; i++) {
        const ssize_t n = write(g_array_index(b->waiting, int, i), &one, sizeof one);
        g_assert(n == sizeof one || errno == EAGAIN); /* the counter is full: it is awake */
    }
    g_array_set_size(b->waiting, 0);
    g_mutex_unlock(&b->lock);
}

void connection_budget_forget(ConnectionBudget *b, int wake_fd)
{
    g_mutex_lock(&b->lock);
    const guint place = place_of(b, wake_fd);
    if (place < b->waiting->len) {
        g_array_remove_index_fast(b->waiting, place);
    }
    g_mutex_unlock(&b->lock);
}
