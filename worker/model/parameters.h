/* Parameters: one float for each parameter of a model, tensor after tensor in canonical order
 * (NUMERICS 17), row-major as in ModelSpec: f32 master weights, a set of gradients or an
 * optimizer's moments. */
#pragma once

#include "kernels/parallel.h"
#include "proto/model/gguf.h"

typedef struct Parameters {
    const ModelSpec *spec; /* borrowed */
    float **tensors;       /* by index in spec->tensors */
    float **roles;         /* [layers + 1][ROLE_LIMIT], NULL where there is none: parameters_at() */
    float *lookup; /* gradients of a tied model: the embedding's lookup part, [vocabulary][width],
                    * apart from the head's, which is in the tensor (NUMERICS 16); else NULL */
    float *floats; /* all of them, zeroed when new */
    size_t n_floats;
} Parameters;

/* with_lookup: a set of gradients. Models with rope factors are refused: those are no parameters.
 */
Parameters *parameters_new(const ModelSpec *spec, bool with_lookup, GError **error);
void parameters_free(Parameters *p); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Parameters, parameters_free)

/* The tensor of a role; layer -1 for globals. NULL: the model has none. */
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
/* to[i] += from[i] over everything: a node of the fold over leaves. */
void parameters_add(Parameters *to, const Parameters *from, Pool *pool,
                    void (*add)(float *x, const float *y, size_t n));

/* Initial weights: functions of (seed, role and layer, logical index) alone (NUMERICS 18).
 * Matrices: normal, deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 layers)
 * (Radford et al. 2019, section 2.3); norm weights 1, biases 0. Box and Muller's transform of
 * Philox words in double (det_*), rounded once. */
void parameters_initialise(Parameters *p, uint64_t seed, Pool *pool);

/* Weights from a file whose matrices are F32, F16 or BF16: exactly those values. p->spec is that of
 * the file. INVALID for block types: their units are others (NUMERICS 3). */
bool parameters_load(Parameters *p, const Gguf *g, GError **error);
