/* Links over UCX between two processes: argv[1] = tcp (loopback) or shm (shared memory beside tcp).
 * The child is forked before UCX is touched; a socket pair carries addresses and the order of
 * events, so that nothing here sleeps.
 *
 *     parent  <-- control socket -->  child
 *     parent  <====== link ========>  child */
#include "proto/base/crc32c.h"
#include "transport/link/link.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define HANDLE 0x1234567890abcdefu
#define WAIT_US 20000000
#define BIG (20u << 20)

static const char *mode;

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* ---- one end ---- */

typedef struct End {
    int control;
    bool seal, is_child;
    LinkFill *fill;
    LinkPort *port;
    Link *link;
    GBytes *peer_address;
    uint32_t n_received, n_wrong;
    int64_t dead_us;
    char why[64];
    uint16_t last_op;
} End;

static uint8_t *big_pattern(void)
{
    static uint8_t *bytes;
    if (bytes == NULL) {
        bytes = g_malloc(BIG + 4096);
        uint32_t x = 1;
        for (size_t i = 0; i < BIG + 4096; i++) {
            x = x * 1664525u + 1013904223u;
            bytes[i] = (uint8_t)(x >> 24);
        }
    }
    return bytes;
}

/* The i-th message: its size and where its content begins in the pattern. */
static size_t message_size(uint32_t i)
{
    static const size_t sizes[] = {0, 1, 8192, 576, 33, 16384, 2304, 100003};
    return i % 2500 == 1000 ? BIG : i % 100 == 50 ? 1u << 20 : sizes[i % 8];
}

static const uint8_t *message_data(uint32_t i)
{
    return big_pattern() + i % 4093;
}

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    End *end = user;
    uint32_t i = end->n_received;
    bool right = link == end->link && header->handle == HANDLE && header->step == i &&
                 header->flags == (i & 0xffff) && header->length == message_size(i) &&
                 (uintptr_t)payload % 16 == 0 &&
                 memcmp(payload, message_data(i), header->length) == 0;
    end->n_wrong += !right;
    end->n_received++;
    end->last_op = header->op;
}

static void on_dead(Link *link, const char *why, void *user)
{
    End *end = user;
    end->dead_us = now_us();
    g_strlcpy(end->why, why, sizeof end->why);
}

static void control_send(const End *end, const void *data, size_t size)
{
    if (send(end->control, data, size, MSG_NOSIGNAL) != (ssize_t)size) {
        abort();
    }
}

static size_t control_receive(const End *end, void *data, size_t capacity)
{
    struct pollfd fd = {.fd = end->control, .events = POLLIN};
    if (poll(&fd, 1, WAIT_US / 1000) != 1) {
        return 0;
    }
    ssize_t n = recv(end->control, data, capacity, 0);
    return n > 0 ? (size_t)n : 0;
}

/* Both reach this point before either goes on. */
static bool meet(const End *end)
{
    char byte = 'm';
    control_send(end, &byte, 1);
    return control_receive(end, &byte, 1) == 1;
}

static bool end_open(End *end)
{
    end->fill = link_fill_ucx();
    LinkPortOptions options = {
        .fill = end->fill, .receive = on_receive, .dead = on_dead, .user = end, .crowded = true};
    g_autoptr(GError) error = NULL;
    end->port = link_port_open(&options, &error);
    if (end->port == NULL) {
        fprintf(stderr, "# %s\n", error->message);
        return false;
    }
    g_autoptr(GBytes) mine = link_port_address(end->port);
    control_send(end, g_bytes_get_data(mine, NULL), g_bytes_get_size(mine));
    uint8_t theirs[4096];
    size_t size = control_receive(end, theirs, sizeof theirs);
    end->peer_address = g_bytes_new(theirs, size);
    return size > 0;
}

static bool end_connect(End *end)
{
    LinkConnect connect = {.address = end->peer_address,
                           .handle = HANDLE,
                           .peer = end->is_child ? 0 : 1,
                           .seal = end->seal};
    memset(connect.send_key, end->is_child ? 7 : 9, sizeof connect.send_key);
    memset(connect.receive_key, end->is_child ? 9 : 7, sizeof connect.receive_key);
    g_autoptr(GError) error = NULL;
    end->link = link_connect(end->port, &connect, &error);
    if (end->link == NULL) {
        fprintf(stderr, "# %s\n", error->message);
    }
    return end->link != NULL;
}

static bool end_send(End *end, uint32_t i)
{
    size_t size = message_size(i);
    LinkPart parts[] = {{message_data(i), size / 2}, {message_data(i) + size / 2, size - size / 2}};
    return link_send(end->link, LINK_OP_PROBE, (uint16_t)i, i, parts, 2) == LINK_OK;
}

static bool end_wait_for(End *end, uint32_t n_received)
{
    int64_t until = now_us() + WAIT_US;
    while (end->n_received < n_received && end->dead_us == 0 && now_us() < until) {
        link_port_wait(end->port, 100000, 200);
    }
    return end->n_received == n_received && end->n_wrong == 0;
}

static void end_close(End *end)
{
    link_port_close(end->port);
    link_fill_free(end->fill);
    g_clear_pointer(&end->peer_address, g_bytes_unref);
    close(end->control);
}

/* ---- two processes ---- */

typedef struct Pair {
    End parent;
    pid_t child;
} Pair;

/* The child runs `child` and exits with 0 when that is true. */
static void pair_start(Pair *pair, bool seal, bool (*child)(End *end))
{
    int sockets[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets), 0);
    fflush(NULL);
    pair->child = fork();
    assert_true(pair->child >= 0);
    if (pair->child == 0) {
        close(sockets[0]);
        End end = {.control = sockets[1], .seal = seal, .is_child = true};
        bool right = child(&end);
        _exit(right ? 0 : 1);
    }
    close(sockets[1]);
    pair->parent = (End){.control = sockets[0], .seal = seal};
}

static void pair_reap(const Pair *pair, int expected_signal)
{
    int status;
    assert_int_equal(waitpid(pair->child, &status, 0), pair->child);
    if (expected_signal != 0) {
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == expected_signal);
    } else {
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

static void pair_end(Pair *pair, int expected_signal)
{
    pair_reap(pair, expected_signal);
    end_close(&pair->parent);
}

/* ---- mixed sizes, both ways ---- */

/* Progresses until the parent says that it has all. */
static bool child_leaves(End *end)
{
    struct pollfd fd = {.fd = end->control, .events = POLLIN};
    int64_t until = now_us() + WAIT_US;
    while (poll(&fd, 1, 0) == 0 && now_us() < until) {
        link_port_wait(end->port, 1000, 0);
    }
    bool right = meet(end);
    end_close(end);
    return right;
}

#define DOWN 10000u
#define UP 1200u

static bool child_receives_and_answers(End *end)
{
    if (!end_open(end) || !end_connect(end) || !end_wait_for(end, DOWN)) {
        fprintf(stderr, "# child: %u received, %u wrong, %s\n", end->n_received, end->n_wrong,
                end->why);
        return false;
    }
    for (uint32_t i = 0; i < UP; i++) {
        if (!end_send(end, i)) {
            return false;
        }
    }
    const LinkCounters *counters = link_port_counters(end->port);
    bool right = counters->messages_received == DOWN && counters->messages_sent == UP &&
                 counters->dropped_corrupt == 0 && counters->dropped_replayed == 0 &&
                 counters->dropped_stale == 0;
    return child_leaves(end) && right;
}

static void exchange(bool seal)
{
    Pair pair;
    big_pattern();
    pair_start(&pair, seal, child_receives_and_answers);
    End *end = &pair.parent;
    assert_true(end_open(end));
    assert_true(end_connect(end));
    int64_t start = now_us();
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < DOWN; i++) {
        assert_true(end_send(end, i));
        bytes += message_size(i);
    }
    assert_true(end_wait_for(end, UP));
    print_message("# %s %s: %u messages, %" G_GUINT64_FORMAT " MB down, %.2f s with the way back\n",
                  mode, seal ? "sealed" : "plain", DOWN, bytes >> 20,
                  (double)(now_us() - start) * 1e-6);
    assert_int_equal(link_port_counters(end->port)->bytes_sent, bytes);
    assert_true(meet(end));
    pair_end(&pair, 0);
}

static void mixed_sizes_sealed(void **state)
{
    exchange(true);
}

static void mixed_sizes_plain(void **state)
{
    exchange(false);
}

/* ---- what comes before this end has connected ---- */

static bool child_sends_early(End *end)
{
    bool right = end_open(end) && end_connect(end);
    for (uint32_t i = 0; right && i < 40; i++) {
        right = end_send(end, i);
    }
    return right && meet(end) && child_leaves(end);
}

static void early_messages_are_kept(void **state)
{
    Pair pair;
    pair_start(&pair, true, child_sends_early);
    End *end = &pair.parent;
    assert_true(end_open(end));
    struct pollfd fd = {.fd = end->control, .events = POLLIN};
    int64_t until = now_us() + WAIT_US;
    while (poll(&fd, 1, 0) == 0 && now_us() < until) {
        link_port_progress(end->port); /* takes them in; connects to nobody */
    }
    assert_true(meet(end));
    link_port_wait(end->port, 10000, 0);
    assert_int_equal(end->n_received, 0);
    assert_true(end_connect(end));
    assert_true(end_wait_for(end, 40));
    assert_true(meet(end));
    pair_end(&pair, 0);
}

/* ---- death ---- */

static bool child_waits_forever(End *end)
{
    bool right =
        end_open(end) && end_connect(end) && end_send(end, 0) && end_wait_for(end, 1) && meet(end);
    while (right) {
        link_port_wait(end->port, 1000000, 0);
    }
    return false;
}

static void start_and_greet(Pair *pair)
{
    pair_start(pair, true, child_waits_forever);
    End *end = &pair->parent;
    assert_true(end_open(end) && end_connect(end) && end_send(end, 0) && end_wait_for(end, 1) &&
                meet(end));
}

static void a_killed_peer_is_reported(void **state)
{
    Pair pair;
    start_and_greet(&pair);
    End *end = &pair.parent;
    int64_t start = now_us();
    assert_int_equal(kill(pair.child, SIGKILL), 0);
    pair_reap(&pair,
              SIGKILL); /* shared memory: UCX looks whether the process exists, and a zombie does */
    while (end->dead_us == 0 && now_us() - start < WAIT_US) {
        link_port_wait(end->port, 100000, 0);
    }
    print_message("# %s: kill -9 reported after %.1f ms (%s)\n", mode,
                  (double)(end->dead_us - start) * 1e-3, end->why);
    assert_true(end->dead_us != 0);
    assert_true(link_is_dead(end->link));
    assert_int_equal(link_send(end->link, LINK_OP_PROBE, 0, 0, NULL, 0), LINK_PEER_DEAD);
    assert_true(end->dead_us - start < 1000000);
    end_close(end);
}

/* Many times what sockets hold, to a peer that reads nothing: the port closes all the same. */
static void a_frozen_peer_does_not_hold_the_close(void **state)
{
    Pair pair;
    start_and_greet(&pair);
    End *end = &pair.parent;
    assert_int_equal(kill(pair.child, SIGSTOP), 0);
    int status;
    assert_int_equal(waitpid(pair.child, &status, WUNTRACED), pair.child);
    LinkPart part = {big_pattern(), BIG};
    LinkStatus sent = LINK_OK;
    for (unsigned i = 0; i < 20 && sent == LINK_OK; i++) {
        sent = link_send_try(end->link, LINK_OP_PROBE, 0, 0, &part, 1);
    }
    assert_int_equal(sent, LINK_AGAIN); /* bounded in flight */
    int64_t start = now_us();
    link_port_close(end->port);
    end->port = NULL;
    int64_t took = now_us() - start;
    print_message("# %s: close with a frozen peer took %.1f ms\n", mode, (double)took * 1e-3);
    assert_true(took < 1500000);
    assert_int_equal(kill(pair.child, SIGKILL), 0);
    pair_end(&pair, SIGKILL);
}

/* ---- regions ---- */

#define REGIONS 60u

static size_t region_size(uint32_t i)
{
    static const size_t sizes[] = {65536, 4, 1u << 20, 300004, 8192, BIG};
    return sizes[i % 11 == 5 ? 5 : i % 5];
}

static LinkStatus region_send(End *end, uint32_t i, LinkTransfer *transfer)
{
    const LinkRegion region = {LINK_MEMORY_HOST, (void *)message_data(i), region_size(i)};
    return link_send_region(end->link, LINK_OP_ACTIVATIONS, i, &region,
                            crc32c(0, region.data, region.size), transfer);
}

static bool region_wait(End *end, const LinkTransfer *transfer)
{
    int64_t until = now_us() + WAIT_US;
    while (!transfer->done && now_us() < until) {
        link_port_wait(end->port, 100000, 200);
    }
    return transfer->done;
}

/* Asks for region i into memory of its own, and looks at what came. */
static bool region_receive(End *end, uint32_t i)
{
    g_autofree uint8_t *memory = g_malloc0(BIG + 64);
    const LinkRegion place = {LINK_MEMORY_HOST, memory, BIG};
    LinkTransfer transfer;
    const size_t size = region_size(i);
    return link_receive_region(end->link, LINK_OP_ACTIVATIONS, i, &place, &transfer) == LINK_OK &&
           region_wait(end, &transfer) && transfer.status == LINK_OK && transfer.size == size &&
           link_check_region(end->link, &transfer, crc32c(0, memory, size)) &&
           memcmp(memory, message_data(i), size) == 0 && memory[size] == 0;
}

static bool child_receives_regions(End *end)
{
    bool right = end_open(end) && end_connect(end);
    for (uint32_t i = 0; right && i < REGIONS; i++) {
        right = region_receive(end, i) && end_send(end, i);
    }
    const LinkCounters *c = link_port_counters(end->port);
    right = right && end_wait_for(end, REGIONS) &&
            c->dropped_corrupt + c->dropped_replayed + c->dropped_stale == 0;
    return child_leaves(end) && right;
}

/* Regions and messages mixed; offers come before their places, and after. */
static void regions_go_from_memory_to_memory(void **state)
{
    Pair pair;
    LinkTransfer transfers[REGIONS];
    big_pattern();
    pair_start(&pair, false, child_receives_regions);
    End *end = &pair.parent;
    assert_true(end_open(end) && end_connect(end));
    assert_true(link_port_has_memory(end->port, LINK_MEMORY_HOST));
    for (uint32_t i = 0; i < REGIONS; i++) {
        if (i % 2 == 0) { /* else the message went with the region before */
            assert_int_equal(region_send(end, i, &transfers[i]), LINK_OK);
            assert_true(end_send(end, i) && end_send(end, i + 1));
        } else {
            assert_int_equal(region_send(end, i, &transfers[i]), LINK_OK);
        }
        assert_true(region_wait(end, &transfers[i]));
        assert_int_equal(transfers[i].status, LINK_OK);
    }
    assert_true(end_wait_for(end, REGIONS));
    assert_true(meet(end));
    pair_end(&pair, 0);
}

/* Takes offers in, names no place. */
static bool child_takes_nothing(End *end)
{
    bool right = end_open(end) && end_connect(end) && end_wait_for(end, 1) && end_send(end, 0);
    while (right) {
        link_port_wait(end->port, 1000000, 0);
    }
    return false;
}

static void offer_to_child(Pair *pair, LinkTransfer *transfer)
{
    pair_start(pair, false, child_takes_nothing);
    End *end = &pair->parent;
    assert_true(end_open(end) && end_connect(end));
    assert_int_equal(region_send(end, 2, transfer), LINK_OK);
    assert_true(end_send(end, 0) && end_wait_for(end, 1));
    assert_false(transfer->done);
}

static void a_killed_receiver_ends_the_transfer(void **state)
{
    Pair pair;
    LinkTransfer transfer;
    offer_to_child(&pair, &transfer);
    End *end = &pair.parent;
    assert_int_equal(kill(pair.child, SIGKILL), 0);
    pair_reap(&pair, SIGKILL);
    assert_true(region_wait(end, &transfer));
    assert_int_equal(transfer.status, LINK_PEER_DEAD);
    while (end->dead_us == 0) {
        link_port_wait(end->port, 100000, 0);
    }
    assert_int_equal(region_send(end, 3, &transfer), LINK_PEER_DEAD);
    end_close(end);
}

static void a_frozen_receiver_does_not_hold_the_close_either(void **state)
{
    Pair pair;
    LinkTransfer transfer;
    int status;
    offer_to_child(&pair, &transfer);
    End *end = &pair.parent;
    assert_int_equal(kill(pair.child, SIGSTOP), 0);
    assert_int_equal(waitpid(pair.child, &status, WUNTRACED), pair.child);
    link_port_close(end->port);
    end->port = NULL;
    assert_true(transfer.done && transfer.status != LINK_OK);
    assert_int_equal(kill(pair.child, SIGKILL), 0);
    pair_end(&pair, SIGKILL);
}

/* Offers, and waits until it is killed or told to leave. */
static bool child_offers(End *end)
{
    LinkTransfer transfer;
    big_pattern();
    bool right = end_open(end) && end_connect(end) && region_send(end, 5, &transfer) == LINK_OK &&
                 end_send(end, 0);
    while (right && !transfer.done) {
        link_port_wait(end->port, 1000000, 0);
    }
    return child_leaves(end) && right;
}

static void offer_from_child(Pair *pair)
{
    big_pattern();
    pair_start(pair, false, child_offers);
    End *end = &pair->parent;
    assert_true(end_open(end) && end_connect(end) && end_wait_for(end, 1));
}

/* Killed or frozen before its payload moved, or while it does; then the port closes, and memory may
 * go. A place that is never named must not hold anything either. */
static void a_sender_may_end_at_any_time(void **state)
{
    enum { KILL, FREEZE, WAYS };
    for (unsigned way = 0; way < WAYS; way++) {
        for (unsigned turns = 0; turns < 4; turns++) { /* of progress, after the place was named */
            Pair pair;
            LinkTransfer transfer = {0};
            uint8_t *memory = g_malloc(BIG);
            const LinkRegion place = {LINK_MEMORY_HOST, memory, BIG};
            int status;
            offer_from_child(&pair);
            End *end = &pair.parent;
            if (turns > 0) {
                assert_int_equal(
                    link_receive_region(end->link, LINK_OP_ACTIVATIONS, 5, &place, &transfer),
                    LINK_OK);
            }
            for (unsigned i = 1; i < turns; i++) {
                link_port_progress(end->port);
            }
            assert_int_equal(kill(pair.child, way == KILL ? SIGKILL : SIGSTOP), 0);
            if (way == KILL) {
                pair_reap(&pair, SIGKILL);
                assert_true(turns == 0 || region_wait(end, &transfer));
            } else {
                assert_int_equal(waitpid(pair.child, &status, WUNTRACED), pair.child);
            }
            link_port_close(end->port);
            end->port = NULL;
            assert_true(turns == 0 || transfer.done);
            g_free(memory);
            if (way == FREEZE) {
                assert_int_equal(kill(pair.child, SIGKILL), 0);
                pair_reap(&pair, SIGKILL);
            }
            end_close(end);
        }
    }
}

/* ---- waking up ---- */

static void *interrupt_main(void *data)
{
    link_port_interrupt(data);
    return NULL;
}

static void an_interrupt_ends_a_wait(void **state)
{
    Pair pair;
    start_and_greet(&pair);
    End *end = &pair.parent;
    for (unsigned i = 0; i < 20; i++) {
        pthread_t thread;
        int64_t start = now_us();
        assert_int_equal(pthread_create(&thread, NULL, interrupt_main, end->port), 0);
        link_port_wait(end->port, WAIT_US, 0);
        assert_true(now_us() - start < WAIT_US / 2);
        pthread_join(thread, NULL);
        link_port_wait(end->port, 0, 0);
    }
    assert_int_equal(kill(pair.child, SIGKILL), 0);
    pair_end(&pair, SIGKILL);
}

static void foreign_addresses_are_refused(void **state)
{
    End end = {.seal = false};
    int sockets[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets), 0);
    end.control = sockets[0];
    assert_int_equal(send(sockets[1], "WUCX, but not really", 20, 0), 20);
    assert_true(end_open(&end));
    LinkConnect connect = {.address = end.peer_address, .handle = 1};
    g_autoptr(GError) error = NULL;
    assert_null(link_connect(end.port, &connect, &error));
    assert_non_null(strstr(error->message, "install the same release"));
    g_clear_error(&error);
    g_autoptr(GBytes) mine = link_port_address(end.port);
    gsize size;
    g_autofree uint8_t *spoilt = g_memdup2(g_bytes_get_data(mine, &size), g_bytes_get_size(mine));
    spoilt[size - 1] ^= 1;
    g_autoptr(GBytes) bytes = g_bytes_new(spoilt, size);
    connect.address = bytes;
    assert_null(link_connect(end.port, &connect, &error));
    assert_non_null(strstr(error->message, "checksum"));
    close(sockets[1]);
    end_close(&end);
}

int main(int argc, char **argv)
{
    mode = argc > 1 ? argv[1] : "tcp";
    link_ucx_environment(argc, argv, strcmp(mode, "tcp") == 0 ? "tcp" : NULL, "lo");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mixed_sizes_sealed),
        cmocka_unit_test(mixed_sizes_plain),
        cmocka_unit_test(early_messages_are_kept),
        cmocka_unit_test(a_killed_peer_is_reported),
        cmocka_unit_test(a_frozen_peer_does_not_hold_the_close),
        cmocka_unit_test(regions_go_from_memory_to_memory),
        cmocka_unit_test(a_killed_receiver_ends_the_transfer),
        cmocka_unit_test(a_frozen_receiver_does_not_hold_the_close_either),
        cmocka_unit_test(a_sender_may_end_at_any_time),
        cmocka_unit_test(an_interrupt_ends_a_wait),
        cmocka_unit_test(foreign_addresses_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
