// The fast path of the udp backend: what is certain, in the kernel. All else goes on to the forwarder, unchanged.
//
//   encap    egress of flannel0: puts a datagram around a packet and sends it out of the uplink
//   decap    ingress of the uplink: takes the packet out and gives it to flannel0
//
// A datagram of the fast path has no outer checksum; flannel's and the forwarder's have one and are not touched here.
// The fast path refuses nobody: who is no peer, or speaks for another's subnet, is judged and counted by the forwarder.
//
// Compiled by setup.py, loaded by flannelpy/kernel/bpf.py: no headers but the kernel's, no BTF, no subprograms.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NET16(value) __builtin_bswap16(value)
#else
#define NET16(value) (value)
#endif

#define OUTER (sizeof(struct iphdr) + sizeof(struct udphdr))
#define ECN 3
#define ECT_1 1
#define ECT_0 2
#define CONGESTED 3
#define ANY_FRAGMENT NET16(0x3fff)

// What the loader knows of a map: its name. Type and sizes stand in flannelpy/kernel/fast_path.py.
struct map { __u32 unused; };
#define MAP SECTION("maps")
struct map config MAP, peers MAP, counts MAP;

struct settings { // the one element of `config`
    __u32 uplink, device; // interface indices
    __u32 local;          // network byte order
    __u16 port;           // network byte order
    __u16 mtu;            // the largest inner packet
};
struct subnet { // a key of `peers`, an LPM trie
    __u32 length;
    __u32 address; // network byte order
};
struct peer {
    __u32 remote; // network byte order
    __u32 slow;   // whether its packets leave by the forwarder
};
enum count { SENT_PACKETS, SENT_BYTES, RECEIVED_PACKETS, RECEIVED_BYTES, FAILED };

static void *(*map_lookup)(void *, const void *) = (void *)BPF_FUNC_map_lookup_elem;
static long (*load_bytes)(const void *, __u32, void *, __u32) = (void *)BPF_FUNC_skb_load_bytes;
static long (*store_bytes)(void *, __u32, const void *, __u32, __u64) = (void *)BPF_FUNC_skb_store_bytes;
static long (*replace_sum)(void *, __u32, __u64, __u64, __u64) = (void *)BPF_FUNC_l3_csum_replace;
static long (*adjust_room)(void *, __s32, __u32, __u64) = (void *)BPF_FUNC_skb_adjust_room;
static long (*change_head)(void *, __u32, __u64) = (void *)BPF_FUNC_skb_change_head;
static long (*redirect)(__u32, __u64) = (void *)BPF_FUNC_redirect;
static long (*redirect_neigh)(__u32, void *, int, __u64) = (void *)BPF_FUNC_redirect_neigh;
static __u32 (*random32)(void) = (void *)BPF_FUNC_get_prandom_u32;

INLINE void add(__u32 which, __u64 value)
{
    __u64 *found = map_lookup(&counts, &which);
    if (found)
        *found += value; // one per CPU
}

INLINE struct settings *settings(void)
{
    __u32 first = 0;
    return map_lookup(&config, &first);
}

INLINE struct peer *peer_of(__u32 address)
{
    struct subnet key = {32, address};
    return map_lookup(&peers, &key);
}

INLINE __u32 packets_in(const struct __sk_buff *skb)
{
    return skb->gso_size && skb->gso_segs ? skb->gso_segs : 1;
}

INLINE __u16 header_sum(const struct iphdr *ip)
{
    const __u16 *word = (const void *)ip;
    __u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 10; i++)
        sum += word[i];
    sum = (sum & 0xffff) + (sum >> 16);
    sum += sum >> 16;
    return ~sum;
}

SECTION("tc/encap") int encap(struct __sk_buff *skb)
{
    struct { struct iphdr ip; struct udphdr udp; } __attribute__((packed, aligned(4))) outer = {};
    struct settings *set = settings();
    struct iphdr inner;
    struct peer *peer;
    __u16 ethernet = NET16(ETH_P_IP);
    __u32 length = skb->len, packets = packets_in(skb);

    if (!set || !set->uplink || skb->protocol != NET16(ETH_P_IP) || load_bytes(skb, 0, &inner, sizeof(inner)))
        return TC_ACT_UNSPEC;
    if (*(__u8 *)&inner != 0x45 || NET16(inner.tot_len) != length)
        return TC_ACT_UNSPEC; // options, or a packet of more than 64 KiB
    if (!skb->gso_size && length > set->mtu)
        return TC_ACT_UNSPEC; // the forwarder tells its sender
    peer = peer_of(inner.daddr);
    if (!peer || peer->slow)
        return TC_ACT_UNSPEC;

    *(__u8 *)&outer.ip = 0x45;
    outer.ip.tos = inner.tos;
    outer.ip.tot_len = NET16((__u16)(length + OUTER)); // of a train: the kernel sets it in each packet that it cuts
    outer.ip.id = (__u16)random32();
    outer.ip.ttl = 64;
    outer.ip.protocol = 17;
    outer.ip.saddr = set->local;
    outer.ip.daddr = peer->remote;
    outer.ip.check = header_sum(&outer.ip);
    outer.udp.source = outer.udp.dest = set->port;
    outer.udp.len = NET16((__u16)(length + sizeof(struct udphdr)));

    if (adjust_room(skb, OUTER, BPF_ADJ_ROOM_MAC,
                    BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP))
        return TC_ACT_UNSPEC;
    // redirect_neigh takes an Ethernet header away and makes one of its own; a TUN's packets have none.
    if (store_bytes(skb, 0, &outer, sizeof(outer), 0) || change_head(skb, ETH_HLEN, 0) ||
        store_bytes(skb, 12, &ethernet, sizeof(ethernet), 0)) {
        add(FAILED, 1);
        return TC_ACT_SHOT;
    }
    add(SENT_PACKETS, packets);
    add(SENT_BYTES, length);
    return redirect_neigh(set->uplink, 0, 0, 0);
}

SECTION("tc/decap") int decap(struct __sk_buff *skb)
{
    struct { struct iphdr ip; struct udphdr udp; struct iphdr inner; } __attribute__((packed, aligned(4))) head;
    struct settings *set = settings();
    struct peer *peer;
    __u32 length = skb->len - ETH_HLEN - OUTER, packets = packets_in(skb);
    __u8 mark, own, tos;

    if (!set || skb->protocol != NET16(ETH_P_IP) || skb->vlan_present ||
        load_bytes(skb, ETH_HLEN, &head, sizeof(head)))
        return TC_ACT_UNSPEC;
    if (*(__u8 *)&head.ip != 0x45 || head.ip.protocol != 17 || head.ip.daddr != set->local ||
        head.udp.dest != set->port || head.ip.frag_off & ANY_FRAGMENT || head.udp.check)
        return TC_ACT_UNSPEC;
    // A train's outer lengths may be more than fits in there: the inner one counts. (A train of datagrams, as
    // UDP_SEGMENT makes them, is longer than its first inner packet.)
    if (*(__u8 *)&head.inner != 0x45 || NET16(head.inner.tot_len) != length)
        return TC_ACT_UNSPEC;
    if (!skb->gso_size && (NET16(head.udp.len) != length + sizeof(struct udphdr) ||
                           NET16(head.ip.tot_len) != length + OUTER || header_sum(&head.inner)))
        return TC_ACT_UNSPEC;
    peer = peer_of(head.inner.saddr);
    if (!peer || peer->remote != head.ip.saddr)
        return TC_ACT_UNSPEC;

    mark = head.ip.tos & ECN;
    own = head.inner.tos & ECN;
    if (mark == CONGESTED && !own)
        return TC_ACT_UNSPEC; // must be dropped (RFC 6040): the forwarder does, and counts it
    if ((mark == CONGESTED && own != CONGESTED) || (mark == ECT_1 && own == ECT_0)) {
        tos = (head.inner.tos & ~ECN) | mark;
        if (replace_sum(skb, ETH_HLEN + OUTER + 10, NET16(head.inner.tos), NET16(tos), 2) ||
            store_bytes(skb, ETH_HLEN + OUTER + 1, &tos, 1, 0))
            return TC_ACT_UNSPEC;
    }
    if (adjust_room(skb, -(__s32)OUTER, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
        return TC_ACT_UNSPEC;
    add(RECEIVED_PACKETS, packets);
    add(RECEIVED_BYTES, length);
    return redirect(set->device, BPF_F_INGRESS);
}

SECTION("license") char words[] = "Apache-2.0";
