#include "tests/sim/history.h"

#include <stdarg.h>

#define VIOLATIONS_KEPT 50u

static void violation_free(void *data)
{
    g_free(((Violation *)data)->text);
    g_free(data);
}

void history_violate(History *h, const char *rule, const char *format, ...)
{
    if (!h->violations) {
        h->violations = g_ptr_array_new_with_free_func(violation_free);
    }
    if (h->violations->len >= VIOLATIONS_KEPT) {
        return;
    }
    Violation *v = g_new0(Violation, 1);
    va_list args;
    va_start(args, format);
    v->text = g_strdup_vprintf(format, args);
    va_end(args);
    v->rule = rule;
    v->at_us = sim_world_now_us(h->whole->world);
    g_ptr_array_add(h->violations, v);
    log_info(&h->whole->log, "VIOLATION %s: %s", rule, v->text);
}

char *history_text(const History *h)
{
    if (!h->violations) {
        return NULL;
    }
    const Violation *v = g_ptr_array_index(h->violations, 0);
    return g_strdup_printf("%s at %.4f s: %s (%u in all)", v->rule, (double)v->at_us / 1e6, v->text,
                           h->violations->len);
}

void history_clear(History *h)
{
    g_clear_pointer(&h->violations, g_ptr_array_unref);
}
