/* The settings of job files as option tables, and what a reading of one knows. Private to
 * proto/config. */
#pragma once

#include "proto/config/job_spec.h"
#include "proto/config/options.h"
#include "proto/config/yaml_tree.h"

/* A COUNT or SIZE row with the choice "auto" takes that word for 0. Items of a list end in .0, .1.
 */
extern const Option JOB_TRAIN_TABLE[], JOB_SERVE_TABLE[];

/* Adds what no single value shows: settings that are missing, contradict each other or describe
 * an impossible layout, each with what would be possible. */
void job_check(const JobSpec *spec, const GPtrArray *entries, YamlErrors *errors);
