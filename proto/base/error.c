/* One table maps every code to its exit code and gRPC status; both directions of the RPC round trip
 * read it. The exact code travels as a message prefix because gRPC statuses are coarser. */
#include "proto/base/error.h"

#include <string.h>

/* Any threads may ask first: with G_DEFINE_QUARK() they race. */
GQuark weft_error_quark(void)
{
    static gsize quark;
    if (g_once_init_enter(&quark)) {
        g_once_init_leave(&quark, g_quark_from_static_string("weft-error-quark"));
    }
    return (GQuark)quark;
}

/* grpc/status.h numbering; that header stays inside transport/rpc. */
enum {
    STATUS_OK = 0,
    STATUS_CANCELLED = 1,
    STATUS_UNKNOWN = 2,
    STATUS_INVALID_ARGUMENT = 3,
    STATUS_DEADLINE_EXCEEDED = 4,
    STATUS_NOT_FOUND = 5,
    STATUS_PERMISSION_DENIED = 7,
    STATUS_RESOURCE_EXHAUSTED = 8,
    STATUS_FAILED_PRECONDITION = 9,
    STATUS_ABORTED = 10,
    STATUS_OUT_OF_RANGE = 11,
    STATUS_UNIMPLEMENTED = 12,
    STATUS_INTERNAL = 13,
    STATUS_UNAVAILABLE = 14,
    STATUS_DATA_LOSS = 15,
    STATUS_UNAUTHENTICATED = 16,
};

typedef struct CodeRow {
    WeftErrorCode code;
    int exit_code, status;
} CodeRow;

/* Within one status the first row is what a foreign peer's bare status becomes. */
static const CodeRow code_table[] = {
    {WEFT_ERROR_INVALID, 2, STATUS_INVALID_ARGUMENT},
    {WEFT_ERROR_TOO_LONG, 2, STATUS_INVALID_ARGUMENT},
    {WEFT_ERROR_IMPOSSIBLE, 2, STATUS_FAILED_PRECONDITION},
    {WEFT_ERROR_NOT_FOUND, 3, STATUS_NOT_FOUND},
    {WEFT_ERROR_DENIED, 6, STATUS_PERMISSION_DENIED},
    {WEFT_ERROR_DEADLINE, 7, STATUS_DEADLINE_EXCEEDED},
    {WEFT_ERROR_CANCELLED, 130, STATUS_CANCELLED},
    {WEFT_ERROR_UNREACHABLE, 5, STATUS_UNAVAILABLE},
    {WEFT_ERROR_PROTOCOL, 1, STATUS_UNIMPLEMENTED},
    {WEFT_ERROR_VERSION, 1, STATUS_FAILED_PRECONDITION},
    {WEFT_ERROR_STALE, 1, STATUS_ABORTED},
    {WEFT_ERROR_WORKER_LOST, 1, STATUS_ABORTED},
    {WEFT_ERROR_PEER_UNREACHABLE, 1, STATUS_UNAVAILABLE},
    {WEFT_ERROR_NOT_READY, 4, STATUS_UNAVAILABLE},
    {WEFT_ERROR_MEMORY, 1, STATUS_RESOURCE_EXHAUSTED},
    {WEFT_ERROR_FULL, 4, STATUS_RESOURCE_EXHAUSTED},
    {WEFT_ERROR_IO, 1, STATUS_INTERNAL},
    {WEFT_ERROR_NUMERICS, 1, STATUS_DATA_LOSS},
    {WEFT_ERROR_FAILED, 1, STATUS_INTERNAL},
};

static const CodeRow *row_of_code(int code)
{
    for (size_t i = 0; i < G_N_ELEMENTS(code_table); i++) {
        if ((int)code_table[i].code == code) {
            return &code_table[i];
        }
    }
    return NULL;
}

WeftErrorGroup weft_error_group(const GError *error)
{
    if (error == NULL || error->domain != WEFT_ERROR || row_of_code(error->code) == NULL) {
        return WEFT_GROUP_JOB;
    }
    return (WeftErrorGroup)(error->code / 100 - 1);
}

int weft_error_exit_code(const GError *error)
{
    const CodeRow *row =
        error != NULL && error->domain == WEFT_ERROR ? row_of_code(error->code) : NULL;
    return row != NULL ? row->exit_code : 1;
}

int weft_error_to_status(const GError *error, char **message_out)
{
    const CodeRow *row =
        error != NULL && error->domain == WEFT_ERROR ? row_of_code(error->code) : NULL;
    if (row == NULL) {
        row = row_of_code(WEFT_ERROR_FAILED);
    }
    if (message_out != NULL) {
        *message_out = g_strdup_printf("[weft %d] %s", (int)row->code,
                                       error != NULL ? error->message : "unknown error");
    }
    return row->status;
}

/* The code in a "[weft NNN] " prefix, with *rest behind it; 0 if there is none. */
static int code_in_prefix(const char *message, const char **rest)
{
    static const char prefix[] = "[weft ";
    *rest = message;
    if (strncmp(message, prefix, sizeof prefix - 1) != 0) {
        return 0;
    }
    const char *p = message + sizeof prefix - 1;
    int code = 0;
    for (int i = 0; i < 3; i++, p++) {
        if (!g_ascii_isdigit(*p)) {
            return 0;
        }
        code = code * 10 + (*p - '0');
    }
    if (p[0] != ']' || p[1] != ' ' || row_of_code(code) == NULL) {
        return 0;
    }
    *rest = p + 2;
    return code;
}

static int code_of_status(int status)
{
    switch (status) {
    case STATUS_OUT_OF_RANGE:
        return WEFT_ERROR_INVALID;
    case STATUS_UNAUTHENTICATED:
        return WEFT_ERROR_DENIED;
    case STATUS_UNKNOWN:
    case STATUS_INTERNAL:
        return WEFT_ERROR_FAILED;
    default:
        break;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(code_table); i++) {
        if (code_table[i].status == status) {
            return code_table[i].code;
        }
    }
    return WEFT_ERROR_FAILED;
}

GError *weft_error_from_status(int grpc_code, const char *message)
{
    if (grpc_code == STATUS_OK) {
        return NULL;
    }
    const char *rest = "";
    int code = code_in_prefix(message != NULL ? message : "", &rest);
    if (code == 0) {
        code = code_of_status(grpc_code);
    }
    if (rest[0] == '\0') {
        return g_error_new(WEFT_ERROR, code, "the peer gave status %d and no message", grpc_code);
    }
    g_autofree char *text = g_utf8_make_valid(rest, -1); /* the peer's bytes */
    return g_error_new_literal(WEFT_ERROR, code, text);
}
