/* ShardUpload: the way of packed slices to a device: a few pinned buffers, each with a stream of
 * its own, so that packing into one goes on while others are copied. A buffer is one thread's from
 * take to send; a take waits until a buffer's last copy is done. Any thread. */
#pragma once

#include "kernels/device/device.h"

typedef struct ShardUpload ShardUpload;

/* device: borrowed. slot_bytes: the largest piece. */
ShardUpload *shard_upload_new(const Device *device, size_t slot_bytes, GError **error);
void shard_upload_free(ShardUpload *upload); /* NULL-safe */
/* A buffer of slot_bytes, contents undefined; NULL once anything failed. */
void *shard_upload_take(ShardUpload *upload, unsigned *slot);
/* Its first rows x bytes go to `rows` runs that lie to_pitch apart on the device. */
void shard_upload_send(ShardUpload *upload, unsigned slot, void *to, size_t to_pitch, size_t bytes,
                       size_t rows);
/* Waits for every copy; the first failure of all of them. */
bool shard_upload_finish(ShardUpload *upload, GError **error);
