/* The inside of a TrainingDevice, for training_device.c and training_device_exchange.c. */
#pragma once

#include "worker/model/training_device.h"

/* What a batch says, one layout on both sides. R = most rows, D = most documents. */
typedef struct Numbers {
    uint32_t *tokens, *targets, *learnt; /* [R]; targets: own index, or XENT_NO_TARGET */
    uint32_t *positions;                 /* [R]: of RoPE and learnt positions */
    uint32_t *places, *documents;        /* [R]: place in its document, and which one */
    /* order of the gradients of a table's rows: ids [R], starts [R + 1], order [R] */
    uint32_t *ids, *id_starts, *id_order, *place_ids, *place_starts, *place_order;
    /* among tensor ranks, where in what they gathered: the row's embedding; its target's logit */
    uint32_t *owners, *target_places;
    DeviceSegment *segments; /* [D] */
    uint32_t *pages;         /* [D][pages_ld] */
} Numbers;

/* Documents whose keys and values have room at once. */
typedef struct Part {
    uint32_t first_document, n_documents, first_row, n_rows, longest;
} Part;

/* An operand that the workspace holds, rounded. */
typedef struct Rounded {
    const float *x;
    size_t outer, step;
    uint32_t n, length;
} Rounded;

struct TrainingDevice {
    DeviceWork *work;
    uint32_t max_documents, pages_ld, n_pages;
    uint8_t *numbers, *host_numbers;
    Numbers up, host;
    DeviceEvent *read; /* the host's numbers were */
    void *workspace;
    size_t workspace_bytes;
    float *row_max, *row_sum, *losses;                            /* [rows] */
    float *host_x, *host_y, *host_dx, *host_losses, *host_logits; /* pinned */
    uint32_t *counts; /* host, [own vocabulary or length]: zeros between uses */
    GArray *parts;    /* of Part: the batch's documents */
    uint32_t n_documents, longest;
    uint32_t n_ids, n_places; /* of the two orders */
    bool has_rounded;
    Rounded a, b;
    /* tensor ranks: training_device_exchange.c */
    DeviceTree trees[3]; /* class exact: of attn_units, ffn_units, chunks */
    Training *staged;    /* no team: the Training with pinned memory where ranks exchange */
    float *pinned;       /* its memory */
};

static inline const DeviceTrainOps *device_ops(const Pass *p)
{
    return p->m->device->work->ops;
}
static inline DeviceStream *device_stream(const Pass *p)
{
    return p->m->device->work->stream;
}

/* What every op but a product ends with: the workspace is another's. */
static inline void device_did(Pass *p, DeviceStatus status, const char *what)
{
    p->m->device->has_rounded = false;
    device_work_note(p->m->device->work, status, what);
}

/* One copy, in order with what is enqueued. */
static inline void device_copy(TrainingDevice *d, void *to, const void *from, size_t bytes,
                               DeviceCopy direction, const char *what)
{
    device_work_note(d->work,
                     d->work->device->api->copy(d->work->stream, to, from, bytes, direction), what);
}

/* ---- training_device_exchange.c ---- */

bool device_exchange_new(Training *t, GError **error);
void device_exchange_free(TrainingDevice *d);
/* Fills owners and target_places of a batch. */
void device_exchange_numbers(const Pass *p, Numbers *host);
/* Own rows of x, the others' being zeros, become all rows. */
void device_exchange_embedding(Pass *p, float *x);
/* Own statistics of logits become all. */
void device_exchange_row_stats(Pass *p);
/* dk and dv of shared KV heads: own subtrees become the sums. */
void device_exchange_shared_heads(Pass *p);
