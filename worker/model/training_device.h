/* TrainingDevice: what a training pass has on a device beside the tapes and buffers that
 * training_buffers.c lays out there: the numbers of a micro-batch, a workspace, and pinned memory
 * for what other stages, tensor ranks and the caller are told. Its ops are training_device_ops
 * (training_pass.h): one thread enqueues, in the families' order. Internal to worker/model. */
#pragma once

#include "worker/model/training_pass.h"

typedef struct TrainingDevice TrainingDevice;

/* For a Training whose sizes are known; its arena is made elsewhere. */
bool training_device_new(Training *t, GError **error);
void training_device_free(TrainingDevice *d); /* NULL-safe */
/* Its bytes on the device; a plan has no device and asks with its ops. */
size_t training_device_bytes(const Training *t, const DeviceTrainOps *ops);
/* The tables of RoPE, which were made on the host. */
void training_device_tables(Training *t, const float *cos, const float *sin, size_t n);

/* Where tensor ranks exchange (training_device_exchange.c): subtrees of the rank that has the most
 * of any sum; floats of those of all ranks, and of messages. */
uint32_t training_device_subtrees(const Training *t);
size_t training_device_gathered_floats(const Training *t);
size_t training_device_exchange_floats(const Training *t);
/* Partial sums of all ranks, or own whole ones in `out`, become `out` [rows][width]. */
void training_device_sum(Pass *p, const Units *units, float *out, const char *operation);

/* The batch's numbers go up. scatter: with the order of the embedding's gradient. */
void training_device_begin(Pass *p, bool scatter);
/* Pinned [rows][width]: for the input and gradient of a chunk, filled by the caller after what was
 * there is read; and what they and its output come to, waited for. */
float *training_device_input(Training *t);
float *training_device_gradient(Training *t);
void training_device_take_input(Pass *p);    /* up, into the first tape */
void training_device_take_gradient(Pass *p); /* up, into dx */
void training_device_give_gradient(Pass *p); /* dx down */
const float *training_device_output(Training *t, uint32_t slot);
const float *training_device_logits(Training *t, uint32_t row);
