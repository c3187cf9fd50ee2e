/* One task a model: resolve the name, open and check the file, hash its slices (or take the
 * manifest that was computed for the same path, sizes and times), load vocabulary and template.
 * Tasks for the same name wait for the first.
 *
 * 1. `open` has at most one entry a name; an entry is LOADING (waiters) or has its Model and the
 * identity of the files it was read from.
 * 2. A Model is immutable once published; requests hold references, so that a replaced file does
 * not pull the old mapping away.
 * 3. Pool threads see only the task and, under its lock, the manifest table.
 * 4. A model whose files turn out not to have its slices is stale: it serves nobody again, its
 * manifest is forgotten, and its name is read anew at the next open; also by a task that began
 * before, and relied on either. */
#include "coordinator/jobs/models.h"

#include "proto/base/error.h"
#include "proto/model/model_message.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define HASH_BYTES 16u

struct Models {
    WorkPool *pool;
    Store *store;
    char *dir;
    GHashTable *open;      /* name -> ModelEntry */
    GMutex lock;           /* manifests */
    GHashTable *manifests; /* identity -> GBytes */
};

typedef struct ModelWaiter {
    ModelOpened done;
    void *user;
} ModelWaiter;

typedef struct ModelEntry {
    Model *model;
    char *identity;
    bool loading, stale;
    GArray *waiters; /* of ModelWaiter */
} ModelEntry;

typedef struct ModelTask {
    Models *models;
    char *name, *dir;
    char *known_identity; /* of the entry's model: unchanged = nothing to do */
    /* results */
    Model *model;
    char *identity;
    GBytes *taken;    /* the manifest that was known; NULL: none */
    GBytes *manifest; /* new, to be stored */
    GError *error;
} ModelTask;

Model *model_ref(Model *model)
{
    g_atomic_ref_count_inc(&model->refs);
    return model;
}

void model_unref(Model *model)
{
    if (model == NULL || !g_atomic_ref_count_dec(&model->refs)) {
        return;
    }
    if (model->chat != NULL) {
        chat_template_free(model->chat);
    }
    if (model->tokenizer != NULL) {
        tokenizer_free(model->tokenizer);
    }
    g_clear_error(&model->chat_error);
    g_clear_error(&model->tokenizer_error);
    model_spec_free(model->spec);
    model_files_free(model->files);
    g_free(model->slice_hashes);
    g_free(model->first_slice);
    g_free(model->name);
    g_free(model->path);
    g_free(model->root);
    g_free(model);
}

static uint8_t *slice_hash(const Model *model, uint32_t tensor, uint32_t slice)
{
    return model->slice_hashes + (size_t)(model->first_slice[tensor] + slice) * HASH_BYTES;
}

/* Of a file, beneath the directory (NULL: it went away while the file was opened). */
static char *inner_path(const char *root, const char *path)
{
    const size_t n = root == NULL || strcmp(root, "/") == 0 ? 0 : strlen(root);
    return root != NULL && strncmp(path, root, n) == 0 && path[n] == '/'
               ? g_strdup(path + n + 1)
               : g_path_get_basename(path);
}

Weft__V1__Model *model_message(const Model *model, bool with_tensors)
{
    const ModelSpec *spec = model->spec;
    Weft__V1__Model *message = model_to_message(spec, with_tensors);
    for (uint32_t i = 0; with_tensors && i < spec->n_tensors; i++) {
        model_message_set_hashes(message, i, (const Hash128 *)slice_hash(model, i, 0),
                                 spec->tensors[i].n_slices);
    }
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);
    for (uint32_t i = 0; model_files_are_raw(model->files) && i < model_files_n(model->files);
         i++) {
        g_ptr_array_add(names, inner_path(model->root, model_files_path(model->files, i)));
    }
    model_message_set_files(message, (const char *const *)names->pdata, names->len);
    return message;
}

bool model_copy_slice(const Model *model, uint32_t tensor, uint32_t slice, uint8_t *out,
                      bool *changed, GError **error)
{
    *changed = false;
    if (!model_files_copy_slice(model->files, model->spec, tensor, slice, out, error)) {
        return false;
    }
    const TensorSpec *spec = &model->spec->tensors[tensor];
    const Hash128 hash = hash128(out, model_spec_slice_bytes(model->spec, spec, slice));
    *changed = memcmp(hash.bytes, slice_hash(model, tensor, slice), HASH_BYTES) != 0;
    return !*changed;
}

/* ---- names ---- */

static char *resolve_existing(const char *path)
{
    char *real = realpath(path, NULL);
    char *copy = g_strdup(real);
    free(real);
    return copy;
}

/* Returned. */
static char *models_resolve(const char *dir, const char *name, GError **error)
{
    if (dir == NULL) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
            "model %s: this coordinator has no models directory: start it with --models DIR", name);
        return NULL;
    }
    g_autofree char *root = resolve_existing(dir);
    if (root == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "models directory %s: %s: start the coordinator with another --models", dir,
                    g_strerror(errno));
        return NULL;
    }
    g_autofree char *wished =
        g_path_is_absolute(name) ? g_strdup(name) : g_build_filename(root, name, NULL);
    g_autofree char *real = resolve_existing(wished);
    if (real == NULL && !g_str_has_suffix(wished, ".gguf")) {
        g_autofree char *with_suffix = g_strconcat(wished, ".gguf", NULL);
        real = resolve_existing(with_suffix);
    }
    if (real == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "no such model file: %s: looked under %s on the coordinator's host", name,
                    root);
        return NULL;
    }
    size_t n = strlen(root);
    bool inside = strncmp(real, root, n) == 0 && (real[n] == '/' || strcmp(root, "/") == 0);
    if (!inside) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                    "model %s lies outside the models directory %s: move it there, or start the "
                    "coordinator with another --models",
                    name, root);
        return NULL;
    }
    struct stat st;
    g_autofree char *config = g_build_filename(real, "config.json", NULL);
    if (stat(real, &st) != 0 ||
        !(S_ISREG(st.st_mode) ||
          (S_ISDIR(st.st_mode) && g_file_test(config, G_FILE_TEST_IS_REGULAR)))) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s is not a regular file, nor a directory with a config.json: name a "
                    "GGUF file or a Hugging Face directory (weft export makes one of a checkpoint)",
                    name);
        return NULL;
    }
    return g_steal_pointer(&real);
}

/* ---- on the pool ---- */

static bool identity_add(GString *out, const char *path, GError **error)
{
    struct stat st;
    if (stat(path, &st) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "model file %s: %s", path,
                    g_strerror(errno));
        return false;
    }
    g_string_append_printf(out, "%s %" G_GINT64_FORMAT " %" G_GINT64_FORMAT ".%09ld;", path,
                           (gint64)st.st_size, (gint64)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    return true;
}

static char *files_identity(const ModelFiles *files, GError **error)
{
    g_autoptr(GString) text = g_string_new(NULL);
    for (uint32_t i = 0; i < model_files_n(files); i++) {
        if (!identity_add(text, model_files_path(files, i), error)) {
            return NULL;
        }
    }
    return g_string_free(g_steal_pointer(&text), FALSE);
}

/* The files that a known identity names are as they were. */
static bool identity_holds(const char *identity)
{
    g_auto(GStrv) parts = g_strsplit(identity, ";", -1);
    for (char **part = parts; *part != NULL && **part != '\0'; part++) {
        g_autoptr(GString) now = g_string_new(NULL);
        char *space = strrchr(*part, ' ');
        g_autofree char *path = NULL;
        if (space != NULL) {
            path = g_strndup(*part, (gsize)(space - *part));
            char *second = strrchr(path, ' ');
            if (second != NULL) {
                *second = '\0';
            }
        }
        g_autofree char *expected = g_strconcat(*part, ";", NULL);
        if (path == NULL || !identity_add(now, path, NULL) || strcmp(now->str, expected) != 0) {
            return false;
        }
    }
    return true;
}

static bool model_index_slices(Model *model, GError **error)
{
    const ModelSpec *spec = model->spec;
    uint64_t n = 0;
    model->first_slice = g_new0(uint32_t, spec->n_tensors + 1);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        n += spec->tensors[i].n_slices;
        if (n > UINT32_MAX / HASH_BYTES) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "model %s has more than %u slices",
                        model->name, UINT32_MAX / HASH_BYTES);
            return false;
        }
        model->first_slice[i + 1] = (uint32_t)n;
    }
    return true;
}

static size_t largest_slice(const ModelSpec *spec)
{
    size_t largest = 0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        for (uint32_t s = 0; s < spec->tensors[i].n_slices; s++) {
            largest = MAX(largest, model_spec_slice_bytes(spec, &spec->tensors[i], s));
        }
    }
    return largest;
}

/* Hashes of a model, by several threads: job 0 is the whole of its files, job 1 + i tensor i. */
typedef struct Hashing {
    Model *model;
    size_t largest; /* bytes of a slice */
    gint next;      /* job */
    GMutex lock;
    GError *error; /* the first one; ends it */
} Hashing;

#define HASH_THREADS 8u

static void hashing_fail(Hashing *h, GError *error)
{
    g_mutex_lock(&h->lock);
    if (h->error == NULL) {
        h->error = error;
    } else {
        g_error_free(error);
    }
    g_mutex_unlock(&h->lock);
    g_atomic_int_set(&h->next, G_MAXINT / 2);
}

static bool hash_tensor(const Model *model, uint32_t i, uint8_t *buffer, GError **error)
{
    const TensorSpec *tensor = &model->spec->tensors[i];
    for (uint32_t s = 0; s < tensor->n_slices; s++) {
        if (!model_files_copy_slice(model->files, model->spec, i, s, buffer, error)) {
            return false;
        }
        Hash128 hash = hash128(buffer, model_spec_slice_bytes(model->spec, tensor, s));
        memcpy(slice_hash(model, i, s), hash.bytes, HASH_BYTES);
    }
    return true;
}

static void *hashing_run(void *user)
{
    Hashing *h = user;
    Model *model = h->model;
    GError *error = NULL;
    g_autofree uint8_t *buffer = g_try_malloc(h->largest);
    if (buffer == NULL) {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_MEMORY, "no memory for a slice of model %s",
                    model->name);
    }
    for (guint job;
         error == NULL && (job = (guint)g_atomic_int_add(&h->next, 1)) <= model->spec->n_tensors;) {
        if (job == 0) {
            model_files_hash(model->files, &model->spec->file_hash, &error);
        } else {
            hash_tensor(model, job - 1, buffer, &error);
        }
    }
    if (error != NULL) {
        hashing_fail(h, error);
    }
    return NULL;
}

static bool model_hash_slices(Model *model, GError **error)
{
    Hashing h = {.model = model, .largest = largest_slice(model->spec)};
    GThread *threads[HASH_THREADS];
    const guint n = MIN(g_get_num_processors(), HASH_THREADS) - 1; /* beside this one */
    g_mutex_init(&h.lock);
    model->slice_hashes = g_malloc0((gsize)model->first_slice[model->spec->n_tensors] * HASH_BYTES);
    for (guint i = 0; i < n; i++) {
        threads[i] = g_thread_try_new("hash", hashing_run, &h, NULL); /* or this one does all */
    }
    hashing_run(&h);
    for (guint i = 0; i < n; i++) {
        if (threads[i] != NULL) {
            g_thread_join(threads[i]);
        }
    }
    g_mutex_clear(&h.lock);
    if (h.error != NULL) {
        g_propagate_error(error, h.error);
    }
    return h.error == NULL;
}

static bool model_take_manifest(Model *model, GBytes *manifest)
{
    gsize size;
    const uint8_t *data = g_bytes_get_data(manifest, &size);
    size_t expected = ((size_t)model->first_slice[model->spec->n_tensors] + 1) * HASH_BYTES;
    if (size != expected) {
        return false;
    }
    memcpy(model->spec->file_hash.bytes, data, HASH_BYTES);
    model->slice_hashes = g_memdup2(data + HASH_BYTES, size - HASH_BYTES);
    return true;
}

static GBytes *model_manifest(const Model *model)
{
    size_t n = (size_t)model->first_slice[model->spec->n_tensors] * HASH_BYTES;
    GByteArray *bytes = g_byte_array_sized_new((guint)(n + HASH_BYTES));
    g_byte_array_append(bytes, model->spec->file_hash.bytes, HASH_BYTES);
    g_byte_array_append(bytes, model->slice_hashes, (guint)n);
    return g_byte_array_free_to_bytes(bytes);
}

static void model_load_text(Model *model)
{
    const char *source;
    size_t length;
    model->tokenizer = model_files_tokenizer(model->files, &model->tokenizer_error);
    if (model_files_chat_template(model->files, &source, &length, &model->chat_error)) {
        model->chat = chat_template_parse(source, length, &model->chat_error);
    }
}

static Model *model_load(ModelTask *task, const char *path)
{
    Model *model = g_new0(Model, 1);
    g_atomic_ref_count_init(&model->refs);
    model->path = g_strdup(path);
    model->root = resolve_existing(task->dir);
    model->files = model_files_open(path, &task->error);
    model->spec = model->files != NULL ? model_files_spec(model->files, &task->error) : NULL;
    task->identity = model->spec != NULL ? files_identity(model->files, &task->error) : NULL;
    if (task->identity == NULL) {
        model_unref(model);
        return NULL;
    }
    model->name = g_strdup(model->spec->name);
    Models *models = task->models;
    g_mutex_lock(&models->lock);
    GBytes *known = g_hash_table_lookup(models->manifests, task->identity);
    task->taken = known != NULL ? g_bytes_ref(known) : NULL;
    g_mutex_unlock(&models->lock);
    bool ok = model_index_slices(model, &task->error);
    if (ok && (task->taken == NULL || !model_take_manifest(model, task->taken))) {
        ok = model_hash_slices(model, &task->error);
        task->manifest = ok ? model_manifest(model) : NULL;
    }
    if (!ok) {
        model_unref(model);
        return NULL;
    }
    model_load_text(model);
    return model;
}

static void model_task_work(void *user)
{
    ModelTask *task = user;
    if (task->known_identity != NULL && identity_holds(task->known_identity)) {
        return;
    }
    g_autofree char *path = models_resolve(task->dir, task->name, &task->error);
    if (path != NULL) {
        task->model = model_load(task, path);
    }
}

/* ---- on the loop ---- */

static void model_entry_free(void *data)
{
    ModelEntry *entry = data;
    model_unref(entry->model);
    g_free(entry->identity);
    g_array_unref(entry->waiters);
    g_free(entry);
}

static void model_task_clear(ModelTask *task)
{
    g_clear_pointer(&task->model, model_unref);
    g_clear_pointer(&task->identity, g_free);
    g_clear_pointer(&task->taken, g_bytes_unref);
    g_clear_pointer(&task->manifest, g_bytes_unref);
    g_clear_error(&task->error);
}

static void model_task_free(void *user)
{
    ModelTask *task = user;
    model_task_clear(task);
    g_free(task->known_identity);
    g_free(task->name);
    g_free(task->dir);
    g_free(task);
}

static void models_publish(Models *models, ModelTask *task, ModelEntry *entry)
{
    if (task->manifest != NULL) {
        g_mutex_lock(&models->lock);
        g_hash_table_replace(models->manifests, g_strdup(task->identity),
                             g_bytes_ref(task->manifest));
        g_mutex_unlock(&models->lock);
        store_put(models->store, STORE_MANIFESTS, task->identity, g_bytes_ref(task->manifest), NULL,
                  NULL);
    }
    if (task->model != NULL) {
        model_unref(entry->model);
        entry->model = g_steal_pointer(&task->model);
        g_free(entry->identity);
        entry->identity = g_steal_pointer(&task->identity);
        entry->stale = false;
    }
}

/* Invariant 4. A manifest that it made itself is of the files that it read. */
static bool model_task_overtaken(const ModelTask *task, const ModelEntry *entry)
{
    if (task->error != NULL || task->manifest != NULL) {
        return false;
    }
    if (task->model == NULL) {
        return entry->stale;
    }
    g_mutex_lock(&task->models->lock);
    const bool known = g_hash_table_lookup(task->models->manifests, task->identity) == task->taken;
    g_mutex_unlock(&task->models->lock);
    return !known;
}

static void model_task_done(void *user)
{
    ModelTask *task = user;
    Models *models = task->models;
    ModelEntry *entry = g_hash_table_lookup(models->open, task->name);
    if (model_task_overtaken(task, entry)) {
        model_task_clear(task);
        g_clear_pointer(&task->known_identity, g_free);
        work_pool_run(models->pool, model_task_work, model_task_done, model_task_free, task);
        return;
    }
    models_publish(models, task, entry);
    entry->loading = false;
    GArray *waiters = entry->waiters;
    entry->waiters = g_array_new(FALSE, FALSE, sizeof(ModelWaiter));
    Model *model = task->error == NULL ? model_ref(entry->model) : NULL;
    if (model == NULL) {
        g_hash_table_remove(models->open, task->name);
    }
    for (guint i = 0; i < waiters->len; i++) {
        ModelWaiter *w = &g_array_index(waiters, ModelWaiter, i);
        w->done(model, task->error, w->user);
    }
    g_array_unref(waiters);
    model_unref(model);
    model_task_free(task);
}

Models *models_new(WorkPool *pool, Store *store, const char *dir)
{
    Models *models = g_new0(Models, 1);
    models->pool = pool;
    models->store = store;
    models->dir = g_strdup(dir);
    models->open = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, model_entry_free);
    models->manifests =
        g_hash_table_new_full(g_str_hash, g_str_equal, g_free, (GDestroyNotify)g_bytes_unref);
    g_mutex_init(&models->lock);
    return models;
}

void models_free(Models *models)
{
    if (models == NULL) {
        return;
    }
    g_hash_table_unref(models->open);
    g_hash_table_unref(models->manifests);
    g_mutex_clear(&models->lock);
    g_free(models->dir);
    g_free(models);
}

void models_restore(Models *models, const StoreRow *row)
{
    g_hash_table_replace(models->manifests, g_strdup(row->key), g_bytes_ref(row->value));
}

void models_open(Models *models, const char *name, ModelOpened done, void *user)
{
    ModelEntry *entry = g_hash_table_lookup(models->open, name);
    if (entry == NULL) {
        entry = g_new0(ModelEntry, 1);
        entry->waiters = g_array_new(FALSE, FALSE, sizeof(ModelWaiter));
        g_hash_table_replace(models->open, g_strdup(name), entry);
    }
    ModelWaiter waiter = {done, user};
    g_array_append_val(entry->waiters, waiter);
    if (entry->loading) {
        return;
    }
    entry->loading = true;
    ModelTask *task = g_new0(ModelTask, 1);
    task->models = models;
    task->name = g_strdup(name);
    task->dir = g_strdup(models->dir);
    task->known_identity = entry->stale ? NULL : g_strdup(entry->identity);
    work_pool_run(models->pool, model_task_work, model_task_done, model_task_free, task);
}

Model *models_by_hash(const Models *models, const uint8_t hash[16], GError **error)
{
    const Model *stale = NULL;
    GHashTableIter iter;
    void *value;
    g_hash_table_iter_init(&iter, models->open);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        ModelEntry *entry = value;
        if (entry->model == NULL ||
            memcmp(entry->model->spec->file_hash.bytes, hash, HASH_BYTES) != 0) {
            continue;
        }
        if (!entry->stale) {
            return entry->model;
        }
        stale = entry->model;
    }
    if (stale != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "model %s was changed since it was hashed: try again, it is read anew",
                    stale->path);
    } else {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "no open model file has the hash that was asked for");
    }
    return NULL;
}

void models_mark_stale(Models *models, const Model *model)
{
    GHashTableIter iter;
    void *value;
    g_hash_table_iter_init(&iter, models->open);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        ModelEntry *entry = value;
        if (entry->model == model && !entry->stale) {
            entry->stale = true;
            g_mutex_lock(&models->lock);
            g_hash_table_remove(models->manifests, entry->identity);
            g_mutex_unlock(&models->lock);
            store_put(models->store, STORE_MANIFESTS, entry->identity, NULL, NULL, NULL);
        }
    }
}
