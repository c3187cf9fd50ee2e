/* DeviceGroup: collectives among devices of one host, enqueued on their streams like any op of
 * ops.h and, like those, part of a graph. A table with two fills: NCCL (kernels/cuda) and the
 * trivial device's, whose ranks are threads of one process.
 *
 * All ranks enqueue the same calls in the same order. Nothing here waits for another rank: begin()
 * and each enqueuing call return at once, perhaps with NOT_READY; then poll() until it says
 * otherwise comes before anything else on the group or its stream. A rank that never comes leaves
 * the others' streams standing: whoever waits keeps a deadline and calls abort(), also before a
 * stream that may stand is freed.
 *
 * Sums: all_reduce() and reduce_scatter() add in the fill's own order (class fast). The exact one
 * (NUMERICS 2 and 3) is all_gather() of every rank's subtrees, then fold(), which adds them in the
 * order of the unit tree: the bits of transport/group, on any number of ranks.
 *
 * Threads: one at a time for each group; abort() from any. */
#pragma once

#include "kernels/device/device.h"
#include "proto/plan/tree.h"

#define DEVICE_GROUP_RANKS 64u
#define DEVICE_GROUP_PARTS 16u

/* Made by one rank, given to all of them: the group they mean. A secret of the epoch. */
#define DEVICE_GROUP_ID_BYTES 128u
typedef struct DeviceGroupId {
    uint8_t bytes[DEVICE_GROUP_ID_BYTES];
} DeviceGroupId;

/* Where a device is: a group is made of devices of one fill and domain, each at its own place. */
typedef struct DeviceSeat {
    char fill[16];   /* "nccl" | "cpu"; empty: no group can be made here */
    char domain[48]; /* the running system, or for the trivial device the process */
    char place[48];  /* among them */
} DeviceSeat;

/* One transfer of exchange(); peers name each other. */
typedef struct DeviceGroupPart {
    bool send; /* else receive */
    uint32_t peer;
    void *data; /* read when sent */
    size_t bytes;
} DeviceGroupPart;

/* How the ranks' subtrees complete the tree. Rank r's k-th is operand r * most + k of what was
 * gathered; merges[i]: pops-and-adds after the i-th was pushed. */
typedef struct DeviceTree {
    uint32_t n_ranks, most; /* subtrees of the rank that has the most */
    uint32_t n_operands;
    bool flushes; /* subnormals, of operands and sums: units of bf16dot (kernels/ops/gemm.h) */
    uint16_t operand[TREE_LEAVES_LIMIT];
    uint8_t merges[TREE_LEAVES_LIMIT];
} DeviceTree;

typedef struct DeviceGroup DeviceGroup;

typedef struct DeviceGroupApi {
    uint32_t abi, bytes; /* DEVICE_ABI, sizeof(DeviceGroupApi) */
    const char *kind;
    /* Whether groups can be made at all; why[256]: what makes them ("NCCL 2.28.9"), or what is
     * missing. */
    bool (*usable)(char *why);
    void (*seat)(DeviceHandle *device, DeviceSeat *out);
    DeviceStatus (*make_id)(DeviceHandle *device, DeviceGroupId *out);
    /* Joins; poll() says when all have. The device is borrowed for the group's life. */
    DeviceStatus (*begin)(DeviceHandle *device, const DeviceGroupId *id, uint32_t n_ranks,
                          uint32_t rank, DeviceGroup **out);
    /* OK: goes on; NOT_READY: ask again; GROUP_FAILED: it has ended, error_text() of the device
     * says why, and what collectives wrote since is undefined. */
    DeviceStatus (*poll)(DeviceGroup *group);

    /* out[i] = the sum of all ranks' in[i], i < n; out may be in. */
    DeviceStatus (*all_reduce)(DeviceGroup *group, DeviceStream *stream, const float *in,
                               float *out, size_t n);
    /* out + r * bytes = rank r's mine; mine may be its part of out. */
    DeviceStatus (*all_gather)(DeviceGroup *group, DeviceStream *stream, const void *mine,
                               void *out, size_t bytes);
    /* out[i] = the sum of all ranks' in[rank * n + i], i < n; out may be in + rank * n. */
    DeviceStatus (*reduce_scatter)(DeviceGroup *group, DeviceStream *stream, const float *in,
                                   float *out, size_t n);
    /* All of them at once, so that ranks may send to each other; at most DEVICE_GROUP_PARTS. */
    DeviceStatus (*exchange)(DeviceGroup *group, DeviceStream *stream, const DeviceGroupPart *parts,
                             uint32_t n);
    /* out[i] = the tree's sum of gathered[operand * n + i] over the operands, i < n; no overlap.
     * gathered: n_ranks * most vectors, of each rank `most`, its subtrees in leaf order first. */
    DeviceStatus (*fold)(DeviceGroup *group, DeviceStream *stream, const DeviceTree *tree,
                         const float *gathered, size_t n, float *out);

    /* Memory that collectives will use again and again, until the group is freed. Where it cannot
     * be registered it serves unregistered: OK. */
    DeviceStatus (*register_buffer)(DeviceGroup *group, void *memory, size_t bytes);
    /* Ends it at once: collectives under way are given up, their streams go on. Graphs that hold
     * any are freed before. */
    void (*abort)(DeviceGroup *group);
    void (*free)(DeviceGroup *group); /* NULL-safe; no stream holds a call of it any more */
} DeviceGroupApi;

/* Whether these n devices can be one group. */
bool device_seats_fit(const DeviceSeat *seats, uint32_t n);

/* cuts[0..n_ranks]: the ranks' leaves of node(0, n_leaves), n_leaves <= TREE_LEAVES_LIMIT. */
void device_tree_init(DeviceTree *tree, uint32_t n_leaves, const uint32_t *cuts, uint32_t n_ranks);
/* The same of up to TREE_CHUNKS_LIMIT leaves, of which those in `missing` (bit i: leaf i < 64) have
 * no operand (proto/plan/tree.h). False: the ranks have more than TREE_LEAVES_LIMIT subtrees. */
bool device_tree_init_missing(DeviceTree *tree, uint32_t n_leaves, uint64_t missing,
                              const uint32_t *cuts, uint32_t n_ranks);
