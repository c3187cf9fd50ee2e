/* What the files of the CUDA module share. Not for others. */
#pragma once

#include "kernels/device/device.h"

extern const struct DeviceOps cuda_ops;

/* The stream, its device made the thread's own. */
struct CUstream_st *cuda_stream(DeviceStream *stream);
/* What a launch on it said: CUDA's error number, 0 = none. */
DeviceStatus cuda_result(DeviceStream *stream, int error);
