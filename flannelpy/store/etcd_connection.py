"""One connection to an etcd cluster over grpc.aio: which member to talk to, and when to leave it.

gRPC has failover of its own (`ipv4:a,b`), but for plaintext addresses only: with TLS each member must be
verified by its own name. So there is one channel per endpoint. Without a current one all endpoints are tried
at once and the first that becomes ready (TCP, TLS and the server's HTTP/2 settings) is kept: a server that
accepts connections and stays silent cannot win. A member that fails a call is left.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grpc
import grpc.aio

from flannelpy.errors import SettingsError, StoreError
from flannelpy.store.etcd_endpoint import Endpoint, Tls, parse_endpoint, read_pem, system_roots
from flannelpy.store.etcd_files import Kept
from flannelpy.store.etcd_reason import connect_reason

_OPTIONS = (
    # Below 5 s etcd answers GOAWAY "too_many_pings". A hung server is noticed after 15 s, but only with the
    # ping timeout: with keepalive_timeout alone grpcio 1.85 never gives up.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # 20,000 leases are more than the default of 4 MiB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Not min_reconnect_backoff_ms: in spite of its name it limits how long TCP, TLS and HTTP/2 may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The network's own store must not be looked for behind a web proxy that the environment happens to name.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    # From a shared pool a new channel would get the connection, and the back-off, of the one that we left.
    ("grpc.use_local_subchannel_pool", 1),
)

_RECENT = 10.0
"""Seconds for which an endpoint that failed lets the others go first,"""
_HANDICAP = 0.3
"""by this many seconds: a member without a leader accepts connections as fast as any."""
_MORE_PATIENCE = 4
"""While nobody answers, a connection may take up to so many times as long: slow is better than never."""


class CallError(Exception):
    """gRPC's status of a failed call."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Member(NamedTuple):
    """An endpoint with its open channel."""

    endpoint: Endpoint
    channel: grpc.aio.Channel


class _UnreachableError(Exception):
    """Why an endpoint cannot be connected to, in words; `silent`: nothing came back."""

    def __init__(self, reason: str, *, silent: bool = False) -> None:
        super().__init__(reason)
        self.silent = silent


@contextlib.contextmanager
def call_errors() -> Iterator[None]:
    """Turn every way in which grpc.aio ends a call into CallError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise CallError(error.code(), error.details() or "") from None
    except TimeoutError:
        raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "") from None
    except (grpc.aio.UsageError, asyncio.InvalidStateError):
        raise CallError(grpc.StatusCode.CANCELLED, "Connection closed") from None
    except asyncio.CancelledError:
        # Closing a channel cancels the calls on it: that is no cancellation of the task that waits for one.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CallError(grpc.StatusCode.CANCELLED, "Connection closed") from None


class Connection:
    """At most one connected member of a cluster at a time."""

    def __init__(self, endpoints: Sequence[str], tls: Tls | None, timeout: float) -> None:
        self.endpoints = tuple(dict.fromkeys(parse_endpoint(text) for text in endpoints))
        if not self.endpoints:
            raise SettingsError("no etcd endpoint is given: set --etcd-endpoints")
        tls = tls or Tls()
        self._ca = tls.ca_file or system_roots() or "gRPC's own list"
        self._secrets: Kept[_Secrets] | None = None
        if any(endpoint.secure for endpoint in self.endpoints):
            files = (tls.ca_file or system_roots(), tls.cert_file, tls.key_file)
            self._secrets = Kept(files, lambda: _read_secrets(tls))
        self._timeout = self._patience = timeout
        self._member: Member | None = None
        self._failed: dict[Endpoint, float] = {}
        self._connecting = asyncio.Lock()
        self._attempts = 0
        self._failure = ""
        """What became of the last attempt, if nothing."""
        self._silent: Member | None = None
        self._closed = False

    async def ready(self) -> Member:
        """The current member if it is connected, else the first endpoint that becomes so; or StoreError.

        Who waits while another caller tries shares the outcome: the attempts of many do not add up.
        """
        member, attempts = self._member, self._attempts
        if member is not None and member.channel.get_state() is grpc.ChannelConnectivity.READY:
            return member
        async with self._connecting:
            if self._member is not None and self._member is not member:
                return self._member
            if self._attempts != attempts and self._member is None and self._failure:
                raise StoreError(self._failure, transient=True)
            if member is not None:
                await self.leave(member)
            self._failure = ""
            try:
                self._member = await self._first_ready()
            except StoreError as error:
                self._failure = str(error) if error.transient else ""
                raise
            finally:
                self._attempts += 1
            return self._member

    def fell_silent(self, member: Member) -> bool:
        """Whether it was left because it did not answer."""
        return member is self._silent

    async def leave(self, member: Member, *, silent: bool = False) -> None:
        """Give a member up: its other calls end with an error, the next `ready` looks for another."""
        self._failed[member.endpoint] = time.monotonic()
        if silent:
            self._silent = member
        if self._member is member:
            self._member = None
        await member.channel.close(None)

    async def close(self) -> None:
        """Close for good; calls under way end with an error."""
        self._closed = True
        if self._member is not None:
            await self.leave(self._member)

    async def _first_ready(self) -> Member:
        if self._closed:
            raise StoreError("the connection to etcd is closed")
        secrets = self._secrets.current() if self._secrets is not None else None
        tasks = {asyncio.create_task(self._open(endpoint, secrets)): endpoint for endpoint in self.endpoints}
        reasons: dict[Endpoint, _UnreachableError] = {}
        winner: Member | None = None
        waiting = set(tasks)
        try:
            while waiting and winner is None:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        winner = winner or task.result()
                    except _UnreachableError as error:
                        reasons[tasks[task]] = error
        finally:
            await _drop(tasks, winner)
        if winner is None:
            silent = all(reason.silent for reason in reasons.values())
            self._patience = (
                min(2 * self._patience, _MORE_PATIENCE * self._timeout) if silent else self._timeout
            )
            each = "; ".join(f"{endpoint.text}: {reasons[endpoint]}" for endpoint in self.endpoints)
            raise StoreError(f"etcd cannot be reached: {each}", transient=True)
        self._patience = self._timeout
        return winner

    async def _open(self, endpoint: Endpoint, secrets: "_Secrets | None") -> Member:
        """A connected member; _UnreachableError if the first attempt fails or takes too long."""
        if len(self.endpoints) > 1 and time.monotonic() - self._failed.get(endpoint, -_RECENT) < _RECENT:
            await asyncio.sleep(_HANDICAP)
        channel = _channel(endpoint, secrets)
        patience = self._patience
        try:
            async with asyncio.timeout(patience):
                details = await _connect(channel)
            if details is None:
                return Member(endpoint, channel)
            ended = "" if secrets is None else _ended(secrets)
            reason = connect_reason(details, self._ca, secure=endpoint.secure, ended=ended)
            error = _UnreachableError(reason)
        except TimeoutError:
            error = _UnreachableError(f"no answer within {patience:g} s", silent=True)
        except BaseException:
            await channel.close(None)
            raise
        await channel.close(None)
        raise error


class _Secrets(NamedTuple):
    """What the files of `Tls` hold, as it is used."""

    credentials: grpc.ChannelCredentials
    chain: bytes
    """Our client certificate, PEM; empty if there is none,"""
    place: str
    """and where it is from."""


def _read_secrets(tls: Tls) -> _Secrets:
    pem = read_pem(tls)
    credentials = grpc.ssl_channel_credentials(pem.roots, pem.key, pem.chain)
    return _Secrets(credentials, pem.chain or b"", tls.cert_file)


def _ended(secrets: _Secrets) -> str:
    """Our client certificate in words if its time is over by this machine's clock, else nothing."""
    from flannelpy.store.certificate import end_of, first_in_pem  # only when something is wrong

    try:
        end = end_of(first_in_pem(secrets.chain))
    except ValueError:
        return ""
    if end >= time.time():
        return ""
    return f"{secrets.place}, which ended at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(end))}"


def _channel(endpoint: Endpoint, secrets: _Secrets | None) -> grpc.aio.Channel:
    if endpoint.secure and secrets is not None:
        return grpc.aio.secure_channel(endpoint.target, secrets.credentials, options=_OPTIONS)
    return grpc.aio.insecure_channel(endpoint.target, options=_OPTIONS)


async def _drop(tasks: dict[asyncio.Task[Member], Endpoint], winner: Member | None) -> None:
    """End the attempts and close whatever they opened, but for the winner."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Member) and outcome is not winner:
            await outcome.channel.close(None)


async def _connect(channel: grpc.aio.Channel) -> str | None:
    """Wait until a channel is ready; gRPC's details of the failure if the attempt fails."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            await channel.wait_for_state_change(state)
            continue
        # Only a call is told the reason. Any will do: without a connection it reaches no server.
        probe = channel.unary_unary("/etcdserverpb.Maintenance/Status", bytes, bytes)
        try:
            with call_errors():
                await probe(b"", timeout=1.0)
        except CallError as error:
            if error.code is grpc.StatusCode.UNAVAILABLE:
                return error.details
        # Any other outcome says nothing about the connection, and comes at once: do not ask again and again.
        await channel.wait_for_state_change(state)
    return None
