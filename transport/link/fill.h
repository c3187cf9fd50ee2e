/* What every fill begins with, so that link_fill_free() can end any of them. */
#pragma once

#include "transport/link/link.h"

typedef struct OwnedFill {
    LinkFill fill; /* first: a LinkFill * of ours points here; fill.self is this object */
    void (*release)(struct OwnedFill *self);
} OwnedFill;
