#include "proto/base/whole_io.h"

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

bool io_read_whole(int fd, void *out, size_t size, off_t offset)
{
    for (size_t done = 0; done < size;) {
        const ssize_t n = pread(fd, (uint8_t *)out + done, size - done, offset + (off_t)done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            errno = n == 0 ? 0 : errno;
            return false;
        }
        done += (size_t)n;
    }
    return true;
}

bool io_write_whole(int fd, const void *data, size_t size, off_t offset)
{
    for (size_t done = 0; done < size;) {
        const ssize_t n =
            pwrite(fd, (const uint8_t *)data + done, size - done, offset + (off_t)done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            errno = n == 0 ? ENOSPC : errno;
            return false;
        }
        done += (size_t)n;
    }
    return true;
}
