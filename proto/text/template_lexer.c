#include "proto/text/template_lexer.h"

#include "proto/base/error.h"
#include "proto/text/utf8.h"

#include <string.h>

typedef struct Lexer {
    ChatTemplate *owner;
    const char *source; /* newlines are \n */
    size_t length, at;
    unsigned line;
    bool line_starting; /* what was read last ended with a newline that no text shows */
    GArray *tokens;
    GError **error;
} Lexer;

static bool lexer_fail(Lexer *lexer, const char *what)
{
    g_propagate_error(lexer->error, template_error(lexer->line, g_strdup(what)));
    return false;
}

static void lexer_push(Lexer *lexer, Token token)
{
    token.line = lexer->line;
    g_array_append_val(lexer->tokens, token);
}

static void lexer_advance(Lexer *lexer, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        lexer->line += lexer->source[lexer->at + i] == '\n';
    }
    lexer->at += n;
    lexer->line_starting = n > 0 && lexer->source[lexer->at - 1] == '\n';
}

static bool lexer_sees(const Lexer *lexer, const char *literal)
{
    size_t n = strlen(literal);
    return lexer->length - lexer->at >= n && memcmp(lexer->source + lexer->at, literal, n) == 0;
}

static size_t lexer_space(const Lexer *lexer, size_t from)
{
    size_t at = from;
    uint32_t code;
    while (at < lexer->length) {
        size_t step = text_step((Text){lexer->source + at, lexer->length - at}, &code);
        if (!utf8_is_space(code)) {
            break;
        }
        at += step;
    }
    return at - from;
}

/* After a tag's end: '-' eats all white space, and without '+' trim_blocks eats one newline. */
static void lexer_end_tag(Lexer *lexer, char sign, bool trims)
{
    lexer_advance(lexer, sign == 0 ? 2 : 3);
    size_t eaten = 0;
    if (sign == '-') {
        eaten = lexer_space(lexer, lexer->at);
    } else if (sign == 0 && trims && lexer->at < lexer->length &&
               lexer->source[lexer->at] == '\n') {
        eaten = 1;
    }
    if (eaten > 0) {
        lexer_advance(lexer, eaten);
    }
}

/* Whether a tag ends here ("%}", "-%}", "+%}"); *sign_out is the sign or 0. */
static bool lexer_at_end(const Lexer *lexer, const char *end, bool plus, char *sign_out)
{
    const char *at = lexer->source + lexer->at;
    size_t left = lexer->length - lexer->at;
    if (left >= 2 && memcmp(at, end, 2) == 0) {
        *sign_out = 0;
        return true;
    }
    if (left >= 3 && (at[0] == '-' || (plus && at[0] == '+')) && memcmp(at + 1, end, 2) == 0) {
        *sign_out = at[0];
        return true;
    }
    return false;
}

/* Text before a tag at [start, end); the tag's sign and kind decide what is cut from its end. */
static void lexer_data(Lexer *lexer, size_t start, size_t end, char sign, bool lstrips)
{
    Text text = {lexer->source + start, end - start};
    if (sign == '-') {
        text = text_strip(text, NULL, false, true);
    } else if (sign != '+' && lstrips) {
        size_t line_start = text.length;
        while (line_start > 0 && text.data[line_start - 1] != '\n') {
            line_start--;
        }
        Text rest = {text.data + line_start, text.length - line_start};
        if ((line_start > 0 || lexer->line_starting) &&
            text_strip(rest, NULL, true, false).length == 0) {
            text.length = line_start;
        }
    }
    if (text.length > 0) {
        lexer_push(lexer, (Token){.type = TOKEN_DATA, .text = text});
    }
    lexer_advance(lexer, end - start);
}

static bool is_name_byte(char c)
{
    return g_ascii_isalnum(c) || c == '_' || (uint8_t)c >= 0x80;
}

/* The offset behind "{% NAME %}" (with signs) at `at`, 0 if something else is there. *end_sign_out
 * is the sign of the end. */
static size_t lexer_bare_block(const Lexer *lexer, size_t at, const char *name,
                               char *begin_sign_out, size_t *end_at_out)
{
    const char *s = lexer->source;
    size_t p = at + 2, n = strlen(name);
    if (lexer->length - at < 2 || memcmp(s + at, "{%", 2) != 0) {
        return 0;
    }
    *begin_sign_out = p < lexer->length && (s[p] == '-' || s[p] == '+') ? s[p] : 0;
    p += *begin_sign_out != 0;
    p += lexer_space(lexer, p);
    if (lexer->length - p < n || memcmp(s + p, name, n) != 0) {
        return 0;
    }
    p += n;
    p += lexer_space(lexer, p);
    *end_at_out = p;
    p += p < lexer->length && (s[p] == '-' || s[p] == '+');
    return lexer->length - p >= 2 && memcmp(s + p, "%}", 2) == 0 ? p + 2 : 0;
}

/* Everything up to {% endraw %} is text. The lexer stands behind "{% raw %}". */
static bool lexer_raw(Lexer *lexer)
{
    for (size_t at = lexer->at; at < lexer->length; at++) {
        char begin_sign, sign;
        size_t end_at;
        if (lexer->source[at] != '{' ||
            lexer_bare_block(lexer, at, "endraw", &begin_sign, &end_at) == 0) {
            continue;
        }
        lexer_data(lexer, lexer->at, at, begin_sign, true);
        lexer_advance(lexer, end_at - lexer->at);
        lexer_at_end(lexer, "%}", true, &sign);
        lexer_end_tag(lexer, sign, true);
        return true;
    }
    return lexer_fail(lexer, "{% raw %} has no {% endraw %}");
}

static bool lexer_comment(Lexer *lexer)
{
    for (size_t at = lexer->at; lexer->length - at >= 2; at++) {
        if (memcmp(lexer->source + at, "#}", 2) == 0) {
            char before = at > lexer->at ? lexer->source[at - 1] : 0;
            char sign = before == '-' || before == '+' ? before : 0;
            lexer_advance(lexer, at - (sign != 0) - lexer->at);
            lexer_end_tag(lexer, sign, true);
            return true;
        }
    }
    return lexer_fail(lexer, "comment {# has no end #}");
}

/* Appends one escape of a string literal (Python's); returns bytes used after the backslash, 0 for
 * an error. */
static size_t lexer_escape(const char *s, size_t n, GString *out)
{
    static const char from[] = "abfnrtv\\'\"", to[] = "\a\b\f\n\r\t\v\\'\"";
    const char *simple = s[0] != '\0' ? strchr(from, s[0]) : NULL;
    if (simple != NULL) {
        g_string_append_c(out, to[simple - from]);
        return 1;
    }
    if (s[0] == '\n') {
        return 1;
    }
    size_t digits = s[0] == 'x' ? 2 : s[0] == 'u' ? 4 : s[0] == 'U' ? 8 : 0, used = 1;
    uint32_t code = 0;
    if (digits > 0) {
        for (; used <= digits; used++) {
            if (used >= n || !g_ascii_isxdigit(s[used])) {
                return 0;
            }
            code = code << 4 | (uint32_t)g_ascii_xdigit_value(s[used]);
        }
    } else if (s[0] >= '0' && s[0] <= '7') {
        for (used = 0; used < 3 && used < n && s[used] >= '0' && s[used] <= '7'; used++) {
            code = code << 3 | (uint32_t)(s[used] - '0');
        }
    } else if (s[0] == 'N') {
        return 0;
    } else {
        size_t step = text_step((Text){s, n}, NULL);
        g_string_append_c(out, '\\');
        g_string_append_len(out, s, (gssize)step);
        return step;
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) {
        return 0;
    }
    char bytes[4];
    g_string_append_len(out, bytes, (gssize)utf8_encode(code, bytes));
    return used;
}

static bool lexer_string(Lexer *lexer)
{
    char quote = lexer->source[lexer->at];
    g_autoptr(GString) out = g_string_new(NULL);
    size_t at = lexer->at + 1;
    while (at < lexer->length && lexer->source[at] != quote) {
        if (lexer->source[at] != '\\') {
            g_string_append_c(out, lexer->source[at++]);
            continue;
        }
        at++;
        size_t used =
            at < lexer->length ? lexer_escape(lexer->source + at, lexer->length - at, out) : 0;
        if (used == 0) {
            return lexer_fail(lexer, "escape in a string literal is not supported");
        }
        at += used;
    }
    if (at >= lexer->length) {
        return lexer_fail(lexer, "string literal has no end");
    }
    char *copy = template_alloc(lexer->owner, out->len + 1, 1);
    memcpy(copy, out->str, out->len);
    lexer_push(lexer, (Token){.type = TOKEN_STRING, .text = {copy, out->len}});
    lexer_advance(lexer, at + 1 - lexer->at);
    return true;
}

/* Digits with single underscores between them. */
static size_t lexer_digits(const Lexer *lexer, size_t at, GString *out)
{
    size_t start = at;
    while (at < lexer->length &&
           (g_ascii_isdigit(lexer->source[at]) ||
            (lexer->source[at] == '_' && at > start && at + 1 < lexer->length &&
             g_ascii_isdigit(lexer->source[at + 1])))) {
        if (lexer->source[at] != '_') {
            g_string_append_c(out, lexer->source[at]);
        }
        at++;
    }
    return at - start;
}

static bool lexer_number(Lexer *lexer)
{
    g_autoptr(GString) digits = g_string_new(NULL);
    const char *s = lexer->source;
    size_t at = lexer->at;
    at += lexer_digits(lexer, at, digits);
    bool real = false;
    if (at + 1 < lexer->length && s[at] == '.' && g_ascii_isdigit(s[at + 1])) {
        real = true;
        g_string_append_c(digits, '.');
        at++;
        at += lexer_digits(lexer, at, digits);
    }
    size_t sign = at + 1 < lexer->length && (s[at + 1] == '+' || s[at + 1] == '-');
    if (at + 1 + sign < lexer->length && (s[at] == 'e' || s[at] == 'E') &&
        g_ascii_isdigit(s[at + 1 + sign])) {
        real = true;
        g_string_append_len(digits, s + at, (gssize)(1 + sign));
        at += 1 + sign;
        at += lexer_digits(lexer, at, digits);
    }
    Token token = {.type = real ? TOKEN_FLOAT : TOKEN_INTEGER};
    if (real) {
        token.real = g_ascii_strtod(digits->str, NULL);
    } else {
        guint64 value;
        if (!g_ascii_string_to_unsigned(digits->str, 10, 0, INT64_MAX, &value, NULL)) {
            return lexer_fail(lexer, "integer literal does not fit 64 bits");
        }
        token.integer = (int64_t)value;
    }
    if (at < lexer->length && is_name_byte(s[at])) {
        return lexer_fail(lexer, "number literal is followed by a letter");
    }
    lexer_push(lexer, token);
    lexer_advance(lexer, at - lexer->at);
    return true;
}

static bool lexer_operator(Lexer *lexer, int *nesting)
{
    static const char *const two[] = {"==", "!=", "<=", ">=", "//", "**"};
    for (size_t i = 0; i < G_N_ELEMENTS(two); i++) {
        if (lexer_sees(lexer, two[i])) {
            lexer_push(lexer, (Token){.type = TOKEN_OPERATOR, .op = OP2(two[i][0], two[i][1])});
            lexer_advance(lexer, 2);
            return true;
        }
    }
    char c = lexer->source[lexer->at];
    if (c == '\0' || strchr("+-/*%~[](){}<>=.:|,", c) == NULL) {
        g_autofree char *what =
            g_strdup_printf("unexpected character '%c'", g_ascii_isprint(c) ? c : '?');
        return lexer_fail(lexer, what);
    }
    *nesting += c == '(' || c == '[' || c == '{';
    *nesting -= c == ')' || c == ']' || c == '}';
    if (*nesting < 0) {
        return lexer_fail(lexer, "closing bracket without an opening one");
    }
    lexer_push(lexer, (Token){.type = TOKEN_OPERATOR, .op = OP(c)});
    lexer_advance(lexer, 1);
    return true;
}

/* Inside a tag: up to its end, which counts only outside of brackets. */
static bool lexer_tag(Lexer *lexer, const char *end, TokenType end_type)
{
    bool block = end_type == TOKEN_BLOCK_END;
    for (int nesting = 0;;) {
        lexer_advance(lexer, lexer_space(lexer, lexer->at));
        if (lexer->at >= lexer->length) {
            return lexer_fail(lexer,
                              block ? "block {% has no end %}" : "expression {{ has no end }}");
        }
        char sign, c = lexer->source[lexer->at];
        if (nesting == 0 && lexer_at_end(lexer, end, block, &sign)) {
            lexer_push(lexer, (Token){.type = end_type});
            lexer_end_tag(lexer, sign, block);
            return true;
        }
        bool ok = true;
        if (c == '\'' || c == '"') {
            ok = lexer_string(lexer);
        } else if (g_ascii_isdigit(c)) {
            ok = lexer_number(lexer);
        } else if (is_name_byte(c)) {
            size_t n = 1;
            while (lexer->at + n < lexer->length && is_name_byte(lexer->source[lexer->at + n])) {
                n++;
            }
            lexer_push(lexer, (Token){.type = TOKEN_NAME, .text = {lexer->source + lexer->at, n}});
            lexer_advance(lexer, n);
        } else {
            ok = lexer_operator(lexer, &nesting);
        }
        if (!ok) {
            return false;
        }
    }
}

static bool lexer_begin(Lexer *lexer, size_t tag_at)
{
    char kind = lexer->source[tag_at + 1], raw_sign = 0;
    size_t raw_end_at = 0;
    char sign = tag_at + 2 < lexer->length ? lexer->source[tag_at + 2] : 0;
    sign = sign == '-' || sign == '+' ? sign : 0;
    lexer_data(lexer, lexer->at, tag_at, sign, kind != '{');
    if (kind == '%' && lexer_bare_block(lexer, tag_at, "raw", &raw_sign, &raw_end_at) != 0) {
        char end_sign = 0;
        lexer_advance(lexer, raw_end_at - lexer->at);
        lexer_at_end(lexer, "%}", true, &end_sign);
        lexer_end_tag(lexer, end_sign, false);
        return lexer_raw(lexer);
    }
    lexer_advance(lexer, sign != 0 ? 3 : 2);
    if (kind == '#') {
        return lexer_comment(lexer);
    }
    bool block = kind == '%';
    lexer_push(lexer, (Token){.type = block ? TOKEN_BLOCK_BEGIN : TOKEN_OUTPUT_BEGIN});
    return lexer_tag(lexer, block ? "%}" : "}}", block ? TOKEN_BLOCK_END : TOKEN_OUTPUT_END);
}

static bool lexer_run(Lexer *lexer)
{
    while (lexer->at < lexer->length) {
        size_t tag = lexer->at;
        while (tag + 1 < lexer->length &&
               !(lexer->source[tag] == '{' && strchr("{%#", lexer->source[tag + 1]) != NULL &&
                 lexer->source[tag + 1] != '\0')) {
            tag++;
        }
        if (tag + 1 >= lexer->length) {
            lexer_push(lexer,
                       (Token){.type = TOKEN_DATA,
                               .text = {lexer->source + lexer->at, lexer->length - lexer->at}});
            lexer_advance(lexer, lexer->length - lexer->at);
        } else if (!lexer_begin(lexer, tag)) {
            return false;
        }
    }
    lexer_push(lexer, (Token){.type = TOKEN_END});
    return true;
}

/* Newlines become \n, and one at the very end goes. */
static Text lexer_normalize(ChatTemplate *t, const char *source, size_t length)
{
    char *copy = template_alloc(t, length + 1, 1);
    size_t n = 0;
    for (size_t i = 0; i < length; i++) {
        if (source[i] == '\r') {
            i += i + 1 < length && source[i + 1] == '\n';
            copy[n++] = '\n';
        } else {
            copy[n++] = source[i];
        }
    }
    n -= n > 0 && copy[n - 1] == '\n';
    return (Text){copy, n};
}

GArray *template_lex(ChatTemplate *t, const char *source, size_t length, GError **error)
{
    Text text = lexer_normalize(t, source, length);
    Lexer lexer = {.owner = t,
                   .source = text.data,
                   .length = text.length,
                   .line = 1,
                   .line_starting = true,
                   .error = error};
    lexer.tokens = g_array_new(FALSE, FALSE, sizeof(Token));
    if (!lexer_run(&lexer)) {
        g_array_free(lexer.tokens, TRUE);
        return NULL;
    }
    return lexer.tokens;
}
