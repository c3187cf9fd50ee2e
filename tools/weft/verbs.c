#include "tools/weft/verbs.h"

const Verb *const VERBS[] = {&VERB_UP, &VERB_DOWN, &VERB_RUN, &VERB_CHAT, NULL};
