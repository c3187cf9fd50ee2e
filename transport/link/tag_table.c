#include "transport/link/tag_table.h"

#include <string.h>

typedef struct EarlyQueue {
    uint64_t tag; /* the key */
    EarlyDatagram *head, **tail;
    unsigned n;
} EarlyQueue;

static void early_list_free(EarlyDatagram *list)
{
    while (list != NULL) {
        EarlyDatagram *next = list->next;
        g_free(list);
        list = next;
    }
}

static void early_queue_free(gpointer data)
{
    EarlyQueue *queue = data;
    early_list_free(queue->head);
    g_free(queue);
}

void tag_table_init(TagTable *table)
{
    memset(table, 0, sizeof *table);
    table->connected = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, NULL);
    table->early = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL, early_queue_free);
    table->ready_tail = &table->ready;
}

void tag_table_clear(TagTable *table)
{
    g_clear_pointer(&table->connected, g_hash_table_unref);
    g_clear_pointer(&table->early, g_hash_table_unref);
    early_list_free(table->ready);
    table->ready = NULL;
    table->ready_tail = &table->ready;
}

static bool is_retired(const TagTable *table, uint64_t tag)
{
    unsigned n = MIN(table->n_retired, TAG_RETIRED_LIMIT);
    for (unsigned i = 0; i < n; i++) {
        if (table->retired[i] == tag) {
            return true;
        }
    }
    return false;
}

bool tag_table_add(TagTable *table, uint64_t tag, LinkRaw *raw)
{
    if (g_hash_table_contains(table->connected, &tag)) {
        return false;
    }
    g_hash_table_insert(table->connected, g_memdup2(&tag, sizeof tag), raw);
    EarlyQueue *queue = g_hash_table_lookup(table->early, &tag);
    if (queue != NULL) {
        *table->ready_tail = queue->head;
        table->ready_tail = queue->tail;
        queue->head = NULL;
        g_hash_table_remove(table->early, &tag);
    }
    return true;
}

void tag_table_remove(TagTable *table, uint64_t tag)
{
    if (g_hash_table_remove(table->connected, &tag)) {
        table->retired[table->n_retired++ % TAG_RETIRED_LIMIT] = tag;
    }
}

LinkRaw *tag_table_find(const TagTable *table, uint64_t tag)
{
    return g_hash_table_lookup(table->connected, &tag);
}

bool tag_table_keep(TagTable *table, uint64_t tag, const void *data, size_t size)
{
    EarlyQueue *queue = g_hash_table_lookup(table->early, &tag);
    bool full = queue != NULL ? queue->n >= TAG_EARLY_LIMIT
                              : g_hash_table_size(table->early) >= TAG_EARLY_TAGS;
    if (full || size > TAG_EARLY_BYTES - table->early_bytes || is_retired(table, tag)) {
        return false;
    }
    EarlyDatagram *datagram = g_try_malloc(sizeof *datagram + size);
    if (datagram == NULL) {
        return false;
    }
    *datagram = (EarlyDatagram){.tag = tag, .size = size};
    memcpy(datagram->data, data, size);
    if (queue == NULL) {
        queue = g_new0(EarlyQueue, 1);
        queue->tag = tag;
        queue->tail = &queue->head;
        g_hash_table_insert(table->early, &queue->tag, queue);
    }
    *queue->tail = datagram;
    queue->tail = &datagram->next;
    queue->n++;
    table->early_bytes += size;
    return true;
}

bool tag_table_has_ready(const TagTable *table)
{
    return table->ready != NULL;
}

static EarlyDatagram *take_ready(TagTable *table)
{
    EarlyDatagram *datagram = table->ready;
    if (datagram != NULL) {
        table->ready = datagram->next;
        if (table->ready == NULL) {
            table->ready_tail = &table->ready;
        }
        table->early_bytes -= datagram->size;
    }
    return datagram;
}

unsigned tag_table_deliver(TagTable *table, const LinkRawEvents *events, void *user)
{
    unsigned n = 0;
    for (EarlyDatagram *early; (early = take_ready(table)) != NULL; n++) {
        events->receive(tag_table_find(table, early->tag), early->data, early->size, user);
        g_free(early);
    }
    return n;
}
