/* Any bytes as a chat template: parsing and rendering end, within their limits, with text or an
 * error. */
#include "proto/text/chat_template.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const ChatMessageText messages[] = {
        {"system", "Be brief."},
        {"user", "h\xC3\xA9llo <think>\n\xF0\x9F\x98\x80 \xFF"},
        {"assistant", "a, b"},
        {"user", ""}};
    ChatLimits limits = {.steps = 20000, .output_bytes = 1 << 16, .depth = 16, .now_s = 1753014896};
    g_autoptr(GError) error = NULL;
    g_autoptr(ChatTemplate) t = chat_template_parse((const char *)data, size, &error);
    g_assert((t == NULL) == (error != NULL));
    if (t == NULL) {
        return 0;
    }
    g_autofree char *first = chat_template_render(t, messages, G_N_ELEMENTS(messages), true, "<s>",
                                                  "</s>", limits, &error);
    g_assert((first == NULL) == (error != NULL));
    g_assert(first == NULL || strlen(first) <= limits.output_bytes);
    g_autofree char *second = chat_template_render(t, messages, G_N_ELEMENTS(messages), true, "<s>",
                                                   "</s>", limits, NULL);
    g_assert(g_strcmp0(first, second) == 0);
    return 0;
}
