/* What tests of the planner share: models, and what is asked of plans and refusals. A check that
 * does not hold fails the test. */
#pragma once

#include "coordinator/planner/planner.h"

#include <stdbool.h>

#define MIB (1ull << 20)

ModelSpec *smol(void);   /* SmolLM2-135M's shape */
ModelSpec *middle(void); /* a Llama of 1.4 B in Q4_1: 8 attention and 32 FFN units */
ModelSpec *large(void);  /* Llama-3-8B's shape in Q4_K: 5.4 GB */

void assert_legal(const Plan *plan, const ModelSpec *spec, const PlanMember *members, uint32_t n);
/* A legal plan. */
Plan *plan_ok(const ModelSpec *spec, const PlanMember *members, uint32_t n, const PlanWish *wish);
void assert_layout(const Plan *plan, uint32_t dp, uint32_t pp, uint32_t tp);
bool has_reason(const Plan *plan, const char *part);

typedef struct Refusal {
    GError *error;
    GPtrArray *violations, *alternatives;
} Refusal;

Refusal plan_refused(const ModelSpec *spec, const PlanMember *members, uint32_t n,
                     const PlanWish *wish);
void refusal_clear(Refusal *r);
void assert_text(const Refusal *r, const char *part);
bool has_alternative(const Refusal *r, const char *text);
