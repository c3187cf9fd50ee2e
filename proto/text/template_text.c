/* Operations on text that filters and methods share. */
#include "proto/text/template_render.h"

#include "proto/text/utf8.h"

#include <string.h>
#include <utf8proc.h>

static Text rest_of(Text text, size_t at)
{
    return (Text){text.data + at, text.length - at};
}

/* The full mapping where one letter becomes several (SpecialCasing.txt, the unconditional entries
 * people write), else 0. */
static const char *upper_special(uint32_t code)
{
    switch (code) {
    case 0xDF:
        return "SS";
    case 0x149:
        return "\xCA\xBCN";
    case 0x1F0:
        return "J\xCC\x8C";
    case 0x390:
        return "\xCE\x99\xCC\x88\xCC\x81";
    case 0x3B0:
        return "\xCE\xA5\xCC\x88\xCC\x81";
    case 0x587:
        return "\xD4\xB5\xD5\x92";
    case 0xFB00:
        return "FF";
    case 0xFB01:
        return "FI";
    case 0xFB02:
        return "FL";
    case 0xFB03:
        return "FFI";
    case 0xFB04:
        return "FFL";
    case 0xFB05:
    case 0xFB06:
        return "ST";
    default:
        return NULL;
    }
}

typedef enum LetterCase { CASE_UPPER, CASE_LOWER, CASE_TITLE } LetterCase;

static void append_code(Render *r, GString *out, uint32_t code)
{
    char bytes[4];
    render_append(r, out, bytes, utf8_encode(code, bytes));
}

static bool is_letter(uint32_t code)
{
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
    return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

static bool is_cased(uint32_t code)
{
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
    return category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LL ||
           category == UTF8PROC_CATEGORY_LT;
}

static void append_case(Render *r, GString *out, Text character, uint32_t code, LetterCase to)
{
    utf8proc_int32_t c = (utf8proc_int32_t)code;
    const char *special = to != CASE_LOWER ? upper_special(code) : NULL;
    if (text_step(character, NULL) == 1 && (uint8_t)character.data[0] >= 0x80) {
        render_append(r, out, character.data, 1); /* no character: kept */
    } else if (special != NULL && to == CASE_UPPER) {
        render_append(r, out, special, strlen(special));
    } else if (code == 0xDF && to == CASE_TITLE) {
        render_append(r, out, "Ss", 2);
    } else if (code == 0x130 && to == CASE_LOWER) {
        render_append(r, out, "i\xCC\x87", 3);
    } else {
        append_code(r, out,
                    (uint32_t)(to == CASE_UPPER   ? utf8proc_toupper(c)
                               : to == CASE_LOWER ? utf8proc_tolower(c)
                                                  : utf8proc_totitle(c)));
    }
}

/* A capital sigma at the end of a word has a form of its own (SpecialCasing.txt, Final_Sigma;
 * combining marks between are not looked through). */
static bool is_final_sigma(Text text, size_t at, size_t step, bool after_letter, uint32_t code)
{
    uint32_t next = 0;
    if (code != 0x3A3 || !after_letter) {
        return false;
    }
    if (at + step < text.length) {
        text_step(rest_of(text, at + step), &next);
    }
    return !is_letter(next);
}

/* first: the case of the text's first letter (or of each word's, with words); the others get
 * `rest`. */
static Value text_recase(Render *r, Text text, LetterCase first, LetterCase rest, bool words)
{
    GString *out = g_string_new(NULL);
    bool after_letter = false, at_first = true;
    for (size_t at = 0; at < text.length && !render_failed(r);) {
        uint32_t code;
        size_t step = text_step(rest_of(text, at), &code);
        LetterCase to = (words ? !after_letter : at_first) ? first : rest;
        if (to == CASE_LOWER && is_final_sigma(text, at, step, after_letter, code)) {
            append_code(r, out, 0x3C2);
        } else {
            append_case(r, out, (Text){text.data + at, step}, code, to);
        }
        after_letter = words ? is_cased(code) : is_letter(code);
        at_first = false;
        at += step;
    }
    return value_take_buffer(r, out);
}

Value text_upper(Render *r, Text text)
{
    return text_recase(r, text, CASE_UPPER, CASE_UPPER, false);
}

Value text_lower(Render *r, Text text)
{
    return text_recase(r, text, CASE_LOWER, CASE_LOWER, false);
}

Value text_capitalize(Render *r, Text text)
{
    return text_recase(r, text, CASE_TITLE, CASE_LOWER, false);
}

/* The filter's words begin after blanks, hyphens and opening brackets only. */
static bool begins_word(uint32_t code)
{
    return code == '-' || code == '(' || code == '{' || code == '[' || code == '<' ||
           utf8_is_space(code);
}

Value text_title(Render *r, Text text, bool words)
{
    if (words) {
        return text_recase(r, text, CASE_TITLE, CASE_LOWER, true);
    }
    GString *out = g_string_new(NULL);
    bool at_first = true;
    for (size_t at = 0; at < text.length && !render_failed(r);) {
        uint32_t code;
        size_t step = text_step(rest_of(text, at), &code);
        append_case(r, out, (Text){text.data + at, step}, code, at_first ? CASE_UPPER : CASE_LOWER);
        at_first = begins_word(code);
        at += step;
    }
    return value_take_buffer(r, out);
}

/* An empty `old` stands between all characters and at both ends. */
static Value text_interleave(Render *r, Text text, Text new, int64_t count)
{
    GString *out = g_string_new(NULL);
    size_t at = 0;
    for (int64_t done = 0; !render_failed(r); done++) {
        if (count < 0 || done < count) {
            render_append(r, out, new.data, new.length);
        }
        if (at == text.length || !render_step(r, 1)) {
            break;
        }
        size_t step = text_step(rest_of(text, at), NULL);
        render_append(r, out, text.data + at, step);
        at += step;
    }
    return value_take_buffer(r, out);
}

Value text_replace(Render *r, Text text, Text old, Text new, int64_t count)
{
    if (old.length == 0) {
        return text_interleave(r, text, new, count);
    }
    GString *out = g_string_new(NULL);
    size_t at = 0;
    for (int64_t done = 0; (count < 0 || done < count) && render_step(r, 1); done++) {
        gssize found = text_find(text, old, at);
        if (found < 0) {
            break;
        }
        render_append(r, out, text.data + at, (size_t)found - at);
        render_append(r, out, new.data, new.length);
        at = (size_t)found + old.length;
    }
    render_append(r, out, text.data + at, text.length - at);
    return value_take_buffer(r, out);
}

/* Python's line boundaries. */
static bool ends_line(uint32_t code)
{
    return (code >= 0x0A && code <= 0x0D) || (code >= 0x1C && code <= 0x1E) || code == 0x85 ||
           code == 0x2028 || code == 0x2029;
}

ValueList *text_split_lines(Render *r, Text text)
{
    GArray *lines = g_array_new(FALSE, FALSE, sizeof(Value));
    size_t start = 0;
    for (size_t at = 0; at < text.length && render_step(r, 1);) {
        uint32_t code;
        size_t step = text_step(rest_of(text, at), &code), end = at;
        at += step;
        if (ends_line(code)) {
            Value line = value_text((Text){text.data + start, end - start});
            at += code == '\r' && at < text.length && text.data[at] == '\n';
            start = at;
            g_array_append_val(lines, line);
        }
    }
    if (start < text.length) {
        Value line = value_text(rest_of(text, start));
        g_array_append_val(lines, line);
    }
    ValueList *list = value_list_new(r, LIST_LIST, lines->len);
    if (list != NULL && lines->len > 0) {
        memcpy(list->items, lines->data, lines->len * sizeof(Value));
    }
    g_array_free(lines, TRUE);
    return list;
}
