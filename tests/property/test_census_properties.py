"""Whatever lies in etcd is read, judged and printed; overlaps are those of comparing all with all."""

from hypothesis import given
from hypothesis import strategies as st

from flannelpy.cli import lease_text
from flannelpy.cli.admin import dump, shown
from flannelpy.model.census import Census, Entry, findings, pool_use
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd_admin import _entry
from tests.builders import DUAL, config, entry, value

KEYS = st.one_of(
    st.binary(max_size=90),
    st.sampled_from(
        [b"10.5.1.0-24", b"10.5.1.0-024", b"10.5.0.0-16", b"0.0.0.0-0&fd00:5::-64", b"\x1b[31m", b""]
    ),
    st.builds(lambda a, n: b"10.5.%d.0-%d" % (a, n), st.integers(0, 255), st.integers(0, 40)),
)
VALUES = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda text: value(BackendType=text, BackendData=[text, 1e300]).encode(), st.text(max_size=20)),
    st.sampled_from([b'{"BackendData":1e999}', b"[" * 4000, b'{"PublicIP":"\\u001b[31m"}', b"null", b"{}"]),
)
KVS = st.builds(
    lambda key, value, lease: pb.KeyValue(
        key=key, value=value, create_revision=3, mod_revision=4, lease=lease
    ),
    KEYS,
    VALUES,
    st.integers(0, 2),
)


@given(st.lists(KVS, max_size=8))
def test_foreign_records_end_as_printable_lines(kvs: list[pb.KeyValue]) -> None:
    network = config(DUAL)
    entries = tuple(_entry(kv, 0, 7 if kv.lease else None) for kv in kvs)
    census = Census(None, 0, entries, (), 9)
    found = findings(network, census)
    about = lease_text.by_key(found)
    lines = [
        *lease_text.listing(entries, about, 80),
        *lease_text.summary(census, pool_use(network, entries), found),
        *lease_text.finding_lines(found),
        *(line for each in entries for line in lease_text.details(each, about.get(each.key, ()), "/n/")),
        *(line for each in entries for line in lease_text.after_release(each)),
        *(dump(lease_text.as_json(each, about.get(each.key, ()))) for each in entries),
        dump([finding._asdict() for finding in found]),
    ]
    assert [line for line in lines if not line.isprintable()] == []


@given(st.text(), st.integers(4, 50))
def test_shown_text_is_printable_and_bounded(text: str, limit: int) -> None:
    assert shown(text).isprintable()
    assert len(shown(text, limit)) <= limit


BLOCKS = st.builds(
    lambda a, b, n: f"10.{a}.{b}.0-{n}", st.integers(4, 6), st.integers(0, 9), st.integers(14, 25)
)


@given(st.lists(BLOCKS, unique=True, max_size=12))
def test_overlaps_are_those_of_comparing_all_with_all(keys: list[str]) -> None:
    entries = [entry(key, value(f"192.0.2.{number}")) for number, key in enumerate(keys, 1)]
    found = findings(None, Census(None, 0, tuple(entries), (), 9))
    groups = [set(finding.keys) for finding in found if finding.kind == "overlap"]
    named = set().union(*groups)

    def overlap(one: Entry, other: Entry) -> bool:
        a, b = one.subnets[0], other.subnets[0]
        return a is not None and b is not None and a.overlaps(b)

    alone = {e.key for e in entries if not any(overlap(e, other) for other in entries if other is not e)}
    assert named == {e.key for e in entries} - alone
    for one in entries:
        for other in entries:
            if one is not other and overlap(one, other):
                assert any({one.key, other.key} <= group for group in groups)
