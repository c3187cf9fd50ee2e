#include "proto/text/token_table.h"

#include "proto/base/checked.h"

#include <string.h>
#include <xxhash.h>

bool token_table_init(TokenTable *table, const char *blob, const TextSlice *slices, uint32_t n,
                      GError **error)
{
    uint32_t size = 16;
    while (size / 2 < n) {
        size *= 2;
    }
    *table = (TokenTable){.blob = blob, .slices = slices, .mask = size - 1};
    table->slots = weft_alloc(size, sizeof *table->slots, "the token table", error);
    return table->slots != NULL;
}

void token_table_clear(TokenTable *table)
{
    weft_free(table->slots);
    *table = (TokenTable){0};
}

/* The slot that holds this text or the empty one where it belongs. */
static uint32_t *token_table_slot(const TokenTable *table, const char *text, size_t length)
{
    uint32_t at = (uint32_t)XXH3_64bits(text, length) & table->mask;
    while (table->slots[at] != 0) {
        TextSlice slice = table->slices[table->slots[at] - 1];
        if (slice.length == length && memcmp(table->blob + slice.offset, text, length) == 0) {
            break;
        }
        at = (at + 1) & table->mask;
    }
    return &table->slots[at];
}

void token_table_add(TokenTable *table, uint32_t id)
{
    TextSlice slice = table->slices[id];
    if (slice.length == 0) {
        return;
    }
    uint32_t *slot = token_table_slot(table, table->blob + slice.offset, slice.length);
    if (*slot == 0) {
        *slot = id + 1;
        table->longest = MAX(table->longest, slice.length);
    }
}

int64_t token_table_find(const TokenTable *table, const char *text, size_t length)
{
    if (length == 0 || length > table->longest) {
        return -1;
    }
    return (int64_t)*token_table_slot(table, text, length) - 1;
}
