"""Which records of a simulated store are in each other's way."""

from collections.abc import Iterable
from functools import lru_cache

from flannelpy.model.subnet import parse_key

subnets_of = lru_cache(parse_key)


def overlap(key: str, others: Iterable[str]) -> str | None:
    """The other record that has an address in common with this one."""
    mine = subnets_of(key)
    for other in others:
        if other == key:
            continue
        for a, b in zip(mine, subnets_of(other), strict=True):
            if a is not None and b is not None and a.overlaps(b):
                return other
    return None
