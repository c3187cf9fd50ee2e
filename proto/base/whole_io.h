/* Reads and writes of all bytes or none to speak of: interrupted and short calls go on. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* `size` bytes from `offset` on. False: errno, 0 where the file ends before. */
bool io_read_whole(int fd, void *out, size_t size, off_t offset);
/* The same of writing; false: errno. */
bool io_write_whole(int fd, const void *data, size_t size, off_t offset);
