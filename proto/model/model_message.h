/* ModelSpec <-> weft.v1.Model, and the manifest of slice hashes that travels with it (DESIGN 7.8).
 */
#pragma once

#include "proto/model/model_spec.h"
#include "weft/v1/plan.pb-c.h"

#include <glib.h>
#include <stdbool.h>

/* Returned; freed with weft__v1__model__free_unpacked(message, NULL). Tensors in canonical order,
 * without slice hashes and file names: see below. Without tensors it is a description for people,
 * which model_from_message() refuses. */
Weft__V1__Model *model_to_message(const ModelSpec *spec, bool with_tensors);
/* Whether a file's path may travel: it stays inside whatever directory it is put behind, is UTF-8
 * without control characters and at most 1 KiB long. */
bool model_file_path_is_inner(const char *path);
/* The paths of the split files in order, beneath a directory; copied. None is set when one may not
 * travel: workers fetch the slices. */
void model_message_set_files(Weft__V1__Model *message, const char *const *names, uint32_t n_names);
/* The hashes of one tensor's slices, n_slices of them; copied. */
void model_message_set_hashes(Weft__V1__Model *message, uint32_t tensor, const Hash128 *hashes,
                              uint32_t n_slices);

/* Returned, or NULL + PROTOCOL / INVALID. Everything is checked again and units, cuts and canonical
 * order are computed here: nothing of the message is trusted. Also checked: tensors arrive in
 * canonical order (indices of the manifest mean the same on both ends), hashes are absent or
 * complete, file names stay inside a directory and cover every tensor's file. */
ModelSpec *model_from_message(const Weft__V1__Model *message, GError **error);
/* False if the message has no hash for this slice. Indices may be any number. */
bool model_message_hash(const Weft__V1__Model *message, uint32_t tensor, uint32_t slice,
                        Hash128 *out);
