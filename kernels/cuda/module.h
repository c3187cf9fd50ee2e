/* What the files of the CUDA module share. Not for others. */
#pragma once

#include "kernels/device/device.h"

extern const struct DeviceOps cuda_ops;

/* The stream, its device made the thread's own. */
struct CUstream_st *cuda_stream(DeviceStream *stream);
/* After kernels were launched on it: what the launch said. */
DeviceStatus cuda_launched(DeviceStream *stream);
