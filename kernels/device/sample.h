/* What goes to a device that samples, and what comes back: the same bytes for host and device. */
#pragma once

#include "proto/plan/device_limits.h"

#include <stdint.h>

/* How a row's token is drawn (NUMERICS 12); device memory, so that a graph reads it anew. */
typedef struct DeviceDraw {
    uint64_t seed;
    uint32_t choice, position, purpose; /* as in GumbelKey (kernels/ops/sample.h) */
    float temperature;                  /* 0: value = logit */
    uint32_t noise;                     /* 1: value = logit / temperature + noise; 0: without */
} DeviceDraw;

/* A chunk of VOCAB_CHUNK ids of a row: digest of its raw logits (NUMERICS 13) and chunk_stats() of
 * them and of logit / temperature (0 where that is 0); NaN where one is not finite. */
typedef struct DeviceChunk {
    uint8_t hash[16];
    float m, l, tempered_m, tempered_l;
} DeviceChunk;

typedef struct DeviceCandidate {
    float value, logit;
    uint32_t id;
} DeviceCandidate;
