/* What a test asks of fake_nccl.c: the symbol `fake_nccl` of the library that WEFT_NCCL names. */
#pragma once

#include "kernels/device/group.h"
#include "tests/kernels/cuda_emulation/nccl.h"

typedef struct FakeNccl {
    /* set by the test, before the first communicator */
    const DeviceGroupApi *cpu;      /* moves the data; streams are the trivial device's */
    DeviceHandle *(*current)(void); /* the device that the thread has made its own */
    /* set by the test, at any time */
    _Atomic int slow;             /* how many polls each call stays in progress */
    _Atomic int async_error;      /* ncclResult_t of the next poll, once */
    _Atomic int async_error_rank; /* of the communicator that meets it */
    /* counted */
    _Atomic int joined, aborted, registered, deregistered;
    _Atomic int violations; /* calls while another was in progress, blocking communicators, a call
                               after the abort */
    void (*forget)(void);   /* frees all communicators; no stream holds a call of any */
} FakeNccl;
