/* Strings of messages that arrived. */
#pragma once

#include <protobuf-c/protobuf-c.h>

/* proto3 has UTF-8 in every string field, but the decoder takes what comes: whoever speaks on the
 * other side could put bytes into logs, JSON and the answers for others whose decoders then refuse
 * the whole message. Bytes that are no UTF-8 become U+FFFD, in all strings of the message and of
 * those inside. message: unpacked with the system's allocator. */
void message_text_mend(ProtobufCMessage *message);
