/* UCX's settings come from the environment, and libucs reads some of them when it is loaded: so
 * they must stand there before the program starts, and a program that finds them missing sets them
 * and starts itself once more (the same process, the same arguments). A mark with the process id
 * keeps that to once; in a child, which has another id, it means nothing. */
#include "transport/link/link.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MARK "WEFT_UCX_ENVIRONMENT"

typedef struct Setting {
    const char *name, *value;
} Setting;

/* PLATFORM.md section 2 and WIRE.md have the measurements behind each. */
static const Setting settings[] = {
    /* Else a link that reports dead peers takes no shared memory. */
    {"UCX_POSIX_ERROR_HANDLING", "y"},
    {"UCX_HANDLE_ERRORS", "none"}, /* signals belong to the daemon */
    {"UCX_WARN_UNUSED_ENV_VARS", "n"},
    {"UCX_LOG_LEVEL", "fatal"}, /* libraries return errors, daemons log them */
    {"UCX_RNDV_THRESH", "inf"},
    /* 4 MiB on the way through shared memory, not 0.5: what tensor ranks send each other while both
     * compute; the memory is what UCX takes anyway (512 buffers of 8 KiB). A length is 16 bits. */
    {"UCX_POSIX_SEG_SIZE", "32768"},
    {"UCX_POSIX_FIFO_SIZE", "128"},
    {"UCX_POSIX_RX_BUFS_GROW", "128"},
    {"UCX_TCP_TX_SEG_SIZE", "256k"},
    {"UCX_TCP_RX_SEG_SIZE", "256k"},
    /* A peer that was killed behind shared memory is found by it. */
    {"UCX_KEEPALIVE_INTERVAL", "500ms"},
    {"UCX_TCP_KEEPIDLE", "1s"},
    {"UCX_TCP_KEEPINTVL", "1s"},
    {"UCX_TCP_KEEPCNT", "3"},
};

static bool set_default(const char *name, const char *value)
{
    if (value == NULL || getenv(name) != NULL) {
        return false;
    }
    setenv(name, value, 1);
    return true;
}

static bool has_address(const struct ifaddrs *interface, const char *address)
{
    if (interface->ifa_addr == NULL) {
        return false;
    }
    char text[INET6_ADDRSTRLEN] = "";
    if (interface->ifa_addr->sa_family == AF_INET) {
        inet_ntop(AF_INET, &((const struct sockaddr_in *)interface->ifa_addr)->sin_addr, text,
                  sizeof text);
    } else if (interface->ifa_addr->sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)interface->ifa_addr)->sin6_addr, text,
                  sizeof text);
    }
    return strcmp(text, address) == 0;
}

static bool is_usable(const struct ifaddrs *interface, bool loopback)
{
    unsigned up = IFF_UP | IFF_RUNNING;
    return interface->ifa_addr != NULL &&
           (interface->ifa_addr->sa_family == AF_INET ||
            interface->ifa_addr->sa_family == AF_INET6) &&
           (interface->ifa_flags & up) == up &&
           ((interface->ifa_flags & IFF_LOOPBACK) != 0) == loopback;
}

/* The interface that has `address` (up or not: the port waits for it), or with NULL the first that
 * is up, loopback last; returned, NULL = none. */
static char *find_device(const char *address)
{
    struct ifaddrs *all = NULL;
    char *found = NULL;
    if (getifaddrs(&all) != 0) {
        return NULL;
    }
    for (int loopback = 0; loopback <= 1 && found == NULL; loopback++) {
        for (const struct ifaddrs *i = all; i != NULL && found == NULL; i = i->ifa_next) {
            if (address != NULL ? has_address(i, address) : is_usable(i, loopback)) {
                found = g_strdup(i->ifa_name);
            }
        }
    }
    freeifaddrs(all);
    return found;
}

static bool is_address(const char *text)
{
    struct in6_addr parsed;
    return inet_pton(AF_INET, text, &parsed) == 1 || inet_pton(AF_INET6, text, &parsed) == 1;
}

/* Returned; NULL: leave it to UCX. */
static char *choose_device(const char *device)
{
    if (device == NULL || strcmp(device, "0.0.0.0") == 0 || strcmp(device, "::") == 0) {
        return find_device(NULL);
    }
    return is_address(device) ? find_device(device) : g_strdup(device);
}

void link_ucx_environment(int argc, char **argv, const char *tls, const char *device)
{
    const char *mark = getenv(MARK);
    bool restarted = mark != NULL && strtol(mark, NULL, 10) == (long)getpid();
    unsetenv(MARK);
    if (restarted) {
        return;
    }
    bool changed = set_default("UCX_TLS", tls != NULL ? tls : "posix,sysv,cma,tcp");
    if (getenv("UCX_NET_DEVICES") == NULL) {
        g_autofree char *chosen = choose_device(device);
        changed |= set_default("UCX_NET_DEVICES", chosen);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(settings); i++) {
        changed |= set_default(settings[i].name, settings[i].value);
    }
    if (changed) {
        g_autofree char *pid = g_strdup_printf("%ld", (long)getpid());
        setenv(MARK, pid, 1);
        execv("/proc/self/exe", argv);
        unsetenv(MARK); /* no /proc: what libucs has read stays, the rest holds */
    }
}
