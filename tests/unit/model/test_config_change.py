"""Which changes of the network config wait for a restart."""

import pytest

from flannelpy.model.config import parse_config
from flannelpy.model.config_change import compare, with_live_part

BASE = '"Network":"10.5.0.0/16"'


@pytest.mark.parametrize(
    ("text", "live", "pending"),
    [
        (BASE, (), ()),
        (BASE + ',"SubnetMin":"10.5.8.0"', ("SubnetMin from 10.5.1.0 to 10.5.8.0",), ()),
        (BASE + ',"EnableNFTables":true', ("EnableNFTables from false to true",), ()),
        (BASE + ',"Backend":{"Type":"vxlan"}', (), ("Backend.Type from udp to vxlan",)),
        (BASE + ',"Backend":{"Type":"udp"}', (), ('Backend from {} to {"Type":"udp"}',)),
        (
            '"Network":"10.5.0.0/15"',
            ("SubnetMin from 10.5.1.0 to 10.4.1.0",),
            ("Network from 10.5.0.0/16 to 10.4.0.0/15",),
        ),
    ],
)
def test_differences_in_words(text: str, live: tuple[str, ...], pending: tuple[str, ...]) -> None:
    before, after = parse_config(f"{{{BASE}}}"), parse_config(f"{{{text}}}")
    change = compare(before, after)
    assert change == (live, pending)
    if not pending:
        assert with_live_part(before, after) == after
