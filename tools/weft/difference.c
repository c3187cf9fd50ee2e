#include "tools/weft/difference.h"

#include <string.h>

enum { HASH_BYTES = 16, POSITION_BYTES = 4 };
static const char SPLIT[] =
    "weft!=rk"; /* worker/serve/trace.h: in place of a hash, before the rank */

static const Weft__V1__Replica *replica_of(const RunOutcome *o)
{
    return o->plan != NULL && o->plan->n_replicas > o->replica ? o->plan->replicas[o->replica]
                                                               : NULL;
}

static uint32_t layers_of(const RunOutcome *o)
{
    const Weft__V1__Replica *r = replica_of(o);
    return r != NULL && r->n_stages > 0 ? r->stages[r->n_stages - 1]->layer_last + 1 : 0;
}

static uint32_t stage_of_layer(const RunOutcome *o, uint32_t layer)
{
    const Weft__V1__Replica *r = replica_of(o);
    uint32_t s = 0;
    while (s + 1 < r->n_stages && layer > r->stages[s]->layer_last) {
        s++;
    }
    return s;
}

static void set_site(Difference *d, const RunOutcome *other, uint32_t site, const uint8_t *value)
{
    d->kind = site == 0       ? DIFFERENCE_EMBEDDING
              : site % 2 == 1 ? DIFFERENCE_ATTENTION
                              : DIFFERENCE_FFN;
    d->layer = site == 0 ? 0 : (site - 1) / 2;
    d->stage = stage_of_layer(other, d->layer);
    d->split = memcmp(value, SPLIT, strlen(SPLIT)) == 0;
    if (d->split) {
        memcpy(&d->split_rank, value + strlen(SPLIT), sizeof d->split_rank);
    }
}

static bool hashes_differ(const RunOutcome *a, const RunOutcome *b, uint32_t token)
{
    const size_t at = (size_t)token * HASH_BYTES;
    return at + HASH_BYTES <= MIN(a->row_hashes->len, b->row_hashes->len) &&
           memcmp(a->row_hashes->data + at, b->row_hashes->data + at, HASH_BYTES) != 0;
}

static bool ids_differ(const RunOutcome *a, const RunOutcome *b, uint32_t token)
{
    return token < MIN(a->ids->len, b->ids->len) &&
           g_array_index(a->ids, uint32_t, token) != g_array_index(b->ids, uint32_t, token);
}

Difference difference_find(const RunOutcome *reference, const RunOutcome *other)
{
    const uint32_t n_sites = 1 + 2 * layers_of(reference), n_prompt = reference->prompt_tokens;
    const size_t row_bytes = POSITION_BYTES + (size_t)n_sites * HASH_BYTES;
    const size_t n_rows = MIN(reference->trace->len, other->trace->len) / row_bytes;
    Difference d = {0};
    if (layers_of(reference) == 0 || layers_of(other) == 0) {
        return d; /* an answer that named no plan: nobody to name */
    }
    for (uint32_t row = 0; row < n_rows; row++) { /* rows come in order of position, from 0 */
        const uint8_t *a = reference->trace->data + row * row_bytes + POSITION_BYTES,
                      *b = other->trace->data + row * row_bytes + POSITION_BYTES;
        d.position = row;
        d.generated = row >= n_prompt;
        for (uint32_t site = 0; site < n_sites; site++) {
            if (memcmp(a + (size_t)site * HASH_BYTES, b + (size_t)site * HASH_BYTES, HASH_BYTES) !=
                0) {
                set_site(&d, other, site, b + (size_t)site * HASH_BYTES);
                return d;
            }
        }
        const bool draws = row + 1 >= n_prompt;
        const uint32_t token = draws ? row + 1 - n_prompt : 0;
        if (draws &&
            (hashes_differ(reference, other, token) || ids_differ(reference, other, token))) {
            d.kind = hashes_differ(reference, other, token) ? DIFFERENCE_LOGITS : DIFFERENCE_DRAW;
            d.stage = (uint32_t)replica_of(other)->n_stages - 1;
            return d;
        }
    }
    return (Difference){0};
}

char *difference_site(const Difference *d)
{
    switch (d->kind) {
    case DIFFERENCE_EMBEDDING:
        return g_strdup("embedding");
    case DIFFERENCE_ATTENTION:
        return g_strdup_printf("layer %u attention", d->layer);
    case DIFFERENCE_FFN:
        return g_strdup_printf("layer %u feed-forward", d->layer);
    case DIFFERENCE_LOGITS:
        return g_strdup("vocabulary projection");
    case DIFFERENCE_DRAW:
        return g_strdup("draw");
    default:
        return g_strdup("nowhere");
    }
}

char *difference_text(const Difference *d, const RunOutcome *other)
{
    if (d->kind == DIFFERENCE_NONE) {
        return g_strdup("nowhere when traced: the fault comes and goes");
    }
    g_autofree char *site = difference_site(d);
    GString *text = g_string_new(NULL);
    g_string_append_printf(text, "%s of token %u (%s), ", site, d->position,
                           d->generated ? "answer" : "prompt");
    const Weft__V1__Stage *stage = replica_of(other)->stages[d->stage];
    if (d->split && d->split_rank < stage->n_ranks) {
        g_string_append_printf(text, "where %s holds another value than %s",
                               stage->ranks[d->split_rank]->worker, stage->ranks[0]->worker);
        return g_string_free(text, FALSE);
    }
    g_string_append(text, "computed by ");
    for (size_t r = 0; r < stage->n_ranks; r++) {
        g_string_append_printf(text, "%s%s",
                               r == 0                    ? ""
                               : r + 1 == stage->n_ranks ? " and "
                                                         : ", ",
                               stage->ranks[r]->worker);
    }
    return g_string_free(text, FALSE);
}
