/* JobSpec: a job file (CONTRACT, "Job files") with every default filled in. Every count is in the
 * range that its row of the table gives (job_spec.c), every name one of the choices, and no two
 * settings contradict each other; what depends on the members at hand or on other files is for
 * whoever plans the job. */
#pragma once

#include "proto/base/hash.h"
#include "proto/model/model_config.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Values are the places of the names in the table's choices. */
typedef enum JobKind { JOB_SERVE, JOB_TRAIN } JobKind;
typedef enum JobFamily { JOB_LLAMA, JOB_GPT2 } JobFamily;
typedef enum JobFormat { JOB_TEXT, JOB_JSONL, JOB_TOKENS } JobFormat;
/* A row of data that cannot be read: left out and counted, or the end of the job. */
typedef enum JobBadRows { JOB_ROWS_SKIP, JOB_ROWS_STOP } JobBadRows;
/* stream: windows of one long text; documents: whole documents side by side in a window. */
typedef enum JobPacking { JOB_PACK_STREAM, JOB_PACK_DOCUMENTS } JobPacking;
/* How far attention and positions reach: over a whole sequence, or over one document of it. */
typedef enum JobReach { JOB_IN_SEQUENCE, JOB_IN_DOCUMENTS } JobReach;
typedef enum JobOptimizer { JOB_ADAMW, JOB_ADAM, JOB_SGD } JobOptimizer;
typedef enum JobRate { JOB_RATE_CONSTANT, JOB_RATE_LINEAR, JOB_RATE_COSINE } JobRate;
typedef enum JobPrecision { JOB_F32, JOB_BF16, JOB_F16 } JobPrecision;
typedef enum JobScaling {
    JOB_SCALING_AUTO,
    JOB_SCALING_NONE,
    JOB_SCALING_FIXED,
    JOB_SCALING_DYNAMIC
} JobScaling;
typedef enum JobSchedule {
    JOB_SCHEDULE_AUTO,
    JOB_SCHEDULE_GPIPE,
    JOB_SCHEDULE_1F1B,
    JOB_SCHEDULE_INTERLEAVED,
    JOB_SCHEDULE_ZERO_BUBBLE
} JobSchedule;
typedef enum JobRecompute {
    JOB_RECOMPUTE_NONE,
    JOB_RECOMPUTE_SELECTIVE,
    JOB_RECOMPUTE_FULL
} JobRecompute;
typedef enum JobNonfinite { JOB_NONFINITE_STOP, JOB_NONFINITE_SKIP } JobNonfinite;
typedef enum JobResume { JOB_RESUME_AUTO, JOB_RESUME_NONE } JobResume;
typedef enum JobKv { JOB_KV_F16, JOB_KV_BF16, JOB_KV_F32, JOB_KV_Q8 } JobKv;
/* The first two as NumericsClass. */
typedef enum JobNumerics { JOB_EXACT, JOB_FAST, JOB_ANY_NUMERICS } JobNumerics;

typedef struct JobModel {
    char *from; /* a GGUF file or a Hugging Face directory; NULL: config */
    uint32_t family;
    uint64_t layers, width, heads, kv_heads, ffn, context;
    uint64_t vocabulary; /* 0: the tokenizer's */
    bool untied;
    double norm_eps, rope_base;
} JobModel;

typedef struct JobData {
    char *train, *validation; /* validation: NULL if there is none */
    uint32_t format, packing, bad_rows;
    uint32_t attention, positions;  /* JobReach; positions no further than attention */
    char *tokenizer_from;           /* GGUF, tokenizer.json or Hugging Face directory */
    uint64_t tokenizer_train;       /* vocabulary of a BPE trained on the text; 0: not trained */
    char *separator;                /* text: what ends a document; NULL: the file is one */
    char *text, *prompt, *response; /* jsonl: names of members */
} JobData;

typedef struct JobOptimizerSpec {
    uint32_t name, schedule;
    double lr, floor, beta1, beta2, eps, momentum, clip;
    bool nesterov;
    double decay; /* of matrices; embeddings, norms and biases are groups of their own */
    double decay_embeddings, decay_norms, decay_biases;
    uint64_t warmup;
} JobOptimizerSpec;

typedef struct JobLossScale {
    uint32_t policy;
    double start, least;
    uint64_t growth_steps, hysteresis;
} JobLossScale;

typedef struct JobLayout {
    uint32_t automatic;         /* CHOICE of one: written as "layout: auto" */
    uint64_t dp, pp, tp, micro; /* 0: the planner's choice */
    uint32_t schedule;
    uint64_t chunks; /* of layers per stage: interleaved */
    uint64_t zero;
    uint32_t recompute;
} JobLayout;

typedef struct JobSpec {
    uint32_t kind; /* JobKind */
    char *name;
    JobModel model;
    JobLayout layout;
    /* train */
    JobData data;
    uint64_t sequences, length, leaves;
    uint64_t steps, seed;
    double dropout, label_smoothing;
    uint32_t nonfinite;
    JobOptimizerSpec optimizer;
    uint32_t precision;
    JobLossScale loss_scale;
    char *checkpoint_directory; /* NULL: no checkpoints */
    uint64_t checkpoint_every, checkpoint_keep;
    uint32_t resume;
    uint64_t validation_every, validation_sequences;
    uint64_t sample_every, sample_tokens;
    double sample_temperature;
    char *sample_prompt;
    char *trace_file;                  /* NULL: no trace */
    uint64_t trace_first, trace_steps; /* the first step, counted from 1; how many */
    uint32_t update;                   /* CHOICE of one: sync */
    /* serve */
    uint64_t context, streams, queue; /* 0: as the planner finds */
    uint32_t kv_type, numerics;
    uint64_t kv_memory; /* bytes; 0: as the planner finds */
} JobSpec;

/* From a text; `origin` names it in messages. NULL + INVALID with all errors, lines and near names,
 * as one line; returned. */
JobSpec *job_spec_parse(const char *text, size_t length, const char *origin, GError **error);
/* From a file; NOT_FOUND. */
JobSpec *job_spec_load(const char *path, GError **error);
void job_spec_free(JobSpec *spec); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(JobSpec, job_spec_free)

/* Of a job of kind train: the samples that the replica with the fewest has, the most that
 * layout.micro can be. */
uint64_t job_spec_least_samples(const JobSpec *spec);

/* Appends the job as a file with every setting that applies; reading that gives an equal job. */
void job_spec_print(const JobSpec *spec, GString *out);
/* Of the settings that define the result (NUMERICS, "Definition") and the version of the numerics:
 * two jobs with the same one compute the same of the same weights and texts, in whatever layout. */
Hash128 job_spec_definition(const JobSpec *spec);
/* Relative paths become relative to `directory`, that of the job file. */
void job_spec_resolve(JobSpec *spec, const char *directory);
/* The model of a job without model.from; vocabulary: of its tokenizer, where the spec has none. */
ModelConfig job_spec_model_config(const JobSpec *spec, uint32_t vocabulary);
