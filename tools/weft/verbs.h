/* The verbs, each defined in its file. */
#pragma once

#include "tools/weft/cli.h"

extern const Verb VERB_UP, VERB_DOWN, VERB_TOKEN, VERB_REVOKE, VERB_LOGIN, VERB_STATUS, VERB_TOP,
    VERB_DOCTOR, VERB_PLAN, VERB_RUN, VERB_CHAT, VERB_VERIFY, VERB_PERPLEXITY, VERB_BENCH,
    VERB_DRAIN, VERB_UNDRAIN, VERB_PROBE;
