"""The composition root: builds everything, runs it as one task group, maps errors to exit codes.

Start, step by step: settings -> network config (waited for) -> backend -> uplink -> own lease (waited for)
-> own device -> subnet.env -> peers -> READY=1. Whatever is waited for is said in the log and in STATUS=.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from random import Random

from flannelpy import __version__, subnet_env
from flannelpy.backend import Backend, Facts, load
from flannelpy.claim import Claim
from flannelpy.errors import FlannelpyError, KernelError, UplinkError
from flannelpy.health import Health
from flannelpy.kernel import instance
from flannelpy.kernel.linux import LinuxKernel, require_privileges
from flannelpy.log import setup as setup_log
from flannelpy.model.config import EXAMPLE_CONFIG, ConfigError, NetworkConfig, overlap_warnings, parse_config
from flannelpy.model.kernel import Scope
from flannelpy.model.lease import Lease, LeaseAttrs
from flannelpy.model.subnet import Previous
from flannelpy.model.uplink import NoUplink, Uplink, Wish, choose
from flannelpy.notify import Notify
from flannelpy.reconcile import Reconciler
from flannelpy.settings import Settings, describe
from flannelpy.store import Store

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
    for note in settings.notes():
        log.warning("%s", note)
    if settings.ignored_words:
        log.warning("ignored after the flags: %s", " ".join(settings.ignored_words))
    require_privileges()
    health = Health()
    async with AsyncExitStack() as stack:
        stack.enter_context(instance.lock(f"network {settings.etcd_prefix}"))
        store = await stack.enter_async_context(_store(settings, health, notify))
        config, backend = await _learn_network(store, notify)
        kernel = LinuxKernel()
        stack.callback(kernel.close)
        for device in _own_devices(backend, config):
            stack.enter_context(instance.lock(f"device {device}"))
        node = _Node(settings, notify, health, store, config, backend, kernel)
        await node.live()


class _Node:
    """The parts of one running node, wired together."""

    def __init__(
        self,
        settings: Settings,
        notify: Notify,
        health: Health,
        store: Store,
        config: NetworkConfig,
        backend: Backend,
        kernel: LinuxKernel,
    ) -> None:
        self._settings = settings
        self._notify = notify
        self._health = health
        self._store = store
        self._config = config
        self._backend = backend
        self._kernel = kernel
        self._random = Random()  # noqa: S311  # spreads load, guards nothing
        self._facts = self._learn_facts()
        self._reconciler: Reconciler | None = None

    async def live(self) -> None:
        """From the claim on a subnet to the end."""
        settings = self._settings
        previous, warning = subnet_env.read(settings.subnet_file)
        if warning:
            log.warning("%s", warning)
        claim = Claim(
            self._store,
            self._config,
            self._offer,
            previous,
            settings.subnet_lease_renew_margin,
            self._random,
            self._moved,
        )
        self._notify.status("claiming a subnet")
        own = await claim.take()
        log.info("our lease is %s", own.key)
        self._reconciler = Reconciler(
            self._kernel,
            self._backend,
            self._config,
            self._facts,
            own,
            self._scope(previous),
            self._health,
            self._random,
        )
        self._reconciler.prepare()
        self._write_subnet_env(own)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(self._reconciler, claim), name="follow the peers")
            tasks.create_task(self._reconciler.run(), name="reconcile")
            tasks.create_task(claim.keep(), name="keep the lease")
            tasks.create_task(self._tell_ready(self._reconciler, own), name="tell when ready")
            self._warn_of_overlaps(own)

    async def _follow(self, reconciler: Reconciler, claim: Claim) -> None:
        async for update in self._store.watch():
            claim.notice(update)
            reconciler.offer(update)

    async def _tell_ready(self, reconciler: Reconciler, own: Lease) -> None:
        await reconciler.first_pass_done.wait()
        self._health.ready = True
        self._notify.ready()
        text = (
            f"{own.key} on {', '.join(_own_devices(self._backend, self._config))}, {self._health.peers} peers"
        )
        self._notify.status(text)
        log.info("ready: %s", text)

    # --- facts -------------------------------------------------------------------------------------------

    def _learn_facts(self) -> Facts:
        uplink = self._choose_uplink()
        found = self._kernel.observe(Scope(frozenset(self._backend.devices), ()), devices_only=True)
        instance.refuse_flannel(self._settings.etcd_prefix, [key[1] for key in found.addresses])
        host_id = f"{self._settings.etcd_prefix}|{_machine_id()}"
        facts = Facts(uplink, found.links, host_id=host_id)
        try:
            self._backend.mtu(facts)
        except ValueError as error:
            raise UplinkError(str(error)) from None
        return facts

    def _choose_uplink(self) -> Uplink:
        settings = self._settings
        wish = Wish(
            settings.iface,
            settings.iface_regex,
            settings.iface_can_reach,
            settings.public_ip,
            settings.public_ipv6,
        )
        try:
            uplink, reason = choose(
                wish,
                self._config.enable_ipv4,
                self._config.enable_ipv6,
                self._kernel.interfaces(),
                self._kernel.default_routes(),
                self._kernel.route_to,
            )
        except NoUplink as error:
            raise UplinkError(str(error)) from None
        log.info("uplink %s", reason)
        return uplink

    def _offer(self, remembered: Lease | None, others: Sequence[Lease]) -> LeaseAttrs:
        attrs, warnings = self._backend.attrs(self._facts, remembered, others)
        for warning in warnings:
            log.warning("%s", warning)
        return attrs

    def _scope(self, previous: Previous) -> Scope:
        networks = [self._config.network, self._config.network6, previous.network, previous.network6]
        return Scope(
            frozenset(self._backend.devices),
            tuple(network for network in networks if network is not None),
            takeover=tuple(net for net in (self._config.network, self._config.network6) if net is not None),
            takeover_lengths=(self._config.subnet_len, self._config.subnet6_len),
        )

    def _warn_of_overlaps(self, own: Lease) -> None:
        """The classic mistake: an overlay network that this host's own network is part of."""
        addresses = [
            (interface.name, address.prefix)
            for interface in self._kernel.interfaces()
            for address in interface.addresses
        ]
        ours = frozenset(self._backend.devices)
        for warning in overlap_warnings(self._config, addresses, self._kernel.routed(), ours, own.subnets()):
            log.warning("%s", warning)

    # --- outcomes ----------------------------------------------------------------------------------------

    def _moved(self, own: Lease) -> None:
        if self._reconciler is not None:
            self._reconciler.move(own)
            self._write_subnet_env(own)

    def _write_subnet_env(self, own: Lease) -> None:
        path = self._settings.subnet_file
        text = subnet_env.render(self._config, own, self._backend.mtu(self._facts), self._settings.ip_masq)
        try:
            subnet_env.write(path, text)
        except OSError as error:
            raise FlannelpyError(
                f"cannot write {path}: {error.strerror}; Docker and CNI wait for it:"
                " make its folder writable or choose another --subnet-file"
            ) from error
        log.info("wrote %s: %s", path, " ".join(text.split()))


@asynccontextmanager
async def _store(settings: Settings, health: Health, notify: Notify) -> AsyncIterator[Store]:
    """The etcd store that the settings describe."""
    from flannelpy.store.etcd import EtcdStore  # the slowest import: after flags and privileges are checked
    from flannelpy.store.etcd_client import EtcdClient
    from flannelpy.store.etcd_endpoint import Tls

    def trouble(reason: str | None) -> None:
        if reason == health.store_trouble:
            return
        if reason is None:
            log.info("the store answers again")
        else:
            outcome = "the network goes on with what is known" if health.ready else "waiting"
            log.warning("%s; %s", reason, outcome)
            notify.status(f"{reason}; {outcome}")
        health.store_trouble = reason

    tls = Tls(settings.etcd_cafile, settings.etcd_certfile, settings.etcd_keyfile)
    credentials = (settings.etcd_username, settings.etcd_password) if settings.etcd_username else None
    client = EtcdClient(settings.etcd_endpoints, tls, credentials)
    store = EtcdStore(client, settings.etcd_prefix, on_trouble=trouble)
    try:
        yield store
    finally:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await store.close()
        except TimeoutError:
            log.debug("the store's connections did not close in time")


async def _learn_network(store: Store, notify: Notify) -> tuple[NetworkConfig, Backend]:
    """Wait until there is a config that can be served; says once what is missing or wrong."""
    said = ""
    async with aclosing(store.watch_config()) as texts:
        async for text in texts:
            if text is None:
                problem = f"no network config yet: put one at {store.config_place}, such as {EXAMPLE_CONFIG}"
            else:
                try:
                    config = parse_config(text)
                    return config, load(config)
                except (ConfigError, LookupError) as error:
                    problem = f"the network config at {store.config_place} cannot be used: {error}"
            if problem != said:
                said = problem
                log.warning("waiting: %s", problem)
                notify.status(f"waiting: {problem}")
    raise KernelError("the store gave up watching the network config")  # pragma: no cover


def _own_devices(backend: Backend, config: NetworkConfig) -> tuple[str, ...]:
    """The devices of the enabled families."""
    return tuple(
        device for device in backend.devices if (config.enable_ipv6 if "v6" in device else config.enable_ipv4)
    )


def _machine_id() -> str:
    """Systemd's machine id, or the host's name where there is none."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(path).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        if text and text != "uninitialized":
            return text
    return socket.gethostname()
