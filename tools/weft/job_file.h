/* A job file of this host, as the coordinator is to see it. */
#pragma once

#include "proto/config/job_spec.h"

/* Paths become whole; what its model is called is a path of this host where it exists here, else of
 * the coordinator's. NULL + error. Returned. */
JobSpec *job_file_read(const char *path, GError **error);
