/* Served: a model that is kept deployed and offered to HTTP clients under a name. Loop thread. */
#pragma once

#include "coordinator/jobs/jobs.h"
#include "coordinator/jobs/models.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct ServedBook ServedBook;
typedef struct Served Served;

ServedBook *served_book_new(Loop *loop, Log *log, Models *models, Jobs *jobs);
/* Before jobs and models are freed; nothing is called. NULL-safe. */
void served_book_free(ServedBook *book);

typedef struct ServedCallbacks {
    void (*progress)(const char *text, double fraction, const char *worker, void *user);
    void (*ready)(void *user); /* each time that it becomes so */
    /* It is not ready (any more): tried again by itself, until it is removed. final: the first try
     * failed for a reason that trying again would not mend; only served_remove is left to do. */
    void (*waiting)(const GError *why, bool final, void *user);
} ServedCallbacks;

/* name: NULL or "": the file's name. INVALID: a name that is taken or unusable. Never calls back
 * inside. */
Served *served_add(ServedBook *book, const char *model, const char *name, const JobWish *wish,
                   ServedCallbacks callbacks, void *user, GError **error);
/* What is impossible at first may become possible: tried again like any other failure. */
void served_set_patient(Served *served);
/* Sequences that may wait beyond those that its replicas run at once; 0: no bound of its own. */
void served_set_queue(Served *served, uint64_t queue);
/* `n` sequences of a key (NULL: none) more, or fewer, are open; false: these are more than may
 * wait, or more than its share (key_shares.h). */
bool served_open_sequences(Served *served, const char *key, unsigned n);
void served_close_sequences(Served *served, const char *key, unsigned n);
void served_remove(Served *served); /* nothing is called afterwards */

Served *served_find(const ServedBook *book, const char *name); /* NULL if there is none */
Served *served_only(const ServedBook *book); /* NULL unless there is exactly one */
unsigned served_count(const ServedBook *book);
void served_each(const ServedBook *book, void (*fn)(const Served *served, void *user), void *user);

const char *served_name(const Served *served);
const char *served_path(const Served *served); /* as jobs describe it; NULL before it was opened */
const JobWish *served_wish(const Served *served);
const char *served_job(const Served *served); /* the id of its job; borrowed; NULL: none now */
Model *served_model(const Served *served);    /* borrowed; NULL before it was opened */
uint32_t served_context(const Served *served);
bool served_is_ready(const Served *served);
const char *
served_state_text(const Served *served);          /* opening | loading | ready | waiting | failed */
const char *served_problem(const Served *served); /* why it is not ready; borrowed */
int64_t served_since_s(const Served *served);     /* Unix time */
