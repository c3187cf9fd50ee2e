/* Inputs of the targets that stand for a peer: a list of records, each a kind (whose message, at
 * which door) and a protobuf message in bytes. And such messages changed field by field, which
 * random bytes hardly ever do: one inner length that does not fit, and nothing is unpacked. */
#pragma once

#include <glib.h>
#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A record: u8 kind, u16 little-endian size, bytes. */
typedef struct Record {
    uint8_t kind;
    const uint8_t *bytes;
    size_t size;
} Record;

typedef struct Records {
    const uint8_t *data;
    size_t size, offset;
} Records;

/* The next record (a last one that is cut is taken as far as it goes); false at the end. */
bool records_next(Records *records, Record *record);
void records_append(GByteArray *out, uint8_t kind, const void *bytes, size_t size);

/* The target's: what a record of this kind is; NULL = no message. */
const ProtobufCMessageDescriptor *record_type(uint8_t kind);
/* The record's message or NULL; freed with protobuf_c_message_free_unpacked(). */
ProtobufCMessage *record_unpack(const Record *record);

typedef enum FieldChange {
    FIELD_DROPPED,
    FIELD_DOUBLED,
    FIELD_NUMBER, /* the number, or for bytes and messages so many (at most 300) bytes of it */
    FIELD_CHANGES
} FieldChange;

/* Fields of a message in bytes, those of inner messages too. */
unsigned message_n_fields(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                          size_t size);
/* The message with its n-th field (before those inside it) changed; returned. */
GByteArray *message_change(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                           size_t size, unsigned field, FieldChange change, uint64_t number);
