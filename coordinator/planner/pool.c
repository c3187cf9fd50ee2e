#include "coordinator/planner/pool.h"

#include "coordinator/planner/cost.h"
#include "proto/base/version.h"

#include <stdlib.h>
#include <string.h>

const char *planner_refusal(const PlanMember *m, const ModelSpec *spec, const PlanWish *wish)
{
    if (!m->usable) {
        return "it is lost or draining";
    }
    if (m->numerics_version != WEFT_NUMERICS_VERSION) {
        return "it is of a release with other numerics";
    }
    if ((m->numerics_classes >> (uint32_t)wish->numerics & 1u) == 0) {
        return m->device != NULL
                   ? "it computes on a GPU, which offers numerics fast only (--numerics fast)"
                   : "it does not offer this numerics class";
    }
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        if (spec->tensors[i].rows > 1 && m->packed_block_bytes[spec->tensors[i].type] == 0) {
            return "it cannot compute a weight type of this model";
        }
    }
    return NULL;
}

static int by_name(const PlanMember *a, const PlanMember *b)
{
    const int names = strcmp(a->worker, b->worker);
    return names != 0 ? names : (int)a->device_index - (int)b->device_index;
}

static int by_speed(const void *a, const void *b)
{
    const PlanMember *x = *(const PlanMember *const *)a, *y = *(const PlanMember *const *)b;
    double p = speed_of(x).read_bytes_per_s, q = speed_of(y).read_bytes_per_s;
    return p != q ? (p < q ? 1 : -1) : by_name(x, y);
}

static int by_memory(const void *a, const void *b)
{
    const PlanMember *x = *(const PlanMember *const *)a, *y = *(const PlanMember *const *)b;
    if (x->memory_bytes != y->memory_bytes) {
        return x->memory_bytes < y->memory_bytes ? 1 : -1;
    }
    return by_speed(a, b);
}

/* Groups members of one host, hosts by their fastest member, from a list sorted by speed. */
static void group_hosts(const PlanMember **order, uint32_t n)
{
    g_autofree const PlanMember **grouped = g_new0(const PlanMember *, n + 1);
    uint32_t out = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (order[i] == NULL) {
            continue;
        }
        const PlanMember *lead = order[i];
        for (uint32_t j = i; j < n; j++) {
            bool same = order[j] == lead ||
                        (order[j] != NULL && lead->host != NULL && order[j]->host != NULL &&
                         strcmp(order[j]->host, lead->host) == 0);
            if (same) {
                grouped[out++] = order[j];
                order[j] = NULL;
            }
        }
    }
    memcpy(order, grouped, n * sizeof *order);
}

static bool share_cpus(const PlanMember *a, const PlanMember *b)
{
    const PlanMember *pair[2] = {a, b};
    double crowding[2];
    if (a->host == NULL || b->host == NULL || strcmp(a->host, b->host) != 0) {
        return false;
    }
    crowding_of(pair, 2, crowding);
    return crowding[1] > 1.0;
}

/* Members whose CPUs an earlier one has, too, come after those that are the first on theirs, and so
 * on; otherwise the order stays. */
static void spread_over_cpus(const PlanMember **order, uint32_t n)
{
    g_autofree uint32_t *before = g_new0(uint32_t, n);
    g_autofree const PlanMember **spread = g_new(const PlanMember *, n + 1); /* of none: no NULL */
    uint32_t out = 0;
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t j = 0; j < i; j++) {
            before[i] += share_cpus(order[j], order[i]);
        }
    }
    for (uint32_t level = 0; out < n; level++) {
        for (uint32_t i = 0; i < n; i++) {
            if (before[i] == level) {
                spread[out++] = order[i];
            }
        }
    }
    memcpy(order, spread, n * sizeof *order);
}

/* Ranks of one stage, or stages of one rank each, that share CPUs become neighbours: they are cut
 * like one that has these CPUs alone, and steps in flight are on CPUs of their own. */
static void gather_by_cpus(const PlanMember **members, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t next = i + 1;
        for (uint32_t j = next; j < n; j++) {
            if (share_cpus(members[i], members[j])) {
                const PlanMember *mate = members[j];
                memmove(members + next + 1, members + next, (j - next) * sizeof *members);
                members[next++] = mate;
            }
        }
        i = next - 1;
    }
}

void pool_take(const Pool *pool, int order, Layout layout, const PlanMember **out)
{
    const uint32_t n = layout.pp * layout.tp;
    memcpy(out, pool->order[order], layout.dp * n * sizeof *out);
    for (uint32_t r = 0; r < layout.dp && (layout.pp == 1 || layout.tp == 1); r++) {
        gather_by_cpus(out + r * n, n);
    }
}

void pool_clear(Pool *pool)
{
    for (int i = 0; i < 3; i++) {
        g_free(pool->order[i]);
    }
}

const char *kind_text(const char *kind)
{
    return kind[0] != '\0' ? kind : "hosts' cores";
}

bool is_of_kind(const PlanMember *m, const Task *task)
{
    return task->wish->numerics != NUMERICS_EXACT || strcmp(plan_member_kind(m), task->kind) == 0;
}

Pool pool_of(const Task *task)
{
    Pool pool = {0};
    for (int i = 0; i < 3; i++) {
        pool.order[i] = g_new0(const PlanMember *, task->n_members + 1);
    }
    for (uint32_t m = 0; m < task->n_members; m++) {
        if (planner_refusal(&task->members[m], task->spec, task->wish) == NULL &&
            is_of_kind(&task->members[m], task)) {
            pool.order[0][pool.n++] = &task->members[m];
        }
    }
    qsort(pool.order[0], pool.n, sizeof *pool.order[0], by_speed);
    for (int i = 1; i < 3; i++) {
        memcpy(pool.order[i], pool.order[0], pool.n * sizeof *pool.order[0]);
    }
    group_hosts(pool.order[1], pool.n);
    qsort(pool.order[2], pool.n, sizeof *pool.order[2], by_memory);
    for (int i = 0; i < 3; i++) {
        spread_over_cpus(pool.order[i], pool.n);
    }
    return pool;
}
