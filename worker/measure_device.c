#include "worker/measure_device.h"

#include <string.h>

const MeasureDeviceSizes measure_device_sizes = {
    .copy_bytes = (size_t)512 << 20, .side = 4096, .rows = 512, .repeats = 8};

typedef struct Bench {
    const Device *device;
    const MeasureDeviceSizes *sizes;
    DeviceStream *stream;
    uint8_t *memory;
    size_t bytes;
    DeviceStatus status;
} Bench;

static void *part(const Bench *b, size_t *at, size_t bytes)
{
    void *place = b->memory + *at;
    *at += (bytes + 255) & ~(size_t)255;
    return place;
}

/* Seconds of `repeats` runs of fn, after one that does not count. */
static double timed(Bench *b, DeviceStatus (*fn)(Bench *b, Dtype type), Dtype type)
{
    int64_t start = 0;
    for (unsigned i = 0; i <= b->sizes->repeats && b->status == DEVICE_OK; i++) {
        b->status = fn(b, type);
        if (i == 0 && b->status == DEVICE_OK) {
            b->status = b->device->api->stream_wait(b->stream);
            start = g_get_monotonic_time();
        }
    }
    if (b->status == DEVICE_OK) {
        b->status = b->device->api->stream_wait(b->stream);
    }
    return MAX(1e-6 * (double)(g_get_monotonic_time() - start), 1e-6);
}

static DeviceStatus run_copy(Bench *b, Dtype type)
{
    const size_t half = b->sizes->copy_bytes / 2;
    (void)type;
    return b->device->api->copy(b->stream, b->memory + half, b->memory, half, DEVICE_COPY_WITHIN);
}

static size_t workspace_bytes(const Bench *b)
{
    const DeviceLimits limits = {.max_rows = b->sizes->rows,
                                 .max_keys = KV_BLOCK,
                                 .max_segments = 1,
                                 .n_heads = 1,
                                 .n_kv_heads = 1,
                                 .head_size = 64,
                                 .widest_in = b->sizes->side,
                                 .widest_out = b->sizes->side,
                                 .fast = true};
    return device_workspace_bytes(&limits);
}

static DeviceStatus run_matmul(Bench *b, Dtype type)
{
    const uint32_t side = b->sizes->side, rows = b->sizes->rows;
    const size_t panel = packed_panel_bytes(type, side), floats = sizeof(float) * rows * side;
    size_t at = 0;
    const PackedMatrix w = {.type = type,
                            .n_out = side,
                            .n_in = side,
                            .panel_bytes = panel,
                            .data = part(b, &at, side / PANEL_ROWS * panel)};
    const float *x = part(b, &at, floats);
    float *out = part(b, &at, floats);
    const DeviceMatmul args = {.w = &w,
                               .x = x,
                               .x_ld = side,
                               .rows = rows,
                               .out = out,
                               .out_ld = side,
                               .fast = true,
                               .workspace_bytes = workspace_bytes(b),
                               .workspace = part(b, &at, workspace_bytes(b))};
    return b->device->ops->matmul(b->stream, &args);
}

static size_t matmul_bytes(const Bench *b)
{
    const uint32_t side = b->sizes->side;
    return side / PANEL_ROWS * packed_panel_bytes(DTYPE_BF16, side) +
           2 * sizeof(float) * (size_t)b->sizes->rows * side + workspace_bytes(b) + 4 * 256;
}

static double ops_per_s(Bench *b, Dtype type)
{
    const double work = 2.0 * b->sizes->side * b->sizes->side * b->sizes->rows * b->sizes->repeats;
    return b->device->ops->has_weight(type) ? work / timed(b, run_matmul, type) : 0;
}

bool measure_device(const Device *device, const MeasureDeviceSizes *sizes, Measure *inout,
                    GError **error)
{
    Bench b = {.device = device, .sizes = sizes};
    b.bytes = MAX(sizes->copy_bytes, matmul_bytes(&b));
    b.status = device->api->stream_new(device->handle, &b.stream);
    if (b.status == DEVICE_OK) {
        b.status = device->api->alloc(device->handle, b.bytes, (void **)&b.memory);
    }
    if (b.status == DEVICE_OK) {
        b.status = device->api->fill(b.stream, b.memory, 0, b.bytes);
    }
    if (b.status == DEVICE_OK) { /* a copy reads and writes */
        inout->read_bytes_per_s =
            (double)sizes->copy_bytes * sizes->repeats / timed(&b, run_copy, DTYPE_F32);
        inout->f32_ops_per_s = ops_per_s(&b, DTYPE_BF16);
        inout->int8_ops_per_s = ops_per_s(&b, DTYPE_Q8_0);
        memset(inout->matmul_ops_per_s, 0, sizeof inout->matmul_ops_per_s); /* the host's */
    }
    const bool ok = device_check(device, b.status, "measuring", error);
    if (b.stream != NULL) {
        device->api->stream_free(b.stream);
    }
    device->api->free(device->handle, b.memory);
    return ok;
}

bool measure_devices(const Device *const *devices, unsigned n, const MeasureDeviceSizes *sizes,
                     Measure *inout, Measure *out, GError **error)
{
    for (unsigned i = 0; i < n; i++) {
        out[i] = *inout;
        if (!measure_device(devices[i], sizes, &out[i], error)) {
            return false;
        }
    }
    *inout = out[0];
    return true;
}
