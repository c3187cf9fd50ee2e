#include "tests/unit/coordinator/planner_case.h"

#include "proto/base/error.h"
#include "tests/golden/gguf_builder.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

typedef struct Shape {
    uint32_t n_layers, width, n_heads, n_kv_heads, ffn_width, vocab_size;
    Dtype type, embedding_type;
    bool tied;
} Shape;

static ModelSpec *spec_of(const Shape *shape)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.n_layers = shape->n_layers;
    c.width = shape->width;
    c.n_heads = shape->n_heads;
    c.n_kv_heads = shape->n_kv_heads;
    c.ffn_width = shape->ffn_width;
    c.vocab_size = shape->vocab_size;
    c.context = 8192;
    c.tied = shape->tied;
    gguf_builder_set_type(&c, shape->type);
    c.type[ROLE_TOKEN_EMBD] = shape->embedding_type;
    ModelSpec *spec = gguf_builder_spec(&c, NULL);
    assert_non_null(spec);
    return spec;
}

ModelSpec *smol(void)
{
    return spec_of(&(Shape){30, 576, 9, 3, 1536, 49152, DTYPE_Q4_1, DTYPE_Q8_0, .tied = true});
}

ModelSpec *middle(void)
{
    return spec_of(&(Shape){22, 2048, 32, 8, 8192, 32000, DTYPE_Q4_1, DTYPE_Q8_0, .tied = false});
}

ModelSpec *large(void)
{
    return spec_of(&(Shape){32, 4096, 32, 8, 14336, 128256, DTYPE_Q4_K, DTYPE_Q4_K, .tied = false});
}

void assert_legal(const Plan *plan, const ModelSpec *spec, const PlanMember *members, uint32_t n)
{
    g_autoptr(GPtrArray) found = plan_check(plan, spec, members, n);
    if (found->len > 0) {
        fail_msg("%s", ((PlanViolation *)found->pdata[0])->text);
    }
}

Plan *plan_ok(const ModelSpec *spec, const PlanMember *members, uint32_t n, const PlanWish *wish)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GPtrArray) violations = NULL, alternatives = NULL;
    Plan *plan = planner_plan(spec, members, n, wish, &violations, &alternatives, &error);
    if (plan == NULL) {
        fail_msg("%s", error->message);
    }
    assert_null(error);
    assert_int_equal(violations->len, 0);
    assert_int_equal(alternatives->len, 0);
    assert_legal(plan, spec, members, n);
    return plan;
}

Refusal plan_refused(const ModelSpec *spec, const PlanMember *members, uint32_t n,
                     const PlanWish *wish)
{
    Refusal r = {0};
    Plan *plan = planner_plan(spec, members, n, wish, &r.violations, &r.alternatives, &r.error);
    assert_null(plan);
    assert_true(g_error_matches(r.error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE));
    assert_non_null(r.violations);
    assert_non_null(r.alternatives);
    return r;
}

void refusal_clear(Refusal *r)
{
    g_clear_error(&r->error);
    g_ptr_array_unref(r->violations);
    g_ptr_array_unref(r->alternatives);
}

void assert_text(const Refusal *r, const char *part)
{
    if (strstr(r->error->message, part) == NULL) {
        fail_msg("'%s' lacks '%s'", r->error->message, part);
    }
}

bool has_alternative(const Refusal *r, const char *text)
{
    for (guint i = 0; i < r->alternatives->len; i++) {
        if (strcmp(r->alternatives->pdata[i], text) == 0) {
            return true;
        }
    }
    return false;
}

void assert_layout(const Plan *plan, uint32_t dp, uint32_t pp, uint32_t tp)
{
    uint32_t got[3];
    plan_layout(plan, &got[0], &got[1], &got[2]);
    if (got[0] != dp || got[1] != pp || got[2] != tp) {
        fail_msg("dp%u pp%u tp%u, not dp%u pp%u tp%u", got[0], got[1], got[2], dp, pp, tp);
    }
}

bool has_reason(const Plan *plan, const char *part)
{
    for (guint i = 0; i < plan->reasons->len; i++) {
        if (strstr(plan->reasons->pdata[i], part) != NULL) {
            return true;
        }
    }
    return false;
}
