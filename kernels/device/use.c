#include "kernels/device/use.h"

/* Free and allocated together: what neither has is beside. 0: the device does not say, or something
 * was allocated meanwhile. */
static uint64_t reachable(const Device *device)
{
    uint64_t left, total;
    const uint64_t taken = device->api->taken(device->handle);
    return taken != UINT64_MAX && device->api->memory(device->handle, &left, &total) == DEVICE_OK &&
                   device->api->taken(device->handle) == taken
               ? left + taken
               : 0;
}

static void raise_to(atomic_uint_fast64_t *most, uint64_t value)
{
    uint_fast64_t before = atomic_load(most);
    while (value > before && value <= DEVICE_USE_LIMIT &&
           !atomic_compare_exchange_weak(most, &before, value)) {
    }
}

DeviceUse *device_use_new(const Device *device)
{
    DeviceUse *use = g_new0(DeviceUse, 1);
    use->free_at_open = reachable(device);
    return use;
}

void device_use_note(const Device *device)
{
    DeviceUse *use = device->use;
    const uint64_t now = use != NULL ? reachable(device) : 0;
    const uint64_t known = use != NULL ? now + atomic_load(&use->groups) : 0;
    if (now > 0 && use->free_at_open > known) {
        raise_to(&use->rank, use->free_at_open - known);
    }
}

void device_use_step(const Device *device, uint64_t n)
{
    if ((n & (n - 1)) == 0) {
        device_use_note(device);
    }
}

uint64_t device_use_group_begins(const Device *device)
{
    return device->use != NULL ? reachable(device) : 0;
}

uint64_t device_use_group_joined(const Device *device, uint64_t before)
{
    const uint64_t now = device->use != NULL ? reachable(device) : 0;
    const uint64_t bytes = now > 0 && before > now ? before - now : 0;
    if (bytes == 0 || bytes > DEVICE_USE_LIMIT) {
        return 0;
    }
    raise_to(&device->use->group, bytes);
    atomic_fetch_add(&device->use->groups, bytes);
    return bytes;
}

void device_use_group_ended(const Device *device, uint64_t bytes)
{
    if (device->use != NULL) {
        atomic_fetch_sub(&device->use->groups, bytes);
    }
}
