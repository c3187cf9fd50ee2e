/* The bytes of a text file as training data. */
#pragma once

#include "worker/train/token_data.h"

static inline TokenData *text_data(const char *path, uint32_t length, GError **error)
{
    const DocumentOptions options = {.format = DOCUMENT_TEXT};
    g_autoptr(Documents) documents = documents_load(path, &options, error);
    return documents != NULL ? token_data_from(documents, length, TOKENS_STREAM, error) : NULL;
}
