/* What a device can do, as far as plans need it: the memory's rate by copies within it, arithmetic
 * by products of rows with weights, a tenth of a second each. The rest of `inout` (links) is the
 * host's and stays. Blocks. */
#pragma once

#include "kernels/device/ops.h"
#include "worker/measure.h"

typedef struct MeasureDeviceSizes {
    size_t copy_bytes;   /* beyond the device's caches */
    uint32_t side, rows; /* of the products: side x side weights */
    unsigned repeats;
} MeasureDeviceSizes;
extern const MeasureDeviceSizes measure_device_sizes; /* of a data centre's GPU */

bool measure_device(const Device *device, const MeasureDeviceSizes *sizes, Measure *inout,
                    GError **error);
/* The same of each of n devices, one after another: out[i] is *inout with device i's figures, and
 * *inout becomes out[0]. */
bool measure_devices(const Device *const *devices, unsigned n, const MeasureDeviceSizes *sizes,
                     Measure *inout, Measure *out, GError **error);
