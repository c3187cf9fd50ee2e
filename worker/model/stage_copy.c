/* Copies of KV pages (StepCopy). On the CPU the threads share each page's bytes; on a device the
 * copies go ahead of the pass on its stream. One after the other: a page that was copied may be the
 * place of a later copy. */
#include "worker/model/device_stage.h"

#include <string.h>

typedef struct CopyJob {
    const Stage *stage;
    const Step *step;
} CopyJob;

static void copy_region(void *user, unsigned t, unsigned n_threads)
{
    const CopyJob *job = user;
    const KvPages *kv = &job->stage->kv;
    /* blocks of one page: K and V of each layer and head */
    const uint32_t n_blocks = 2 * kv->n_layers * kv->n_kv_heads;
    uint32_t first, last;
    pool_share(n_blocks, 1, t, n_threads, &first, &last);
    for (uint32_t i = 0; i < job->step->n_copies; i++) {
        const StepCopy *c = &job->step->copies[i];
        if (c->from != c->to && first < last) {
            memcpy(kv->memory + c->to * kv->page_bytes + first * kv->block_bytes,
                   kv->memory + c->from * kv->page_bytes + first * kv->block_bytes,
                   (last - first) * kv->block_bytes);
        }
    }
}

static void copy_on_device(DeviceStage *d, const Step *step)
{
    const size_t bytes = d->kv.page_bytes;
    for (uint32_t i = 0; i < step->n_copies; i++) {
        const StepCopy *c = &step->copies[i];
        if (c->from != c->to &&
            !device_stage_ok(d,
                             d->device->api->copy(d->stream, d->kv.memory + c->to * bytes,
                                                  d->kv.memory + c->from * bytes, bytes,
                                                  DEVICE_COPY_WITHIN),
                             "copying a KV page")) {
            return;
        }
    }
}

void stage_copy_pages(Stage *stage, const Step *step)
{
    if (step->n_copies == 0) {
        return;
    }
    if (stage->device != NULL) {
        copy_on_device(stage->device, step);
        return;
    }
    CopyJob job = {stage, step};
    pool_run(stage->o.pool, copy_region, &job);
}
