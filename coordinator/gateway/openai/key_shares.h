/* KeyShares: who has how many sequences open of a number that is bounded, so that one key does not
 * take every place of a queue. Loop thread.
 *
 * The rule. All together have at most `bound` open. A key has at most seven eighths, rounded up, of
 * what the other keys leave of it: one key's flood leaves an eighth of the queue to others, theirs
 * leave an eighth of that, and so on. Who has no key (NULL) is bound by the whole alone. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct KeyShares KeyShares;

KeyShares *key_shares_new(void);
void key_shares_free(KeyShares *shares); /* NULL-safe */

/* `n` more are open; false, and nothing is, where they would be too many. key: copied. */
bool key_shares_open(KeyShares *shares, const char *key, uint64_t n, uint64_t bound);
/* What was opened under this key is closed. */
void key_shares_close(KeyShares *shares, const char *key, uint64_t n);
uint64_t key_shares_count(const KeyShares *shares);                     /* all that are open */
uint64_t key_shares_count_of(const KeyShares *shares, const char *key); /* of this key */
