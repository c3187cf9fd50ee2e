#include "worker/serve/direct.h"

#include <string.h>

struct Direct {
    DirectOptions o;
    StageMemory memory;
    LinkMemory kind;
    const char *why_not;           /* static; NULL: this rank can; empty: nothing to say */
    bool agreed[PLAN_RANKS_LIMIT]; /* by global rank */
    LinkTransfer sent[PLAN_RANKS_LIMIT];
    bool sending[PLAN_RANKS_LIMIT];
    uint32_t *due; /* ring of steps, [o.n_due] */
    uint32_t head, tail;
    LinkTransfer coming; /* of step due[head], where head != tail */
    DirectCounters counters;
};

static bool is_forbidden(void)
{
    const char *said = g_getenv("WEFT_GPUDIRECT");
    return said != NULL && g_ascii_strcasecmp(said, "off") == 0;
}

static bool is_trivial(const Direct *d)
{
    return strcmp(d->memory.kind, "cpu") == 0;
}

#define STAGED "through pinned memory: "

static const char *why_not(const Direct *d)
{
    if (d->o.position.n_stages < 2 || d->memory.kind == NULL) {
        return "";
    }
    return d->o.sealed                                 ? STAGED "payloads are sealed"
           : is_forbidden()                            ? STAGED "WEFT_GPUDIRECT=off"
           : is_trivial(d) && d->o.trivial_bytes == 0  ? STAGED "the device is the host"
           : !link_port_has_memory(d->o.port, d->kind) ? STAGED
               "UCX as it is set does not know the device's memory"
                                                       : NULL;
}

Direct *direct_new(const DirectOptions *options)
{
    Direct *d = g_new0(Direct, 1);
    d->o = *options;
    d->due = g_new0(uint32_t, options->n_due);
    if (stage_memory(options->stage, &d->memory)) {
        d->kind = is_trivial(d) ? LINK_MEMORY_HOST : LINK_MEMORY_CUDA;
    }
    d->why_not = why_not(d);
    return d;
}

void direct_free(Direct *d)
{
    if (d != NULL) {
        g_free(d->due);
        g_free(d);
    }
}

uint16_t direct_hello(const Direct *d)
{
    return d->why_not == NULL ? DIRECT_HELLO_CAN : 0;
}

void direct_heard(Direct *d, uint32_t from, uint16_t flags)
{
    d->agreed[from] = d->why_not == NULL && (flags & DIRECT_HELLO_CAN) != 0;
}

/* The rank that sends this one its activations. */
static uint32_t sender(const Direct *d)
{
    const Position *p = &d->o.position;
    return p->base_previous + p->rank % p->tp_previous;
}

const char *direct_describe(const Direct *d)
{
    const Position *p = &d->o.position;
    const bool before = p->stage > 0 && d->agreed[sender(d)];
    bool any = before, all = before || p->stage == 0;
    if (d->why_not != NULL) {
        return d->why_not[0] != '\0' ? d->why_not : NULL;
    }
    for (uint32_t j = p->rank; j < p->tp_next; j += p->tp) {
        any = any || d->agreed[p->base_next + j];
        all = all && d->agreed[p->base_next + j];
    }
    return !any   ? STAGED "the other ends cannot do without"
           : !all ? "from device memory to device memory where the other end can"
                  : "from device memory to device memory";
}

/* ---- sending ---- */

bool direct_serves(const Direct *d, uint32_t to, size_t bytes)
{
    return d != NULL && d->agreed[to] &&
           bytes >= (is_trivial(d) ? d->o.trivial_bytes : DIRECT_LEAST_BYTES);
}

LinkStatus direct_send(Direct *d, uint32_t to, uint32_t step, size_t bytes)
{
    const LinkRegion x = {d->kind, d->memory.x, bytes};
    const LinkStatus status = link_send_region(d->o.links[to], LINK_OP_ACTIVATIONS, step, &x,
                                               stage_checksum(d->o.stage), &d->sent[to]);
    d->sending[to] = status == LINK_OK;
    d->counters.sent += status == LINK_OK;
    return status;
}

const bool *direct_sending(Direct *d, uint32_t *to)
{
    const Position *p = &d->o.position;
    for (uint32_t j = p->rank; j < p->tp_next; j += p->tp) {
        *to = p->base_next + j;
        d->sending[*to] = d->sending[*to] && !d->sent[*to].done;
        if (d->sending[*to]) {
            return &d->sent[*to].done;
        }
    }
    return NULL;
}

/* ---- arriving ---- */

/* Names the place for the step that is next. */
static void name_place(Direct *d)
{
    const LinkRegion place = {d->kind, d->memory.arriving, d->memory.bytes};
    const LinkStatus status = link_receive_region(d->o.links[sender(d)], LINK_OP_ACTIVATIONS,
                                                  d->due[d->head % d->o.n_due], &place, &d->coming);
    if (status != LINK_OK) {
        d->coming = (LinkTransfer){.done = true, .status = status};
    }
}

bool direct_due(Direct *d, uint32_t step)
{
    if (d->o.position.stage == 0 || !d->agreed[sender(d)] || d->tail - d->head == d->o.n_due) {
        return false;
    }
    d->due[d->tail++ % d->o.n_due] = step;
    if (d->tail - d->head == 1) {
        name_place(d);
    }
    return true;
}

bool direct_is_due(const Direct *d, uint32_t step)
{
    return d != NULL && d->head != d->tail && d->due[d->head % d->o.n_due] == step;
}

const bool *direct_coming(const Direct *d, uint32_t *from)
{
    *from = sender(d);
    return &d->coming.done;
}

DirectTaken direct_take(Direct *d, size_t bytes, int64_t deadline_us)
{
    Link *link = d->o.links[sender(d)];
    if (d->coming.status != LINK_OK) {
        return DIRECT_LOST;
    }
    if (!stage_take(d->o.stage, MIN(bytes, d->memory.bytes), deadline_us)) {
        return DIRECT_FAILED;
    }
    const uint32_t sum = stage_checksum(d->o.stage);
    /* Another length is as wrong as another checksum. */
    if (!link_check_region(link, &d->coming, d->coming.size == bytes ? sum : ~d->coming.crc)) {
        name_place(d);
        return DIRECT_SPOILT;
    }
    d->counters.taken++;
    d->head++;
    if (d->head != d->tail) {
        name_place(d);
    }
    return DIRECT_TAKEN;
}

DirectCounters direct_counters(const Direct *d)
{
    return d->counters;
}
