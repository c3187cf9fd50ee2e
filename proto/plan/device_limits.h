/* Numbers that plans and the ops of devices agree on. Numbers only: device code reads this, too. */
#pragma once

/* Rows whose logits are on the device at once when tokens are drawn there; else as on the host. */
#define DEVICE_LOGITS_ROWS 128u
#define DEVICE_LOGITS_ROWS_DOWN 16u
/* Candidates and most likely ids of a row at most. */
#define DEVICE_KEEP_LIMIT 512u
#define DEVICE_TOP_LIMIT 20u
/* A last chunk of fewer ids is too short for the devices' hash: such rows are not sampled there. */
#define DEVICE_SHORTEST_CHUNK 61u
/* Bytes of what the device's structs have (kernels/device/ops.h and sample.h assert it). */
#define DEVICE_SEGMENT_BYTES 16u
#define DEVICE_DRAW_BYTES 32u
#define DEVICE_CHUNK_BYTES 32u
#define DEVICE_CANDIDATE_BYTES 12u
/* Products of as many rows may be a library's in class fast, which is given so much to work in. */
#define DEVICE_LIBRARY_ROWS 256u
#define DEVICE_LIBRARY_BYTES (32ull << 20)
#define DEVICE_STRIP_BYTES (32ull << 20)
