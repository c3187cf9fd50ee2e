#include "worker/serve/inbox.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

static size_t slot_bytes(size_t message_limit)
{
    return (message_limit + 63) & ~(size_t)63;
}

size_t inbox_bytes(uint32_t n_slots, size_t message_limit)
{
    return slot_bytes(message_limit) * n_slots;
}

bool inbox_open(Inbox *inbox, uint32_t n_slots, size_t message_limit, GError **error)
{
    *inbox = (Inbox){.n_slots = n_slots,
                     .message_limit = message_limit,
                     .bytes = inbox_bytes(n_slots, message_limit)};
    inbox->memory = weft_map(inbox->bytes, "step inbox", error);
    if (inbox->memory == NULL) {
        return false;
    }
    inbox->slots = g_new0(InboxSlot, n_slots);
    for (uint32_t i = 0; i < n_slots; i++) {
        inbox->slots[i].data = inbox->memory + i * slot_bytes(message_limit);
    }
    return true;
}

void inbox_clear(Inbox *inbox)
{
    if (inbox->memory != NULL) {
        weft_unmap(inbox->memory, inbox->bytes);
    }
    g_free(inbox->slots);
    *inbox = (Inbox){0};
}

bool inbox_push(Inbox *inbox, uint32_t number, const void *data, size_t size, GError **error)
{
    if (inbox->tail - inbox->head == inbox->n_slots) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "more than %u steps in flight arrived",
                    inbox->n_slots);
        return false;
    }
    if (size > inbox->message_limit) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "step message of %zu bytes exceeds %zu",
                    size, inbox->message_limit);
        return false;
    }
    InboxSlot *slot = &inbox->slots[inbox->tail++ % inbox->n_slots];
    slot->number = number;
    slot->size = size;
    memcpy(slot->data, data, size);
    return true;
}

const InboxSlot *inbox_peek(const Inbox *inbox)
{
    return inbox->head != inbox->tail ? &inbox->slots[inbox->head % inbox->n_slots] : NULL;
}

void inbox_pop(Inbox *inbox)
{
    g_assert(inbox->head != inbox->tail);
    inbox->head++;
}
