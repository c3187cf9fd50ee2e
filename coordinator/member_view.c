/* Looking at a member: what it is, has said, and is told of it. Changes nothing. */
#include "coordinator/members_state.h"

#include <string.h>

const char *member_state_text(MemberState state)
{
    static const char *const texts[] = {"joined",   "ready", "serving",
                                        "draining", "lost",  "revoked"};
    return texts[state];
}

bool member_drains(const Member *m)
{
    return m->draining || m->leaving;
}

const char *member_reason(const Member *m)
{
    return m->state != MEMBER_DRAINING ? m->reason
           : m->leaving                ? "it is being stopped"
                                       : m->drain_reason;
}

const char *member_name(const Member *m)
{
    return m->name;
}

MemberState member_state(const Member *m)
{
    return m->state;
}

bool member_attached(const Member *m)
{
    return m->attached && m->confirmed;
}

bool member_usable(const Member *m)
{
    int64_t silent_us = loop_now_us(m->members->options.loop) - m->heard_us;
    return member_attached(m) && !member_drains(m) && !m->accused && m->stream != NULL &&
           silent_us < MEMBER_SUSPECT_US;
}

uint64_t member_silent_ms(const Member *m)
{
    return m->hello != NULL
               ? (uint64_t)MAX(loop_now_us(m->members->options.loop) - m->heard_us, 0) / 1000
               : 0;
}

const Weft__V1__Hello *member_hello(const Member *m)
{
    return m->hello;
}

const Weft__V1__Heartbeat *member_heartbeat(const Member *m)
{
    return m->heartbeat;
}

RpcChannel *member_channel(const Member *m)
{
    return m->channel;
}

const Weft__V1__Held *member_held(const Member *m, const char *job, uint32_t replica,
                                  uint32_t stage, uint32_t rank)
{
    Weft__V1__Held **held = m->heartbeat != NULL ? m->heartbeat->held
                            : m->hello != NULL   ? m->hello->held
                                                 : NULL;
    size_t n = m->heartbeat != NULL ? m->heartbeat->n_held
               : m->hello != NULL   ? m->hello->n_held
                                    : 0;
    for (size_t i = 0; m->attached && i < n; i++) {
        if (strcmp(held[i]->job, job) == 0 && held[i]->replica == replica &&
            held[i]->stage == stage && held[i]->rank == rank) {
            return held[i];
        }
    }
    return NULL;
}

const char *member_problem(const Member *m)
{
    return m->heartbeat != NULL && m->heartbeat->problem[0] != '\0' ? m->heartbeat->problem : NULL;
}

void member_describe(const Member *m, Weft__V1__Member *out)
{
    Loop *loop = m->members->options.loop;
    out->name = m->name;
    out->state = (char *)member_state_text(m->state);
    const char *reason = member_reason(m) != NULL ? member_reason(m) : member_problem(m);
    out->reason = reason != NULL ? (char *)reason : (char *)"";
    out->age_ms = (uint64_t)MAX(loop_wall_us(loop) - m->joined_wall_us, 0) / 1000;
    if (m->hello != NULL) {
        out->last_heartbeat_ms = member_silent_ms(m);
        out->address = m->hello->control_address;
        out->isa = m->hello->isa;
        out->threads = m->hello->threads;
        out->memory_bytes = m->hello->memory_bytes;
        out->measured = m->hello->measured;
        out->release = m->hello->release;
        out->cpu = m->hello->cpu;
        out->devices = m->hello->devices;
        out->n_devices = m->hello->n_devices;
    }
    if (m->heartbeat != NULL) {
        out->counters = m->heartbeat->counters;
        out->loop_lag_ms = m->heartbeat->loop_lag_ms;
        out->loads = m->heartbeat->loads;
        out->n_loads = m->attached ? m->heartbeat->n_loads : 0;
        out->waiting = m->heartbeat->waiting;
        out->n_waiting = m->attached ? m->heartbeat->n_waiting : 0;
    }
}
