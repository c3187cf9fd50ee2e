/* TrainWant: data that a rank asks for: tokens, or a rectangle of a tensor of the checkpoint that
 * it goes on from or of the weights that it begins with. Read in the pool: it may come from a disk.
 */
#pragma once

#include "coordinator/train/train_input.h"
#include "proto/model/checkpoint.h"
#include "proto/plan/train_limits.h"
#include "weft/v1/train.pb-c.h"

typedef struct TrainWant {
    uint64_t id;
    void *data; /* [size] bytes, little-endian, 4 an element */
    size_t size;
    GError *error; /* NULL: data is filled */
    /* private */
    bool validation;
    uint64_t first, n;
    char *tensor; /* NULL: tokens */
    SliceRect rect;
} TrainWant;

/* Returned. */
TrainWant *train_want_new(const Weft__V1__TrainWant *message);
/* Any thread. from: NULL: the weights are the input's. PROTOCOL: there is no such data. */
void train_want_read(TrainWant *w, const TrainInput *input, const Checkpoint *from);
void train_want_free(TrainWant *w); /* NULL-safe */
