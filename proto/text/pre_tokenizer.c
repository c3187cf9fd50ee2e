#define PCRE2_CODE_UNIT_WIDTH 8

#include "proto/text/pre_tokenizer.h"

#include "proto/base/error.h"

#include <pcre2.h>

enum { STAGES_MAX = 5, NAMES_MAX = 3 };

/* White space is spelled as the Unicode property: PCRE2's \s counts U+180E too, which no model
 * maker's engine does. */
#define S "\\p{White_Space}"
#define NOT_S "\\P{White_Space}"

#define GPT2                                                                                       \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" S "\\p{L}\\p{N}]+|" S "+(?!" NOT_S ")|" S "+"
/* Llama 3 and its relatives; DIGITS is how many stay together. */
#define LLAMA3(DIGITS)                                                                             \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" DIGITS "| ?[^" S                 \
    "\\p{L}\\p{N}]+[\\r\\n]*|" S "*[\\r\\n]+|" S "+(?!" NOT_S ")|" S "+"

typedef struct PreTokenizerRules {
    const char *names[NAMES_MAX];
    const char *stages[STAGES_MAX]; /* up to the first NULL */
    bool normalizes, ignores_merges, adds_bos;
} PreTokenizerRules;

static const PreTokenizerRules rules[] = {
    {.names = {"gpt-2"}, .stages = {GPT2}},
    {.names = {"smollm", "starcoder"}, .stages = {"\\p{N}", GPT2}},
    {.names = {"llama-bpe", "llama3", "llama-v3"},
     .stages = {LLAMA3("\\p{N}{1,3}")},
     .ignores_merges = true,
     .adds_bos = true},
    {.names = {"qwen2"}, .stages = {LLAMA3("\\p{N}")}, .normalizes = true},
    {.names = {"deepseek-coder"},
     .stages = {"[\\r\\n]", S "?\\p{L}+", S "?\\p{P}+",
                "[\\x{4E00}-\\x{9FA5}\\x{0800}-\\x{4E00}\\x{AC00}-\\x{D7FF}]+", "\\p{N}"}},
    {.names = {"deepseek-v3"},
     .stages = {"\\p{N}{1,3}", "[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{309F}\\x{30A0}-\\x{30FF}]+",
                "[!\"#$%&'()*+,\\-./"
                ":;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| "
                "?[\\p{P}\\p{S}]+[\\r\\n]*|" S "*[\\r\\n]+|" S "+(?!" NOT_S ")|" S "+"}},
    {.names = {"default"},
     .stages = {"[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}},
};

struct PreTokenizer {
    const PreTokenizerRules *rules;
    pcre2_code *codes[STAGES_MAX];
    unsigned n_stages;
};

struct PreTokenizerScratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

static char *pre_tokenizer_known_names(void)
{
    GString *names = g_string_new(NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(rules); i++) {
        for (unsigned k = 0; k < NAMES_MAX && rules[i].names[k] != NULL; k++) {
            g_string_append_printf(names, "%s%s", names->len > 0 ? ", " : "", rules[i].names[k]);
        }
    }
    return g_string_free(names, FALSE);
}

static const PreTokenizerRules *pre_tokenizer_find(const char *name)
{
    for (size_t i = 0; i < G_N_ELEMENTS(rules); i++) {
        for (unsigned k = 0; k < NAMES_MAX && rules[i].names[k] != NULL; k++) {
            if (g_str_equal(rules[i].names[k], name)) {
                return &rules[i];
            }
        }
    }
    return NULL;
}

PreTokenizer *pre_tokenizer_new(const char *name, GError **error)
{
    const PreTokenizerRules *found = pre_tokenizer_find(name);
    if (found == NULL) {
        g_autofree char *shown = g_utf8_make_valid(name, -1), *known = pre_tokenizer_known_names();
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "pre-tokenizer \"%.64s\" (tokenizer.ggml.pre) is not known; supported: %s",
                    shown, known);
        return NULL;
    }
    PreTokenizer *pre = g_new0(PreTokenizer, 1);
    pre->rules = found;
    for (; pre->n_stages < STAGES_MAX && found->stages[pre->n_stages] != NULL; pre->n_stages++) {
        int code = 0;
        PCRE2_SIZE at = 0;
        pcre2_code *compiled =
            pcre2_compile((PCRE2_SPTR)found->stages[pre->n_stages], PCRE2_ZERO_TERMINATED,
                          PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
        if (compiled == NULL) {
            PCRE2_UCHAR reason[128] = "";
            pcre2_get_error_message(code, reason, sizeof reason);
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "pattern %u of pre-tokenizer %s cannot be compiled at offset %zu: %s; "
                        "PCRE2 10.40 or newer with Unicode is needed",
                        pre->n_stages, found->names[0], (size_t)at, (const char *)reason);
            pre_tokenizer_free(pre);
            return NULL;
        }
        /* Without a JIT for this CPU the same pattern is interpreted. */
        (void)pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
        pre->codes[pre->n_stages] = compiled;
    }
    return pre;
}

void pre_tokenizer_free(PreTokenizer *pre)
{
    if (pre == NULL) {
        return;
    }
    for (unsigned i = 0; i < pre->n_stages; i++) {
        pcre2_code_free(pre->codes[i]);
    }
    g_free(pre);
}

bool pre_tokenizer_normalizes(const PreTokenizer *pre)
{
    return pre->rules->normalizes;
}

bool pre_tokenizer_ignores_merges(const PreTokenizer *pre)
{
    return pre->rules->ignores_merges;
}

bool pre_tokenizer_adds_bos(const PreTokenizer *pre)
{
    return pre->rules->adds_bos;
}

/* The patterns need a few hundred steps a match; the limits are far above and keep a surprise from
 * becoming a stall. */
enum {
    MATCH_LIMIT = 20000000,
    DEPTH_LIMIT = 1000000,
    HEAP_LIMIT_KIB = 65536,
    JIT_STACK_MIN = 32768,
    JIT_STACK_MAX = 1048576
};

PreTokenizerScratch *pre_tokenizer_scratch_new(GError **error)
{
    PreTokenizerScratch *scratch = g_new0(PreTokenizerScratch, 1);
    scratch->match = pcre2_match_data_create(1, NULL);
    scratch->context = pcre2_match_context_create(NULL);
    scratch->stack = pcre2_jit_stack_create(JIT_STACK_MIN, JIT_STACK_MAX, NULL);
    if (scratch->match == NULL || scratch->context == NULL) {
        pre_tokenizer_scratch_free(scratch);
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                    "no memory to match the pre-tokenizer's patterns");
        return NULL;
    }
    pcre2_set_match_limit(scratch->context, MATCH_LIMIT);
    pcre2_set_depth_limit(scratch->context, DEPTH_LIMIT);
    pcre2_set_heap_limit(scratch->context, HEAP_LIMIT_KIB);
    if (scratch->stack != NULL) {
        pcre2_jit_stack_assign(scratch->context, NULL, scratch->stack);
    }
    return scratch;
}

void pre_tokenizer_scratch_free(PreTokenizerScratch *scratch)
{
    if (scratch == NULL) {
        return;
    }
    pcre2_match_data_free(scratch->match);
    pcre2_match_context_free(scratch->context);
    pcre2_jit_stack_free(scratch->stack);
    g_free(scratch);
}

typedef struct Split {
    const PreTokenizer *pre;
    PreTokenizerScratch *scratch;
    PreTokenizerWord word;
    void *user;
} Split;

/* A piece is a subject of its own: a lookahead of stage k must not see past the cuts of stage k-1.
 * Recursion is n_stages deep. */
static bool split_stage(const Split *split, unsigned stage, const char *text, size_t length,
                        GError **error)
{
    if (length == 0) {
        return true;
    }
    if (stage == split->pre->n_stages) {
        return split->word(split->user, text, length, error);
    }
    for (size_t at = 0; at < length;) {
        int found = pcre2_match(split->pre->codes[stage], (PCRE2_SPTR)text, length, at,
                                PCRE2_NO_UTF_CHECK, split->scratch->match, split->scratch->context);
        if (found == PCRE2_ERROR_NOMATCH) {
            return split_stage(split, stage + 1, text + at, length - at, error);
        }
        if (found < 0) {
            PCRE2_UCHAR reason[128] = "";
            pcre2_get_error_message(found, reason, sizeof reason);
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "text of %zu bytes cannot be cut into words by pre-tokenizer %s: %s",
                        length, split->pre->rules->names[0], (const char *)reason);
            return false;
        }
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(split->scratch->match);
        size_t start = range[0],
               end = range[1]; /* copied: the next stage uses the same match block */
        g_assert(start >= at && end > start && end <= length);
        if (!split_stage(split, stage + 1, text + at, start - at, error) ||
            !split_stage(split, stage + 1, text + start, end - start, error)) {
            return false;
        }
        at = end;
    }
    return true;
}

bool pre_tokenizer_split(const PreTokenizer *pre, PreTokenizerScratch *scratch, const char *text,
                         size_t length, PreTokenizerWord word, void *user, GError **error)
{
    Split split = {.pre = pre, .scratch = scratch, .word = word, .user = user};
    return split_stage(&split, 0, text, length, error);
}
