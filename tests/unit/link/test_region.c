/* Regions: payloads that a fill moves from memory to memory. What is let through, what is dropped
 * and how it is counted, and when a transfer is done. One thread, over inproc, spoilt by script;
 * the same between two processes over UCX: test_ucx.c. */
#include "proto/base/crc32c.h"
#include "transport/link/link.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define HANDLE 0x8877665544332211u
#define OP LINK_OP_ACTIVATIONS
#define SIZE 100000u

typedef struct End {
    LinkPort *port;
    Link *link;
    unsigned n_received, n_dead;
    LinkRegion place; /* named when a datagram arrives, unless its data is NULL */
    LinkTransfer transfer;
} End;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    End *end = user;
    end->n_received++;
    if (end->place.data != NULL) {
        assert_int_equal(link_receive_region(link, OP, header->step, &end->place, &end->transfer),
                         LINK_OK);
    }
}

static void on_dead(Link *link, const char *why, void *user)
{
    ((End *)user)->n_dead++;
}

typedef struct Pair {
    LinkFill *bus, *fault;
    End ends[2];
    const FaultAction *script; /* of what ends[0] sends; then PASS */
    unsigned n_script, n_sent;
    uint8_t *sent, *came;
} Pair;

static FaultAction scripted(uint64_t tag, const void *data, size_t size, void *user)
{
    Pair *pair = user;
    const unsigned i = pair->n_sent++;
    return i < pair->n_script ? pair->script[i] : FAULT_PASS;
}

static Pair *pair_new(bool seal)
{
    Pair *pair = g_new0(Pair, 1);
    pair->bus = link_fill_inproc_new();
    pair->fault = link_fill_fault_new(pair->bus, scripted, pair);
    for (unsigned side = 0; side < 2; side++) {
        const LinkPortOptions options = {.fill = side == 0 ? pair->fault : pair->bus,
                                         .receive = on_receive,
                                         .dead = on_dead,
                                         .user = &pair->ends[side]};
        pair->ends[side].port = link_port_open(&options, NULL);
        assert_non_null(pair->ends[side].port);
    }
    for (unsigned side = 0; side < 2; side++) {
        g_autoptr(GBytes) address = link_port_address(pair->ends[1 - side].port);
        LinkConnect connect = {
            .address = address, .handle = HANDLE, .peer = 1 - side, .seal = seal};
        pair->ends[side].link = link_connect(pair->ends[side].port, &connect, NULL);
        assert_non_null(pair->ends[side].link);
    }
    pair->sent = g_malloc(SIZE);
    pair->came = g_malloc0(SIZE);
    for (unsigned i = 0; i < SIZE; i++) {
        pair->sent[i] = (uint8_t)(i * 7 + (i >> 8));
    }
    return pair;
}

static void pair_free(Pair *pair)
{
    link_port_close(pair->ends[0].port);
    link_port_close(pair->ends[1].port);
    link_fill_free(pair->fault);
    link_fill_free(pair->bus);
    g_free(pair->sent);
    g_free(pair->came);
    g_free(pair);
}

static void send_region(Pair *pair, uint32_t step, size_t size)
{
    const LinkRegion region = {LINK_MEMORY_HOST, pair->sent, size};
    LinkTransfer transfer;
    assert_int_equal(link_send_region(pair->ends[0].link, OP, step, &region,
                                      crc32c(0, pair->sent, size), &transfer),
                     LINK_OK);
    assert_true(transfer.done && transfer.status == LINK_OK);
}

static void name_place(Pair *pair, uint32_t step, size_t size)
{
    const LinkRegion place = {LINK_MEMORY_HOST, pair->came, size};
    memset(pair->came, 0, SIZE);
    assert_int_equal(
        link_receive_region(pair->ends[1].link, OP, step, &place, &pair->ends[1].transfer),
        LINK_OK);
}

static void receive_all(Pair *pair)
{
    while (link_port_progress(pair->ends[1].port) > 0) {
    }
}

static bool came_right(Pair *pair, size_t size)
{
    const LinkTransfer *t = &pair->ends[1].transfer;
    return t->done && t->status == LINK_OK && t->size == size &&
           link_check_region(pair->ends[1].link, t, crc32c(0, pair->came, size)) &&
           memcmp(pair->came, pair->sent, size) == 0;
}

static const LinkCounters *counters(Pair *pair)
{
    return link_port_counters(pair->ends[1].port);
}

static void a_region_comes_to_its_place(void **state)
{
    Pair *pair = pair_new(false);
    assert_true(link_port_has_memory(pair->ends[0].port, LINK_MEMORY_HOST));
    assert_false(link_port_has_memory(pair->ends[0].port, LINK_MEMORY_CUDA));
    name_place(pair, 1, SIZE); /* named before it comes */
    receive_all(pair);
    assert_false(pair->ends[1].transfer.done);
    send_region(pair, 1, SIZE);
    receive_all(pair);
    assert_true(came_right(pair, SIZE));
    send_region(pair, 2, SIZE); /* and after */
    send_region(pair, 3, SIZE / 2);
    receive_all(pair);
    name_place(pair, 2, SIZE);
    assert_true(came_right(pair, SIZE));
    name_place(pair, 3, SIZE);
    assert_true(came_right(pair, SIZE / 2));
    assert_int_equal(pair->came[SIZE / 2], 0);
    assert_int_equal(counters(pair)->messages_received, 3);
    assert_int_equal(counters(pair)->bytes_received, 2 * SIZE + SIZE / 2);
    assert_int_equal(link_traffic(pair->ends[0].link)->bytes_sent, 2 * SIZE + SIZE / 2);
    pair_free(pair);
}

/* As the engine does it: a step's message says that its activations come by themselves. */
static void a_place_may_be_named_by_a_callback(void **state)
{
    Pair *pair = pair_new(false);
    pair->ends[1].place = (LinkRegion){LINK_MEMORY_HOST, pair->came, SIZE};
    send_region(pair, 5, SIZE); /* overtakes the message */
    assert_int_equal(link_send(pair->ends[0].link, LINK_OP_STEP, 0, 5, NULL, 0), LINK_OK);
    receive_all(pair);
    assert_int_equal(pair->ends[1].n_received, 1);
    assert_true(came_right(pair, SIZE));
    pair_free(pair);
}

static void what_is_spoilt_is_dropped_and_counted(void **state)
{
    static const FaultAction script[] = {FAULT_DROP,     FAULT_FLIP_BIT, FAULT_DUPLICATE,
                                         FAULT_DELAY,    FAULT_PASS,     FAULT_REPLAY_LAST,
                                         FAULT_FLIP_BIT, FAULT_FLIP_BIT};
    Pair *pair = pair_new(false);
    const LinkCounters *c = counters(pair);
    pair->script = script;
    pair->n_script = G_N_ELEMENTS(script);
    name_place(pair, 2, SIZE);
    send_region(pair, 1, SIZE); /* dropped */
    receive_all(pair);
    assert_false(pair->ends[1].transfer.done);
    send_region(pair, 2, SIZE); /* a bit is wrong: known when it has come */
    receive_all(pair);
    assert_true(pair->ends[1].transfer.done);
    assert_false(came_right(pair, SIZE));
    assert_true(c->dropped_corrupt == 1 && c->messages_received == 0);
    send_region(pair, 3, SIZE); /* doubled */
    name_place(pair, 3, SIZE);
    receive_all(pair);
    assert_true(came_right(pair, SIZE));
    assert_int_equal(c->dropped_replayed, 1);
    send_region(pair, 4, SIZE); /* behind the next one */
    send_region(pair, 5, SIZE);
    receive_all(pair);
    name_place(pair, 4, SIZE);
    assert_true(came_right(pair, SIZE));
    name_place(pair, 5, SIZE);
    assert_true(came_right(pair, SIZE));
    send_region(pair, 6, SIZE); /* then the last one again */
    receive_all(pair);
    assert_int_equal(c->dropped_replayed, 2);
    name_place(pair, 6, SIZE);
    assert_true(came_right(pair, SIZE));
    name_place(pair, 7, SIZE);
    send_region(pair, 7, SIZE);
    receive_all(pair);
    assert_false(came_right(pair, SIZE));
    assert_int_equal(c->dropped_corrupt, 2);
    assert_int_equal(c->dropped_stale, 0);
    pair_free(pair);
}

static void late_and_useless_offers_are_stale(void **state)
{
    Pair *pair = pair_new(false);
    const LinkCounters *c = counters(pair);
    send_region(pair, 1, SIZE);
    send_region(pair, 2, SIZE);
    receive_all(pair);
    name_place(pair, 2, SIZE); /* nobody will ask for 1 */
    assert_true(came_right(pair, SIZE));
    assert_int_equal(c->dropped_stale, 1);
    send_region(pair, 1, SIZE);
    receive_all(pair);
    assert_int_equal(c->dropped_stale, 2);
    for (unsigned i = 0; i < LINK_OFFERS + 3; i++) {
        send_region(pair, 10 + i, 1);
    }
    receive_all(pair);
    assert_int_equal(c->dropped_stale, 5);
    name_place(pair, 10 + LINK_OFFERS - 1, SIZE);
    assert_true(came_right(pair, 1));
    assert_int_equal(c->dropped_stale, 5 + LINK_OFFERS - 1);
    pair_free(pair);
}

static void one_that_is_too_large_is_corrupt(void **state)
{
    Pair *pair = pair_new(false);
    name_place(pair, 1, SIZE - 1);
    send_region(pair, 1, SIZE);
    receive_all(pair);
    assert_false(pair->ends[1].transfer.done);
    assert_int_equal(counters(pair)->dropped_corrupt, 1);
    assert_int_equal(pair->came[0], 0);
    send_region(pair, 1, SIZE - 1); /* another may still come */
    receive_all(pair);
    assert_true(came_right(pair, SIZE - 1));
    LinkTransfer transfer;
    const LinkRegion long_one = {LINK_MEMORY_HOST, pair->sent, (size_t)LINK_MESSAGE_LIMIT + 1};
    assert_int_equal(link_send_region(pair->ends[0].link, OP, 2, &long_one, 0, &transfer),
                     LINK_TOO_LONG);
    pair_free(pair);
}

/* ---- heads that nobody of ours would send ---- */

static void ignore_receive(LinkRaw *raw, void *data, size_t size, void *user) {}
static void ignore_dead(LinkRaw *raw, const char *why, void *user) {}
static void note_transferred(void *transfer, LinkStatus status, void *user)
{
    *(LinkStatus *)transfer = status;
}

typedef struct Head {
    uint64_t handle;
    uint32_t step;
    uint16_t op, flags;
    uint64_t seq;
    uint32_t length, crc;
    uint32_t payload_crc, zero;
} Head;

static void fill_crc(Head *head)
{
    head->crc = 0;
    head->crc = crc32c(crc32c(0, head, sizeof *head - 8), &head->payload_crc, 8);
}

static Head head_of(Pair *pair, uint64_t seq)
{
    Head head = {.handle = HANDLE,
                 .step = 1,
                 .op = OP,
                 .seq = seq,
                 .length = SIZE,
                 .payload_crc = crc32c(0, pair->sent, SIZE)};
    fill_crc(&head);
    return head;
}

static void made_up_heads(Pair *pair, bool seal)
{
    static const LinkRawEvents events = {
        .receive = ignore_receive, .dead = ignore_dead, .transferred = note_transferred};
    const LinkOps *ops = pair->bus->ops;
    const LinkCounters *c = counters(pair);
    LinkRawPort *port = ops->port_open(pair->bus->self, &events, NULL, NULL);
    g_autoptr(GBytes) address = link_port_address(pair->ends[1].port);
    LinkRaw *raw = ops->connect(port, address, HANDLE, NULL, NULL);
    const LinkRegion region = {LINK_MEMORY_HOST, pair->sent, SIZE};
    Head heads[6];
    for (unsigned i = 0; i < G_N_ELEMENTS(heads); i++) {
        heads[i] = head_of(pair, 1 + i);
    }
    heads[1].handle++;
    fill_crc(&heads[1]); /* another pair's */
    heads[2].payload_crc ^= 1;
    heads[3].length--; /* not what comes */
    fill_crc(&heads[3]);
    heads[4].crc ^= 0x100;
    for (unsigned i = 0; i < G_N_ELEMENTS(heads); i++) {
        const size_t size = i == 5 ? sizeof(Head) - 8 : sizeof(Head);
        LinkStatus status = LINK_AGAIN;
        assert_int_equal(ops->send_region(raw, &heads[i], size, &region, &status), LINK_OK);
        assert_int_equal(status, LINK_OK);
    }
    receive_all(pair);
    assert_int_equal(c->dropped_corrupt, seal ? 6 : 4);
    assert_int_equal(c->dropped_stale, seal ? 0 : 1);
    if (!seal) { /* the first was a right one */
        name_place(pair, 1, SIZE);
        assert_true(came_right(pair, SIZE));
    }
    ops->port_close(port);
}

static void made_up_heads_are_dropped(void **state)
{
    for (unsigned seal = 0; seal < 2; seal++) {
        Pair *pair = pair_new(seal != 0);
        made_up_heads(pair, seal != 0);
        pair_free(pair);
    }
}

/* ---- ends ---- */

static void a_wait_ends_with_its_link(void **state)
{
    Pair *pair = pair_new(false);
    End *end = &pair->ends[1];
    name_place(pair, 1, SIZE);
    link_close(pair->ends[0].link);
    receive_all(pair);
    assert_true(end->n_dead == 1 && end->transfer.done);
    assert_int_equal(end->transfer.status, LINK_PEER_DEAD);
    const LinkRegion place = {LINK_MEMORY_HOST, pair->came, SIZE};
    assert_int_equal(link_receive_region(end->link, OP, 2, &place, &end->transfer), LINK_PEER_DEAD);
    pair_free(pair);
    pair = pair_new(false);
    name_place(pair, 1, SIZE);
    end = &pair->ends[1];
    link_close(end->link);
    assert_true(end->transfer.done);
    assert_int_equal(end->transfer.status, LINK_CLOSED);
    send_region(pair, 1, SIZE);
    receive_all(pair);
    assert_int_equal(counters(pair)->dropped_stale, 1);
    pair_free(pair);
    pair = pair_new(false);
    LinkTransfer transfer;
    LinkRegion region = {LINK_MEMORY_HOST, pair->came, SIZE};
    send_region(pair, 1, SIZE); /* offered, never taken */
    send_region(pair, 2, SIZE);
    receive_all(pair);
    assert_int_equal(link_receive_region(pair->ends[1].link, OP, 3, &region, &transfer), LINK_OK);
    link_port_close(pair->ends[1].port);
    pair->ends[1].port = NULL;
    assert_true(transfer.done && transfer.status == LINK_CLOSED);
    pair_free(pair);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_region_comes_to_its_place),
        cmocka_unit_test(a_place_may_be_named_by_a_callback),
        cmocka_unit_test(what_is_spoilt_is_dropped_and_counted),
        cmocka_unit_test(late_and_useless_offers_are_stale),
        cmocka_unit_test(one_that_is_too_large_is_corrupt),
        cmocka_unit_test(made_up_heads_are_dropped),
        cmocka_unit_test(a_wait_ends_with_its_link),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
