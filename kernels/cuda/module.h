/* What the files of the CUDA module share. Not for others. */
#pragma once

#include "kernels/device/device.h"

extern const struct DeviceOps cuda_ops;
extern const struct DeviceGroupApi cuda_group; /* by NCCL */
extern const struct DeviceTrainOps cuda_train_ops;

/* The stream, its device made the thread's own. */
struct CUstream_st *cuda_stream(DeviceStream *stream);
/* What a launch on it said: CUDA's error number, 0 = none. */
DeviceStatus cuda_result(DeviceStream *stream, int error);
/* The library handle for large products on this stream, made at the first call; NULL: it cannot be
 * had. */
struct CudaDense *cuda_dense(DeviceStream *stream);
/* The device made the thread's own. */
void cuda_use(DeviceHandle *device);
/* The status, its text kept for error_text(). */
DeviceStatus cuda_say(DeviceHandle *device, DeviceStatus status, const char *text);
/* The device's place on the bus, "0000:0f:00.0"; empty where it does not say. */
void cuda_bus(DeviceHandle *device, char *out, int bytes);
