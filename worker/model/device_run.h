/* The pieces of a pass on a device: a family's layer (llama_device.c, gpt2_device.c) is a list of
 * them, each enqueued on the stage's stream. Internal to worker/model; engine thread. After a
 * failure of the device (stage->failure) the rest enqueues nothing. */
#pragma once

#include "worker/model/device_stage.h"

typedef struct DeviceRun {
    DeviceStage *d;
    const StageRun *run;
    DevicePass shape;
    GroupStatus status;
} DeviceRun;

/* A layer of the stage over d->x, in place; false: the group (status) or the device failed. */
typedef bool (*DeviceLayerFn)(DeviceRun *p, uint32_t layer);
bool llama_device_layer(DeviceRun *p, uint32_t layer);
bool gpt2_device_layer(DeviceRun *p, uint32_t layer);

/* One matrix of several that read the same x. */
typedef struct DeviceProduct {
    const PackedMatrix *w;
    float *out;
    const float *bias; /* or NULL */
} DeviceProduct;

bool device_run_copy(DeviceStage *d, void *to, const void *from, size_t bytes, DeviceCopy direction,
                     const char *what);
/* h = norm of x[index], NULL: of x; layer norm where there is a bias, else RMS norm. */
void device_run_norm(DeviceStage *d, const uint32_t *index, const float *weight, const float *bias,
                     uint32_t rows);
void device_run_products(DeviceStage *d, const float *x, uint32_t rows, const DeviceProduct *list,
                         unsigned n, const char *what);
/* out = gelu(W x + bias). */
void device_run_gelu_product(DeviceStage *d, const float *x, uint32_t rows, const PackedMatrix *w,
                             const float *bias, float *out, const char *what);
/* Rotates q and k where the model has RoPE, and writes k and v to their pages. */
void device_run_store_keys(DeviceRun *p, uint32_t layer);
/* attn from q and the pages. */
void device_run_attend(DeviceRun *p, uint32_t layer);
/* x += W in + bias, over all tensor ranks; W is cut by `units`, bias may be NULL. */
void device_run_add_product(DeviceRun *p, const PackedMatrix *w, const float *in,
                            const StageUnits *units, const float *bias, uint16_t site,
                            const char *what);
/* x is complete after a sub-layer: traced rows come down to be hashed. */
void device_run_trace(DeviceRun *p, uint32_t site);
/* Fail point: a wrong bit in x, if the run asks for one after this layer. */
void device_run_flip_bit(DeviceRun *p, uint32_t layer);
/* Neither a group nor the device has failed. */
bool device_run_well(const DeviceRun *p);
