"""Beside a real flannel, if FLANNELD names one."""

import os

import pytest

from flannelpy import control
from flannelpy.cli.lab import Lab
from flannelpy.cli.processes import LabError, stop, wait_ready, wait_until
from tests.netns.nodes import (
    V4,
    leases,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]


FLANNELD = os.environ.get("FLANNELD", "")
needs_flannel = pytest.mark.skipif(not FLANNELD, reason="FLANNELD does not name a flannel to compare with")


@needs_flannel
def test_a_mixed_cluster_exchanges_packets(lab: Lab) -> None:
    lab.put_config(V4)
    ours, theirs, third = lab.add_node(), lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(ours)])
    wait_ready([lab.start_daemon(theirs, [FLANNELD])])
    wait_ready([lab.start_daemon(third)])
    for node in lab.nodes:
        lab.add_pod(node)
    for source in lab.nodes:
        for target in lab.nodes:
            if source is not target:
                address = str(target.pods[0].address).partition("/")[0]
                wait_until(
                    lambda s=source, a=address: lab.ping(s.pods[0].netns, a, size=1450, count=1).received,  # type: ignore[misc]
                    f"{source.name} to {target.name}",
                )


@needs_flannel
@pytest.mark.parametrize("first", ["flannel", "flannelpy"])
def test_one_daemon_takes_over_from_the_other(lab: Lab, first: str) -> None:
    """Lease, device, MAC and forwarding stay, in both directions."""
    lab.put_config(V4)
    one, two = lab.add_node(), lab.add_node()
    commands = {"flannel": [FLANNELD], "flannelpy": []}
    second = "flannelpy" if first == "flannel" else "flannel"
    wait_ready([lab.start_daemon(two)])
    wait_ready([lab.start_daemon(one, commands[first])])
    lab.add_pod(one)
    lab.add_pod(two)
    target = str(two.pods[0].address).partition("/")[0]
    wait_until(lambda: lab.ping(one.pods[0].netns, target, count=1).received, "the first daemon's overlay")
    before = lab.ip_json(one.netns, "link show flannel.1")[0]
    lease = leases(lab)
    assert one.daemon is not None
    stop([one.daemon])
    wait_ready([lab.start_daemon(one, commands[second])])
    after = lab.ip_json(one.netns, "link show flannel.1")[0]
    assert (after["ifindex"], after["address"]) == (before["ifindex"], before["address"])
    assert leases(lab) == lease
    assert lab.ping(one.pods[0].netns, target, count=5).received == 5


def test_the_lab_itself_is_sound(lab: Lab) -> None:
    """Nothing is reached before a daemon runs: the pings above prove something."""
    one, two = lab.add_node(), lab.add_node()
    with pytest.raises(LabError):
        lab.add_pod(one)
    assert lab.ping(one.netns, "10.5.1.1", count=1).received == 0
    assert lab.ping(one.netns, str(two.address), count=1).received == 1


@needs_flannel
def test_probes_reach_a_flannel_whose_kernel_answers(lab: Lab) -> None:
    lab.put_config(V4)
    ours, theirs = lab.add_node(), lab.add_node()
    wait_ready([lab.start_daemon(theirs, [FLANNELD])])
    wait_ready([lab.start_daemon(ours)])
    path = control.path_for(str(ours.subnet_file))
    wait_until(lambda: control.ask(path, "probes").get("reached", 0) >= 2, "answers of a flannel", 40)
    assert set(control.ask(path, "probes")) == {"reached"}
