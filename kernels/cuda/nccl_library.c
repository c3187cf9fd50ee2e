#include "kernels/cuda/nccl_library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NCCL_FILE "libnccl.so.2"
/* From this version on the library has what is called here: buffers that users register. */
#define NCCL_LEAST 21900

static NcclLibrary library;
static char missing[256];

static bool find(void *handle, const char *name, void *slot)
{
    void *symbol = dlsym(handle, name);
    memcpy(slot, &symbol, sizeof symbol);
    if (symbol == NULL) {
        snprintf(missing, sizeof missing, "no NCCL: the library has no %s: install 2.19 or later",
                 name);
    }
    return symbol != NULL;
}

static bool find_all(void *handle)
{
#define NCCL_FIND(name)                                                                            \
    if (!find(handle, "nccl" #name, &library.name)) {                                              \
        return false;                                                                              \
    }
    NCCL_CALLS(NCCL_FIND)
#undef NCCL_FIND
    return true;
}

static void load(void)
{
    const char *chosen = getenv("WEFT_NCCL");
    void *handle = dlopen(chosen != NULL ? chosen : NCCL_FILE, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        snprintf(missing, sizeof missing,
                 "no NCCL: %.120s: install " NCCL_FILE " or name its file in WEFT_NCCL", dlerror());
        return;
    }
    if (!find_all(handle)) {
        dlclose(handle);
        return;
    }
    if (library.GetVersion(&library.version) != ncclSuccess || library.version < NCCL_LEAST) {
        snprintf(missing, sizeof missing,
                 "no NCCL: the library's version is %d.%d.%d: install 2.19 or later",
                 library.version / 10000, library.version / 100 % 100, library.version % 100);
        dlclose(handle);
    }
}

const NcclLibrary *nccl_library(const char **why)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    *why = missing;
    return missing[0] == '\0' ? &library : NULL;
}
