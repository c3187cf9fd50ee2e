#include "worker/shard/upload.h"

#include <pthread.h>

enum { SLOTS = 4 };

typedef struct Slot {
    DeviceStream *stream;
    void *pinned;
    bool taken;
} Slot;

struct ShardUpload {
    const Device *device;
    Slot slots[SLOTS];
    pthread_mutex_t mutex; /* taken, status */
    pthread_cond_t given_back;
    DeviceStatus status;
};

ShardUpload *shard_upload_new(const Device *device, size_t slot_bytes, GError **error)
{
    ShardUpload *u = g_new0(ShardUpload, 1);
    u->device = device;
    pthread_mutex_init(&u->mutex, NULL);
    pthread_cond_init(&u->given_back, NULL);
    for (unsigned i = 0; i < SLOTS && u->status == DEVICE_OK; i++) {
        u->status = device->api->stream_new(device->handle, &u->slots[i].stream);
        if (u->status == DEVICE_OK) {
            u->status = device->api->alloc_pinned(device->handle, slot_bytes, &u->slots[i].pinned);
        }
    }
    if (!device_check(device, u->status, "buffers for weights", error)) {
        shard_upload_free(u);
        return NULL;
    }
    return u;
}

void shard_upload_free(ShardUpload *u)
{
    if (u == NULL) {
        return;
    }
    for (unsigned i = 0; i < SLOTS; i++) {
        if (u->slots[i].stream != NULL) {
            u->device->api->stream_free(u->slots[i].stream);
        }
        u->device->api->free_pinned(u->device->handle, u->slots[i].pinned);
    }
    pthread_mutex_destroy(&u->mutex);
    pthread_cond_destroy(&u->given_back);
    g_free(u);
}

static void note(ShardUpload *u, DeviceStatus status)
{
    pthread_mutex_lock(&u->mutex);
    if (u->status == DEVICE_OK) {
        u->status = status;
    }
    pthread_mutex_unlock(&u->mutex);
}

static Slot *free_slot(ShardUpload *u)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        if (!u->slots[i].taken) {
            return &u->slots[i];
        }
    }
    return NULL;
}

static void give_back(ShardUpload *u, Slot *slot)
{
    pthread_mutex_lock(&u->mutex);
    slot->taken = false;
    pthread_cond_signal(&u->given_back);
    pthread_mutex_unlock(&u->mutex);
}

void *shard_upload_take(ShardUpload *u, unsigned *slot_out)
{
    Slot *slot = NULL;
    pthread_mutex_lock(&u->mutex);
    while (u->status == DEVICE_OK && (slot = free_slot(u)) == NULL) {
        pthread_cond_wait(&u->given_back, &u->mutex);
    }
    if (slot != NULL) {
        slot->taken = true;
    }
    pthread_mutex_unlock(&u->mutex);
    if (slot == NULL) {
        return NULL;
    }
    const DeviceStatus status = u->device->api->stream_wait(slot->stream);
    if (status != DEVICE_OK) {
        note(u, status);
        give_back(u, slot);
        return NULL;
    }
    *slot_out = (unsigned)(slot - u->slots);
    return slot->pinned;
}

void shard_upload_send(ShardUpload *u, unsigned index, void *to, size_t to_pitch, size_t bytes,
                       size_t rows)
{
    Slot *slot = &u->slots[index];
    const DeviceStatus status =
        bytes == to_pitch || rows == 1
            ? u->device->api->copy(slot->stream, to, slot->pinned, bytes * rows, DEVICE_COPY_UP)
            : u->device->api->copy_rows(slot->stream, to, to_pitch, slot->pinned, bytes, bytes,
                                        rows, DEVICE_COPY_UP);
    if (status != DEVICE_OK) {
        note(u, status);
    }
    give_back(u, slot);
}

bool shard_upload_finish(ShardUpload *u, GError **error)
{
    DeviceStatus status = u->status;
    for (unsigned i = 0; i < SLOTS && status == DEVICE_OK; i++) {
        status = u->device->api->stream_wait(u->slots[i].stream);
    }
    return device_check(u->device, status, "weights", error);
}
