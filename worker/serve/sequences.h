/* Sequences: the table of slots that every rank of a replica keeps, changed only by Steps, so that
 * it is equal everywhere (DESIGN 7.1). */
#pragma once

#include "worker/serve/step.h"

typedef struct Sequence {
    bool used;
    StepAdmit admit;
    SampleBias *bias; /* admit.n_bias; kept when the slot is, grown when a tenant needs more */
    uint32_t bias_capacity;
    uint32_t *pages;  /* page table, ceil(context / 32) */
    uint32_t *tokens; /* ids by position, as far as rows were seen; the sampler's history */
    uint32_t n_tokens;
} Sequence;

typedef struct Sequences {
    StepLimits limits;
    Sequence *slots;
    const uint32_t **page_tables; /* by slot, for the stage */
} Sequences;

size_t sequences_bytes(const StepLimits *limits);
void sequences_init(Sequences *s, const StepLimits *limits);
void sequences_clear(Sequences *s);
/* Applies releases, admits, reused and copied pages, page entries and tokens of a step; what the
 * pages hold is the stage's (stage_copy_pages()). */
void sequences_apply(Sequences *s, const Step *step);
