/* Documents: the files of a job's data as token ids, document after document. Three formats: text
 * (a file is one document, or several with a separator between them), jsonl (a row is a document:
 * one member, or a prompt that is read without a loss and a response) and tokens (ids as they are).
 * Rows that cannot be read are counted and named; they are left out or end the reading, as asked.
 * A function of the files and the tokenizer alone. */
#pragma once

#include "proto/text/bpe_train.h"
#include "proto/text/tokenizer.h"


typedef enum DocumentFormat { DOCUMENT_TEXT, DOCUMENT_JSONL, DOCUMENT_TOKENS } DocumentFormat;

typedef struct DocumentOptions {
    DocumentFormat format;
    const Tokenizer *tokenizer; /* borrowed; NULL: a byte is an id. tokens: what says where
                                   documents end, or NULL */
    const char *separator;      /* text; NULL or "": the file is one document */
    const char *text, *prompt, *response; /* jsonl: names of members */
    bool stop_at_bad;
} DocumentOptions;

enum { DOCUMENT_LOSS = 1, DOCUMENT_BEGIN = 2 };

typedef struct Documents {
    uint32_t *ids;
    uint8_t *flags; /* of each id: LOSS: it is learnt; BEGIN: a document begins */
    size_t n, capacity;
    uint64_t rows, bad_rows;
    GPtrArray *complaints; /* char *, of the first bad rows, with line numbers: at most 16 */
} Documents;

/* NOT_FOUND; INVALID: a bad row where they end the reading, or no token at all. Documents end with
 * the tokenizer's end of text where rows or separators part them. Returned. */
Documents *documents_load(const char *path, const DocumentOptions *options, GError **error);
void documents_free(Documents *d); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Documents, documents_free)
/* "2 of 10 rows were left out: line 3: ...; line 7: ..."; NULL if none was. Returned. */
char *documents_report(const Documents *d);

/* The texts of a file go to the training of a tokenizer; text and jsonl. Bad rows are left out. */
bool documents_count_words(const char *path, const DocumentOptions *options, BpeTrainer *trainer,
                           GError **error);

/* Where a long text may be cut so that its tokens stay those of the whole: behind a line's end with
 * no space beside it, at most `limit` bytes on. Where there is none, at a character. */
size_t documents_cut(const char *text, size_t length, size_t limit);
