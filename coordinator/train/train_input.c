#include "coordinator/train/train_input.h"

#include "proto/base/error.h"
#include "proto/text/tokenizer_json.h"

#include <string.h>

#define FLAGS_SHIFT 30u
#define BYTE_VOCABULARY 257u

typedef struct Vocabulary {
    BpeVocab *trained;
    const TokenizerVocab *vocab; /* NULL: bytes */
    Tokenizer *tokenizer;
    ModelSource *from;
} Vocabulary;

static void vocabulary_clear(Vocabulary *v)
{
    tokenizer_free(v->tokenizer);
    bpe_vocab_free(v->trained);
    model_source_free(v->from);
}

static DocumentOptions document_options(const JobSpec *job, const Tokenizer *tokenizer)
{
    static const DocumentFormat formats[] = {DOCUMENT_TEXT, DOCUMENT_JSONL, DOCUMENT_TOKENS};
    return (DocumentOptions){.format = formats[job->data.format],
                             .tokenizer = tokenizer,
                             .separator = job->data.separator,
                             .text = job->data.text,
                             .prompt = job->data.prompt,
                             .response = job->data.response,
                             .stop_at_bad = job->data.bad_rows == JOB_ROWS_STOP};
}

static bool train_tokenizer(const JobSpec *job, Vocabulary *v, GError **error)
{
    const DocumentOptions options = document_options(job, NULL);
    g_autoptr(BpeTrainer) trainer = bpe_trainer_new(error);
    if (trainer == NULL || !documents_count_words(job->data.train, &options, trainer, error)) {
        return false;
    }
    v->trained = bpe_trainer_finish(trainer, (uint32_t)job->data.tokenizer_train, error);
    v->vocab = v->trained != NULL ? bpe_vocab_get(v->trained) : NULL;
    return v->trained != NULL;
}

static bool find_vocabulary(const JobSpec *job, TrainInput *in, Vocabulary *v, GError **error)
{
    if (in->source != NULL) {
        v->vocab = model_source_vocab(in->source);
    } else if (job->data.tokenizer_train > 0) {
        if (!train_tokenizer(job, v, error)) {
            return false;
        }
    } else if (job->data.tokenizer_from != NULL) {
        v->from = model_source_open(job->data.tokenizer_from, error);
        if (v->from == NULL) {
            return false;
        }
        v->vocab = model_source_vocab(v->from);
    }
    v->tokenizer = v->vocab != NULL ? tokenizer_from_vocab(v->vocab, error) : NULL;
    return v->vocab == NULL || v->tokenizer != NULL;
}

static bool load_documents(const JobSpec *job, TrainInput *in, const Vocabulary *v, GError **error)
{
    const DocumentOptions options = document_options(job, v->tokenizer);
    in->train = documents_load(job->data.train, &options, error);
    if (in->train == NULL) {
        return false;
    }
    in->report = documents_report(in->train);
    if (job->data.validation != NULL) {
        in->validation = documents_load(job->data.validation, &options, error);
        return in->validation != NULL;
    }
    return true;
}

static bool make_spec(const JobSpec *job, TrainInput *in, const Vocabulary *v, GError **error)
{
    if (in->source != NULL) {
        in->spec = (ModelSpec *)model_source_spec(in->source);
        return true;
    }
    const ModelConfig config = job_spec_model_config(
        job, v->vocab != NULL ? (uint32_t)v->vocab->n_tokens : BYTE_VOCABULARY);
    in->spec = model_spec_from_config(&config, error);
    return in->spec != NULL;
}

TrainInput *train_input_load(const JobSpec *job, GError **error)
{
    TrainInput *in = g_new0(TrainInput, 1);
    Vocabulary v = {0};
    if (job->model.from != NULL) {
        in->source = model_source_open(job->model.from, error);
    }
    const bool ok = (job->model.from == NULL || in->source != NULL) &&
                    find_vocabulary(job, in, &v, error) && load_documents(job, in, &v, error) &&
                    make_spec(job, in, &v, error);
    in->tokenizer_json = ok && v.vocab != NULL ? json_vocab_write(v.vocab, NULL) : NULL;
    vocabulary_clear(&v);
    if (!ok) {
        train_input_free(in);
        return NULL;
    }
    return in;
}

void train_input_free(TrainInput *in)
{
    if (in == NULL) {
        return;
    }
    documents_free(in->train);
    documents_free(in->validation);
    if (in->source == NULL || in->spec != model_source_spec(in->source)) {
        model_spec_free(in->spec);
    }
    model_source_free(in->source);
    g_free(in->tokenizer_json);
    g_free(in->report);
    g_free(in);
}

bool train_input_tokens(const TrainInput *in, bool validation, uint64_t first, uint64_t n,
                        uint32_t *out)
{
    const Documents *d = validation ? in->validation : in->train;
    if (d == NULL || first > d->n || n > d->n - first) {
        return false;
    }
    for (uint64_t i = 0; i < n; i++) {
        out[i] = d->ids[first + i] | (uint32_t)d->flags[first + i] << FLAGS_SHIFT;
    }
    return true;
}

bool train_input_weights(const TrainInput *in, const char *tensor, SliceRect rect, float *out,
                         GError **error)
{
    const ModelSpec *spec = in->spec;
    uint32_t i = 0;
    while (in->source != NULL && i < spec->n_tensors &&
           (!g_str_has_prefix(tensor, "weights/") ||
            strcmp(spec->tensors[i].name, tensor + strlen("weights/")) != 0)) {
        i++;
    }
    if (in->source == NULL || i == spec->n_tensors ||
        rect.col0 + (uint64_t)rect.n_cols > spec->tensors[i].columns) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "no such weights: %s", tensor);
        return false;
    }
    const uint32_t columns = spec->tensors[i].columns;
    g_autofree float *row = g_new(float, columns);
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        if (!model_source_read(in->source, i, rect.row0 + r, 1, row, error)) {
            return false;
        }
        memcpy(out + (size_t)r * rect.n_cols, row + rect.col0, rect.n_cols * sizeof *out);
    }
    return true;
}
