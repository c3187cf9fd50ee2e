/* ApiError: what a client of the HTTP interface is told, in OpenAI's form:
 * {"error":{"message","type","param","code"}} with an HTTP status. */
#pragma once

#include <glib.h>

typedef struct ApiError {
    int status;       /* of HTTP */
    const char *type; /* static: invalid_request_error, authentication_error, ... */
    const char *code; /* static, or NULL */
    char *param;      /* the field at fault, or NULL */
    char *message;
    int retry_after_s; /* 0: no such header */
} ApiError;

/* *error is left alone if it is set already: the first complaint counts. param may be NULL. */
void api_error_set(ApiError **error, int status, const char *type, const char *code,
                   const char *param, const char *format, ...) G_GNUC_PRINTF(6, 7);
/* 400 invalid_request_error about one field. */
void api_error_field(ApiError **error, const char *param, const char *format, ...)
    G_GNUC_PRINTF(3, 4);
/* From an error of the inner parts. Names of workers and what is missing are told; addresses,
 * paths and the like are not: `request` (an id, or NULL) leads to them in the log. Returned. */
ApiError *api_error_from(const GError *error, const char *request);
void api_error_free(ApiError *error); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(ApiError, api_error_free)

/* The error object as JSON, without a newline; returned. */
char *api_error_json(const ApiError *error);
/* The same for an answer that has a status and a message only: http's error_page. */
char *api_error_page(int status, const char *message);
