#include "coordinator/gateway/openai/api_error.h"

#include "coordinator/gateway/openai/json_text.h"
#include "proto/base/error.h"

#include <stdarg.h>
#include <stdbool.h>

#define INVALID_REQUEST "invalid_request_error"
#define SERVER_ERROR "server_error"
#define RETRY_S 2

static ApiError *make(int status, const char *type, const char *code, const char *param,
                      char *message /* taken */)
{
    ApiError *e = g_new0(ApiError, 1);
    *e = (ApiError){
        .status = status, .type = type, .code = code, .param = g_strdup(param), .message = message};
    return e;
}

void api_error_set(ApiError **error, int status, const char *type, const char *code,
                   const char *param, const char *format, ...)
{
    if (*error == NULL) {
        va_list args;
        va_start(args, format);
        *error = make(status, type, code, param, g_strdup_vprintf(format, args));
        va_end(args);
    }
}

void api_error_field(ApiError **error, const char *param, const char *format, ...)
{
    if (*error == NULL) {
        va_list args;
        va_start(args, format);
        *error = make(400, INVALID_REQUEST, NULL, param, g_strdup_vprintf(format, args));
        va_end(args);
    }
}

/* How an error of the inner parts looks from outside. */
typedef struct Mapping {
    int code; /* WeftErrorCode */
    int status;
    const char *type, *api_code;
    bool told; /* its message has nothing that is not for clients */
} Mapping;

static const Mapping mappings[] = {
    {WEFT_ERROR_INVALID, 400, INVALID_REQUEST, NULL, true},
    {WEFT_ERROR_TOO_LONG, 400, INVALID_REQUEST, "context_length_exceeded", true},
    {WEFT_ERROR_NOT_FOUND, 404, INVALID_REQUEST, "model_not_found", false},
    {WEFT_ERROR_DENIED, 403, "permission_error", NULL, false},
    {WEFT_ERROR_DEADLINE, 504, SERVER_ERROR, "timeout", true},
    {WEFT_ERROR_FULL, 429, "rate_limit_error", "queue_full", true},
    {WEFT_ERROR_CANCELLED, 503, SERVER_ERROR, "cancelled", false},
    {WEFT_ERROR_IMPOSSIBLE, 503, SERVER_ERROR, "no_room", true},
    {WEFT_ERROR_MEMORY, 503, SERVER_ERROR, "no_room", true},
    {WEFT_ERROR_WORKER_LOST, 503, SERVER_ERROR, "worker_lost", true},
    {WEFT_ERROR_NOT_READY, 503, SERVER_ERROR, "not_ready", true},
    {WEFT_ERROR_UNREACHABLE, 503, SERVER_ERROR, "unreachable", false},
    {WEFT_ERROR_PEER_UNREACHABLE, 503, SERVER_ERROR, "unreachable", false},
    {WEFT_ERROR_STALE, 503, SERVER_ERROR, "stale", false},
    {WEFT_ERROR_NUMERICS, 500, SERVER_ERROR, "numerics", true},
};

ApiError *api_error_from(const GError *error, const char *request)
{
    Mapping m = {0, 500, SERVER_ERROR, NULL, false};
    for (size_t i = 0; error->domain == WEFT_ERROR && i < G_N_ELEMENTS(mappings); i++) {
        if (mappings[i].code == error->code) {
            m = mappings[i];
        }
    }
    char *message =
        m.told ? g_strdup(error->message)
               : g_strdup_printf("the request could not be served (%s): the "
                                 "coordinator's log has the reason%s%s",
                                 m.api_code != NULL ? m.api_code : "internal error",
                                 request != NULL ? " under " : "", request != NULL ? request : "");
    ApiError *e = make(m.status, m.type, m.api_code, NULL, message);
    e->retry_after_s = m.status == 503 || m.status == 429 ? RETRY_S : 0;
    return e;
}

void api_error_free(ApiError *e)
{
    if (e != NULL) {
        g_free(e->param);
        g_free(e->message);
        g_free(e);
    }
}

char *api_error_json(const ApiError *e)
{
    GString *out = g_string_new("{\"error\":{\"message\":");
    json_text_string(out, e->message);
    g_string_append(out, ",\"type\":");
    json_text_string(out, e->type);
    g_string_append(out, ",\"param\":");
    json_text_string(out, e->param);
    g_string_append(out, ",\"code\":");
    json_text_string(out, e->code);
    g_string_append(out, "}}");
    return g_string_free(out, FALSE);
}

char *api_error_page(int status, const char *message)
{
    const ApiError e = {.status = status,
                        .type = status < 500 ? INVALID_REQUEST : SERVER_ERROR,
                        .message = (char *)message};
    return api_error_json(&e);
}
