/* A preloaded library that counts a process's live allocations, of all threads, where a test can
 * read it: in the file $WEFT_LIVE_BLOCKS/PID, one int64 in the machine's order. What allocators
 * keep for themselves is not in it, so that it stands still where RSS does not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static _Atomic int64_t own, *live = &own;

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void *(*next_memalign)(size_t, size_t);
static void (*next_free)(void *);

/* dlsym() allocates before there is an allocator: that is never freed. */
static _Alignas(16) char first[1 << 14];
static size_t n_first;

static bool is_first(const void *p)
{
    return (const char *)p >= first && (const char *)p < first + sizeof first;
}

static void *take_first(size_t n)
{
    void *p = first + n_first;
    n_first += (n + 15) / 16 * 16;
    return n_first <= sizeof first ? p : NULL;
}

static void find(void)
{
    static bool looking;
    if (next_free == NULL && !looking) {
        looking = true;
        next_malloc = dlsym(RTLD_NEXT, "malloc");
        next_calloc = dlsym(RTLD_NEXT, "calloc");
        next_realloc = dlsym(RTLD_NEXT, "realloc");
        next_memalign = dlsym(RTLD_NEXT, "memalign");
        next_free = dlsym(RTLD_NEXT, "free");
    }
}

static void *count(void *p)
{
    if (p != NULL) {
        atomic_fetch_add(live, 1);
    }
    return p;
}

void *malloc(size_t n)
{
    find();
    return next_malloc != NULL ? count(next_malloc(n)) : take_first(n);
}

void *calloc(size_t n, size_t size)
{
    find();
    return next_calloc != NULL ? count(next_calloc(n, size)) : take_first(n * size);
}

void free(void *p)
{
    if (p != NULL && !is_first(p)) {
        find();
        atomic_fetch_sub(live, 1);
        next_free(p);
    }
}

void *realloc(void *p, size_t n)
{
    if (p == NULL) {
        return malloc(n);
    }
    if (n == 0) {
        free(p);
        return NULL;
    }
    if (is_first(p)) {
        void *moved = malloc(n);
        return moved != NULL ? memcpy(moved, p, n) : NULL;
    }
    find();
    return next_realloc(p, n);
}

void *memalign(size_t alignment, size_t n)
{
    find();
    return count(next_memalign(alignment, n));
}

void *aligned_alloc(size_t alignment, size_t n)
{
    return memalign(alignment, n);
}

int posix_memalign(void **out, size_t alignment, size_t n)
{
    void *p = memalign(alignment, n);
    if (p == NULL) {
        return ENOMEM;
    }
    *out = p;
    return 0;
}

__attribute__((constructor)) static void open_file(void)
{
    const char *folder = getenv("WEFT_LIVE_BLOCKS");
    char path[512];
    if (folder == NULL || snprintf(path, sizeof path, "%s/%d", folder, (int)getpid()) < 0) {
        return;
    }
    const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof own) != 0) {
        return;
    }
    void *mapped = mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) {
        _Atomic int64_t *at = mapped;
        atomic_store(at, atomic_load(&own));
        live = at;
    }
}
