/* One process of a host at a time, by name: an abstract socket's name is the turn, which the kernel
 * gives back when the process ends in any way. Within a network namespace. */
#pragma once

#define HOST_TURN_NONE (-1)

/* Takes the turn, or HOST_TURN_NONE at once if another process has it. Give it back with
 * host_turn_end(). */
int host_turn_try(const char *name);
void host_turn_end(int turn); /* HOST_TURN_NONE: nothing */
