/* The tiny models whose logits are golden: every weight type, and the shapes that could go wrong.
 * make_logits.py computes them in float64 from the files that make-tiny-model writes;
 * test_golden_logits.c holds the engine to them. */
#pragma once

#include "proto/plan/plan.h"
#include "tests/golden/gguf_builder.h"

typedef struct GoldenCase {
    const char *name;
    KvType kv_type; /* of the engine's cache, and of the reference's rounding */
    GgufBuilderConfig config;
} GoldenCase;

unsigned golden_case_count(void);
void golden_case(unsigned index, GoldenCase *out);
