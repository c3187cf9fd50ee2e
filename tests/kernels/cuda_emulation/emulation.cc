/* Fibers for the threads of one block at a time (cuda_runtime.h tells what is emulated).
 *
 * A thread runs until it waits: at a block's barrier for all its threads, at a warp-wide operation
 * for the 32 lanes. The last one to come lets the others go on. When nobody can run and somebody
 * lives, a barrier is divergent: the launch fails and says who waits where. */
#include "cuda_runtime.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

enum { STACK_BYTES = 256 * 1024, SHARED_BYTES = 227 * 1024, THREADS_LIMIT = 1024 };

alignas(128) unsigned char shared_bytes[SHARED_BYTES];
EmulatedThread *emulated_thread;
uint3 emulated_block;
dim3 emulated_block_dim, emulated_grid_dim;

/* ---- changing place ---- */

#if defined(__x86_64__)
typedef void *Context;
extern "C" void emulated_switch(Context *from, Context to);
__asm__(".text\n"
        ".globl emulated_switch\n"
        ".type emulated_switch,@function\n"
        "emulated_switch:\n"
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
        "ret\n"
        ".size emulated_switch,.-emulated_switch\n");
static void context_make(Context *context, unsigned char *stack, void (*entry)())
{
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry); /* where `ret` goes, with the stack as after a call */
    for (int i = 0; i < 6; i++) {
        *--top = nullptr;
    }
    *context = top;
}
static void context_switch(Context *from, Context *to)
{
    emulated_switch(from, *to);
}
#else
#include <ucontext.h>
typedef ucontext_t Context;
static void context_make(Context *context, unsigned char *stack, void (*entry)())
{
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK_BYTES;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}
static void context_switch(Context *from, Context *to)
{
    swapcontext(from, to);
}
#endif

enum class State { Ready, AtBarrier, AtWarp, Done };

struct PendingCopy {
    void *shared;
    const void *global; /* NULL: zeros */
    unsigned group;
};

struct Fiber {
    EmulatedThread thread;
    Context context;
    std::unique_ptr<unsigned char[]> stack; /* not cleared: pages come when they are used */
    State state;
    const char *site;
    unsigned turns; /* warp-wide operations so far: their slots take turns */
    std::vector<PendingCopy> copies;
    unsigned groups; /* of copies, committed */
};

struct Warp {
    EmulatedSlot slots[2][32];
    unsigned arrived;
    size_t size;
};

struct Emulation {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned n_threads, at_barrier;
    Context scheduler;
    const std::function<void()> *body;
    std::string failure;
    EmulationOrder order;
    uint64_t random;
};
static Emulation emulation;
static std::mutex one_at_a_time; /* streams of several devices launch from threads of their own */

static Fiber *current()
{
    return reinterpret_cast<Fiber *>(emulated_thread); /* its first member */
}

#if defined(__SANITIZE_ADDRESS__)
static const void *scheduler_bottom;
static size_t scheduler_size;
#endif

static void to_scheduler()
{
    Fiber *fiber = current();
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(fiber->state == State::Done ? nullptr : &fake, scheduler_bottom,
                                   scheduler_size);
#endif
    context_switch(&fiber->context, &emulation.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
}

static void to_fiber(Fiber *fiber)
{
    emulated_thread = &fiber->thread;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber->stack.get(), STACK_BYTES);
#endif
    context_switch(&emulation.scheduler, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

static void entry()
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    (*emulation.body)();
    current()->state = State::Done;
    to_scheduler();
    std::abort(); /* nobody resumes a finished thread */
}

static std::string place(const Fiber &fiber)
{
    return "thread " + std::to_string(fiber.thread.index.x + fiber.thread.index.y * blockDim.x) +
           " of block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
           std::to_string(blockIdx.z) + " at " + (fiber.site ? fiber.site : "its end");
}

static void fail(const std::string &what)
{
    if (emulation.failure.empty()) {
        emulation.failure = what;
    }
}

/* A thread that did wrong never goes on: the launch is over. */
static void fail_here(const std::string &what)
{
    fail(what);
    to_scheduler();
}

/* ---- what kernels call ---- */

void emulated_barrier(const char *site)
{
    Fiber *fiber = current();
    fiber->site = site;
    fiber->state = State::AtBarrier;
    if (++emulation.at_barrier == emulation.n_threads) {
        emulation.at_barrier = 0;
        for (unsigned i = 0; i < emulation.n_threads; i++) {
            Fiber &other = emulation.fibers[i];
            if (other.site != site && std::strcmp(other.site, site) != 0) {
                fail_here("divergent barrier: " + place(*fiber) + ", " + place(other));
            }
            other.state = State::Ready;
        }
        return;
    }
    to_scheduler();
}

const EmulatedSlot *emulated_gather(const char *site, unsigned mask, const void *value, size_t size)
{
    Fiber *fiber = current();
    Warp &warp = emulation.warps[fiber->thread.warp];
    EmulatedSlot *slots = warp.slots[fiber->turns++ & 1u];
    fiber->site = site;
    if (mask != ~0u) {
        fail_here("a warp-wide operation of some lanes only: " + place(*fiber));
    }
    if (size > EMULATED_SLOT_BYTES || (warp.arrived != 0 && warp.size != size)) {
        fail_here("different warp-wide operations: " + place(*fiber));
    }
    warp.size = size;
    std::memcpy(slots[fiber->thread.lane], value, size);
    warp.arrived |= 1u << fiber->thread.lane;
    fiber->state = State::AtWarp;
    if (warp.arrived == ~0u) {
        warp.arrived = 0;
        for (unsigned lane = 0; lane < 32; lane++) {
            Fiber &other = emulation.fibers[fiber->thread.warp * 32 + lane];
            if (other.site != site && std::strcmp(other.site, site) != 0) {
                fail_here("divergent warp: " + place(*fiber) + ", " + place(other));
            }
            other.state = State::Ready;
        }
    } else {
        to_scheduler();
    }
    return slots;
}

void emulated_check_aligned(const void *pointer, size_t alignment)
{
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
        fail_here("an address that is no multiple of " + std::to_string(alignment) + ": " +
                  place(*current()));
    }
}

static void copy_now(const PendingCopy &copy)
{
    if (copy.global != nullptr) {
        std::memcpy(copy.shared, copy.global, 16);
    } else {
        std::memset(copy.shared, 0, 16);
    }
}

void copy_to_shared(void *shared, const void *global, bool there)
{
    emulated_check_aligned(shared, 16);
    emulated_check_aligned(global, 16);
    const PendingCopy copy = {shared, there ? global : nullptr, current()->groups};
    if (emulation.order == EMULATION_DESCENDING) {
        copy_now(copy); /* as early as may be; else as late as may be */
    } else {
        current()->copies.push_back(copy);
    }
}

void commit_copies()
{
    current()->groups++;
}

void emulated_wait_copies(unsigned under_way)
{
    Fiber *fiber = current();
    std::vector<PendingCopy> rest;
    for (const PendingCopy &copy : fiber->copies) {
        if (copy.group + under_way >= fiber->groups) {
            rest.push_back(copy);
        } else {
            copy_now(copy);
        }
    }
    fiber->copies.swap(rest);
}

float emulated_bf16(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float f;
    std::memcpy(&f, &wide, sizeof f);
    return f;
}

float emulated_f16(uint16_t bits)
{
    const unsigned exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    const float sign = bits & 0x8000u ? -1.0f : 1.0f;
    if (exponent == 31) {
        return mantissa != 0 ? NAN : sign * INFINITY;
    }
    if (exponent == 0) {
        return sign * (float)mantissa * 0x1p-24f;
    }
    const uint32_t power = (exponent + 102) << 23; /* 2^(exponent - 25) */
    float unit;
    std::memcpy(&unit, &power, sizeof unit);
    return sign * (float)(mantissa + 1024) * unit;
}

uint32_t emulated_to_bf16(float f)
{
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return std::isnan(f) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

uint32_t emulated_to_f16(float f)
{
    const uint32_t sign = std::signbit(f) ? 0x8000u : 0;
    int exponent = 0;
    if (std::isnan(f)) {
        return 0x7fffu;
    }
    if (std::isinf(f) || f == 0.0f) {
        return f == 0.0f ? sign : sign | 0x7c00u;
    }
    std::frexp(f, &exponent); /* |f| < 2^exponent: units of its last place, or of subnormals */
    const int unit = std::max(exponent - 11, -24);
    const uint32_t n = (uint32_t)std::nearbyint(std::ldexp(std::fabs(f), -unit));
    const uint32_t bits = unit == -24 ? n : n + ((uint32_t)(unit + 24) << 10);
    return sign | std::min(bits, (uint32_t)0x7c00u); /* a carry goes into the exponent */
}

/* ---- the scheduler ---- */

static uint64_t next_random()
{
    uint64_t z = emulation.random += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static void put_in_order(std::vector<unsigned> &list)
{
    if (emulation.order == EMULATION_DESCENDING) {
        std::reverse(list.begin(), list.end());
    }
    if (emulation.order == EMULATION_RANDOM) {
        for (size_t i = list.size(); i > 1; i--) {
            std::swap(list[i - 1], list[next_random() % i]);
        }
    }
}

/* Shared memory that is cleared, and watched beyond its end. */
static size_t watched(size_t shared_size)
{
    return std::min<size_t>(shared_size + 4096, SHARED_BYTES);
}

static void start_block(size_t shared_size)
{
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_bytes, SHARED_BYTES);
#endif
    std::memset(shared_bytes, 0xff, watched(shared_size));
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared_bytes + (shared_size + 7) / 8 * 8,
                                SHARED_BYTES - (shared_size + 7) / 8 * 8);
#else
    (void)shared_size;
#endif
    for (Warp &warp : emulation.warps) {
        warp.arrived = 0;
    }
    emulation.at_barrier = 0;
    for (unsigned i = 0; i < emulation.n_threads; i++) {
        Fiber &fiber = emulation.fibers[i];
        if (!fiber.stack) {
            fiber.stack.reset(new unsigned char[STACK_BYTES]);
        }
        context_make(&fiber.context, fiber.stack.get(), entry);
        fiber.thread = {
            {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)},
            i % 32,
            i / 32};
        fiber.state = State::Ready;
        fiber.site = nullptr;
        fiber.turns = 0;
        fiber.copies.clear();
        fiber.groups = 0;
    }
}

/* Runs one thread until it waits; false if the launch is over. */
static bool run_thread(unsigned i, unsigned *live)
{
    Fiber *fiber = &emulation.fibers[i];
    to_fiber(fiber);
    *live -= fiber->state == State::Done;
    return emulation.failure.empty();
}

/* One warp until all its threads wait at a barrier: as far ahead of the others as may be. */
static bool run_warp(unsigned warp, unsigned *live)
{
    for (bool ran = true; ran;) {
        ran = false;
        for (unsigned lane = 0; lane < 32; lane++) {
            const unsigned i =
                warp * 32 + (emulation.order == EMULATION_DESCENDING ? 31 - lane : lane);
            if (emulation.fibers[i].state == State::Ready) {
                ran = true;
                if (!run_thread(i, live)) {
                    return false;
                }
            }
        }
    }
    return true;
}

/* Every thread that can run, once, in random order. */
static bool run_any(unsigned *live)
{
    std::vector<unsigned> turn;
    for (unsigned i = 0; i < emulation.n_threads; i++) {
        if (emulation.fibers[i].state == State::Ready) {
            turn.push_back(i);
        }
    }
    put_in_order(turn);
    for (unsigned i : turn) {
        if (!run_thread(i, live)) {
            return false;
        }
    }
    return true;
}

static void fail_of_waiting()
{
    for (unsigned i = 0; i < emulation.n_threads; i++) {
        if (emulation.fibers[i].state != State::Done) {
            fail("not every thread comes to a barrier: " + place(emulation.fibers[i]) + " waits");
        }
    }
}

static void run_block()
{
    std::vector<unsigned> warps(emulation.n_threads / 32);
    for (unsigned w = 0; w < warps.size(); w++) {
        warps[w] = w;
    }
    put_in_order(warps);
    for (unsigned live = emulation.n_threads; live > 0;) {
        const bool ready =
            std::any_of(emulation.fibers.begin(), emulation.fibers.begin() + emulation.n_threads,
                        [](const Fiber &fiber) { return fiber.state == State::Ready; });
        if (!ready) {
            fail_of_waiting();
            return;
        }
        if (emulation.order == EMULATION_RANDOM) {
            if (!run_any(&live)) {
                return;
            }
            continue;
        }
        for (unsigned w : warps) {
            if (!run_warp(w, &live)) {
                return;
            }
        }
    }
}

/* A byte behind the dynamic shared memory of the block that has run must still be as it was. */
static void check_shared(size_t shared_size)
{
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_bytes, SHARED_BYTES);
#endif
    for (size_t i = shared_size; i < watched(shared_size); i++) {
        if (shared_bytes[i] != 0xff) {
            fail("a write behind " + std::to_string(shared_size) + " bytes of shared memory");
            return;
        }
    }
}

cudaError_t emulated_launch(const cudaLaunchConfig_t *config, const std::function<void()> &body)
{
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const dim3 grid = config->gridDim, block = config->blockDim;
    const uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    emulation.n_threads = block.x * block.y * block.z;
    emulation.failure.clear();
    if (n_blocks == 0 || grid.y > 65535 || grid.z > 65535 || emulation.n_threads == 0 ||
        emulation.n_threads > THREADS_LIMIT || emulation.n_threads % 32 != 0 ||
        config->dynamicSmemBytes > SHARED_BYTES) {
        fail("a launch of " + std::to_string(n_blocks) + " blocks of " +
             std::to_string(emulation.n_threads) + " threads with " +
             std::to_string(config->dynamicSmemBytes) + " bytes of shared memory");
        return cudaErrorInvalidConfiguration;
    }
    emulation.body = &body;
    emulated_block_dim = block;
    emulated_grid_dim = grid;
    if (emulation.fibers.size() < emulation.n_threads) {
        emulation.fibers.resize(emulation.n_threads);
    }
    emulation.warps.resize(emulation.n_threads / 32);
    std::vector<unsigned> blocks(n_blocks);
    for (unsigned i = 0; i < n_blocks; i++) {
        blocks[i] = i;
    }
    put_in_order(blocks);
    for (unsigned i : blocks) {
        emulated_block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        start_block(config->dynamicSmemBytes);
        run_block();
        check_shared(config->dynamicSmemBytes);
        if (!emulation.failure.empty()) {
            std::fprintf(stderr, "emulation: %s\n", emulation.failure.c_str());
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

/* ---- the host's side ---- */

extern "C" {
void emulation_set_order(EmulationOrder order, unsigned long seed)
{
    emulation.order = order;
    emulation.random = seed;
}

const char *emulation_failure(void)
{
    return emulation.failure.c_str();
}

/* Malloc'ed at an address of 16 bytes: no more than what a slice of a larger allocation has. */
cudaError_t cudaMalloc(void **pointer, size_t size)
{
    *pointer = std::malloc(size);
    if (*pointer == nullptr) {
        return cudaErrorMemoryAllocation;
    }
    std::memset(*pointer, 0xff, size);
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer)
{
    std::free(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind)
{
    std::memcpy(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size)
{
    std::memset(to, value, size);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorLaunchFailure ? emulation.failure.c_str() : "error";
}
}
