"""The faults that the doctor is tried with: what breaks, what it must find, what it must say mends it.

`docs/reference.md` shows this table; a test compares them. Commands run in a shell on node1, or where their
prefix says: `2:` on node2, `u:` in the underlay between them. {names} are filled in by the test.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Fault(NamedTuple):
    """`remedy` is part of what the doctor says, {names} filled in; in the table they stand in <>."""

    name: str
    check: str
    remedy: str
    damage: tuple[str, ...] = ()
    mend: tuple[str, ...] = ()


ROUTE = "ip route replace {base}/24 via {base} dev flannel.1 onlink proto 70"
NEIGHBOUR = "ip neigh replace {base} lladdr {mac} dev flannel.1 nud permanent"
FDB = "bridge fdb replace {mac} dev flannel.1 dst {peer} self permanent"
NOTHING_THERE = "192.168.77.99"
_DROP_FORWARDED = (
    "nft 'add table ip mine; add chain ip mine f {{type filter hook forward priority 0; policy drop;}}'"
)

TABLES = (
    Fault(
        "the device has another MAC than its lease says",
        "mac",
        "ip link set dev flannel.1 address {own_mac}",
        ("ip link set flannel.1 address 02:00:00:00:be:ef",),
        ("ip link set flannel.1 address {own_mac}", NEIGHBOUR),
    ),
    Fault(
        "the device is down",
        "device",
        "ip link set dev flannel.1 up",
        ("ip link set flannel.1 down",),
        ("ip link set flannel.1 up", NEIGHBOUR, ROUTE),
    ),
    Fault(
        "the device has another MTU",
        "device-mtu",
        "ip link set dev flannel.1 mtu 1450",
        ("ip link set flannel.1 mtu 1300",),
        ("ip link set flannel.1 mtu 1450",),
    ),
    Fault(
        "the device has lost its address",
        "address",
        "ip address add {own}/32 dev flannel.1",
        ("ip address del {own}/32 dev flannel.1",),
        ("ip address add {own}/32 dev flannel.1", NEIGHBOUR, ROUTE),
    ),
    Fault(
        "an FDB entry leads to a wrong host",
        "fdb",
        FDB,
        (f"bridge fdb replace {{mac}} dev flannel.1 dst {NOTHING_THERE} self permanent",),
        (FDB,),
    ),
    Fault("an FDB entry is missing", "fdb", FDB, ("bridge fdb del {mac} dev flannel.1",), (FDB,)),
    Fault(
        "a neighbour has a wrong MAC",
        "neighbour",
        NEIGHBOUR,
        ("ip neigh replace {base} lladdr 02:00:00:00:be:ef dev flannel.1 nud permanent",),
        (NEIGHBOUR,),
    ),
    Fault("the route to a peer is missing", "route", ROUTE, ("ip route del {base}/24",), (ROUTE,)),
    Fault(
        "a route to nobody is left over",
        "stale",
        "ip route del 10.5.250.0/24 dev flannel.1",
        ("ip route add 10.5.250.0/24 via 10.5.250.0 dev flannel.1 onlink proto 70",),
        ("ip route del 10.5.250.0/24",),
    ),
    Fault(
        "IPv4 forwarding is off",
        "forwarding",
        "sysctl -w net.ipv4.ip_forward=1",
        ("sysctl -qw net.ipv4.ip_forward=0",),
        ("sysctl -qw net.ipv4.ip_forward=1",),
    ),
    Fault(
        "strict rp_filter, and the way back leaves elsewhere",
        "rp_filter",
        "sysctl -w net.ipv4.conf.eth0.rp_filter=2",
        (
            "ip link add eth1 type veth peer name eth2",
            "ip link set eth1 up; ip link set eth2 up",
            "ip route add {peer}/32 dev eth1",
            "sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
        ),
        ("sysctl -qw net.ipv4.conf.eth0.rp_filter=0", "ip link del eth1"),
    ),
    Fault(
        "the bridge of the pods has another subnet",
        "bridge",
        "flannelpy docker-opts",
        ("ip link add docker0 type bridge", "ip address add 10.5.7.1/24 dev docker0"),
        ("ip link del docker0",),
    ),
    Fault(
        "subnet.env is gone",
        "subnet-env",
        "mend what is named",
        ("mv {env} {env}.away",),
        ("mv {env}.away {env}",),
    ),
    Fault(
        "another firewall drops what is forwarded",
        "rules",
        "accept the overlay network in that chain",
        (_DROP_FORWARDED,),
        ("nft delete table ip mine",),
    ),
    Fault(
        "the masquerade rules are missing",
        "rules",
        "systemctl start flannelpy",
        ("nft delete table ip flannel-ipv4",),
    ),
)
"""With the daemon of node1 stopped: it would mend most of these at once."""

STORE = (
    Fault("two nodes have one public IP", "public-ip", "flannelpy lease release"),
    Fault("the pool is full", "pool-full", "flannelpy lease release"),
    Fault("etcd is down", "store", "systemctl status etcd"),
    Fault("etcd is full", "store-alarm", "etcdctl alarm disarm"),
    Fault("etcd's certificate has expired", "certificate", "renew the certificate of the etcd server"),
    Fault("etcd does not know the password", "store-auth", "correct --etcd-username and the password"),
    Fault("the overlay runs over the wrong interface", "uplink", "--iface=eth0"),
)
"""Each with a daemon, etcd or records of its own."""

_EAT = (
    "nft 'add table netdev t; add chain netdev t c {{type filter hook ingress device {port} priority 0;}};"
    " add rule netdev t c {what} drop'"
)
_BLOCK = (
    "nft 'add table inet t; add chain inet t c {{type filter hook input priority 0;}};"
    " add rule inet t c udp dport 8472 drop'"
)
_SPIT = ("u:nft delete table netdev t",)


def _eat(port: str, what: str) -> tuple[str, ...]:
    """A network that drops what comes from a node."""
    return ("u:" + _EAT.replace("{port}", port).replace("{what}", what),)


_IN_AN_HOUR = "$(( ($(date +%s) * 1000 + 3600000) % 86400000 ))"
"""As ICMP timestamps count: milliseconds since midnight."""

PATHS = (
    Fault(
        "the network carries smaller packets than the uplink",
        "path-mtu",
        "set Backend.MTU to 1400",
        ("u:ip link set node2 mtu 1400",),
        ("u:ip link set node2 mtu 1500",),
    ),
    Fault(
        "only the way back carries smaller packets",
        "path-mtu",
        "set Backend.MTU to 1400",
        _eat("node2", "meta length > 1400"),
        _SPIT,
    ),
    Fault(
        "the network blocks the encapsulation port",
        "port-blocked",
        "let UDP 8472 in between here and {peer}",
        _eat("node1", "udp dport 8472"),
        _SPIT,
    ),
    Fault(
        "the peer's firewall blocks the encapsulation port",
        "port-blocked",
        "let UDP 8472 in on {peer}",
        (f"2:{_BLOCK}",),
        ("2:nft delete table inet t",),
    ),
    Fault(
        "the network takes VXLAN away, and no other datagrams",
        "vxlan-eaten",
        "set Backend.Port to one that passes",
        _eat("node1", "udp dport 8472 @th,64,8 0x08"),
        _SPIT,
    ),
    Fault(
        "our own firewall blocks the encapsulation port",
        "dropped-here",
        "iptables -I INPUT -p udp --dport 8472 -j ACCEPT",
        (_BLOCK,),
        ("nft delete table inet t",),
    ),
    Fault(
        "the peer is gone",
        "unreachable",
        "ping {peer}",
        ("u:ip link set node2 down",),
        ("u:ip link set node2 up",),
    ),
    Fault(
        "nothing takes packets on the peer",
        "port-closed",
        "on {peer}: systemctl start flannelpy",
        ("2:kill -STOP {pid2}", "2:ip link del flannel.1"),
        ("2:kill -CONT {pid2}",),
    ),
    Fault(
        "the peer's device has another MAC than its lease says",
        "peer-mac",
        "on {peer}: systemctl restart flannelpy",
        (
            "2:kill -STOP {pid2}",
            "2:ip link set flannel.1 address 02:00:00:00:be:ef",
            # Permanent neighbours go with the MAC, and without one it could not answer.
            "2:ip neigh replace {own} lladdr {own_mac} dev flannel.1 nud permanent",
        ),
        ("2:kill -CONT {pid2}",),
    ),
    Fault(
        "the peer's clock is an hour ahead",
        "clock",
        "timedatectl set-ntp true",
        (
            "2:nft add table ip t",
            "2:nft 'add chain ip t c {{type filter hook output priority 0;}}'",
            f"2:nft add rule ip t c icmp type timestamp-reply @th,96,32 set {_IN_AN_HOUR}",
        ),
        ("2:nft delete table ip t",),
    ),
)
"""With both daemons at work, found by probes (--peers)."""

ROUTED = (
    Fault(
        "the network takes away what is routed for pods (host-gw)",
        "not-routed",
        "on {peer}: sysctl net.ipv4.ip_forward must be 1",
        _eat("node1", "ip daddr 10.5.0.0/16"),
        _SPIT,
    ),
    Fault(
        "the network carries smaller packets than the uplink (host-gw)",
        "path-mtu",
        "set Backend.MTU to 1400",
        ("u:ip link set node2 mtu 1400",),
        ("u:ip link set node2 mtu 1500",),
    ),
)
"""The same without a tunnel."""

CARD = (
    Fault(
        "the network card makes wrong checksums",
        "checksum",
        "ethtool -K flannel.1 tx-checksum-ip-generic off",
    ),
)
"""With a card made of a process that finishes no checksum of what is inside."""

FAULTS = (*TABLES, *STORE, *PATHS, *ROUTED, *CARD)


def table(faults: Iterable[Fault] = FAULTS) -> list[str]:
    """As the reference shows it."""
    head = ["| fault | finding | part of the remedy |", "| --- | --- | --- |"]
    return head + [f"| {one.name} | `{one.check}` | `{_shown(one.remedy)}` |" for one in faults]


def _shown(remedy: str) -> str:
    words = {"own_mac": "own MAC", "mac": "MAC", "peer": "peer", "base": "subnet", "own": "own subnet"}
    return remedy.format_map({name: f"<{word}>" for name, word in words.items()})
