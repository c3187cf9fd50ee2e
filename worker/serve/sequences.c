#include "worker/serve/sequences.h"

#include "proto/model/model_spec.h"

#include <string.h>

static uint32_t table_length(const StepLimits *limits)
{
    return (limits->context + KV_BLOCK - 1) / KV_BLOCK;
}

size_t sequences_bytes(const StepLimits *limits)
{
    const size_t pages = sizeof(uint32_t) * table_length(limits),
                 tokens = sizeof(uint32_t) * ((size_t)limits->context + 1);
    return limits->max_slots * (sizeof(Sequence) + sizeof(uint32_t *) + pages + tokens);
}

void sequences_init(Sequences *s, const StepLimits *limits)
{
    s->limits = *limits;
    s->slots = g_new0(Sequence, limits->max_slots);
    s->page_tables = g_new0(const uint32_t *, limits->max_slots);
    for (uint32_t i = 0; i < limits->max_slots; i++) {
        s->slots[i].pages = g_new0(uint32_t, table_length(limits));
        s->slots[i].tokens = g_new0(uint32_t, limits->context + 1);
        s->page_tables[i] = s->slots[i].pages;
    }
}

void sequences_clear(Sequences *s)
{
    for (uint32_t i = 0; s->slots != NULL && i < s->limits.max_slots; i++) {
        g_free(s->slots[i].pages);
        g_free(s->slots[i].tokens);
        g_free(s->slots[i].bias);
    }
    g_clear_pointer(&s->slots, g_free);
    g_clear_pointer(&s->page_tables, g_free);
}

static void admit(Sequence *q, const StepAdmit *a, const Step *step)
{
    q->used = true;
    q->admit = *a;
    q->n_tokens = 0;
    if (a->n_bias > q->bias_capacity) {
        q->bias = g_renew(SampleBias, q->bias, a->n_bias);
        q->bias_capacity = a->n_bias;
    }
    if (a->n_bias > 0) {
        memcpy(q->bias, step->biases + a->bias0, sizeof(SampleBias) * a->n_bias);
    }
}

void sequences_apply(Sequences *s, const Step *step)
{
    for (uint32_t i = 0; i < step->n_releases; i++) {
        s->slots[step->releases[i]].used = false;
    }
    for (uint32_t i = 0; i < step->n_admits; i++) {
        admit(&s->slots[step->admits[i].slot], &step->admits[i], step);
    }
    for (uint32_t i = 0; i < step->n_reuses; i++) {
        const StepReuse *u = &step->reuses[i];
        Sequence *q = &s->slots[u->slot];
        memcpy(q->pages + u->page_index, step->pages + u->page0, sizeof(uint32_t) * u->n_pages);
        memcpy(q->tokens + (size_t)u->page_index * KV_BLOCK, step->tokens + u->token0,
               sizeof(uint32_t) * KV_BLOCK * u->n_pages);
        q->n_tokens = (u->page_index + u->n_pages) * KV_BLOCK;
    }
    for (uint32_t i = 0; i < step->n_copies; i++) {
        const StepCopy *c = &step->copies[i];
        Sequence *q = &s->slots[c->slot];
        const size_t first = (size_t)c->page_index * KV_BLOCK;
        q->pages[c->page_index] = c->to;
        memcpy(q->tokens + first, step->tokens + c->token0, sizeof(uint32_t) * c->n_positions);
        q->n_tokens = (uint32_t)first + c->n_positions;
    }
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        Sequence *q = &s->slots[g->slot];
        memcpy(q->pages + g->page_index, step->pages + g->page0, sizeof(uint32_t) * g->n_pages);
        for (uint32_t r = 0; r < g->n_rows; r++) {
            q->tokens[g->position + r] = step->rows[g->row0 + r].token;
        }
        q->n_tokens = g->position + g->n_rows;
    }
}
