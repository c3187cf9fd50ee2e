/* Admin.Why: who waits for what, since when. */
#include "coordinator/parts.h"

#include "coordinator/message.h"
#include "proto/base/error.h"
#include "proto/config/options.h"

#include <string.h>

#define REASONS_LIMIT 1000u

static void reason_free(void *reason)
{
    message_free(reason);
}

/* What there is instead: the id that is nearest in writing, and how to see all. */
static GError *unknown(const Parts *parts, const char *what)
{
    g_autoptr(GPtrArray) open = g_ptr_array_new_with_free_func(reason_free);
    g_autoptr(GPtrArray) names = g_ptr_array_new();
    requests_explain(parts->requests, NULL, open);
    jobs_explain(parts->jobs, NULL, open);
    submissions_explain(parts->submissions, NULL, open);
    for (guint i = 0; i < open->len; i++) {
        const Weft__V1__Reason *reason = g_ptr_array_index(open, i);
        g_ptr_array_add(names, reason->id);
        if (reason->client_id[0] != '\0') {
            g_ptr_array_add(names, reason->client_id);
        }
    }
    g_ptr_array_add(names, NULL);
    const char *near = options_nearest(what, (const char *const *)names->pdata);
    g_autofree char *meant = near != NULL ? g_strdup_printf("did you mean %s? ", near) : NULL;
    return g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                       "no open request and no job is called '%s': %s`weft why` alone lists the %u "
                       "that there are",
                       what, meant != NULL ? meant : "", open->len);
}

void why_service_answer(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const char *what = ((const Weft__V1__WhyRequest *)message)->what;
    const char *id = what[0] != '\0' ? what : NULL;
    g_autoptr(GPtrArray) reasons = g_ptr_array_new_with_free_func(reason_free);
    requests_explain(parts->requests, id, reasons);
    jobs_explain(parts->jobs, id, reasons);
    if ((id == NULL || reasons->len == 0) &&
        !submissions_explain(parts->submissions, id, reasons)) {
        g_autoptr(GError) error = unknown(parts, what);
        rpc_call_finish(call, error);
        return;
    }
    Weft__V1__WhyResponse response = WEFT__V1__WHY_RESPONSE__INIT;
    response.reasons = (Weft__V1__Reason **)reasons->pdata;
    response.n_reasons = MIN(reasons->len, REASONS_LIMIT);
    response.left_out = reasons->len - (uint32_t)response.n_reasons;
    rpc_call_reply(call, &response.base);
}
