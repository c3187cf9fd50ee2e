/* Training jobs of a status, as status and top show them. */
#pragma once

#include "tools/weft/cli.h"
#include "weft/v1/admin.pb-c.h"

json_t *training_json(const Weft__V1__StatusResponse *status); /* an array, returned */
/* A table of the jobs; ranks: one of their ranks, too. Nothing where there is none. */
void training_print(const Weft__V1__StatusResponse *status, bool ranks);
