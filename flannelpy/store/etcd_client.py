"""etcd's v3 API: the calls that we use, with deadlines, retries where they are safe, and authentication."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from flannelpy.errors import StoreError
from flannelpy.store import etcd_pb2 as pb
from flannelpy.store.etcd_connection import CallError, Connection, Member, call_errors
from flannelpy.store.etcd_endpoint import Tls
from flannelpy.store.etcd_files import Login, keep_password
from flannelpy.store.etcd_reason import call_reason
from flannelpy.store.retry import STOPPED_ANSWERING

Reply = TypeVar("Reply", bound=Message)
_WatchCall: TypeAlias = "grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]"

_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_PERMANENT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
_MORE_PATIENCE = 4
"""How many times as long a call may take while nothing is answered in time: slow is better than never."""
_REFUSED_SECONDS = 60.0
"""So long a password that etcd refused is not sent again."""
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old")


class OutcomeUnknownError(StoreError):
    """A write was sent and its answer got lost: it may or may not take place. Read before writing again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=True)


class RefusedError(StoreError):
    """etcd answered with an error; `details` is its own text."""

    def __init__(self, message: str, details: str, *, transient: bool) -> None:
        super().__init__(message, transient=transient)
        self.details = details


class _Method(NamedTuple, Generic[Reply]):
    kind: str
    """The name under which it is counted."""
    path: str
    reply: Callable[[bytes], Reply]


_RANGE = _Method("range", "/etcdserverpb.KV/Range", pb.RangeResponse.FromString)
_TXN = _Method("txn", "/etcdserverpb.KV/Txn", pb.TxnResponse.FromString)
_GRANT = _Method("grant", "/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse.FromString)
_REVOKE = _Method("revoke", "/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse.FromString)
_TTL = _Method("ttl", "/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveResponse.FromString)
_WATCH = _Method("watch", "/etcdserverpb.Watch/Watch", pb.WatchResponse.FromString)
_AUTHENTICATE = _Method("authenticate", "/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse.FromString)


class EtcdClient:
    """A client of an etcd cluster, connected to one member at a time.

    Certificates, and a password in a file, are read again when they change. Raises StoreError for unusable
    files, SettingsError for unusable endpoints. Every call raises StoreError, whose message names endpoint,
    reason and remedy; `transient` is False only where waiting cannot help: a wrong password, a missing
    permission.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        tls: Tls | None = None,
        login: Login | None = None,
        *,
        call_timeout: float = 5.0,
        connect_timeout: float = 3.0,
    ) -> None:
        self._connection = Connection(endpoints, tls, connect_timeout)
        self._login = login
        self._password = keep_password(login) if login is not None else str
        self._timeout = self._patience = call_timeout
        self._token: str | None = None
        self._token_from: Member | None = None
        self._refused: _Refused | None = None
        self._authenticating = asyncio.Lock()
        self.requests: Counter[str] = Counter()
        """How many requests of each kind were sent: range, txn, grant, revoke, ttl, watch, authenticate."""

    @property
    def place(self) -> str:
        """The endpoints, for messages."""
        return ", ".join(endpoint.text for endpoint in self._connection.endpoints)

    async def close(self) -> None:
        """Close the connection; calls under way end with a StoreError."""
        await self._connection.close()

    # --- calls ---

    async def range(
        self, key: bytes, range_end: bytes = b"", *, limit: int = 0, revision: int = 0
    ) -> pb.RangeResponse:
        """Read a key, or all keys in [key, range_end), at most `limit` if given; linearizable.

        `revision` reads what was then: pages that belong together.
        """
        request = pb.RangeRequest(key=key, range_end=range_end, limit=limit, revision=revision)
        return await self._call(_RANGE, request, repeatable=True)

    async def txn(
        self,
        compare: Iterable[pb.Compare],
        success: Iterable[pb.RequestOp],
        failure: Iterable[pb.RequestOp] = (),
    ) -> pb.TxnResponse:
        """Compare and write in one step. Raises OutcomeUnknownError when the answer got lost."""
        request = pb.TxnRequest(compare=compare, success=success, failure=failure)
        return await self._call(_TXN, request, repeatable=False)

    async def grant(self, ttl: int) -> int:
        """A new etcd lease of `ttl` seconds -> its id.

        We choose the id, so a grant whose answer got lost can be repeated and leaves nothing behind.
        """
        lease_id = int.from_bytes(os.urandom(8)) >> 2 or 1
        try:
            await self._call(_GRANT, pb.LeaseGrantRequest(TTL=ttl, ID=lease_id), repeatable=True)
        except RefusedError as error:
            if "lease already exists" not in error.details:
                raise
        return lease_id

    async def revoke(self, lease_id: int) -> None:
        """End an etcd lease and delete the keys on it; one that is gone already is no error."""
        try:
            await self._call(_REVOKE, pb.LeaseRevokeRequest(ID=lease_id), repeatable=True)
        except RefusedError as error:
            if "lease not found" not in error.details:
                raise

    async def keys_on(self, lease_id: int) -> tuple[bytes, ...]:
        """The keys that hang on an etcd lease."""
        request = pb.LeaseTimeToLiveRequest(ID=lease_id, keys=True)
        return tuple((await self._call(_TTL, request, repeatable=True)).keys)

    async def seconds_left(self, lease_id: int) -> int:
        """How long an etcd lease still lives; -1 if it has ended."""
        return (await self._call(_TTL, pb.LeaseTimeToLiveRequest(ID=lease_id), repeatable=True)).TTL

    async def watch(
        self, key: bytes, range_end: bytes = b"", start_revision: int = 0
    ) -> AsyncGenerator[pb.WatchResponse, None]:
        """The responses of one watch, the `created` one first; one with a compact_revision is the last.

        Raises StoreError when the stream ends for any other reason. Close it (`contextlib.aclosing`).
        """
        create = pb.WatchCreateRequest(
            key=key, range_end=range_end, start_revision=start_revision, progress_notify=True
        )
        member, call, response = await self._open_watch(create)
        try:
            while isinstance(response, pb.WatchResponse):
                if response.canceled and not response.compact_revision:
                    reason = call_reason("CANCELLED", response.cancel_reason)
                    raise self._error(member, f"the watch is refused: {reason}")
                yield response
                with call_errors():
                    response = await call.read()
            await self._connection.leave(member)
            raise self._error(member, "the watch is lost")
        except CallError as error:
            await self._connection.leave(member)
            # To say that it was just lost would be to wait for a second failure before anybody is told.
            silent = self._connection.fell_silent(member)
            reason = STOPPED_ANSWERING if silent else self._reason(error)
            raise self._error(member, f"the watch is lost: {reason}") from None
        finally:
            call.cancel()

    async def _open_watch(self, create: pb.WatchCreateRequest) -> tuple[Member, _WatchCall, Any]:
        """(member, stream, its first response); once more with a new token if this one is refused."""
        renewed = False
        while True:
            member = await self._connection.ready()
            token = await self._current_token(member)
            self.requests[_WATCH.kind] += 1
            call = member.channel.stream_stream(
                _WATCH.path, pb.WatchRequest.SerializeToString, _WATCH.reply
            )(None, metadata=(("hasleader", "true"), *_metadata(token)))  # fmt: skip
            failure = None
            response: Any = None
            try:
                with call_errors():
                    async with asyncio.timeout(self._patience):
                        await call.write(pb.WatchRequest(create_request=create))
                        response = await call.read()
            except CallError as error:
                call.cancel()
                failure = error
            except BaseException:
                call.cancel()
                raise
            # Up to 3.4 a stale token is called "permission denied" here.
            refusal = failure or CallError(grpc.StatusCode.CANCELLED, getattr(response, "cancel_reason", ""))
            if token and not renewed and (_is_stale_token(refusal) or "permission denied" in refusal.details):
                call.cancel()
                self._forget(token)
                renewed = True
            elif failure is not None:
                late = failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
                self._adapt(late=late)
                self._suspect(token, member, late=late)
                await self._connection.leave(member, silent=late)
                raise self._error(member, f"the watch is lost: {self._reason(failure)}")
            else:
                return member, call, response

    async def _call(self, method: _Method[Reply], request: Message, *, repeatable: bool) -> Reply:
        """A unary call; if its member is lost, once more on the next one if it may be repeated."""
        renewed = repeated = False
        while True:
            member = await self._connection.ready()
            token = await self._current_token(member)
            try:
                return await self._send(member, method, request, token)
            except CallError as error:
                failure = error
            if _is_stale_token(failure) and token and not renewed:
                self._forget(token)
                renewed = True
                continue
            if failure.code not in _LOST:
                raise self._refusal(member, failure)
            late = failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
            self._suspect(token, member, late=late)
            await self._connection.leave(member, silent=late)
            # Without a connection nothing was sent.
            if not repeatable and not failure.details.startswith("failed to connect"):
                raise OutcomeUnknownError(
                    f"etcd at {member.endpoint.text}: {self._reason(failure)}; "
                    f"it is unknown whether the write takes place"
                )
            if repeated:
                raise self._error(member, self._reason(failure))
            repeated = True

    async def _send(self, member: Member, method: _Method[Reply], request: Message, token: str) -> Reply:
        """One request, with a deadline that grows while nothing is answered in time: up to four times."""
        self.requests[method.kind] += 1
        call = member.channel.unary_unary(method.path, type(request).SerializeToString, method.reply)
        try:
            with call_errors():
                reply: Reply = await call(request, timeout=self._patience, metadata=_metadata(token))
        except CallError as error:
            self._adapt(late=error.code is grpc.StatusCode.DEADLINE_EXCEEDED)
            raise
        self._adapt(late=False)
        return reply

    def _adapt(self, *, late: bool) -> None:
        self._patience = min(2 * self._patience, _MORE_PATIENCE * self._timeout) if late else self._timeout

    # --- authentication ---

    async def _current_token(self, member: Member) -> str:
        """The token to send with a request; empty if none is asked for."""
        if self._login is None:
            return ""
        async with self._authenticating:
            if self._token is None:
                self._token, self._token_from = await self._authenticate(member, self._login.user), member
        return self._token

    def _forget(self, token: str) -> None:
        """This token is refused; another call may have a newer one already."""
        if self._token == token:
            self._token = None

    def _suspect(self, token: str, member: Member, *, late: bool) -> None:
        """A member that leaves a token from an earlier connection unanswered may be waiting for its time.

        A simple token ends with an index of etcd's log. A member that has not reached it waits, for ever if
        its history is another one: restored from a backup.
        """
        if late and member is not self._token_from:
            self._forget(token)

    async def _authenticate(self, member: Member, user: str) -> str:
        """A token; empty when etcd does not ask for one.

        A refused password is not sent again for a while unless it has changed: each try costs etcd a tenth
        of a second of processor time on purpose, and thousands of nodes may have the same one.
        """
        password = self._password()
        if self._refused is not None and self._refused.holds(password):
            raise self._refused.error.with_traceback(None)
        request = pb.AuthenticateRequest(name=user, password=password)
        try:
            token = (await self._send(member, _AUTHENTICATE, request, "")).token
        except CallError as error:
            failure = error
        else:
            self._refused = None
            return token
        if "authentication is not enabled" in failure.details:
            return ""
        if failure.code not in _LOST:
            refusal = self._refusal(member, failure)
            if "invalid user ID or password" in failure.details:
                self._refused = _Refused(password, time.monotonic() + _REFUSED_SECONDS, refusal)
            raise refusal
        late = failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await self._connection.leave(member, silent=late)
        raise self._error(member, self._reason(failure))

    # --- errors ---

    def _reason(self, failure: CallError) -> str:
        return call_reason(failure.code.name, failure.details)

    def _error(self, member: Member, reason: str) -> StoreError:
        return StoreError(f"etcd at {member.endpoint.text}: {reason}", transient=True)

    def _refusal(self, member: Member, failure: CallError) -> RefusedError:
        """What to say, with the remedy, when etcd answers with an error."""
        user = self._login.user if self._login is not None else ""
        details, reason = failure.details, self._reason(failure)
        if "invalid user ID or password" in details:
            flag = "--etcd-password-file" if self._login and self._login.password_file else "--etcd-password"
            reason = f"wrong user name or password for {user!r}: check --etcd-username and {flag}"
        elif "user name is empty" in details:
            reason = "it asks for a user name and a password: give --etcd-username and --etcd-password"
        elif failure.code is grpc.StatusCode.PERMISSION_DENIED:
            whom = f"user {user!r}" if user else "us"
            reason = f"{reason} for {whom}: grant a role that may read and write everything under the prefix"
        elif "database space exceeded" in details:
            reason = f"{reason}: compact and defragment etcd, then disarm its alarm"
        return RefusedError(
            f"etcd at {member.endpoint.text}: {reason}", details, transient=failure.code not in _PERMANENT
        )


class _Refused(NamedTuple):
    """A password that etcd did not take."""

    password: str
    until: float
    error: RefusedError

    def holds(self, password: str) -> bool:
        """Whether there is no use in sending this one."""
        return password == self.password and time.monotonic() < self.until


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("token", token),) if token else ()


def _is_stale_token(error: CallError) -> bool:
    return error.code is grpc.StatusCode.UNAUTHENTICATED or any(
        text in error.details for text in _STALE_TOKEN
    )
