// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// What the kernel gives: helpers by number (<linux/bpf.h>), and the few fields of its structures that are read. The
// offsets of those are put in when the programs are loaded (CO-RE), so that one object fits every kernel.
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define READ(field) (*(volatile __typeof__(field) *)&(field))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

#define HELPER(type, name, ...) static type (*const name)(__VA_ARGS__) = (void *)BPF_FUNC_##name##_
#define BPF_FUNC_bpf_map_lookup_elem_ 1
#define BPF_FUNC_bpf_map_update_elem_ 2
#define BPF_FUNC_bpf_map_delete_elem_ 3
#define BPF_FUNC_bpf_sock_ops_cb_flags_set_ 59
#define BPF_FUNC_bpf_bind_ 64
#define BPF_FUNC_bpf_sock_map_update_ 53
#define BPF_FUNC_bpf_sock_hash_update_ 70
#define BPF_FUNC_bpf_msg_redirect_hash_ 71
#define BPF_FUNC_bpf_sk_release_ 86
#define BPF_FUNC_bpf_sk_storage_get_ 107
#define BPF_FUNC_bpf_sk_storage_delete_ 108
#define BPF_FUNC_bpf_get_netns_cookie_ 122
#define BPF_FUNC_bpf_sk_assign_ 124
#define BPF_FUNC_bpf_skc_to_tcp_sock_ 137
#define BPF_FUNC_bpf_get_current_task_btf_ 158
#define BPF_FUNC_bpf_loop_ 181

HELPER(void *, bpf_map_lookup_elem, void *map, const void *key);
HELPER(long, bpf_map_update_elem, void *map, const void *key, const void *value, __u64 flags);
HELPER(long, bpf_map_delete_elem, void *map, const void *key);
HELPER(long, bpf_sock_ops_cb_flags_set, struct bpf_sock_ops *ctx, int flags);
HELPER(long, bpf_bind, struct bpf_sock_addr *ctx, void *address, int length);
HELPER(long, bpf_sock_map_update, struct bpf_sock_ops *ctx, void *map, void *key, __u64 flags);
HELPER(long, bpf_sock_hash_update, struct bpf_sock_ops *ctx, void *map, void *key, __u64 flags);
HELPER(long, bpf_msg_redirect_hash, struct sk_msg_md *msg, void *map, void *key, __u64 flags);
HELPER(long, bpf_sk_release, void *sock);
HELPER(void *, bpf_sk_storage_get, void *map, void *sk, void *value, __u64 flags);
HELPER(long, bpf_sk_storage_delete, void *map, void *sk);
HELPER(__u64, bpf_get_netns_cookie, void *ctx);
HELPER(long, bpf_sk_assign, void *ctx, void *sk, __u64 flags);
HELPER(struct tcp_sock *, bpf_skc_to_tcp_sock, void *sk);
HELPER(struct task_struct *, bpf_get_current_task_btf, void);
HELPER(long, bpf_loop, __u32 rounds, void *step, void *ctx, __u64 flags);

#define AF_INET 2
#define AF_INET6 10
#define TCP 6
#define UDP 17
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80

#define htons(x) __builtin_bswap16(x)
#define htonl(x) __builtin_bswap32(x)
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "big-endian machines are not supported"
#endif

struct sockaddr_in {
    __u16 family;
    __u16 port;
    __u32 address;
    __u8 zero[8];
};

struct sockaddr_in6 {
    __u16 family;
    __u16 port;
    __u32 flow;
    __u32 address[4];
    __u32 scope;
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
typedef struct {
    __u32 val;
} kuid_t;
typedef struct {
    __u32 val;
} kgid_t;
struct cred {
    kuid_t fsuid;
    kgid_t fsgid;
};
struct file {
    const struct cred *f_cred;
};
struct socket {
    struct file *file;
};
struct sock {
    struct socket *sk_socket;
};
struct inet_sock {
    struct sock sk;
};
struct inet_connection_sock {
    struct inet_sock icsk_inet;
};
struct tcp_sock {
    struct inet_connection_sock inet_conn;
};
struct task_struct {
    const struct cred *cred;
};
#pragma clang attribute pop
