/* LogitsFile: the logits of every scored token of a text, kept so that another model (another
 * quantisation, another kernel) can be held against them (divergence.h).
 *
 * The format, version 1; numbers and floats are little-endian, hashes XXH3-128:
 *
 *     0   8 B  "weftlogi"
 *     8   u32  version, 1
 *    12   u32  vocab_size: floats of a row
 *    16   u32  window: tokens of a window; its second half is scored
 *    20   u32  n_windows
 *    24   u32  numerics: 0 exact, 1 fast
 *    28   u32  0
 *    32  16 B  hash of the text's bytes
 *    48  16 B  hash of the vocabulary's pieces
 *    64  16 B  hash of all windows' ids
 *    80  16 B  definition
 *    96 144 B  the model's name, NUL-padded
 *   240  16 B  hash of bytes 0 to 239
 *   256        n_rows rows of vocab_size floats, raw logits; n_rows = n_windows * (window -
 *              window / 2); row i of a window predicts its token window / 2 + i
 *              n_rows hashes, of each row's bytes
 *        16 B  hash of those hashes
 *
 * One thread. */
#pragma once

#include "proto/base/hash.h"
#include "proto/plan/plan.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

enum { LOGITS_MODEL_BYTES = 144 };

/* What a file is of. Two can be compared if all but definition, class and model are equal. */
typedef struct LogitsKind {
    uint32_t vocab_size, window, n_windows;
    NumericsClass numerics;
    Hash128 text, vocabulary, windows, definition;
    char model[LOGITS_MODEL_BYTES]; /* NUL-terminated */
} LogitsKind;

uint64_t logits_kind_rows(const LogitsKind *kind);
/* Bytes of the whole file. */
uint64_t logits_kind_bytes(const LogitsKind *kind);

typedef struct LogitsWriter LogitsWriter;
/* Writes beside `path` until logits_writer_finish() gives it that name, so that a file there is
 * whole or as it was. The space is reserved at once: IO with what is needed and what is free. */
LogitsWriter *logits_writer_new(const char *path, const LogitsKind *kind, GError **error);
/* Any order, each row once. */
bool logits_writer_put(LogitsWriter *writer, uint64_t row, const float *logits, GError **error);
bool logits_writer_finish(LogitsWriter *writer, GError **error);
/* What was not finished is removed. NULL-safe. */
void logits_writer_free(LogitsWriter *writer);

typedef struct LogitsReader LogitsReader;
/* Checks all but the rows. NOT_FOUND; INVALID: what is wrong with the file. */
LogitsReader *logits_reader_new(const char *path, GError **error);
void logits_reader_free(LogitsReader *reader); /* NULL-safe */
const LogitsKind *logits_reader_kind(const LogitsReader *reader);
/* Whether it is of this text in windows of so many tokens, which is known before anything is
 * computed; INVALID. */
bool logits_reader_fits_text(const LogitsReader *reader, const Hash128 *text, uint32_t window,
                             GError **error);
/* The same of vocabulary and ids. */
bool logits_reader_fits(const LogitsReader *reader, const LogitsKind *kind, GError **error);
/* vocab_size floats into `out`, checked against their hash. */
bool logits_reader_row(const LogitsReader *reader, uint64_t row, float *out, GError **error);
