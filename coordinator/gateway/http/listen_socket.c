#include "coordinator/gateway/http/listen_socket.h"

#include "proto/base/error.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <string.h>
#include <unistd.h>

#define BACKLOG 1024

char *socket_address_text(const struct sockaddr *address)
{
    char text[INET6_ADDRSTRLEN] = "";
    if (address != NULL && address->sa_family == AF_INET) {
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)address)->sin_addr, text,
                  sizeof text);
    } else if (address != NULL && address->sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr, text,
                  sizeof text);
    }
    return g_strdup(text);
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)(const void *)address;
        return ntohl(v4->sin_addr.s_addr) >> 24 == 127;
    }
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)(const void *)address;
    return IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr);
}

static char *bound_text(const struct sockaddr_storage *bound)
{
    const struct sockaddr *address = (const struct sockaddr *)bound;
    g_autofree char *host = socket_address_text(address);
    bool v6 = address->sa_family == AF_INET6;
    unsigned port = ntohs(v6 ? ((const struct sockaddr_in6 *)bound)->sin6_port
                             : ((const struct sockaddr_in *)bound)->sin_port);
    return g_strdup_printf(v6 ? "[%s]:%u" : "%s:%u", host, port);
}

static int bind_one(const struct addrinfo *info)
{
    int one = 1;
    int fd = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0 ||
                    bind(fd, info->ai_addr, info->ai_addrlen) != 0 || listen(fd, BACKLOG) != 0)) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

static struct addrinfo *look_up(const char *address, GError **error)
{
    const char *colon = strrchr(address, ':');
    if (colon == NULL || colon[1] == '\0') {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "http address '%s' has no port: give ADDR:PORT", address);
        return NULL;
    }
    g_autofree char *host = g_strndup(address, (gsize)(colon - address));
    size_t length = strlen(host);
    if (length > 1 && host[0] == '[' && host[length - 1] == ']') {
        host[length - 1] = '\0';
        memmove(host, host + 1, length - 1);
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found = NULL;
    int rc = getaddrinfo(host[0] != '\0' ? host : NULL, colon + 1, &hints, &found);
    if (rc != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "http address '%s': %s", address,
                    gai_strerror(rc));
        return NULL;
    }
    return found;
}

int listen_socket_open(const char *address, char **bound_out, bool *loopback_out, GError **error)
{
    *bound_out = g_strdup(address);
    struct addrinfo *found = look_up(address, error);
    if (found == NULL) {
        return -1;
    }
    int fd = bind_one(found);
    int problem = errno;
    freeaddrinfo(found);
    if (fd < 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "http cannot listen at %s: %s: choose another address or port", address,
                    g_strerror(problem));
        return -1;
    }
    struct sockaddr_storage bound;
    socklen_t length = sizeof bound;
    getsockname(fd, (struct sockaddr *)&bound, &length);
    g_free(*bound_out);
    *bound_out = bound_text(&bound);
    *loopback_out = is_loopback((struct sockaddr *)&bound);
    return fd;
}
