/* tests/golden/digests.txt: what `generic` gives on the tiny models of tests/golden/logits, bit for
 * bit. */
#pragma once

#include "kernels/kernels.h"
#include "tests/golden/logits/golden_cases.h"

/* 32 hex digits over ids, logprobs and row hashes of three requests (greedy, sampled with every
 * filter, scored) on one rank with this table. */
void golden_digest(const GoldenCase *c, const Kernels *kernels, char hex[33]);
/* The committed digest of a model; NULL if the file has none. *version gets the numerics version
 * that the file belongs to. Returned. */
char *golden_digest_committed(const char *name, unsigned *version);
