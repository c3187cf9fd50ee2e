/* A run that ends after a checkpoint and goes on from the disk is the run that was never
 * interrupted; what ranks of any layout write, ranks of any other read back. The ranks of layouts
 * are made without links: they hold, write and read, and do not step. Tensor ranks cannot be made
 * so; test_checkpoint.c has cuts like theirs. */
#include "proto/base/error.h"
#include "tests/unit/worker/toy_training.h"
#include "coordinator/train/checkpoint.h"
#include "tests/unit/remove_tree.h"
#include "tests/unit/write_part.h"
#include "worker/train/train_snapshot.h"

#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { BEFORE = 2, AFTER = 2 };

typedef struct World {
    char *directory;
    const Toy *toy;
    ModelSpec *spec;
    TokenData *data;
    TokenSamples samples;
    SampleSource source;
    Pool *pool;
    GPtrArray *holdings; /* of all ranks: their parameters borrow them */
} World;

static void world_open(World *w, const Toy *toy)
{
    *w = (World){.toy = toy, .spec = toy_spec(toy), .data = toy_data(toy)};
    w->directory = g_dir_make_tmp("weft-state-XXXXXX", NULL);
    w->samples = (TokenSamples){.data = w->data, .seed = toy->order};
    w->source = token_samples_source(&w->samples);
    w->pool = pool_new(1, NULL, false, 0);
    w->holdings = g_ptr_array_new_with_free_func((GDestroyNotify)holding_free);
}

static void world_close(World *w)
{
    remove_tree(w->directory);
    g_free(w->directory);
    pool_free(w->pool);
    g_ptr_array_unref(w->holdings);
    token_data_free(w->data);
    model_spec_free(w->spec);
}

/* A rank of a plan (NULL: a process alone) with the toy's first weights. */
static TrainRank *rank_new(World *w, const Plan *plan, uint32_t replica, uint32_t stage,
                           uint32_t rank, bool sgd)
{
    g_autoptr(GError) error = NULL;
    Holding *holding =
        plan != NULL ? holding_new(w->spec, plan, replica, stage, rank) : holding_whole(w->spec);
    g_ptr_array_add(w->holdings, holding);
    TrainRankOptions options = toy_options(w->toy, w->spec, &w->source);
    options.kernels = kernels_get(kernels_best_isa());
    options.pool = w->pool;
    options.plan = plan;
    options.replica = replica;
    options.stage = stage;
    options.rank = rank;
    options.optimizer.kind = sgd ? OPTIMIZER_SGD : OPTIMIZER_ADAMW;
    options.scaling = (LossScaleRule){.dynamic = true, .initial = 0x1p20f, .window = 3};
    TrainRank *t = train_rank_new(&options, toy_part(w->toy, w->spec, holding), &error);
    if (t == NULL) {
        fail_msg("%s", error->message);
    }
    return t;
}

static void step(TrainRank *t, int n, float *losses)
{
    for (int i = 0; i < n; i++) {
        TrainStep out;
        assert_true(train_rank_step(t, &out, NULL));
        losses[i] = out.loss;
    }
}

static void commit(const World *w, const TrainRank *t, GPtrArray *parts)
{
    g_autoptr(GError) error = NULL;
    const TrainProgress *p = train_rank_progress(t);
    const CheckpointState at = {.step = p->step,
                                .samples = p->step * w->toy->sequences,
                                .updates = p->updates,
                                .loss_scale = (double)p->scale.scale,
                                .scale_growth = p->scale.good,
                                .scale_hysteresis = p->scale.hysteresis};
    if (!checkpoint_commit(checkpoint_disk(), w->directory, &at, w->spec,
                           (const char *const *)parts->pdata, parts->len, 2, &error)) {
        fail_msg("%s", error->message);
    }
}

static char *save_part(const World *w, TrainRank *t, uint32_t number)
{
    g_autoptr(GError) error = NULL;
    const Hash128 none = {{0}};
    TrainSnapshot *s = train_snapshot_take(t, w->spec, 0, &none, &error);
    char *part = s == NULL ? NULL
                           : write_part(checkpoint_disk(), w->directory, s->at.step, number,
                                        s->pieces, s->n_pieces, &error);
    if (part == NULL) {
        fail_msg("%s", error->message);
    }
    train_snapshot_free(s);
    return part;
}

static void save_alone(const World *w, TrainRank *t)
{
    g_autoptr(GPtrArray) parts = g_ptr_array_new_with_free_func(g_free);
    g_ptr_array_add(parts, save_part(w, t, 0));
    commit(w, t, parts);
}

static bool read_floats(void *user, const char *tensor, SliceRect rect, float *out, size_t ld,
                        GError **error)
{
    return checkpoint_read(user, tensor, rect, out, ld, error);
}

static bool restore_from(const World *w, TrainRank *t, Checkpoint *c, GError **error)
{
    const CheckpointState *s = checkpoint_state(c);
    const TrainProgress progress = {.step = s->step,
                                    .updates = s->updates,
                                    .scale = {.scale = (float)s->loss_scale,
                                              .good = (uint32_t)s->scale_growth,
                                              .hysteresis = (int32_t)s->scale_hysteresis}};
    return train_snapshot_restore(t, w->spec, &progress, read_floats, c, error);
}

static void restore(const World *w, TrainRank *t)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, &error);
    if (c == NULL || !restore_from(w, t, c, &error)) {
        fail_msg("%s", error->message);
    }
}

/* All ranks of a layout read the newest checkpoint and write it again. */
static void through_layout(World *w, uint32_t dp, uint32_t pp, uint32_t tp, bool sgd)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Plan) plan = train_plan_new(w->spec, dp, pp, tp, &error);
    g_autoptr(GPtrArray) parts = g_ptr_array_new_with_free_func(g_free);
    g_autoptr(TrainRank) first = NULL;
    assert_non_null(plan);
    for (uint32_t i = 0; i < dp * pp * tp; i++) {
        TrainRank *t = rank_new(w, plan, i / (pp * tp), i / tp % pp, i % tp, sgd);
        restore(w, t);
        g_ptr_array_add(parts, save_part(w, t, i));
        if (first == NULL) {
            first = t;
        } else {
            train_rank_free(t);
        }
    }
    commit(w, first, parts);
}

static const uint32_t layouts[][3] = {{1, 1, 1}, {2, 1, 1}, {3, 1, 1}, {1, 2, 1}, {3, 2, 1}};

static void check_resume(const Toy *toy, bool sgd)
{
    World w;
    float losses[BEFORE + AFTER], again[AFTER];
    Hash128 wanted, got;
    world_open(&w, toy);
    g_autoptr(TrainRank) t = rank_new(&w, NULL, 0, 0, 0, sgd);
    step(t, BEFORE, losses);
    save_alone(&w, t);
    step(t, AFTER, losses + BEFORE);
    assert_true(train_rank_digest(t, &wanted, NULL));
    for (size_t i = 0; i < G_N_ELEMENTS(layouts); i++) {
        through_layout(&w, layouts[i][0], layouts[i][1], layouts[i][2], sgd);
        g_autoptr(TrainRank) resumed = rank_new(&w, NULL, 0, 0, 0, sgd);
        restore(&w, resumed);
        assert_int_equal(train_rank_progress(resumed)->step, BEFORE);
        step(resumed, AFTER, again);
        assert_true(train_rank_digest(resumed, &got, NULL));
        assert_memory_equal(again, losses + BEFORE, sizeof again);
        assert_true(hash128_equal(&got, &wanted));
    }
    g_clear_pointer(&t, train_rank_free);
    world_close(&w);
}

static void test_resume(void **state)
{
    check_resume(&toy_gpt2, false);
    check_resume(&toy_llama, false);
}

static void test_resume_sgd(void **state)
{
    check_resume(&toy_gpt2, true);
}

/* A checkpoint of another model, or of another optimizer, is refused. */
static void test_other_run(void **state)
{
    World a, b;
    world_open(&a, &toy_gpt2);
    world_open(&b, &toy_llama);
    g_autoptr(TrainRank) mine = rank_new(&a, NULL, 0, 0, 0, true),
                         other = rank_new(&b, NULL, 0, 0, 0, false),
                         adam = rank_new(&a, NULL, 0, 0, 0, false);
    save_alone(&a, mine);
    g_autoptr(GError) error = NULL;
    g_autoptr(Checkpoint) c = checkpoint_open_newest(a.directory, NULL, NULL, &error);
    assert_false(restore_from(&b, other, c, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    g_clear_error(&error);
    assert_false(restore_from(&a, adam, c, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    if (strstr(error->message, "of tensor second/") == NULL) {
        fail_msg("%s", error->message);
    }
    g_clear_pointer(&mine, train_rank_free);
    g_clear_pointer(&other, train_rank_free);
    g_clear_pointer(&adam, train_rank_free);
    world_close(&a);
    world_close(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_resume_sgd),
        cmocka_unit_test(test_other_run),
    };
    return cmocka_run_group_tests_name("train_disk", tests, NULL, NULL);
}
