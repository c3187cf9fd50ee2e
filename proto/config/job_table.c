#include "proto/config/job_table.h"

#include "proto/plan/train_limits.h"

#include <stddef.h>

#define ROW(name, type, field, least, most, choices, help)                                         \
    {                                                                                              \
        name, 0, OPTION_##type, offsetof(JobSpec, field), NULL, help, NULL, least, most, choices,  \
            false                                                                                  \
    }
/* A row that defines the result (NUMERICS, "Definition"); which weights and texts it is a function
 * of is no part of that. */
#define RESULT(name, type, field, least, most, choices, help)                                      \
    {                                                                                              \
        name, 0, OPTION_##type, offsetof(JobSpec, field), NULL, help, NULL, least, most, choices,  \
            true                                                                                   \
    }

#define KIND_ROWS                                                                                  \
    ROW("kind", CHOICE, kind, 0, 0, "serve|train", "what the job does"),                           \
        ROW("name", STRING, name, 0, 0, NULL, "what it is called")
#define LAYOUT_ROWS                                                                                \
    ROW("layout", CHOICE, layout.automatic, 0, 0, "auto", "the planner chooses"),                  \
        ROW("layout.dp", COUNT, layout.dp, 1, 64, "auto", "replicas"),                             \
        ROW("layout.pp", COUNT, layout.pp, 1, 64, "auto", "pipeline stages"),                      \
        ROW("layout.tp", COUNT, layout.tp, 1, 64, "auto", "tensor ranks of a stage")

/* clang-format off */
const Option JOB_TRAIN_TABLE[] = {
    KIND_ROWS,
    ROW("model.from", STRING, model.from, 0, 0, NULL, "a GGUF file or a Hugging Face directory to start from"),
    RESULT("model.config.family", CHOICE, model.family, 0, 0, "llama|gpt2", "the architecture"),
    RESULT("model.config.layers", COUNT, model.layers, 1, 4096, NULL, "blocks"),
    RESULT("model.config.width", COUNT, model.width, 1, 1 << 20, NULL, "elements of a hidden state"),
    RESULT("model.config.heads", COUNT, model.heads, 1, 4096, NULL, "query heads"),
    RESULT("model.config.kv_heads", COUNT, model.kv_heads, 1, 4096, NULL, "key and value heads (llama)"),
    RESULT("model.config.ffn", COUNT, model.ffn, 1, 1 << 22, NULL, "width inside the feed-forward network"),
    RESULT("model.config.vocabulary", COUNT, model.vocabulary, 1, 1 << 24, "auto", "ids; auto: the tokenizer's"),
    RESULT("model.config.context", COUNT, model.context, 1, 1 << 28, NULL, "positions"),
    RESULT("model.config.untied", FLAG, model.untied, 0, 0, NULL, "an output projection of its own"),
    RESULT("model.config.norm_eps", NUMBER, model.norm_eps, 1e-12, 0.1, NULL, "epsilon of the norms"),
    RESULT("model.config.rope_base", NUMBER, model.rope_base, 1, 1e12, NULL, "base of the rotary positions (llama)"),
    ROW("data.train", STRING, data.train, 0, 0, NULL, "the file to train on"),
    ROW("data.validation", STRING, data.validation, 0, 0, NULL, "the file to validate on"),
    RESULT("data.format", CHOICE, data.format, 0, 0, "text|jsonl|tokens", "what the files are"),
    RESULT("data.packing", CHOICE, data.packing, 0, 0, "stream|documents", "how documents fill a sequence"),
    RESULT("data.attention", CHOICE, data.attention, 0, 0, "sequence|documents", "how far attention reaches"),
    RESULT("data.positions", CHOICE, data.positions, 0, 0, "sequence|documents", "where positions begin; documents needs attention: documents"),
    RESULT("data.bad_rows", CHOICE, data.bad_rows, 0, 0, "skip|stop", "what a row that cannot be read does"),
    RESULT("data.separator", STRING, data.separator, 0, 0, NULL, "text: what ends a document"),
    RESULT("data.text", STRING, data.text, 0, 0, NULL, "jsonl: the member that is trained on whole"),
    RESULT("data.prompt", STRING, data.prompt, 0, 0, NULL, "jsonl: the member that is read without a loss"),
    RESULT("data.response", STRING, data.response, 0, 0, NULL, "jsonl: the member that follows it, with a loss"),
    ROW("data.tokenizer.from", STRING, data.tokenizer_from, 0, 0, NULL, "a GGUF file, tokenizer.json or its directory"),
    RESULT("data.tokenizer.train", COUNT, data.tokenizer_train, 257, 1 << 20, NULL, "train a byte-level BPE of so many ids"),
    RESULT("batch.sequences", COUNT, sequences, 1, TRAIN_SEQUENCES_LIMIT, NULL, "of a step"),
    RESULT("batch.length", COUNT, length, 1, 1 << 20, NULL, "tokens of a sequence"),
    RESULT("batch.leaves", COUNT, leaves, 1, TRAIN_LEAVES_LIMIT, NULL, "parts that gradients fold over"),
    RESULT("steps", COUNT, steps, 1, TRAIN_STEPS_LIMIT, NULL, "of the whole run"),
    RESULT("seed", COUNT, seed, 0, 0, NULL, "of weights, order and dropout"),
    RESULT("dropout", NUMBER, dropout, 0, 0.9, NULL, "share of activations left out"),
    RESULT("label_smoothing", NUMBER, label_smoothing, 0, 0.9, NULL, "share of the target spread over the vocabulary"),
    RESULT("nonfinite", CHOICE, nonfinite, 0, 0, "stop|skip", "what a step with an infinite loss does"),
    RESULT("optimizer.name", CHOICE, optimizer.name, 0, 0, "adamw|adam|sgd", "the rule"),
    RESULT("optimizer.lr", NUMBER, optimizer.lr, 1e-12, 100, NULL, "the highest learning rate"),
    RESULT("optimizer.betas.0", NUMBER, optimizer.beta1, 0, 0.999999, NULL, "Adam: decay of the first moment"),
    RESULT("optimizer.betas.1", NUMBER, optimizer.beta2, 0, 0.999999, NULL, "Adam: decay of the second moment"),
    RESULT("optimizer.eps", NUMBER, optimizer.eps, 1e-20, 1, NULL, "Adam: epsilon"),
    RESULT("optimizer.momentum", NUMBER, optimizer.momentum, 0, 0.999999, NULL, "SGD: momentum"),
    RESULT("optimizer.nesterov", FLAG, optimizer.nesterov, 0, 0, NULL, "SGD: look ahead"),
    RESULT("optimizer.decay", NUMBER, optimizer.decay, 0, 10, NULL, "weight decay of matrices"),
    RESULT("optimizer.groups.embeddings", NUMBER, optimizer.decay_embeddings, 0, 10, NULL, "weight decay of embeddings"),
    RESULT("optimizer.groups.norms", NUMBER, optimizer.decay_norms, 0, 10, NULL, "weight decay of norms"),
    RESULT("optimizer.groups.biases", NUMBER, optimizer.decay_biases, 0, 10, NULL, "weight decay of biases"),
    RESULT("optimizer.clip", NUMBER, optimizer.clip, 0, 1e9, NULL, "limit of the gradient's norm; 0: none"),
    RESULT("optimizer.schedule", CHOICE, optimizer.schedule, 0, 0, "constant|linear|cosine", "the rate after the warm-up"),
    RESULT("optimizer.warmup", COUNT, optimizer.warmup, 0, TRAIN_STEPS_LIMIT, NULL, "steps in which the rate rises"),
    RESULT("optimizer.floor", NUMBER, optimizer.floor, 0, 100, NULL, "the rate at the last step"),
    RESULT("precision", CHOICE, precision, 0, 0, "f32|bf16|f16", "of matrix products"),
    RESULT("loss_scale.policy", CHOICE, loss_scale.policy, 0, 0, "auto|none|fixed|dynamic", "auto: dynamic for f16, else none"),
    RESULT("loss_scale.start", NUMBER, loss_scale.start, 1, 0x1p60, NULL, "a power of two"),
    RESULT("loss_scale.least", NUMBER, loss_scale.least, 1, 0x1p60, NULL, "a power of two"),
    RESULT("loss_scale.growth_steps", COUNT, loss_scale.growth_steps, 1, 1e9, NULL, "good steps until it doubles"),
    RESULT("loss_scale.hysteresis", COUNT, loss_scale.hysteresis, 1, 1e6, NULL, "overflows until it halves"),
    LAYOUT_ROWS,
    ROW("layout.micro", COUNT, layout.micro, 1, TRAIN_SEQUENCES_LIMIT, "auto", "micro-batches of a replica and step"),
    ROW("layout.schedule", CHOICE, layout.schedule, 0, 0, "auto|gpipe|1f1b|interleaved|zero-bubble", "the order of passes"),
    ROW("layout.chunks", COUNT, layout.chunks, 1, 64, NULL, "interleaved: pieces of layers of a stage"),
    ROW("layout.zero", COUNT, layout.zero, 0, 1, NULL, "1: replicas share the optimizer's state"),
    ROW("layout.recompute", CHOICE, layout.recompute, 0, 0, "none|selective|full", "activations made again"),
    ROW("checkpoint.directory", STRING, checkpoint_directory, 0, 0, NULL, "where checkpoints go"),
    ROW("checkpoint.every", COUNT, checkpoint_every, 1, TRAIN_STEPS_LIMIT, NULL, "steps from one to the next"),
    ROW("checkpoint.keep", COUNT, checkpoint_keep, 1, 1e6, NULL, "how many stay"),
    ROW("checkpoint.resume", CHOICE, resume, 0, 0, "auto|none", "go on from the newest, or refuse if there is one"),
    ROW("validation.every", COUNT, validation_every, 1, TRAIN_STEPS_LIMIT, NULL, "steps from one validation to the next"),
    ROW("validation.sequences", COUNT, validation_sequences, 1, TRAIN_SEQUENCES_LIMIT, NULL, "of one validation"),
    ROW("sample.every", COUNT, sample_every, 1, TRAIN_STEPS_LIMIT, NULL, "steps from one sampled text to the next"),
    ROW("sample.prompt", STRING, sample_prompt, 0, 0, NULL, "what the text goes on from; empty: a line's end"),
    ROW("sample.tokens", COUNT, sample_tokens, 1, TRAIN_SAMPLE_LIMIT, NULL, "of a text"),
    ROW("sample.temperature", NUMBER, sample_temperature, 0, 100, NULL, "0: the most likely token"),
    ROW("trace.file", STRING, trace_file, 0, 0, NULL, "where it is written what ranks did and when (Trace Event Format)"),
    ROW("trace.first", COUNT, trace_first, 1, TRAIN_STEPS_LIMIT, NULL, "the first step that is traced"),
    ROW("trace.steps", COUNT, trace_steps, 1, TRAIN_TRACE_STEPS_LIMIT, NULL, "how many are"),
    RESULT("numerics", CHOICE, numerics, 0, 0, "exact|fast|auto", "the bit contract; auto: fast if a worker on a device takes part"),
    RESULT("update.rule", CHOICE, update, 0, 0, "sync", "how replicas agree"),
    {0},
};

const Option JOB_SERVE_TABLE[] = {
    KIND_ROWS,
    ROW("model.from", STRING, model.from, 0, 0, NULL, "a GGUF file or a Hugging Face directory"),
    LAYOUT_ROWS,
    RESULT("limits.context", COUNT, context, 1, 1 << 24, "auto", "positions of a sequence"),
    ROW("limits.streams", COUNT, streams, 1, 1024, "auto", "sequences at once"),
    ROW("limits.queue", COUNT, queue, 1, 1 << 20, NULL, "requests that may wait"),
    RESULT("kv.type", CHOICE, kv_type, 0, 0, "f16|bf16|f32|q8", "what keys and values are rounded to"),
    ROW("kv.memory", SIZE, kv_memory, 0, 0, "auto", "of each worker"),
    RESULT("numerics", CHOICE, numerics, 0, 0, "exact|fast|auto", "the bit contract; auto: fast on devices, exact on hosts' cores alone"),
    {0},
};
/* clang-format on */
