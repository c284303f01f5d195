"""What docs/systemd.md promises, on two hosts: containers booted by systemd-nspawn, or virtual machines.

The tests share the hosts, and each leaves them as it found them.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.system.conftest import HOME, Hosts, address, state, status
from tests.system.machine import Machine, reboot, say
from tests.system.page import commands, fenced
from tests.system.wire import GATEWAY

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]

NET_ADMIN, NET_RAW = 1 << 12, 1 << 13


def visit(source: Machine, place: str) -> str:
    """The address under which a container is seen at a web server."""
    return source.run(f"docker exec web wget -q -O - http://{place}", 10)


def ping(source: Machine, target: Machine) -> str:
    """From the container of one host to that of another; the round trips."""
    said = source.run(f"docker exec web ping -c 3 -i 0.2 -W 2 {address(target)}")
    assert "3 packets received" in said
    return said.rpartition("\n")[2]


def check_overlay(hosts: Hosts) -> None:
    """Containers reach each other under their own addresses, and Docker uses the subnet of the lease."""
    for source, target in ((hosts.first, hosts.second), (hosts.second, hosts.first)):
        say(f"{source.name} to {target.name}, container to container: {ping(source, target)}")
        assert visit(source, f"{address(target)}/cgi-bin/who") == f"[::ffff:{address(source)}]"
        links = json.loads(source.run("ip -json -4 address show docker0"))
        bridge = [f"{info['local']}/{info['prefixlen']}" for info in links[0]["addr_info"]]
        assert bridge == [source.run(". /run/flannel/subnet.env; echo $FLANNEL_SUBNET")]
        mtu = source.run("docker exec web cat /sys/class/net/eth0/mtu")
        assert mtu == source.run(". /run/flannel/subnet.env; echo $FLANNEL_MTU")


@contextmanager
def traffic(hosts: Hosts) -> Iterator[None]:
    """Packets between the containers all the time, of which none may be lost; the containers run on."""
    host, target = hosts.first, address(hosts.second)
    before = [identity(machine) for machine in (host, hosts.second)]
    ping = f"docker exec web ping -i 0.2 {target}"
    host.run(
        f"systemd-run --quiet --collect --unit pings --property StandardOutput=truncate:/run/pings {ping}"
    )
    last = "grep -o 'seq=[0-9]*' /run/pings | tail -n 1"
    try:
        host.wait("grep -q seq=4 /run/pings")
        yield
        # The last one that was sent before the end has been answered by then, or is lost.
        seen = host.run(last)
        host.wait(f'[ "$({last})" != {seen} ]')
    finally:
        host.execute("docker exec web sh -c 'kill $(pidof ping)'; systemctl stop pings", 300)
    replies = host.run("grep -o 'seq=[0-9]*' /run/pings").split()
    assert replies == [f"seq={number}" for number in range(len(replies))]
    say(f"{host.name}: {len(replies)} pings between containers meanwhile, none lost")
    assert [identity(machine) for machine in (host, hosts.second)] == before


def identity(host: Machine) -> list[str]:
    """It changes when the container or Docker was restarted."""
    return [
        host.run("docker inspect --format '{{.State.StartedAt}}' web"),
        host.run("systemctl show docker --property MainPID"),
    ]


def main_pid(host: Machine) -> int:
    return int(host.run("systemctl show flannelpy --property MainPID --value"))


def seconds_to_another(host: Machine, before: int) -> float:
    """Until a daemon with another process id is ready."""
    begun = time.monotonic()
    host.wait(f"systemctl is-active flannelpy && ! systemctl show flannelpy | grep -qx MainPID={before}")
    return time.monotonic() - begun


def wait_ready(*hosts: Machine, timeout: float = 60) -> None:
    """Wait until daemon, Docker and container are up again; say how long after the boot they were."""
    for host in hosts:
        host.wait("systemctl is-active flannelpy", timeout)
        host.wait("systemctl is-active docker", timeout)
        host.wait("docker exec web true", timeout)
        moments = [
            int(host.run(f"systemctl show {unit} --property {name}Monotonic --value"))
            for unit, name in (
                ("", "UserspaceTimestamp"),
                ("flannelpy", "ActiveEnterTimestamp"),
                ("docker", "ActiveEnterTimestamp"),
            )
        ]
        daemon, docker = ((moment - moments[0]) / 1e6 for moment in moments[1:])
        say(f"{host.name}: flannelpy ready {daemon:.1f} s, Docker {docker:.1f} s after systemd began to boot")


def test_containers_reach_each_other(hosts: Hosts) -> None:
    check_overlay(hosts)


def test_the_outside_world_is_reached_and_reaches(hosts: Hosts) -> None:
    check_outside(hosts)


def check_outside(hosts: Hosts) -> None:
    """A container goes out under its host's address; a published port is reached from elsewhere."""
    for source, target in ((hosts.first, hosts.second), (hosts.second, hosts.first)):
        source.run(f"busybox wget -q -O - http://{target.address}:8080/cgi-bin/who", 10)
        visit(source, f"{target.address}:8080/cgi-bin/who")
        assert visit(source, GATEWAY) == source.address


def test_the_daemon_has_a_user_and_two_capabilities_and_no_more(hosts: Hosts) -> None:
    host = hosts.second
    lines = host.run(f"cat /proc/{main_pid(host)}/status").splitlines()
    process = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    assert set(process["Uid"]) == {host.run("id -u flannelpy")}
    assert set(process["Gid"]) == {host.run("id -g flannelpy")}
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(process[kind][0], 16) == NET_ADMIN | NET_RAW
    assert process["NoNewPrivs"] == ["1"]
    assert process["Seccomp"] == ["2"]
    score = host.run("systemd-analyze security --no-pager flannelpy").rpartition("\n")[2]
    say(f"{host.name}: {score}")
    # All else of /proc/sys is read-only for it.
    assert host.run("cat /proc/sys/net/ipv6/conf/flannel.1/accept_ra") == "0"


@pytest.mark.parametrize("mode", ["nftables", "iptables-legacy"])
def test_docker_and_our_rules_live_together(hosts: Hosts, mode: str) -> None:
    """All other tests are about the default: iptables, which Debian translates to nf_tables."""
    not_emulated(hosts)
    machines = (hosts.first, hosts.second)
    try:
        use(hosts, mode)
        saved = hosts.first.run("iptables-save")
        assert ("FLANNEL-FWD" in saved) == (mode != "nftables")
        for _ in range(2):
            check_overlay(hosts)
            check_outside(hosts)
            for machine in machines:  # which writes all its own rules anew
                machine.run("systemctl restart docker")
                machine.wait("docker exec web true")
    finally:
        use(hosts, "iptables-nft")
    check_overlay(hosts)


def test_a_network_with_the_udp_backend(hosts: Hosts) -> None:
    """The daemon and the forwarder are two units of one user; packets flow on while the daemon restarts."""
    not_emulated(hosts)
    machines = (hosts.first, hosts.second)
    put_config(hosts, {"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}})
    try:
        for machine in machines:
            machine.run(f"cd {HOME}\n{commands('7.')}")
            machine.run("systemctl restart flannelpy; systemctl restart docker")
            machine.wait("docker exec web true")
            machine.wait("systemctl is-active flannelpy-udp")
        check_overlay(hosts)
        with traffic(hosts):
            for machine in machines:
                machine.run("systemctl restart flannelpy")
            for machine in machines:
                machine.run(f"cd {HOME}\n{fenced('7.')}")
                for device, hook in (("flannel0", "egress"), ("host0", "ingress")):
                    machine.wait(f"tc filter show dev {device} {hook} | grep -q flannelpy-udp")
        leases = hosts.first.run("ETCDCTL_API=3 etcdctl get --prefix /coreos.com/network/subnets")
        assert leases.count('"FastPath":true') == 2
        check_overlay(hosts)
        score = hosts.first.run("systemd-analyze security --no-pager flannelpy").rpartition("\n")[2]
        say(f"with the drop-in for the fast path: {score}")
    finally:
        put_config(hosts, {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
        for machine in machines:
            machine.run("rm -f /etc/systemd/system/flannelpy.service.d/udp-fast-path.conf")
            machine.run("systemctl disable --now flannelpy-udp.socket flannelpy-udp.service")
            machine.run("rm /etc/systemd/system/flannelpy-udp.*; systemctl daemon-reload")
            machine.run("systemctl restart flannelpy; systemctl restart docker")
            machine.wait("docker exec web true")
    check_overlay(hosts)


def not_emulated(hosts: Hosts) -> None:
    if hosts.kind == "virtual machine":
        pytest.skip("restarts Docker many times, which takes ten minutes in an emulator: see the containers")


def put_config(hosts: Hosts, config: dict[str, object]) -> None:
    hosts.first.run(f"ETCDCTL_API=3 etcdctl put /coreos.com/network/config '{json.dumps(config)}'")


def use(hosts: Hosts, mode: str) -> None:
    """Switch both hosts to another kind of rules."""
    nftables = mode == "nftables"
    put_config(hosts, {"Network": "10.5.0.0/16", "EnableNFTables": nftables, "Backend": {"Type": "vxlan"}})
    kind = "legacy" if mode == "iptables-legacy" else "nft"
    for machine in (hosts.first, hosts.second):
        machine.run("systemctl stop docker.socket docker flannelpy")
        for family in ("iptables", "ip6tables"):
            # Docker leaves its rules behind, and those of both kinds would count.
            machine.run(
                f"for table in nat filter; do {family} -t $table -F; {family} -t $table -X; done\n"
                f"{family} -P FORWARD ACCEPT"
            )
            machine.run(f"update-alternatives --quiet --set {family} /usr/sbin/{family}-{kind}")
        if kind == "legacy":
            machine.run(f"cd {HOME}\n{commands('6.')}")
        else:
            machine.run(
                "rm -f /etc/systemd/system/flannelpy.service.d/iptables-legacy.conf; systemctl daemon-reload"
            )
        machine.run("systemctl start flannelpy docker")
        machine.wait("docker exec web true")


def test_a_stop_keeps_subnet_env_and_the_traffic(hosts: Hosts) -> None:
    host = hosts.second
    text = host.run("cat /run/flannel/subnet.env")
    with traffic(hosts):
        host.run("systemctl stop flannelpy")
        assert host.run("cat /run/flannel/subnet.env") == text
        host.run("systemctl start flannelpy")
    assert host.run("cat /run/flannel/subnet.env") == text


def test_a_restart_keeps_containers_and_traffic(hosts: Hosts) -> None:
    with traffic(hosts):
        for host in (hosts.first, hosts.second):
            host.run("systemctl restart flannelpy")


def test_a_killed_daemon_is_back_in_seconds_and_nobody_notices(hosts: Hosts) -> None:
    host = hosts.second
    before = main_pid(host)
    with traffic(hosts):
        host.run(f"kill -KILL {before}")
        say(f"{host.name}: ready again {seconds_to_another(host, before):.1f} s after SIGKILL")


def test_a_daemon_that_hangs_is_started_anew_by_the_watchdog(hosts: Hosts) -> None:
    if hosts.kind == "virtual machine":
        pytest.skip("in an emulator seconds are too short for a watchdog: see the containers")
    host = hosts.second
    folder = "/run/systemd/system/flannelpy.service.d"
    lines = "[Service]\\nWatchdogSec=4\\nTimeoutAbortSec=2\\n"
    host.run(f"mkdir -p {folder}; printf '{lines}' > {folder}/watchdog.conf; systemctl daemon-reload")
    host.run("systemctl restart flannelpy")
    before = main_pid(host)
    with traffic(hosts):
        host.run(f"kill -STOP {before}")
        say(f"{host.name}: ready again {seconds_to_another(host, before):.1f} s after SIGSTOP, WatchdogSec=4")
    assert "Watchdog timeout" in host.run("journalctl -u flannelpy")
    host.run(f"rm -r {folder}; systemctl daemon-reload; systemctl restart flannelpy")


def test_a_runtime_folder_of_root_is_taken_over(hosts: Hosts) -> None:
    host = hosts.second
    text = host.run("cat /run/flannel/subnet.env")
    host.run("systemctl stop flannelpy; chown -R root:root /run/flannel; chmod 0700 /run/flannel")
    host.run("systemctl start flannelpy")
    assert host.run("cat /run/flannel/subnet.env") == text
    assert host.run("stat -c '%U %G %a' /run/flannel") == "flannelpy flannelpy 755"
    assert host.run("stat -c '%U %G %a' /run/flannel/subnet.env") == "flannelpy flannelpy 644"


def test_root_does_not_clean_up_below_a_running_daemon(hosts: Hosts) -> None:
    code, said = hosts.second.execute("flannelpy cleanup --yes", 300)
    assert (code, "another flannelpy" in said) == (5, True), said
    assert state(hosts.second, "flannelpy") == "active"


def test_a_wrong_option_is_said_once_and_docker_goes_on(hosts: Hosts) -> None:
    host = hosts.second
    host.run(
        "cp -a /etc/flannelpy/flannelpy.env /srv/; echo FLANNELD_PUBLIC_IP=x >>/etc/flannelpy/flannelpy.env"
    )
    with traffic(hosts):
        assert host.execute("systemctl restart flannelpy", 300)[0] != 0
        assert state(host, "flannelpy") == "failed"
        assert host.run("systemctl show flannelpy --property ExecMainStatus --value") == "2"
        assert "FLANNELD_PUBLIC_IP" in host.run("systemctl status --no-pager flannelpy || true")
        host.run("cp -a /srv/flannelpy.env /etc/flannelpy/; systemctl restart flannelpy")


def test_one_host_boots_again(hosts: Hosts) -> None:
    subnet = hosts.second.run("cat /run/flannel/subnet.env")
    reboot(hosts.second)
    wait_ready(hosts.second)
    assert hosts.second.run("cat /run/flannel/subnet.env") == subnet
    check_overlay(hosts)


def test_both_hosts_boot_again_at_once(hosts: Hosts) -> None:
    reboot(hosts.first, hosts.second)
    wait_ready(hosts.first, hosts.second)
    check_overlay(hosts)


def test_a_host_that_knows_its_peers_boots_without_etcd(hosts: Hosts) -> None:
    hosts.second.wait("grep -q 192.168.78.1 /var/lib/flannelpy/*.json")
    hosts.first.run("systemctl stop etcd")
    try:
        reboot(hosts.second)
        wait_ready(hosts.second)
        check_overlay(hosts)
    finally:
        hosts.first.run("systemctl start etcd")


def test_etcd_comes_late_at_boot_and_docker_waits(hosts: Hosts) -> None:
    """Three minutes, on a host that remembers nothing; in containers only ten seconds."""
    outage = 180 if hosts.kind == "virtual machine" else 10
    host = hosts.second
    hosts.first.run("systemctl stop etcd")
    host.run("systemctl stop flannelpy; rm -r /var/lib/flannelpy")
    reboot(host)
    host.wait("systemctl show flannelpy --property StatusText | grep -q waiting")
    say(f"{host.name}: booted without etcd: {status(host)}")
    until = time.monotonic() + outage
    while time.monotonic() < until:
        assert (state(host, "flannelpy"), state(host, "docker")) == ("activating", "inactive")
        assert "192.168.78.1:2379" in status(host)
        time.sleep(outage / 20)
    assert host.run("systemctl show flannelpy --property NRestarts --value") == "0"
    hosts.first.run("systemctl start etcd")
    begun = time.monotonic()
    wait_ready(host)
    say(f"{host.name}: ready {time.monotonic() - begun:.1f} s after etcd, which was {outage} s late")
    check_overlay(hosts)


def test_it_is_removed_as_the_page_says(hosts: Hosts) -> None:
    host = hosts.second
    host.run(f"set -ex; cd {HOME}\n{commands('8.')}")
    assert "flannel.1" not in host.run("ip link")
    assert host.execute("ls /run/flannel/subnet.env /etc/flannelpy /opt/flannelpy", 5)[0] != 0
    host.wait("docker exec web true")
    assert "--bip" not in host.run("cat /proc/$(pidof dockerd)/cmdline | tr '\\0' ' '")
    assert visit(host, GATEWAY) == host.address
