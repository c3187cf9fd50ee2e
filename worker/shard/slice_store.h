/* SliceStore: slices on this host's disks (DESIGN 7.8): the cache of slices that came over the
 * network, and the worker's own model files.
 *
 * Cache layout: DIR/<file hash>/<tensor index>/<slice>, the slice's file bytes and nothing else. A
 * file is written under another name, then renamed, so that a reader sees all of it or none; what
 * is read is believed only after its hash was checked by whoever reads. Every function may be
 * called from any thread. Pages read are given back to the kernel: they would count in a memory
 * cgroup. */
#pragma once

#include "proto/base/hash.h"
#include "proto/base/log.h"
#include "proto/model/model_spec.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct SliceStore SliceStore;

typedef struct SliceId {
    Hash128 file_hash; /* of the whole model file; all zero = not cached */
    uint32_t tensor, slice;
} SliceId;

/* cache_dir NULL: nothing is cached. A directory that cannot be made or written is one warning,
 * then as NULL. Log is borrowed, may be NULL. */
SliceStore *slice_store_new(const char *cache_dir, Log *log);
void slice_store_free(SliceStore *store); /* NULL-safe */
/* Where it keeps them; NULL = nowhere. Borrowed. */
const char *slice_store_dir(const SliceStore *store);

/* Reads a cached slice of exactly `size` bytes whose hash is *expected. False: not there. A file of
 * another size or hash is removed (one warning). */
bool slice_store_read(SliceStore *store, const SliceId *id, const Hash128 *expected, void *out,
                      size_t size);
/* Keeps a slice. A full or failing disk is one warning and ends caching until slice_store_retry().
 */
void slice_store_write(SliceStore *store, const SliceId *id, const void *data, size_t size);
/* Lets writes try again: a new load begins. */
void slice_store_retry(SliceStore *store);
/* The cached bytes, unchecked, to be sent to a peer who checks; NULL = not there. At most `limit`
 * bytes. Returned. */
GBytes *slice_store_read_any(SliceStore *store, const SliceId *id, size_t limit);

/* ---- the worker's own copy of the model ---- */

typedef struct SliceFiles SliceFiles;
/* Opens MODELS_DIR/NAME for each of the model's files, or where that is not there MODELS_DIR/<base
 * name>; NULL when one is missing or too short for its tensors, or models_dir is NULL. Names that
 * lead out of the directory are refused: they come from the coordinator. */
SliceFiles *slice_files_open(const char *models_dir, const ModelSpec *spec,
                             const char *const *file_names, size_t n_files);
void slice_files_free(SliceFiles *files); /* NULL-safe */
/* The file bytes of n slices of a tensor, each one's rows packed (model_spec_slice_bytes); slices
 * of the same rows are read together. False on any read error or short file: the caller goes
 * elsewhere. */
bool slice_files_read(SliceFiles *files, const ModelSpec *spec, const TensorSpec *tensor,
                      const uint32_t *slices, uint32_t n, void *const *out);
