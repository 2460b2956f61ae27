// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Interception without address translation. One set of these programs and maps belongs to one pod: those for sockets are
// attached to its cgroup, `steer` to its network namespace. They decide by the rules that iptables would get.
//
//   app connects     `connect`: rules of ISTIO_OUTPUT; keep the destination with the socket, go to 127.0.0.1:15001
//   SYN leaves       `follow`: write the destination down under the connection's addresses
//   proxy accepts    `follow`: put it into the accepted socket
//   proxy asks       `tell`: SO_ORIGINAL_DST is answered from there
//   outside calls    `steer`: rules of ISTIO_INBOUND; hand the call to the socket at 15006, its address unchanged
//   bytes            `pass_on`: from socket to socket, past the TCP stack, where both ends are here
#include "shared.h"

// --- maps ------------------------------------------------------------------------------------------------------------

/// The generation in force: policies are replaced by writing the other one and then this number.
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u32);
} generation SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 2);
    __type(key, __u32);
    __type(value, struct settings);
} settings SEC(".maps");

/// The first half belongs to generation 0, the second to 1. The loader sets the size.
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 256);
    __type(key, __u32);
    __type(value, struct rule);
} rules SEC(".maps");

/// Packets by rule.
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 256);
    __type(key, __u32);
    __type(value, __u64);
} hits SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} counters SEC(".maps");

/// Addresses of this pod beside 127.0.0.0/8 and ::1.
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 64);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32[4]);
    __type(value, __u32);
} addresses SEC(".maps");

/// Addresses of pods that share `pairs` with this one. The loader sets the size.
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32[4]);
    __type(value, __u32);
} neighbours SEC(".maps");

/// What is known of sockets. A listener's is copied to what it accepts.
struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
    __type(key, int);
    __type(value, struct state);
} states SEC(".maps");

/// Destinations between connect and the proxy's question, by the connection as the proxy's socket sees it.
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 8192);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct tuple);
    __type(value, struct origin);
} origins SEC(".maps");

/// The proxy's sockets that listen for inbound connections.
#define LISTENERS 64
struct {
    __uint(type, BPF_MAP_TYPE_SOCKMAP);
    __uint(max_entries, LISTENERS);
    __type(key, __u32);
    __type(value, __u32);
} listeners SEC(".maps");

/// Sockets whose bytes may go directly, by their own view of the connection. The loader sets the size.
struct {
    __uint(type, BPF_MAP_TYPE_SOCKHASH);
    __uint(max_entries, 65536);
    __type(key, struct tuple);
    __type(value, __u32);
} pairs SEC(".maps");

// --- the policy ------------------------------------------------------------------------------------------------------

struct packet {
    __u32 destination[4];
    __u32 source[4];
    __u32 uid;
    __u32 gid;
    __u16 port;
    __u8 protocol;
    __u8 local;
    // What the rules say.
    __u32 base;
    __u16 skip;
    __u16 to;
    __u8 action;
    __u8 owner;
    __u16 pad;
};

INLINE void count(__u32 which)
{
    __u64 *counter = bpf_map_lookup_elem(&counters, &which);
    if (counter)
        __sync_fetch_and_add(counter, 1);
}

INLINE struct settings *policy(void)
{
    __u32 zero = 0;
    __u32 *now = bpf_map_lookup_elem(&generation, &zero);
    return now ? bpf_map_lookup_elem(&settings, now) : 0;
}

INLINE int is_v4(const __u32 *a)
{
    return a[0] == 0 && a[1] == 0 && a[2] == htonl(0xffff);
}

INLINE void map_v4(__u32 *to, __u32 address)
{
    to[0] = 0;
    to[1] = 0;
    to[2] = htonl(0xffff);
    to[3] = address;
}

INLINE int is_loopback(const __u32 *a)
{
    if (is_v4(a))
        return (a[3] & htonl(0xff000000)) == htonl(0x7f000000);
    return a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == htonl(1);
}

/// The proxy calls the app from 127.0.0.6 or ::6.
INLINE int is_passthrough(const __u32 *a)
{
    if (is_v4(a))
        return a[3] == htonl(0x7f000006);
    return a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == htonl(6);
}

INLINE int is_local(const __u32 *a)
{
    return is_loopback(a) || is_passthrough(a) || bpf_map_lookup_elem(&addresses, a) != 0;
}

// Conditions are judged without branches: the verifier follows both ways of each, and a pod's start waits for it. What
// the compiler cannot see through it does not turn into a branch.

INLINE __u32 is_zero(__u32 bits)
{
    __u64 n = bits;
    asm volatile("" : "+r"(n));
    return (n - 1) >> 63;
}

INLINE __u32 in_range(__u32 low, __u32 high, __u32 id)
{
    __u64 from = low, to = high, n = id;
    asm volatile("" : "+r"(from), "+r"(to), "+r"(n));
    return is_zero(((n - from) | (to - n)) >> 63);
}

INLINE __u32 within(const __u32 *range, const __u32 *mask, const __u32 *a)
{
    return is_zero(((a[0] & mask[0]) ^ range[0]) | ((a[1] & mask[1]) ^ range[1]) | ((a[2] & mask[2]) ^ range[2]) |
                   ((a[3] & mask[3]) ^ range[3]));
}

INLINE int meets(const struct rule *r, const struct packet *p)
{
    const __u32 whole[4] = {-1, -1, -1, -1};
    __u32 held = within(r->destination, r->mask, p->destination) * DESTINATION;
    held |= within(r->source, whole, p->source) * SOURCE;
    held |= p->local * LOCAL;
    held |= is_zero(r->protocol ^ p->protocol) * PROTOCOL;
    held |= (in_range(r->ports[0][0], r->ports[0][1], p->port) | in_range(r->ports[1][0], r->ports[1][1], p->port)) *
            PORT;
    held |= in_range(r->uid[0], r->uid[1], p->uid) * UID;
    held |= in_range(r->gid[0], r->gid[1], p->gid) * GID;
    return ((held ^ r->negated) & r->conditions) == r->conditions;
}

static long step(__u32 index, struct packet *p)
{
    if (p->skip) {
        p->skip--;
        return 0;
    }
    __u32 at = p->base + index;
    struct rule *r = bpf_map_lookup_elem(&rules, &at);
    if (!r)
        return 1;
    if (!meets(r, p))
        return 0;
    if (r->action == SKIP) {
        p->skip = r->skip;
        return 0;
    }
    __u64 *hit = bpf_map_lookup_elem(&hits, &at);
    if (hit)
        __sync_fetch_and_add(hit, 1);
    p->action = r->action;
    p->to = r->to;
    p->owner = r->owner;
    return 1;
}

/// Walks a list of rules; whether the packet is led to the port `p->to`. Not static: such a function is verified once,
/// for any arguments, and not once for each way that leads to it.
__attribute__((noinline)) int decide(struct settings *s, struct packet *p, __u32 list)
{
    if (!s || !p)
        return 0;
    // `bpf_loop` takes what stands on the stack of its caller alone.
    struct packet own = *p;
    __u32 v6 = !is_v4(own.destination);
    list &= 1;
    own.base = s->first[list][v6];
    own.skip = 0;
    own.action = LEAVE;
    own.owner = ANYBODY;
    bpf_loop(s->count[list][v6], step, &own, 0);
    p->to = own.to;
    p->owner = own.owner;
    return own.action == REDIRECT;
}

// --- outbound --------------------------------------------------------------------------------------------------------

/// The owner is the socket's, as for iptables: a socket keeps the identity of the thread that made it. The kernel lets
/// a program see that of TCP sockets only; for a datagram it is the thread that sends.
INLINE void owner(struct bpf_sock_addr *ctx, struct packet *p, int connects)
{
    p->uid = -1;
    p->gid = -1;
    if (connects && p->protocol == TCP) {
        if (!ctx->sk)
            return;
        struct tcp_sock *tcp = bpf_skc_to_tcp_sock(ctx->sk);
        if (!tcp)
            return;
        struct socket *socket = tcp->inet_conn.icsk_inet.sk.sk_socket;
        if (!socket || !socket->file)
            return;
        const struct cred *cred = socket->file->f_cred;
        p->uid = cred->fsuid.val;
        p->gid = cred->fsgid.val;
        return;
    }
    const struct cred *cred = bpf_get_current_task_btf()->cred;
    p->uid = cred->fsuid.val;
    p->gid = cred->fsgid.val;
}

/// Everything is read first: the verifier refuses the pointer into a socket that the compiler makes of reads in two
/// branches.
INLINE void source_of(struct bpf_sock *sk, struct packet *p)
{
    __u32 family = READ(sk->family), v4 = READ(sk->src_ip4);
    __u32 a = READ(sk->src_ip6[0]), b = READ(sk->src_ip6[1]), c = READ(sk->src_ip6[2]), d = READ(sk->src_ip6[3]);
    int is6 = family == AF_INET6;
    p->source[0] = is6 ? a : 0;
    p->source[1] = is6 ? b : 0;
    p->source[2] = is6 ? c : htonl(0xffff);
    p->source[3] = is6 ? d : v4;
}

/// An unspecified address stands for this machine.
INLINE void specify(__u32 *a)
{
    if (is_v4(a) && a[3] == 0)
        a[3] = htonl(0x7f000001);
    else if (a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == 0)
        a[3] = htonl(1);
}

/// What is done with a call to `p->destination`: nothing, or it is remembered and led to `p->to`.
INLINE int call(struct bpf_sock_addr *ctx, struct packet *p, struct settings *s, int connects)
{
    struct bpf_sock *sk = ctx->sk;
    if (!sk || !s || (p->protocol != TCP && p->protocol != UDP))
        return 0;
    // Before the ways part: the verifier looks each member of a kernel's structure up by name, in all that it has.
    owner(ctx, p, connects);
    specify(p->destination);
    source_of(sk, p);
    p->local = is_local(p->destination) ? 1 : 0;
    int captured = decide(s, p, OUTBOUND);
    if (!captured) {
        // The proxy's own, and the other end is where bytes may go directly.
        if (p->protocol == TCP && p->owner == PROXY &&
            ((s->accelerate && bpf_map_lookup_elem(&addresses, p->destination)) ||
             (s->accelerate_node && bpf_map_lookup_elem(&neighbours, p->destination)))) {
            struct state *st = bpf_sk_storage_get(&states, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
            if (st)
                st->role = OF_PROXY;
            return 0;
        }
        // A socket that called somebody else before, and was captured then.
        bpf_sk_storage_delete(&states, sk);
        return 0;
    }
    struct state *st = bpf_sk_storage_get(&states, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!st) {
        count(COUNT_ORIGIN_LOST);
        return -1;
    }
    __builtin_memcpy(st->origin.address, p->destination, 16);
    st->origin.port = p->port;
    st->origin.family = is_v4(p->destination) ? AF_INET : AF_INET6;
    st->port = p->to;
    st->role = CAPTURED;
    st->way = UNDECIDED;
    return 1;
}

INLINE int unbound(const __u32 *source)
{
    return source[0] == 0 && source[1] == 0 && (source[2] == 0 || source[2] == htonl(0xffff)) && source[3] == 0;
}

INLINE int outbound4(struct bpf_sock_addr *ctx, int connects)
{
    struct packet p = {.port = htons((__u16)ctx->user_port), .protocol = ctx->protocol};
    map_v4(p.destination, ctx->user_ip4);
    struct settings *s = policy();
    int captured = call(ctx, &p, s, connects);
    if (captured <= 0)
        return captured == 0;
    if (connects && p.protocol == TCP && unbound(p.source) && s && s->pod[0][3]) {
        struct sockaddr_in from = {.family = AF_INET, .address = s->pod[0][3]};
        bpf_bind(ctx, &from, sizeof(from));
    }
    ctx->user_ip4 = htonl(0x7f000001);
    ctx->user_port = htons(p.to);
    return 1;
}

INLINE int outbound6(struct bpf_sock_addr *ctx, int connects)
{
    struct packet p = {.port = htons((__u16)ctx->user_port), .protocol = ctx->protocol};
    p.destination[0] = ctx->user_ip6[0];
    p.destination[1] = ctx->user_ip6[1];
    p.destination[2] = ctx->user_ip6[2];
    p.destination[3] = ctx->user_ip6[3];
    struct settings *s = policy();
    int captured = call(ctx, &p, s, connects);
    if (captured <= 0)
        return captured == 0;
    int v4 = is_v4(p.destination);
    if (connects && p.protocol == TCP && unbound(p.source) && s && s->pod[!v4][3]) {
        struct sockaddr_in6 from = {.family = AF_INET6};
        __builtin_memcpy(from.address, s->pod[!v4], 16);
        bpf_bind(ctx, &from, sizeof(from));
    }
    ctx->user_ip6[0] = 0;
    ctx->user_ip6[1] = 0;
    ctx->user_ip6[2] = v4 ? htonl(0xffff) : 0;
    ctx->user_ip6[3] = v4 ? htonl(0x7f000001) : htonl(1);
    ctx->user_port = htons(p.to);
    return 1;
}

SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
{
    return outbound4(ctx, 1);
}

SEC("cgroup/connect6") int connect6(struct bpf_sock_addr *ctx)
{
    return outbound6(ctx, 1);
}

SEC("cgroup/sendmsg4") int sendmsg4(struct bpf_sock_addr *ctx)
{
    return outbound4(ctx, 0);
}

SEC("cgroup/sendmsg6") int sendmsg6(struct bpf_sock_addr *ctx)
{
    return outbound6(ctx, 0);
}

/// The app sees whom it called, not where that was led to.
INLINE struct state *called(struct bpf_sock_addr *ctx)
{
    if (!ctx->sk)
        return 0;
    struct state *st = bpf_sk_storage_get(&states, ctx->sk, 0, 0);
    return st && st->role == CAPTURED && ctx->user_port == htons(st->port) ? st : 0;
}

INLINE int answer4(struct bpf_sock_addr *ctx)
{
    struct state *st = called(ctx);
    if (st && st->origin.family == AF_INET && ctx->user_ip4 == htonl(0x7f000001)) {
        ctx->user_ip4 = st->origin.address[3];
        ctx->user_port = htons(st->origin.port);
    }
    return 1;
}

INLINE int answer6(struct bpf_sock_addr *ctx)
{
    struct state *st = called(ctx);
    __u32 from[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
    if (st && is_loopback(from)) {
        ctx->user_ip6[0] = st->origin.address[0];
        ctx->user_ip6[1] = st->origin.address[1];
        ctx->user_ip6[2] = st->origin.address[2];
        ctx->user_ip6[3] = st->origin.address[3];
        ctx->user_port = htons(st->origin.port);
    }
    return 1;
}

SEC("cgroup/getpeername4") int getpeername4(struct bpf_sock_addr *ctx)
{
    return answer4(ctx);
}

SEC("cgroup/getpeername6") int getpeername6(struct bpf_sock_addr *ctx)
{
    return answer6(ctx);
}

SEC("cgroup/recvmsg4") int recvmsg4(struct bpf_sock_addr *ctx)
{
    return answer4(ctx);
}

SEC("cgroup/recvmsg6") int recvmsg6(struct bpf_sock_addr *ctx)
{
    return answer6(ctx);
}

// --- the destination's way to the proxy ------------------------------------------------------------------------------

INLINE void reverse(struct tuple *to, const struct tuple *from)
{
    to->netns = from->netns;
    __builtin_memcpy(to->local, from->remote, 16);
    __builtin_memcpy(to->remote, from->local, 16);
    to->local_port = from->remote_port;
    to->remote_port = from->local_port;
    to->pad = 0;
}

INLINE void tuple_of(struct bpf_sock_ops *ctx, struct tuple *t)
{
    // Read before the branch, as in `source_of`. Sockets of a family have no fields of the other.
    __u32 family = READ(ctx->family), local4 = READ(ctx->local_ip4), remote4 = READ(ctx->remote_ip4);
    __u32 l0 = READ(ctx->local_ip6[0]), l1 = READ(ctx->local_ip6[1]);
    __u32 l2 = READ(ctx->local_ip6[2]), l3 = READ(ctx->local_ip6[3]);
    __u32 r0 = READ(ctx->remote_ip6[0]), r1 = READ(ctx->remote_ip6[1]);
    __u32 r2 = READ(ctx->remote_ip6[2]), r3 = READ(ctx->remote_ip6[3]);
    int is6 = family == AF_INET6;
    t->netns = bpf_get_netns_cookie(ctx);
    t->local[0] = is6 ? l0 : 0;
    t->local[1] = is6 ? l1 : 0;
    t->local[2] = is6 ? l2 : htonl(0xffff);
    t->local[3] = is6 ? l3 : local4;
    t->remote[0] = is6 ? r0 : 0;
    t->remote[1] = is6 ? r1 : 0;
    t->remote[2] = is6 ? r2 : htonl(0xffff);
    t->remote[3] = is6 ? r3 : remote4;
    t->local_port = ctx->local_port;
    t->remote_port = htonl(ctx->remote_port);
    t->pad = 0;
}

/// Offers a socket for bytes that go directly. Not one that has sent or got any already: those would be overtaken.
INLINE void offer(struct bpf_sock_ops *ctx, struct settings *s, struct state *st, struct tuple *self)
{
    // The SYN counts as one of those that were acknowledged.
    if (ctx->bytes_acked > 1 || ctx->bytes_received)
        return;
    struct tuple key = *self;
    if (is_local(self->remote)) {
        if (!s->accelerate)
            return;
    } else {
        if (!s->accelerate_node || !bpf_map_lookup_elem(&neighbours, self->remote))
            return;
        // The other end sees it from another namespace.
        key.netns = 0;
    }
    st->way = UNDECIDED;
    reverse(&st->peer, &key);
    bpf_sock_hash_update(ctx, &pairs, &key, BPF_ANY);
}

INLINE void connecting(struct bpf_sock_ops *ctx, struct settings *s)
{
    struct bpf_sock *sk = ctx->sk;
    if (!sk)
        return;
    struct state *st = bpf_sk_storage_get(&states, sk, 0, 0);
    if (!st || st->role != CAPTURED || (st->port != s->outbound_port && st->port != s->inbound_port))
        return;
    struct tuple self = {}, seen = {};
    tuple_of(ctx, &self);
    reverse(&seen, &self);
    if (bpf_map_update_elem(&origins, &seen, &st->origin, BPF_ANY))
        count(COUNT_ORIGIN_LOST);
    bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

INLINE void connected(struct bpf_sock_ops *ctx, struct settings *s)
{
    struct bpf_sock *sk = ctx->sk;
    if (!sk || !(s->accelerate || s->accelerate_node))
        return;
    struct state *st = bpf_sk_storage_get(&states, sk, 0, 0);
    if (!st || (st->role != CAPTURED && st->role != OF_PROXY))
        return;
    struct tuple self = {};
    tuple_of(ctx, &self);
    offer(ctx, s, st, &self);
}

INLINE void accepted(struct bpf_sock_ops *ctx, struct settings *s)
{
    struct bpf_sock *sk = ctx->sk;
    if (!sk)
        return;
    struct state *st = bpf_sk_storage_get(&states, sk, 0, 0);
    struct tuple self = {};
    tuple_of(ctx, &self);
    if (!st) {
        // The app, called by the proxy.
        if (!s->accelerate || !is_passthrough(self.remote))
            return;
        st = bpf_sk_storage_get(&states, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
        if (st) {
            st->role = ACCEPTED;
            offer(ctx, s, st, &self);
        }
        return;
    }
    if (st->role != LISTENER)
        return;
    st->role = ACCEPTED;
    st->self = self;
    struct origin *known = bpf_map_lookup_elem(&origins, &self);
    if (known) {
        st->origin = *known;
    } else if (self.local_port != st->port) {
        // `steer` brought it: its own address is the one that was called.
        __builtin_memcpy(st->origin.address, self.local, 16);
        st->origin.port = self.local_port;
        st->origin.family = is_v4(self.local) ? AF_INET : AF_INET6;
        bpf_map_update_elem(&origins, &self, &st->origin, BPF_ANY);
    } else {
        return;
    }
    bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
    offer(ctx, s, st, &self);
}

INLINE void listening(struct bpf_sock_ops *ctx, struct settings *s)
{
    struct bpf_sock *sk = ctx->sk;
    __u16 port = ctx->local_port;
    if (!sk || (port != s->inbound_port && port != s->outbound_port))
        return;
    struct state *st = bpf_sk_storage_get(&states, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!st)
        return;
    st->role = LISTENER;
    st->port = port;
    if (port != s->inbound_port)
        return;
    for (__u32 i = 0; i < LISTENERS; i++) {
        __u32 slot = i;
        if (bpf_sock_map_update(ctx, &listeners, &slot, BPF_NOEXIST) == 0)
            return;
    }
}

INLINE void ended(struct bpf_sock_ops *ctx)
{
    struct tuple self = {}, seen = {};
    tuple_of(ctx, &self);
    reverse(&seen, &self);
    bpf_map_delete_elem(&origins, &self);
    bpf_map_delete_elem(&origins, &seen);
}

#define STATE_CLOSE 7

SEC("sockops") int follow(struct bpf_sock_ops *ctx)
{
    struct settings *s = policy();
    if (!s)
        return 1;
    switch (ctx->op) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        connecting(ctx, s);
        break;
    case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
        connected(ctx, s);
        break;
    case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        accepted(ctx, s);
        break;
    case BPF_SOCK_OPS_TCP_LISTEN_CB:
        listening(ctx, s);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        if (ctx->args[1] == STATE_CLOSE)
            ended(ctx);
        break;
    }
    return 1;
}

SEC("cgroup/getsockopt") int tell(struct bpf_sockopt *ctx)
{
    // Answers larger than a page are not shown to programs; older kernels fail them unless they are declined.
    if (ctx->optlen > 4096) {
        ctx->optlen = 0;
        return 1;
    }
    if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6) || !ctx->sk)
        return 1;
    struct state *st = bpf_sk_storage_get(&states, ctx->sk, 0, 0);
    if (!st || st->role != ACCEPTED || !st->origin.family)
        return 1;
    if (ctx->level == SOL_IP && st->origin.family == AF_INET) {
        struct sockaddr_in *out = ctx->optval;
        if ((void *)(out + 1) > ctx->optval_end)
            return 1;
        out->family = AF_INET;
        out->port = htons(st->origin.port);
        out->address = st->origin.address[3];
        __builtin_memset(out->zero, 0, sizeof(out->zero));
        ctx->optlen = sizeof(*out);
    } else if (ctx->level == SOL_IPV6 && st->origin.family == AF_INET6) {
        struct sockaddr_in6 *out = ctx->optval;
        if ((void *)(out + 1) > ctx->optval_end)
            return 1;
        out->family = AF_INET6;
        out->port = htons(st->origin.port);
        out->flow = 0;
        __builtin_memcpy(out->address, st->origin.address, 16);
        out->scope = 0;
        ctx->optlen = sizeof(*out);
    } else {
        return 1;
    }
    ctx->retval = 0;
    bpf_map_delete_elem(&origins, &st->self);
    return 1;
}

// --- inbound ---------------------------------------------------------------------------------------------------------

SEC("sk_lookup") int steer(struct bpf_sk_lookup *ctx)
{
    if (ctx->protocol != TCP)
        return SK_PASS;
    struct packet p = {.port = ctx->local_port, .protocol = TCP, .uid = -1, .gid = -1};
    __u32 family = READ(ctx->family), local4 = READ(ctx->local_ip4), remote4 = READ(ctx->remote_ip4);
    __u32 l0 = READ(ctx->local_ip6[0]), l1 = READ(ctx->local_ip6[1]);
    __u32 l2 = READ(ctx->local_ip6[2]), l3 = READ(ctx->local_ip6[3]);
    __u32 r0 = READ(ctx->remote_ip6[0]), r1 = READ(ctx->remote_ip6[1]);
    __u32 r2 = READ(ctx->remote_ip6[2]), r3 = READ(ctx->remote_ip6[3]);
    int is6 = family == AF_INET6;
    p.destination[0] = is6 ? l0 : 0;
    p.destination[1] = is6 ? l1 : 0;
    p.destination[2] = is6 ? l2 : htonl(0xffff);
    p.destination[3] = is6 ? l3 : local4;
    p.source[0] = is6 ? r0 : 0;
    p.source[1] = is6 ? r1 : 0;
    p.source[2] = is6 ? r2 : htonl(0xffff);
    p.source[3] = is6 ? r3 : remote4;
    // What the pod sends to itself came through `connect`. The interface would not tell: a packet to the address of a
    // card counts as having come in there, though it went over `lo`.
    if (is_local(p.source) || !decide(policy(), &p, INBOUND))
        return SK_PASS;
    for (__u32 i = 0; i < LISTENERS; i++) {
        __u32 slot = i;
        struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &slot);
        if (!sk)
            continue;
        long err = bpf_sk_assign(ctx, sk, 0);
        bpf_sk_release(sk);
        if (err == 0)
            return SK_PASS;
    }
    // Nobody listens: refused, as with REDIRECT. The app must not be reached past its proxy.
    count(COUNT_NO_LISTENER);
    return SK_DROP;
}

// --- bytes -----------------------------------------------------------------------------------------------------------

SEC("sk_msg") int pass_on(struct sk_msg_md *msg)
{
    struct bpf_sock *sk = msg->sk;
    if (!sk)
        return SK_PASS;
    struct state *st = bpf_sk_storage_get(&states, sk, 0, 0);
    if (!st || st->way == BY_TCP)
        return SK_PASS;
    if (bpf_msg_redirect_hash(msg, &pairs, &st->peer, BPF_F_INGRESS) == SK_PASS) {
        if (st->way == UNDECIDED)
            count(COUNT_DIRECT);
        st->way = DIRECT;
        return SK_PASS;
    }
    if (st->way == UNDECIDED)
        count(COUNT_BY_TCP);
    st->way = BY_TCP;
    return SK_PASS;
}

// The kernel gives the helpers that are used here, and the look at its structures, to programs under the GPL only.
char _license[] SEC("license") = "GPL";
