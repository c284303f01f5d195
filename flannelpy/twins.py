"""What is said of another machine that has our public IP: a cloned one, or two behind one address."""

import logging

from flannelpy.health import Health
from flannelpy.model import identity
from flannelpy.model.address import format_address
from flannelpy.model.identity import Identity
from flannelpy.model.lease import Lease

log = logging.getLogger(__name__)

REMEDY = "Give each machine an address of its own (--public-ip, --iface), then restart it"


def conflict(own: Lease, theirs: Lease, them: Identity | None, us: Identity) -> str:
    """Who writes our record beside us, with both identities."""
    return (
        f"another machine has our public IP {_public_ip(own)} and claims our lease {own.key}:"
        f" {them or 'unknown'}, {theirs.attrs.backend_data}; we are {us}, {own.attrs.backend_data}"
    )


def name_predecessor(own: Lease, signature: str | None, us: Identity, health: Health) -> None:
    """Say who wrote the record that a start has taken over, if that was not an earlier life of ours.

    A machine that was running after ours had booted is another one, and may still run. Of what was before
    that nobody can say more than the host's name: renamed, installed anew, or a clone. If that one still
    runs it takes its record back at once, and is named then.
    """
    them = identity.parse(signature or "")
    if them is None or them.boot == us.boot:
        return
    if them.is_later_than(us):
        health.conflict = (
            f"another machine has our public IP {_public_ip(own)} and has written our lease {own.key} since"
            f" this one booted: {them}; we are {us}"
        )
        log.error("%s; if it still runs, peers may not reach this node. %s", health.conflict, REMEDY)
    elif them.host != us.host:
        log.info("our lease %s was written before by %s; we are %s", own.key, them, us)


def _public_ip(own: Lease) -> str:
    return format_address(own.attrs.public_ip or own.attrs.public_ipv6 or b"")
