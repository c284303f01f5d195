"""What a start finds out before there is a node: the network, what an earlier life remembers, who we are."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TypeAlias

from flannelpy import state_file
from flannelpy.backend import Backend, load
from flannelpy.model.address import Address, parse_address
from flannelpy.model.config import EXAMPLE_CONFIG, ConfigError, NetworkConfig, parse_config
from flannelpy.model.identity import Identity
from flannelpy.node import PATIENCE_SECONDS
from flannelpy.settings import Settings
from flannelpy.state_file import Memory, Origin
from flannelpy.store import Store

log = logging.getLogger("flannelpy.daemon")

PublicIps: TypeAlias = tuple[Address | None, Address | None]
"""IPv4, IPv6."""


async def learn_network(
    store: Store, tell: Callable[[str], None], memory: Memory | None, now: float
) -> tuple[str, NetworkConfig, Backend] | None:
    """(text, config, backend): wait until there is one that can be served; tell once what is wrong.

    None if there is a memory that will do, and the store does not answer.
    """
    said = ""
    usable = memory is not None and memory.is_valid_at(now)
    with suppress(TimeoutError):
        async with (
            asyncio.timeout(PATIENCE_SECONDS if usable else None) as patience,
            aclosing(store.watch_config()) as texts,
        ):
            async for text in texts:
                patience.reschedule(None)  # it answers
                problem = _why_not(text, store.config_place)
                if problem is None and text is not None:
                    config = parse_config(text)
                    return text, config, load(config)
                if problem is not None and problem != said:
                    said = problem
                    log.warning("waiting: %s", problem)
                    tell(f"waiting: {problem}")
    return None


def _why_not(text: str | None, place: str) -> str | None:
    """What keeps us from serving a network config."""
    if text is None:
        return f"no network config yet: put one at {place}, such as {EXAMPLE_CONFIG}"
    try:
        load(parse_config(text))
    except (ConfigError, LookupError) as error:
        return f"the network config at {place} cannot be used: {error}"
    return None


def origin(settings: Settings) -> Origin:
    """Which network of which store the settings name."""
    if not settings.kube_subnet_mgr:
        return Origin(settings.etcd_prefix, tuple(settings.etcd_endpoints))
    server = settings.kube_api_url or settings.kubeconfig_file or "in-cluster"
    return Origin(f"kubernetes/{settings.kube_annotation_prefix}", (server,))


async def public_ips(
    asked: Awaitable[PublicIps], by_flags: PublicIps, memory: Memory | None
) -> tuple[PublicIps, bool]:
    """((IPv4, IPv6), whether the store answers): what an operator says at the node counts more than flags.

    Waits for ever, unless there is a memory that will do.
    """
    usable = memory is not None and memory.is_valid_at(time.time())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS if usable else None):
            said = await asked
    except TimeoutError:
        return by_flags, False
    return (said[0] or by_flags[0], said[1] or by_flags[1]), True


def remembered(settings: Settings, origin: Origin) -> Memory | None:
    """What an earlier life of this node has saved about this network."""
    if not settings.state_dir:
        return None
    memory, warning = state_file.read(state_file.path_for(settings.state_dir, origin.prefix))
    if warning:
        log.warning("%s", warning)
    return memory if memory is not None and memory.origin.is_same(origin) else None


def save(settings: Settings, memory: Memory) -> None:
    """Write the copy; a folder that cannot be written is said, and no reason to stop."""
    if not settings.state_dir:
        return
    path = state_file.path_for(settings.state_dir, memory.origin.prefix)
    try:
        state_file.write(path, memory)
    except OSError as error:
        log.warning(
            "cannot write %s: %s; a start without the store will not know the peers", path, error.strerror
        )


def save_aside(executor: Executor, settings: Settings, memory: Memory) -> None:
    """The same in a thread: with 5,000 peers it takes 0.1 s, and changes of peers must not wait for it."""

    def work() -> None:
        try:
            save(settings, memory)
        except Exception:  # a thread's error would go unseen
            log.exception("cannot save what is known")

    executor.submit(work)


def identity() -> Identity:
    """This process on this machine."""
    boot, since = "", 0
    with suppress(OSError, ValueError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        since = int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))
    return Identity(socket.gethostname(), boot, os.urandom(8).hex(), since, int(time.time() * 1000))


def literal_hosts(endpoints: Sequence[str]) -> tuple[Address, ...]:
    """The endpoints that are given as IP addresses."""
    found = []
    for endpoint in endpoints:
        name = endpoint.partition("://")[2] or endpoint
        bare = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
        with suppress(ValueError):
            found.append(parse_address(bare))
    return tuple(found)


def machine_id() -> str:
    """Systemd's machine id, or the host's name where there is none."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(path).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        if text and text != "uninitialized":
            return text
    return socket.gethostname()
