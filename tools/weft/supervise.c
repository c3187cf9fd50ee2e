/* The supervisor of `weft up`: a process of its own that starts again what ends, so that a killed
 * coordinator is back within a second or two and its workers find it at the port they know.
 *
 * 1. It alone writes STATE/up while it lives, with signals blocked: `up` and `down` first end it.
 * 2. It ends by itself when STATE/up is gone or names another supervisor.
 * 3. A daemon that ends soon after each start is given more and more time, then given up: what was
 * refused (revoked, another release) will be refused again. */
#include "tools/weft/cli.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define LOOK_NS 100000000
#define SOON_US (INT64_C(10) * G_USEC_PER_SEC)
#define BACKOFF_US (G_USEC_PER_SEC / 4)
#define TRIES_LIMIT 6u

/* What is known of a daemon that has ended before. */
typedef struct Patient {
    gint64 started_us, due_us; /* last start; next one, 0 = it runs */
    unsigned n_soon;           /* ends soon after a start, in a row */
    bool given_up;
} Patient;

static void say(const char *name, const char *what)
{
    g_autoptr(GDateTime) now = g_date_time_new_now_utc();
    g_autofree char *text = g_date_time_format_iso8601(now);
    fprintf(stderr, "%s %s %s\n", text, name, what);
}

static Patient *patient_of(GHashTable *patients, const char *name)
{
    Patient *p = g_hash_table_lookup(patients, name);
    if (p == NULL) {
        p = g_new0(Patient, 1);
        g_hash_table_insert(patients, g_strdup(name), p);
    }
    return p;
}

/* Invariant 3. It has just been found ended. */
static void patient_ended(Patient *p, const char *name, gint64 now)
{
    const bool soon = p->started_us != 0 && now - p->started_us < SOON_US;
    p->n_soon = soon ? p->n_soon + 1 : 0;
    p->due_us = now + (p->n_soon > 0 ? BACKOFF_US << p->n_soon : 0);
    if (p->n_soon >= TRIES_LIMIT) {
        p->given_up = true;
        say(name, "ends again and again soon after its start: given up; its log says why, `weft "
                  "up` tries again");
    } else {
        say(name, "ended: it is started again");
    }
}

static void look_after(GHashTable *patients, const char *state, const char *name,
                       const LocalOptions *o)
{
    Patient *p = patient_of(patients, name);
    const gint64 now = g_get_monotonic_time();
    if (p->due_us == 0 && !p->given_up) {
        patient_ended(p, name, now);
    }
    if (p->given_up || now < p->due_us) {
        return;
    }
    GError *error = NULL;
    p->due_us = 0;
    if (!local_cluster_revive(state, name, o, &error)) {
        say(name, error->message);
        g_error_free(error);
    }
    p->started_us = g_get_monotonic_time();
}

int local_supervise(const char *state, const LocalOptions *o)
{
    GError *error = NULL;
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL); /* invariant 1 */
    if (!local_become_supervisor(state, &error)) {
        return cli_fail(error);
    }
    g_autoptr(GHashTable) patients = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    const struct timespec look = {0, LOOK_NS};
    GPtrArray *ended;
    while (sigtimedwait(&ends, NULL, &look) < 0 && (ended = local_cluster_ended(state)) != NULL) {
        for (guint i = 0; i < ended->len; i++) { /* the coordinator is the first in the list */
            look_after(patients, state, ended->pdata[i], o);
        }
        g_ptr_array_unref(ended);
    }
    return 0;
}
