"""Which peer has a subnet, and which sources a peer may speak for: the forwarding table. Pure."""

from collections.abc import Iterable, Mapping

from flannelpy.model.address import Address, Prefix, format_address

_CACHED = 1 << 14
"""Destinations remembered; a scan of the address space empties the memory, which costs little."""

Target = tuple[str, int]
"""Address and port of a peer, as `sendmsg` wants it."""

Spans = tuple[tuple[int, int, int], ...]
"""(bytes of the family's addresses, first, last) of what a peer may have as inner source."""


class Table:
    """Subnet -> the peer's address, with longest-prefix match; and a peer's address -> what it may send.

    All peers use one port, as in flannel, where each node takes its own configured one.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.entries: dict[Prefix, Address] = {}
        self._by_length: dict[int, dict[int, dict[int, Target]]] = {4: {}, 16: {}}
        """Bytes of an address -> length, the longest first -> network without its host bits -> target."""
        self._subnets: dict[Address, set[Prefix]] = {}
        self._senders: dict[str, Spans] = {}
        self._cache: dict[int, Target] = {}

    def apply(self, put: Mapping[Prefix, Address], gone: Iterable[Prefix]) -> None:
        """Change entries; what is gone and put at once is put."""
        changed: set[Address] = set()
        for prefix in (*gone, *put):
            if prefix in self.entries:
                changed.add(self._take_out(prefix))
        for prefix, address in put.items():
            self._take_in(prefix, address)
            changed.add(address)
        for address in changed:
            self._let_speak(address)
        self._cache.clear()

    def _take_out(self, prefix: Prefix) -> Address:
        address = self.entries.pop(prefix)
        self._subnets[address].discard(prefix)
        lengths = self._by_length[len(prefix.address)]
        networks = lengths[prefix.length]
        del networks[prefix.first >> (prefix.bits - prefix.length)]
        if not networks:
            del lengths[prefix.length]
        return address

    def _take_in(self, prefix: Prefix, address: Address) -> None:
        self.entries[prefix] = address
        self._subnets.setdefault(address, set()).add(prefix)
        width = len(prefix.address)
        if prefix.length not in self._by_length[width]:
            lengths = {**self._by_length[width], prefix.length: {}}
            self._by_length[width] = dict(sorted(lengths.items(), reverse=True))
        networks = self._by_length[width][prefix.length]
        networks[prefix.first >> (prefix.bits - prefix.length)] = (format_address(address), self.port)

    def _let_speak(self, address: Address) -> None:
        """A peer may use its subnets, and its own address: a process on its host may be bound to that."""
        subnets = self._subnets[address]
        if not subnets:
            del self._subnets[address]
            del self._senders[format_address(address)]
            return
        own = int.from_bytes(address)
        spans = [(len(prefix.address), prefix.first, prefix.last) for prefix in sorted(subnets)]
        self._senders[format_address(address)] = (*spans, (len(address), own, own))

    def target(self, width: int, destination: int) -> Target | None:
        """Where a packet for that inner destination goes."""
        found = self._cache.get(destination)
        if found is not None:
            return found
        for length, networks in self._by_length[width].items():
            found = networks.get(destination >> (width * 8 - length))
            if found is not None:
                if width == 4:
                    if len(self._cache) >= _CACHED:
                        self._cache.clear()
                    self._cache[destination] = found
                return found
        return None

    def sender(self, address: str) -> Spans | None:
        """What the peer with that address may send; None if there is no such peer."""
        return self._senders.get(address)
