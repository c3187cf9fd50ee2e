/* Documents that share a window and not their attention: each one's losses are those that it has
 * beside any others, and, with positions of its own, those that it has alone; so are the gradients
 * of all of them together. Whole leaves give the fold of what each leaf gives. */
#include "tests/unit/worker/toy_training.h"

#include "proto/plan/tree.h"
#include "worker/model/training.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { LENGTH = 20, DOCUMENTS = 4 };

static const uint32_t LENGTHS[DOCUMENTS] = {7, 1, 9, 3};

typedef struct Texts {
    uint32_t tokens[DOCUMENTS][LENGTH], targets[DOCUMENTS][LENGTH];
} Texts;

/* Every document has a target at all its positions but the last. */
static void texts_make(Texts *t, uint32_t vocabulary, uint32_t seed)
{
    for (uint32_t d = 0; d < DOCUMENTS; d++) {
        for (uint32_t i = 0; i < LENGTH; i++) {
            t->tokens[d][i] = (seed + 131 * d + 37 * i) % vocabulary;
        }
        for (uint32_t i = 0; i < LENGTH; i++) {
            t->targets[d][i] = i + 1 < LENGTHS[d] ? t->tokens[d][i + 1] : TARGET_NONE;
        }
    }
}

/* All documents in one sequence, from document `first` on around. */
static void texts_pack(const Texts *t, uint32_t first, uint32_t *tokens, uint32_t *targets,
                       uint32_t *begins)
{
    uint32_t at = 0;
    for (uint32_t k = 0; k < DOCUMENTS; k++) {
        const uint32_t d = (first + k) % DOCUMENTS;
        for (uint32_t i = 0; i < LENGTHS[d]; i++) {
            tokens[at + i] = t->tokens[d][i];
            targets[at + i] = t->targets[d][i];
            begins[at + i] = at;
        }
        at += LENGTHS[d];
    }
    assert_int_equal(at, LENGTH);
}

typedef struct World {
    ModelSpec *spec;
    Parameters *weights;
    Pool *pool;
    Training *training;
} World;

static World world_new(const Toy *toy)
{
    World w = {.spec = toy_spec(toy), .pool = pool_new(2, NULL, false, 0)};
    w.weights = toy_weights(toy, w.spec);
    const TrainingOptions options = {.weights = w.weights,
                                     .kernels = kernels_get(kernels_best_isa()),
                                     .pool = w.pool,
                                     .max_sequences = DOCUMENTS,
                                     .length = LENGTH};
    w.training = training_new(&options, NULL);
    assert_non_null(w.training);
    return w;
}

static void world_free(World *w)
{
    training_free(w->training);
    pool_free(w->pool);
    parameters_free(w->weights);
    model_spec_free(w->spec);
}

/* gradients: NULL, or zeroed. */
static void run(World *w, const TrainBatch *batch, float *losses, Parameters *gradients)
{
    assert_int_equal(training_forward(w->training, 0, batch), GROUP_OK);
    assert_int_equal(training_loss(w->training, 0, batch, losses), GROUP_OK);
    if (gradients != NULL) {
        assert_int_equal(training_backward(w->training, 0, batch, 1.0f, gradients), GROUP_OK);
    }
}

static void run_packed(World *w, const Texts *texts, bool within, bool restart, float *losses,
                       Parameters *gradients)
{
    uint32_t tokens[LENGTH], targets[LENGTH], begins[LENGTH];
    texts_pack(texts, 0, tokens, targets, begins);
    const TrainBatch batch = {.tokens = tokens,
                              .targets = targets,
                              .begins = within ? begins : NULL,
                              .restart = restart,
                              .n_sequences = 1,
                              .length = LENGTH};
    run(w, &batch, losses, gradients);
}

/* As many sequences as documents; what follows a document has no targets. */
static void alone(const Toy *toy)
{
    World w = world_new(toy);
    Texts texts;
    texts_make(&texts, w.spec->vocab_size, 5);
    float packed[LENGTH], apart[DOCUMENTS][LENGTH];
    g_autoptr(Parameters) a = parameters_new(w.spec, true, NULL);
    g_autoptr(Parameters) b = parameters_new(w.spec, true, NULL);
    run_packed(&w, &texts, true, true, packed, a);
    const TrainBatch batch = {.tokens = texts.tokens[0],
                              .targets = texts.targets[0],
                              .n_sequences = DOCUMENTS,
                              .length = LENGTH};
    run(&w, &batch, apart[0], b);
    for (uint32_t d = 0, at = 0; d < DOCUMENTS; at += LENGTHS[d++]) {
        assert_memory_equal(packed + at, apart[d], LENGTHS[d] * sizeof(float));
    }
    assert_true(packed[0] > 0.0f && a->n_floats == b->n_floats);
    for (size_t i = 0; i < a->n_floats; i++) { /* rows without a target add +0 to -0 */
        assert_true(a->floats[i] == b->floats[i]);
    }
    world_free(&w);
}

static void test_alone(void **state)
{
    alone(&toy_gpt2);
    alone(&toy_llama);
}

/* The document that begins at position 8 beside others, with positions of the window. */
static void neighbours(const Toy *toy)
{
    World w = world_new(toy);
    Texts texts, others;
    texts_make(&texts, w.spec->vocab_size, 5);
    texts_make(&others, w.spec->vocab_size, 600);
    memcpy(others.tokens[2], texts.tokens[2], sizeof others.tokens[2]);
    memcpy(others.targets[2], texts.targets[2], sizeof others.targets[2]);
    const uint32_t at = LENGTHS[0] + LENGTHS[1];
    const size_t bytes = LENGTHS[2] * sizeof(float);
    float first[LENGTH], second[LENGTH];
    run_packed(&w, &texts, true, false, first, NULL);
    run_packed(&w, &others, true, false, second, NULL);
    assert_memory_equal(first + at, second + at, bytes);
    assert_memory_not_equal(first, second, LENGTHS[0] * sizeof(float));
    run_packed(&w, &texts, false, false, first, NULL);
    run_packed(&w, &others, false, false, second, NULL);
    assert_memory_not_equal(first + at, second + at, bytes);
    world_free(&w);
}

static void test_neighbours(void **state)
{
    neighbours(&toy_gpt2);
    neighbours(&toy_llama);
}

/* ---- leaves ---- */

enum { LEAVES = 3, SEQUENCES = 4 };

static const uint32_t FIRST[LEAVES + 1] = {0, 1, 3, SEQUENCES};

/* The documents of each sequence lie elsewhere in it. */
typedef struct Packed {
    uint32_t tokens[SEQUENCES][LENGTH], targets[SEQUENCES][LENGTH], begins[SEQUENCES][LENGTH];
} Packed;

static TrainBatch packed_batch(const Packed *packed, uint32_t first, uint32_t last, bool restart)
{
    return (TrainBatch){.tokens = packed->tokens[first],
                        .targets = packed->targets[first],
                        .begins = packed->begins[first],
                        .restart = restart,
                        .n_sequences = last - first,
                        .length = LENGTH};
}

/* Leaf after leaf, folded behind the passes. Returned. */
static Parameters *fold_of_leaves(World *w, const Packed *packed, bool restart,
                                  const TreeStep *steps, float *losses)
{
    Parameters *stack[LEAVES + 1];
    uint32_t depth = 0;
    for (uint32_t leaf = 0; leaf < LEAVES; leaf++) {
        const TrainBatch batch = packed_batch(packed, FIRST[leaf], FIRST[leaf + 1], restart);
        stack[depth] = parameters_new(w->spec, true, NULL);
        run(w, &batch, losses + FIRST[leaf] * LENGTH, stack[depth++]);
        for (uint32_t k = 0; k < steps[leaf].n_merges; k++) {
            depth--;
            parameters_add(stack[depth - 1], stack[depth], w->pool,
                           kernels_get(kernels_best_isa())->add);
            parameters_free(stack[depth]);
        }
    }
    assert_int_equal(depth, 1);
    return stack[0];
}

static void leaves(const Toy *toy, bool restart)
{
    World w = world_new(toy);
    Packed packed;
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        Texts texts;
        texts_make(&texts, w.spec->vocab_size, 5 + 2 * s);
        texts_pack(&texts, s, packed.tokens[s], packed.targets[s], packed.begins[s]);
    }
    BatchLeaves all = {.n = LEAVES};
    memcpy(all.first, FIRST, sizeof FIRST);
    tree_program(LEAVES, 0, LEAVES, all.steps);
    float together[SEQUENCES * LENGTH], apart[SEQUENCES * LENGTH];
    g_autoptr(Parameters) a = parameters_new(w.spec, true, NULL);
    TrainBatch batch = packed_batch(&packed, 0, SEQUENCES, restart);
    batch.leaves = &all;
    run(&w, &batch, together, a);
    g_autoptr(Parameters) b = fold_of_leaves(&w, &packed, restart, all.steps, apart);
    assert_memory_equal(together, apart, sizeof together);
    for (size_t i = 0; i < a->n_floats; i++) {
        assert_true(a->floats[i] == b->floats[i]);
    }
    world_free(&w);
}

static void test_leaves(void **state)
{
    leaves(&toy_gpt2, true);
    leaves(&toy_gpt2, false);
    leaves(&toy_llama, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_alone),
                                       cmocka_unit_test(test_neighbours),
                                       cmocka_unit_test(test_leaves)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
