/* The versions that peers compare. */
#pragma once

#define WEFT_PROTOCOL_VERSION                                                                      \
    1u /* wire and RPC; a difference is refused with both in the message */
#define WEFT_NUMERICS_VERSION 1u /* NUMERICS.md, "Definition" */
