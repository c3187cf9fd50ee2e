/* A training job as Status and Why show it. */
#pragma once

#include "coordinator/train/train_job.h"
#include "weft/v1/admin.pb-c.h"

/* What share of its workers' rate of f32 products a token a second is; 0: not known. */
double train_status_share(const TrainJobOptions *options, const TrainJobView *v);
/* An owned message: message_free(). */
Weft__V1__TrainingStatus *train_status(const TrainJob *job, const TrainJobOptions *options);
/* The job in words, and whom its ranks wait for; returned, as above. */
Weft__V1__Reason *train_status_reason(const TrainJob *job, const TrainJobOptions *options);
