/* What every daemon (and the CLI) needs around its objects: a main loop with a GMainContext of its
 * own, signals, sd_notify, loop lag. */
#pragma once

#include "proto/base/log.h"
#include "proto/base/loop.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct MainLoop MainLoop;

MainLoop *main_loop_new(void);
void main_loop_free(MainLoop *loop);
Loop *main_loop_loop(MainLoop *loop); /* the seam; borrowed */
void main_loop_run(MainLoop *loop);   /* until main_loop_quit() */
void main_loop_quit(MainLoop *loop);  /* any thread */
/* Runs until *done is true (set by a callback) or the timeout passed (returns false); < 0 = no
 * timeout. For the CLI. */
bool main_loop_run_until(MainLoop *loop, const bool *done, int64_t timeout_us);
/* fn(user) on the loop when SIGINT, SIGTERM, SIGHUP arrives. */
void main_loop_on_signal(MainLoop *loop, int signal_number, LoopFn fn, void *user);
/* For how long at most something that was due had to wait for the loop over the last minute, ms: a
 * timer's lateness, or the time of one round of handlers, behind which whatever comes then waits.
 */
double main_loop_lag_ms(MainLoop *loop);
/* fn on the loop after each round with such a wait of MAIN_LOOP_STALL_MS and more. computed_ms:
 * what the loop's thread computed since the round before; far less than stalled_ms: it slept in a
 * call, or it had no processor. */
#define MAIN_LOOP_STALL_MS 1000
typedef void (*MainLoopStallFn)(double stalled_ms, double computed_ms, void *user);
void main_loop_on_stall(MainLoop *loop, MainLoopStallFn fn, void *user);
void daemon_log_stall(double stalled_ms, double computed_ms, void *user /* Log */);
/* fd readable -> fn(user); returns an id for main_loop_unwatch. Used by adapters only. */
unsigned main_loop_watch_fd(MainLoop *loop, int fd, LoopFn fn, void *user);
void main_loop_unwatch(MainLoop *loop, unsigned id);

/* READY=1, STOPPING=1, STATUS=...; no-op without systemd. */
void daemon_notify(const char *state);
/* --version: the release, what peers compare, and what the program stands on ("gRPC core 29.0.0,
 * UCX 1.13.1"; GLib is added). */
void daemon_print_version(const char *program, const char *libraries);
/* The CPUs that this process may run on (its affinity), ascending uint32_t; empty if the system
 * does not say. Returned array, g_array_unref. */
GArray *daemon_cpus(void);
/* How many they are, at least 1. */
unsigned daemon_n_cpus(void);
/* Raises RLIMIT_NOFILE, ignores SIGPIPE, sets MXCSR, drops core dumps (keys are in memory). */
void daemon_prepare(void);
