/* What the proofs of the bit contract share: a tiny model as an open file, runs of it on a layout,
 * and their comparison bit by bit. A failure to build or run fails the test at once. */
#pragma once

#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"

#define RUNS_PROMPT 150u /* ids of the longest prompt: five blocks of keys */

/* The model's file, mapped; nothing stays in the file system. Returned. */
Gguf *runs_model(const GgufBuilderConfig *config);
/* 3 KV heads of 3 query heads each, 4 layers, awkward widths: units 9 / 12 as in SmolLM2; 2500 ids.
 * Returned. */
Gguf *runs_awkward_model(Dtype type);
LocalReplica *runs_replica(const Gguf *gguf, LocalLayout layout);
/* n ids below `limit`, the same at every call. */
void runs_prompt(uint32_t *ids, uint32_t n, uint32_t limit);
/* One request on a replica of its own; it must not end with an error. */
void runs_request(const Gguf *gguf, LocalLayout layout, const EngineRequest *request,
                  LocalResult *result);
/* Greedy: n_tokens after n_prompt ids of runs_prompt() below 259. */
void runs_greedy(const Gguf *gguf, LocalLayout layout, uint32_t n_prompt, uint32_t n_tokens,
                 LocalResult *result);
/* Ids, logprobs and row hashes. */
bool runs_equal(const LocalResult *a, const LocalResult *b);
