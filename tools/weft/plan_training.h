/* weft plan SPEC.yaml of a training job. */
#pragma once

#include "proto/config/job_spec.h"
#include "tools/weft/cli.h"

/* Asks and prints; exit code. */
int plan_training(CommonOptions *common, const JobSpec *spec);
