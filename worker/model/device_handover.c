/* x of a stage on a device as other stages' devices see it: where it leaves from, where it arrives,
 * and its checksum, taken where it lies. */
#include "worker/model/device_run.h"

#include <string.h>

bool stage_memory(const Stage *s, StageMemory *out)
{
    const DeviceStage *d = s->device;
    if (d == NULL) {
        return false;
    }
    *out = (StageMemory){.kind = d->device->info.kind,
                         .x = d->x,
                         .arriving = d->arriving,
                         .bytes = sizeof(float) * s->max_rows * (size_t)s->o.spec->width};
    return true;
}

bool device_stage_sum(DeviceStage *d, const float *x, size_t bytes)
{
    const size_t at = d->sizes.input.sum;
    return d->stage->failure == NULL &&
           device_stage_ok(d,
                           d->device->ops->checksum(d->stream, x, bytes / sizeof(uint32_t),
                                                    (uint32_t *)(void *)(d->input + at),
                                                    d->workspace, d->sizes.workspace),
                           "checksum of activations") &&
           device_run_copy(d, d->host_input + at, d->input + at, sizeof(uint32_t), DEVICE_COPY_DOWN,
                           "checksum of activations");
}

uint32_t stage_checksum(const Stage *s)
{
    const DeviceStage *d = s->device;
    uint32_t sum;
    memcpy(&sum, d->host_input + d->sizes.input.sum, sizeof sum);
    return sum;
}

bool stage_take(Stage *s, size_t bytes, int64_t deadline_us)
{
    static const char what[] = "activations that arrived";
    DeviceStage *d = s->device;
    return device_stage_sum(d, d->arriving, bytes) &&
           device_run_copy(d, d->x, d->arriving, bytes, DEVICE_COPY_WITHIN, what) &&
           device_stage_wait(d, deadline_us, what);
}
