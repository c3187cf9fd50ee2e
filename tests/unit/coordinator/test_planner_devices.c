/* Plans over devices: which are taken, how they are cut, and what class exact asks of them. */
#include "proto/base/error.h"
#include "proto/plan/device_memory.h"
#include "tests/golden/plan_builder.h"
#include "tests/unit/coordinator/planner_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* A worker on a GPU that offers class fast alone: left out of an exact plan with the reason, part
 * of a fast one beside hosts, within its own memory; alone, an exact plan is refused with what to
 * say. */
/* As many as keep a host's buffers small beside its weights; devices take many. */
static void test_rows_of_a_step(void **state)
{
    g_autoptr(ModelSpec) small = smol(), wide = large();
    PlanMember members[2];
    (void)state;
    plan_builder_members(members, 2);
    PlanWish wish = {.streams = 1, .pp = 1, .tp = 1};
    g_autoptr(Plan) of_small = plan_ok(small, members, 2, &wish),
                    of_wide = plan_ok(wide, members, 2, &wish);
    assert_int_equal(of_small->max_rows, 512);
    assert_int_equal(of_wide->max_rows, 128);
    members[1].device = "cuda:0 (a GPU, 139.8G)";
    members[1].numerics_classes = 1u << NUMERICS_FAST;
    g_autoptr(Plan) on_device = plan_ok(wide, members, 2, &wish);
    assert_int_equal(on_device->max_rows, 512);
    wish.max_rows = 64;
    g_autoptr(Plan) asked = plan_ok(wide, members, 2, &wish);
    assert_int_equal(asked->max_rows, 64);
}

static void test_hosts_and_gpus(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    (void)state;
    plan_builder_members(members, 2);
    members[0].numerics_classes = 1u << NUMERICS_FAST;
    members[0].device = "cuda:0 (NVIDIA H200, 139.8G)";
    members[0].read_bytes_per_s *= 100;
    members[1].numerics_classes = 1u << NUMERICS_EXACT | 1u << NUMERICS_FAST;
    PlanWish wish = {.streams = 1};
    Plan *plan = plan_ok(spec, members, 2, &wish);
    assert_string_equal(plan->replicas[0].stages[0].ranks[0].worker, members[1].worker);
    assert_true(has_reason(plan, "it computes on a GPU, which offers numerics fast only"));
    plan_free(plan);

    wish = (PlanWish){.streams = 1, .pp = 2, .numerics = NUMERICS_FAST};
    plan = plan_ok(spec, members, 2, &wish);
    assert_true(has_reason(plan, "computes on cuda:0 (NVIDIA H200, 139.8G)"));
    assert_true(has_reason(plan, "hosts and GPUs in one plan: numerics fast, 1 of 2 workers"));
    const uint64_t peak = plan->replicas[0].stages[0].ranks[0].peak_bytes;
    assert_true(peak > 0);
    plan_free(plan);

    wish.pp = 0;
    plan = plan_ok(spec, members, 2, &wish); /* by speed: the GPU alone */
    assert_int_equal(plan->replicas[0].n_stages, 1);
    assert_string_equal(plan->replicas[0].stages[0].ranks[0].worker, members[0].worker);
    const uint64_t need = plan->replicas[0].stages[0].ranks[0].peak_bytes;
    plan_free(plan);
    members[0].memory_bytes = need - 1; /* of the device */
    wish.context = 8192;
    plan = plan_ok(spec, members, 2, &wish);
    for (uint32_t s = 0; s < plan->replicas[0].n_stages; s++) {
        const PlanRank *rank = &plan->replicas[0].stages[s].ranks[0];
        assert_true(strcmp(rank->worker, members[0].worker) != 0 || rank->peak_bytes < need);
    }
    plan_free(plan);

    wish = (PlanWish){.streams = 1, .pp = 2}; /* both, and exact */
    Refusal r = plan_refused(spec, members, 2, &wish);
    assert_text(&r, "needs 2 workers and 1 can be used");
    assert_text(&r, "is left out: it computes on a GPU, which offers numerics fast only");
    refusal_clear(&r);
    wish = (PlanWish){.streams = 1};
    r = plan_refused(spec, members, 1, &wish);
    assert_text(&r, "it computes on a GPU, which offers numerics fast only (--numerics fast)");
    refusal_clear(&r);
}

static const char h200[] = "NVIDIA H200, sm_90, CUDA 13.0",
                  h100[] = "NVIDIA H100, sm_90, CUDA 13.0";

static void on_gpu(PlanMember *m, const char *kind)
{
    m->device = "cuda:0 (a GPU, 139.8G)";
    m->exact_kind = kind;
    m->numerics_classes = 1u << NUMERICS_EXACT | 1u << NUMERICS_FAST;
    m->read_bytes_per_s = 3e12;
    m->int8_ops_per_s = m->f32_ops_per_s = 1e14;
    m->link_latency_s = 1e-6;
    m->link_bytes_per_s = 1e11;
}

/* Class exact: one kind of members makes a plan, the one that serves fastest, by name; a layout
 * that no kind has workers for is refused, with what each kind has and what would be legal. */
static void test_exact_kinds(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[5];
    (void)state;
    plan_builder_members(members, 5);
    on_gpu(&members[1], h200);
    on_gpu(&members[2], h100);
    on_gpu(&members[4], h200);
    members[0].numerics_classes = members[3].numerics_classes = members[1].numerics_classes;

    PlanWish wish = {.streams = 1};
    Plan *plan = plan_ok(spec, members, 5, &wish);
    assert_string_equal(plan->definition.exact_kind, h200); /* as fast as h100, and named first */
    assert_true(has_reason(plan, "numerics exact: the bits of NVIDIA H200, sm_90, CUDA 13.0"));
    assert_true(has_reason(plan, "worker w2 is not used: an exact plan is of one kind, and this "
                                 "one is of NVIDIA H200"));
    assert_true(has_reason(plan, "worker w0 is not used: an exact plan is of one kind"));
    plan_free(plan);

    wish.pp = 2;
    members[2].read_bytes_per_s *= 2; /* the fastest, but alone */
    plan = plan_ok(spec, members, 5, &wish);
    assert_string_equal(plan->definition.exact_kind, h200);
    const Hash128 of_h200 = definition_hash(&plan->definition);
    plan_free(plan);

    wish.exact_kind = ""; /* as what runs began on hosts */
    plan = plan_ok(spec, members, 5, &wish);
    assert_string_equal(plan->definition.exact_kind, "");
    const Hash128 of_hosts = definition_hash(&plan->definition);
    assert_false(hash128_equal(&of_h200, &of_hosts));
    for (uint32_t s = 0; s < 2; s++) {
        const char *worker = plan->replicas[0].stages[s].ranks[0].worker;
        assert_true(strcmp(worker, "w0") == 0 || strcmp(worker, "w3") == 0);
    }
    plan_free(plan);

    wish = (PlanWish){.streams = 1, .pp = 3};
    Refusal r = plan_refused(spec, members, 5, &wish);
    assert_text(&r, "needs 3 workers and 2 can be used");
    assert_text(&r,
                "an exact plan is of one kind of workers, and here are: hosts' cores (2), NVIDIA "
                "H200, sm_90, CUDA 13.0 (2), NVIDIA H100, sm_90, CUDA 13.0 (1); --numerics fast "
                "mixes them");
    assert_non_null(strstr(((PlanViolation *)r.violations->pdata[0])->text, "NVIDIA H100"));
    assert_true(has_alternative(&r, "--pp 2 --tp 1"));
    assert_true(has_alternative(&r, "--pp 3 --tp 1 --numerics fast"));
    refusal_clear(&r);

    wish = (PlanWish){.streams = 1, .exact_kind = "NVIDIA A100, sm_80, CUDA 13.0"};
    r = plan_refused(spec, members, 5, &wish);
    assert_text(&r, "none of 5 workers gives the exact bits of NVIDIA A100, sm_80, CUDA 13.0");
    assert_text(&r, "that of the running requests is NVIDIA A100");
    refusal_clear(&r);

    wish = (PlanWish){.streams = 1, .pp = 5, .numerics = NUMERICS_FAST}; /* all of them */
    plan = plan_ok(spec, members, 5, &wish);
    assert_string_equal(plan->definition.exact_kind, "");
    plan_free(plan);
}

/* Where no class is asked: fast as soon as a rank is on a GPU, hosts beside it or not; exact on
 * hosts' cores, also where those alone serve faster than a plan with the GPU; the refusal is that
 * of the class that devices could have taken part in. */
static void test_class_by_place(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    (void)state;
    plan_builder_members(members, 3);
    on_gpu(&members[1], h200);
    members[0].numerics_classes = members[2].numerics_classes = members[1].numerics_classes;
    PlanWish wish = {.streams = 1, .any_numerics = true};
    Plan *plan = plan_ok(spec, members, 3, &wish);
    assert_int_equal(plan->definition.numerics, NUMERICS_FAST);
    assert_string_equal(plan->definition.exact_kind, "");
    assert_string_equal(plan->replicas[0].stages[0].ranks[0].worker, "w1");
    assert_true(has_reason(plan, "numerics fast: so it is on GPUs unless --numerics exact"));
    plan_free(plan);

    wish.pp = 3; /* mixed */
    plan = plan_ok(spec, members, 3, &wish);
    assert_int_equal(plan->definition.numerics, NUMERICS_FAST);
    plan_free(plan);
    wish.pp = 4;
    Refusal r = plan_refused(spec, members, 3, &wish);
    assert_text(&r, "needs 4 workers and 3 can be used");
    refusal_clear(&r);
    wish.pp = 0;

    members[1].read_bytes_per_s = members[0].read_bytes_per_s / 100;
    members[1].f32_ops_per_s = members[1].int8_ops_per_s = members[0].f32_ops_per_s / 100;
    plan = plan_ok(spec, members, 3, &wish);
    assert_int_equal(plan->definition.numerics, NUMERICS_EXACT);
    assert_string_equal(plan->definition.exact_kind, "");
    assert_true(has_reason(plan, "numerics exact: so it is on hosts' cores unless"));
    plan_free(plan);

    members[1].usable = false;
    plan = plan_ok(spec, members, 3, &wish);
    assert_int_equal(plan->definition.numerics, NUMERICS_EXACT);
    plan_free(plan);

    on_gpu(&members[1], h200);
    members[1].usable = true;
    members[1].numerics_classes = 1u << NUMERICS_EXACT;
    members[0].usable = members[2].usable = false;
    plan = plan_ok(spec, members, 3, &wish);
    assert_int_equal(plan->definition.numerics, NUMERICS_EXACT);
    assert_string_equal(plan->definition.exact_kind, h200);
    assert_true(has_reason(plan, "numerics exact: these GPUs offer no other class"));
    plan_free(plan);
}

/* What a device was seen to hold counts in the place of the estimate. */
static void test_what_a_device_holds_beside(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    PlanWish wish = {.streams = 1, .tp = 2, .pp = 1, .numerics = NUMERICS_FAST};
    (void)state;
    plan_builder_members(members, 2);
    on_gpu(&members[0], h200);
    on_gpu(&members[1], h200);
    Plan *plan = plan_ok(spec, members, 2, &wish);
    const PlanRank *ranks = plan->replicas[0].stages[0].ranks;
    assert_true(has_reason(plan, "192 MiB beside all that is counted, by estimate"));
    const uint64_t peaks[2] = {ranks[0].peak_bytes, ranks[1].peak_bytes};
    plan_free(plan);
    for (unsigned i = 0; i < 2; i++) {
        members[i].device_rank_bytes = 100 * MIB;
        members[i].device_group_bytes = 30 * MIB;
    }
    plan = plan_ok(spec, members, 2, &wish);
    ranks = plan->replicas[0].stages[0].ranks;
    assert_true(has_reason(plan, "100 MiB beside all that is counted, as it was seen to hold"));
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(peaks[i] - ranks[i].peak_bytes,
                         DEVICE_RANK_BYTES + DEVICE_GROUP_BYTES - 130 * MIB);
    }
    plan_free(plan);
}

/* Devices of one worker that are not equally fast get parts by what each one measured. */
static void test_uneven_devices(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[2];
    (void)state;
    plan_builder_members(members, 2);
    for (uint32_t i = 0; i < 2; i++) {
        on_gpu(&members[i], h200);
        members[i].worker = "w0";
        members[i].host = "a";
        members[i].device_index = i;
    }
    members[1].read_bytes_per_s /= 3;
    PlanWish wish = {.streams = 1, .pp = 1, .tp = 2};
    g_autoptr(Plan) tensor = plan_ok(spec, members, 2, &wish);
    const PlanRank *ranks = tensor->replicas[0].stages[0].ranks;
    const uint32_t fast = ranks[0].device == 0 ? 0 : 1;
    assert_true(ranks[fast].ffn_count > 2 * ranks[1 - fast].ffn_count);
    wish = (PlanWish){.streams = 1, .pp = 2, .tp = 1};
    g_autoptr(Plan) pipeline = plan_ok(spec, members, 2, &wish);
    uint32_t layers[2];
    for (uint32_t s = 0; s < 2; s++) {
        const PlanStage *stage = &pipeline->replicas[0].stages[s];
        layers[stage->ranks[0].device] = stage->layer_last - stage->layer_first + 1;
    }
    assert_true(layers[0] > 2 * layers[1]);
}

/* Workers that lead two devices each, hosts far apart: tensor ranks go to the devices of one host,
 * also where one of another host measured a little more, and never two to one device; stages reach
 * the other host when one is too small. Their ranks leave the cores alone: nobody is crowded. */
static void test_devices_of_one_host(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[4];
    static const uint32_t cpu;
    (void)state;
    plan_builder_members(members, 4);
    for (uint32_t i = 0; i < 4; i++) {
        members[i].worker = i % 2 == 0 ? "w0" : "w1";
        members[i].host = i % 2 == 0 ? "a" : "b";
        members[i].device_index = i / 2;
        members[i].device = "cuda:0 (NVIDIA H200, 139.8G)";
        members[i].numerics_classes = 1u << NUMERICS_FAST;
        members[i].read_bytes_per_s = i / 2 == 0 ? 1.02e12 : 1e12;
        members[i].int8_ops_per_s = members[i].f32_ops_per_s = 1e14;
        members[i].link_latency_s = 300e-6;
        members[i].cpus = &cpu;
        members[i].n_cpus = 1;
    }
    PlanWish wish = {.streams = 1, .numerics = NUMERICS_FAST};
    g_autoptr(Plan) best = plan_ok(spec, members, 4, &wish);
    assert_layout(best, 1, 1, 2);
    const PlanRank *ranks = best->replicas[0].stages[0].ranks;
    assert_string_equal(ranks[0].worker, ranks[1].worker);
    assert_int_equal(ranks[0].device + ranks[1].device, 1);
    assert_true(has_reason(best, "2 of 4 workers stay idle"));

    for (uint32_t i = 0; i < 4; i++) { /* one device is too small, and so is one host */
        members[i].memory_bytes = (uint64_t)1900 * MIB + DEVICE_RANK_BYTES + DEVICE_GROUP_BYTES;
    }
    wish.context = 1024;
    g_autoptr(Plan) spread = plan_ok(spec, members, 4, &wish);
    assert_layout(spread, 1, 2, 2);
    for (uint32_t s = 0; s < 2; s++) {
        ranks = spread->replicas[0].stages[s].ranks;
        assert_string_equal(ranks[0].worker, ranks[1].worker);
    }
    wish = (PlanWish){.streams = 1, .numerics = NUMERICS_FAST, .tp = 8, .pp = 1};
    Refusal r = plan_refused(spec, members, 4, &wish);
    assert_text(&r, "needs 8 workers and 4 can be used");
    refusal_clear(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_of_a_step),
        cmocka_unit_test(test_hosts_and_gpus),
        cmocka_unit_test(test_exact_kinds),
        cmocka_unit_test(test_class_by_place),
        cmocka_unit_test(test_what_a_device_holds_beside),
        cmocka_unit_test(test_uneven_devices),
        cmocka_unit_test(test_devices_of_one_host),
    };
    return cmocka_run_group_tests_name("planner-devices", tests, NULL, NULL);
}
