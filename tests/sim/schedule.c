#include "tests/sim/schedule.h"

#include "proto/base/hash.h"

#include <string.h>

#define LEAST_MEMORY (INT64_C(20) << 20) /* a rank of the model fits, two mostly do not */
#define PATIENCE_MS 60000u
#define LAST_FAULT_US (INT64_C(9) * 1000000)

static const char *const kind_names[FAULT_KINDS] = {
    "kill worker",
    "freeze worker",
    "break the control connection of worker",
    "lose all control messages of worker",
    "cut the network between workers",
    "cut and then reset the network between workers",
    "drain worker",
    "kill the coordinator",
    "freeze the coordinator",
    "let the coordinator's disk fail",
    "stop worker",
    "lose all control messages of everybody",
};

/* ---- drawing --------------------------------------------------------------------------------- */

static uint64_t draw(Random *random, uint64_t n)
{
    return random_u64(random) % n;
}

static int64_t between(Random *random, int64_t least, int64_t most)
{
    return least + (int64_t)draw(random, (uint64_t)(most - least) + 1);
}

/* Mostly a layout that leaves a spare; sometimes one that needs every worker. */
static void draw_layout(StreamPlan *plan, Random *random, unsigned n_workers)
{
    static const uint32_t layouts[][3] = {{1, 1, 1}, {1, 2, 1}, {1, 1, 2}, {1, 2, 2},
                                          {1, 3, 1}, {2, 1, 1}, {1, 1, 3}, {2, 2, 1}};
    for (;;) {
        const uint32_t *l = layouts[draw(random, G_N_ELEMENTS(layouts))];
        const unsigned n = l[0] * l[1] * l[2];
        if (n < n_workers || (n == n_workers && draw(random, 4) == 0)) {
            plan->dp = l[0];
            plan->pp = l[1];
            plan->tp = l[2];
            return;
        }
    }
}

static void draw_streams(Schedule *s, Random *random)
{
    StreamPlan layouts[2] = {0};
    draw_layout(&layouts[0], random, s->n_workers);
    layouts[1] = layouts[0];
    if (draw(random, 5) == 0) { /* two deployments share the workers */
        draw_layout(&layouts[1], random, s->n_workers);
    }
    s->n_streams = 1 + (unsigned)draw(random, SCHEDULE_STREAMS - 2);
    for (unsigned i = 0; i < s->n_streams; i++) {
        StreamPlan *plan = &s->streams[i];
        *plan = layouts[draw(random, 2)];
        plan->request = (unsigned)draw(random, REFERENCE_REQUESTS);
        plan->n_tokens = (uint32_t)between(random, draw(random, 4) ? 25 : 3, REFERENCE_TOKENS);
        plan->begin_us = draw(random, 2) ? between(random, 0, LAST_FAULT_US / 2)
                                         : between(random, 0, WHOLE_SECOND);
        plan->deadline_ms = draw(random, 10) == 0 ? (uint32_t)between(random, 50, 5000) : 0;
        plan->score = draw(random, 7) == 0;
        plan->n_choices = !plan->score && draw(random, 6) == 0
                              ? (uint32_t)between(random, 2, REFERENCE_CHOICES)
                              : 1;
        plan->cancel_us = draw(random, 8) == 0 ? between(random, 1000, 3 * WHOLE_SECOND) : 0;
    }
}

static void draw_fault(Fault *f, Random *random, const Schedule *s)
{
    static const FaultKind often[] = {FAULT_KILL,
                                      FAULT_KILL,
                                      FAULT_KILL,
                                      FAULT_FREEZE,
                                      FAULT_FREEZE,
                                      FAULT_CONTROL_RESET,
                                      FAULT_CONTROL_HOLE,
                                      FAULT_DATA_CUT,
                                      FAULT_DATA_RESET,
                                      FAULT_DRAIN,
                                      FAULT_COORDINATOR_KILL,
                                      FAULT_COORDINATOR_FREEZE,
                                      FAULT_DISK,
                                      FAULT_ALL_SILENT};
    static const int64_t lasts_us[] = {20000, 400000, 1000000, 3000000, 6000000};
    f->kind = often[draw(random, G_N_ELEMENTS(often))];
    f->a = (unsigned)draw(random, s->n_workers);
    f->b = (f->a + 1 + (unsigned)draw(random, s->n_workers - 1)) % s->n_workers;
    if (f->kind == FAULT_DRAIN && f->b % 2 == 0) { /* the same move, asked for by its process */
        f->kind = FAULT_STOP;
    }
    /* Mostly while a stream computes. */
    const StreamPlan *stream = &s->streams[draw(random, s->n_streams)];
    const int64_t stream_us = (s->step_least_us + s->step_most_us) / 2 * stream->n_tokens;
    f->at_us = draw(random, 4) == 0 ? between(random, 0, LAST_FAULT_US)
                                    : stream->begin_us + between(random, 0, stream_us);
    f->for_us = between(random, 1000, lasts_us[draw(random, G_N_ELEMENTS(lasts_us))]);
    if (f->kind == FAULT_ALL_SILENT && draw(random, 2)) { /* long enough to be taken for deaths */
        f->for_us = between(random, 5 * WHOLE_SECOND, 8 * WHOLE_SECOND);
    }
}

void schedule_draw(Schedule *s, uint64_t seed)
{
    RandomSeeded random;
    const Hash128 mixed = hash128(&seed, sizeof seed); /* neighbours' streams shall not overlap */
    uint64_t state;
    memcpy(&state, mixed.bytes, sizeof state);
    random_seeded_init(&random, state);
    Random *r = &random.base;
    *s = (Schedule){.seed = seed};
    s->n_workers = 2 + (unsigned)draw(r, WHOLE_WORKERS - 2);
    draw_streams(s, r);
    s->step_least_us = between(r, 1000, 20000);
    s->step_most_us = s->step_least_us + between(r, 0, 40000);
    s->memory_bytes = (uint64_t)between(r, LEAST_MEMORY, 3 * LEAST_MEMORY);
    s->link_us = between(r, 100, 3000);
    s->disk_us = between(r, 0, 40000);
    s->rpc_jitter_us = draw(r, 2) ? between(r, 100, 30000) : 0;
    s->n_faults = draw(r, 4) == 0 ? 1 : (unsigned)draw(r, draw(r, 3) == 0 ? SCHEDULE_FAULTS : 5);
    for (unsigned i = 0; i < s->n_faults; i++) {
        draw_fault(&s->faults[i], r, s);
        s->repair_us = MAX(s->repair_us, s->faults[i].at_us + s->faults[i].for_us);
    }
    if (draw(r, 4) == 0) {
        s->trouble = (SimTrouble){.repeat = (unsigned)draw(r, 100),
                                  .swap = draw(r, 4) == 0 ? (unsigned)draw(r, 4) : 0,
                                  .flip = draw(r, 4) == 0 ? (unsigned)draw(r, 4) : 0};
    }
    s->repair_us += WHOLE_SECOND;
    s->recovery_wait_ms = draw(r, 4) == 0 ? (uint32_t)between(r, 500, 3000) : PATIENCE_MS;
}

int64_t schedule_stall_us(const Schedule *s)
{
    bool spare = true;
    for (unsigned i = 0; i < s->n_streams; i++) {
        const StreamPlan *plan = &s->streams[i];
        spare = spare && s->n_workers > plan->dp * plan->pp * plan->tp;
    }
    if (s->n_faults != 1 || !spare || s->trouble.swap || s->trouble.flip) {
        return 0;
    }
    switch (s->faults[0].kind) {
    case FAULT_KILL:
    case FAULT_DRAIN:
    case FAULT_STOP:
        return 5 * WHOLE_SECOND;
    case FAULT_FREEZE:
    case FAULT_CONTROL_RESET:
    case FAULT_CONTROL_HOLE:
    case FAULT_DATA_CUT:
    case FAULT_DATA_RESET:
        return 10 * WHOLE_SECOND;
    default:
        return 0;
    }
}

/* ---- in words -------------------------------------------------------------------------------- */

static void fault_text(GString *out, const Fault *f)
{
    g_string_append_printf(out, "  at %.3f s for %.3f s: %s", (double)f->at_us / 1e6,
                           (double)f->for_us / 1e6, kind_names[f->kind]);
    if (f->kind == FAULT_DATA_CUT || f->kind == FAULT_DATA_RESET) {
        g_string_append_printf(out, " w%u and w%u", f->a, f->b);
    } else if (f->kind == FAULT_DISK && f->b % 2 == 0) {
        g_string_append(out, ", and then restart the coordinator");
    } else if (f->kind <= FAULT_CONTROL_HOLE || f->kind == FAULT_DRAIN || f->kind == FAULT_STOP) {
        g_string_append_printf(out, " w%u", f->a);
    }
    g_string_append_c(out, '\n');
}

char *schedule_text(const Schedule *s)
{
    GString *out = g_string_new(NULL);
    g_string_append_printf(
        out,
        "seed %" G_GUINT64_FORMAT ": %u workers of %.1f MiB, steps of %.1f to %.1f ms, "
        "datagrams of %.1f ms, writes of %.1f ms, rpc jitter of %.1f ms, repeat %u swap %u flip "
        "%u, lost requests wait %u ms\n",
        s->seed, s->n_workers, (double)s->memory_bytes / 1048576, (double)s->step_least_us / 1e3,
        (double)s->step_most_us / 1e3, (double)s->link_us / 1e3, (double)s->disk_us / 1e3,
        (double)s->rpc_jitter_us / 1e3, s->trouble.repeat, s->trouble.swap, s->trouble.flip,
        s->recovery_wait_ms);
    for (unsigned i = 0; i < s->n_streams; i++) {
        const StreamPlan *p = &s->streams[i];
        g_autofree char *what =
            p->score ? g_strdup("scored")
                     : g_strdup_printf("%u times %u tokens", p->n_choices, p->n_tokens);
        g_string_append_printf(out, "  stream %u: request %u, %s, dp %u pp %u tp %u, from %.3f s",
                               i, p->request, what, p->dp, p->pp, p->tp, (double)p->begin_us / 1e6);
        if (p->deadline_ms) {
            g_string_append_printf(out, ", within %u ms", p->deadline_ms);
        }
        if (p->cancel_us) {
            g_string_append_printf(out, ", cancelled after %.3f s", (double)p->cancel_us / 1e6);
        }
        g_string_append_c(out, '\n');
    }
    for (unsigned i = 0; i < s->n_faults; i++) {
        fault_text(out, &s->faults[i]);
    }
    g_string_append_printf(out, "  at %.3f s: everything is put right", (double)s->repair_us / 1e6);
    return g_string_free(out, FALSE);
}

/* ---- doing ----------------------------------------------------------------------------------- */

typedef struct Deed { /* one end of a fault */
    Whole *whole;
    Fault fault;
    bool begins;
} Deed;

static void end_worker(Whole *w, const Fault *f, bool begins)
{
    if (!begins) {
        whole_start_worker(w, f->a);
    } else if (f->kind == FAULT_KILL) {
        whole_kill_worker(w, f->a);
    } else {
        whole_stop_worker(w, f->a);
    }
}

static void set_control_of_all(Whole *w, RpcInprocFault fault)
{
    for (unsigned i = 0; i < w->n_workers; i++) {
        whole_set_control(w, i, fault);
    }
}

static void do_to_network(Whole *w, const Fault *f, bool begins)
{
    if (begins) {
        whole_cut(w, f->a, f->b);
    } else {
        whole_heal(w, f->a, f->b, f->kind == FAULT_DATA_RESET);
    }
}

static void do_to_coordinator(Whole *w, const Fault *f, bool begins)
{
    if (f->kind == FAULT_COORDINATOR_FREEZE) {
        whole_freeze_coordinator(w, begins);
    } else if (begins) {
        whole_kill_coordinator(w);
    } else {
        whole_start_coordinator(w);
    }
}

/* A disk that takes writes again is often one that somebody mended, with a restart. */
static void do_to_disk(Whole *w, const Fault *f, bool begins)
{
    whole_fail_disk(w, begins);
    if (!begins && f->b % 2 == 0 && w->coordinator) {
        whole_kill_coordinator(w);
        whole_start_coordinator(w);
    }
}

static void deed_do(void *user)
{
    Deed *deed = user;
    Whole *w = deed->whole;
    const Fault *f = &deed->fault;
    if (w->over) {
        g_free(deed);
        return;
    }
    w->last_fault_us = sim_world_now_us(w->world);
    log_info(&w->log, "---- %s: %s %u %u", deed->begins ? "fault" : "over", kind_names[f->kind],
             f->a, f->b);
    switch (f->kind) {
    case FAULT_KILL:
    case FAULT_STOP:
        end_worker(w, f, deed->begins);
        break;
    case FAULT_FREEZE:
        whole_freeze_worker(w, f->a, deed->begins);
        break;
    case FAULT_CONTROL_RESET:
    case FAULT_CONTROL_HOLE:
        whole_set_control(w, f->a,
                          !deed->begins                    ? RPC_INPROC_UP
                          : f->kind == FAULT_CONTROL_RESET ? RPC_INPROC_CUT
                                                           : RPC_INPROC_FROZEN);
        break;
    case FAULT_DATA_CUT:
    case FAULT_DATA_RESET:
        do_to_network(w, f, deed->begins);
        break;
    case FAULT_DRAIN:
        whole_drain(w, f->a, deed->begins);
        break;
    case FAULT_COORDINATOR_KILL:
    case FAULT_COORDINATOR_FREEZE:
        do_to_coordinator(w, f, deed->begins);
        break;
    case FAULT_DISK:
        do_to_disk(w, f, deed->begins);
        break;
    case FAULT_ALL_SILENT:
        set_control_of_all(w, deed->begins ? RPC_INPROC_FROZEN : RPC_INPROC_UP);
        break;
    case FAULT_KINDS:
        break;
    }
    g_free(deed);
}

static void deed_at(Whole *w, const Fault *fault, bool begins)
{
    Deed *deed = g_new(Deed, 1);
    *deed = (Deed){w, *fault, begins};
    loop_timer_start(w->director, fault->at_us + (begins ? 0 : fault->for_us), deed_do, deed);
}

static void repair(void *user)
{
    Whole *w = user;
    if (w->over) {
        return;
    }
    w->last_fault_us = sim_world_now_us(w->world);
    log_info(&w->log, "---- everything is put right");
    whole_repair(w);
}

void schedule_begin(const Schedule *s, Whole *w)
{
    sim_engines_set_step(s->step_least_us, s->step_most_us);
    sim_net_set_delay(w->net, s->link_us);
    sim_net_set_trouble(w->net, s->trouble);
    rpc_inproc_set_jitter(w->transport, s->rpc_jitter_us ? sim_world_random(w->world) : NULL,
                          s->rpc_jitter_us);
    for (unsigned i = 0; i < s->n_faults; i++) {
        deed_at(w, &s->faults[i], true);
        deed_at(w, &s->faults[i], false);
    }
    loop_timer_start(w->director, s->repair_us, repair, w);
}
