/* NCCL's library, found at run time: a worker with one device needs none. */
#pragma once

#include <nccl.h>
#include <stdbool.h>

/* The calls that nccl.c makes, by name. */
#define NCCL_CALLS(CALL)                                                                           \
    CALL(GetVersion)                                                                               \
    CALL(GetUniqueId)                                                                              \
    CALL(CommInitRankConfig)                                                                       \
    CALL(CommGetAsyncError)                                                                        \
    CALL(CommAbort)                                                                                \
    CALL(CommRegister)                                                                             \
    CALL(CommDeregister)                                                                           \
    CALL(GetErrorString)                                                                           \
    CALL(GetLastError)                                                                             \
    CALL(AllReduce)                                                                                \
    CALL(AllGather)                                                                                \
    CALL(ReduceScatter)                                                                            \
    CALL(Send)                                                                                     \
    CALL(Recv)                                                                                     \
    CALL(GroupStart)                                                                               \
    CALL(GroupEnd)

typedef struct NcclLibrary {
    int version; /* 22809 = 2.28.9 */
#define NCCL_SLOT(name) __typeof__(&nccl##name) name;
    NCCL_CALLS(NCCL_SLOT)
#undef NCCL_SLOT
} NcclLibrary;

/* Loaded at most once, never unloaded: $WEFT_NCCL, or libnccl.so.2 where the loader looks. NULL:
 * why, static, says what is missing and what to do. Any thread. */
const NcclLibrary *nccl_library(const char **why);
