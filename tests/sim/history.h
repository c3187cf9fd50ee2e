/* History: what happened in one seed's run, and what of it must not have happened. */
#pragma once

#include "tests/sim/whole.h"

typedef struct Violation {
    int64_t at_us;
    const char *rule; /* static: the invariant's name */
    char *text;
} Violation;

typedef struct History {
    Whole *whole;
    GPtrArray *violations; /* of Violation */
    unsigned n_tokens, n_resumed;
} History;

void history_violate(History *h, const char *rule, const char *format, ...) G_GNUC_PRINTF(3, 4);
/* The first violation as a line, or NULL; returned. */
char *history_text(const History *h);
void history_clear(History *h);
