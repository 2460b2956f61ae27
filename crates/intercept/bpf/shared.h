// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// What the programs and the loader (src/ebpf/policy.rs) tell each other. Addresses are 16 bytes in network order, IPv4
// as ::ffff:a.b.c.d; ports are in host order unless said otherwise.
#pragma once

#include "kernel.h"

// Conditions of a rule.
#define DESTINATION (1 << 0)
#define SOURCE (1 << 1)
/// The packet would leave through `lo`: its destination is an address of this pod.
#define LOCAL (1 << 2)
#define PROTOCOL (1 << 3)
#define PORT (1 << 4)
#define UID (1 << 5)
#define GID (1 << 6)

// Actions of a rule.
#define LEAVE 0
#define REDIRECT 1
/// The next rules are passed over: how a rule with several owner groups is written.
#define SKIP 2

// Whose call it is, as far as a rule tells.
#define ANYBODY 0
#define PROXY 1

struct rule {
    __u32 conditions;
    __u32 negated;
    __u32 destination[4];
    __u32 mask[4];
    __u32 source[4];
    __u32 uid[2];
    __u32 gid[2];
    __u16 ports[2][2];
    __u16 to;
    __u16 skip;
    __u8 protocol;
    __u8 action;
    __u8 owner;
    /// Its place in ISTIO_OUTPUT or ISTIO_INBOUND, from 1.
    __u8 number;
};

// The lists of rules.
#define OUTBOUND 0
#define INBOUND 1

/// One generation of the policy. Its rules start at `first[list][v6]`.
struct settings {
    __u32 first[2][2];
    __u32 count[2][2];
    /// What a captured socket is bound to, so that the proxy sees the pod's address as with REDIRECT; zero: nothing.
    __u32 pod[2][4];
    __u16 outbound_port;
    __u16 inbound_port;
    /// Whether bytes between app and proxy pass by the TCP stack. An app that shuts its sending half down and then reads
    /// in blocking mode is woken by the kernel (6.18) with EAGAIN, as is every blocking reader of a socket map that is
    /// woken for another reason than data.
    __u8 accelerate;
    /// The same between two proxies of this node, which do not block.
    __u8 accelerate_node;
    __u8 pad[2];
};

/// A connection, seen from one end.
struct tuple {
    /// Its network namespace; zero where both ends are known by addresses that the node has once.
    __u64 netns;
    __u32 local[4];
    __u32 remote[4];
    __u16 local_port;
    __u16 remote_port;
    __u32 pad;
};

struct origin {
    __u32 address[4];
    __u16 port;
    /// AF_INET, AF_INET6, or 0: not known.
    __u16 family;
};

// What a socket is.
#define CAPTURED 1
#define OF_PROXY 2
#define LISTENER 3
#define ACCEPTED 4

// How a socket's bytes go; decided at the first message, since the two ways would overtake each other.
#define UNDECIDED 0
#define DIRECT 1
#define BY_TCP 2

/// What is kept with a socket.
struct state {
    struct origin origin;
    /// CAPTURED: the port that it was led to. LISTENER and ACCEPTED: the port of the listener.
    __u16 port;
    __u8 role;
    __u8 way;
    /// The connection as its accepted end sees it, and the other end's key in `pairs`.
    struct tuple self;
    struct tuple peer;
};

// Counters beside those of the rules.
#define COUNT_DIRECT 0
#define COUNT_BY_TCP 1
#define COUNT_NO_LISTENER 2
#define COUNT_ORIGIN_LOST 3
#define COUNTERS 4
