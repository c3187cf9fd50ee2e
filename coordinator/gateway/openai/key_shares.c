#include "coordinator/gateway/openai/key_shares.h"

#include <glib.h>

struct KeyShares {
    GHashTable *by_key; /* name -> uint64_t *, never 0 */
    uint64_t n_open;
};

KeyShares *key_shares_new(void)
{
    KeyShares *shares = g_new0(KeyShares, 1);
    shares->by_key = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    return shares;
}

void key_shares_free(KeyShares *shares)
{
    if (shares != NULL) {
        g_hash_table_unref(shares->by_key);
        g_free(shares);
    }
}

uint64_t key_shares_count(const KeyShares *shares)
{
    return shares->n_open;
}

uint64_t key_shares_count_of(const KeyShares *shares, const char *key)
{
    const uint64_t *own = key != NULL ? g_hash_table_lookup(shares->by_key, key) : NULL;
    return own != NULL ? *own : 0;
}

static bool fits(const KeyShares *shares, const char *key, uint64_t n, uint64_t bound)
{
    const uint64_t own = key_shares_count_of(shares, key), others = shares->n_open - own;
    if (shares->n_open > bound || n > bound - shares->n_open) {
        return false;
    }
    const uint64_t left = bound - others;
    return key == NULL || own + n <= left - left / 8;
}

bool key_shares_open(KeyShares *shares, const char *key, uint64_t n, uint64_t bound)
{
    if (n > 0 && !fits(shares, key, n, bound)) {
        return false;
    }
    shares->n_open += n;
    if (key != NULL && n > 0) {
        uint64_t *own = g_new(uint64_t, 1);
        *own = key_shares_count_of(shares, key) + n;
        g_hash_table_replace(shares->by_key, g_strdup(key), own);
    }
    return true;
}

void key_shares_close(KeyShares *shares, const char *key, uint64_t n)
{
    shares->n_open -= n;
    uint64_t *own = key != NULL ? g_hash_table_lookup(shares->by_key, key) : NULL;
    if (own != NULL && (*own -= n) == 0) {
        g_hash_table_remove(shares->by_key, key);
    }
}
