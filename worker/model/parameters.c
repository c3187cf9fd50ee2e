#include "worker/model/parameters.h"

#include "kernels/ops/act.h"
#include "kernels/ops/sample.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <math.h>
#include <string.h>

enum { ALIGN_FLOATS = 16 };

static void point(Parameters *p)
{
    const Holding *h = p->holding;
    for (uint32_t i = 0; i < p->spec->n_tensors; i++) {
        const TensorSpec *t = &p->spec->tensors[i];
        if (holding_has(h, i)) {
            p->tensors[i] = p->floats + h->offsets[i];
            p->roles[(size_t)(t->layer + 1) * ROLE_LIMIT + t->role] =
                p->floats + holding_own_part(h, i);
        }
    }
}

static bool allocate(Parameters *p, bool has_lookup, GError **error)
{
    const Holding *h = p->holding;
    const ModelSpec *spec = p->spec;
    const size_t lookup = has_lookup ? (size_t)h->vocab * spec->width : 0;
    p->n_floats = h->n_floats + (lookup + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    p->floats = p->work != NULL
                    ? device_work_alloc(p->work, p->n_floats * sizeof(float), "parameters", error)
                    : weft_map(p->n_floats * sizeof(float), "parameters", error);
    p->tensors = weft_alloc(spec->n_tensors, sizeof *p->tensors, "tensor pointers", error);
    p->roles = p->tensors == NULL ? NULL
                                  : weft_alloc((size_t)(spec->n_layers + 1) * ROLE_LIMIT,
                                               sizeof *p->roles, "tensor pointers", error);
    if (p->floats == NULL || p->roles == NULL) {
        return false;
    }
    p->lookup = has_lookup ? p->floats + h->n_floats : NULL;
    return true;
}

/* own: taken always. */
static Parameters *new_parameters(const Holding *holding, Holding *own, bool with_lookup,
                                  DeviceWork *work, GError **error)
{
    g_autoptr(Parameters) p = g_new0(Parameters, 1);
    p->work = work;
    p->spec = holding->spec;
    p->holding = holding;
    p->own_holding = own;
    if (model_spec_tensor(p->spec, ROLE_ROPE_FACTORS, -1) != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s: rope factors are not trainable; start from a model without them",
                    p->spec->name);
        return NULL;
    }
    const bool has_lookup =
        with_lookup && p->spec->tied_output && holding->is_first && holding->is_last;
    if (!allocate(p, has_lookup, error)) {
        return NULL;
    }
    point(p);
    return g_steal_pointer(&p);
}

Parameters *parameters_new_part(const Holding *holding, bool with_lookup, GError **error)
{
    return new_parameters(holding, NULL, with_lookup, NULL, error);
}

Parameters *parameters_new_part_on(const Holding *holding, bool with_lookup, DeviceWork *work,
                                   GError **error)
{
    return new_parameters(holding, NULL, with_lookup, work, error);
}

Parameters *parameters_new(const ModelSpec *spec, bool with_lookup, GError **error)
{
    Holding *whole = holding_whole(spec);
    return new_parameters(whole, whole, with_lookup, NULL, error);
}

void parameters_free(Parameters *p)
{
    if (p == NULL) {
        return;
    }
    if (p->floats != NULL && p->work != NULL) {
        device_work_release(p->work, p->floats);
    } else if (p->floats != NULL) {
        weft_unmap(p->floats, p->n_floats * sizeof(float));
    }
    weft_free(p->tensors);
    weft_free(p->roles);
    holding_free(p->own_holding);
    g_free(p);
}

/* ---- over everything, threads sharing it ---- */

typedef struct Sweep {
    float *to;
    const float *from;
    size_t n;
    void (*add)(float *x, const float *y, size_t n);
} Sweep;

static void sweep_region(void *user, unsigned t, unsigned n_threads)
{
    const Sweep *s = user;
    const size_t first = s->n / n_threads * t,
                 last = t + 1 == n_threads ? s->n : first + s->n / n_threads;
    if (s->from == NULL) {
        memset(s->to + first, 0, (last - first) * sizeof(float));
    } else {
        s->add(s->to + first, s->from + first, last - first);
    }
}

static void clear_on_device(Parameters *p, float *floats, size_t n)
{
    device_work_note(p->work,
                     p->work->device->api->fill(p->work->stream, floats, 0, n * sizeof *floats),
                     "clearing gradients");
}

void parameters_clear(Parameters *p, Pool *pool)
{
    if (p->work != NULL) {
        clear_on_device(p, p->floats, p->n_floats);
        return;
    }
    Sweep s = {.to = p->floats, .n = p->n_floats};
    pool_run(pool, sweep_region, &s);
}

static bool is_written(const Parameters *p, const TensorSpec *t)
{
    return t->rows > 1 && t->role != ROLE_POSITION_EMBD &&
           (t->role != ROLE_TOKEN_EMBD || (p->spec->tied_output && p->holding->is_last));
}

typedef struct ClearSums {
    Parameters *p;
    void (*clear)(Parameters *p, float *floats, size_t n, unsigned t, unsigned n_threads);
} ClearSums;

static void clear_share(Parameters *p, float *floats, size_t n, unsigned t, unsigned n_threads)
{
    (void)p;
    sweep_region(&(Sweep){.to = floats, .n = n}, t, n_threads);
}

static void clear_all(Parameters *p, float *floats, size_t n, unsigned t, unsigned n_threads)
{
    (void)t;
    (void)n_threads;
    clear_on_device(p, floats, n);
}

static void clear_sums_region(void *user, unsigned t, unsigned n_threads)
{
    const ClearSums *c = user;
    Parameters *p = c->p;
    for (uint32_t i = 0; i < p->spec->n_tensors; i++) {
        const SliceRect *r = &p->holding->rects[i];
        if (holding_has(p->holding, i) && !is_written(p, &p->spec->tensors[i])) {
            c->clear(p, p->floats + p->holding->offsets[i], (size_t)r->n_rows * r->n_cols, t,
                     n_threads);
        }
    }
    if (p->lookup != NULL) {
        c->clear(p, p->lookup, (size_t)p->holding->vocab * p->spec->width, t, n_threads);
    }
}

void parameters_clear_sums(Parameters *p, Pool *pool)
{
    if (p->work != NULL) {
        clear_sums_region(&(ClearSums){p, clear_all}, 0, 1);
    } else {
        pool_run(pool, clear_sums_region, &(ClearSums){p, clear_share});
    }
}

void parameters_add(Parameters *to, const Parameters *from, Pool *pool,
                    void (*add)(float *x, const float *y, size_t n))
{
    g_assert(to->n_floats == from->n_floats && to->work == from->work);
    if (to->work != NULL) {
        device_work_note(
            to->work, to->work->ops->add(to->work->stream, to->floats, from->floats, to->n_floats),
            "a sum of gradients");
        return;
    }
    Sweep s = {.to = to->floats, .from = from->floats, .n = to->n_floats, .add = add};
    pool_run(pool, sweep_region, &s);
}

/* ---- initial weights ---- */

/* Four normal numbers: Box and Muller (1958). */
static void four_normals(uint64_t seed, const TensorSpec *t, uint64_t block, double out[4])
{
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)t->role,
                                 (uint32_t)t->layer};
    uint32_t words[4];
    philox4x32(counter, key, words);
    for (int i = 0; i < 4; i += 2) {
        const double u = ((double)words[i] + 0.5) * 0x1p-32,
                     angle = ((double)words[i + 1] + 0.5) * 0x1p-32 * 0x1.921fb54442d18p+2;
        const double radius = sqrt(-2.0 * det_log(u));
        out[i] = radius * det_cos(angle);
        out[i + 1] = radius * det_sin(angle);
    }
}

typedef struct Initialise {
    Parameters *p;
    uint64_t seed;
} Initialise;

/* Elements [at, at + n) of the tensor, counted row-major. */
static void initialise_run(uint64_t seed, const TensorSpec *tensor, double deviation, uint64_t at,
                           uint32_t n, float *out)
{
    double normal[4];
    for (uint64_t i = at; i < at + n; i++) {
        if (i == at || i % 4 == 0) {
            four_normals(seed, tensor, i / 4, normal);
        }
        out[i - at] = (float)(normal[i % 4] * deviation);
    }
}

static void initialise_matrix(const Initialise *job, uint32_t index, unsigned t, unsigned n_threads)
{
    const ModelSpec *spec = job->p->spec;
    const TensorSpec *tensor = &spec->tensors[index];
    const SliceRect *part = &job->p->holding->rects[index];
    const bool to_residual = tensor->role == ROLE_ATTN_OUT || tensor->role == ROLE_FFN_DOWN;
    const double deviation = to_residual ? 0.02 / sqrt(2.0 * spec->n_layers) : 0.02;
    uint32_t first, last;
    pool_share(part->n_rows, 1, t, n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        initialise_run(job->seed, tensor, deviation,
                       (uint64_t)(part->row0 + r) * tensor->columns + part->col0, part->n_cols,
                       job->p->tensors[index] + (size_t)r * part->n_cols);
    }
}

static void initialise_region(void *user, unsigned t, unsigned n_threads)
{
    const Initialise *job = user;
    const ModelSpec *spec = job->p->spec;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *tensor = &spec->tensors[i];
        if (tensor->rows > 1) {
            initialise_matrix(job, i, t, n_threads);
        } else if (t == 0 && job->p->tensors[i] != NULL) {
            const bool is_norm = tensor->role == ROLE_ATTN_NORM || tensor->role == ROLE_FFN_NORM ||
                                 tensor->role == ROLE_OUTPUT_NORM;
            for (uint32_t c = 0; c < tensor->columns; c++) {
                job->p->tensors[i][c] = is_norm ? 1.0f : 0.0f;
            }
        }
    }
}

void parameters_initialise(Parameters *p, uint64_t seed, Pool *pool)
{
    Initialise job = {p, seed};
    pool_run(pool, initialise_region, &job);
}
