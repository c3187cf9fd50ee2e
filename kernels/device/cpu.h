/* The CPU's streams, for those who fill ops on them. */
#pragma once

#include "kernels/device/device.h"

extern const DeviceApi device_cpu_api;
extern const struct DeviceGroupApi device_cpu_group;
extern const struct DeviceTrainOps device_cpu_train_ops;

/* run(args) when the stream comes to it; `bytes` of args are copied. */
DeviceStatus device_cpu_enqueue(DeviceStream *stream, void (*run)(void *args), const void *args,
                                size_t bytes);
/* The same of what may have to wait for others: run(args) at each turn of the stream until it
 * returns true; nothing behind it runs before. It may change its args. */
DeviceStatus device_cpu_enqueue_until(DeviceStream *stream, bool (*run)(void *args),
                                      const void *args, size_t bytes);
/* The status with its text, for error_text(); one that is fatal stays. */
DeviceStatus device_cpu_fail(DeviceHandle *device, DeviceStatus status, const char *text);
/* What alloc() has given and free() not taken back, pinned memory aside. */
size_t device_cpu_bytes(const DeviceHandle *device);
uint32_t device_cpu_index(const DeviceHandle *device);
