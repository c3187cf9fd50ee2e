#include "transport/link/ucx_memory.h"

#include <glib.h>
#include <ucp/api/ucp.h>

#define MEMORY_SIZE 160

static ucs_status_t memory_types(uint64_t *out)
{
    const ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                                 .features = UCP_FEATURE_AM};
    ucp_context_attr_t attributes = {.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES};
    ucp_config_t *config;
    ucp_context_h context;
    ucs_status_t status = ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) {
        return status;
    }
    status = ucp_init(&params, config, &context);
    ucp_config_release(config);
    if (status != UCS_OK) {
        return status;
    }
    status = ucp_context_query(context, &attributes);
    *out = attributes.memory_types;
    ucp_cleanup(context);
    return status;
}

bool link_ucx_knows_cuda(char *why)
{
    uint64_t types = 0;
    const ucs_status_t status = memory_types(&types);
    const bool knows = status == UCS_OK && (types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
    const bool direct = g_file_test("/sys/module/nvidia_peermem", G_FILE_TEST_EXISTS);
    if (status != UCS_OK) {
        g_snprintf(why, MEMORY_SIZE, "UCX does not start: %s", ucs_status_string(status));
    } else if (!knows) {
        g_strlcpy(why, "UCX has no CUDA transport here", MEMORY_SIZE);
    } else {
        g_snprintf(why, MEMORY_SIZE,
                   "UCX has its CUDA transports, the kernel module nvidia_peermem is %s",
                   direct ? "loaded" : "not loaded");
    }
    return knows;
}
