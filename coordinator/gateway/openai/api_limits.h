/* ApiLimits: what one request may ask of the HTTP interface. Configuration: `--http-limits`. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ApiLimits {
    uint64_t body;     /* bytes of a body; more is 413, and not read */
    uint64_t json;     /* of a body, bytes that are parsed; more is 400, with what else is too much */
    uint64_t depth;    /* of nesting in it */
    uint64_t values;   /* JSON values in it */
    uint64_t strings;  /* of these and of their names, those that are texts: they cost the most */
    uint64_t messages; /* of a chat */
    uint64_t prompts;  /* of one completion request */
    uint64_t n;        /* choices of a prompt */
    uint64_t stops, stop_bytes;
    uint64_t logprobs;      /* alternatives told for a token */
    uint64_t logit_bias;    /* entries */
    uint64_t queue;         /* sequences open at once, waiting or running; more is 429 */
    uint64_t reader;        /* bytes that may wait for a client that takes none; 8 times as much for
                               one that does */
    uint64_t stall_s;       /* seconds without a byte taken after which it counts as such */
    uint64_t connections;   /* sockets at once */
    uint64_t source;        /* sockets of one address; 0 = any number */
    uint64_t header;        /* bytes of a request's line and headers */
    uint64_t idle_s;        /* seconds in which a socket must move */
    uint64_t request_s;     /* seconds in which a request must have arrived */
    uint64_t deadline_s;    /* seconds in which it must be answered; 0 = no bound */
    uint64_t keep_alive_ms; /* a stream with nothing to say sends a comment so often */
} ApiLimits;

ApiLimits api_limits_default(void);
/* "n=4,body=1M,queue=64": overrides in *limits. INVALID naming the word, the names that there are
 * and the range. NULL text: nothing. */
bool api_limits_parse(const char *text, ApiLimits *limits, GError **error);
/* Whether a client with so many bytes waiting, none of them taken for so long, does not read: a
 * burst to one that does, or a server's thread that gets no processor, is no reason to cut it. */
bool api_limits_is_stuck(const ApiLimits *limits, uint64_t waiting_bytes, int64_t stalled_us);
/* "body=8M, json=4M, ...", every name with its default, for help; returned. */
char *api_limits_help(void);
