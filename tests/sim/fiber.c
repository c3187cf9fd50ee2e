#include "tests/sim/fiber.h"

#include <glib.h>
#include <sys/mman.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define STACK_BYTES ((size_t)1 << 20) /* mapped lazily */

struct Fiber {
    FiberFn fn;
    void *user;
    void *stack;
    ucontext_t inside, outside;
    bool suspended;
    const void *outside_stack;
    size_t outside_bytes;
};

static Fiber *running;
static GQueue kept_stacks = G_QUEUE_INIT;

/* ---- what AddressSanitizer wants to know ----------------------------------------------------- */

static void leave_for(void **fake, const void *stack, size_t bytes)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake, stack, bytes);
#else
    (void)fake, (void)stack, (void)bytes;
#endif
}

static void arrived(void *fake, const void **stack, size_t *bytes)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, stack, bytes);
#else
    (void)fake, (void)stack, (void)bytes;
#endif
}

/* ---- the fiber ------------------------------------------------------------------------------- */

static void leave(Fiber *fiber)
{
    void *fake = NULL;
    leave_for(&fake, fiber->outside_stack, fiber->outside_bytes);
    swapcontext(&fiber->inside, &fiber->outside);
    arrived(fake, &fiber->outside_stack, &fiber->outside_bytes);
}

static void begin(void)
{
    Fiber *fiber = running;
    arrived(NULL, &fiber->outside_stack, &fiber->outside_bytes);
    for (;;) {
        fiber->fn(fiber->user);
        fiber->suspended = false;
        leave(fiber);
    }
}

Fiber *fiber_new(FiberFn fn, void *user)
{
    Fiber *fiber = g_new0(Fiber, 1);
    fiber->fn = fn;
    fiber->user = user;
    fiber->stack = g_queue_pop_head(&kept_stacks);
    if (!fiber->stack) {
        fiber->stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        g_assert(fiber->stack != MAP_FAILED);
    }
    getcontext(&fiber->inside);
    fiber->inside.uc_stack.ss_sp = fiber->stack;
    fiber->inside.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber->inside, begin, 0);
    return fiber;
}

void fiber_free(Fiber *fiber)
{
    if (fiber) {
        g_assert(!fiber->suspended);
        g_queue_push_head(&kept_stacks, fiber->stack);
        g_free(fiber);
    }
}

bool fiber_resume(Fiber *fiber)
{
    g_assert(!running);
    void *fake = NULL;
    running = fiber;
    fiber->suspended = true;
    leave_for(&fake, fiber->stack, STACK_BYTES);
    swapcontext(&fiber->outside, &fiber->inside);
    arrived(fake, NULL, NULL);
    running = NULL;
    return !fiber->suspended;
}

bool fiber_is_suspended(const Fiber *fiber)
{
    return fiber->suspended;
}

void fiber_yield(void)
{
    leave(running);
}

Fiber *fiber_current(void)
{
    return running;
}

void fiber_forget_stacks(void)
{
    void *stack;
    while ((stack = g_queue_pop_head(&kept_stacks))) {
        munmap(stack, STACK_BYTES);
    }
}
