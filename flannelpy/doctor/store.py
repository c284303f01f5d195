"""Checks of the datastore, its clock and certificates, and of what it holds about the network. Pure."""

import time
from collections.abc import Iterator

from flannelpy.doctor.facts import Facts, Store
from flannelpy.doctor.finding import Finding, error, warning
from flannelpy.doctor.host import CLOCK_SECONDS
from flannelpy.model import census
from flannelpy.model.config import EXAMPLE_CONFIG

SLOW_SECONDS = 1.0
"""A linearizable read on a loaded cluster stays below (etcd's own warning begins at 0.1 s)."""
SOON_SECONDS = 7 * 86400.0
_CURL = "etcdctl --endpoints={} endpoint health"


def store(facts: Facts) -> Iterator[Finding]:
    """Whether it can be read, and how fast."""
    found = facts.store
    if found is None:
        return
    if found.trouble is not None:
        yield _unreadable(found, facts.now)
    elif found.seconds is not None and found.seconds > SLOW_SECONDS:
        yield warning(
            "store-latency",
            f"etcd takes {found.seconds:.1f} s for one read",
            "leases are renewed late, and changes of peers arrive late",
            "look at its disk (etcd_disk_wal_fsync_duration_seconds) and at the network to it",
        )
    for member in found.members:
        if member.trouble is not None and found.trouble is None:
            yield warning(
                "store-member",
                f"etcd member {member.endpoint}: {member.trouble}",
                "the others serve; with one more lost the network cannot be changed",
                f"start it, or take it off --etcd-endpoints; {_CURL.format(member.endpoint)}",
            )
        if member.health is not None:
            yield error(
                "store-alarm",
                f"etcd member {member.endpoint} says that it is not well: {member.health}",
                "with an alarm NOSPACE no lease can be taken or renewed, and nodes lose theirs within a day",
                "etcdctl alarm list; make room (etcdctl compact, etcdctl defrag), then etcdctl alarm disarm",
            )


def _unreadable(found: Store, now: float) -> Finding:
    text = found.trouble or ""
    ended = found.expires is not None and found.expires <= now
    if ended or "expired" in text:
        return error(
            "certificate",
            f"the client certificate {found.cert_file} has ended {_day(found.expires or 0)}"
            if ended
            else text,
            "no connection to etcd: no lease is renewed, no change of a peer is seen",
            f"renew {found.cert_file}; it is read again by itself"
            if ended
            else "renew the certificate of the etcd server and restart etcd there",
        )
    if found.refused:
        return error(
            "store-auth",
            text,
            "etcd does not let this node read or write the network",
            "correct --etcd-username and the password, or grant the role: etcdctl role grant-permission"
            " ROLE --prefix=true readwrite PREFIX",
        )
    return error(
        "store",
        f"the store cannot be read: {text}",
        "the network goes on as it is; no lease is renewed (leases end after 24 hours), no change is seen",
        "on its host: systemctl status etcd; from here: "
        + _CURL.format(found.place.partition(",")[0])
        + "; is --etcd-endpoints right?",
    )


def certificates(facts: Facts) -> Iterator[Finding]:
    """Those that end soon, while they still work."""
    found = facts.store
    if found is None or found.trouble is not None:
        return
    names = [(f"the client certificate {found.cert_file}", found.expires)]
    names += [(f"the certificate of {one.endpoint}", one.expires) for one in found.members]
    for name, end in names:
        if end is not None and end - facts.now < SOON_SECONDS:
            yield warning(
                "certificate",
                f"{name} ends {_day(end)}",
                "after that nobody can read or write the network's leases",
                "renew it; flannelpy reads its files again by itself",
            )


def clock(facts: Facts) -> Iterator[Finding]:
    """Ours against etcd's."""
    for member in facts.store.members if facts.store else ():
        ahead = member.clock_ahead
        if ahead is not None and abs(ahead) > CLOCK_SECONDS:
            yield warning(
                "clock",
                f"the clock of {member.endpoint} is {abs(ahead):.0f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} ours",
                "certificates, and how long a remembered lease is good for, are judged by the clock",
                "timedatectl set-ntp true (or start chrony) on the host whose clock is wrong",
            )
            return


def config(facts: Facts) -> Iterator[Finding]:
    """Whether there is a network to serve."""
    if facts.overlay_trouble and not (facts.store and facts.store.trouble):
        place = facts.store.config_place if facts.store else "the config key"
        yield error(
            "config",
            facts.overlay_trouble,
            "every daemon of the network waits for a config that it can serve",
            f"flannelpy config set '{EXAMPLE_CONFIG}' writes {place}",
        )


_REMEDIES = {
    "pool-full": "flannelpy lease check names leases that were not renewed; flannelpy lease release KEY, or"
    " flannelpy config set with a larger Network or a larger SubnetLen",
    "pool": "flannelpy lease check; plan a larger Network or a larger SubnetLen",
    "public-ip": "flannelpy lease show IP; flannelpy lease release what is not used, or give each node an"
    " address of its own (--iface, --public-ip)",
    "identity": "on the clone: systemd-machine-id-setup, ip link del flannel.1, systemctl restart flannelpy",
}
_WHY = {
    "error": "packets of some pods go to the wrong node, or nowhere",
    "warning": "it is about to become worse",
    "note": "",
}


def records(facts: Facts) -> Iterator[Finding]:
    """What `flannelpy lease check` finds; a reservation and the like are no trouble."""
    if facts.store is None or facts.store.census is None:
        return
    known = facts.overlay.config if facts.overlay else None
    for one in census.findings(known, facts.store.census):
        if one.severity != "note":
            remedy = _REMEDIES.get(one.kind, "flannelpy lease check; flannelpy lease release KEY")
            make = error if one.severity == "error" else warning
            yield make(
                one.kind,
                one.text.partition(": ")[0],
                one.text.partition(": ")[2] or _WHY[one.severity],
                remedy,
            )


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
