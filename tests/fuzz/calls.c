#include "tests/fuzz/calls.h"

#include <string.h>

bool records_next(Records *r, Record *record)
{
    size_t left = r->size - r->offset;
    if (left < 3) {
        return false;
    }
    const uint8_t *at = r->data + r->offset;
    record->kind = at[0];
    record->size = MIN((size_t)(at[1] | at[2] << 8), left - 3);
    record->bytes = at + 3;
    r->offset += 3 + record->size;
    return true;
}

void records_append(GByteArray *out, uint8_t kind, const void *bytes, size_t size)
{
    const size_t n = MIN(size, 0xffff);
    const uint8_t head[3] = {kind, (uint8_t)n, (uint8_t)(n >> 8)};
    g_byte_array_append(out, head, sizeof head);
    if (n > 0) {
        g_byte_array_append(out, bytes, (guint)n);
    }
}

ProtobufCMessage *record_unpack(const Record *record)
{
    const ProtobufCMessageDescriptor *type = record_type(record->kind);
    return type != NULL ? protobuf_c_message_unpack(type, NULL, record->size, record->bytes) : NULL;
}

/* ---- the wire format: tag, then a number, 8 or 4 bytes, or a length and so many bytes ---- */

typedef struct Walk {
    unsigned at, target;
    FieldChange change;
    uint64_t number;
} Walk;

static bool take_varint(const uint8_t *data, size_t size, size_t *at, uint64_t *out)
{
    *out = 0;
    for (unsigned shift = 0; shift < 64 && *at < size; shift += 7) {
        uint8_t byte = data[(*at)++];
        *out |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            return true;
        }
    }
    return false;
}

static void put_varint(GByteArray *out, uint64_t value)
{
    do {
        uint8_t byte = (uint8_t)(value & 0x7f);
        value >>= 7;
        byte |= value > 0 ? 0x80 : 0;
        g_byte_array_append(out, &byte, 1);
    } while (value > 0);
}

enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

/* What follows a tag: [*first, *end); false = malformed. */
static bool take_value(unsigned wire, const uint8_t *data, size_t size, size_t *at, size_t *first,
                       size_t *end)
{
    uint64_t n = wire == WIRE_64 ? 8 : 4;
    *first = *at;
    if (wire == WIRE_VARINT) {
        if (!take_varint(data, size, at, &n)) {
            return false;
        }
        *end = *at;
        return true;
    }
    if (wire == WIRE_BYTES) {
        if (!take_varint(data, size, at, &n)) {
            return false;
        }
        *first = *at;
    } else if (wire != WIRE_64 && wire != WIRE_32) {
        return false;
    }
    if (n > size - *at) {
        return false;
    }
    *at += (size_t)n;
    *end = *at;
    return true;
}

static void put_changed_number(const Walk *w, uint64_t tag, GByteArray *out)
{
    put_varint(out, tag);
    switch (tag & 7) {
    case WIRE_VARINT:
        put_varint(out, w->number);
        break;
    case WIRE_BYTES: {
        uint8_t bytes[300];
        const size_t n = (size_t)(w->number % sizeof bytes);
        memset(bytes, (int)(w->number >> 16), n);
        put_varint(out, n);
        g_byte_array_append(out, bytes, (guint)n);
        break;
    }
    default:
        g_byte_array_append(out, (const uint8_t *)&w->number, (tag & 7) == WIRE_64 ? 8 : 4);
    }
}

static void copy_fields(Walk *w, const ProtobufCMessageDescriptor *type, const uint8_t *data,
                        size_t size, GByteArray *out)
{
    for (size_t at = 0; at < size;) {
        const size_t start = at;
        uint64_t tag;
        size_t first, end;
        if (!take_varint(data, size, &at, &tag) ||
            !take_value(tag & 7, data, size, &at, &first, &end)) {
            g_byte_array_append(out, data + start, (guint)(size - start));
            return;
        }
        const ProtobufCFieldDescriptor *field =
            protobuf_c_message_descriptor_get_field(type, (unsigned)(tag >> 3));
        const bool inner =
            (tag & 7) == WIRE_BYTES && field != NULL && field->type == PROTOBUF_C_TYPE_MESSAGE;
        const bool here = w->at++ == w->target;
        if (here && w->change == FIELD_NUMBER) {
            put_changed_number(w, tag, out);
        } else if (here) {
            for (int copies = w->change == FIELD_DOUBLED ? 2 : 0; copies > 0; copies--) {
                g_byte_array_append(out, data + start, (guint)(at - start));
            }
        } else if (inner) {
            g_autoptr(GByteArray) message = g_byte_array_new();
            copy_fields(w, field->descriptor, data + first, end - first, message);
            put_varint(out, tag);
            put_varint(out, message->len);
            g_byte_array_append(out, message->data, message->len);
        } else {
            g_byte_array_append(out, data + start, (guint)(at - start));
        }
    }
}

unsigned message_n_fields(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t size)
{
    g_autoptr(GByteArray) out = g_byte_array_new();
    Walk w = {.target = UINT_MAX};
    copy_fields(&w, type, bytes, size, out);
    return w.at;
}

GByteArray *message_change(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                           size_t size, unsigned field, FieldChange change, uint64_t number)
{
    GByteArray *out = g_byte_array_new();
    Walk w = {.target = field, .change = change, .number = number};
    copy_fields(&w, type, bytes, size, out);
    return out;
}
