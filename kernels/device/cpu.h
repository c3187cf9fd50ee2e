/* The CPU's streams, for those who fill ops on them. */
#pragma once

#include "kernels/device/device.h"

extern const DeviceApi device_cpu_api;
extern const struct DeviceOps device_cpu_ops;

/* run(args) when the stream comes to it; `bytes` of args are copied. */
DeviceStatus device_cpu_enqueue(DeviceStream *stream, void (*run)(void *args), const void *args,
                                size_t bytes);
