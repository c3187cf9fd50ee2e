/* The fold of gradients over leaves (NUMERICS 14): node(0, L) of sets of gradients, kept as a
 * binary counter's stack. A leaf without samples is no operand. A replica that owns leaves [first,
 * last) hands over its maximal subtrees; whoever has all of them completes the tree. One thread. */
#pragma once

#include "worker/model/parameters.h"

typedef struct GradientFold GradientFold;

/* add: kernels->add. work: where the sets lie, NULL: in host memory. Borrows all. Returned. */
GradientFold *gradient_fold_new(const Holding *holding, Pool *pool, DeviceWork *work,
                                void (*add)(float *x, const float *y, size_t n));
void gradient_fold_free(GradientFold *f); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(GradientFold, gradient_fold_free)

/* A zeroed set of gradients, to be pushed or given back. NULL: no memory. */
Parameters *gradient_fold_take(GradientFold *f, GError **error);
/* The same, zeroed only where a backward pass adds: parameters_clear_sums(). */
Parameters *gradient_fold_take_for_pass(GradientFold *f, GError **error);
void gradient_fold_give(GradientFold *f, Parameters *gradients); /* taken always; NULL-safe */

/* A step over leaves [first, last) of n_leaves: each in order by gradient_fold_leaf() (taken
 * always; NULL: it has no sample), or the n leaves of a node at once by gradient_fold_node(); then
 * all that it hands over, in leaf order (of Parameters, borrowed until the next begin; the caller
 * may steal). */
void gradient_fold_begin(GradientFold *f, uint32_t n_leaves, uint32_t first, uint32_t last);
void gradient_fold_leaf(GradientFold *f, Parameters *gradients);
void gradient_fold_node(GradientFold *f, Parameters *gradients, uint32_t n_leaves);
GPtrArray *gradient_fold_subtrees(GradientFold *f);

/* Pushes an operand (taken always; NULL: there is none), then sums the top two `n_merges` times. */
void gradient_fold_push(GradientFold *f, Parameters *gradients, uint32_t n_merges);
/* The top of the stack (may be NULL); the caller's. */
Parameters *gradient_fold_pop(GradientFold *f);
/* From here to gradient_fold_settle() sums are noted instead of made: the fold
 * goes its way, and what it notes is added range by range, each range once, by gradient_fold_sum():
 * thread t's share of floats [first, last); t of n_threads, all of which call (on a device: one).
 */
void gradient_fold_defer(GradientFold *f);
void gradient_fold_sum(const GradientFold *f, size_t first, size_t last, unsigned t,
                       unsigned n_threads);
void gradient_fold_settle(GradientFold *f);
/* Gives everything on the stack, and the subtrees, back. */
void gradient_fold_reset(GradientFold *f);
/* Sets of gradients that have been made: the peak that a plan counts. */
uint32_t gradient_fold_made(const GradientFold *f);
