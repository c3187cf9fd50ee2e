/* Foundation: what all seeds of a process share: a tiny model's file, a state directory with a CA,
 * and what an undisturbed engine makes of a handful of requests (the reference that every stream is
 * held against, id by id and row by row). */
#pragma once

#include "weft/v1/serve.pb-c.h"

#include <stdint.h>

#define REFERENCE_REQUESTS 10u
#define REFERENCE_PROMPT 24u
#define REFERENCE_TOKENS 40u
#define REFERENCE_CHOICES 3u
#define REFERENCE_ROWS (REFERENCE_PROMPT + REFERENCE_TOKENS)

/* Ids as they come, one row hash each. */
typedef struct ReferenceSequence {
    uint32_t ids[REFERENCE_ROWS];
    uint8_t hashes[REFERENCE_ROWS][16];
    uint32_t n;
} ReferenceSequence;

typedef struct ReferenceRequest {
    uint32_t prompt[REFERENCE_PROMPT], n_prompt;
    Weft__V1__Sampler sampler; /* temperature 0: greedy */
    ReferenceSequence choices[REFERENCE_CHOICES];
    /* The prompt and what choice 0 made of it, and its scores from the second position on. */
    uint32_t text[REFERENCE_ROWS], n_text;
    ReferenceSequence scores;
} ReferenceRequest;

typedef struct Foundation {
    char *dir; /* state directory and models */
    const char *model;
    ReferenceRequest requests[REFERENCE_REQUESTS];
} Foundation;

/* Runs an engine with a real thread for a moment; not inside a world. */
Foundation *foundation_new(void);
void foundation_free(Foundation *foundation);
/* The digest of the first n tokens of each sequence, as a run reports it. */
void reference_digest(const ReferenceSequence *sequences, uint32_t n_sequences, uint32_t n,
                      uint8_t out[16]);
