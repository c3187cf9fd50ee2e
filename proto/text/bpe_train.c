/* Each distinct word is kept once, as a list of ids, with how often it is there. A pair of
 * neighbours knows its frequency and the words that may hold it; a heap has the pairs by frequency.
 * A frequency only falls once the newer id of the pair exists, so an entry of the heap that is out
 * of date is too high: it goes back with what is true now. Only the words of the pair that is
 * joined are walked. */
#include "proto/text/bpe_train.h"

#include "proto/base/error.h"
#include "proto/text/byte_alphabet.h"
#include "proto/text/pre_tokenizer.h"
#include "proto/text/utf8.h"

#include <string.h>

#define BYTES 256u
#define SIZE_LIMIT (1u << 20)
#define LEAST_FREQUENCY 2
/* Longer words are counted in pieces: base64 and the like would only cost time. */
#define WORD_LIMIT 256u

typedef struct Word {
    uint32_t *ids; /* owned */
    uint32_t n;
    int64_t frequency;
} Word;

typedef struct Pair {
    uint64_t key; /* left << 32 | right */
    int64_t frequency;
    GArray *words; /* uint32_t: where it has been; some more than once, some no more */
} Pair;

typedef struct Candidate {
    int64_t frequency;
    uint64_t key;
} Candidate;

struct BpeTrainer {
    PreTokenizer *pre;
    PreTokenizerScratch *scratch;
    GHashTable *counts;  /* GBytes -> int64_t * */
    uint32_t ids[BYTES]; /* of each byte */
    GArray *words;       /* Word */
    GHashTable *pairs;   /* &Pair.key -> Pair */
    GArray *heap;        /* Candidate */
};

struct BpeVocab {
    TokenizerVocab vocab;
    GStringChunk *texts;
    VocabText *tokens;
    GArray *merges; /* VocabText */
    int64_t *kinds;
};

/* ---- words ---- */

static void word_clear(gpointer word)
{
    g_free(((Word *)word)->ids);
}

static void pair_free(gpointer pair)
{
    g_array_unref(((Pair *)pair)->words);
    g_free(pair);
}

/* GPT-2's order: bytes by the character that stands for them. */
static void number_bytes(uint32_t ids[BYTES])
{
    uint32_t id = 0;
    for (uint32_t code = 0; id < BYTES; code++) {
        const int byte = byte_alphabet_byte(code);
        if (byte >= 0) {
            ids[byte] = id++;
        }
    }
}

BpeTrainer *bpe_trainer_new(GError **error)
{
    g_autoptr(BpeTrainer) t = g_new0(BpeTrainer, 1);
    t->counts =
        g_hash_table_new_full(g_bytes_hash, g_bytes_equal, (GDestroyNotify)g_bytes_unref, g_free);
    t->words = g_array_new(FALSE, FALSE, sizeof(Word));
    g_array_set_clear_func(t->words, word_clear);
    t->pairs = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL, pair_free);
    t->heap = g_array_new(FALSE, FALSE, sizeof(Candidate));
    number_bytes(t->ids);
    t->pre = pre_tokenizer_new("gpt-2", error);
    t->scratch = t->pre != NULL ? pre_tokenizer_scratch_new(error) : NULL;
    return t->scratch != NULL ? g_steal_pointer(&t) : NULL;
}

void bpe_trainer_free(BpeTrainer *t)
{
    if (t == NULL) {
        return;
    }
    g_hash_table_unref(t->counts);
    g_array_unref(t->words);
    g_hash_table_unref(t->pairs);
    g_array_unref(t->heap);
    if (t->scratch != NULL) {
        pre_tokenizer_scratch_free(t->scratch);
    }
    pre_tokenizer_free(t->pre);
    g_free(t);
}

static bool count_word(void *user, const char *word, size_t length, GError **error)
{
    BpeTrainer *t = user;
    for (size_t at = 0; at < length; at += WORD_LIMIT) {
        GBytes *bytes = g_bytes_new(word + at, MIN(length - at, WORD_LIMIT));
        int64_t *count = g_hash_table_lookup(t->counts, bytes);
        if (count != NULL) {
            g_bytes_unref(bytes);
        } else {
            count = g_new0(int64_t, 1);
            g_hash_table_insert(t->counts, bytes, count);
        }
        ++*count;
    }
    return true;
}

/* Bytes that are no UTF-8 are words of their own (README, invariant 1), without any pair. */
bool bpe_trainer_add(BpeTrainer *t, const char *text, size_t length, GError **error)
{
    for (size_t at = 0; at < length;) {
        const size_t end = at + utf8_valid_run(text + at, length - at);
        if (end > at &&
            !pre_tokenizer_split(t->pre, t->scratch, text + at, end - at, count_word, t, error)) {
            return false;
        }
        at = end + 1;
    }
    return true;
}

/* ---- heap ---- */

/* Most frequent first, then the lowest pair. */
static bool is_before(const Candidate *a, const Candidate *b)
{
    return a->frequency != b->frequency ? a->frequency > b->frequency : a->key < b->key;
}

static void heap_push(GArray *heap, Candidate c)
{
    g_array_append_val(heap, c);
    Candidate *all = (Candidate *)(void *)heap->data;
    size_t at = heap->len - 1;
    for (size_t above; at > 0 && is_before(&c, &all[above = (at - 1) / 2]); at = above) {
        all[at] = all[above];
    }
    all[at] = c;
}

static Candidate heap_pop(GArray *heap)
{
    Candidate *all = (Candidate *)(void *)heap->data;
    const Candidate top = all[0], last = all[heap->len - 1];
    const size_t n = heap->len - 1;
    size_t at = 0;
    g_array_set_size(heap, (guint)n);
    for (size_t below; (below = 2 * at + 1) < n; at = below) {
        below += below + 1 < n && is_before(&all[below + 1], &all[below]);
        if (!is_before(&all[below], &last)) {
            break;
        }
        all[at] = all[below];
    }
    if (n > 0) {
        all[at] = last;
    }
    return top;
}

/* ---- pairs ---- */

static Pair *pair_of(BpeTrainer *t, uint32_t left, uint32_t right)
{
    const uint64_t key = (uint64_t)left << 32 | right;
    Pair *pair = g_hash_table_lookup(t->pairs, &key);
    if (pair == NULL) {
        pair = g_new0(Pair, 1);
        pair->key = key;
        pair->words = g_array_new(FALSE, FALSE, sizeof(uint32_t));
        g_hash_table_insert(t->pairs, &pair->key, pair);
    }
    return pair;
}

static void add_pair(BpeTrainer *t, uint32_t word, uint32_t left, uint32_t right)
{
    Pair *pair = pair_of(t, left, right);
    pair->frequency += g_array_index(t->words, Word, word).frequency;
    if (pair->words->len == 0 ||
        g_array_index(pair->words, uint32_t, pair->words->len - 1) != word) {
        g_array_append_val(pair->words, word);
    }
}

static void drop_pair(BpeTrainer *t, uint32_t word, uint32_t left, uint32_t right)
{
    pair_of(t, left, right)->frequency -= g_array_index(t->words, Word, word).frequency;
}

/* A word as its bytes, and its pairs. */
static void take_words(BpeTrainer *t)
{
    GHashTableIter iter;
    gpointer bytes, count;
    g_hash_table_iter_init(&iter, t->counts);
    while (g_hash_table_iter_next(&iter, &bytes, &count)) {
        gsize n;
        const uint8_t *at = g_bytes_get_data(bytes, &n);
        Word word = {g_new(uint32_t, n), (uint32_t)n, *(int64_t *)count};
        for (gsize i = 0; i < n; i++) {
            word.ids[i] = t->ids[at[i]];
        }
        g_array_append_val(t->words, word);
        for (gsize i = 0; i + 1 < n; i++) {
            add_pair(t, t->words->len - 1, word.ids[i], word.ids[i + 1]);
        }
    }
    g_hash_table_remove_all(t->counts);
    gpointer pair;
    g_hash_table_iter_init(&iter, t->pairs);
    while (g_hash_table_iter_next(&iter, NULL, &pair)) {
        heap_push(t->heap, (Candidate){((Pair *)pair)->frequency, ((Pair *)pair)->key});
    }
}

/* Joins left, right to `id` in a word, leftmost first. */
static void join_in_word(BpeTrainer *t, uint32_t index, uint32_t left, uint32_t right, uint32_t id,
                         GHashTable *fresh)
{
    Word *word = &g_array_index(t->words, Word, index);
    uint32_t n = 0;
    for (uint32_t i = 0; i < word->n; i++) {
        if (i + 1 >= word->n || word->ids[i] != left || word->ids[i + 1] != right) {
            word->ids[n++] = word->ids[i];
            continue;
        }
        /* What stood at n - 1 is the left neighbour as it is now. */
        if (n > 0) {
            drop_pair(t, index, word->ids[n - 1], left);
            add_pair(t, index, word->ids[n - 1], id);
            g_hash_table_add(fresh, pair_of(t, word->ids[n - 1], id));
        }
        if (i + 2 < word->n) {
            drop_pair(t, index, right, word->ids[i + 2]);
            add_pair(t, index, id, word->ids[i + 2]);
            g_hash_table_add(fresh, pair_of(t, id, word->ids[i + 2]));
        }
        word->ids[n++] = id;
        i++;
    }
    word->n = n;
}

/* The most frequent pair; NULL if none is frequent enough. */
static const Pair *best_pair(BpeTrainer *t)
{
    while (t->heap->len > 0) {
        const Candidate top = heap_pop(t->heap);
        const Pair *pair = g_hash_table_lookup(t->pairs, &top.key);
        if (pair == NULL) {
            continue; /* joined already: it was there twice */
        }
        if (pair->frequency == top.frequency) {
            return top.frequency >= LEAST_FREQUENCY ? pair : NULL;
        }
        heap_push(t->heap, (Candidate){pair->frequency, top.key});
    }
    return NULL;
}

/* Everywhere. The pair is gone afterwards. */
static void join(BpeTrainer *t, uint64_t key, uint32_t id)
{
    Pair *pair = g_hash_table_lookup(t->pairs, &key);
    g_autoptr(GHashTable) fresh = g_hash_table_new(NULL, NULL);
    g_autoptr(GArray) words = g_array_ref(pair->words);
    for (guint i = 0; i < words->len; i++) {
        join_in_word(t, g_array_index(words, uint32_t, i), (uint32_t)(key >> 32), (uint32_t)key, id,
                     fresh);
    }
    g_hash_table_remove(fresh, pair);
    g_hash_table_remove(t->pairs, &key);
    GHashTableIter iter;
    gpointer each;
    g_hash_table_iter_init(&iter, fresh);
    while (g_hash_table_iter_next(&iter, &each, NULL)) {
        heap_push(t->heap, (Candidate){((Pair *)each)->frequency, ((Pair *)each)->key});
    }
}

/* ---- vocabulary ---- */

static VocabText keep_text(BpeVocab *v, const char *text, size_t length)
{
    return (VocabText){g_string_chunk_insert_len(v->texts, text, (gssize)length), length};
}

static void add_bytes(BpeVocab *v, const BpeTrainer *t)
{
    for (unsigned byte = 0; byte < BYTES; byte++) {
        char text[4];
        const size_t n = (size_t)utf8_encode(byte_alphabet_char((uint8_t)byte), text);
        v->tokens[t->ids[byte]] = keep_text(v, text, n);
    }
}

/* The id of a merge's result: two merges may spell one token. */
static uint32_t add_merge(BpeVocab *v, GHashTable *by_text, uint32_t next_id, uint64_t key)
{
    const VocabText *left = &v->tokens[key >> 32], *right = &v->tokens[(uint32_t)key];
    g_autoptr(GString) text = g_string_new_len(left->text, (gssize)left->length);
    g_string_append_len(text, right->text, (gssize)right->length);
    const gpointer known = g_hash_table_lookup(by_text, text->str);
    const uint32_t id = known != NULL ? GPOINTER_TO_UINT(known) : next_id;
    if (known == NULL) {
        v->tokens[id] = keep_text(v, text->str, text->len);
        g_hash_table_insert(by_text, (char *)v->tokens[id].text, GUINT_TO_POINTER(id));
    }
    g_string_insert_c(text, (gssize)left->length, ' ');
    const VocabText merge = keep_text(v, text->str, text->len);
    g_array_append_val(v->merges, merge);
    return id;
}

BpeVocab *bpe_trainer_finish(BpeTrainer *t, uint32_t size, GError **error)
{
    if (size <= BYTES || size > SIZE_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "a tokenizer of %u ids cannot be trained; use %u to %u", size, BYTES + 1,
                    SIZE_LIMIT);
        return NULL;
    }
    BpeVocab *v = g_new0(BpeVocab, 1);
    v->texts = g_string_chunk_new(4096);
    v->tokens = g_new0(VocabText, size);
    v->merges = g_array_new(FALSE, FALSE, sizeof(VocabText));
    v->kinds = g_new0(int64_t, size);
    take_words(t);
    add_bytes(v, t);
    /* Merges of more than one character: the bytes need no entry. */
    g_autoptr(GHashTable) by_text = g_hash_table_new(g_str_hash, g_str_equal);
    uint32_t n = BYTES;
    for (const Pair *best; n + 1 < size && (best = best_pair(t)) != NULL;) {
        const uint64_t key = best->key;
        const uint32_t id = add_merge(v, by_text, n, key);
        n += id == n;
        join(t, key, id);
    }
    for (uint32_t i = 0; i < n; i++) {
        v->kinds[i] = TOKEN_NORMAL;
    }
    v->tokens[n] = keep_text(v, BPE_END_OF_TEXT, strlen(BPE_END_OF_TEXT));
    v->kinds[n] = TOKEN_CONTROL;
    v->vocab = (TokenizerVocab){.model = "gpt2",
                                .pre = "gpt-2",
                                .n_tokens = n + 1,
                                .n_merges = v->merges->len,
                                .tokens = v->tokens,
                                .kinds = v->kinds,
                                .merges = (const VocabText *)(void *)v->merges->data,
                                .bos = n,
                                .eos = n,
                                .eot = -1,
                                .eom = -1,
                                .unk = -1,
                                .adds_bos = VOCAB_NO,
                                .space_prefix = SPACE_PREFIX_NEVER};
    return v;
}

const TokenizerVocab *bpe_vocab_get(const BpeVocab *v)
{
    return &v->vocab;
}

void bpe_vocab_free(BpeVocab *v)
{
    if (v != NULL) {
        g_string_chunk_free(v->texts);
        g_free(v->tokens);
        g_array_unref(v->merges);
        g_free(v->kinds);
        g_free(v);
    }
}
