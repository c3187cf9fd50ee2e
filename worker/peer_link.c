#include "worker/peer_link.h"

Link *peer_link_connect(LinkPort *port, const PeerLink *l, GError **error)
{
    LinkConnect connect = {.address = l->address, .peer = l->peer, .seal = l->seal};
    connect.handle = keys_handle(l->secret, &l->scope, MIN(l->own, l->peer), MAX(l->own, l->peer));
    keys_derive(l->secret, &l->scope, l->own_boot, l->peer_boot, l->own, l->peer, connect.send_key);
    keys_derive(l->secret, &l->scope, l->peer_boot, l->own_boot, l->peer, l->own,
                connect.receive_key);
    Link *link = link_connect(port, &connect, error);
    keys_erase(&connect, sizeof connect);
    return link;
}
