/* DeviceOps by the kernels of this folder. */
#include "kernels/cuda/module.h"
#include "kernels/device/ops.h"

static bool has_weight(Dtype type)
{
    (void)type;
    return false;
}

static bool has_kv(KvType type, uint32_t head_size)
{
    (void)type;
    (void)head_size;
    return false;
}

const DeviceOps cuda_ops = {
    .abi = DEVICE_ABI, .bytes = sizeof(DeviceOps), .has_weight = has_weight, .has_kv = has_kv};
