/* TokenTable: which token has these bytes. Open addressing over slices of one blob; of equal texts
 * the lowest id counts. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes offset..offset+length of a blob. */
typedef struct TextSlice {
    uint32_t offset, length;
} TextSlice;

typedef struct TokenTable {
    const char *blob;        /* borrowed, outlives the table */
    const TextSlice *slices; /* borrowed; index = token id */
    uint32_t *slots;         /* id + 1, 0 = empty; mask + 1 of them */
    uint32_t mask;
    uint32_t longest; /* bytes of the longest entry */
} TokenTable;

/* Room for n entries; MEMORY if it cannot be had. */
bool token_table_init(TokenTable *table, const char *blob, const TextSlice *slices, uint32_t n,
                      GError **error);
void token_table_clear(TokenTable *table);
/* Enters a token; at most as many as init was told. Empty texts are not entered. */
void token_table_add(TokenTable *table, uint32_t id);
/* The id, -1 if there is none. */
int64_t token_table_find(const TokenTable *table, const char *text, size_t length);
