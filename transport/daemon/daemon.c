#include "transport/daemon/daemon.h"

#include "proto/base/version.h"

#include <glib.h>
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

void daemon_prepare(void)
{
    raise_open_files();
    drop_core_dumps();
    signal(SIGPIPE, SIG_IGN);
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
