/* The layer above the fills: what is on the wire, what is let through, what is dropped and how it
 * is counted. One thread; the other end is a port of its own, or a bare port of the fill that sends
 * whatever a test makes up. */
#include "proto/base/checked.h"
#include "proto/base/crc32c.h"
#include "transport/crypto/aead.h"
#include "transport/link/link.h"
#include "transport/link/replay_window.h"
#include "transport/link/tag_table.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define HANDLE 0x1122334455667788u

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* ---- checksums and the window ---- */

/* Bit by bit, as RFC 3720 has it. */
static uint32_t crc_by_bits(const uint8_t *data, size_t size)
{
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < size; i++) {
        crc ^= data[i];
        for (unsigned bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
        }
    }
    return ~crc;
}

static void crc32c_is_castagnoli(void **state)
{
    assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283u); /* the published check value */
    static uint8_t data[10000];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)(i * 131 + (i >> 7));
    }
    for (size_t size = 0; size < sizeof data; size = size * 5 / 4 + 1) {
        uint32_t expected = crc_by_bits(data + 1, size - (size > 0));
        assert_int_equal(crc32c(0, data + 1, size - (size > 0)), expected);
        assert_int_equal(crc32c_generic(0, data + 1, size - (size > 0)), expected);
        assert_int_equal(crc32c(crc32c(0, data, size / 3), data + size / 3, size - size / 3),
                         crc_by_bits(data, size));
    }
}

static void the_window_accepts_each_number_once(void **state)
{
    ReplayWindow window = {0};
    assert_false(replay_window_accept(&window, 0));
    assert_true(replay_window_accept(&window, 1));
    assert_false(replay_window_accept(&window, 1));
    assert_true(replay_window_accept(&window, 63));
    assert_true(replay_window_accept(&window, 2));
    assert_false(replay_window_accept(&window, 2));
    assert_true(replay_window_accept(&window, 70));
    assert_true(replay_window_accept(&window, 7));
    assert_false(replay_window_accept(&window, 6)); /* 64 behind */
    assert_true(replay_window_accept(&window, UINT64_MAX));
    assert_false(replay_window_accept(&window, 71));
    assert_true(replay_window_accept(&window, UINT64_MAX - 1));
    assert_false(replay_window_accept(&window, UINT64_MAX));
}

/* ---- two ends ---- */

typedef struct End {
    LinkPort *port;
    Link *link;
    unsigned n_received, n_dead;
    LinkHeader header;
    uint8_t payload[4096];
    unsigned steps[128];
    LinkStatus sent_inside;
    bool send_inside;
} End;

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    End *end = user;
    assert_ptr_equal(link, end->link);
    end->header = *header;
    if (header->length <= sizeof end->payload) {
        memcpy(end->payload, payload, header->length);
    }
    end->steps[end->n_received++ % G_N_ELEMENTS(end->steps)] = header->step;
    if (end->send_inside) {
        end->sent_inside = link_send(link, LINK_OP_TOKEN, 0, 0, NULL, 0);
    }
}

static void on_dead(Link *link, const char *why, void *user)
{
    ((End *)user)->n_dead++;
}

static LinkConnect connect_options(GBytes *address, bool seal, unsigned side)
{
    LinkConnect connect = {.address = address, .handle = HANDLE, .peer = 1 - side, .seal = seal};
    memset(connect.send_key, 0x10 + (int)side, sizeof connect.send_key);
    memset(connect.receive_key, 0x11 - (int)side, sizeof connect.receive_key);
    return connect;
}

static LinkPort *open_port(LinkFill *fill, End *end)
{
    LinkPortOptions options = {.fill = fill, .receive = on_receive, .dead = on_dead, .user = end};
    LinkPort *port = link_port_open(&options, NULL);
    assert_non_null(port);
    return port;
}

typedef struct Pair {
    LinkFill *bus, *fault;
    End ends[2];
    const FaultAction *script; /* action of the i-th datagram that ends[0] sends; then PASS */
    unsigned n_script, n_sent;
} Pair;

static FaultAction scripted(uint64_t tag, const void *data, size_t size, void *user)
{
    Pair *pair = user;
    assert_true(tag == HANDLE);
    unsigned i = pair->n_sent++;
    return i < pair->n_script ? pair->script[i] : FAULT_PASS;
}

static Pair *pair_new(bool seal)
{
    Pair *pair = g_new0(Pair, 1);
    pair->bus = link_fill_inproc_new();
    pair->fault = link_fill_fault_new(pair->bus, scripted, pair);
    pair->ends[0].port = open_port(pair->fault, &pair->ends[0]);
    pair->ends[1].port = open_port(pair->bus, &pair->ends[1]);
    for (unsigned side = 0; side < 2; side++) {
        g_autoptr(GBytes) address = link_port_address(pair->ends[1 - side].port);
        LinkConnect connect = connect_options(address, seal, side);
        pair->ends[side].link = link_connect(pair->ends[side].port, &connect, NULL);
        assert_non_null(pair->ends[side].link);
        assert_int_equal(link_peer(pair->ends[side].link), 1 - side);
    }
    return pair;
}

static void pair_free(Pair *pair)
{
    link_port_close(pair->ends[0].port);
    link_port_close(pair->ends[1].port);
    link_fill_free(pair->fault);
    link_fill_free(pair->bus);
    g_free(pair);
}

static LinkStatus send_text(End *end, uint32_t step, const char *text)
{
    LinkPart part = {text, strlen(text)};
    return link_send(end->link, LINK_OP_STEP, 7, step, &part, 1);
}

static void receive_all(End *end)
{
    while (link_port_progress(end->port) > 0) {
    }
}

static void a_message_arrives_as_it_was_sent(void **state)
{
    for (unsigned seal = 0; seal < 2; seal++) {
        Pair *pair = pair_new(seal != 0);
        LinkPart parts[] = {{"part", 4}, {NULL, 0}, {"s in a row", 10}};
        assert_int_equal(link_send(pair->ends[0].link, LINK_OP_SAMPLE, 0xbeef, 99, parts, 3),
                         LINK_OK);
        assert_int_equal(link_send(pair->ends[0].link, LINK_OP_TOKEN, 1, 100, NULL, 0), LINK_OK);
        assert_int_equal(link_port_progress(pair->ends[1].port), 2);
        End *end = &pair->ends[1];
        assert_int_equal(end->n_received, 2);
        assert_memory_equal(end->payload, "parts in a row", 14);
        assert_true(end->header.op == LINK_OP_TOKEN && end->header.flags == 1 &&
                    end->header.step == 100);
        assert_true(end->header.seq == 2 && end->header.length == 0 &&
                    end->header.handle == HANDLE);
        assert_int_equal(end->steps[0], 99);
        const LinkCounters *sent = link_port_counters(pair->ends[0].port),
                           *got = link_port_counters(end->port);
        assert_true(sent->messages_sent == 2 && sent->bytes_sent == 14 &&
                    got->messages_received == 2 && got->bytes_received == 14);
        assert_true(sent->seal_ns > 0);
        pair_free(pair);
    }
}

/* ---- the bytes on the wire ---- */

typedef struct Wire {
    uint8_t bytes[256];
    size_t size;
    unsigned n;
} Wire;

static void wire_receive(LinkRaw *raw, void *data, size_t size, void *user)
{
    Wire *wire = user;
    assert_non_null(raw);
    wire->n++;
    wire->size = size;
    memcpy(wire->bytes, data, MIN(size, sizeof wire->bytes));
}

static void wire_dead(LinkRaw *raw, const char *why, void *user) {}

/* A link whose other end is a bare port of the fill. */
typedef struct Bare {
    LinkFill *bus;
    End end;
    LinkRawPort *port;
    LinkRaw *raw;
    Wire wire;
} Bare;

static Bare *bare_new(bool seal)
{
    static const LinkRawEvents events = {.receive = wire_receive, .dead = wire_dead};
    Bare *bare = g_new0(Bare, 1);
    bare->bus = link_fill_inproc_new();
    bare->end.port = open_port(bare->bus, &bare->end);
    bare->port = bare->bus->ops->port_open(bare->bus->self, &events, &bare->wire, NULL);
    g_autoptr(GBytes) theirs = bare->bus->ops->address(bare->port),
                      ours = link_port_address(bare->end.port);
    LinkConnect connect = connect_options(theirs, seal, 0);
    bare->end.link = link_connect(bare->end.port, &connect, NULL);
    bare->raw = bare->bus->ops->connect(bare->port, ours, HANDLE, NULL, NULL);
    assert_true(bare->end.link != NULL && bare->raw != NULL);
    return bare;
}

static void bare_free(Bare *bare)
{
    bare->bus->ops->port_close(bare->port);
    link_port_close(bare->end.port);
    link_fill_free(bare->bus);
    g_free(bare);
}

static const LinkCounters *bare_send(Bare *bare, const void *data, size_t size)
{
    void *buffer = bare->bus->ops->buffer(bare->raw, size);
    assert_non_null(buffer);
    memcpy(buffer, data, size);
    assert_int_equal(bare->bus->ops->send(bare->raw, buffer, size), LINK_OK);
    receive_all(&bare->end);
    return link_port_counters(bare->end.port);
}

static const uint8_t wire_head[28] = {0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, /* handle */
                                      0x04, 0x03, 0x02, 0x01,                         /* step */
                                      2,    0,    7,    0,                         /* op, flags */
                                      1,    0,    0,    0,    0,    0,    0,    0, /* number */
                                      5,    0,    0,    0};                        /* length */

static void the_wire_is_as_documented(void **state)
{
    for (unsigned seal = 0; seal < 2; seal++) {
        Bare *bare = bare_new(seal != 0);
        assert_int_equal(send_text(&bare->end, 0x01020304, "hello"), LINK_OK);
        bare->bus->ops->progress(bare->port);
        const uint8_t *bytes = bare->wire.bytes;
        assert_int_equal(bare->wire.size, 32 + 5 + (seal != 0 ? 16 : 0));
        assert_memory_equal(bytes, wire_head, sizeof wire_head);
        uint32_t crc = (uint32_t)bytes[28] | (uint32_t)bytes[29] << 8 | (uint32_t)bytes[30] << 16 |
                       (uint32_t)bytes[31] << 24;
        if (seal == 0) {
            uint8_t whole[37] = {0};
            memcpy(whole, wire_head, sizeof wire_head);
            memcpy(whole + 32, "hello", 5);
            assert_int_equal(crc, crc_by_bits(whole, sizeof whole));
            assert_memory_equal(bytes + 32, "hello", 5);
        } else {
            uint8_t key_bytes[32], plain[5];
            memset(key_bytes, 0x10, sizeof key_bytes);
            g_autoptr(AeadKey) key = aead_key_new(key_bytes, AEAD_OPENSSL, NULL);
            assert_int_equal(crc, 0);
            assert_memory_not_equal(bytes + 32, "hello", 5);
            assert_true(aead_open(key, 1, bytes, 32, bytes + 32, 5, plain, bytes + 37));
            assert_memory_equal(plain, "hello", 5);
        }
        bare_free(bare);
    }
}

/* An unsealed datagram with a right checksum. */
static size_t make_plain(uint8_t *out, uint64_t handle, uint64_t seq, uint32_t length,
                         const char *payload)
{
    memcpy(out, wire_head, sizeof wire_head);
    for (unsigned i = 0; i < 8; i++) {
        out[i] = (uint8_t)(handle >> 8 * i);
        out[16 + i] = (uint8_t)(seq >> 8 * i);
        out[24 + i] = (uint8_t)((uint64_t)length >> 8 * i);
    }
    size_t size = strlen(payload);
    memcpy(out + 32, payload, size);
    uint32_t crc = crc_by_bits(out, 32 + size);
    for (unsigned i = 0; i < 4; i++) {
        out[28 + i] = (uint8_t)(crc >> 8 * i);
    }
    return 32 + size;
}

static void what_does_not_fit_is_dropped_and_counted(void **state)
{
    Bare *bare = bare_new(false);
    uint8_t d[256];
    size_t size = make_plain(d, HANDLE, 1, 5, "hello");
    assert_int_equal(bare_send(bare, d, 31)->dropped_corrupt, 1);       /* shorter than a header */
    assert_int_equal(bare_send(bare, d, size - 1)->dropped_corrupt, 2); /* cut */
    d[33] ^= 1;
    assert_int_equal(bare_send(bare, d, size)->dropped_corrupt, 3);
    d[33] ^= 1;
    assert_int_equal(bare_send(bare, d, size)->messages_received, 1);
    assert_int_equal(bare_send(bare, d, size)->dropped_replayed, 1);
    size = make_plain(d, HANDLE - 1, 2, 5, "stale");
    assert_int_equal(bare_send(bare, d, size)->dropped_stale, 1);
    size = make_plain(d, HANDLE, 2, 6, "short");
    assert_int_equal(bare_send(bare, d, size)->dropped_corrupt, 4);
    size = make_plain(d, HANDLE, 0, 5, "zero!");
    assert_int_equal(bare_send(bare, d, size)->dropped_replayed, 2);
    size = make_plain(d, HANDLE, 2, 5, "right");
    assert_int_equal(bare_send(bare, d, size)->messages_received, 2);
    assert_memory_equal(bare->end.payload, "right", 5);
    assert_int_equal(bare->end.n_received, 2);
    bare_free(bare);
}

/* One sealed datagram: any single flipped bit is noticed, then the datagram itself passes, once. */
static void every_bit_of_a_sealed_message_counts(void **state)
{
    Bare *bare = bare_new(true);
    uint8_t key_bytes[32], d[32 + 5 + 16] = {0};
    memset(key_bytes, 0x11, sizeof key_bytes);
    g_autoptr(AeadKey) key = aead_key_new(key_bytes, AEAD_AUTO, NULL);
    memcpy(d, wire_head, sizeof wire_head);
    AeadPart part = {"hello", 5};
    aead_seal(key, 1, d, 32, &part, 1, d + 32, d + 37);
    for (unsigned bit = 0; bit < 8 * sizeof d; bit++) {
        d[bit / 8] ^= (uint8_t)(1u << bit % 8);
        const LinkCounters *counters = bare_send(bare, d, sizeof d);
        assert_int_equal(counters->dropped_corrupt + counters->dropped_stale, bit + 1);
        assert_int_equal(counters->dropped_stale,
                         MIN(bit + 1, 64)); /* the handle is looked at before any key */
        assert_int_equal(counters->messages_received + counters->dropped_replayed, 0);
        d[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    assert_int_equal(bare_send(bare, d, sizeof d)->messages_received, 1);
    assert_int_equal(bare_send(bare, d, sizeof d)->dropped_replayed, 1);
    assert_int_equal(bare->end.n_received, 1);
    bare_free(bare);
}

/* ---- faults on the way ---- */

static Pair *send_through(const FaultAction *script, unsigned n_script, unsigned n, bool seal)
{
    Pair *pair = pair_new(seal);
    pair->script = script;
    pair->n_script = n_script;
    for (unsigned i = 0; i < n; i++) {
        assert_int_equal(send_text(&pair->ends[0], i, "some payload"), LINK_OK);
    }
    receive_all(&pair->ends[1]);
    return pair;
}

static void faults_are_dropped_and_counted(void **state)
{
    static const FaultAction flips[] = {FAULT_FLIP_BIT, FAULT_PASS, FAULT_FLIP_BIT, FAULT_FLIP_BIT};
    static const FaultAction doubles[] = {FAULT_DUPLICATE, FAULT_PASS, FAULT_REPLAY_LAST};
    static const FaultAction losses[] = {FAULT_DROP, FAULT_PASS, FAULT_DROP};
    static const FaultAction delays[] = {FAULT_DELAY, FAULT_PASS, FAULT_PASS};
    for (unsigned seal = 0; seal < 2; seal++) {
        Pair *pair = send_through(flips, 4, 5, seal != 0);
        const LinkCounters *counters = link_port_counters(pair->ends[1].port);
        assert_true(counters->messages_received == 2 && counters->dropped_corrupt == 3 &&
                    counters->dropped_replayed == 0);
        pair_free(pair);
        pair = send_through(doubles, 3, 3, seal != 0);
        counters = link_port_counters(pair->ends[1].port);
        assert_true(counters->messages_received == 3 && counters->dropped_replayed == 2 &&
                    counters->dropped_corrupt == 0);
        pair_free(pair);
        pair = send_through(losses, 3, 4, seal != 0);
        assert_int_equal(link_port_counters(pair->ends[1].port)->messages_received, 2);
        assert_int_equal(pair->ends[1].steps[0], 1);
        pair_free(pair);
        pair = send_through(delays, 3, 3, seal != 0);
        assert_int_equal(pair->ends[1].n_received, 3);
        assert_int_equal(pair->ends[1].steps[0], 1);
        assert_int_equal(pair->ends[1].steps[1], 0);
        pair_free(pair);
    }
}

/* An empty unsealed message has nothing behind its header: the checksum is hit. */
static void an_empty_message_can_be_spoilt_too(void **state)
{
    static const FaultAction flip[] = {FAULT_FLIP_BIT};
    Pair *pair = pair_new(false);
    pair->script = flip;
    pair->n_script = 1;
    assert_int_equal(link_send(pair->ends[0].link, LINK_OP_HELLO, 0, 0, NULL, 0), LINK_OK);
    receive_all(&pair->ends[1]);
    assert_int_equal(link_port_counters(pair->ends[1].port)->dropped_corrupt, 1);
    pair_free(pair);
}

/* ---- connections come and go ---- */

static void a_closed_link_is_an_epoch_that_is_over(void **state)
{
    Pair *pair = pair_new(true);
    link_close(pair->ends[1].link);
    assert_int_equal(send_text(&pair->ends[0], 1, "from the old epoch"), LINK_OK);
    receive_all(&pair->ends[1]);
    assert_int_equal(link_port_counters(pair->ends[1].port)->dropped_stale, 1);
    assert_int_equal(pair->ends[1].n_received, 0);
    receive_all(&pair->ends[0]);
    assert_int_equal(pair->ends[0].n_dead, 1);
    assert_true(link_is_dead(pair->ends[0].link));
    assert_int_equal(send_text(&pair->ends[0], 2, "to nobody"), LINK_PEER_DEAD);
    pair_free(pair);
}

static void what_comes_before_the_connection_is_kept(void **state)
{
    LinkFill *bus = link_fill_inproc_new();
    End ends[2] = {0};
    GBytes *addresses[2];
    for (unsigned side = 0; side < 2; side++) {
        ends[side].port = open_port(bus, &ends[side]);
        addresses[side] = link_port_address(ends[side].port);
    }
    LinkConnect connect = connect_options(addresses[1], true, 0);
    ends[0].link = link_connect(ends[0].port, &connect, NULL);
    for (unsigned i = 0; i < TAG_EARLY_LIMIT + 6; i++) {
        assert_int_equal(send_text(&ends[0], i, "early"), LINK_OK);
    }
    receive_all(&ends[1]);
    assert_int_equal(ends[1].n_received, 0);
    assert_int_equal(link_port_counters(ends[1].port)->dropped_stale, 6);
    connect = connect_options(addresses[0], true, 1);
    ends[1].link = link_connect(ends[1].port, &connect, NULL);
    assert_int_equal(send_text(&ends[0], 1000, "in time"), LINK_OK);
    receive_all(&ends[1]);
    assert_int_equal(ends[1].n_received, TAG_EARLY_LIMIT + 1);
    for (unsigned i = 0; i < TAG_EARLY_LIMIT; i++) {
        assert_int_equal(ends[1].steps[i], i);
    }
    assert_int_equal(ends[1].steps[TAG_EARLY_LIMIT], 1000);
    for (unsigned side = 0; side < 2; side++) {
        link_port_close(ends[side].port);
        g_bytes_unref(addresses[side]);
    }
    link_fill_free(bus);
}

static void a_pair_connects_once_and_to_somebody(void **state)
{
    Pair *pair = pair_new(false);
    g_autoptr(GBytes) address = link_port_address(pair->ends[1].port);
    LinkConnect connect = connect_options(address, false, 0);
    g_autoptr(GError) error = NULL;
    assert_null(link_connect(pair->ends[0].port, &connect, &error));
    assert_non_null(strstr(error->message, "connected already"));
    g_clear_error(&error);
    link_port_close(pair->ends[1].port);
    pair->ends[1].port = NULL;
    connect.handle++;
    assert_null(link_connect(pair->ends[0].port, &connect, &error));
    assert_non_null(strstr(error->message, "no port"));
    pair_free(pair);
}

/* ---- sending ---- */

static void sending_is_bounded(void **state)
{
    Pair *pair = pair_new(true);
    End *from = &pair->ends[1]; /* not through the fault fill, which has memory of its own */
    static const uint8_t nothing[1] = {0};
    LinkPart too_long[] = {{nothing, LINK_MESSAGE_LIMIT}, {nothing, 1}},
             overflow[] = {{nothing, SIZE_MAX}, {nothing, 2}};
    assert_int_equal(link_send(from->link, LINK_OP_PROBE, 0, 0, too_long, 2), LINK_TOO_LONG);
    assert_int_equal(link_send(from->link, LINK_OP_PROBE, 0, 0, overflow, 2), LINK_TOO_LONG);
    unsigned n = 0;
    while (n < 100000 && link_send_try(from->link, LINK_OP_PROBE, 0, n, NULL, 0) == LINK_OK) {
        n++;
    }
    assert_in_range(n, 16, 99999);
    link_port_interrupt(from->port);
    assert_int_equal(link_send(from->link, LINK_OP_PROBE, 0, n, NULL, 0),
                     LINK_AGAIN); /* would wait, but is interrupted */
    link_port_progress(pair->ends[0].port);
    assert_int_equal(pair->ends[0].n_received, n);
    assert_int_equal(link_send(from->link, LINK_OP_PROBE, 0, n, NULL, 0), LINK_OK);
    pair_free(pair);
}

static void a_handler_may_answer(void **state)
{
    Pair *pair = pair_new(true);
    pair->ends[1].send_inside = true;
    assert_int_equal(send_text(&pair->ends[0], 1, "ask"), LINK_OK);
    receive_all(&pair->ends[1]);
    receive_all(&pair->ends[0]);
    assert_int_equal(pair->ends[1].sent_inside, LINK_OK);
    assert_int_equal(pair->ends[0].header.op, LINK_OP_TOKEN);
    pair_free(pair);
}

/* After one message of each size, no message allocates: an allocation would fail and with it the
 * send. */
static void the_steady_state_allocates_nothing(void **state)
{
    Pair *pair = pair_new(true);
    static uint8_t data[100000];
    static const size_t sizes[] = {0, 576, 8192, 100000};
    for (unsigned i = 0; i < 400; i++) {
        LinkPart part = {data, sizes[i % 4]};
        assert_int_equal(link_send_try(pair->ends[1].link, LINK_OP_PROBE, 0, i, &part, 1), LINK_OK);
        receive_all(&pair->ends[0]);
        if (i == 3) {
            weft_alloc_fail_after(0);
        }
    }
    weft_alloc_fail_after(-1);
    assert_int_equal(pair->ends[0].n_received, 400);
    pair_free(pair);
}

static void without_memory_a_send_is_tried_again(void **state)
{
    Pair *pair = pair_new(true);
    weft_alloc_fail_after(0);
    assert_int_equal(link_send_try(pair->ends[1].link, LINK_OP_PROBE, 0, 0, NULL, 0), LINK_AGAIN);
    assert_int_equal(link_send_try(pair->ends[1].link, LINK_OP_PROBE, 0, 0, NULL, 0), LINK_OK);
    receive_all(&pair->ends[0]);
    assert_int_equal(pair->ends[0].header.seq, 1); /* the failed one took no number */
    pair_free(pair);
}

/* ---- waiting ---- */

static void a_wait_ends_by_time_by_interrupt_and_by_arrival(void **state)
{
    for (unsigned seal = 0; seal < 2; seal++) {
        Pair *pair = pair_new(seal != 0);
        End *end = &pair->ends[1];
        int64_t start = now_us();
        link_port_wait(end->port, 3000, 1000);
        assert_true(now_us() - start >= 3000);
        link_port_interrupt(end->port);
        start = now_us();
        link_port_wait(end->port, 30000000, 0);
        assert_int_equal(send_text(&pair->ends[0], 1, "wake up"), LINK_OK);
        link_port_wait(end->port, 30000000, 0);
        assert_int_equal(end->n_received, 1);
        assert_true(now_us() - start < 10000000);
        pair_free(pair);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(crc32c_is_castagnoli),
        cmocka_unit_test(the_window_accepts_each_number_once),
        cmocka_unit_test(a_message_arrives_as_it_was_sent),
        cmocka_unit_test(the_wire_is_as_documented),
        cmocka_unit_test(what_does_not_fit_is_dropped_and_counted),
        cmocka_unit_test(every_bit_of_a_sealed_message_counts),
        cmocka_unit_test(faults_are_dropped_and_counted),
        cmocka_unit_test(an_empty_message_can_be_spoilt_too),
        cmocka_unit_test(a_closed_link_is_an_epoch_that_is_over),
        cmocka_unit_test(what_comes_before_the_connection_is_kept),
        cmocka_unit_test(a_pair_connects_once_and_to_somebody),
        cmocka_unit_test(sending_is_bounded),
        cmocka_unit_test(a_handler_may_answer),
        cmocka_unit_test(the_steady_state_allocates_nothing),
        cmocka_unit_test(without_memory_a_send_is_tried_again),
        cmocka_unit_test(a_wait_ends_by_time_by_interrupt_and_by_arrival),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
