/* Owned copies of protobuf-c messages (one allocation family: protobuf-c's default). */
#pragma once

#include <glib.h>
#include <protobuf-c/protobuf-c.h>

/* A deep copy, packed and unpacked; returned. */
ProtobufCMessage *message_copy(const ProtobufCMessage *message);
/* Frees any message that was unpacked or copied; NULL-safe. */
void message_free_base(ProtobufCMessage *message);
GBytes *message_pack(const ProtobufCMessage *message);

#define message_free(m) message_free_base((ProtobufCMessage *)(m))
/* *slot becomes a copy of m. */
#define message_replace(slot, m)                                                                   \
    do {                                                                                           \
        void *replaced_ = *(slot);                                                                 \
        *(slot) = (void *)message_copy((const ProtobufCMessage *)(m));                             \
        message_free(replaced_);                                                                   \
    } while (0)
