/* Fiber: a stack of its own for code that blocks, so that one thread can run many of them in turn.
 * An engine without a thread (EngineOptions.inline_run) runs on one: where its real thread would
 * sleep, the fiber gives way to the simulation. One OS thread. */
#pragma once

#include <stdbool.h>

typedef struct Fiber Fiber;
typedef void (*FiberFn)(void *user);

Fiber *fiber_new(FiberFn fn, void *user);
/* Not while it is suspended inside fn. NULL-safe. */
void fiber_free(Fiber *fiber);
/* Runs fn(user) from its beginning, or from where it gave way. True when fn returned. Not inside a
 * fiber. */
bool fiber_resume(Fiber *fiber);
bool fiber_is_suspended(const Fiber *fiber);
/* Inside a fiber: back to whoever resumed it. */
void fiber_yield(void);
/* The running fiber, or NULL. */
Fiber *fiber_current(void);
/* Unmaps the stacks that are kept for the next fiber_new(). */
void fiber_forget_stacks(void);
