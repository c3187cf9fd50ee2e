#include "tests/unit/worker/toy_training.h"

#include "tests/unit/kernels/numbers.h"

const Toy toy_gpt2 = {
    .config = {.family = FAMILY_GPT2,
               .layers = 2,
               .width = 16,
               .heads = 4,
               .ffn_width = 40,
               .vocabulary = 1030,
               .context = 24},
    .sequences = 6,
    .length = 20,
    .seed = 11,
    .order = 5,
    .clip = 0.5,
    .eps = 1e-5,
};
const Toy toy_llama = {
    .config = {.family = FAMILY_LLAMA,
               .layers = 2,
               .width = 16,
               .heads = 4,
               .kv_heads = 2,
               .ffn_width = 72,
               .vocabulary = 1030,
               .context = 40,
               .untied = true},
    .sequences = 5,
    .length = 37,
    .seed = 12,
    .order = UINT64_C(1) << 40 | 9,
    .clip = 0.5,
    .eps = 1e-5,
};

/* Three stages, 6 attention units, 5 FFN units (the last of 2 columns), 4 vocabulary chunks. */
const Toy toy_wide_gpt2 = {
    .config = {.family = FAMILY_GPT2,
               .layers = 3,
               .width = 24,
               .heads = 6,
               .ffn_width = 130,
               .vocabulary = 3100,
               .context = 16},
    .sequences = 6,
    .length = 9,
    .seed = 21,
    .order = 3,
    .clip = 0.5,
    .eps = 1e-5,
};
/* Three query heads share a KV head: cuts of 3 ranks go through both. */
const Toy toy_wide_llama = {
    .config = {.family = FAMILY_LLAMA,
               .layers = 3,
               .width = 24,
               .heads = 6,
               .kv_heads = 2,
               .ffn_width = 130,
               .vocabulary = 3100,
               .context = 40,
               .untied = true},
    .sequences = 6,
    .length = 34,
    .seed = 22,
    .order = 4,
    .clip = 0.5,
    .eps = 1e-5,
};

ModelSpec *toy_spec(const Toy *toy)
{
    GError *error = NULL;
    ModelSpec *spec = model_spec_from_config(&toy->config, &error);
    if (spec == NULL) {
        g_error("%s", error->message);
    }
    return spec;
}

Parameters *toy_weights(const Toy *toy, const ModelSpec *spec)
{
    Parameters *p = parameters_new(spec, false, NULL);
    Numbers numbers = {toy->seed};
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        const double centre =
            t->role == ROLE_ATTN_NORM || t->role == ROLE_FFN_NORM || t->role == ROLE_OUTPUT_NORM
                ? 1.0
                : 0.0;
        for (size_t e = 0; e < (size_t)t->rows * t->columns; e++) {
            p->tensors[i][e] = (float)(centre + numbers_uniform(&numbers, -0.25, 0.25));
            if (toy->magnify > 0.0f && t->role == ROLE_OUTPUT_NORM) {
                p->tensors[i][e] *= toy->magnify;
            }
        }
    }
    return p;
}

void toy_cut(Parameters *part, const Parameters *whole)
{
    for (uint32_t i = 0; i < part->spec->n_tensors; i++) {
        const SliceRect *r = &part->holding->rects[i];
        for (uint32_t row = 0; row < r->n_rows; row++) {
            memcpy(part->tensors[i] + (size_t)row * r->n_cols,
                   whole->floats + holding_at(whole->holding, i, r->row0 + row, r->col0),
                   r->n_cols * sizeof(float));
        }
    }
}

Parameters *toy_part(const Toy *toy, const ModelSpec *spec, const Holding *holding)
{
    g_autoptr(Parameters) whole = toy_weights(toy, spec);
    Parameters *part = parameters_new_part(holding, false, NULL);
    toy_cut(part, whole);
    return part;
}

TokenData *toy_data(const Toy *toy)
{
    const size_t n = (size_t)toy->length * 40 + 7;
    Numbers numbers = {toy->seed + 1};
    g_autofree uint32_t *ids = g_new(uint32_t, n);
    for (size_t i = 0; i < n; i++) {
        ids[i] = (uint32_t)(numbers_u64(&numbers) % toy->config.vocabulary);
    }
    if (toy->bounds == BOUNDS_NONE) {
        return token_data_new(ids, n, toy->length, NULL);
    }
    Numbers begins = {toy->seed + 2};
    g_autofree uint8_t *flags = g_new(uint8_t, n);
    for (size_t i = 0; i < n; i++) {
        flags[i] = DOCUMENT_LOSS | (numbers_u64(&begins) % 6 == 0 ? DOCUMENT_BEGIN : 0);
    }
    const Documents documents = {.ids = ids, .flags = flags, .n = n};
    return token_data_from(&documents, toy->length, TOKENS_STREAM, NULL);
}

TrainRankOptions toy_options(const Toy *toy, const ModelSpec *spec, const SampleSource *source)
{
    return (TrainRankOptions){.spec = spec,
                              .source = source,
                              .sequences = toy->sequences,
                              .leaves = 4,
                              .micro_sequences = 1,
                              .optimizer = {.kind = OPTIMIZER_ADAMW,
                                            .rate = 3e-3,
                                            .beta1 = 0.9,
                                            .beta2 = 0.95,
                                            .eps = toy->eps,
                                            .decay = 0.1,
                                            .clip = toy->clip,
                                            .schedule = RATE_COSINE,
                                            .warmup = 5,
                                            .steps = 20,
                                            .floor = 3e-4}};
}
