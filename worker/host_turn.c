#include "worker/host_turn.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int host_turn_try(const char *name)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX}; /* its path begins with NUL: no file */
    size_t length = strlen(name);
    length = length < sizeof at.sun_path ? length : sizeof at.sun_path - 1;
    memcpy(at.sun_path + 1, name, length);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&at,
                        (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)) != 0) {
        const int why = errno;
        close(fd);
        return why == EADDRINUSE ? HOST_TURN_TAKEN : HOST_TURN_WITHOUT;
    }
    return fd >= 0 ? fd : HOST_TURN_WITHOUT;
}

void host_turn_end(int turn)
{
    if (turn >= 0) {
        close(turn);
    }
}
