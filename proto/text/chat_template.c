/* One rendering, from messages to text. */
#include "proto/text/template_render.h"

#include <string.h>

static void define(Render *r, const char *name, Value value)
{
    const char *interned = g_hash_table_lookup(r->source->names, name);
    if (interned != NULL) { /* else the template never names it */
        render_set(r, interned, value);
    }
}

static Value borrow(const char *text)
{
    return text != NULL ? value_text((Text){text, strlen(text)}) : value_undefined(TEXT("token"));
}

static Value message_value(Render *r, const ChatMessageText *message)
{
    ValueDict *dict = value_dict_new(r);
    if (dict == NULL) {
        return value_none();
    }
    value_dict_put(r, dict, value_text(TEXT("role")), borrow(message->role));
    value_dict_put(r, dict, value_text(TEXT("content")), borrow(message->content));
    return value_dict(dict);
}

/* The variables that model makers' own code passes. */
static void define_all(Render *r, const ChatMessageText *messages, unsigned n,
                       bool add_generation_prompt, const char *bos, const char *eos)
{
    ValueList *list = value_list_new(r, LIST_LIST, n);
    for (unsigned i = 0; list != NULL && i < n; i++) {
        list->items[i] = message_value(r, &messages[i]);
    }
    if (list == NULL) {
        return;
    }
    define(r, "messages", value_list(list));
    define(r, "add_generation_prompt", value_bool(add_generation_prompt));
    define(r, "tools", value_none());
    define(r, "documents", value_none());
    if (bos != NULL) {
        define(r, "bos_token", borrow(bos));
    }
    if (eos != NULL) {
        define(r, "eos_token", borrow(eos));
    }
}

char *chat_template_render(const ChatTemplate *t, const ChatMessageText *messages, unsigned n,
                           bool add_generation_prompt, const char *bos, const char *eos,
                           ChatLimits limits, GError **error)
{
    Scope globals = {0};
    Render r = {.limits = limits, .source = t, .line = 1, .scope = &globals};
    r.blocks = g_ptr_array_new_with_free_func(g_free);
    r.out = g_string_new(NULL);
    define_all(&r, messages, n, add_generation_prompt, bos, eos);
    if (!render_failed(&r)) {
        render_statements(&r, &t->body);
    }
    g_ptr_array_unref(r.blocks);
    if (render_failed(&r)) {
        g_propagate_error(error, r.error);
        g_string_free(r.out, TRUE);
        return NULL;
    }
    return g_string_free(r.out, FALSE);
}
