#include "transport/rpc/message_text.h"

#include <glib.h>
#include <stdlib.h>
#include <string.h>

static void mend_string(char **text)
{
    if (*text == NULL || g_utf8_validate(*text, -1, NULL)) {
        return;
    }
    g_autofree char *valid = g_utf8_make_valid(*text, -1);
    const size_t size = strlen(valid) + 1;
    char *copy = malloc(size); /* as the decoder's own */
    g_assert(copy != NULL);
    memcpy(copy, valid, size);
    free(*text);
    *text = copy;
}

static void mend_value(const ProtobufCFieldDescriptor *field, void *value)
{
    if (field->type == PROTOBUF_C_TYPE_STRING) {
        mend_string(value);
    } else if (*(ProtobufCMessage **)value != NULL) {
        message_text_mend(*(ProtobufCMessage **)value);
    }
}

void message_text_mend(ProtobufCMessage *message)
{
    const ProtobufCMessageDescriptor *type = message->descriptor;
    for (unsigned i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
        void *value = (char *)message + field->offset;
        const void *quantifier = (char *)message + field->quantifier_offset;
        if (field->type != PROTOBUF_C_TYPE_STRING && field->type != PROTOBUF_C_TYPE_MESSAGE) {
            continue;
        }
        if (field->label == PROTOBUF_C_LABEL_REPEATED) {
            void **list = *(void ***)value;
            for (size_t k = 0; k < *(const size_t *)quantifier; k++) {
                mend_value(field, &list[k]);
            }
        } else if ((field->flags & PROTOBUF_C_FIELD_FLAG_ONEOF) == 0 ||
                   *(const uint32_t *)quantifier == field->id) {
            mend_value(field, value);
        }
    }
}
