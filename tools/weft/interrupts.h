/* SIGINT and SIGTERM as something to read, so that a verb ends in order. Main thread; whoever
 * starts threads does so after interrupts_open(), that none of them takes the signal. */
#pragma once

#include <glib.h>
#include <signal.h>
#include <stdbool.h>

typedef struct Interrupts {
    int fd; /* readable: a signal came */
    sigset_t before;
} Interrupts;

/* From now on they do not end the process. IO. */
bool interrupts_open(Interrupts *out, GError **error);
/* Takes what came; false: nothing did. */
bool interrupts_take(Interrupts *in);
/* As it was before. What comes late is forgotten, unless it is held (below). */
void interrupts_close(Interrupts *in);

/* For the rest of the command they wait for the next interrupts_open(): a command that has daemons
 * of its own ends them whatever comes. */
void interrupts_hold(void);
/* CANCELLED: one waits. */
bool interrupts_none_waits(GError **error);
