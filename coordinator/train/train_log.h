/* TrainLog: the steps of a job as JSON lines in a file, so that they outlive the coordinator. A
 * step that is told again (after a recovery) must have the same loss, of class fast a close one. */
#pragma once

#include "coordinator/train/train_plot.h"
#include "proto/plan/plan.h"
#include "weft/v1/train.pb-c.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct TrainLog TrainLog;

/* Reads what is there; nothing of it, if it is of another job of that name, which was submitted at
 * another time (Unix time). Changes nothing. path NULL: memory only. IO. Returned; any thread. */
TrainLog *train_log_read(const char *path, int64_t submitted_us, GError **error);
/* From now on its lines go to the file, after what was read: the rest, such as a torn last line, is
 * cut off. IO. */
bool train_log_begin(TrainLog *l, GError **error);
void train_log_free(TrainLog *l);                              /* NULL-safe */
void train_log_set_class(TrainLog *l, NumericsClass numerics); /* at first exact */
/* Of what its lines are results (job_spec_definition(), hex); copied. */
void train_log_set_definition(TrainLog *l, const char *definition);
/* What steps' lines say besides: what is left of so many, and the share of the workers' rate, of
 * which a token a second is `share` (0: not known). */
void train_log_set_course(TrainLog *l, uint64_t steps, double share);
/* Tokens a second of the last of these points; 0: not known. */
double train_log_speed(const GArray *points);
/* The class of the steps that it was opened with; false: it had none. */
bool train_log_class(const TrainLog *l, NumericsClass *out);
/* Lines so far, of char *; borrowed. */
const GPtrArray *train_log_lines(const TrainLog *l);
uint64_t train_log_steps(const TrainLog *l);
/* Of TrainPoint: the steps that have a line; borrowed. */
const GArray *train_log_points(const TrainLog *l);
/* The line of a new step, borrowed; NULL without an error: it was told before. NUMERICS: it was
 * told before with another loss. sample: a text that was drawn after it, or NULL. */
const char *train_log_step(TrainLog *l, const Weft__V1__TrainProgress *step, uint64_t batch_tokens,
                           const char *sample, GError **error);
typedef struct TrainEnd {
    const char *checkpoint, *curves; /* paths; NULL: none */
    const char *digest, *layout;
    double predicted_s, measured_s; /* of a step, on the last layout; 0: not known */
} TrainEnd;
/* The last line: the job is done. Borrowed. */
const char *train_log_end(TrainLog *l, const TrainEnd *end);
bool train_log_ended(const TrainLog *l);
/* The last line: the job failed. It is none of train_log_lines(). */
void train_log_fail(TrainLog *l, const GError *why);
/* Its lines are on the disk then. IO. */
bool train_log_sync(TrainLog *l, GError **error);
/* Why the job failed; NULL: it did not. Borrowed. */
const GError *train_log_failure(const TrainLog *l);
