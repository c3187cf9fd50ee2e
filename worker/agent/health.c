#include "worker/agent/health.h"

#define LOOK_US 250000

struct Health {
    Loop *loop;
    Deployments *deployments;
    Attach *attach;
    GPtrArray *servers;
    LoopTimer *timer;
    bool serving, following;
};

static void tell(const Health *h, RpcServer *server)
{
    rpc_server_set_health(server, "", h->serving);
    rpc_server_set_health(server, "weft.v1.Leader", h->serving);
    rpc_server_set_health(server, "weft.v1.Worker", h->following);
    rpc_server_set_health(server, "weft.v1.Slices", h->following);
}

static void look(void *user)
{
    Health *h = user;
    bool following = h->attach && !attach_is_fenced(h->attach) && attach_is_attached(h->attach);
    bool serving = deployments_serving(h->deployments) && following;
    h->timer = loop_timer_start(h->loop, LOOK_US, look, h);
    if (following == h->following && serving == h->serving) {
        return;
    }
    h->following = following;
    h->serving = serving;
    for (guint i = 0; i < h->servers->len; i++) {
        tell(h, h->servers->pdata[i]);
    }
}

Health *health_new(Loop *loop, Deployments *deployments)
{
    Health *h = g_new0(Health, 1);
    h->loop = loop;
    h->deployments = deployments;
    h->servers = g_ptr_array_new();
    h->timer = loop_timer_start(loop, 0, look, h);
    return h;
}

void health_free(Health *h)
{
    if (h) {
        loop_timer_cancel(h->loop, h->timer);
        g_ptr_array_unref(h->servers);
        g_free(h);
    }
}

void health_listen(Health *h, RpcServer *server)
{
    g_ptr_array_add(h->servers, server);
    tell(h, server);
}

void health_unlisten(Health *h, RpcServer *server)
{
    g_ptr_array_remove_fast(h->servers, server);
}

void health_follow(Health *h, Attach *attach)
{
    h->attach = attach;
}

bool health_is_serving(const Health *h)
{
    return h->serving;
}
