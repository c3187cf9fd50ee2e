/* What every fill of kernels/device/group.h gives, on devices whose streams run a step at each
 * question (kernels/device/cpu.c): one thread plays all ranks in turn, so that every interleaving
 * is the same on every run. The including file opens the devices and has the main function. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/device/group.h"
#include "transport/group/reduction.h"

#include <immintrin.h>
#include <string.h>

enum { CASE_RANKS = 4, CASE_TURNS = 100000 };

typedef struct CaseRank {
    Device *device;
    DeviceStream *stream;
    DeviceEvent *event;
    DeviceGroup *group;
} CaseRank;

typedef struct CaseWorld {
    const DeviceGroupApi *api;
    uint32_t n;
    CaseRank ranks[CASE_RANKS];
} CaseWorld;

/* The index-th device, its group table the fill under test. Returned. */
static Device *case_device(uint32_t index);

/* ---- a world of ranks ---- */

/* Until rank r may go on. */
static DeviceStatus case_settle(CaseWorld *w, uint32_t r)
{
    DeviceStatus status = DEVICE_NOT_READY;
    for (unsigned turn = 0; turn < CASE_TURNS && status == DEVICE_NOT_READY; turn++) {
        status = w->api->poll(w->ranks[r].group);
    }
    return status;
}

/* The status of an enqueuing call of rank r, after all polls that it asks for. */
static void case_enqueued(CaseWorld *w, uint32_t r, DeviceStatus status)
{
    assert_int_equal(status == DEVICE_NOT_READY ? case_settle(w, r) : status, DEVICE_OK);
}

static void case_open(CaseWorld *w, uint32_t n)
{
    DeviceGroupId id;
    *w = (CaseWorld){.n = n};
    for (uint32_t r = 0; r < n; r++) {
        CaseRank *rank = &w->ranks[r];
        rank->device = case_device(r);
        assert_int_equal(rank->device->api->stream_new(rank->device->handle, &rank->stream), 0);
        assert_int_equal(rank->device->api->event_new(rank->device->handle, &rank->event), 0);
    }
    w->api = w->ranks[0].device->group;
    assert_int_equal(w->api->make_id(w->ranks[0].device->handle, &id), DEVICE_OK);
    for (uint32_t r = 0; r < n; r++) {
        if (r > 0) { /* somebody is missing */
            assert_int_equal(w->api->poll(w->ranks[0].group), DEVICE_NOT_READY);
        }
        assert_int_equal(w->api->begin(w->ranks[r].device->handle, &id, n, r, &w->ranks[r].group),
                         DEVICE_OK);
    }
    for (uint32_t r = 0; r < n; r++) {
        assert_int_equal(case_settle(w, r), DEVICE_OK);
    }
}

static void case_close(CaseWorld *w)
{
    for (uint32_t r = 0; r < w->n; r++) {
        w->api->abort(w->ranks[r].group);
    }
    for (uint32_t r = 0; r < w->n; r++) {
        CaseRank *rank = &w->ranks[r];
        rank->device->api->stream_free(rank->stream);
        rank->device->api->event_free(rank->event);
        w->api->free(rank->group);
        device_free(rank->device);
    }
}

static DeviceStatus case_turn(CaseRank *rank)
{
    return rank->device->api->event_query(rank->event);
}

static void case_record(CaseWorld *w)
{
    for (uint32_t r = 0; r < w->n; r++) {
        CaseRank *rank = &w->ranks[r];
        assert_int_equal(rank->device->api->event_record(rank->event, rank->stream), DEVICE_OK);
    }
}

/* Runs all streams to their ends, the last rank's first. */
static void case_run(CaseWorld *w)
{
    bool left = true;
    case_record(w);
    for (unsigned turn = 0; turn < CASE_TURNS && left; turn++) {
        left = false;
        for (uint32_t r = w->n; r-- > 0;) {
            left |= case_turn(&w->ranks[r]) == DEVICE_NOT_READY;
        }
    }
    assert_false(left);
}

static float *case_floats(CaseWorld *w, uint32_t r, size_t n)
{
    float *floats;
    Device *device = w->ranks[r].device;
    assert_int_equal(device->api->alloc(device->handle, sizeof(float) * n, (void **)&floats), 0);
    return floats;
}

static void case_free(CaseWorld *w, uint32_t r, void *memory)
{
    w->ranks[r].device->api->free(w->ranks[r].device->handle, memory);
}

/* Magnitudes apart, signs mixed: every other order of adding has other bits. */
static float case_value(uint32_t r, size_t i)
{
    const uint32_t bits = (uint32_t)(r * 7919 + i * 104729 + 12345) * 2654435761u;
    const float scale = (bits >> 5 & 3) == 0 ? 1e6f : 1.0f;
    return ((float)(bits >> 8) / 8388608.0f - 1.0f) * scale;
}

static void case_fill(float *out, uint32_t r, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = case_value(r, i);
    }
}

/* ---- collectives ---- */

enum { CASE_N = 37 };

static void case_all_reduce(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= CASE_RANKS; n++) {
        CaseWorld w;
        float *in[CASE_RANKS], *out[CASE_RANKS];
        case_open(&w, n);
        for (uint32_t r = 0; r < n; r++) {
            in[r] = case_floats(&w, r, CASE_N);
            out[r] = r % 2 == 0 ? in[r] : case_floats(&w, r, CASE_N); /* in place or not */
            case_fill(in[r], r, CASE_N);
            assert_int_equal(w.api->register_buffer(w.ranks[r].group, in[r], CASE_N * 4), 0);
            case_enqueued(
                &w, r,
                w.api->all_reduce(w.ranks[r].group, w.ranks[r].stream, in[r], out[r], CASE_N));
        }
        assert_true(in[0][1] == case_value(0, 1)); /* nothing ran before a wait */
        case_run(&w);
        for (uint32_t r = 0; r < n; r++) {
            for (size_t i = 0; i < CASE_N; i++) {
                double sum = 0;
                for (uint32_t k = 0; k < n; k++) {
                    sum += (double)case_value(k, i);
                }
                assert_true(out[r][i] >= sum - 1.0 && out[r][i] <= sum + 1.0);
            }
            assert_memory_equal(out[r], out[0], sizeof(float) * CASE_N);
        }
        for (uint32_t r = 0; r < n; r++) {
            if (out[r] != in[r]) {
                case_free(&w, r, out[r]);
            }
            case_free(&w, r, in[r]);
        }
        case_close(&w);
    }
}

static void case_gather_and_scatter(void **state)
{
    CaseWorld w;
    float *all[CASE_RANKS], *piece[CASE_RANKS];
    (void)state;
    case_open(&w, 3);
    for (uint32_t r = 0; r < w.n; r++) {
        all[r] = case_floats(&w, r, 3 * CASE_N);
        piece[r] = case_floats(&w, r, CASE_N);
        case_fill(piece[r], r, CASE_N);
        case_enqueued(&w, r,
                      w.api->all_gather(w.ranks[r].group, w.ranks[r].stream, piece[r], all[r],
                                        sizeof(float) * CASE_N));
        case_enqueued(
            &w, r,
            w.api->reduce_scatter(w.ranks[r].group, w.ranks[r].stream, all[r], piece[r], CASE_N));
    }
    case_run(&w);
    for (uint32_t r = 0; r < w.n; r++) {
        for (uint32_t from = 0; from < w.n; from++) {
            for (size_t i = 0; i < CASE_N; i++) {
                assert_true(all[r][from * CASE_N + i] == case_value(from, i));
            }
        }
        for (size_t i = 0; i < CASE_N; i++) { /* all had gathered the same */
            const float one = case_value(r, i);
            assert_true(piece[r][i] == one + one + one);
        }
        case_free(&w, r, all[r]);
        case_free(&w, r, piece[r]);
    }
    case_close(&w);
}

/* A ring: everybody sends to the right and receives from the left at once. */
static void case_exchange(void **state)
{
    CaseWorld w;
    float *mine[CASE_RANKS], *left[CASE_RANKS];
    (void)state;
    case_open(&w, CASE_RANKS);
    for (uint32_t r = 0; r < w.n; r++) {
        mine[r] = case_floats(&w, r, CASE_N);
        left[r] = case_floats(&w, r, CASE_N);
        case_fill(mine[r], r, CASE_N);
        const DeviceGroupPart parts[] = {
            {true, (r + 1) % w.n, mine[r], sizeof(float) * CASE_N},
            {false, (r + w.n - 1) % w.n, left[r], sizeof(float) * CASE_N}};
        case_enqueued(&w, r, w.api->exchange(w.ranks[r].group, w.ranks[r].stream, parts, 2));
    }
    case_run(&w);
    for (uint32_t r = 0; r < w.n; r++) {
        assert_memory_equal(left[r], mine[(r + w.n - 1) % w.n], sizeof(float) * CASE_N);
    }
    for (uint32_t r = 0; r < w.n; r++) {
        case_free(&w, r, mine[r]);
        case_free(&w, r, left[r]);
    }
    case_close(&w);
}

/* ---- the exact all-reduce: the bits of transport/group ---- */

enum { CASE_FLUSH = 0x8040 /* of MXCSR: FTZ and DAZ, as hosts fold units of bf16dot */ };

/* flushes: numbers around the smallest normal one. */
static void case_tree_of(uint32_t n_leaves, const uint32_t *cuts, uint32_t n_ranks, bool flushes)
{
    CaseWorld w;
    DeviceTree tree;
    ReductionCache cache = {0};
    float *mine[CASE_RANKS], *gathered[CASE_RANKS], *out[CASE_RANKS], expected[CASE_N];
    const float *operands[TREE_OPERANDS_LIMIT];
    uint32_t n_operands = 0;
    const Reduction *reduction = reduction_find(&cache, n_leaves, 0, cuts, n_ranks);
    device_tree_init(&tree, n_leaves, cuts, n_ranks);
    tree.flushes = flushes;
    case_open(&w, n_ranks);
    for (uint32_t r = 0; r < n_ranks; r++) {
        mine[r] = case_floats(&w, r, (size_t)tree.most * CASE_N);
        gathered[r] = case_floats(&w, r, (size_t)n_ranks * tree.most * CASE_N);
        out[r] = case_floats(&w, r, CASE_N);
        for (uint32_t k = 0; k < reduction->n_subtrees[r]; k++) {
            float *subtree = mine[r] + (size_t)k * CASE_N;
            case_fill(subtree, r * 64 + k, CASE_N);
            for (size_t i = 0; flushes && i < CASE_N; i++) {
                subtree[i] *= 0x1p-126f;
            }
            operands[n_operands++] = subtree;
        }
        case_enqueued(&w, r,
                      w.api->all_gather(w.ranks[r].group, w.ranks[r].stream, mine[r], gathered[r],
                                        sizeof(float) * CASE_N * tree.most));
        case_enqueued(
            &w, r,
            w.api->fold(w.ranks[r].group, w.ranks[r].stream, &tree, gathered[r], CASE_N, out[r]));
    }
    case_run(&w);
    const unsigned modes = _mm_getcsr();
    _mm_setcsr(flushes ? modes | CASE_FLUSH : modes);
    reduction_sum(reduction, operands, CASE_N, expected);
    _mm_setcsr(modes);
    for (uint32_t r = 0; r < n_ranks; r++) {
        assert_memory_equal(out[r], expected, sizeof expected);
    }
    for (uint32_t r = 0; r < n_ranks; r++) {
        case_free(&w, r, mine[r]);
        case_free(&w, r, gathered[r]);
        case_free(&w, r, out[r]);
    }
    case_close(&w);
}

static void case_tree(void **state)
{
    static const uint32_t cuts[][CASE_RANKS + 1] = {
        {0, 9},          {0, 4, 9},       {0, 5, 9},           {0, 1, 3, 9},
        {0, 2, 2, 7, 9}, {0, 11, 23, 64}, {0, 17, 33, 50, 64}, {0, 1, 2, 3, 64},
    };
    static const uint32_t n_ranks[] = {1, 2, 2, 3, 4, 3, 4, 4};
    (void)state;
    for (unsigned i = 0; i < G_N_ELEMENTS(n_ranks); i++) {
        case_tree_of(cuts[i][n_ranks[i]], cuts[i], n_ranks[i], false);
        case_tree_of(cuts[i][n_ranks[i]], cuts[i], n_ranks[i], true);
    }
}

/* ---- graphs ---- */

/* x += the sum over ranks of x, thrice by one graph: what the addresses hold is read at each
 * launch. */
static void case_graphs(void **state)
{
    CaseWorld w;
    DeviceGraph *graphs[CASE_RANKS];
    float *x[CASE_RANKS], *sum[CASE_RANKS];
    (void)state;
    case_open(&w, 2);
    for (uint32_t r = 0; r < w.n; r++) {
        const Device *device = w.ranks[r].device;
        x[r] = case_floats(&w, r, CASE_N);
        sum[r] = case_floats(&w, r, CASE_N);
        assert_int_equal(device->api->graph_begin(w.ranks[r].stream), DEVICE_OK);
        case_enqueued(&w, r,
                      w.api->all_reduce(w.ranks[r].group, w.ranks[r].stream, x[r], sum[r], CASE_N));
        assert_int_equal(device->api->copy(w.ranks[r].stream, x[r], sum[r], sizeof(float) * CASE_N,
                                           DEVICE_COPY_WITHIN),
                         DEVICE_OK);
        assert_int_equal(device->api->graph_end(w.ranks[r].stream, &graphs[r]), DEVICE_OK);
        for (size_t i = 0; i < CASE_N; i++) {
            x[r][i] = (float)(i + r);
        }
    }
    for (unsigned launch = 0; launch < 3; launch++) {
        for (uint32_t r = 0; r < w.n; r++) {
            const Device *device = w.ranks[r].device;
            assert_int_equal(device->api->graph_launch(graphs[r], w.ranks[r].stream), DEVICE_OK);
        }
    }
    case_run(&w);
    for (uint32_t r = 0; r < w.n; r++) {
        for (size_t i = 0; i < CASE_N; i++) {
            assert_true(x[r][i] == (float)(4 * (2 * i + 1))); /* 2i + 1, then doubled twice */
        }
        w.ranks[r].device->api->graph_free(graphs[r]);
        case_free(&w, r, x[r]);
        case_free(&w, r, sum[r]);
    }
    case_close(&w);
}

/* ---- failures ---- */

/* A rank that never comes: the others' streams stand until they are told to give up, and then go
 * on. */
static void case_abort(void **state)
{
    CaseWorld w;
    float *x;
    (void)state;
    case_open(&w, 2);
    x = case_floats(&w, 0, CASE_N);
    case_fill(x, 0, CASE_N);
    case_enqueued(&w, 0, w.api->all_reduce(w.ranks[0].group, w.ranks[0].stream, x, x, CASE_N));
    case_record(&w);
    for (unsigned turn = 0; turn < 1000; turn++) {
        assert_int_equal(case_turn(&w.ranks[0]), DEVICE_NOT_READY);
    }
    assert_int_equal(w.api->poll(w.ranks[0].group), DEVICE_OK); /* that is no error yet */
    w.api->abort(w.ranks[0].group);
    for (unsigned turn = 0; turn < 2; turn++) {
        case_turn(&w.ranks[0]);
    }
    assert_int_equal(case_turn(&w.ranks[0]), DEVICE_OK);
    assert_int_equal(w.api->poll(w.ranks[0].group), DEVICE_GROUP_FAILED);
    g_autoptr(GError) error = NULL;
    assert_false(device_check(w.ranks[0].device, DEVICE_GROUP_FAILED, "all-reduce", &error));
    assert_non_null(strstr(error->message, "rank 0 left the group"));
    assert_non_null(strstr(error->message, "all-reduce: its group of devices has ended"));
    assert_int_equal(case_settle(&w, 1), DEVICE_GROUP_FAILED); /* the other one hears of it */
    case_free(&w, 0, x);
    case_close(&w);
}

#define GROUP_CASES                                                                                \
    cmocka_unit_test(case_all_reduce), cmocka_unit_test(case_gather_and_scatter),                  \
        cmocka_unit_test(case_exchange), cmocka_unit_test(case_tree),                              \
        cmocka_unit_test(case_graphs), cmocka_unit_test(case_abort)
