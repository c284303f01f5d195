"""The neighbours and FDB entries of a device, read as the model has them."""

from flannelpy.kernel import codec, replies
from flannelpy.kernel.netlink import NetlinkSocket
from flannelpy.model.kernel import FdbEntry, Neighbour, State


def observe_neighbours(netlink: NetlinkSocket, state: State, index: int, name: str) -> None:
    """Put the permanent neighbours and all FDB entries of one device into `state`."""
    for family in (codec.AF_INET, codec.AF_INET6):
        rows = netlink.rows(codec.neighbour_dump(index, family), replies.NEIGHBOURS)
        # What the kernel learns by itself comes and goes; only permanent entries are somebody's will.
        state.neighbours.update(
            ((name, address), Neighbour(name, address, mac))
            for _family, ifindex, nud, _flags, address, mac, _odd in rows
            if ifindex == index and nud & codec.NUD_PERMANENT and address[:1] != b"\xff"
        )
    rows = netlink.rows(codec.neighbour_dump(index, codec.AF_BRIDGE), replies.NEIGHBOURS)
    for _family, ifindex, nud, flags, address, mac, _odd in rows:
        if ifindex != index or not flags & codec.NTF_SELF or not address:
            continue
        known = state.fdb.get((name, mac))
        if known is None:
            entry = FdbEntry(name, mac, address, (), nud & codec.NUD_PERMANENT != 0)
        else:
            entry = known._replace(others=(*known.others, address))
        state.fdb[name, mac] = entry
