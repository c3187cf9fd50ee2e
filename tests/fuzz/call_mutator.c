/* libFuzzer's mutator for inputs of records: half of the time it changes one field of one message
 * (or moves whole records about), else the bytes at random. */
#include "tests/fuzz/calls.h"

#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);

static uint64_t next(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static uint64_t interesting(uint64_t *state)
{
    static const uint64_t values[] = {0,
                                      1,
                                      2,
                                      16,
                                      64,
                                      255,
                                      4096,
                                      65536,
                                      INT32_MAX,
                                      UINT32_MAX,
                                      1ull << 40,
                                      INT64_MAX,
                                      UINT64_MAX,
                                      0x7ff0000000000000u,
                                      0xbff0000000000000u};
    const uint64_t pick = next(state) % (G_N_ELEMENTS(values) + 4);
    return pick < G_N_ELEMENTS(values) ? values[pick] - next(state) % 2 : next(state) % 64;
}

static void put_record(GByteArray *out, const Record *record, uint64_t *state)
{
    const ProtobufCMessageDescriptor *type = record_type(record->kind);
    const unsigned n = type != NULL ? message_n_fields(type, record->bytes, record->size) : 0;
    switch (next(state) % 8) {
    case 0: /* twice */
        records_append(out, record->kind, record->bytes, record->size);
        records_append(out, record->kind, record->bytes, record->size);
        return;
    case 1: /* left out */
        return;
    case 2: /* at another door */
        records_append(out, (uint8_t)(next(state) % 32), record->bytes, record->size);
        return;
    default:
        if (n > 0) {
            g_autoptr(GByteArray) changed =
                message_change(type, record->bytes, record->size, (unsigned)(next(state) % n),
                               (FieldChange)(next(state) % FIELD_CHANGES), interesting(state));
            records_append(out, record->kind, changed->data, changed->len);
        }
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    uint64_t state = seed;
    unsigned n = 0;
    Record record;
    for (Records r = {data, size, 0}; records_next(&r, &record);) {
        n++;
    }
    if (n == 0 || next(&state) % 2 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    g_autoptr(GByteArray) out = g_byte_array_new();
    const unsigned chosen = (unsigned)(next(&state) % n);
    unsigned i = 0;
    for (Records r = {data, size, 0}; records_next(&r, &record); i++) {
        if (i == chosen) {
            put_record(out, &record, &state);
        } else {
            records_append(out, record.kind, record.bytes, record.size);
        }
    }
    if (out->len == 0 || out->len > max_size) {
        return size;
    }
    memcpy(data, out->data, out->len);
    return out->len;
}
