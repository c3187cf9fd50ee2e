/* Models: the files and directories under --models, opened once, with what the coordinator knows of
 * each: shape, slice hashes (the manifest, DESIGN 7.8), vocabulary and chat template. Files are
 * opened, hashed and read on the work pool only. */
#pragma once

#include "coordinator/store/store.h"
#include "coordinator/work_pool.h"
#include "proto/model/model_files.h"
#include "proto/text/chat_template.h"
#include "proto/text/tokenizer.h"
#include "weft/v1/plan.pb-c.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Model {
    gatomicrefcount refs;
    char *path, *name; /* resolved path; general.name or the base name */
    char *root;        /* the resolved --models directory, which path lies in */
    ModelFiles *files;
    ModelSpec *spec;      /* file_hash set */
    Tokenizer *tokenizer; /* NULL: tokenizer_error says why */
    ChatTemplate *chat;   /* NULL: the file has none, or chat_error says why */
    GError *tokenizer_error, *chat_error;
    uint8_t *slice_hashes; /* 16 bytes a slice, tensors in canonical order */
    uint32_t *first_slice; /* [n_tensors + 1]: index of each tensor's first */
} Model;

Model *model_ref(Model *model); /* any thread */
void model_unref(Model *model); /* NULL-safe, any thread */

/* As it travels: with tensors, their slice hashes and the paths, beneath --models, of files that
 * tensors lie in as they are (to a worker), or without (for people). Returned; message_free(). */
Weft__V1__Model *model_message(const Model *model, bool with_tensors);

typedef struct Models Models;
/* dir NULL: every open is refused with how to set it. */
Models *models_new(WorkPool *pool, Store *store, const char *dir);
void models_free(Models *models); /* NULL-safe; open requests are forgotten */
/* A manifest found at start. */
void models_restore(Models *models, const StoreRow *row);

/* model: borrowed, NULL with an error. */
typedef void (*ModelOpened)(Model *model, const GError *error, void *user);
/* name: a GGUF file or a Hugging Face directory: a path, absolute or under the directory, ".gguf"
 * may be left out. NOT_FOUND, DENIED
 * (outside the directory), INVALID (what is wrong in the file). */
void models_open(Models *models, const char *name, ModelOpened done, void *user);
/* The open model with these bytes, borrowed; or NULL, with an error. */
Model *models_by_hash(const Models *models, const uint8_t hash[16], GError **error);
/* On the pool. False for a slice that cannot be read (error), and for one whose bytes are not those
 * of the manifest (*changed). */
bool model_copy_slice(const Model *model, uint32_t tensor, uint32_t slice, uint8_t *out,
                      bool *changed, GError **error);
/* Its files were changed, though size and time are as before: it is no longer found by its hash,
 * and who opens its name next has the files read and hashed again. */
void models_mark_stale(Models *models, const Model *model);
