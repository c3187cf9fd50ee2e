/* One process of a host at a time, by name: an abstract socket's name is the turn, which the kernel
 * gives back when the process ends in any way. Within a network namespace. Names
 * have at most 107 bytes. */
#pragma once

#define HOST_TURN_TAKEN (-1)   /* another process has it */
#define HOST_TURN_WITHOUT (-2) /* the system cannot say: go on without */

/* Takes the turn at once, or one of the above. Give it back with host_turn_end(). */
int host_turn_try(const char *name);
void host_turn_end(int turn); /* none: nothing */
