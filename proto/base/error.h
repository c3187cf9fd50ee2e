/* Errors of every library in weft: one GError domain, codes grouped by what they break.
 *
 * Message: what failed and with what values, lower case, no function names; then what to do
 * about it. The group tells a caller what is still usable after the error. */
#pragma once

#include <glib.h>

typedef enum WeftErrorGroup {
    WEFT_GROUP_REQUEST, /* the input was at fault; everything else goes on */
    WEFT_GROUP_PEER,    /* the other end of a connection; another peer may serve */
    WEFT_GROUP_WORKER,  /* a worker or its host; its epoch ends */
    WEFT_GROUP_JOB,     /* the job or deployment as a whole */
} WeftErrorGroup;

/* hundreds = group + 1; the exit code that CONTRACT.md gives is weft_error_exit_code(). */
typedef enum WeftErrorCode {
    WEFT_ERROR_INVALID = 100,     /* bad argument, file, message: exit 2 */
    WEFT_ERROR_IMPOSSIBLE = 101,  /* layout or memory cannot be had: exit 2 */
    WEFT_ERROR_NOT_FOUND = 102,   /* exit 3 */
    WEFT_ERROR_DENIED = 103,      /* exit 6 */
    WEFT_ERROR_DEADLINE = 104,    /* exit 7 */
    WEFT_ERROR_CANCELLED = 105,   /* exit 130 */
    WEFT_ERROR_FULL = 106,        /* as many wait as may: try again later; exit 4 */
    WEFT_ERROR_TOO_LONG = 107,    /* a prompt that the context cannot hold: exit 2 */
    WEFT_ERROR_UNREACHABLE = 200, /* the host that was asked: exit 5 */
    WEFT_ERROR_PROTOCOL = 201,    /* malformed or out of order: exit 1 */
    WEFT_ERROR_VERSION = 202,     /* version skew; both versions in the message: exit 1 */
    WEFT_ERROR_STALE = 203,       /* stamped with an old epoch or generation: exit 1 */
    /* Who was asked answers, but a host that it needs cannot be reached, or has not what is needed:
     * exit 1 */
    WEFT_ERROR_PEER_UNREACHABLE = 204,
    WEFT_ERROR_WORKER_LOST = 300, /* exit 1 */
    WEFT_ERROR_NOT_READY = 301,   /* exit 4 */
    WEFT_ERROR_MEMORY = 302,      /* exit 1 */
    WEFT_ERROR_IO = 303,          /* exit 1 */
    WEFT_ERROR_NUMERICS = 304,    /* non-finite value, digest that differs: exit 1 */
    WEFT_ERROR_FAILED = 400,      /* exit 1 */
} WeftErrorCode;

#define WEFT_ERROR (weft_error_quark())
GQuark weft_error_quark(void);

/* The group of an error; errors of other domains count as WEFT_GROUP_JOB. */
WeftErrorGroup weft_error_group(const GError *error);

/* The process exit code of CONTRACT.md for an error; 1 for foreign domains. */
int weft_error_exit_code(const GError *error);

/* gRPC status code (grpc/status.h numbering) for an error, and back. INVALID -> 3, IMPOSSIBLE -> 9,
 * NOT_FOUND -> 5, DENIED -> 7, DEADLINE -> 4, CANCELLED -> 1, UNREACHABLE -> 14, VERSION/STALE ->
 * 9/10, NOT_READY -> 14, MEMORY and FULL -> 8, IO/FAILED -> 13, ... The WeftErrorCode itself
 * travels in the status message as a prefix "[weft NNN] " so that the round trip is exact; both
 * functions handle it. What comes back is UTF-8, whatever bytes the peer sent. */
int weft_error_to_status(const GError *error, char **message_out /* returned */);
GError *weft_error_from_status(int grpc_code, const char *message);
