/* bench-link: what an exchange between two workers of one host costs, sealed and in the clear, and
 * what prefill-sized sums take.
 *
 *     bench-link [tcp|shm] [SECONDS]     tcp (the default): UCX over loopback;  shm: shared memory;
 * SECONDS a row, 0.3
 *
 * Two processes, each pinned to a core where there are two, make an all-reduce of n floats over and
 * over, as tensor parallel decode does twice a layer; the figure is the median over blocks of BLOCK
 * all-reduces. Compare with the table in shared/WIRE.md. */
#include "transport/group/group.h"
#include "transport/link/link_clock.h"

#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCKS_LIMIT 4096u
#define DEADLINE_US 20000000

static const size_t sizes[] = {1, 576, 2048, 4096, 16384, 1u << 20};

typedef struct Side {
    uint32_t rank;
    int control;
    LinkFill *fill;
    LinkPort *port;
    Link *link;
    Group *group;
    uint32_t step;
} Side;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    group_receive(((Side *)user)->group, link, header, payload);
}

static void on_dead(Link *link, const char *why, void *user)
{
    fprintf(stderr, "bench-link: the other process is gone: %s\n", why);
    _exit(1);
}

static void pin(uint32_t rank)
{
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < 2) {
        return;
    }
    uint32_t seen = 0;
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &all) && seen++ == rank) {
            CPU_SET(cpu, &one);
        }
    }
    sched_setaffinity(0, sizeof one, &one);
}

static void die(const char *what)
{
    fprintf(stderr, "bench-link: %s\n", what);
    exit(1);
}

static void side_open(Side *side, uint64_t handle, bool seal)
{
    g_autoptr(GError) error = NULL;
    LinkPortOptions options = {
        .fill = side->fill, .receive = on_receive, .dead = on_dead, .user = side};
    side->port = link_port_open(&options, &error);
    if (side->port == NULL) {
        die(error->message);
    }
    uint8_t theirs[4096];
    g_autoptr(GBytes) mine = link_port_address(side->port);
    if (send(side->control, g_bytes_get_data(mine, NULL), g_bytes_get_size(mine), 0) < 0) {
        die("cannot hand over the link address");
    }
    ssize_t size = recv(side->control, theirs, sizeof theirs, 0);
    g_autoptr(GBytes) address = g_bytes_new(theirs, size > 0 ? (gsize)size : 0);
    LinkConnect connect = {
        .address = address, .handle = handle, .peer = 1 - side->rank, .seal = seal};
    memset(connect.send_key, 1 + (int)side->rank, sizeof connect.send_key);
    memset(connect.receive_key, 2 - (int)side->rank, sizeof connect.receive_key);
    side->link = link_connect(side->port, &connect, &error);
    if (side->link == NULL) {
        die(error->message);
    }
    Link *links[2] = {NULL, NULL};
    links[1 - side->rank] = side->link;
    bool crowded = g_get_num_processors() < 2;
    GroupOptions group = {.port = side->port,
                          .n_ranks = 2,
                          .rank = side->rank,
                          .links = links,
                          .spin_us = 200,
                          .yield = crowded,
                          .two_shot_bytes = 64u << 10};
    side->group = group_new(&group);
}

static void side_close(Side *side)
{
    char byte = 0;
    if (send(side->control, &byte, 1, 0) != 1) {
        die("the other process is gone");
    }
    struct pollfd fd = {.fd = side->control, .events = POLLIN};
    while (poll(&fd, 1, 0) == 0) { /* it may still need what this side is sending */
        link_port_wait(side->port, 1000, 0);
    }
    if (recv(side->control, &byte, 1, 0) != 1) {
        die("the other process is gone");
    }
    group_free(side->group);
    link_port_close(side->port);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of an all-reduce of n floats. Both sides make the same number of them: rank 0
 * says in each block whether it is the last. */
static double side_measure(Side *side, size_t n, double seconds)
{
    static const uint32_t cuts[] = {0, 1, 2};
    g_autofree float *mine = g_new0(float, n), *out = g_new0(float, n);
    g_autofree double *blocks = g_new(double, BLOCKS_LIMIT);
    unsigned block = n > 100000 ? 4 : 50, n_blocks = 0;
    GroupWait wait = {.operation = "bench"};
    int64_t until = link_clock_us() + (int64_t)(seconds * 1e6);
    for (uint8_t more = 1; more != 0 && n_blocks < BLOCKS_LIMIT;) {
        uint64_t start = link_clock_ns();
        wait.step = ++side->step;
        wait.deadline_us = link_clock_us() + DEADLINE_US;
        for (wait.site = 0; wait.site < block; wait.site++) {
            if (group_all_reduce(side->group, &wait, 2, cuts, mine, n, n, out) != GROUP_OK) {
                die("an all-reduce failed");
            }
        }
        blocks[n_blocks++] = (double)(link_clock_ns() - start) / 1e3 / block;
        more = link_clock_us() < until;
        if (group_broadcast(side->group, &wait, 0, &more, 1) != GROUP_OK) {
            die("a broadcast failed");
        }
    }
    qsort(blocks, n_blocks, sizeof *blocks, compare);
    return blocks[n_blocks / 2];
}

static void side_run(Side *side, double seconds)
{
    double us[2][G_N_ELEMENTS(sizes)];
    pin(side->rank);
    side->fill = link_fill_ucx();
    for (unsigned seal = 0; seal < 2; seal++) {
        side_open(side, 1 + seal, seal != 0);
        side_measure(side, 4096, seconds / 3); /* connects, warms up */
        for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
            us[seal][i] = side_measure(side, sizes[i], seconds);
        }
        side_close(side);
    }
    link_fill_free(side->fill);
    for (size_t i = 0; side->rank == 0 && i < G_N_ELEMENTS(sizes); i++) {
        printf("%8zu %10zu %12.1f %12.1f %12.1f\n", sizes[i], sizes[i] * sizeof(float), us[0][i],
               us[1][i], us[1][i] - us[0][i]);
    }
}

int main(int argc, char **argv)
{
    const char *kind = argc > 1 ? argv[1] : "tcp";
    double seconds = argc > 2 ? g_ascii_strtod(argv[2], NULL) : 0.3;
    if ((strcmp(kind, "tcp") != 0 && strcmp(kind, "shm") != 0) || !(seconds > 0 && seconds < 60)) {
        fprintf(stderr, "usage: bench-link [tcp|shm] [SECONDS]\n");
        return 2;
    }
    link_ucx_environment(argc, argv, strcmp(kind, "tcp") == 0 ? "tcp" : NULL, "lo");
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0) {
        die("cannot create a socket pair");
    }
    printf("all-reduce between 2 processes over UCX %s, sealing by %s (us, median)\n", kind,
           link_seal_name());
    printf("%8s %10s %12s %12s %12s\n", "floats", "bytes", "plain", "sealed", "seal costs");
    fflush(stdout);
    pid_t child = fork();
    Side side = {.rank = child == 0 ? 1 : 0, .control = sockets[child == 0 ? 1 : 0]};
    close(sockets[child == 0 ? 0 : 1]);
    side_run(&side, seconds);
    if (child == 0) {
        return 0;
    }
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1;
}
