/* Whose memory UCX sends from by itself, as found at run time. */
#pragma once

#include <stdbool.h>

/* Whether UCX as it is installed here knows GPUs' memory (its CUDA transports are there); why[160]:
 * a sentence for people. Blocks some tens of milliseconds. */
bool link_ucx_knows_cuda(char *why);
