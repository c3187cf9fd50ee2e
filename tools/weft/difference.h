/* Difference: the first site at which two traced runs of one request part
 * (worker/model/stage_trace.h numbers the sites). Positions in order, and at a position the
 * embedding, each layer's attention and feed-forward, the vocabulary projection, the draw: all
 * before the first difference is equal, so the fault is there. */
#pragma once

#include "tools/weft/request.h"

typedef enum DifferenceKind {
    DIFFERENCE_NONE,
    DIFFERENCE_EMBEDDING,
    DIFFERENCE_ATTENTION,
    DIFFERENCE_FFN,
    DIFFERENCE_LOGITS,
    DIFFERENCE_DRAW
} DifferenceKind;

typedef struct Difference {
    DifferenceKind kind;
    uint32_t layer;             /* ATTENTION, FFN */
    uint32_t position;          /* of the token in the sequence, the prompt's first is 0 */
    bool generated;             /* not of the prompt */
    bool split;                 /* the ranks of the stage hold different values */
    uint32_t stage, split_rank; /* which of them differs from its stage's rank 0 */
} Difference;

/* `other` is the run whose layout is at fault; both have a plan, a trace and row hashes. */
Difference difference_find(const RunOutcome *reference, const RunOutcome *other);
/* "layer 7 feed-forward of token 12 (prompt), computed by worker-2"; returned. */
char *difference_text(const Difference *d, const RunOutcome *other);
/* "layer 7 feed-forward"; returned. */
char *difference_site(const Difference *d);
