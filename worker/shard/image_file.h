/* Image file: the bytes of a shard's arena in one file, with the hash of each of its chunks, so
 * that a later start maps what an earlier one packed.
 *
 *   0        arena bytes
 *   T        XXH3-128 of each chunk of IMAGE_CHUNK_BYTES (the last is shorter); T = the arena's
 *            bytes rounded up to IMAGE_PADDING_BYTES
 *   the end  footer: magic, arena bytes, key, hash of the chunks' hashes and of the rest of itself
 *
 * Numbers in the host's byte order: a file is for the host that wrote it.
 *
 * Mapped pages are the page cache's. They are locked in memory before their hash is checked, so
 * that nobody reads them from the disk again, unchecked, while they are used. */
#pragma once

#include "proto/base/hash.h"

#include <glib.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IMAGE_CHUNK_BYTES ((size_t)4 << 20)
#define IMAGE_PADDING_BYTES ((size_t)64 << 10)

/* What a thread that works at an image shares with others. */
typedef struct ImageWork {
    atomic_bool stop;   /* end with CANCELLED */
    atomic_size_t done; /* bytes */
} ImageWork;

/* Whether this process may lock this many bytes more (RLIMIT_MEMLOCK, CAP_IPC_LOCK). */
bool image_may_lock(size_t bytes);

/* Writes `bytes` of an arena (weft_map()) and what follows them to an empty file, and replaces the
 * arena by the file's pages as image_take_over() does, so that written pages do not lie in memory
 * beside it; where they cannot be had, the arena stays and the file is written. CANCELLED, or IO:
 * the disk. */
bool image_write(int fd, const Hash128 *key, uint8_t *arena, size_t bytes, ImageWork *work,
                 GError **error);

typedef struct ImageFile {
    int fd; /* borrowed */
    size_t bytes;
    Hash128 *sums; /* of each chunk; free with image_close() */
} ImageFile;

/* Reads what describes the chunks. INVALID: this is no image of this key and size, or its end is
 * damaged. */
bool image_open(int fd, const Hash128 *key, size_t bytes, ImageFile *out, GError **error);
void image_close(ImageFile *image); /* not its fd */

/* Replaces memory that weft_map() gave for an arena by the file's pages, checked, by up to
 * n_threads threads; weft_unmap() unmaps them as it would that memory. The pages are read-only. On
 * error (INVALID: damaged; IO: cannot be read; MEMORY: cannot be locked; CANCELLED) the arena is
 * what it was. */
bool image_map(const ImageFile *image, uint8_t *arena, unsigned n_threads, ImageWork *work,
               GError **error);

/* The same for an arena that holds these bytes already and is being read: a piece at a time, so
 * that no more than a piece lies in memory twice. On error what was replaced stays. */
bool image_take_over(const ImageFile *image, uint8_t *arena, ImageWork *work, GError **error);
