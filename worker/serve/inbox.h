/* Inbox: steps that have arrived and wait for their turn, copied out of the link's buffers into one
 * mapping whose size is known from the plan. Engine thread. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct InboxSlot {
    uint32_t number; /* of the step */
    size_t size;
    uint8_t *data; /* 64-byte aligned */
} InboxSlot;

typedef struct Inbox {
    InboxSlot *slots;
    uint32_t n_slots, head, tail; /* head = next to run */
    uint8_t *memory;
    size_t message_limit, bytes;
} Inbox;

/* Bytes that an inbox of n_slots messages of at most message_limit bytes maps. */
size_t inbox_bytes(uint32_t n_slots, size_t message_limit);
bool inbox_open(Inbox *inbox, uint32_t n_slots, size_t message_limit, GError **error);
void inbox_clear(Inbox *inbox); /* of a zeroed or opened inbox */
/* PROTOCOL error when the peer sends more steps, or longer ones, than the plan allows. */
bool inbox_push(Inbox *inbox, uint32_t number, const void *data, size_t size, GError **error);
/* The oldest; NULL = empty. Valid until inbox_pop(). */
const InboxSlot *inbox_peek(const Inbox *inbox);
void inbox_pop(Inbox *inbox);
