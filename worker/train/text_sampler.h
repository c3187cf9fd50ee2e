/* TextSampler: text from the weights of a running training, a token at a time: a forward pass of
 * the first replica over the last `length` tokens, and a draw by the definition of serving
 * (NUMERICS 12, sample.h). So the text is a function of (weights, prompt, seed, temperature), and
 * while it is shorter than a sequence of the training it is what the exported model says, with f32
 * keys, under that seed. Rank's thread. */
#pragma once

#include "worker/train/micro_runner.h"

typedef struct TextWish {
    const uint32_t *prompt; /* borrowed; [n_prompt], at least one id */
    uint32_t n_prompt, n_tokens;
    float temperature; /* 0: the most likely token */
    uint64_t seed;
} TextWish;

typedef struct TextSampler { /* borrowed */
    MicroRunner *runner;
    const Kernels *kernels;
    const Holding *holding;
    TrainPosition position;
    TrainLinks *links; /* NULL: one rank */
    uint32_t length;   /* of a sequence */
} TextSampler;

/* out: [*n] of room for n_tokens, the same on all ranks; collective. The text ends early where a
 * logit is not finite. */
bool text_sampler_run(const TextSampler *s, const TextWish *wish, uint32_t *out, uint32_t *n,
                      GError **error);
