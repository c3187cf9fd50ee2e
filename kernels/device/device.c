/* What is chosen, how CUDA's module is found and checked, and what a device's failures are called.
 */
#include "kernels/device/device.h"

#include "kernels/device/group.h"
#include "kernels/device/train_ops.h"
#include "kernels/device/use.h"
#include "proto/base/error.h"
#include "proto/base/units.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#ifndef WEFT_MODULE_FOLDER
#define WEFT_MODULE_FOLDER "/usr/local/lib/weft"
#endif
#define CUDA_MODULE "weft-cuda.so"
#define CUDA_DRIVER "libcuda.so.1"

/* ---- names ---- */

const char *device_status_name(DeviceStatus status)
{
    switch (status) {
    case DEVICE_OK:
        return "ok";
    case DEVICE_NOT_READY:
        return "not ready";
    case DEVICE_OUT_OF_MEMORY:
        return "out of memory";
    case DEVICE_UNSUPPORTED:
        return "unsupported";
    case DEVICE_ILLEGAL_ADDRESS:
        return "illegal address";
    case DEVICE_ECC:
        return "uncorrectable memory error";
    case DEVICE_LOST:
        return "lost from the bus";
    case DEVICE_STUCK:
        return "kernel time limit";
    case DEVICE_GROUP_FAILED:
        return "its group of devices has ended";
    case DEVICE_FAILED:
        break;
    }
    return "failed";
}

bool device_status_is_fatal(DeviceStatus status)
{
    return status < DEVICE_UNSUPPORTED && status != DEVICE_GROUP_FAILED;
}

static const char *remedy(DeviceStatus status)
{
    switch (status) {
    case DEVICE_OUT_OF_MEMORY:
        return "other processes may hold its memory: see nvidia-smi, or give --memory less";
    case DEVICE_UNSUPPORTED:
        return "use another device, or a worker with --device cpu";
    case DEVICE_ECC:
        return "restart the worker; if it comes again, have the card replaced";
    case DEVICE_LOST:
        return "see dmesg for NVRM Xid lines; the host may have to be restarted";
    case DEVICE_GROUP_FAILED:
        return "the epoch is over; if it comes again, set WEFT_DEVICE_GROUP=off and report it";
    default:
        return "restart the worker; if it comes again, run tools/gpu-check";
    }
}

static WeftErrorCode code_of(DeviceStatus status)
{
    return status == DEVICE_OUT_OF_MEMORY ? WEFT_ERROR_MEMORY
           : status == DEVICE_UNSUPPORTED ? WEFT_ERROR_IMPOSSIBLE
                                          : WEFT_ERROR_WORKER_LOST;
}

bool device_check(const Device *device, DeviceStatus status, const char *what, GError **error)
{
    if (status == DEVICE_OK) {
        return true;
    }
    const char *text = device->api->error_text(device->handle);
    g_set_error(error, WEFT_ERROR, code_of(status), "%s:%u (%s): %s: %s%s%s%s: %s",
                device->info.kind, device->info.index, device->info.name, what,
                device_status_name(status), *text != '\0' ? " (" : "", text,
                *text != '\0' ? ")" : "", remedy(status));
    return false;
}

char *device_describe(const DeviceInfo *info)
{
    g_autofree char *size = units_format_size(info->memory_bytes);
    return g_strdup_printf("%s:%u (%s, %s)", info->kind, info->index, info->name, size);
}

/* ---- the choice ---- */

/* "0,2,3" or "all", each number once. */
static bool choice_indices(const char *text, DeviceChoice *out)
{
    g_auto(GStrv) parts = g_strsplit(text, ",", -1);
    out->all = strcmp(text, "all") == 0;
    for (char **part = parts; !out->all && *part != NULL; part++) {
        guint64 index;
        if (out->n_indices == DEVICES_LIMIT ||
            !g_ascii_string_to_unsigned(*part, 10, 0, 1023, &index, NULL)) {
            return false;
        }
        for (uint32_t i = 0; i < out->n_indices; i++) {
            if (out->indices[i] == index) {
                return false;
            }
        }
        out->indices[out->n_indices++] = (uint32_t)index;
    }
    out->index = out->indices[0];
    out->indexed = true;
    return out->all || out->n_indices > 0;
}

/* "cpu:N": a worker of a test leads N devices without having any. */
static bool trivial_devices(const char *text, DeviceChoice *out)
{
#ifdef WEFT_FAILPOINTS
    guint64 n;
    if (g_str_has_prefix(text, "cpu:") &&
        g_ascii_string_to_unsigned(text + strlen("cpu:"), 10, 1, DEVICES_LIMIT, &n, NULL)) {
        *out = (DeviceChoice){.kind = DEVICE_KIND_CPU, .indexed = true, .n_indices = (uint32_t)n};
        for (uint32_t i = 0; i < n; i++) {
            out->indices[i] = i;
        }
        return true;
    }
#endif
    (void)text;
    (void)out;
    return false;
}

bool device_choice_parse(const char *text, DeviceChoice *out, GError **error)
{
    *out = (DeviceChoice){.kind = DEVICE_KIND_CPU};
    if (strcmp(text, "cpu") == 0) {
        return true;
    }
    if (strcmp(text, "auto") == 0) {
        out->kind = DEVICE_KIND_AUTO;
        return true;
    }
    if (g_str_has_prefix(text, "cuda")) {
        const char *rest = text + strlen("cuda");
        out->kind = DEVICE_KIND_CUDA;
        if (*rest == '\0') {
            return true;
        }
        if (*rest == ':' && choice_indices(rest + 1, out)) {
            return true;
        }
    }
    if (trivial_devices(text, out)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "device '%s' is not known: say cpu, cuda, cuda:N (N from 0), several as in "
                "cuda:0,1 or cuda:all, or auto",
                text);
    return false;
}

/* ---- the module ---- */

const char *device_driver_missing(void)
{
    static char why[160];
    static gsize asked;
    if (g_once_init_enter(&asked)) {
        void *driver = dlopen(CUDA_DRIVER, RTLD_LAZY | RTLD_LOCAL);
        if (driver == NULL) {
            g_strlcpy(why, "no CUDA driver: " CUDA_DRIVER " is not on this host", sizeof why);
        } else {
            dlclose(driver);
        }
        g_once_init_leave(&asked, 1);
    }
    return why[0] != '\0' ? why : NULL;
}

/* The folder of this program; returned, NULL if the system does not say. */
static char *program_folder(void)
{
    char path[4096];
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0) {
        return NULL;
    }
    path[n] = '\0';
    return g_path_get_dirname(path);
}

/* Where the module is; returned, NULL + error. */
static char *module_path(GError **error)
{
    const char *chosen = g_getenv("WEFT_MODULES");
    g_autofree char *folder = program_folder();
    g_autofree char *beside =
        g_build_filename(folder != NULL ? folder : ".", "..", "kernels", "cuda", NULL);
    const char *folders[] = {beside, WEFT_MODULE_FOLDER};
    if (chosen != NULL) {
        return g_build_filename(chosen, CUDA_MODULE, NULL);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(folders); i++) {
        char *path = g_build_filename(folders[i], CUDA_MODULE, NULL);
        if (g_file_test(path, G_FILE_TEST_EXISTS)) {
            return path;
        }
        g_free(path);
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                "no device: " CUDA_MODULE " is not in %s: build with -Dcuda=enabled, or name its "
                "folder in WEFT_MODULES",
                WEFT_MODULE_FOLDER);
    return NULL;
}

/* Both sides mean the same structs. */
static bool module_fits(const DeviceModule *m, const char *path, GError **error)
{
    if (m != NULL && m->abi == DEVICE_ABI && m->bytes == sizeof(DeviceModule) &&
        m->api->abi == DEVICE_ABI && m->api->bytes == sizeof(DeviceApi) &&
        m->ops->abi == DEVICE_ABI && m->ops->bytes == sizeof(DeviceOps) &&
        m->train_ops->abi == DEVICE_ABI && m->train_ops->bytes == sizeof(DeviceTrainOps) &&

        (m->group == NULL ||
         (m->group->abi == DEVICE_ABI && m->group->bytes == sizeof(DeviceGroupApi)))) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_VERSION,
                "no device: %s speaks version %u of the device tables, this program %u: install "
                "both from one build",
                path, m != NULL ? m->abi : 0, DEVICE_ABI);
    return false;
}

static const DeviceModule *module_load(const char *path, GError **error)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "no device: %s cannot be loaded: %s",
                    path, dlerror());
        return NULL;
    }
    DeviceModuleFn get = NULL;
    *(void **)(&get) = dlsym(library, DEVICE_MODULE_SYMBOL);
    const DeviceModule *module = get != NULL ? get() : NULL;
    if (get == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_VERSION,
                    "no device: %s has no " DEVICE_MODULE_SYMBOL ": it is no module of weft", path);
    }
    if (get == NULL || !module_fits(module, path, error)) {
        dlclose(library);
        return NULL;
    }
    return module;
}

const DeviceModule *device_module_cuda(const char *path, GError **error)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static const DeviceModule *loaded;
    const char *missing = path == NULL ? device_driver_missing() : NULL;
    if (missing != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "no device: %s", missing);
        return NULL;
    }
    if (path != NULL) {
        return module_load(path, error);
    }
    pthread_mutex_lock(&mutex);
    if (loaded == NULL) {
        g_autofree char *found = module_path(error);
        loaded = found != NULL ? module_load(found, error) : NULL;
    }
    const DeviceModule *module = loaded;
    pthread_mutex_unlock(&mutex);
    return module;
}

/* ---- opening ---- */

Device *device_open_module(const DeviceModule *module, uint32_t index, GError **error)
{
    char why[256] = "";
    const uint32_t n = module->api->count(why);
    if (n == 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "no device: %s", why);
        return NULL;
    }
    if (index >= n) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "device %s:%u is not there: this host has %u, numbered from 0",
                    module->api->kind, index, n);
        return NULL;
    }
    Device *device = g_new0(Device, 1);
    *device = (Device){.api = module->api,
                       .ops = module->ops,
                       .group = module->group,
                       .train_ops = module->train_ops,
                       .info.index = index};
    g_strlcpy(device->info.kind, module->api->kind, sizeof device->info.kind);
    g_strlcpy(device->info.name, "not opened", sizeof device->info.name);
    DeviceStatus status = module->api->open(index, &device->handle);
    if (status == DEVICE_OK) {
        status = module->api->info(device->handle, &device->info);
    }
    if (!device_check(device, status, "opening", error)) {
        device_free(device);
        return NULL;
    }
    device->use = device_use_new(device);
    return device;
}

Device *device_open(const DeviceChoice *choice, GError **error)
{
    if (choice->kind == DEVICE_KIND_CPU) {
        return device_open_module(device_module_cpu(), 0, error);
    }
    g_autoptr(GError) why = NULL;
    const DeviceModule *module = device_module_cuda(NULL, &why);
    Device *device = module != NULL ? device_open_module(module, choice->index, &why) : NULL;
    if (device == NULL && choice->kind == DEVICE_KIND_AUTO) {
        return device_open_module(device_module_cpu(), 0, error);
    }
    if (device == NULL) {
        g_propagate_error(error, g_steal_pointer(&why));
    }
    return device;
}

GPtrArray *device_open_all(const DeviceChoice *choice, GError **error)
{
    DeviceChoice one = *choice;
    g_autoptr(GPtrArray) all = g_ptr_array_new_with_free_func((GDestroyNotify)device_free);
    uint32_t n = MAX(choice->n_indices, 1u);
    if (choice->all) {
        const DeviceModule *module = device_module_cuda(NULL, error);
        char why[256];
        if (module == NULL) {
            return NULL;
        }
        n = MAX(MIN(module->api->count(why), DEVICES_LIMIT), 1u); /* none: opening says why */
    }
    for (uint32_t i = 0; i < n; i++) {
        one.index = choice->n_indices > 0 ? choice->indices[i] : choice->all ? i : choice->index;
        Device *device = one.kind == DEVICE_KIND_CPU
                             ? device_open_module(device_module_cpu(), one.index, error)
                             : device_open(&one, error);
        if (device == NULL) {
            return NULL;
        }
        g_ptr_array_add(all, device);
    }
    return g_steal_pointer(&all);
}

void device_free(Device *device)
{
    if (device != NULL) {
        device->api->close(device->handle);
        g_free(device->use);
        g_free(device);
    }
}
