/* Points come from two places: failpoint_set(), and the environment, which is read once. A point
 * set by call hides one of the same name from the environment. */
#include "proto/base/failpoint.h"

#ifdef WEFT_FAILPOINTS

#include <glib.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct Point {
    char *name;
    bool on;
    int64_t arg;
    char *file; /* set exactly while it exists; NULL = always */
} Point;

static GMutex lock;
static GHashTable *points; /* name -> Point, under lock */
static bool environment_read;
static int n_points; /* lets the common case, no point at all, skip the lock */

static void point_free(gpointer data)
{
    Point *point = data;
    g_free(point->name);
    g_free(point->file);
    g_free(point);
}

static void put_locked(const char *name, bool on, int64_t arg, const char *file)
{
    Point *point = g_new0(Point, 1);
    point->name = g_strdup(name);
    point->on = on;
    point->arg = arg;
    point->file = g_strdup(file);
    g_hash_table_replace(points, point->name, point);
    __atomic_store_n(&n_points, (int)g_hash_table_size(points), __ATOMIC_RELEASE);
}

static void put_from_text(const char *item)
{
    g_auto(GStrv) parts = g_strsplit(item, "=", 2);
    if (parts[0] == NULL || parts[0][0] == '\0') {
        return;
    }
    const char *arg = parts[1];
    if (arg != NULL && g_str_has_prefix(arg, "file:")) {
        put_locked(parts[0], true, 0, arg + strlen("file:"));
    } else {
        put_locked(parts[0], true, arg != NULL ? g_ascii_strtoll(arg, NULL, 10) : 0, NULL);
    }
}

static void read_environment_locked(void)
{
    if (environment_read) {
        return;
    }
    points = g_hash_table_new_full(g_str_hash, g_str_equal, NULL, point_free);
    const char *text = g_getenv("WEFT_FAILPOINT");
    g_auto(GStrv) items = g_strsplit(text != NULL ? text : "", ",", -1);
    for (char **item = items; *item != NULL; item++) {
        put_from_text(*item);
    }
    __atomic_store_n(&environment_read, true, __ATOMIC_RELEASE);
}

bool failpoint(const char *name, int64_t *arg_out)
{
    if (arg_out != NULL) {
        *arg_out = 0;
    }
    if (__atomic_load_n(&environment_read, __ATOMIC_ACQUIRE) &&
        __atomic_load_n(&n_points, __ATOMIC_ACQUIRE) == 0) {
        return false;
    }
    g_mutex_lock(&lock);
    read_environment_locked();
    const Point *point = g_hash_table_lookup(points, name);
    bool on = point != NULL && point->on && (point->file == NULL || access(point->file, F_OK) == 0);
    if (on && arg_out != NULL) {
        *arg_out = point->arg;
    }
    g_mutex_unlock(&lock);
    return on;
}

void failpoint_set(const char *name, bool on, int64_t arg)
{
    g_mutex_lock(&lock);
    read_environment_locked();
    put_locked(name, on, arg, NULL);
    g_mutex_unlock(&lock);
}

#endif
