/* Parameters: one float for each parameter of a model that a rank holds (holding.h), tensor after
 * tensor in canonical order (NUMERICS 17): f32 master weights or a set of gradients. */
#pragma once

#include "kernels/parallel.h"
#include "proto/model/model_spec.h"
#include "worker/model/device_work.h"
#include "worker/model/holding.h"

typedef struct Parameters {
    const ModelSpec *spec;  /* borrowed */
    const Holding *holding; /* borrowed, or own_holding */
    Holding *own_holding;
    float **tensors; /* by index in spec->tensors; NULL where nothing is held */
    float **roles;   /* [layers + 1][ROLE_LIMIT], NULL where there is none: parameters_at() */
    float *lookup;   /* gradients of a tied model: the embedding's lookup part, [vocabulary][width],
                      * apart from the head's, which is in the tensor (NUMERICS 16); else NULL */
    float *floats;   /* all of them, zeroed when new */
    size_t n_floats;
    DeviceWork *work; /* borrowed: the device that they lie on, whose addresses the pointers are;
                         NULL: host memory */
} Parameters;

/* with_lookup: a set of gradients; the lookup part is there where a tied model's embedding and head
 * are on one stage. Models with rope factors are refused: those are no parameters. The first form
 * holds the whole model. */
Parameters *parameters_new(const ModelSpec *spec, bool with_lookup, GError **error);
Parameters *parameters_new_part(const Holding *holding /* borrowed */, bool with_lookup,
                                GError **error);
/* The same on a device; clear, clear_sums and add are enqueued there. */
Parameters *parameters_new_part_on(const Holding *holding, bool with_lookup, DeviceWork *work,
                                   GError **error);
void parameters_free(Parameters *p); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Parameters, parameters_free)

/* The tensor of a role, from the first element that the rank computes with; layer -1 for globals.
 * NULL: the model has none, or the rank nothing of it. */
static inline float *parameters_at(const Parameters *p, TensorRole role, int32_t layer)
{
    return p->roles[(size_t)(layer + 1) * ROLE_LIMIT + role];
}
/* The output projection: a tensor of its own, or the embedding. */
static inline float *parameters_head(const Parameters *p)
{
    return parameters_at(p, p->spec->tied_output ? ROLE_TOKEN_EMBD : ROLE_OUTPUT, -1);
}
void parameters_clear(Parameters *p, Pool *pool);
/* The same, of gradients, where a backward pass adds instead of writing (BatchLeaves): vectors and
 * embeddings that are looked up; not matrices. */
void parameters_clear_sums(Parameters *p, Pool *pool);
/* to[i] += from[i] over everything: a node of the fold over leaves. Both lie at one place. */
void parameters_add(Parameters *to, const Parameters *from, Pool *pool,
                    void (*add)(float *x, const float *y, size_t n));

/* Initial weights: functions of (seed, role and layer, logical index) alone (NUMERICS 18), the held
 * ones.
 * Matrices: normal, deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 layers)
 * (Radford et al. 2019, section 2.3); norm weights 1, biases 0. Box and Muller's transform of
 * Philox words in double (det_*), rounded once. */
void parameters_initialise(Parameters *p, uint64_t seed, Pool *pool);
