"""What another configuration of ours left behind."""

from flannelpy.model.address import Prefix, parse_prefix
from flannelpy.model.kernel import Route, State
from flannelpy.model.leftover import leftover_routes
from flannelpy.model.plan import Remove


def route(destination: str) -> Route:
    return Route(parse_prefix(destination), "eth0", b"\xc6\x12\x00\x01")


def test_routes_into_a_network_that_was_ours() -> None:
    old, kept, new = route("10.7.2.0/24"), route("10.5.2.0/24"), route("10.9.2.0/24")
    observed = State([old, kept, new])
    former, present = [parse_prefix("10.7.0.0/16")], [parse_prefix("10.5.0.0/16")]
    assert leftover_routes(observed, former, present) == [Remove(old)]


def test_a_network_that_grew_is_not_left() -> None:
    former: list[Prefix] = [parse_prefix("10.5.0.0/16")]
    observed = State([route("10.5.2.0/24")])
    assert leftover_routes(observed, former, [parse_prefix("10.4.0.0/15")]) == []
