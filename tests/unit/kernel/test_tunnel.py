"""What goes over the socket between daemon and forwarder, and the forwarder against garbage on it."""

import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flannelpy.backends.udp import protocol
from flannelpy.backends.udp.control import Control
from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.kernel import Tunnel

TUNNEL = Tunnel(
    "flannel0",
    parse_address("192.0.2.1"),
    8285,
    1472,
    (parse_address("10.5.1.0"), parse_address("fd00:5:0:1::")),
    True,
)


def test_a_tunnel_and_its_entries_come_through_as_they_are() -> None:
    message = protocol.encode({"tunnel": protocol.encode_tunnel(TUNNEL)})
    assert protocol.decode_tunnel(protocol.decode(message)["tunnel"]) == TUNNEL
    entries = {
        parse_prefix("10.5.2.0/24"): parse_address("192.0.2.2"),
        parse_prefix("::/0"): parse_address("::1"),
    }
    assert protocol.decode_forwards(protocol.encode_forwards(entries.items())) == entries


def test_ten_thousand_entries_fit_into_pages() -> None:
    subnets = (parse_prefix(f"fd00:5:{n >> 8:x}:{n & 255:x}::/64") for n in range(10000))
    entries = dict.fromkeys(subnets, parse_address("2001:db8::ffff:ffff"))
    pages = [list(entries.items())[n : n + protocol.PAGE] for n in range(0, 10000, protocol.PAGE)]
    assert max(len(protocol.encode({"put": protocol.encode_forwards(page)})) for page in pages) < 50_000


@pytest.mark.root
def test_the_forwarder_answers_everything_and_dies_of_nothing() -> None:
    """Without a tunnel; the listener's owner is root, as the real one's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(protocol.address_of("fuzzed0"))
        listener.listen()
        control = Control(listener)
        thread = threading.Thread(target=control.run, daemon=True)
        thread.start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(5)
            connection.connect(protocol.address_of("fuzzed0"))

            def ask(data: bytes) -> dict[str, object]:
                connection.send(data)
                return protocol.decode(connection.recv(protocol.MAX_MESSAGE))

            words = st.sampled_from(
                ["take", "lend", "release", "apply", "observe", "counters", "hello", "fly"]
            )
            value = st.recursive(
                st.none() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5
            )
            message = st.fixed_dictionaries(
                {"do": words}, optional={"tunnel": value, "put": value, "gone": value, "from": value}
            )

            # A busy machine is no fault of the forwarder.
            @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
            @given(st.binary(min_size=1, max_size=200) | message.map(protocol.encode))
            def fuzz(data: bytes) -> None:
                ask(data)

            fuzz()
            assert "error" in ask(b"[]")
            assert "error" in ask(b"[" * 100_000)
            assert ask(protocol.encode({"do": "apply", "put": [["10.5.2.0/24", "192.0.2.2"]]})) == {}
            assert ["10.5.2.0/24", "192.0.2.2"] in ask(b'{"do":"observe"}')["forwards"]  # type: ignore[operator]
            assert ask(b'{"do":"stop"}') == {}
        thread.join(5)
        assert not thread.is_alive()
