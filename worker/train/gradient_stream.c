/* Invariants:
 * 1. All replicas exchange the same units in the same order: buckets from the last to the first,
 *    behind one of a tied embedding its lookup part.
 * 2. Unit u is sent whole before unit u + 1, and only when unit u - STREAM_WINDOW was received.
 * 3. Before a unit is waited for it has been sent: so the rank that is furthest behind never waits.
 */
#include "worker/train/gradient_stream.h"

#include "proto/plan/tree.h"

/* A stretch that is exchanged at once. */
typedef struct StreamUnit {
    const Bucket *bucket;
    bool lookup;
} StreamUnit;

struct GradientStream {
    TrainLinks *links;
    const Ownership *o;
    const LeafCuts *leaves;
    GArray *units; /* of StreamUnit */
    Parameters *subtrees[TREE_SUBTREES_LIMIT], *out;
    uint32_t n;
    bool begun;
    size_t final_from;
    uint64_t turn;           /* of unit 0 */
    uint32_t sent, received; /* units */
    uint32_t early;
    GroupSent sending; /* of unit `sent` */
    GroupStatus status;
};

/* A unit as the group wants it. */
typedef struct UnitOperands {
    GroupOperands operands;
    const float *mine[TREE_SUBTREES_LIMIT];
    size_t first[PLAN_RANKS_LIMIT + 1];
    float *out;
    GroupWait wait;
} UnitOperands;

GradientStream *gradient_stream_new(TrainLinks *links, const Ownership *ownership,
                                    const LeafCuts *leaves)
{
    GradientStream *s = g_new0(GradientStream, 1);
    s->links = links;
    s->o = ownership;
    s->leaves = leaves;
    s->units = g_array_new(FALSE, FALSE, sizeof(StreamUnit));
    return s;
}

void gradient_stream_free(GradientStream *s)
{
    if (s != NULL) {
        g_array_unref(s->units);
        g_free(s);
    }
}

static const StreamUnit *unit_at(const GradientStream *s, uint32_t u)
{
    return &g_array_index(s->units, StreamUnit, u);
}

/* u: made of the sets; what it points to lives in *u. */
static void describe(const GradientStream *s, uint32_t number, UnitOperands *u)
{
    const StreamUnit *unit = unit_at(s, number);
    const TrainGroup *g = &s->links->data;
    const size_t embedding = g_array_index(s->o->buckets, Bucket, 0).first[0],
                 shift = unit->lookup ? (size_t)(s->out->lookup - s->out->floats) - embedding : 0,
                 begin = unit->bucket->first[0];
    const uint64_t turn = s->turn + number;
    for (uint32_t i = 0; i < s->n; i++) {
        u->mine[i] = s->subtrees[i]->floats + shift + begin;
    }
    for (uint32_t d = 0; d <= g->n; d++) {
        u->first[d] = unit->bucket->first[d] - begin;
    }
    u->operands =
        (GroupOperands){s->leaves->n_leaves, s->leaves->missing, s->leaves->cuts, u->mine};
    u->out = s->out->floats + shift + unit->bucket->first[g->rank];
    u->wait = group_wait_of_turn(&g->turns, turn, "folding gradients");
}

void gradient_stream_begin(GradientStream *s, Parameters *const *subtrees, uint32_t n,
                           Parameters *out)
{
    const GArray *buckets = s->o->buckets;
    g_assert(!s->begun && n <= TREE_SUBTREES_LIMIT);
    g_array_set_size(s->units, 0);
    for (uint32_t b = buckets->len; b-- > 0;) {
        const Bucket *bucket = &g_array_index(buckets, Bucket, b);
        const StreamUnit unit = {bucket, false}, lookup = {bucket, true};
        g_array_append_val(s->units, unit);
        if (out->lookup != NULL && bucket->is_embedding) {
            g_array_append_val(s->units, lookup);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        s->subtrees[i] = subtrees[i];
    }
    s->n = n;
    s->out = out;
    s->begun = true;
    s->final_from = SIZE_MAX;
    s->turn = s->links->data.turns.turn;
    s->links->data.turns.turn += s->units->len;
    s->sent = s->received = s->early = 0;
    s->sending = (GroupSent){0};
    s->status = GROUP_OK;
}

bool gradient_stream_has_begun(const GradientStream *s)
{
    return s->begun;
}

/* Sends of unit `sent` what there is room for, or (waits) the rest. */
static void send_unit(GradientStream *s, bool waits)
{
    UnitOperands u;
    describe(s, s->sent, &u);
    s->status = group_scatter_send(s->links->data.turns.group, &u.wait, &u.operands, u.first, waits,
                                   &s->sending);
    if (s->status == GROUP_OK && s->sending.done) {
        s->sent++;
        s->sending = (GroupSent){0};
    }
}

static bool may_send(const GradientStream *s)
{
    if (s->sent == s->units->len || s->sent >= s->received + STREAM_WINDOW) {
        return false;
    }
    const StreamUnit *unit = unit_at(s, s->sent);
    return s->final_from <= (unit->lookup ? 0 : unit->bucket->first[0]);
}

static void receive_unit(GradientStream *s)
{
    UnitOperands u;
    describe(s, s->received, &u);
    s->status =
        group_scatter_receive(s->links->data.turns.group, &u.wait, &u.operands, u.first, u.out);
    s->received += s->status == GROUP_OK;
}

static bool has_arrived(GradientStream *s)
{
    UnitOperands u;
    if (s->received == s->sent) {
        return false;
    }
    describe(s, s->received, &u);
    return group_scatter_arrived(s->links->data.turns.group, &u.wait, &u.operands, u.first);
}

/* Without waiting. */
static void advance(GradientStream *s)
{
    bool moves = true;
    while (moves && s->status == GROUP_OK) {
        const uint32_t sent = s->sent;
        moves = has_arrived(s);
        if (moves) {
            receive_unit(s);
        }
        if (s->status == GROUP_OK && may_send(s)) {
            send_unit(s, false);
        }
        moves = moves || s->sent != sent;
    }
}

void gradient_stream_final(GradientStream *s, size_t from)
{
    s->final_from = from;
    advance(s);
    s->early = s->sent;
}

bool gradient_stream_finish(GradientStream *s, GError **error)
{
    s->final_from = 0;
    s->begun = false;
    while (s->status == GROUP_OK && s->received < s->units->len) {
        advance(s);
        if (s->status == GROUP_OK && s->received < s->units->len && s->sent == s->received) {
            send_unit(s, true);
        }
        if (s->status == GROUP_OK && s->received < s->sent) {
            receive_unit(s);
        }
    }
    return train_links_check(s->links, &s->links->data, s->status, error);
}

uint32_t gradient_stream_early(const GradientStream *s)
{
    return s->early;
}
