"""What is found wrong with the records of a network: one row a rule."""

import pytest

from flannelpy.model.address import parse_address, parse_prefix
from flannelpy.model.census import Census, Entry, Finding, findings, matching, pool_use, worst
from flannelpy.model.config import NetworkConfig
from tests.builders import DUAL, config, entry, value


def found(
    *entries: Entry, network: NetworkConfig | None = None, beside: tuple[str, ...] = ()
) -> list[Finding]:
    return list(findings(network or config(), Census("", 1, entries, beside, 9)))


def kinds(*entries: Entry, **options: NetworkConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    return [finding[:3] for finding in found(*entries, **options)]  # type: ignore[arg-type]


def test_a_good_network_has_no_findings() -> None:
    assert found(entry("10.5.1.0-24"), entry("10.5.2.0-24")) == []
    assert worst([]) is None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (entry("nonsense"), ("error", "unreadable-key")),
        (entry("10.5.1.0-32"), ("error", "unreadable-key")),
        (entry("10.5.1.0-24", "{"), ("error", "unreadable-value")),
        (entry("10.5.1.0-24", '{"PublicIP":7}'), ("error", "unreadable-value")),
        (entry("10.6.1.0-24"), ("error", "outside")),
        (entry("10.5.0.0-24"), ("warning", "misfit")),
        (entry("10.5.1.0-25"), ("warning", "misfit")),
        (entry("10.5.1.0-24&fd00:5:0:1::-64"), ("warning", "misfit")),
        (entry("10.5.1.0-24", value("10.5.3.3")), ("error", "unreachable")),
        (entry("10.5.1.0-24", value("224.0.0.1")), ("error", "unreachable")),
        (entry("10.5.1.0-24", value("0.0.0.0")), ("error", "unreachable")),
        (entry("10.5.1.0-24", value(BackendType="host-gw")), ("warning", "backend")),
        (entry("10.5.1.0-24", '{"PublicIP":"192.0.2.1"}'), ("warning", "backend")),
        (entry("10.5.1.0-24", lease_id=0), ("note", "reservation")),
        (entry("10.5.1.0-24", '{"PublicIP":"192.0.2.1"}', lease_id=0), ("note", "reservation")),
        (entry("10.5.1.0-24", '{"PublicIP":"0.0.0.0"}', lease_id=0), ("note", "reservation")),
        (entry("10.5.1.0-24", left=60), ("note", "overdue")),
    ],
    ids=lambda value: f"{value.key} {value.value.decode()}" if isinstance(value, Entry) else "-".join(value),
)
def test_what_one_record_says(record: Entry, expected: tuple[str, str]) -> None:
    assert kinds(record) == [(*expected, (record.key,))]


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("10.5.1.0-24", "10.5.2.0-24", False),
        ("10.5.1.0-24", "10.5.1.0-024", True),
        ("10.5.1.0-24", "10.5.1.128-25", True),
        ("10.5.1.0-24", "10.5.1.9-24", True),
        ("10.4.0.0-14", "10.5.1.0-24", True),
        ("10.5.1.0-24&fd00:5:0:1::-64", "10.5.2.0-24&fd00:5:0:1::-64", True),
        ("10.5.1.0-24&fd00:5:0:1::-64", "0.0.0.0-0&fd00:5:0:2::-64", False),
    ],
)
def test_overlaps_name_the_oldest_first(one: str, other: str, overlap: bool) -> None:
    records = (entry(one, value("192.0.2.1"), created=9), entry(other, value("192.0.2.2"), created=4))
    wrong = [finding for finding in kinds(*records, network=config(DUAL)) if finding[1] == "overlap"]
    assert wrong == ([("error", "overlap", (other, one))] if overlap else [])


def test_many_overlaps_are_one_finding_and_unreadable_values_count() -> None:
    records = [entry("10.5.0.0-16", "{", created=3), *(entry(f"10.5.{i}.0-24") for i in range(1, 200))]
    wrong = [finding for finding in found(*records) if finding.kind == "overlap"]
    assert [len(finding.keys) for finding in wrong] == [200]
    assert len(wrong[0].text) < 400
    assert wrong[0].keys[0] == "10.5.0.0-16"


def test_a_public_ip_belongs_to_one_record() -> None:
    dual = config(DUAL)
    first = entry("10.5.1.0-24&fd00:5:0:1::-64", value("192.0.2.1", PublicIPv6="2001:db8::1"))
    same4 = entry("10.5.2.0-24&fd00:5:0:2::-64", value("192.0.2.1", PublicIPv6="2001:db8::2"))
    same6 = entry("10.5.3.0-24&fd00:5:0:3::-64", value("192.0.2.3", PublicIPv6="2001:db8::1"))
    nobody = [entry(f"10.5.{i}.0-24", value("0.0.0.0", BackendType=""), lease_id=0) for i in (8, 9)]
    for other in (same4, same6):
        wrong = [finding[:3] for finding in found(first, other, network=dual) if finding.kind == "public-ip"]
        assert wrong == [("error", "public-ip", (first.key, other.key))]
    assert not [finding for finding in found(*nobody) if finding.kind == "public-ip"]


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ({"VtepMAC": "02:00:00:00:00:aa"}, {"vtepmac": "02:00:00:00:00:AA"}, "VTEP MAC 02:00:00:00:00:aa"),
        ({"PublicKey": "abc="}, {"PublicKey": "abc="}, "public key abc="),
        ({"PublicKey": "abc="}, {"PublicKey": "ABC="}, ""),
        ({"VtepMAC": 7}, {"VtepMAC": 7}, ""),
        ("text", "text", ""),
    ],
)
def test_clones_are_found_by_what_should_be_their_own(one: object, other: object, what: str) -> None:
    records = [
        entry("10.5.1.0-24", value("192.0.2.1", BackendData=one)),
        entry("10.5.2.0-24", value("192.0.2.2", BackendData=other)),
    ]
    texts = [finding.text for finding in found(*records)]
    assert len(texts) == bool(what)
    assert not what or texts[0].startswith(f"the {what} is in 10.5.1.0-24 and 10.5.2.0-24")


def test_keys_beside_ours_are_told() -> None:
    (finding,) = found(beside=("/net/subnets-old/x",))
    assert finding[:3] == ("warning", "beside", ("/net/subnets-old/x",))


@pytest.mark.parametrize(
    ("taken", "expected"), [(11, None), (12, ("warning", "pool")), (15, ("error", "pool-full"))]
)
def test_how_full_the_pool_is(taken: int, expected: tuple[str, str] | None) -> None:
    network = config('{"Network":"10.5.0.0/20","Backend":{"Type":"vxlan"}}')
    records = [entry(f"10.5.{i}.0-24", "{" if i == 1 else "") for i in range(1, taken + 1)]
    records.append(entry("10.9.0.0-24", value("192.0.2.200")))
    (use,) = pool_use(network, records)
    assert (use.pool.size, use.taken, use.free) == (15, taken, 15 - taken)
    pool = [finding[:2] for finding in found(*records, network=network) if finding.kind.startswith("pool")]
    assert pool == ([expected] if expected else [])


def test_without_a_config_there_is_still_something_to_say() -> None:
    records = (entry("10.5.1.0-24"), entry("10.5.1.0-25", value("192.0.2.7")), entry("x"))
    census = Census(None, 0, records, (), 9)
    assert {finding.kind for finding in findings(None, census)} == {"overlap", "unreadable-key"}


def test_the_worst_comes_first() -> None:
    severities = [
        f.severity for f in found(entry("10.5.1.0-24", lease_id=0), entry("10.5.0.0-24"), entry("x"))
    ]
    assert severities == ["error", "warning", "note"]


def test_records_are_found_by_key_subnet_and_address() -> None:
    records = [
        entry("10.5.1.0-24"),
        entry("10.5.1.0-25", value("192.0.2.7")),
        entry("10.5.2.0-24"),
        entry("x"),
    ]
    keys = [record.key for record in records]

    def asked(wanted: object) -> list[int]:
        return [keys.index(record.key) for record in matching(records, wanted)]  # type: ignore[arg-type]

    assert asked("x") == [3]
    assert asked("10.5.1.0") == []
    assert asked(parse_prefix("10.5.1.0/25")) == [1], "the same subnet goes before what overlaps"
    assert asked(parse_prefix("10.5.1.0/26")) == [0, 1]
    assert asked(parse_prefix("10.5.0.0/16")) == [0, 1, 2]
    assert asked(parse_address("192.0.2.7")) == [1]
    assert asked(parse_address("10.5.2.44")) == [2]
    assert asked(parse_address("fd00::1")) == []
