#include "worker/train/gradient_fold.h"

#include "proto/plan/tree.h"

struct GradientFold {
    const ModelSpec *spec;
    Pool *pool;
    void (*add)(float *x, const float *y, size_t n);
    Parameters *stack[TREE_SUBTREES_LIMIT + 2]; /* deeper than any walk over 64 leaves */
    uint32_t depth, made;
    GPtrArray *spare; /* of Parameters */
};

GradientFold *gradient_fold_new(const ModelSpec *spec, Pool *pool,
                                void (*add)(float *x, const float *y, size_t n))
{
    GradientFold *f = g_new0(GradientFold, 1);
    f->spec = spec;
    f->pool = pool;
    f->add = add;
    f->spare = g_ptr_array_new_with_free_func((GDestroyNotify)parameters_free);
    return f;
}

void gradient_fold_free(GradientFold *f)
{
    if (f == NULL) {
        return;
    }
    gradient_fold_reset(f);
    g_ptr_array_unref(f->spare);
    g_free(f);
}

Parameters *gradient_fold_take(GradientFold *f, GError **error)
{
    if (f->spare->len == 0) {
        Parameters *fresh = parameters_new(f->spec, true, error);
        f->made += fresh != NULL;
        return fresh;
    }
    Parameters *p = g_ptr_array_steal_index_fast(f->spare, f->spare->len - 1);
    parameters_clear(p, f->pool);
    return p;
}

void gradient_fold_give(GradientFold *f, Parameters *gradients)
{
    if (gradients != NULL) {
        g_ptr_array_add(f->spare, gradients);
    }
}

static void merge(GradientFold *f)
{
    Parameters *right = f->stack[--f->depth], *left = f->stack[f->depth - 1];
    if (left == NULL) {
        f->stack[f->depth - 1] = right;
    } else if (right != NULL) {
        parameters_add(left, right, f->pool, f->add);
        gradient_fold_give(f, right);
    }
}

void gradient_fold_push(GradientFold *f, Parameters *gradients, uint32_t n_merges)
{
    g_assert(f->depth < G_N_ELEMENTS(f->stack));
    f->stack[f->depth++] = gradients;
    for (; n_merges > 0; n_merges--) {
        g_assert(f->depth >= 2);
        merge(f);
    }
}

Parameters *gradient_fold_pop(GradientFold *f)
{
    g_assert(f->depth > 0);
    return f->stack[--f->depth];
}

void gradient_fold_reset(GradientFold *f)
{
    while (f->depth > 0) {
        gradient_fold_give(f, gradient_fold_pop(f));
    }
}

uint32_t gradient_fold_made(const GradientFold *f)
{
    return f->made;
}
