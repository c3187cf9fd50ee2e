#include "worker/train/text_sampler.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "worker/serve/sample.h"

#include <string.h>

/* What the first replica's last stage tells all ranks. */
typedef struct Draw {
    uint32_t id, outcome; /* SampleOutcome */
} Draw;

typedef struct Run {
    const TextSampler *s;
    const TextWish *wish;
    uint32_t *text; /* prompt, then what was drawn */
    uint32_t n;
    bool ended;    /* a logit was not finite */
    float *logits; /* [vocabulary] on the last stage of the first replica */
    SampleMerger *merger;
    GByteArray *part;
} Run;

static bool is_drawer(const TextSampler *s)
{
    return s->position.replica == 0 && s->holding->is_last;
}

/* The whole row from the shards of the stage's tensor ranks. */
static bool gather_row(Run *run, const float *own, GError **error)
{
    const TextSampler *s = run->s;
    const Holding *h = s->holding;
    TrainGroup *g = s->links != NULL ? &s->links->tensor : NULL;
    size_t sizes[PLAN_RANKS_LIMIT];
    void *parts[PLAN_RANKS_LIMIT];
    if (h->tp == 1) {
        memcpy(run->logits, own, h->vocab * sizeof *own);
        return true;
    }
    for (uint32_t r = 0; r < h->tp; r++) {
        const uint32_t first = MIN(h->vocab_cuts[r] * VOCAB_CHUNK, h->spec->vocab_size),
                       end = MIN(h->vocab_cuts[r + 1] * VOCAB_CHUNK, h->spec->vocab_size);
        sizes[r] = (end - first) * sizeof *own;
        parts[r] = run->logits + first;
    }
    memcpy(parts[h->rank], own, sizes[h->rank]);
    const GroupWait wait = group_turn(&g->turns, "logits of a sampled text");
    return train_links_check(
        s->links, g, group_all_gather(g->turns.group, &wait, parts[h->rank], sizes, parts), error);
}

static Draw draw(Run *run)
{
    const TextSampler *s = run->s;
    const SampleRow row = {
        .settings = {.temperature = run->wish->temperature, .seed = run->wish->seed},
        .position = run->n,
    };
    SampleResult result = {0};
    g_byte_array_set_size(run->part, 0);
    sample_part(s->kernels, &row, run->logits, 0, s->holding->spec->vocab_size, 1, run->part);
    SampleReader reader = {run->part->data, run->part->len, 0};
    const SampleOutcome outcome = sample_merge(run->merger, s->kernels, &row, &reader, 1, &result);
    return (Draw){result.id, (uint32_t)outcome};
}

static bool share(const TextSampler *s, Draw *drawn, GError **error)
{
    TrainGroup *g = s->links != NULL ? &s->links->world : NULL;
    if (g == NULL || g->turns.group == NULL) {
        return true;
    }
    const GroupWait wait = group_turn(&g->turns, "the next token of a sampled text");
    return train_links_check(s->links, g,
                             group_broadcast(g->turns.group, &wait,
                                             train_global(&s->position, 0, s->position.pp - 1, 0),
                                             drawn, sizeof *drawn),
                             error);
}

static bool next_token(Run *run, GError **error)
{
    const TextSampler *s = run->s;
    const uint32_t n = MIN(run->n, s->length);
    const float *own = NULL;
    Draw drawn = {0};
    if (s->position.replica == 0 &&
        !micro_runner_logits(s->runner, run->text + run->n - n, n, &own, error)) {
        return false;
    }
    if (is_drawer(s)) {
        if (!gather_row(run, own, error)) {
            return false;
        }
        drawn = draw(run);
    }
    if (!share(s, &drawn, error)) {
        return false;
    }
    run->ended = drawn.outcome != SAMPLE_DRAWN;
    run->text[run->n] = drawn.id;
    run->n += !run->ended;
    return true;
}

bool text_sampler_run(const TextSampler *s, const TextWish *wish, uint32_t *out, uint32_t *n,
                      GError **error)
{
    const size_t total = (size_t)wish->n_prompt + wish->n_tokens,
                 row = is_drawer(s) ? s->holding->spec->vocab_size : 1;
    Run run = {.s = s, .wish = wish, .n = wish->n_prompt};
    run.text = weft_alloc(total, sizeof *run.text, "a sampled text", error);
    run.logits =
        run.text != NULL ? weft_alloc(row, sizeof *run.logits, "a row of logits", error) : NULL;
    bool ok = run.logits != NULL;
    if (ok) {
        memcpy(run.text, wish->prompt, wish->n_prompt * sizeof *run.text);
        run.merger = sample_merger_new();
        run.part = g_byte_array_new();
        while (ok && !run.ended && run.n < total) {
            ok = next_token(&run, error);
        }
        *n = run.n - wish->n_prompt;
        memcpy(out, run.text + wish->n_prompt, *n * sizeof *out);
        sample_merger_free(run.merger);
        g_byte_array_unref(run.part);
    }
    weft_free(run.text);
    weft_free(run.logits);
    return ok;
}
