#include "tools/weft/verbs.h"

const Verb *const VERBS[] = {
    &VERB_UP,          &VERB_DOWN,  &VERB_STATUS,  &VERB_TOP,    &VERB_WHY,        &VERB_PLAN,
    &VERB_RUN,         &VERB_CHAT,  &VERB_SERVE,   &VERB_VERIFY, &VERB_PERPLEXITY, &VERB_BENCH,
    &VERB_BENCH_SERVE, &VERB_TOKEN, &VERB_KEY,     &VERB_LOGIN,  &VERB_DOCTOR,     &VERB_PROBE,
    &VERB_REVOKE,      &VERB_DRAIN, &VERB_UNDRAIN, NULL};
