/* The toys of tests/golden/train/make_train.py: configuration, first weights, data, settings. */
#pragma once

#include "proto/model/model_config.h"
#include "worker/train/token_data.h"
#include "worker/train/train_memory.h"

typedef struct Toy {
    ModelConfig config;
    uint32_t sequences, length;
    uint64_t seed, order;
    double clip, eps;
    float magnify;      /* of the output norm's weights; 0: 1 */
    TokenBounds bounds; /* other than NONE: about every sixth token begins a document */
} Toy;

extern const Toy toy_gpt2, toy_llama;
/* Not of make_train.py: layers, units, vocabulary chunks and heads that cuts go through. */
extern const Toy toy_wide_gpt2, toy_wide_llama;

ModelSpec *toy_spec(const Toy *toy);
Parameters *toy_weights(const Toy *toy, const ModelSpec *spec);
/* What `part` holds, from those of the whole model. */
void toy_cut(Parameters *part, const Parameters *whole);
/* toy_weights() of a rank. */
Parameters *toy_part(const Toy *toy, const ModelSpec *spec, const Holding *holding);
TokenData *toy_data(const Toy *toy);
/* Everything but kernels, pool and how the work is spread (micro-batches of 1, one rank). */
TrainRankOptions toy_options(const Toy *toy, const ModelSpec *spec, const SampleSource *source);
