"""What the alloc backend tells its peers: a lease, and nothing in the kernel."""

import pytest

from flannelpy.backend import PeerItems
from flannelpy.backends.alloc import AllocBackend
from flannelpy.model.address import parse_v4
from flannelpy.model.kernel import State
from flannelpy.model.subnet import encode_attrs
from tests.builders import DUAL, V4, config, facts, lease, uplink

V6_ONLY = DUAL.replace('"Network":"10.5.0.0/16",', '"EnableIPv4":false,')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (V4, '{"PublicIP":"203.0.113.9","PublicIPv6":null}'),
        (DUAL, '{"PublicIP":"203.0.113.9","PublicIPv6":"2001:db8::1"}'),
        (V6_ONLY, '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1"}'),
    ],
    ids=["v4", "dual", "v6"],
)
def test_a_lease_without_a_backend_type_and_nothing_in_the_kernel(text: str, value: str) -> None:
    alloc = AllocBackend(config(text.replace('"vxlan"', '"alloc"')))
    known = facts(uplink=uplink(1460, public_ip="203.0.113.9"), on_link=frozenset([parse_v4("192.0.2.2")]))
    attrs, warnings = alloc.attrs(known, None, (lease(),))
    assert encode_attrs(attrs) == value
    assert warnings == ()
    assert alloc.own(lease("10.5.1.0/24")._replace(attrs=attrs), known) == State()
    for backend_type in ("", "vxlan", "host-gw"):
        assert alloc.peer(lease(backend_type=backend_type), known) == PeerItems((), None)
    assert alloc.mtu(known) == 1460
