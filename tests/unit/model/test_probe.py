"""Who is probed, and which layer is at fault."""

import pytest

from flannelpy.model.address import parse_v4
from flannelpy.model.probe import (
    CHECKSUM,
    ENCAPSULATION,
    MEANING,
    MTU,
    ROUTING,
    UNDERLAY,
    UNDERLAY_MTU,
    Heard,
    Target,
    fault,
    targets,
)
from tests.builders import lease

RTT = 0.001
WRAPPED = Target("10.5.2.0-24", parse_v4("10.5.2.0"), parse_v4("192.0.2.2"))


@pytest.mark.parametrize(
    ("heard", "layer"),
    [
        (Heard(RTT, RTT), None),
        (Heard(None, underlay=None), UNDERLAY),
        (Heard(None, underlay=RTT), ENCAPSULATION),
        (Heard(RTT, None, underlay_full=RTT), MTU),
        (Heard(RTT, None, underlay_full=None), UNDERLAY_MTU),
        (Heard(RTT, RTT, only_summed_here=True), CHECKSUM),
    ],
)
def test_the_layer_at_fault(heard: Heard, layer: str | None) -> None:
    assert fault(WRAPPED, heard) == layer
    assert layer is None or layer in MEANING


def test_without_a_tunnel_there_is_no_encapsulation_to_blame() -> None:
    assert fault(WRAPPED._replace(is_routed=True), Heard(None, underlay=RTT)) == ROUTING
    assert ROUTING in MEANING


def test_every_peer_but_ourselves_in_the_families_that_both_have() -> None:
    own = lease("10.5.1.0/24", "192.0.2.1")
    peer = lease("10.5.2.0/24", "192.0.2.2")
    # A former lease of ours with another key is ourselves, too.
    former = lease("10.5.3.0/24", "192.0.2.1")
    nowhere = peer._replace(key="x", attrs=peer.attrs._replace(public_ip=None))
    found = targets([own, peer, former, nowhere], own)
    assert [(one.key, one.overlay, one.underlay) for one in found] == [
        (peer.key, parse_v4("10.5.2.0"), parse_v4("192.0.2.2"))
    ]
    (routed,) = targets([own, peer], own, routed=True)
    assert (routed.overlay, routed.is_routed) == (parse_v4("10.5.2.1"), True)
