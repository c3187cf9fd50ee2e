/* Direct: activations that go from device memory to device memory (transport/link, regions), not
 * through pinned memory of both hosts. Used between two ranks where payloads are not sealed, both
 * ranks are on devices, and the fill of each knows its device's memory; the hellos tell.
 * WEFT_GPUDIRECT=off at either end forbids it. A step's message says that its activations come by
 * themselves; they are checked when they have come. Engine thread.
 *
 * Of memory: x is lent to the link from sending until direct_sending() has nothing left, which the
 * executor waits for before anything writes x again; `arriving` from direct_due() until what came
 * is taken. Both are freed after the port has closed. */
#pragma once

#include "transport/link/link.h"
#include "worker/model/stage.h"
#include "worker/serve/position.h"

/* Fewer bytes go staged: a region costs a round trip before it moves, some tens of microseconds
 * between hosts, in which pinned memory and the copies of both ends carry about this much. */
#define DIRECT_LEAST_BYTES ((size_t)64 << 10)

/* Flags of a header: a HELLO's sender can do it; a STEP's activations come as a region. */
#define DIRECT_HELLO_CAN 1u
#define DIRECT_STEP_APART 1u

typedef struct DirectOptions {
    LinkPort *port; /* all borrowed; the port must be closed before direct_free() */
    Stage *stage;
    Position position;
    Link *const *links; /* by global rank */
    uint32_t n_due;     /* steps that may have arrived and wait for their turn */
    bool sealed;
    /* Test: so many bytes and more go from a trivial device's memory, too, which is the host's; 0:
     * none do, whoever has one keeps to the host. */
    size_t trivial_bytes;
} DirectOptions;

typedef struct Direct Direct;
Direct *direct_new(const DirectOptions *options);
void direct_free(Direct *direct); /* NULL-safe */

/* What this rank's hello says, in its header's flags; what another's said. */
uint16_t direct_hello(const Direct *direct);
void direct_heard(Direct *direct, uint32_t from, uint16_t flags);
/* How activations go, for people; NULL: there is no other stage, or no device here. Static. */
const char *direct_describe(const Direct *direct);

/* Whether `bytes` of activations go to that rank so. direct NULL: no. */
bool direct_serves(const Direct *direct, uint32_t to, size_t bytes);
/* Sends the stage's x, whose checksum is stage_checksum(). */
LinkStatus direct_send(Direct *direct, uint32_t to, uint32_t step, size_t bytes);
/* A region that is still on its way, and to whom: when it is done; NULL: none. */
const bool *direct_sending(Direct *direct, uint32_t *to);

/* A step's message came whose activations come apart; false: that was not agreed. */
bool direct_due(Direct *direct, uint32_t step);
/* Whether those of this step do. direct NULL: no. */
bool direct_is_due(const Direct *direct, uint32_t step);
/* When those of the next step are there to be taken, and from whom. */
const bool *direct_coming(const Direct *direct, uint32_t *from);
/* Takes them, as the stage's x. SPOILT: dropped and counted, they may still come; FAILED:
 * stage->failure; LOST: the link has died. */
typedef enum DirectTaken { DIRECT_TAKEN, DIRECT_SPOILT, DIRECT_FAILED, DIRECT_LOST } DirectTaken;
DirectTaken direct_take(Direct *direct, size_t bytes, int64_t deadline_us);

/* Regions sent and taken. */
typedef struct DirectCounters {
    uint64_t sent, taken;
} DirectCounters;
DirectCounters direct_counters(const Direct *direct);
