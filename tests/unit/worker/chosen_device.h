/* The device that a test of a device runs on: the trivial one; or that of WEFT_TEST_DEVICE, as
 * tools/gpu-check has it. Fails the test where there is none. */
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <setjmp.h>

#include <cmocka.h>

#include "kernels/device/device.h"

static inline Device *chosen_device(void)
{
    DeviceChoice choice = {.kind = DEVICE_KIND_CPU};
    g_autoptr(GError) error = NULL;
    const char *said = g_getenv("WEFT_TEST_DEVICE");
    if (said != NULL && !device_choice_parse(said, &choice, &error)) {
        fail_msg("%s", error->message);
    }
    Device *device = device_open(&choice, &error);
    if (device == NULL) {
        fail_msg("%s", error->message);
    }
    return device;
}
