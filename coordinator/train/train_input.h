/* TrainInput: what a training job learns from and begins with, read from the coordinator's disk:
 * data as tokens, tokenizer, model. Loading blocks (work pool); immutable afterwards. */
#pragma once

#include "proto/config/job_spec.h"
#include "proto/model/model_source.h"
#include "proto/text/documents.h"
#include "proto/text/tokenizer.h"

typedef struct TrainInput {
    Documents *train, *validation; /* validation: NULL if there is none */
    char *tokenizer_json;          /* tokenizer.json of its checkpoints; NULL: bytes */
    ModelSource *source;           /* model.from; NULL: weights come from the seed */
    ModelSpec *spec;
    char *report;         /* rows that were left out; NULL: none */
    Tokenizer *tokenizer; /* NULL: bytes; borrows what is private */
    GArray *prompt;       /* of uint32_t: what sampled texts go on from */
    /* private: what the tokenizer was made of */
    BpeVocab *trained;
    ModelSource *vocabulary;
} TrainInput;

/* NOT_FOUND, INVALID: what is wrong with which file. Returned. */
TrainInput *train_input_load(const JobSpec *job, GError **error);
void train_input_free(TrainInput *in); /* NULL-safe */

/* Ids as text, valid UTF-8; returned. */
char *train_input_text(const TrainInput *in, const uint32_t *ids, size_t n);

/* Elements [first, first + n) as they travel: ids with flags in their highest two bits. False:
 * there are fewer. */
bool train_input_tokens(const TrainInput *in, bool validation, uint64_t first, uint64_t n,
                        uint32_t *out);
/* A rectangle of the given weights, rows one after another; "weights/NAME". */
bool train_input_weights(const TrainInput *in, const char *tensor, SliceRect rect, float *out,
                         GError **error);
