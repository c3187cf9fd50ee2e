/* The history checker: seed after seed, a whole cluster lives through a schedule of faults, and
 * what its clients saw and its parts did is held against the invariants (tests/sim/README.md).
 *
 *   test-history [--seeds M] [--first N]     many seeds
 *   test-history --seed N                    one, with its schedule and every log line
 *   test-history --bugs [--seeds M]          plants each seeded bug in turn; each must be found
 *   ... --bug NAME                           the same with a bug planted
 *
 * Each failure prints its seed. */
#include "tests/sim/bugs.h"
#include "tests/sim/fiber.h"
#include "tests/sim/trial.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BUG_SECONDS 120u /* of wall time, for one bug */

static int64_t first = 1, one = -1;
static int n_seeds = 200;
static gboolean trace, digests, all_bugs;
static char *bug;

static const GOptionEntry entries[] = {
    {"seed", 0, 0, G_OPTION_ARG_INT64, &one, "run this one seed, telling what happens", "N"},
    {"seeds", 0, 0, G_OPTION_ARG_INT, &n_seeds, "run so many", "M"},
    {"first", 0, 0, G_OPTION_ARG_INT64, &first, "begin with this one", "N"},
    {"trace", 0, 0, G_OPTION_ARG_NONE, &trace, "every log line", NULL},
    {"digests", 0, 0, G_OPTION_ARG_NONE, &digests, "a line for each seed", NULL},
    {"bug", 0, 0, G_OPTION_ARG_STRING, &bug, "with this bug planted", "NAME"},
    {"bugs", 0, 0, G_OPTION_ARG_NONE, &all_bugs, "with each bug in turn, until it is found", NULL},
    {NULL}};

/* ---- crashes --------------------------------------------------------------------------------- */

static char crash_text[96]; /* ready for a signal handler */

static void on_crash(int signal_number)
{
    if (write(STDOUT_FILENO, crash_text, strlen(crash_text)) < 0) {
        _exit(3);
    }
    raise(signal_number); /* its default again: SA_RESETHAND */
}

static void tell_crashes(void)
{
    const struct sigaction action = {.sa_handler = on_crash, .sa_flags = SA_RESETHAND};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGABRT, &action, NULL);
    sigaction(SIGTRAP, &action, NULL); /* g_error() */
}

/* ---- one seed -------------------------------------------------------------------------------- */

static bool run_seed(const Foundation *foundation, uint64_t seed, bool tell, TrialResult *sum)
{
    Schedule schedule;
    schedule_draw(&schedule, seed);
    if (tell) {
        g_autofree char *text = schedule_text(&schedule);
        fprintf(stderr, "%s\n", text);
    }
    TrialResult result;
    g_snprintf(crash_text, sizeof crash_text, "# crashed; again: test-history --seed %llu\n",
               (unsigned long long)seed);
    trial_run(foundation, &schedule, tell || trace, &result);
    sum->n_tokens += result.n_tokens;
    sum->n_attempts += result.n_attempts;
    sum->n_done += result.n_done;
    sum->n_resumed += result.n_resumed;
    sum->n_cancelled += result.n_cancelled;
    sum->virtual_us += result.virtual_us;
    sum->n_events += result.n_events;
    const bool good = result.violation == NULL;
    if (!good) {
        g_autofree char *text = schedule_text(&schedule);
        printf("# %s\n# %s\n", result.violation, text);
        printf("# again: test-history --seed %llu\n", (unsigned long long)seed);
    } else if (digests) {
        printf("# seed %llu digest %016llx events %llu stall %.3f of %.0f s\n",
               (unsigned long long)seed, (unsigned long long)result.digest,
               (unsigned long long)result.n_events, (double)result.stall_us / 1e6,
               (double)schedule_stall_us(&schedule) / 1e6);
    }
    trial_result_clear(&result);
    return good;
}

/* ---- many seeds ------------------------------------------------------------------------------ */

static int run_seeds(const Foundation *foundation)
{
    TrialResult sum = {0};
    int n_bad = 0;
    const clock_t start = clock();
    const int n = one >= 0 ? 1 : n_seeds;
    for (int i = 0; i < n; i++) {
        const uint64_t seed = (uint64_t)(one >= 0 ? one : first + i);
        n_bad += !run_seed(foundation, seed, one >= 0, &sum);
    }
    const double cpu = (double)(clock() - start) / CLOCKS_PER_SEC;
    printf("# %d seeds, %d bad: %.1f ms of cpu each; %u tokens, %u requests answered after %u "
           "attempts, %u resumptions, %u cancelled; %.0f s of virtual time, %llu events\n",
           n, n_bad, 1e3 * cpu / n, sum.n_tokens, sum.n_done, sum.n_attempts, sum.n_resumed,
           sum.n_cancelled, (double)sum.virtual_us / 1e6, (unsigned long long)sum.n_events);
    printf("1..1\n%s 1 - %d seeds from %lld\n", n_bad ? "not ok" : "ok", n,
           (long long)(one >= 0 ? one : first));
    return n_bad ? 1 : 0;
}

/* ---- each bug -------------------------------------------------------------------------------- */

/* In a process of its own: the product's assertions may find the bug first. */
static int hunt(const Foundation *foundation, Bug which)
{
    alarm(BUG_SECONDS);
    bug_plant(which);
    for (int i = 0; i < n_seeds; i++) {
        Schedule schedule;
        schedule_draw(&schedule, (uint64_t)(first + i));
        TrialResult result;
        trial_run(foundation, &schedule, false, &result);
        if (result.violation) {
            printf("# %s: found by seed %lld: %s\n", bug_entries[which].name,
                   (long long)(first + i), result.violation);
            fflush(stdout);
            return 0;
        }
        trial_result_clear(&result);
    }
    return 1;
}

static int run_bugs(const Foundation *foundation)
{
    int n_missed = 0;
    printf("1..%d\n", BUG_COUNT - 1);
    for (int i = 1; i < BUG_COUNT; i++) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            _exit(hunt(foundation, (Bug)i));
        }
        int status = 0;
        waitpid(child, &status, 0);
        const bool asserted = WIFSIGNALED(status) && WTERMSIG(status) != SIGALRM;
        const bool found = asserted || (WIFEXITED(status) && WEXITSTATUS(status) == 0);
        n_missed += !found;
        printf("%s %d - %s: %s%s\n", found ? "ok" : "not ok", i, bug_entries[i].name,
               bug_entries[i].what, asserted ? " (found by an assertion of the product)" : "");
    }
    return n_missed ? 1 : 0;
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
    if (bug && bug_by_name(bug) == BUG_NONE) {
        fprintf(stderr, "bug %s is unknown: bugs.c has the list\n", bug);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    tell_crashes();
    Foundation *foundation = foundation_new();
    bug_plant(bug ? bug_by_name(bug) : BUG_NONE);
    const int status = all_bugs ? run_bugs(foundation) : run_seeds(foundation);
    foundation_free(foundation);
    fiber_forget_stacks();
    return status;
}
