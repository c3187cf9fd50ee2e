/* The real Loop and what a daemon prepares. Waits are bounded by PATIENCE_US; nothing sleeps. */
#include "transport/daemon/daemon.h"

#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define PATIENCE_US G_GINT64_CONSTANT(10000000)
#define N_THREADS 4
#define N_POSTS 5000

static int set_up(void **state)
{
    *state = main_loop_new();
    return 0;
}

static int tear_down(void **state)
{
    main_loop_free(*state);
    return 0;
}

static void set_true(void *user)
{
    *(bool *)user = true;
}
static void count_up(void *user)
{
    ++*(int *)user;
}

static int64_t boot_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void test_clocks(void **state)
{
    Loop *loop = main_loop_loop(*state);
    int64_t before_us = boot_us(), now_us = loop_now_us(loop);
    assert_in_range(now_us, before_us, boot_us());
    assert_in_range(loop_wall_us(loop) / 1000000, time(NULL) - 1, time(NULL) + 1);
}

/* ---- posts ----------------------------------------------------------------------------------- */

typedef struct Numbered {
    int thread, number;
    int *last; /* per thread */
    int *n_run;
} Numbered;

static void run_numbered(void *user)
{
    Numbered *post = user;
    g_assert_cmpint(post->number, ==, post->last[post->thread] + 1);
    post->last[post->thread] = post->number;
    ++*post->n_run;
    g_free(post);
}

typedef struct Poster {
    Loop *loop;
    int thread;
    int *last, *n_run;
} Poster;

static void *post_many(void *user)
{
    Poster *poster = user;
    for (int i = 1; i <= N_POSTS; i++) {
        Numbered *post = g_new(Numbered, 1);
        *post = (Numbered){poster->thread, i, poster->last, poster->n_run};
        loop_post(poster->loop, run_numbered, post);
    }
    return NULL;
}

static void look_for_all(void *user);

typedef struct Goal {
    Loop *loop;
    const int *count;
    int n;
    bool reached;
} Goal;

static void look_for_all(void *user)
{
    Goal *goal = user;
    goal->reached = *goal->count >= goal->n;
    if (!goal->reached) {
        loop_timer_start(goal->loop, 500, look_for_all, goal);
    }
}

static void test_posts_from_threads_keep_their_order(void **state)
{
    Loop *loop = main_loop_loop(*state);
    int last[N_THREADS] = {0}, n_run = 0;
    Poster posters[N_THREADS];
    GThread *threads[N_THREADS];
    for (int i = 0; i < N_THREADS; i++) {
        posters[i] = (Poster){loop, i, last, &n_run};
        threads[i] = g_thread_new("poster", post_many, &posters[i]);
    }
    Goal goal = {loop, &n_run, N_THREADS * N_POSTS, false};
    look_for_all(&goal);
    assert_true(main_loop_run_until(*state, &goal.reached, PATIENCE_US));
    for (int i = 0; i < N_THREADS; i++) {
        g_thread_join(threads[i]);
    }
    assert_int_equal(n_run, N_THREADS * N_POSTS);
}

typedef struct Again {
    Loop *loop;
    int n;
} Again;

static void post_again(void *user)
{
    Again *again = user;
    again->n++;
    loop_post(again->loop, post_again, again);
}

/* A function that posts itself for ever starves neither timers nor the end of the loop. */
static void test_posts_do_not_starve_timers(void **state)
{
    Loop *loop = main_loop_loop(*state);
    Again *again = g_new0(Again, 1);
    again->loop = loop;
    bool fired = false;
    loop_timer_start(loop, 2000, set_true, &fired);
    loop_post(loop, post_again, again);
    assert_true(main_loop_run_until(*state, &fired, PATIENCE_US));
    assert_true(again->n > 1);
    main_loop_free(*state);
    *state = NULL;
    g_free(again);
}

static void test_free_runs_what_was_posted(void **state)
{
    int n = 0;
    loop_post(main_loop_loop(*state), count_up, &n);
    loop_timer_start(main_loop_loop(*state), 0, count_up, &n); /* forgotten */
    main_loop_free(*state);
    *state = NULL;
    assert_int_equal(n, 1);
}

/* ---- timers ---------------------------------------------------------------------------------- */

typedef struct Diary {
    Loop *loop;
    GString *text;
} Diary;

typedef struct Entry {
    Diary *diary;
    const char *word;
} Entry;

static void write_entry(void *user)
{
    Entry *entry = user;
    g_string_append_printf(entry->diary->text, "%s ", entry->word);
}

static void test_timer_order_and_cancel(void **state)
{
    Loop *loop = main_loop_loop(*state);
    Diary diary = {loop, g_string_new(NULL)};
    Entry a = {&diary, "a"}, b = {&diary, "b"}, c = {&diary, "c"}, never = {&diary, "never"};
    bool done = false;
    loop_timer_start(loop, 20000, set_true, &done);
    loop_timer_start(loop, 10000, write_entry, &c);
    LoopTimer *first = loop_timer_start(loop, 0, write_entry, &never);
    LoopTimer *middle = loop_timer_start(loop, 7000, write_entry, &never);
    loop_timer_start(loop, 0, write_entry, &a);
    loop_timer_start(loop, 5000, write_entry, &b);
    loop_timer_cancel(loop, middle);
    loop_timer_cancel(loop, first);
    loop_timer_cancel(loop, NULL);
    int64_t began_us = boot_us();
    assert_true(main_loop_run_until(*state, &done, PATIENCE_US));
    assert_true(boot_us() - began_us >= 19000);
    assert_string_equal(diary.text->str, "a b c ");
    g_string_free(diary.text, TRUE);
}

/* Random starts and cancellations against a plain list: exactly the timers not cancelled run, in
 * order of their times. */
typedef struct Planned {
    LoopTimer *timer;
    int64_t delay_us;
    GArray *ran; /* int64_t: delays in order of running */
} Planned;

static void run_planned(void *user)
{
    Planned *planned = user;
    planned->timer = NULL;
    g_array_append_val(planned->ran, planned->delay_us);
}

static void test_many_timers(void **state)
{
    Loop *loop = main_loop_loop(*state);
    g_autoptr(GRand) random = g_rand_new_with_seed(7);
    GArray *ran = g_array_new(FALSE, FALSE, sizeof(int64_t));
    Planned planned[1000];
    unsigned n_cancelled = 0;
    for (unsigned i = 0; i < G_N_ELEMENTS(planned); i++) {
        /* steps of 100 us: starting them all takes less than one step would matter */
        planned[i] = (Planned){NULL, g_rand_int_range(random, 0, 20) * 10000, ran};
        planned[i].timer = loop_timer_start(loop, planned[i].delay_us, run_planned, &planned[i]);
        unsigned victim = (unsigned)g_rand_int_range(random, 0, (int)i + 1);
        if (g_rand_boolean(random) && planned[victim].timer) {
            loop_timer_cancel(loop, g_steal_pointer(&planned[victim].timer));
            n_cancelled++;
        }
    }
    bool done = false;
    loop_timer_start(loop, 210000, set_true, &done);
    assert_true(main_loop_run_until(*state, &done, PATIENCE_US));
    assert_int_equal(ran->len, G_N_ELEMENTS(planned) - n_cancelled);
    for (unsigned i = 1; i < ran->len; i++) {
        assert_true(g_array_index(ran, int64_t, i - 1) <= g_array_index(ran, int64_t, i));
    }
    g_array_free(ran, TRUE);
}

typedef struct Chain {
    Loop *loop;
    int n;
    bool done;
} Chain;

static void next_in_chain(void *user)
{
    Chain *chain = user;
    chain->done = ++chain->n == 1000;
    if (!chain->done) {
        loop_timer_start(chain->loop, 0, next_in_chain, chain);
    }
}

static void test_timers_started_by_timers(void **state)
{
    Chain chain = {main_loop_loop(*state)};
    int posted = 0;
    loop_post(chain.loop, count_up, &posted);
    next_in_chain(&chain);
    assert_true(main_loop_run_until(*state, &chain.done, PATIENCE_US));
    assert_int_equal(posted, 1);
}

static void test_run_until_times_out(void **state)
{
    bool never = false;
    int64_t began_us = boot_us();
    assert_false(main_loop_run_until(*state, &never, 20000));
    assert_in_range(boot_us() - began_us, 20000, PATIENCE_US);
    assert_false(main_loop_run_until(*state, &never, 0));
}

static void be_late(void *user)
{
    int64_t until_us = boot_us() + 30000;
    while (boot_us() < until_us) {
    }
}

static void test_lag(void **state)
{
    Loop *loop = main_loop_loop(*state);
    bool done = false;
    assert_true(main_loop_lag_ms(*state) == 0.0);
    loop_timer_start(loop, 1000, set_true, &done);
    loop_post(loop, be_late, NULL);
    assert_true(main_loop_run_until(*state, &done, PATIENCE_US));
    assert_true(main_loop_lag_ms(*state) >= 25.0);
    assert_true(main_loop_lag_ms(*state) < (double)PATIENCE_US / 1000);
}

static void test_lag_of_a_handler_alone(void **state)
{
    bool done = false;
    loop_post(main_loop_loop(*state), be_late, NULL); /* no timer is due meanwhile */
    loop_post(main_loop_loop(*state), set_true, &done);
    assert_true(main_loop_run_until(*state, &done, -1));
    assert_true(main_loop_lag_ms(*state) >= 25.0);
}

typedef struct Stalls {
    unsigned n;
    double stalled_ms, computed_ms;
    bool computing;
    int64_t computed_us; /* by the handler itself */
} Stalls;

static void note_stall(double stalled_ms, double computed_ms, void *user)
{
    Stalls *s = user;
    s->n++;
    s->stalled_ms = stalled_ms;
    s->computed_ms = computed_ms;
}

static int64_t thread_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Over the bound, by computing or by sleeping in a call. */
static void stall(void *user)
{
    Stalls *s = user;
    const int64_t began_us = thread_us(), until_us = boot_us() + MAIN_LOOP_STALL_MS * 1000 + 20000;
    while (boot_us() < until_us) {
        if (!s->computing) {
            g_usleep((gulong)MAX(until_us - boot_us(), 1));
        }
    }
    s->computed_us = thread_us() - began_us;
}

static void test_stalls_are_told(void **state)
{
    Loop *loop = main_loop_loop(*state);
    for (unsigned computing = 0; computing < 2; computing++) {
        Stalls s = {.computing = computing == 1};
        bool done = false;
        main_loop_on_stall(*state, note_stall, &s);
        loop_timer_start(loop, 1000, set_true, &done); /* late, in the same round: no second one */
        loop_post(loop, stall, &s);
        assert_true(main_loop_run_until(*state, &done, -1));
        main_loop_on_stall(*state, NULL, NULL);
        assert_int_equal(s.n, 1);
        assert_true(s.stalled_ms >= MAIN_LOOP_STALL_MS);
        assert_true(s.computed_ms >= (double)s.computed_us / 1000);
        assert_true(s.computed_ms <= (double)s.computed_us / 1000 + MAIN_LOOP_STALL_MS / 2.0);
        assert_true(main_loop_lag_ms(*state) >= MAIN_LOOP_STALL_MS);
    }
}

/* ---- quit, signals, descriptors -------------------------------------------------------------- */

static void *quit_from_thread(void *user)
{
    main_loop_quit(user);
    return NULL;
}

static void test_quit_from_another_thread(void **state)
{
    GThread *thread = g_thread_new("quitter", quit_from_thread, *state);
    main_loop_run(*state);
    g_thread_join(thread);
    main_loop_quit(*state); /* before run: run returns at once */
    main_loop_run(*state);
}

static void test_signal(void **state)
{
    bool hup = false, term = false;
    main_loop_on_signal(*state, SIGHUP, set_true, &hup);
    main_loop_on_signal(*state, SIGTERM, set_true, &term);
    raise(SIGTERM);
    assert_true(main_loop_run_until(*state, &term, PATIENCE_US));
    assert_false(hup);
    raise(SIGHUP);
    assert_true(main_loop_run_until(*state, &hup, PATIENCE_US));
}

typedef struct Pipe {
    MainLoop *loop;
    int fds[2];
    unsigned watch;
    int n_read;
    bool done;
} Pipe;

static void read_one(void *user)
{
    Pipe *pipe_ = user;
    char byte;
    g_assert_cmpint(read(pipe_->fds[0], &byte, 1), ==, 1);
    pipe_->n_read++;
    if (byte == 'z') {
        main_loop_unwatch(pipe_->loop, pipe_->watch); /* from its own callback */
        pipe_->done = true;
    }
}

static void test_fd_watch(void **state)
{
    Pipe pipe_ = {.loop = *state};
    assert_int_equal(pipe(pipe_.fds), 0);
    pipe_.watch = main_loop_watch_fd(*state, pipe_.fds[0], read_one, &pipe_);
    assert_int_equal(write(pipe_.fds[1], "abzx", 4), 4);
    assert_true(main_loop_run_until(*state, &pipe_.done, PATIENCE_US));
    bool never = false;
    main_loop_run_until(*state, &never, 2000);
    assert_int_equal(pipe_.n_read, 3); /* not the byte behind the end of the watch */
    close(pipe_.fds[0]);
    close(pipe_.fds[1]);
}

static void test_two_loops_do_not_mix(void **state)
{
    MainLoop *other = main_loop_new();
    bool here = false;
    int there = 0;
    loop_post(main_loop_loop(other), count_up, &there);
    loop_post(main_loop_loop(*state), set_true, &here);
    assert_true(main_loop_run_until(*state, &here, PATIENCE_US));
    assert_int_equal(there, 0);
    main_loop_free(other);
    assert_int_equal(there, 1);
}

/* ---- the daemon ------------------------------------------------------------------------------ */

static void test_notify(void **state)
{
    g_autofree char *directory = g_dir_make_tmp("weft-notify-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(directory, "socket", NULL);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    g_strlcpy(address.sun_path, path, sizeof address.sun_path);
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    daemon_notify("READY=1"); /* without systemd: nothing */
    setenv("NOTIFY_SOCKET", path, 1);
    daemon_notify("READY=1");
    unsetenv("NOTIFY_SOCKET");
    char text[64] = "";
    ssize_t size = recv(fd, text, sizeof text - 1, MSG_DONTWAIT);
    assert_int_equal(size, strlen("READY=1"));
    assert_string_equal(text, "READY=1");
    close(fd);
    unlink(path);
    rmdir(directory);
}

static void test_prepare(void **state)
{
    daemon_prepare();
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    assert_true(limit.rlim_cur == limit.rlim_max);
    getrlimit(RLIMIT_CORE, &limit);
    assert_true(limit.rlim_cur <= 1);
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    close(fds[0]);
    assert_int_equal(write(fds[1], "x", 1), -1); /* and this process lives */
    close(fds[1]);
}

/* A process that was given one CPU counts one, whatever the host has. */
static void test_cpus_are_those_of_the_process(void **state)
{
    (void)state;
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    g_autoptr(GArray) all = daemon_cpus();
    assert_int_equal(all->len, CPU_COUNT(&before));
    assert_int_equal(daemon_n_cpus(), CPU_COUNT(&before));
    const uint32_t last = g_array_index(all, uint32_t, all->len - 1);
    assert_true(CPU_ISSET(last, &before));
    CPU_ZERO(&one);
    CPU_SET(last, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    g_autoptr(GArray) left = daemon_cpus();
    assert_int_equal(left->len, 1);
    assert_int_equal(g_array_index(left, uint32_t, 0), last);
    assert_int_equal(daemon_n_cpus(), 1);
    assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
}

#define LOOP_TEST(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        LOOP_TEST(test_clocks),
        LOOP_TEST(test_posts_from_threads_keep_their_order),
        LOOP_TEST(test_posts_do_not_starve_timers),
        LOOP_TEST(test_free_runs_what_was_posted),
        LOOP_TEST(test_timer_order_and_cancel),
        LOOP_TEST(test_many_timers),
        LOOP_TEST(test_timers_started_by_timers),
        LOOP_TEST(test_run_until_times_out),
        LOOP_TEST(test_lag),
        LOOP_TEST(test_lag_of_a_handler_alone),
        LOOP_TEST(test_stalls_are_told),
        LOOP_TEST(test_quit_from_another_thread),
        LOOP_TEST(test_signal),
        LOOP_TEST(test_fd_watch),
        LOOP_TEST(test_two_loops_do_not_mix),
        cmocka_unit_test(test_notify),
        cmocka_unit_test(test_prepare),
        cmocka_unit_test(test_cpus_are_those_of_the_process),
    };
    return cmocka_run_group_tests_name("daemon", tests, NULL, NULL);
}
