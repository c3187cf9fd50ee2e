/* PackedImages: what this worker's ranks hold, as it is packed, in files of the cache directory, so
 * that the next start of the same part maps a file instead of reading, checking and packing slices.
 *
 *   DIR/packed/<hash of the part and of the arena's layout>      image_file.h
 *
 * A file is whole or absent. It is believed where it belongs to this user alone, says what it is
 * and its chunks have the hashes that it names; what is damaged or cannot be read is removed with
 * one warning. All images together are at most as large as the host's memory; the ones unused for
 * longest go first, so that those of a plan that cuts otherwise now go by themselves.
 *
 * None is written where half of the free disk would not hold it, or where this process may not lock
 * as much memory. None is used on file systems of a network, of user space or in memory, nor on a
 * host of several memory nodes, where pages of the page cache may lie at another node than the
 * threads that read them. */
#pragma once

#include "proto/base/log.h"
#include "worker/shard/image_file.h"
#include "worker/shard/shard.h"

typedef struct PackedImages PackedImages;

/* dir: the cache's, copied; NULL: no images. limit_bytes bounds all images together; 0: the host's
 * memory. Written after_us after a load. Log is borrowed. */
PackedImages *packed_images_new(const char *dir, uint64_t limit_bytes, int64_t after_us, Log *log);
void packed_images_free(PackedImages *images); /* NULL-safe */

/* Fills an empty shard of the host from the image of its part (weights_part(); NULL = none), read
 * by n_threads threads. False: there is none that can be used, and the shard is empty still. Any
 * thread. */
bool packed_images_load(PackedImages *images, const char *part, Shard *shard, unsigned n_threads,
                        ImageWork *work);

/* Writes the image of a complete shard in the background, at the lowest priority, then gives the
 * memory of the arena back for the file's pages, a chunk at a time: the bytes stay where they are
 * and what they are. NULL where nothing is to be done. The shard must outlive the keeper. */
typedef struct ImageKeeper ImageKeeper;
ImageKeeper *image_keeper_start(PackedImages *images, const char *part, Shard *shard);
/* Ends the work where it is and waits for that (a few chunks). NULL-safe. */
void image_keeper_stop(ImageKeeper *keeper);
