/* The history checker: seed after seed, a whole cluster lives through a schedule of faults, and
 * what its clients saw and its parts did is held against the invariants (tests/sim/README.md).
 *
 *   test-history [--seed N] [--seeds M] [--first N] [--trace]
 *
 * Each failure prints its seed; --seed N runs that one again, with every log line. */
#include "tests/sim/trial.h"

#include "tests/sim/fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static int64_t first = 1, one = -1;
static int n_seeds = 200;
static gboolean trace, digests;

static const GOptionEntry entries[] = {
    {"seed", 0, 0, G_OPTION_ARG_INT64, &one, "run this one seed, telling what happens", "N"},
    {"seeds", 0, 0, G_OPTION_ARG_INT, &n_seeds, "run so many", "M"},
    {"first", 0, 0, G_OPTION_ARG_INT64, &first, "begin with this one", "N"},
    {"trace", 0, 0, G_OPTION_ARG_NONE, &trace, "every log line", NULL},
    {"digests", 0, 0, G_OPTION_ARG_NONE, &digests, "a line for each seed", NULL},
    {NULL}};

static bool run_seed(const Foundation *foundation, uint64_t seed, bool tell, TrialResult *sum)
{
    Schedule schedule;
    schedule_draw(&schedule, seed);
    if (tell) {
        g_autofree char *text = schedule_text(&schedule);
        fprintf(stderr, "%s\n", text);
    }
    TrialResult result;
    trial_run(foundation, &schedule, tell || trace, &result);
    sum->n_tokens += result.n_tokens;
    sum->n_attempts += result.n_attempts;
    sum->n_done += result.n_done;
    sum->n_cancelled += result.n_cancelled;
    sum->virtual_us += result.virtual_us;
    sum->n_events += result.n_events;
    const bool good = result.violation == NULL;
    if (!good) {
        g_autofree char *text = schedule_text(&schedule);
        printf("# %s\n# %s\n", result.violation, text);
        printf("# again: test-history --seed %llu\n", (unsigned long long)seed);
    } else if (digests) {
        printf("# seed %llu digest %016llx events %llu\n", (unsigned long long)seed,
               (unsigned long long)result.digest, (unsigned long long)result.n_events);
    }
    trial_result_clear(&result);
    return good;
}

int main(int argc, char **argv)
{
    g_autoptr(GOptionContext) options = g_option_context_new(NULL);
    g_option_context_add_main_entries(options, entries, NULL);
    g_autoptr(GError) error = NULL;
    if (!g_option_context_parse(options, &argc, &argv, &error)) {
        fprintf(stderr, "%s\n", error->message);
        return 2;
    }
    Foundation *foundation = foundation_new();
    TrialResult sum = {0};
    int n_bad = 0;
    const clock_t start = clock();
    const int n = one >= 0 ? 1 : n_seeds;
    for (int i = 0; i < n; i++) {
        const uint64_t seed = (uint64_t)(one >= 0 ? one : first + i);
        n_bad += !run_seed(foundation, seed, one >= 0, &sum);
    }
    foundation_free(foundation);
    fiber_forget_stacks();
    const double cpu = (double)(clock() - start) / CLOCKS_PER_SEC;
    printf("# %d seeds, %d bad: %.1f ms of cpu each; %u tokens, %u requests answered after %u "
           "attempts, %u cancelled; %.0f s of virtual time, %llu events\n",
           n, n_bad, 1e3 * cpu / n, sum.n_tokens, sum.n_done, sum.n_attempts, sum.n_cancelled,
           (double)sum.virtual_us / 1e6, (unsigned long long)sum.n_events);
    printf("1..1\n%s 1 - %d seeds from %lld\n", n_bad ? "not ok" : "ok", n,
           (long long)(one >= 0 ? one : first));
    return n_bad ? 1 : 0;
}
