"""Waiting for a connection costs nothing, whatever gRPC answers meanwhile."""

import asyncio
from typing import Any

import grpc
import pytest

from flannelpy.store import etcd_connection
from flannelpy.store.etcd_connection import CallError

FAILED, READY = grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.READY


class Channel:
    """Has failed for a while, and answers every call at once with a status; then it is ready."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code
        self.calls = 0
        self.state = FAILED

    def get_state(self, *, try_to_connect: bool) -> grpc.ChannelConnectivity:
        assert try_to_connect
        return self.state

    async def wait_for_state_change(self, last: grpc.ChannelConnectivity) -> None:
        assert last is self.state
        await asyncio.sleep(0.05)
        self.state = READY

    def unary_unary(self, _path: str, *_codecs: Any) -> Any:
        async def probe(_request: bytes, timeout: float) -> bytes:  # noqa: ASYNC109  # as gRPC has it
            assert timeout
            self.calls += 1
            await asyncio.sleep(0)
            raise CallError(self.code, "in gRPC's words")

        return probe


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED]
)
def test_an_answer_that_says_nothing_is_not_asked_for_again(code: grpc.StatusCode) -> None:
    channel = Channel(code)
    connected: Any = etcd_connection._connect(channel)  # type: ignore[arg-type]
    assert asyncio.run(asyncio.wait_for(connected, 1)) is None
    assert channel.calls == 1


def test_the_reason_of_a_failure_is_told() -> None:
    connected: Any = etcd_connection._connect(Channel(grpc.StatusCode.UNAVAILABLE))  # type: ignore[arg-type]
    assert asyncio.run(asyncio.wait_for(connected, 1)) == "in gRPC's words"
