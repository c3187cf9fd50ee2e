#include "worker/train/gradient_fold.h"

#include "proto/plan/tree.h"

typedef struct FoldSum {
    Parameters *to, *from;
} FoldSum;

struct GradientFold {
    const Holding *holding;
    Pool *pool;
    DeviceWork *work;
    void (*add)(float *x, const float *y, size_t n);
    Parameters *stack[TREE_SUBTREES_LIMIT + 2]; /* deeper than any walk over 64 leaves */
    uint32_t depth, made;
    GPtrArray *spare;    /* of Parameters */
    GPtrArray *subtrees; /* of Parameters: handed over in this step */
    TreeStep steps[TREE_LEAVES_LIMIT];
    uint32_t leaf; /* of steps: the next */
    bool defers;
    GArray *sums; /* of FoldSum, in order: noted */
};

GradientFold *gradient_fold_new(const Holding *holding, Pool *pool, DeviceWork *work,
                                void (*add)(float *x, const float *y, size_t n))
{
    GradientFold *f = g_new0(GradientFold, 1);
    f->holding = holding;
    f->pool = pool;
    f->work = work;
    f->add = add;
    f->spare = g_ptr_array_new_with_free_func((GDestroyNotify)parameters_free);
    f->subtrees = g_ptr_array_new();
    f->sums = g_array_new(FALSE, FALSE, sizeof(FoldSum));
    return f;
}

void gradient_fold_free(GradientFold *f)
{
    if (f == NULL) {
        return;
    }
    gradient_fold_reset(f);
    g_ptr_array_unref(f->subtrees);
    g_ptr_array_unref(f->spare);
    g_array_unref(f->sums);
    g_free(f);
}

static Parameters *take(GradientFold *f, void (*clear)(Parameters *p, Pool *pool), GError **error)
{
    if (f->spare->len == 0) {
        Parameters *fresh = f->work != NULL
                                ? parameters_new_part_on(f->holding, true, f->work, error)
                                : parameters_new_part(f->holding, true, error);
        f->made += fresh != NULL;
        return fresh;
    }
    Parameters *p = g_ptr_array_steal_index_fast(f->spare, f->spare->len - 1);
    clear(p, f->pool);
    return p;
}

Parameters *gradient_fold_take(GradientFold *f, GError **error)
{
    return take(f, parameters_clear, error);
}

Parameters *gradient_fold_take_for_pass(GradientFold *f, GError **error)
{
    return take(f, parameters_clear_sums, error);
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
    } else if (right != NULL && f->defers) {
        const FoldSum sum = {left, right};
        g_array_append_val(f->sums, sum);
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

void gradient_fold_defer(GradientFold *f)
{
    f->defers = true;
}

void gradient_fold_sum(const GradientFold *f, size_t first, size_t last, unsigned t,
                       unsigned n_threads)
{
    enum { GRAIN = 16 };
    const size_t n = last - first, a = first + n * t / n_threads / GRAIN * GRAIN,
                 b = t + 1 == n_threads ? last : first + n * (t + 1) / n_threads / GRAIN * GRAIN;
    for (guint i = 0; i < f->sums->len; i++) {
        const FoldSum *sum = &g_array_index(f->sums, FoldSum, i);
        float *to = sum->to->floats + a;
        const float *from = sum->from->floats + a;
        if (f->work != NULL) {
            device_work_note(f->work, f->work->ops->add(f->work->stream, to, from, b - a),
                             "a sum of gradients");
        } else {
            f->add(to, from, b - a);
        }
    }
}

void gradient_fold_settle(GradientFold *f)
{
    for (guint i = 0; i < f->sums->len; i++) {
        gradient_fold_give(f, g_array_index(f->sums, FoldSum, i).from);
    }
    g_array_set_size(f->sums, 0);
    f->defers = false;
}

void gradient_fold_reset(GradientFold *f)
{
    gradient_fold_settle(f);
    while (f->depth > 0) {
        gradient_fold_give(f, gradient_fold_pop(f));
    }
    while (f->subtrees->len > 0) {
        gradient_fold_give(f, g_ptr_array_steal_index_fast(f->subtrees, f->subtrees->len - 1));
    }
}

void gradient_fold_begin(GradientFold *f, uint32_t n_leaves, uint32_t first, uint32_t last)
{
    gradient_fold_reset(f);
    tree_program(n_leaves, first, last, f->steps);
    f->leaf = 0;
}

void gradient_fold_leaf(GradientFold *f, Parameters *gradients)
{
    gradient_fold_node(f, gradients, 1);
}

void gradient_fold_node(GradientFold *f, Parameters *gradients, uint32_t n_leaves)
{
    uint32_t n_merges = 0;
    for (uint32_t i = 0; i < n_leaves; i++) {
        n_merges += f->steps[f->leaf++].n_merges;
    }
    gradient_fold_push(f, gradients, n_merges - (n_leaves - 1)); /* the node's own are done */
    if (f->steps[f->leaf - 1].emit) {
        Parameters *subtree = gradient_fold_pop(f);
        if (subtree != NULL) {
            g_ptr_array_add(f->subtrees, subtree);
        }
    }
}

GPtrArray *gradient_fold_subtrees(GradientFold *f)
{
    return f->subtrees;
}

uint32_t gradient_fold_made(const GradientFold *f)
{
    return f->made;
}
