#include "tools/weft/interrupts.h"

#include "proto/base/error.h"

#include <errno.h>
#include <sys/signalfd.h>
#include <unistd.h>

static sigset_t interrupting(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    return set;
}

bool interrupts_open(Interrupts *out, GError **error)
{
    const sigset_t set = interrupting();
    sigprocmask(SIG_BLOCK, &set, &out->before);
    out->fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (out->fd < 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "signals: %s", g_strerror(errno));
        sigprocmask(SIG_SETMASK, &out->before, NULL);
    }
    return out->fd >= 0;
}

bool interrupts_take(Interrupts *in)
{
    struct signalfd_siginfo taken;
    return read(in->fd, &taken, sizeof taken) > 0;
}

void interrupts_close(Interrupts *in)
{
    const bool held = sigismember(&in->before, SIGINT) == 1;
    while (!held && interrupts_take(in)) {
    }
    close(in->fd);
    sigprocmask(SIG_SETMASK, &in->before, NULL);
}

void interrupts_hold(void)
{
    const sigset_t set = interrupting();
    sigprocmask(SIG_BLOCK, &set, NULL);
}

bool interrupts_none_waits(GError **error)
{
    sigset_t set;
    sigpending(&set);
    const bool waits = sigismember(&set, SIGINT) == 1 || sigismember(&set, SIGTERM) == 1;
    if (waits) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "interrupted");
    }
    return !waits;
}
