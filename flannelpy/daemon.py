"""The composition root: builds everything, runs it as one task group, maps errors to exit codes.

Start, step by step: settings -> network config (waited for) -> backend -> uplink -> own lease (waited for)
-> own device -> subnet.env -> peers -> READY=1. Whatever is waited for is said in the log and in STATUS=.
"""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from flannelpy import __version__, control, start, subnet_env
from flannelpy.backend import load
from flannelpy.errors import FlannelpyError, KernelError
from flannelpy.health import Health
from flannelpy.kernel import instance
from flannelpy.kernel.firewall import Firewall, firewall, remove_all
from flannelpy.kernel.linux import LinuxKernel, require_privileges
from flannelpy.kernel.peer_filter import PeerFilterTable
from flannelpy.log import setup as setup_log
from flannelpy.model.config import NetworkConfig
from flannelpy.model.config_change import compare
from flannelpy.model.kernel import Scope, State
from flannelpy.model.leftover import leftover_devices
from flannelpy.model.peer_filter import ENFORCE, OFF, port_of
from flannelpy.model.plan import plan
from flannelpy.model.subnet import Previous
from flannelpy.model.traffic import Wishes
from flannelpy.model.uplink import Wish
from flannelpy.node import Node, Parts
from flannelpy.notify import Notify
from flannelpy.settings import DEFAULT, Settings, describe
from flannelpy.store import Store
from flannelpy.voice import Voice

if TYPE_CHECKING:
    from flannelpy.kernel.echo import Echo
    from flannelpy.store.etcd_admin import EtcdAdmin
    from flannelpy.store.etcd_client import EtcdClient
    from flannelpy.store.kube import KubeStore

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 0.5
"""How long the store may take to say goodbye: a stop is done within a second."""


def run(settings: Settings) -> int:
    """The daemon, until a signal stops it; the exit code (see `flannelpy.errors`)."""
    setup_log(settings)
    notify = Notify(os.environ)
    # Everything imported so far stays for ever, and a start makes many objects that stay: do not look at
    # them again and again.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        asyncio.run(_run_until_signal(settings, notify))
    except (FlannelpyError, BaseExceptionGroup) as failure:
        error = _first(failure)
        if not isinstance(error, FlannelpyError):
            raise
        log.error("%s", error)  # noqa: TRY400  # the user's error is one line, without a traceback
        notify.status(f"failed: {error}")
        return error.exit_code
    return 0


def _first(error: BaseException) -> BaseException:
    """The error itself, out of the groups that task groups wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _run_until_signal(settings: Settings, notify: Notify) -> None:
    loop = asyncio.get_running_loop()
    stopped_by: list[signal.Signals] = []
    task = asyncio.ensure_future(_serve(settings, notify))

    def stop(number: signal.Signals) -> None:
        log.info("%s: stopping; devices, routes and subnet.env stay, packets flow on", number.name)
        notify.stopping()
        stopped_by.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped_by:
            raise


async def _serve(settings: Settings, notify: Notify) -> None:
    """One node's life."""
    log.info("flannelpy %s: %s", __version__, describe(settings))
    if settings.ignored_words:
        # Not the words themselves: after `--etcd-password= secret` one of them is the secret.
        log.warning("ignored after the flags: %d word(s)", len(settings.ignored_words))
    require_privileges()
    health = Health()
    voice = Voice(health, notify, settings.readyz_missing_peers)
    async with AsyncExitStack() as stack:
        origin = start.origin(settings)
        stack.enter_context(instance.lock(f"network {origin.prefix}"))
        if settings.healthz_port > 0:
            from flannelpy import endpoints

            pages = endpoints.listen(settings.healthz_ip, settings.healthz_port, voice.pages())
            await stack.enter_async_context(pages)
        socket_path = control.path_for(settings.subnet_file)
        await stack.enter_async_context(control.serve(socket_path, voice.commands))
        kube: KubeStore | None = None
        if settings.kube_subnet_mgr:
            store: Store = (kube := await stack.enter_async_context(_kube_store(settings, voice)))
        else:
            store = await stack.enter_async_context(_etcd_store(settings, voice))
        memory = start.remembered(settings, origin)
        learned = await start.learn_network(store, voice.tell, memory, time.time())
        silent = learned is None
        if learned is None:
            assert memory is not None  # noqa: S101  # else it waits for ever
            learned = memory.config_text, memory.config, load(memory.config)
        config_text, config, backend = learned
        if memory is not None and compare(memory.config, config).pending:
            memory = None  # the network is another one
        public_ips = settings.public_ip, settings.public_ipv6
        if kube is not None:
            public_ips, answers = await start.public_ips(kube.operator_addresses(), public_ips, memory)
            silent = silent or not answers
        host = LinuxKernel()
        stack.callback(host.close)
        # Another network of this host may share neither a device nor addresses with ours.
        networks = [f"overlay {network}" for network in (config.network, config.network6) if network]
        for what in [*networks, *(f"device {device}" for device in backend.devices)]:
            stack.enter_context(instance.lock(what))
        ours = [link for link in host.interfaces() if link.name in backend.devices]
        addresses = [address.prefix for link in ours for address in link.addresses]
        instance.refuse_flannel(None if kube else settings.etcd_prefix, addresses)
        previous, warning = subnet_env.read(settings.subnet_file)
        if warning:
            log.warning("%s", warning)
        voice.tell("claiming a subnet")

        def ready(text: str) -> None:
            notify.ready()
            voice.tell(text)
            log.info("ready: %s", text)
            if kube is not None:
                tasks.create_task(kube.tell_up())

        traffic, rules = await _firewall(settings, config, previous, health)
        stack.callback(rules.close)
        parts = Parts(
            store=store,
            host=host,
            config=config,
            config_text=config_text,
            backend=backend,
            wish=Wish(
                settings.iface,
                settings.iface_regex,
                settings.iface_can_reach,
                *public_ips,
            ),
            host_id=f"{origin.prefix}|{start.machine_id()}",
            store_hosts=start.literal_hosts([kube.server] if kube else settings.etcd_endpoints),
            previous=previous,
            margin_minutes=settings.subnet_lease_renew_margin,
            us=start.identity(),
            origin=origin,
            memory=memory,
            store_is_silent=silent,
            save=partial(start.save_aside, stack.enter_context(ThreadPoolExecutor(1)), settings),
            write_subnet_env=partial(_write_subnet_env, settings.subnet_file),
            firewall=rules,
            turn_rules=partial(_rules_as_asked, settings, ()),
            traffic=traffic,
            blackhole=settings.ip_blackhole_route,
            peer_filter=_peer_filter(settings, config, stack),
            enforce=settings.peer_filter == ENFORCE,
            open_pinger=_pinger if settings.peer_probes else None,
            on_ready=ready,
            health=health,
            random=Random(),  # noqa: S311  # spreads load, guards nothing
        )
        node = Node(parts)
        voice.speak_for(node)
        async with asyncio.TaskGroup() as tasks:
            if notify.watchdog_seconds is not None:
                tasks.create_task(voice.feed_watchdog(notify.watchdog_seconds))
            await node.live()


def _pinger() -> "Echo":
    from flannelpy.kernel.echo import Echo  # not before the node is ready

    return Echo()


async def _firewall(
    settings: Settings, config: NetworkConfig, previous: Previous, health: Health
) -> tuple[Wishes, Firewall]:
    """What the flags ask for, and where it is kept.

    Forward rules are on by default, and flannel goes on without the program that sets them. So do we, and
    say it; what was asked for by name is worth an error.
    """
    before = [bits for bits, known in ((32, previous.network), (128, previous.network6)) if known]
    try:
        return await _rules_as_asked(settings, before, config)
    except KernelError as error:
        asked = settings.ip_masq or settings.sources["iptables-forward-rules"] != DEFAULT
        if asked:
            raise
        health.rules_absent = f"no forward rules: {error}"
        log.warning("%s; or set --iptables-forward-rules=false", health.rules_absent)
        rules = await firewall(
            (), before, use_nftables=config.enable_nftables, resync=settings.iptables_resync
        )
        return _wishes(settings)._replace(forward=False), rules


def _wishes(settings: Settings) -> Wishes:
    return Wishes(
        settings.ip_masq, settings.iptables_forward_rules, not settings.ip_masq_fully_random_disable
    )


async def _rules_as_asked(
    settings: Settings, before: Sequence[int], config: NetworkConfig, former: Firewall | None = None
) -> tuple[Wishes, Firewall]:
    """The same without a second thought; `former` is the firewall whose place this takes."""
    wishes = _wishes(settings)
    enabled = [bits for bits, on in ((32, config.enable_ipv4), (128, config.enable_ipv6)) if on]
    return wishes, await firewall(
        enabled if wishes.masquerade or wishes.forward else (),
        before,
        use_nftables=config.enable_nftables,
        resync=settings.iptables_resync,
        former=former,
    )


def _peer_filter(settings: Settings, config: NetworkConfig, stack: AsyncExitStack) -> PeerFilterTable | None:
    """The table of the peer filter; None where it is off or cannot be, and then there is none."""
    try:
        table = PeerFilterTable()
        stack.callback(table.close)
        if settings.peer_filter != OFF and port_of(config, {}) is not None:
            return table
        table.remove()
    except OSError as error:
        if settings.peer_filter != OFF:
            log.info("no peer filter: %s", error.strerror or error)
    return None


class Cleaned(NamedTuple):
    """What a clean-up found, in words."""

    objects: list[str]
    failed: list[str]


def clean_up(subnet_file: str, *, remove: bool) -> Cleaned:
    """Remove what is ours from this host, or only tell. ConflictError while a daemon serves it.

    Ours are, as subnet.env says who we are: the devices with our subnet's base address, overlay devices with
    routes of our protocol number, and routes of that number inside our network.
    """
    require_privileges()
    previous, warning = subnet_env.read(subnet_file)
    host = LinuxKernel()
    with closing(host):
        subnets = [subnet for subnet in (previous.subnet, previous.subnet6) if subnet]
        networks = tuple(network for network in (previous.network, previous.network6) if network)
        devices = leftover_devices(host.interfaces(), subnets, ()) | host.marked_overlay_devices()
        with ExitStack() as locks:
            if remove:
                for what in [f"overlay {network}" for network in networks] + [
                    f"device {name}" for name in devices
                ]:
                    locks.enter_context(instance.lock(what))
            observed = host.observe(Scope(devices, networks))
            if remove:
                instance.refuse_flannel("", [key[1] for key in observed.addresses])
            ops = plan(State(), observed)
            failures = host.apply(ops) if remove else []
            rules = asyncio.run(remove_all(remove=remove))
    objects = [str(op.item) for op in ops] + [word.removeprefix("removed ") for word in rules]
    if previous != Previous() or warning:
        objects.append(f"file {subnet_file}")
        if remove:
            Path(subnet_file).unlink(missing_ok=True)
    return Cleaned(objects, [str(failure) for failure in failures])


def _write_subnet_env(path: str, text: str) -> None:
    try:
        subnet_env.write(path, text)
    except OSError as error:
        raise FlannelpyError(
            f"cannot write {path}: {error.strerror}; Docker and CNI wait for it:"
            " make its folder writable or choose another --subnet-file"
        ) from error
    log.info("wrote %s: %s", path, " ".join(text.split()))


@asynccontextmanager
async def _etcd_store(settings: Settings, voice: Voice) -> AsyncIterator[Store]:
    """The etcd store that the settings describe."""
    from flannelpy.store.etcd import EtcdStore  # the slowest import: after flags and privileges are checked

    store = EtcdStore(_etcd_client(settings), settings.etcd_prefix, on_trouble=voice.store_trouble)
    try:
        yield store
    finally:
        await _close(store)


@asynccontextmanager
async def _kube_store(settings: Settings, voice: Voice) -> "AsyncIterator[KubeStore]":
    """The Kubernetes store that the settings describe; StoreError if what they name cannot be used."""
    from flannelpy.store.kube import KubeStore
    from flannelpy.store.kube_access import by_url, in_cluster
    from flannelpy.store.kube_client import KubeClient
    from flannelpy.store.kube_config import from_kubeconfig

    if settings.kubeconfig_file:
        access = from_kubeconfig(settings.kubeconfig_file, settings.kube_api_url, os.environ)
    elif settings.kube_api_url:
        access = by_url(settings.kube_api_url, os.environ)
    else:
        access = in_cluster(os.environ)
    store = KubeStore(
        KubeClient(access),
        os.environ,
        settings.kube_annotation_prefix,
        settings.net_config_path,
        set_condition=settings.set_node_network_unavailable,
        on_trouble=voice.store_trouble,
    )
    try:
        yield store
    finally:
        await _close(store)


async def _close(store: Store) -> None:
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await store.close()
    except TimeoutError:
        log.debug("the store's connections did not close in time")


@asynccontextmanager
async def administration(settings: Settings) -> "AsyncIterator[EtcdAdmin]":
    """The network that the settings describe, for the commands of an operator."""
    from flannelpy.store.etcd_admin import EtcdAdmin

    admin = EtcdAdmin(_etcd_client(settings), settings.etcd_prefix)
    try:
        yield admin
    finally:
        await admin.close()


def _etcd_client(settings: Settings) -> "EtcdClient":
    from flannelpy.store.etcd_client import EtcdClient
    from flannelpy.store.etcd_endpoint import Tls
    from flannelpy.store.etcd_files import Login

    tls = Tls(settings.etcd_cafile, settings.etcd_certfile, settings.etcd_keyfile)
    login = Login(settings.etcd_username, settings.etcd_password, settings.etcd_password_file)
    return EtcdClient(settings.etcd_endpoints, tls, login if login.user else None)
