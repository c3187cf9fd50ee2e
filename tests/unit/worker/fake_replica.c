#include "tests/unit/worker/fake_replica.h"

#include "proto/model/model_spec.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <string.h>

typedef struct FakeSlot {
    bool used;
    uint64_t uid;
    uint32_t n; /* positions that are computed */
    uint32_t *pages, n_pages;
} FakeSlot;

struct FakeReplica {
    StepLimits limits;
    FakeSlot *slots;
    uint64_t (*content)[KV_BLOCK]; /* by page */
    Step *copy;
    uint8_t *wire;
    uint32_t n_rows;
};

static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t x = (a ^ (b + 0x9e3779b97f4a7c15u)) * 0xbf58476d1ce4e5b9u;
    return (x ^ (x >> 29)) * 0x94d049bb133111ebu;
}

FakeReplica *fake_replica_new(const StepLimits *limits, uint64_t n_pages)
{
    FakeReplica *r = g_new0(FakeReplica, 1);
    r->limits = *limits;
    r->slots = g_new0(FakeSlot, limits->max_slots);
    for (uint32_t i = 0; i < limits->max_slots; i++) {
        r->slots[i].pages = g_new0(uint32_t, limits->context / KV_BLOCK + 1);
    }
    r->content = g_malloc0(sizeof *r->content * n_pages);
    r->copy = step_new(limits);
    r->wire = g_malloc(step_wire_limit(limits));
    return r;
}

void fake_replica_free(FakeReplica *r)
{
    for (uint32_t i = 0; i < r->limits.max_slots; i++) {
        g_free(r->slots[i].pages);
    }
    g_free(r->slots);
    g_free(r->content);
    step_free(r->copy);
    g_free(r->wire);
    g_free(r);
}

uint32_t fake_replica_rows(const FakeReplica *r)
{
    return r->n_rows;
}

static void admit_all(FakeReplica *r, const Step *s)
{
    for (uint32_t i = 0; i < s->n_releases; i++) {
        assert_true(r->slots[s->releases[i]].used);
        r->slots[s->releases[i]].used = false;
    }
    for (uint32_t i = 0; i < s->n_admits; i++) {
        FakeSlot *q = &r->slots[s->admits[i].slot];
        assert_false(q->used);
        q->used = true;
        q->uid = s->admits[i].uid;
        q->n = q->n_pages = 0;
    }
}

static void assert_unread(const FakeReplica *r, const FakeSlot *writer, uint32_t page)
{
    for (uint32_t i = 0; i < r->limits.max_slots; i++) {
        const FakeSlot *q = &r->slots[i];
        for (uint32_t k = 0; q->used && q != writer && k < q->n_pages; k++) {
            assert_int_not_equal(q->pages[k], page);
        }
    }
}

static uint64_t *cell(FakeReplica *r, const FakeSlot *q, uint32_t position)
{
    return &r->content[q->pages[position / KV_BLOCK]][position % KV_BLOCK];
}

static void store(FakeReplica *r, const Step *s, const StepSegment *g)
{
    FakeSlot *q = &r->slots[g->slot];
    assert_true(q->used);
    assert_int_equal(g->position, q->n);
    assert_true(g->page_index == q->n_pages || g->n_pages == 0);
    for (uint32_t k = 0; k < g->n_pages; k++) {
        assert_unread(r, q, s->pages[g->page0 + k]);
        q->pages[q->n_pages++] = s->pages[g->page0 + k];
    }
    assert_true(q->n_pages * KV_BLOCK >= q->n + g->n_rows);
    for (uint32_t i = 0; i < g->n_rows; i++, q->n++) {
        const uint64_t before = q->n > 0 ? *cell(r, q, q->n - 1) : 1;
        *cell(r, q, q->n) = mix(before, s->rows[g->row0 + i].token);
    }
}

/* Just before the slot's own rows: pages of a segment before it may be among them. */
static void reuse(FakeReplica *r, const Step *s, uint32_t slot)
{
    for (uint32_t i = 0; i < s->n_reuses; i++) {
        const StepReuse *u = &s->reuses[i];
        FakeSlot *q = &r->slots[u->slot];
        if (u->slot == slot) {
            assert_true(q->used && q->n == u->page_index * KV_BLOCK && q->n_pages == u->page_index);
            memcpy(q->pages + q->n_pages, s->pages + u->page0, sizeof(uint32_t) * u->n_pages);
            q->n_pages += u->n_pages;
            q->n += u->n_pages * KV_BLOCK;
        }
    }
}

/* What pages hold is copied before any row of the step is computed. */
static void copy_pages(FakeReplica *r, const Step *s)
{
    for (uint32_t i = 0; i < s->n_copies; i++) {
        const StepCopy *c = &s->copies[i];
        assert_true(r->slots[c->slot].used);
        assert_unread(r, &r->slots[c->slot], c->to);
        memmove(r->content[c->to], r->content[c->from], sizeof r->content[0]);
    }
}

/* After the slot's reuses, just before its own rows. */
static void begin_page(FakeReplica *r, const Step *s, uint32_t slot)
{
    for (uint32_t i = 0; i < s->n_copies; i++) {
        const StepCopy *c = &s->copies[i];
        FakeSlot *q = &r->slots[slot];
        if (c->slot == slot) {
            assert_true(q->n == c->page_index * KV_BLOCK && q->n_pages == c->page_index);
            q->pages[q->n_pages++] = c->to;
            q->n += c->n_positions;
        }
    }
}

static void compute(FakeReplica *r, const Step *s)
{
    g_autofree bool *computes = g_new0(bool, r->limits.max_slots);
    copy_pages(r, s);
    for (uint32_t i = 0; i < s->n_segments; i++) {
        computes[s->segments[i].slot] = true;
        reuse(r, s, s->segments[i].slot);
        begin_page(r, s, s->segments[i].slot);
        store(r, s, &s->segments[i]);
    }
    for (uint32_t i = 0; i < s->n_reuses; i++) {
        if (!computes[s->reuses[i].slot]) {
            reuse(r, s, s->reuses[i].slot);
        }
    }
    for (uint32_t i = 0; i < s->n_copies; i++) {
        if (!computes[s->copies[i].slot]) {
            begin_page(r, s, s->copies[i].slot);
        }
    }
}

/* Of all positions up to this one. */
static uint64_t attend(FakeReplica *r, const FakeSlot *q, uint32_t position)
{
    uint64_t sum = 0;
    for (uint32_t p = 0; p <= position; p++) {
        sum = mix(sum, *cell(r, q, p));
    }
    return sum;
}

FakeFlight *fake_replica_run(FakeReplica *r, const Step *built)
{
    size_t used = 0;
    g_autoptr(GError) error = NULL;
    const size_t size = step_encode(built, r->wire);
    assert_true(size <= step_wire_limit(&r->limits));
    if (!step_decode(r->copy, &r->limits, r->wire, size, &used, &error)) {
        fail_msg("%s", error->message); /* what the leader makes, the ranks accept */
    }
    assert_int_equal(used, size);
    const Step *s = r->copy;
    FakeFlight *f = g_new0(FakeFlight, 1);
    f->number = built->number;
    f->results = g_new0(RowResult, s->n_rows);
    admit_all(r, s);
    compute(r, s);
    for (uint32_t i = 0; i < s->n_segments; i++) {
        const StepSegment *g = &s->segments[i];
        for (uint32_t k = 0; k < g->n_rows; k++) {
            const StepRow *row = &s->rows[g->row0 + k];
            if (row->output != STEP_OUTPUT_NONE) {
                const FakeSlot *q = &r->slots[g->slot];
                const uint32_t number =
                    (uint32_t)(attend(r, q, g->position + k) % r->limits.vocab_size);
                f->results[f->n++] =
                    (RowResult){.slot = g->slot,
                                .uid = q->uid,
                                .position = g->position + k,
                                .id = row->output == STEP_OUTPUT_SCORE ? row->target : number,
                                .logprob = (float)number};
            }
        }
    }
    r->n_rows += s->n_rows;
    return f;
}

void fake_flight_free(FakeFlight *f)
{
    g_free(f->results);
    g_free(f);
}

uint32_t fake_token(const StepLimits *limits, const uint32_t *ids, uint32_t n)
{
    uint64_t chain = 1, sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        chain = mix(chain, ids[i]);
        sum = mix(sum, chain);
    }
    return (uint32_t)(sum % limits->vocab_size);
}
