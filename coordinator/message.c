#include "coordinator/message.h"

ProtobufCMessage *message_copy(const ProtobufCMessage *message)
{
    g_autoptr(GBytes) bytes = message_pack(message);
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    return protobuf_c_message_unpack(message->descriptor, NULL, size, data);
}

void message_free_base(ProtobufCMessage *message)
{
    if (message != NULL) {
        protobuf_c_message_free_unpacked(message, NULL);
    }
}

GBytes *message_pack(const ProtobufCMessage *message)
{
    size_t size = protobuf_c_message_get_packed_size(message);
    uint8_t *data = g_malloc(size + 1);
    protobuf_c_message_pack(message, data);
    return g_bytes_new_take(data, size);
}
