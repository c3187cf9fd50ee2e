#include "coordinator/reason.h"

void reason_set(char **field, char *text)
{
    if (*field != protobuf_c_empty_string) {
        g_free(*field);
    }
    *field = text;
}

Weft__V1__Reason *reason_new(const char *kind, const char *id)
{
    Weft__V1__Reason *reason = g_new(Weft__V1__Reason, 1);
    weft__v1__reason__init(reason);
    reason_set(&reason->kind, g_strdup(kind));
    reason_set(&reason->id, g_strdup(id));
    return reason;
}

Weft__V1__Wait *reason_wait(Weft__V1__Reason *reason, const char *waiter, const char *waits_for,
                            char *what, uint64_t since_ms)
{
    Weft__V1__Wait *wait = g_new(Weft__V1__Wait, 1);
    weft__v1__wait__init(wait);
    reason_set(&wait->waiter, g_strdup(waiter));
    reason_set(&wait->waits_for, g_strdup(waits_for));
    reason_set(&wait->what, what);
    wait->since_ms = since_ms;
    reason->waits = g_renew(Weft__V1__Wait *, reason->waits, reason->n_waits + 1);
    reason->waits[reason->n_waits++] = wait;
    return wait;
}
