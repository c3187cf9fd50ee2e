/* The fill over UCX (UCP active messages): tcp between hosts, shared memory within one.
 *
 * A port is a context, a worker and one handler; a connection is an endpoint made from the peer's
 * worker address, which travels over the control plane. Every datagram is one active message whose
 * header is the pair's tag, so that the receiver finds its own end. Messages go eagerly whatever
 * their size (rendezvous costs a round trip, shared/WIRE.md, and would let a later message
 * overtake); UCP puts fragments together again (WHOLE_MSG).
 *
 * Regions (UCP calls it rendezvous) go in three: an active message announces them, whose descriptor
 * is kept as the offer; the place is named to UCP; UCP moves the payload between the two memories
 * by what the transports there can do. Until it says so by a callback, both are UCP's.
 *
 * A connection ends in this order, because its buffers and the callbacks' argument must outlive the
 * endpoint:
 *     open -> (peer dies: failed, told to the user once) -> closed by the user: its tag is retired
 *          -> what it is still sending is written, or FLUSH_LIMIT_US are over
 *          -> endpoint closed by force -> the close and all sends have completed -> freed.
 * UCX calls back inside progress only; callbacks record, and act on nothing that UCX is walking
 * over. */
#include "transport/link/buffer_pool.h"
#include "transport/link/fill.h"
#include "transport/link/link_clock.h"
#include "transport/link/tag_table.h"

#include "proto/base/crc32c.h"
#include "proto/base/error.h"

#include <endian.h>
#include <net/if.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#define MESSAGE_ID 1u
#define IN_FLIGHT_LIMIT 256u
#define IN_FLIGHT_BYTES (128u << 20)
#define FLUSH_LIMIT_US 100000
#define CLOSE_LIMIT_US 1000000
#define REGION_HEAD_LIMIT 64u
#define DEVICE_LIMIT_US 3000000
#define DEVICE_PAUSE_MS 20

typedef struct Port {
    ucp_context_h context;
    ucp_worker_h worker;
    int event_fd;
    const LinkRawEvents *events;
    void *user;
    TagTable tags;
    GPtrArray *open;     /* of Raw, owned */
    GPtrArray *ending;   /* of Raw, owned: closed by the user */
    GPtrArray *passages; /* of Passage, owned: regions that UCP has */
    uint64_t memory_types;
    unsigned n_failed;   /* open ones whose death was not told yet */
    unsigned n_messages; /* in the running progress */
} Port;

/* A region on its way, either way. */
typedef struct Passage {
    struct Raw *raw;
    void *transfer;
    uint64_t tag; /* of a sent one, with the head behind it: UCP reads both until the end */
    uint8_t head[REGION_HEAD_LIMIT];
} Passage;
_Static_assert(offsetof(Passage, head) == offsetof(Passage, tag) + sizeof(uint64_t), "one header");

typedef struct Raw {
    Port *port;
    ucp_ep_h endpoint;
    uint64_t tag;
    void *link_user;
    BufferPool pool;
    unsigned n_sending;   /* regions that come among them */
    GPtrArray *offers;    /* UCP's descriptors */
    ucs_status_t failure; /* UCS_OK: alive */
    bool told;            /* of the failure, or closed by the user */
    int64_t closed_us;
    ucs_status_ptr_t close_request;
} Raw;

/* ---- addresses: "WUCX", UCX's version, checksum, the worker address ---- */

typedef struct AddressHead {
    char magic[4];
    uint32_t version; /* major << 16 | minor: releases do not read each other's addresses */
    uint32_t checksum;
} AddressHead;

static uint32_t ucx_version(void)
{
    unsigned major, minor, release;
    ucp_get_version(&major, &minor, &release);
    return major << 16 | minor;
}

static GBytes *ucx_address(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    ucp_address_t *address;
    size_t size;
    ucs_status_t status = ucp_worker_get_address(port->worker, &address, &size);
    if (status != UCS_OK) {
        return g_bytes_new(NULL, 0);
    }
    AddressHead head = {.magic = "WUCX",
                        .version = htole32(ucx_version()),
                        .checksum = htole32(crc32c(0, address, size))};
    GByteArray *out = g_byte_array_new();
    g_byte_array_append(out, (const guint8 *)&head, sizeof head);
    g_byte_array_append(out, (const guint8 *)address, (guint)size);
    ucp_worker_release_address(port->worker, address);
    return g_byte_array_free_to_bytes(out);
}

/* The worker address inside, borrowed; NULL + error. */
static const ucp_address_t *address_parse(GBytes *bytes, GError **error)
{
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    AddressHead head;
    if (size <= sizeof head || memcmp(data, "WUCX", 4) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "link address of %zu bytes is not one of UCX: the peer runs another link",
                    size);
        return NULL;
    }
    memcpy(&head, data, sizeof head);
    uint32_t theirs = le32toh(head.version), ours = ucx_version();
    if (theirs != ours) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_VERSION,
            "the peer has UCX %u.%u and this host %u.%u: install the same release on all workers",
            theirs >> 16, theirs & 0xffff, ours >> 16, ours & 0xffff);
        return NULL;
    }
    if (le32toh(head.checksum) != crc32c(0, data + sizeof head, size - sizeof head)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "link address of %zu bytes fails its checksum", size);
        return NULL;
    }
    return (const ucp_address_t *)(data + sizeof head);
}

/* ---- port ---- */

/* UCS_INPROGRESS keeps the descriptor; without, UCP tells the sender that the region was taken. */
static ucs_status_t on_offer(Port *port, const void *header, size_t header_size, void *descriptor,
                             size_t size)
{
    uint64_t tag;
    Raw *raw = NULL;
    if (header_size >= sizeof tag) {
        memcpy(&tag, header, sizeof tag);
        raw = (Raw *)tag_table_find(&port->tags, le64toh(tag));
    }
    if (!port->events->offered((LinkRaw *)raw, (const uint8_t *)header + sizeof tag,
                               header_size - sizeof tag, size, descriptor, port->user)) {
        return UCS_OK;
    }
    g_ptr_array_add(raw->offers, descriptor);
    return UCS_INPROGRESS;
}

static ucs_status_t on_message(void *arg, const void *header, size_t header_size, void *data,
                               size_t size, const ucp_am_recv_param_t *param)
{
    Port *port = arg;
    uint64_t tag;
    port->n_messages++;
    if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
        return on_offer(port, header, header_size, data, size);
    }
    if (header_size != sizeof tag) {
        port->events->receive(NULL, NULL, 0, port->user); /* none of ours sends that */
        return UCS_OK;
    }
    memcpy(&tag, header, sizeof tag);
    tag = le64toh(tag);
    LinkRaw *raw = tag_table_find(&port->tags, tag);
    if (raw != NULL) {
        port->events->receive(raw, data, size, port->user);
    } else if (!tag_table_keep(&port->tags, tag, data, size)) {
        port->events->receive(NULL, data, size, port->user);
    }
    return UCS_OK;
}

static ucs_status_t port_set_handler(Port *port, ucp_am_recv_callback_t handler)
{
    ucp_am_handler_param_t param = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                      UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = MESSAGE_ID,
        .flags = UCP_AM_FLAG_WHOLE_MSG,
        .cb = handler,
        .arg = port,
    };
    return ucp_worker_set_am_recv_handler(port->worker, &param);
}

static bool device_is_running(int socket_fd, const char *name)
{
    struct ifreq request = {0};
    g_strlcpy(request.ifr_name, name, sizeof request.ifr_name);
    return ioctl(socket_fd, SIOCGIFFLAGS, &request) != 0 || (request.ifr_flags & IFF_RUNNING) != 0;
}

/* UCX takes the interfaces that run when a context is made, for good: made a moment too early (a
 * cable, a fresh veth: about a second), every later connect answers "unreachable". So the one that
 * was chosen is waited for. */
static void device_wait(void)
{
    const char *name = g_getenv("UCX_NET_DEVICES");
    int socket_fd = name != NULL && if_nametoindex(name) != 0
                        ? socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)
                        : -1;
    if (socket_fd >= 0) {
        int64_t until = link_clock_us() + DEVICE_LIMIT_US;
        while (!device_is_running(socket_fd, name) && link_clock_us() < until) {
            poll(NULL, 0, DEVICE_PAUSE_MS);
        }
        close(socket_fd);
    }
}

static ucs_status_t port_create_worker(Port *port)
{
    ucp_params_t context = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                            .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP};
    ucp_worker_params_t worker = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                  .thread_mode = UCS_THREAD_MODE_SINGLE};
    ucp_config_t *config;
    device_wait();
    ucs_status_t status = ucp_config_read(NULL, NULL, &config);
    if (status == UCS_OK) {
        status = ucp_init(&context, config, &port->context);
        ucp_config_release(config);
    }
    ucp_context_attr_t attributes = {.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES};
    if (status == UCS_OK) {
        status = ucp_context_query(port->context, &attributes);
        port->memory_types = attributes.memory_types;
    }
    if (status == UCS_OK) {
        status = ucp_worker_create(port->context, &worker, &port->worker);
    }
    if (status == UCS_OK) {
        status = port_set_handler(port, on_message);
    }
    return status == UCS_OK ? ucp_worker_get_efd(port->worker, &port->event_fd) : status;
}

static void port_free(Port *port)
{
    if (port->worker != NULL) {
        ucp_worker_destroy(port->worker);
    }
    if (port->context != NULL) {
        ucp_cleanup(port->context);
    }
    tag_table_clear(&port->tags);
    g_ptr_array_unref(port->open);
    g_ptr_array_unref(port->ending);
    g_ptr_array_unref(port->passages);
    g_free(port);
}

static LinkRawPort *ucx_port_open(void *fill, const LinkRawEvents *events, void *user,
                                  GError **error)
{
    Port *port = g_new0(Port, 1);
    port->events = events;
    port->user = user;
    port->open = g_ptr_array_new();
    port->ending = g_ptr_array_new();
    port->passages = g_ptr_array_new_with_free_func(g_free);
    tag_table_init(&port->tags);
    ucs_status_t status = port_create_worker(port);
    if (status != UCS_OK) {
        const char *tls = g_getenv("UCX_TLS"), *devices = g_getenv("UCX_NET_DEVICES");
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "cannot open a UCX worker on UCX_TLS=%s UCX_NET_DEVICES=%s: %s: name an "
                    "interface that is up with --link-device",
                    tls != NULL ? tls : "(unset)", devices != NULL ? devices : "(unset)",
                    ucs_status_string(status));
        port_free(port);
        return NULL;
    }
    return (LinkRawPort *)port;
}

/* ---- connecting ---- */

static void raw_free(gpointer data)
{
    Raw *raw = data;
    buffer_pool_clear(&raw->pool);
    g_ptr_array_unref(raw->offers);
    g_free(raw);
}

static void on_failure(void *arg, ucp_ep_h endpoint, ucs_status_t status)
{
    Raw *raw = arg;
    if (raw->failure == UCS_OK) {
        raw->failure = status;
        raw->port->n_failed += !raw->told;
    }
}

static ucs_status_t raw_create_endpoint(Raw *raw, const ucp_address_t *address)
{
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .address = address,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = on_failure, .arg = raw},
    };
    return ucp_ep_create(raw->port->worker, &params, &raw->endpoint);
}

static LinkRaw *ucx_connect(LinkRawPort *raw_port, GBytes *address, uint64_t tag, void *link_user,
                            GError **error)
{
    Port *port = (Port *)raw_port;
    const ucp_address_t *worker_address = address_parse(address, error);
    if (worker_address == NULL) {
        return NULL;
    }
    if (tag_table_find(&port->tags, tag) != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "link tag %016" G_GINT64_MODIFIER "x is connected already: use a new one", tag);
        return NULL;
    }
    Raw *raw = g_new0(Raw, 1);
    *raw = (Raw){.port = port, .tag = tag, .link_user = link_user, .offers = g_ptr_array_new()};
    raw->pool.out_limit = IN_FLIGHT_LIMIT;
    raw->pool.bytes_out_limit = IN_FLIGHT_BYTES;
    ucs_status_t status = raw_create_endpoint(raw, worker_address);
    if (status != UCS_OK) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PEER_UNREACHABLE,
                    "cannot connect a link: %s: check that both hosts name an interface of one "
                    "network with --link-device",
                    ucs_status_string(status));
        raw_free(raw);
        return NULL;
    }
    tag_table_add(&port->tags, tag, (LinkRaw *)raw);
    g_ptr_array_add(port->open, raw);
    return (LinkRaw *)raw;
}

static void *ucx_link_user(LinkRaw *raw)
{
    return ((Raw *)raw)->link_user;
}

/* ---- sending ---- */

static void *ucx_buffer(LinkRaw *link, size_t size)
{
    LinkBuffer *buffer = buffer_pool_get(&((Raw *)link)->pool, size);
    return buffer != NULL ? buffer_data(buffer) : NULL;
}

static void on_sent(void *request, ucs_status_t status, void *user)
{
    LinkBuffer *buffer = user;
    Raw *raw = buffer->owner;
    raw->n_sending--;
    buffer_pool_put(&raw->pool, buffer);
    ucp_request_free(request);
}

static LinkStatus ucx_send(LinkRaw *link, void *data, size_t size)
{
    Raw *raw = (Raw *)link;
    LinkBuffer *buffer = buffer_of(data);
    buffer->owner = raw;
    /* Lies with the buffer: UCP reads the header until the send is complete. */
    buffer->tag = htole64(raw->tag);
    ucp_request_param_t param = {
        .op_attr_mask =
            UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
        .flags = UCP_AM_SEND_FLAG_EAGER,
        .cb.send = on_sent,
        .user_data = buffer,
    };
    ucs_status_ptr_t sent = raw->failure != UCS_OK
                                ? UCS_STATUS_PTR(raw->failure)
                                : ucp_am_send_nbx(raw->endpoint, MESSAGE_ID, &buffer->tag,
                                                  sizeof buffer->tag, data, size, &param);
    if (UCS_PTR_IS_PTR(sent)) {
        raw->n_sending++;
        return LINK_OK;
    }
    buffer_pool_put(&raw->pool, buffer);
    if (UCS_PTR_IS_ERR(sent)) {
        on_failure(raw, raw->endpoint, UCS_PTR_STATUS(sent));
        return LINK_PEER_DEAD;
    }
    return LINK_OK;
}

/* ---- regions ---- */

static bool ucx_has_memory(LinkRawPort *port, LinkMemory memory)
{
    return memory == LINK_MEMORY_HOST ||
           (((Port *)port)->memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
}

static ucs_memory_type_t memory_type(const LinkRegion *region)
{
    return region->memory == LINK_MEMORY_CUDA ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
}

static Passage *passage_new(Raw *raw, void *transfer)
{
    Passage *passage = g_new0(Passage, 1);
    *passage = (Passage){.raw = raw, .transfer = transfer, .tag = htole64(raw->tag)};
    g_ptr_array_add(raw->port->passages, passage);
    raw->n_sending++;
    return passage;
}

/* UCP is through with it. */
static void passage_end(Passage *passage, LinkStatus status)
{
    Raw *raw = passage->raw;
    Port *port = raw->port;
    void *transfer = passage->transfer;
    raw->n_sending--;
    port->n_messages++; /* something to look at */
    g_ptr_array_remove_fast(port->passages, passage);
    port->events->transferred(transfer, status, port->user);
}

static LinkStatus status_of_region(ucs_status_t status)
{
    return status == UCS_OK ? LINK_OK : status == UCS_ERR_CANCELED ? LINK_CLOSED : LINK_PEER_DEAD;
}

static void on_region_sent(void *request, ucs_status_t status, void *user)
{
    ucp_request_free(request);
    passage_end(user, status_of_region(status));
}

static void on_region_received(void *request, ucs_status_t status, size_t size, void *user)
{
    ucp_request_free(request);
    passage_end(user, status_of_region(status));
}

/* What UCP said to the start of a region. */
static LinkStatus passage_begun(Passage *passage, ucs_status_ptr_t request)
{
    Raw *raw = passage->raw;
    if (UCS_PTR_IS_ERR(request)) {
        raw->n_sending--;
        g_ptr_array_remove_fast(raw->port->passages, passage);
        on_failure(raw, raw->endpoint, UCS_PTR_STATUS(request));
        return LINK_PEER_DEAD;
    }
    if (request == NULL) { /* done at once, without a callback */
        passage_end(passage, LINK_OK);
    }
    return LINK_OK;
}

static LinkStatus ucx_send_region(LinkRaw *link, const void *head, size_t head_size,
                                  const LinkRegion *region, void *transfer)
{
    Raw *raw = (Raw *)link;
    g_assert(head_size <= REGION_HEAD_LIMIT);
    if (raw->failure != UCS_OK) {
        return LINK_PEER_DEAD;
    }
    Passage *passage = passage_new(raw, transfer);
    memcpy(passage->head, head, head_size);
    const ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .flags = UCP_AM_SEND_FLAG_RNDV,
        .cb.send = on_region_sent,
        .user_data = passage,
        .memory_type = memory_type(region),
    };
    return passage_begun(passage, ucp_am_send_nbx(raw->endpoint, MESSAGE_ID, &passage->tag,
                                                  sizeof passage->tag + head_size, region->data,
                                                  region->size, &param));
}

static LinkStatus ucx_take(LinkRaw *link, LinkOffer *offer, const LinkRegion *region,
                           void *transfer)
{
    Raw *raw = (Raw *)link;
    g_ptr_array_remove_fast(raw->offers, offer);
    Passage *passage = passage_new(raw, transfer);
    const ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .cb.recv_am = on_region_received,
        .user_data = passage,
        .memory_type = memory_type(region),
    };
    return passage_begun(passage, ucp_am_recv_data_nbx(raw->port->worker, offer, region->data,
                                                       region->size, &param));
}

static void ucx_drop(LinkRaw *link, LinkOffer *offer)
{
    Raw *raw = (Raw *)link;
    g_ptr_array_remove_fast(raw->offers, offer);
    ucp_am_data_release(raw->port->worker, offer);
}

/* ---- ending connections ---- */

static void raw_force_close(Raw *raw)
{
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                 .flags = UCP_EP_CLOSE_FLAG_FORCE};
    ucs_status_ptr_t request = ucp_ep_close_nbx(raw->endpoint, &param);
    raw->endpoint = NULL;
    raw->close_request = UCS_PTR_IS_PTR(request) ? request : NULL;
}

/* True when nothing of UCX points at it any more. */
static bool raw_has_ended(Raw *raw, int64_t now_us)
{
    bool flushed =
        raw->n_sending == 0 || raw->failure != UCS_OK || now_us - raw->closed_us >= FLUSH_LIMIT_US;
    if (raw->endpoint != NULL && flushed) {
        raw_force_close(raw);
    }
    if (raw->close_request != NULL &&
        ucp_request_check_status(raw->close_request) != UCS_INPROGRESS) {
        ucp_request_free(raw->close_request);
        raw->close_request = NULL;
    }
    return raw->endpoint == NULL && raw->close_request == NULL && raw->n_sending == 0;
}

static void port_end_some(Port *port)
{
    int64_t now = link_clock_us();
    for (guint i = port->ending->len; i-- > 0;) {
        if (raw_has_ended(g_ptr_array_index(port->ending, i), now)) {
            raw_free(g_ptr_array_steal_index_fast(port->ending, i));
        }
    }
}

static void ucx_close(LinkRaw *link)
{
    Raw *raw = (Raw *)link;
    Port *port = raw->port;
    port->n_failed -= raw->failure != UCS_OK && !raw->told;
    raw->told = true;
    raw->closed_us = link_clock_us();
    tag_table_remove(&port->tags, raw->tag);
    while (raw->offers->len > 0) {
        ucx_drop(link, g_ptr_array_index(raw->offers, raw->offers->len - 1));
    }
    g_ptr_array_remove_fast(port->open, raw);
    g_ptr_array_add(port->ending, raw);
}

static ucs_status_t on_message_while_closing(void *arg, const void *header, size_t header_size,
                                             void *data, size_t size,
                                             const ucp_am_recv_param_t *param)
{
    return UCS_OK;
}

static void ucx_port_close(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    port_set_handler(port, on_message_while_closing);
    while (port->open->len > 0) {
        ucx_close(g_ptr_array_index(port->open, port->open->len - 1));
    }
    int64_t until = link_clock_us() + CLOSE_LIMIT_US;
    port_end_some(port);
    while (port->ending->len > 0 && link_clock_us() < until) {
        ucp_worker_progress(port->worker);
        port_end_some(port);
    }
    /* What is left has sends that UCX has not completed; the worker's end completes them, or at
     * least nothing moves after it. */
    ucp_worker_destroy(port->worker);
    port->worker = NULL;
    while (port->passages->len > 0) {
        passage_end(g_ptr_array_index(port->passages, port->passages->len - 1), LINK_CLOSED);
    }
    g_ptr_array_set_free_func(port->ending, raw_free);
    port_free(port);
}

/* ---- progress ---- */

static void port_tell_failures(Port *port)
{
    for (guint i = 0; i < port->open->len && port->n_failed > 0; i++) {
        Raw *raw = g_ptr_array_index(port->open, i);
        if (raw->failure != UCS_OK && !raw->told) {
            raw->told = true;
            port->n_failed--;
            port->events->dead((LinkRaw *)raw, ucs_status_string(raw->failure), port->user);
        }
    }
}

static unsigned ucx_progress(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    port->n_messages = tag_table_deliver(&port->tags, port->events, port->user);
    unsigned n = ucp_worker_progress(port->worker);
    if (port->ending->len > 0) {
        port_end_some(port);
    }
    if (port->n_failed > 0) {
        n += port->n_failed;
        port_tell_failures(port);
    }
    return n + port->n_messages;
}

static bool ucx_arm(LinkRawPort *raw_port)
{
    Port *port = (Port *)raw_port;
    return !tag_table_has_ready(&port->tags) && port->n_failed == 0 && port->ending->len == 0 &&
           ucp_worker_arm(port->worker) == UCS_OK;
}

static int ucx_fd(LinkRawPort *raw_port)
{
    return ((Port *)raw_port)->event_fd;
}

static void ucx_interrupt(LinkRawPort *raw_port)
{
    ucp_worker_signal(((Port *)raw_port)->worker);
}

static const LinkOps ucx_ops = {
    .name = "ucx",
    .port_open = ucx_port_open,
    .port_close = ucx_port_close,
    .address = ucx_address,
    .connect = ucx_connect,
    .link_user = ucx_link_user,
    .buffer = ucx_buffer,
    .send = ucx_send,
    .progress = ucx_progress,
    .arm = ucx_arm,
    .fd = ucx_fd,
    .interrupt = ucx_interrupt,
    .close = ucx_close,
    .has_memory = ucx_has_memory,
    .send_region = ucx_send_region,
    .take = ucx_take,
    .drop = ucx_drop,
};

static void ucx_release(OwnedFill *fill)
{
    g_free(fill);
}

char *link_library(void)
{
    unsigned major, minor, release;
    ucp_get_version(&major, &minor, &release);
    return g_strdup_printf("UCX %u.%u.%u", major, minor, release);
}

LinkFill *link_fill_ucx(void)
{
    OwnedFill *owned = g_new0(OwnedFill, 1);
    *owned = (OwnedFill){.fill = {.ops = &ucx_ops, .self = owned}, .release = ucx_release};
    return &owned->fill;
}
