/* Tokens: what lets somebody in once. 160 random bits; only their SHA-256 is kept. */
#pragma once

#include "coordinator/store/store.h"
#include "proto/base/loop.h"
#include "proto/base/random.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#define TOKEN_TTL_DEFAULT_US (INT64_C(3600) * 1000000)
#define TOKEN_TTL_LIMIT_US (INT64_C(30) * 24 * 3600 * 1000000)
#define TOKEN_USES_LIMIT 100000u

typedef struct TokenBook TokenBook;
/* changed(user): whether a token is valid may have changed. */
TokenBook *token_book_new(Loop *loop, Store *store, Random *random, LoopFn changed, void *user);
void token_book_free(TokenBook *book); /* NULL-safe */
/* A row found at start; expired ones are forgotten. */
bool token_book_restore(TokenBook *book, const StoreRow *row, GError **error);

typedef void (*TokenCreated)(const char *token, int64_t expires_us, const GError *error,
                             void *user);
/* role worker | admin | submit | probe; ttl 0 = 1 h; uses 0 = 1. INVALID for others; nothing is
 * reported then. */
bool token_book_create(TokenBook *book, const char *role, int64_t ttl_us, uint32_t uses,
                       TokenCreated done, void *user, GError **error);

typedef void (*TokenUsed)(const char *role, const GError *error, void *user);
/* Takes one use of a token, durably, before it reports the role. caller: worker | client, "" for
 * either. DENIED: unknown, expired or used up, or meant for the other kind of caller. */
void token_book_use(TokenBook *book, const char *token, const char *caller, TokenUsed done,
                    void *user);
/* Whether somebody may still join. */
bool token_book_any_valid(const TokenBook *book);
