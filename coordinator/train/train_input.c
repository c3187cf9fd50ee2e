#include "coordinator/train/train_input.h"

#include "proto/base/error.h"
#include "proto/plan/train_limits.h"
#include "proto/text/tokenizer_json.h"

#include <string.h>

#define BYTE_VOCABULARY 257u

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

/* NULL + error. */
static const TokenizerVocab *train_tokenizer(const JobSpec *job, TrainInput *in, GError **error)
{
    const DocumentOptions options = document_options(job, NULL);
    g_autoptr(BpeTrainer) trainer = bpe_trainer_new(error);
    if (trainer == NULL || !documents_count_words(job->data.train, &options, trainer, error)) {
        return NULL;
    }
    in->trained = bpe_trainer_finish(trainer, (uint32_t)job->data.tokenizer_train, error);
    return in->trained != NULL ? bpe_vocab_get(in->trained) : NULL;
}

/* *vocab NULL: bytes. */
static bool find_vocabulary(const JobSpec *job, TrainInput *in, const TokenizerVocab **vocab,
                            GError **error)
{
    *vocab = NULL;
    if (in->source != NULL) {
        *vocab = model_source_vocab(in->source);
    } else if (job->data.tokenizer_train > 0) {
        *vocab = train_tokenizer(job, in, error);
        if (*vocab == NULL) {
            return false;
        }
    } else if (job->data.tokenizer_from != NULL) {
        in->vocabulary = model_source_open(job->data.tokenizer_from, error);
        if (in->vocabulary == NULL) {
            return false;
        }
        *vocab = model_source_vocab(in->vocabulary);
    }
    in->tokenizer = *vocab != NULL ? tokenizer_from_vocab(*vocab, error) : NULL;
    return *vocab == NULL || in->tokenizer != NULL;
}

/* The ids of sample.prompt; of a line's end if it is empty. */
static bool encode_prompt(const JobSpec *job, TrainInput *in, GError **error)
{
    const char *text = job->sample_prompt[0] != '\0' ? job->sample_prompt : "\n";
    if (in->tokenizer != NULL) {
        in->prompt = tokenizer_encode(in->tokenizer, text, strlen(text), true, false, error);
    } else {
        in->prompt = g_array_new(FALSE, FALSE, sizeof(uint32_t));
        for (const char *c = text; *c != '\0'; c++) {
            const uint32_t id = (uint8_t)*c;
            g_array_append_val(in->prompt, id);
        }
    }
    return in->prompt != NULL;
}

char *train_input_text(const TrainInput *in, const uint32_t *ids, size_t n)
{
    g_autoptr(GString) text = g_string_new(NULL);
    if (in->tokenizer == NULL) {
        for (size_t i = 0; i < n; i++) {
            g_string_append_c(text, ids[i] > 0 && ids[i] < 256 ? (char)ids[i] : ' ');
        }
        return g_utf8_make_valid(text->str, (gssize)text->len);
    }
    Detokenizer *d = detokenizer_new(in->tokenizer, true);
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < tokenizer_size(in->tokenizer)) { /* a model may have ids to spare */
            detokenizer_push(d, ids[i], text);
        }
    }
    detokenizer_finish(d, text);
    detokenizer_free(d);
    return g_utf8_make_valid(text->str, (gssize)text->len);
}

static bool load_documents(const JobSpec *job, TrainInput *in, GError **error)
{
    const DocumentOptions options = document_options(job, in->tokenizer);
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

static bool make_spec(const JobSpec *job, TrainInput *in, const TokenizerVocab *vocab,
                      GError **error)
{
    if (in->source != NULL) {
        in->spec = (ModelSpec *)model_source_spec(in->source);
        return true;
    }
    const ModelConfig config =
        job_spec_model_config(job, vocab != NULL ? (uint32_t)vocab->n_tokens : BYTE_VOCABULARY);
    in->spec = model_spec_from_config(&config, error);
    return in->spec != NULL;
}

TrainInput *train_input_load(const JobSpec *job, GError **error)
{
    TrainInput *in = g_new0(TrainInput, 1);
    const TokenizerVocab *vocab = NULL;
    if (job->model.from != NULL) {
        in->source = model_source_open(job->model.from, error);
    }
    const bool ok = (job->model.from == NULL || in->source != NULL) &&
                    find_vocabulary(job, in, &vocab, error) && load_documents(job, in, error) &&
                    make_spec(job, in, vocab, error) && encode_prompt(job, in, error);
    in->tokenizer_json = ok && vocab != NULL ? json_vocab_write(vocab, NULL) : NULL;
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
    tokenizer_free(in->tokenizer);
    bpe_vocab_free(in->trained);
    model_source_free(in->vocabulary);
    model_source_free(in->source);
    if (in->prompt != NULL) {
        g_array_unref(in->prompt);
    }
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
        out[i] = d->ids[first + i] | (uint32_t)d->flags[first + i] << TRAIN_ID_BITS;
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
