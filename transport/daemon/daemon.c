#include "transport/daemon/daemon.h"

#include "proto/base/version.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <systemd/sd-daemon.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

void daemon_notify(const char *state)
{
    sd_notify(0, state);
}

static void raise_open_files(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* One byte, not zero: a core_pattern that pipes to a program ignores a limit of 0 and honours only
 * 1 (core(5)), and no core file fits into one byte. PR_SET_DUMPABLE would also forbid cross-memory
 * attach between workers of one host. */
static void drop_core_dumps(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_CORE, &limit) == 0) {
        limit.rlim_cur = MIN((rlim_t)1, limit.rlim_max);
        setrlimit(RLIMIT_CORE, &limit);
    }
}

GArray *daemon_cpus(void)
{
    GArray *cpus = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    cpu_set_t set;
    const bool known = sched_getaffinity(0, sizeof set, &set) == 0;
    for (uint32_t cpu = 0; known && cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &set)) {
            g_array_append_val(cpus, cpu);
        }
    }
    return cpus;
}

unsigned daemon_n_cpus(void)
{
    g_autoptr(GArray) cpus = daemon_cpus();
    return cpus->len > 0 ? cpus->len : g_get_num_processors();
}

void daemon_log_stall(double stalled_ms, double computed_ms, void *user)
{
    Log *log = user;
    log_warn(log, "the main loop stood still for %.0f ms, computing for %.0f of them", stalled_ms,
             computed_ms);
}

void daemon_prepare(void)
{
    raise_open_files();
    drop_core_dumps();
    signal(SIGPIPE, SIG_IGN);
    /* A file beyond the limit is an error of its write, like a full disk. */
    signal(SIGXFSZ, SIG_IGN);
#if defined(__x86_64__)
    _mm_setcsr(0x1F80); /* NUMERICS 8; threads started later inherit it */
#endif
}

void daemon_print_version(const char *program, const char *libraries)
{
    printf("%s %s\nprotocol %u, numerics %u\nlibraries: %s, GLib %u.%u.%u\n", program, WEFT_VERSION,
           WEFT_PROTOCOL_VERSION, WEFT_NUMERICS_VERSION, libraries, glib_major_version,
           glib_minor_version, glib_micro_version);
}
