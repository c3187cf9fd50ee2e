/* DeviceWork: a rank's stream on a device in training, and what it has enqueued there: the first
 * failure stays, so that callers enqueue a whole pass and ask once. Copies of any host memory go
 * through two pinned buffers. One thread. */
#pragma once

#include "kernels/device/train_ops.h"

typedef struct DeviceWork {
    const Device *device; /* borrowed */
    const DeviceTrainOps *ops;
    DeviceStream *stream;
    uint8_t *staging[2]; /* pinned */
    DeviceEvent *staged[2];
    DeviceStatus status; /* the first that was not OK */
    const char *what;    /* was being done then */
} DeviceWork;

/* Returned. */
DeviceWork *device_work_new(const Device *device, GError **error);
void device_work_free(DeviceWork *w); /* NULL-safe; waits for the stream */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(DeviceWork, device_work_free)

/* Takes note of a status; true while nothing has failed. what: static. */
bool device_work_note(DeviceWork *w, DeviceStatus status, const char *what);
/* The failure as an error; true: none. */
bool device_work_check(const DeviceWork *w, GError **error);
/* Until all that was enqueued is done. */
bool device_work_wait(DeviceWork *w, const char *what);

/* Memory of the device, all its bytes zero once what is enqueued here is done; freed by the other
 * one, which waits first. */
void *device_work_alloc(DeviceWork *w, size_t bytes, const char *what, GError **error);
void device_work_release(DeviceWork *w, void *memory); /* NULL-safe, also for w */
void *device_work_pinned(DeviceWork *w, size_t bytes, const char *what, GError **error);
void device_work_unpin(DeviceWork *w, void *memory); /* likewise */

/* Copies between any host memory and the device; done when they return. */
bool device_work_up(DeviceWork *w, void *device, const void *host, size_t bytes);
bool device_work_down(DeviceWork *w, void *host, const void *device, size_t bytes);
