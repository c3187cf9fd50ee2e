/* Problem: a token must let in exactly as often as it says, also when two ask at once and when the
 * coordinator dies between.
 *
 * 1. A use is taken in memory first (two callers cannot both have the last one), then durably, then
 * reported.
 * 2. If the durable write fails the caller is refused; the use stays taken in memory: never one use
 * too many.
 * 3. The clear token exists only in the creator's reply; rows and log lines have at most its hash.
 * 4. An expired token is forgotten by a timer, which also tells the owner (who may close the Join
 * listener). */
#include "coordinator/ca/tokens.h"

#include "coordinator/store/records.h"
#include "proto/base/error.h"

#include <string.h>

#define TOKEN_BYTES 20

struct TokenBook {
    Loop *loop;
    Store *store;
    Random *random;
    LoopFn changed;
    void *user;
    GHashTable *tokens; /* hash hex -> TokenRecord */
    LoopTimer *expiry;
};

typedef struct TokenCreation {
    TokenBook *book;
    char *token, *hash;
    TokenRecord record;
    TokenCreated done;
    void *user;
} TokenCreation;

typedef struct TokenUse {
    TokenUsed done;
    char *role;
    GError *error;
    void *user;
} TokenUse;

static void token_record_free(void *data)
{
    token_record_clear(data);
    g_free(data);
}

static char *token_hash(const char *token)
{
    return g_compute_checksum_for_string(G_CHECKSUM_SHA256, token, -1);
}

TokenBook *token_book_new(Loop *loop, Store *store, Random *random, LoopFn changed, void *user)
{
    TokenBook *book = g_new0(TokenBook, 1);
    book->loop = loop;
    book->store = store;
    book->random = random;
    book->changed = changed;
    book->user = user;
    book->tokens = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, token_record_free);
    return book;
}

void token_book_free(TokenBook *book)
{
    if (book == NULL) {
        return;
    }
    loop_timer_cancel(book->loop, book->expiry);
    g_hash_table_unref(book->tokens);
    g_free(book);
}

static void token_book_arm(TokenBook *book);

static void token_book_forget(TokenBook *book, const char *hash)
{
    store_put(book->store, STORE_TOKENS, hash, NULL, NULL, NULL);
}

static void token_book_on_expiry(void *user)
{
    TokenBook *book = user;
    book->expiry = NULL;
    int64_t now = loop_wall_us(book->loop);
    GHashTableIter iter;
    void *key, *value;
    g_hash_table_iter_init(&iter, book->tokens);
    while (g_hash_table_iter_next(&iter, &key, &value)) {
        if (((TokenRecord *)value)->expires_us <= now) {
            token_book_forget(book, key);
            g_hash_table_iter_remove(&iter);
        }
    }
    token_book_arm(book);
    book->changed(book->user);
}

/* One timer for the earliest expiry. */
static void token_book_arm(TokenBook *book)
{
    loop_timer_cancel(book->loop, book->expiry);
    book->expiry = NULL;
    int64_t first = INT64_MAX;
    GHashTableIter iter;
    void *value;
    g_hash_table_iter_init(&iter, book->tokens);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        first = MIN(first, ((TokenRecord *)value)->expires_us);
    }
    if (first != INT64_MAX) {
        int64_t delay = MAX(first - loop_wall_us(book->loop), 0) + 1000;
        book->expiry = loop_timer_start(book->loop, delay, token_book_on_expiry, book);
    }
}

bool token_book_restore(TokenBook *book, const StoreRow *row, GError **error)
{
    TokenRecord *record = g_new0(TokenRecord, 1);
    if (!token_record_read(row->key, row->value, record, error)) {
        g_free(record);
        return false;
    }
    g_hash_table_replace(book->tokens, g_strdup(row->key), record);
    token_book_arm(book);
    return true;
}

static void token_creation_done(const GError *error, void *user)
{
    TokenCreation *c = user;
    if (error == NULL) {
        TokenRecord *record = g_memdup2(&c->record, sizeof c->record);
        c->record.role = NULL;
        g_hash_table_replace(c->book->tokens, g_strdup(c->hash), record);
        token_book_arm(c->book);
        c->book->changed(c->book->user);
        c->done(c->token, record->expires_us, NULL, c->user);
    } else {
        c->done(NULL, 0, error, c->user);
    }
    memset(c->token, 0, strlen(c->token));
    g_free(c->token);
    g_free(c->hash);
    token_record_clear(&c->record);
    g_free(c);
}

bool token_book_create(TokenBook *book, const char *role, int64_t ttl_us, uint32_t uses,
                       TokenCreated done, void *user, GError **error)
{
    static const char *const roles[] = {"worker", "admin", "submit", "probe", NULL};
    if (!g_strv_contains(roles, role)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "role %s is unknown: use worker, admin, submit or probe", role);
        return false;
    }
    if (ttl_us < 0 || ttl_us > TOKEN_TTL_LIMIT_US || uses > TOKEN_USES_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "token for %" G_GINT64_FORMAT " s and %u uses: at most 30 days and %u uses",
                    ttl_us / 1000000, uses, TOKEN_USES_LIMIT);
        return false;
    }
    uint8_t secret[TOKEN_BYTES];
    random_fill(book->random, secret, sizeof secret);
    GString *token = g_string_new("weft-");
    for (size_t i = 0; i < sizeof secret; i++) {
        g_string_append_printf(token, "%02x", secret[i]);
    }
    TokenCreation *c = g_new0(TokenCreation, 1);
    c->book = book;
    c->token = g_string_free(token, FALSE);
    c->hash = token_hash(c->token);
    c->record.role = g_strdup(role);
    c->record.expires_us = loop_wall_us(book->loop) + (ttl_us > 0 ? ttl_us : TOKEN_TTL_DEFAULT_US);
    c->record.uses_left = uses > 0 ? uses : 1;
    c->done = done;
    c->user = user;
    store_put(book->store, STORE_TOKENS, c->hash, token_record_pack(&c->record),
              token_creation_done, c);
    return true;
}

static void token_use_report(TokenUse *use, const GError *error)
{
    use->done(error == NULL ? use->role : NULL, error, use->user);
    g_free(use->role);
    g_clear_error(&use->error);
    g_free(use);
}

static void token_use_written(const GError *error, void *user)
{
    token_use_report(user, error);
}

static void token_use_refused(void *user)
{
    TokenUse *use = user;
    token_use_report(use, use->error);
}

static GError *token_refusal(const TokenRecord *record, int64_t now_us)
{
    const char *why = record == NULL ? "is not known (wrong, used up or long expired)"
                      : record->expires_us <= now_us ? "has expired"
                                                     : "is used up";
    return g_error_new(WEFT_ERROR, WEFT_ERROR_DENIED,
                       "join token %s: ask an administrator for a new one (weft token create)",
                       why);
}

/* NULL if a caller of this kind may have the token's role. */
static GError *caller_refusal(const TokenRecord *record, const char *caller)
{
    bool is_worker = strcmp(record->role, "worker") == 0;
    if (strcmp(caller, "worker") == 0 && !is_worker) {
        return g_error_new(WEFT_ERROR, WEFT_ERROR_DENIED,
                           "the token is for role %s, not worker: make one with `weft token create "
                           "--role worker`",
                           record->role);
    }
    if (strcmp(caller, "client") == 0 && is_worker) {
        return g_error_new(WEFT_ERROR, WEFT_ERROR_DENIED,
                           "the token is for role worker, not for a person: make one with `weft "
                           "token create --role admin` (or submit, probe)");
    }
    return NULL;
}

void token_book_use(TokenBook *book, const char *token, const char *caller, TokenUsed done,
                    void *user)
{
    g_autofree char *hash = token_hash(token);
    TokenRecord *record = g_hash_table_lookup(book->tokens, hash);
    TokenUse *use = g_new0(TokenUse, 1);
    use->done = done;
    use->user = user;
    if (record == NULL || record->uses_left == 0 ||
        record->expires_us <= loop_wall_us(book->loop)) {
        use->error = token_refusal(record, loop_wall_us(book->loop));
    } else {
        use->error = caller_refusal(record, caller);
    }
    if (use->error != NULL) {
        loop_post(book->loop, token_use_refused, use);
        return;
    }
    use->role = g_strdup(record->role);
    record->uses_left--;
    /* A used up token stays as a row until it expires, so that its holder is told why it is
     * refused. */
    store_put(book->store, STORE_TOKENS, hash, token_record_pack(record), token_use_written, use);
    book->changed(book->user);
}

bool token_book_any_valid(const TokenBook *book)
{
    int64_t now = loop_wall_us(book->loop);
    GHashTableIter iter;
    void *value;
    g_hash_table_iter_init(&iter, book->tokens);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        const TokenRecord *record = value;
        if (record->uses_left > 0 && record->expires_us > now) {
            return true;
        }
    }
    return false;
}
