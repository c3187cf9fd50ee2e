/* Each input of records again, as many times as its messages have fields, each time without one of
 * them: a missing inner message is NULL to whoever reads it. */
#include "tests/fuzz/calls.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
unsigned replay_variants(const uint8_t *data, size_t size);

static unsigned n_fields(const Record *record)
{
    const ProtobufCMessageDescriptor *type = record_type(record->kind);
    return type != NULL ? message_n_fields(type, record->bytes, record->size) : 0;
}

/* `field` of the record at `chosen` is left out. */
static void replay_without(const uint8_t *data, size_t size, unsigned chosen, unsigned field)
{
    g_autoptr(GByteArray) out = g_byte_array_new();
    Record record;
    unsigned i = 0;
    for (Records r = {data, size, 0}; records_next(&r, &record); i++) {
        g_autoptr(GByteArray) changed = i == chosen
                                            ? message_change(record_type(record.kind), record.bytes,
                                                             record.size, field, FIELD_DROPPED, 0)
                                            : NULL;
        records_append(out, record.kind, changed != NULL ? changed->data : record.bytes,
                       changed != NULL ? changed->len : record.size);
    }
    LLVMFuzzerTestOneInput(out->data, out->len);
}

unsigned replay_variants(const uint8_t *data, size_t size)
{
    unsigned n = 0, i = 0;
    Record record;
    for (Records r = {data, size, 0}; records_next(&r, &record); i++) {
        for (unsigned field = 0; field < n_fields(&record); field++, n++) {
            replay_without(data, size, i, field);
        }
    }
    return n;
}
