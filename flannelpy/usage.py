"""The text of `--help`, made from the table of flags."""

import textwrap

from flannelpy import errors
from flannelpy.flags import TABLE, Flag

WIDTH = 92

COMMANDS = {
    "bench": "measure the overlay between two hosts, against the underlay",
    "capture": "the overlay's packets on the uplink, decoded; writes pcap",
    "cleanup": "remove from this host what the daemon made (shows it first)",
    "cni": "put the CNI plugin for pods onto this host, or take it away: install, remove",
    "config": "the network config in etcd: get, set, validate, explain",
    "demo": "try an overlay on this machine: nodes in network namespaces that ping each other",
    "docker-opts": "turn subnet.env into options for dockerd (flannel's mk-docker-opts.sh)",
    "doctor": "what is wrong here and, with --peers, on the ways to peers; what mends it",
    "lease": "the leases in etcd: list, show, check, release, reserve, unreserve; confirm",
    "report": "pack what helps to find a fault into one archive, without secrets",
    "status": "how the daemon on this host is: problems first, then lease, peers, repairs",
    "trace": "follow a packet from here to a pod, step by step, and send a ping there",
}

_HEAD = """\
flannelpy gives this host a subnet of one overlay network and carries packets to all the others.
It leases the subnet from etcd, keeps the kernel's routes as the leases say, and writes subnet.env
for Docker and CNI. Flags, variables and formats are flannel's.

usage: flannelpy [--flag=value ...]     run the daemon
       flannelpy COMMAND [...]          run one of the commands below

  Put the network into etcd once, then start the daemon on every host:
      etcdctl put /coreos.com/network/config '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
      flannelpy --etcd-endpoints=http://10.0.0.2:2379,http://10.0.0.3:2379

  On a Kubernetes node take the podCIDR instead; in a pod nothing else is needed (NODE_NAME is set):
      NODE_NAME=node1 flannelpy --kube-subnet-mgr --kubeconfig-file=/etc/kubernetes/flannelpy.conf

  Choose the interface, and set the rest by the environment:
      FLANNELD_ETCD_PREFIX=/prod/network flannelpy --iface=eth1 --iface=10.0.0.7 --v=1

-f and --f are the same. A value follows after = or as the next word, but a boolean takes one only
with = (--ip-masq=false). Repeatable flags add up, of the others the last one counts. A flag that is
not given is read from its variable; an empty variable counts as not set.
"""

_OTHER = """\
other:
  -h, --help
      Show this text.
  --version
      Show the version; there is no variable.
"""

_CODES = (
    (0, "stopped by a signal; also --help and --version"),
    (errors.FlannelpyError.exit_code, "failed while running"),
    (errors.SettingsError.exit_code, "a flag or variable is not usable: correct it, a restart does not help"),
    (errors.UplinkError.exit_code, "no usable uplink: the interface that the overlay runs over"),
    (
        errors.KernelError.exit_code,
        "the kernel refuses what the overlay needs (privilege, module, device name)",
    ),
    (errors.ConflictError.exit_code, "another daemon serves this network on this host"),
    (errors.StoreError.exit_code, "the store (etcd) cannot do what was asked for"),
    (errors.ChangedError.exit_code, "somebody else changed it meanwhile: only for lease and config"),
)


def help_text() -> str:
    """The whole text, ending with a newline; no line is wider than 100 columns."""
    groups = dict.fromkeys(flag.group for flag in TABLE)
    return "\n".join(
        (
            _HEAD,
            "commands:\n" + "".join(f"  {name:12} {what}\n" for name, what in COMMANDS.items()),
            *(
                f"{name}:\n" + "".join(_entry(flag) for flag in TABLE if flag.group == name)
                for name in groups
            ),
            _OTHER,
            "exit codes:\n" + "".join(f"  {code}  {what}\n" for code, what in _CODES),
        )
    )


def _entry(flag: Flag) -> str:
    head = f"  --{flag.name}" + (f"={flag.word}" if flag.word else "")
    default = flag.default or "none"
    tail = f"[default {default}; {flag.env}]"
    body = textwrap.wrap(flag.help, WIDTH - 6, break_on_hyphens=False)
    if len(body[-1]) + 1 + len(tail) <= WIDTH - 6:
        body[-1] += " " + tail
    else:
        body.append(tail)
    return "\n".join([head, *(" " * 6 + line for line in body)]) + "\n"
