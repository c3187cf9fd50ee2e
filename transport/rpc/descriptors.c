#include "transport/rpc/descriptors.h"

#include "transport/rpc/descriptor_set.pb-c.h"
#include "transport/rpc/rpc.h"

typedef struct FileEntry {
    GBytes *bytes;
    char **imports;
} FileEntry;

typedef struct Descriptors {
    GHashTable *files;   /* name -> FileEntry */
    GHashTable *symbols; /* full name -> file name (owned by files) */
    GHashTable *methods; /* path -> MethodFlags */
} Descriptors;

static char *join_name(const char *scope, const char *name)
{
    return *scope ? g_strconcat(scope, ".", name, NULL) : g_strdup(name);
}

static void add_symbol(Descriptors *self, char *symbol, const char *file_name)
{
    g_hash_table_insert(self->symbols, symbol, (void *)file_name);
}

static void add_enums(Descriptors *self, const char *scope, Weft__Descriptor__EnumType **enums,
                      size_t n, const char *file_name)
{
    for (size_t i = 0; i < n; i++) {
        add_symbol(self, join_name(scope, enums[i]->name), file_name);
    }
}

static void add_messages(Descriptors *self, const char *scope,
                         Weft__Descriptor__MessageType **messages, size_t n, const char *file_name)
{
    for (size_t i = 0; i < n; i++) {
        char *name = join_name(scope, messages[i]->name);
        add_symbol(self, name, file_name);
        add_messages(self, name, messages[i]->nested_type, messages[i]->n_nested_type, file_name);
        add_enums(self, name, messages[i]->enum_type, messages[i]->n_enum_type, file_name);
    }
}

static void add_service(Descriptors *self, const char *scope,
                        const Weft__Descriptor__Service *service, const char *file_name)
{
    char *name = join_name(scope, service->name);
    add_symbol(self, name, file_name);
    for (size_t i = 0; i < service->n_method; i++) {
        const Weft__Descriptor__Method *method = service->method[i];
        MethodFlags *flags = g_new(MethodFlags, 1);
        *flags = (MethodFlags){method->client_streaming, method->server_streaming};
        g_hash_table_insert(self->methods, g_strdup_printf("/%s/%s", name, method->name), flags);
        add_symbol(self, join_name(name, method->name), file_name);
    }
}

static void add_file(Descriptors *self, const ProtobufCBinaryData *raw)
{
    Weft__Descriptor__File *file = weft__descriptor__file__unpack(NULL, raw->len, raw->data);
    g_assert(file != NULL); /* protoc wrote it at build time */
    if (!g_hash_table_contains(self->files, file->name)) {
        FileEntry *entry = g_new0(FileEntry, 1);
        entry->bytes = g_bytes_new(raw->data, raw->len);
        entry->imports = g_new0(char *, file->n_dependency + 1);
        for (size_t i = 0; i < file->n_dependency; i++) {
            entry->imports[i] = g_strdup(file->dependency[i]);
        }
        char *name = g_strdup(file->name);
        g_hash_table_insert(self->files, name, entry);
        add_messages(self, file->package, file->message_type, file->n_message_type, name);
        add_enums(self, file->package, file->enum_type, file->n_enum_type, name);
        for (size_t i = 0; i < file->n_service; i++) {
            add_service(self, file->package, file->service[i], name);
        }
    }
    weft__descriptor__file__free_unpacked(file, NULL);
}

static void add_set(Descriptors *self, const uint8_t *bytes, size_t n_bytes)
{
    Weft__Descriptor__FileSet *set = weft__descriptor__file_set__unpack(NULL, n_bytes, bytes);
    g_assert(set != NULL);
    for (size_t i = 0; i < set->n_file; i++) {
        add_file(self, &set->file[i]);
    }
    weft__descriptor__file_set__free_unpacked(set, NULL);
}

static Descriptors *get_descriptors(void)
{
    static Descriptors *self;
    static gsize once;
    if (g_once_init_enter(&once)) {
        self = g_new0(Descriptors, 1);
        self->files = g_hash_table_new(g_str_hash, g_str_equal);
        self->symbols = g_hash_table_new(g_str_hash, g_str_equal);
        self->methods = g_hash_table_new(g_str_hash, g_str_equal);
        add_set(self, weft_descriptor_set, weft_descriptor_set_size);
        g_once_init_leave(&once, 1);
    }
    return self;
}

void descriptors_add(const uint8_t *set, size_t n_bytes)
{
    add_set(get_descriptors(), set, n_bytes);
}

bool descriptors_method(const char *path, MethodFlags *out)
{
    const MethodFlags *flags = g_hash_table_lookup(get_descriptors()->methods, path);
    if (flags) {
        *out = *flags;
    }
    return flags != NULL;
}

static void collect(Descriptors *self, const char *name, GHashTable *seen, GPtrArray *out)
{
    FileEntry *entry = g_hash_table_lookup(self->files, name);
    if (!entry || !g_hash_table_add(seen, (void *)name)) {
        return;
    }
    g_ptr_array_add(out, g_bytes_ref(entry->bytes));
    for (char **import = entry->imports; *import; import++) {
        collect(self, *import, seen, out);
    }
}

GPtrArray *descriptors_file(const char *name)
{
    Descriptors *self = get_descriptors();
    if (!g_hash_table_contains(self->files, name)) {
        return NULL;
    }
    GPtrArray *out = g_ptr_array_new_with_free_func((GDestroyNotify)g_bytes_unref);
    g_autoptr(GHashTable) seen = g_hash_table_new(g_str_hash, g_str_equal);
    collect(self, name, seen, out);
    return out;
}

GPtrArray *descriptors_symbol(const char *symbol)
{
    const char *name = g_hash_table_lookup(get_descriptors()->symbols, symbol);
    return name ? descriptors_file(name) : NULL;
}
