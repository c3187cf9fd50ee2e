/* Reason: what a request or a job waits for (weft.v1.Reason), as it is put together. An owned
 * message: message_free(). Pure. */
#pragma once

#include "weft/v1/admin.pb-c.h"

#include <glib.h>
#include <stdint.h>

Weft__V1__Reason *reason_new(const char *kind, const char *id); /* returned; texts are copied */
/* A field of a reason becomes a text that was made for it: taken. */
void reason_set(char **field, char *text);
/* One link of the chain more: the waits are in order, the reason's own first. what: taken.
 * Returned: borrowed. */
Weft__V1__Wait *reason_wait(Weft__V1__Reason *reason, const char *waiter, const char *waits_for,
                            char *what, uint64_t since_ms);
