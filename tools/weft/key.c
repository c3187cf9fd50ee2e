/* weft key: API keys of the HTTP interface. */
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <stdio.h>
#include <string.h>

typedef struct KeyOptions {
    CommonOptions common;
} KeyOptions;

static const Option KEY_OPTIONS[] = {COMMON_OPTIONS(KeyOptions), {0}};

static int key_create(const CommonOptions *common, const char *name)
{
    GError *error = NULL;
    Weft__V1__CreateKeyRequest request = WEFT__V1__CREATE_KEY_REQUEST__INIT;
    Weft__V1__CreateKeyResponse *response;
    request.name = (char *)name;
    if (!admin_call(common, "CreateKey", &request.base, (ProtobufCMessage **)&response, &error)) {
        return cli_fail(error);
    }
    if (common->json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:s,s:s}", "name", name, "key", response->key));
        cli_print_json(object);
    } else {
        printf("%s\n", response->key);
        if (!common->quiet) {
            fprintf(stderr, "send it as `Authorization: Bearer KEY`; it is not kept and cannot be "
                            "shown again\n");
        }
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return 0;
}

static int key_revoke(const CommonOptions *common, const char *name)
{
    GError *error = NULL;
    Weft__V1__RevokeKeyRequest request = WEFT__V1__REVOKE_KEY_REQUEST__INIT;
    ProtobufCMessage *response;
    request.name = (char *)name;
    if (!admin_call(common, "RevokeKey", &request.base, &response, &error)) {
        return cli_fail(error);
    }
    if (!common->quiet) {
        fprintf(stderr, "key %s is revoked\n", name);
    }
    protobuf_c_message_free_unpacked(response, NULL);
    return 0;
}

static void print_keys(const Weft__V1__ListKeysResponse *response)
{
    static const char *const header[] = {"NAME", "SHA-256", "AGE", NULL};
    TextTable *table = text_table_new(header);
    for (size_t i = 0; i < response->n_keys; i++) {
        const Weft__V1__ApiKey *key = response->keys[i];
        g_autofree char *age =
            units_format_duration(g_get_real_time() - (int64_t)key->created * G_USEC_PER_SEC);
        g_autofree char *hash = g_strconcat(key->hash, "...", NULL);
        text_table_row(table, key->name, hash, age, NULL);
    }
    text_table_print(table);
}

static int key_list(const CommonOptions *common)
{
    GError *error = NULL;
    Weft__V1__ListKeysRequest request = WEFT__V1__LIST_KEYS_REQUEST__INIT;
    Weft__V1__ListKeysResponse *response;
    if (!admin_call(common, "ListKeys", &request.base, (ProtobufCMessage **)&response, &error)) {
        return cli_fail(error);
    }
    if (common->json) {
        json_t *object = cli_json_new(), *keys = json_array();
        for (size_t i = 0; i < response->n_keys; i++) {
            json_array_append_new(keys,
                                  json_pack("{s:s,s:I}", "name", response->keys[i]->name, "created",
                                            (json_int_t)response->keys[i]->created));
        }
        json_object_set_new(object, "keys", keys);
        cli_print_json(object);
    } else {
        print_keys(response);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return 0;
}

static int key_run(const Verb *verb, void *values, GPtrArray *rest)
{
    KeyOptions *o = values;
    const char *what = rest->len > 0 ? rest->pdata[0] : "";
    const char *name = rest->len > 1 ? rest->pdata[1] : NULL;
    if (strcmp(what, "list") == 0 && rest->len == 1) {
        return key_list(&o->common);
    }
    const bool create = strcmp(what, "create") == 0, revoke = strcmp(what, "revoke") == 0;
    if ((!create && !revoke) || rest->len != 2) {
        return cli_usage(verb, "`create NAME`, `list` or `revoke NAME` is expected");
    }
    if (o->common.dry_run) {
        printf("would %s the key %s\n", what, name);
        return 0;
    }
    return create ? key_create(&o->common, name) : key_revoke(&o->common, name);
}

const Verb VERB_KEY = {"key",
                       "create NAME | list | revoke NAME",
                       "API keys of the HTTP interface",
                       KEY_OPTIONS,
                       sizeof(KeyOptions),
                       NULL,
                       key_run};
