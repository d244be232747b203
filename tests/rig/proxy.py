"""A TCP proxy on loopback that delays, throttles, holds, cuts and refuses, as a test tells it while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import random
import socket
import struct
import termios
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Way = Literal["up", "down"]
"""`up` is from the client to the target, `down` from the target to the client."""
How = Literal["rst", "fin"]
WAYS: tuple[Way, Way] = ("up", "down")
_CHUNK_BYTES = 64 * 1024
_QUEUE_CHUNKS = 16
"""What the proxy holds for one direction of a connection while it waits: 1 MiB, then the sender is held up."""
_CATCH_UP_S = 0.02
_DRAIN_S = 5.0
_DEADLINE_S = 10.0
_TCP_CLOSE = 7
_Queue = asyncio.Queue[tuple[float, bytes | None]]


class Reachable(Protocol):
    """What has an address and a port: a machine, a proxy before it, or a wire."""

    @property
    def address(self) -> str:
        """A numeric address."""

    @property
    def port(self) -> int:
        """A TCP port."""


def free_address() -> tuple[str, int]:
    """A loopback address (one of its own where the system has 127.0.0.0/8) and a port nobody listens on there."""
    wanted = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
    for address in (wanted, "127.0.0.1"):
        with socket.socket() as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return address, int(probe.getsockname()[1])
    raise RuntimeError("no loopback address is free")


@dataclass
class _Line:
    """How one direction is at present, for all connections together."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    held: bool = False
    free_at: float = 0.0
    passed: int = 0


@dataclass(eq=False)
class _Link:
    """One connection from a client; `ended` says how it is to be cut, and by whoever sets it nothing passes after."""

    client: socket.socket
    ended: asyncio.Future[How]
    target: socket.socket | None = None
    flow: asyncio.Task[None] = field(init=False)
    serving: asyncio.Task[None] = field(init=False)
    left: dict[Way, tuple[int, How]] = field(default_factory=dict)

    def end(self, how: How) -> None:
        if not self.ended.done():
            self.ended.set_result(how)

    def allow(self, way: Way, count: int, how: How) -> None:
        self.left[way] = count, how
        if count == 0:
            self.end(how)

    def sockets(self) -> list[socket.socket]:
        return [self.client] + ([self.target] if self.target else [])


class Proxy:
    """Listens on `address` and `port` inside its `with` block; what its methods change holds when they return."""

    def __init__(self, target: Reachable) -> None:
        self.target = target
        """Where new connections lead; may be replaced at any time."""
        self.address, self.port = free_address()
        self.connections = 0
        """How many were accepted so far."""
        self.cuts = 0
        """How many were ended by cut() or cut_after()."""
        self._lines: dict[Way, _Line] = {way: _Line() for way in WAYS}
        self._rules: dict[tuple[int | None, Way], tuple[int, How]] = {}
        self._links: dict[int, _Link] = {}
        self._listener: socket.socket | None = None
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rig proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def open_now(self) -> int:
        """How many connections are open."""
        return len(self._links)

    @property
    def bytes_up(self) -> int:
        """How many bytes went to the target so far: at least those it has received, at most one piece more."""
        return self._lines["up"].passed

    @property
    def bytes_down(self) -> int:
        """How many bytes went to clients so far."""
        return self._lines["down"].passed

    def delay(self, delay_s: float, ways: Iterable[Way] = WAYS) -> None:
        """Let every byte arrive `delay_s` later; connecting itself is not delayed (the kernel does that)."""
        self._set(ways, delay_s=delay_s)

    def throttle(self, bytes_per_s: float | None, ways: Iterable[Way] = WAYS) -> None:
        """Let that many bytes pass in each of `ways`, all connections together; None lifts it."""
        self._set(ways, bytes_per_s=bytes_per_s, free_at=0.0)

    def black_hole(self, ways: Iterable[Way] = WAYS) -> None:
        """Pass nothing, no end of a connection either; clients can still connect, and bytes are kept for heal()."""
        self._set(ways, held=True)

    def heal(self) -> None:
        """End black_hole(): what was kept goes on in order."""
        self._set(WAYS, held=False)

    def cut_after(self, count: int, way: Way, how: How = "rst", connection: int | None = None) -> None:
        """Cut a connection once exactly `count` bytes have gone that way and arrived.

        Counted for an open connection from now, for a new one from its first byte; with 0 it never reaches the target
        (and a reset may come before connect() returns). `connection` is its number, 1 the first; without it, all are.
        """

        def change() -> None:
            self._rules[connection, way] = count, how
            for number, link in self._links.items():
                if connection in (None, number):
                    link.allow(way, count, how)

        self._apply(change)

    def cut(self, how: How = "rst") -> None:
        """Cut every open connection now."""

        def change() -> None:
            for link in self._links.values():
                link.end(how)

        self._apply(change)

    def refuse(self) -> None:
        """Stop listening: new connections are refused, open ones go on."""
        self._do(self._stop_accepting())

    def accept(self) -> None:
        """Listen again, on the same address and port. Does nothing when it does already."""
        self._do(self._start_accepting())

    def pass_all(self) -> None:
        """Lift everything: no delay, limit, hole or planned cut, and listen."""

        def change() -> None:
            self._rules.clear()
            for link in self._links.values():
                link.left.clear()

        self._apply(change)
        self._set(WAYS, delay_s=0.0, bytes_per_s=None, held=False, free_at=0.0)
        self.accept()

    def close(self) -> None:
        """End the listener, all connections and the thread. May be called twice."""
        if self._loop.is_closed():
            return
        self._do(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DEADLINE_S)
        assert not self._thread.is_alive(), "the proxy's thread does not end"
        self._loop.close()
        if self._failure is not None:
            raise self._failure

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE_S)

    def _apply(self, change: Callable[[], None]) -> None:
        """Make a change in the proxy's own thread, and wake whoever waits for one."""

        async def work() -> None:
            change()
            self._changed.set()
            self._changed = asyncio.Event()

        self._do(work())

    def _set(self, ways: Iterable[Way], **values: Any) -> None:
        def change() -> None:
            for way in ways:
                for name, value in values.items():
                    setattr(self._lines[way], name, value)

        self._apply(change)

    async def _start_accepting(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server((self.address, self.port), backlog=128)
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _stop_accepting(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def _shut(self) -> None:
        await self._stop_accepting()
        for link in self._links.values():
            link.serving.cancel()
        while self._links:
            await asyncio.sleep(0.001)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # the client has gone again
            return
        self.connections += 1
        client.setblocking(False)
        number = self.connections
        link = self._links[number] = _Link(client, self._loop.create_future())
        for way in WAYS:
            if (rule := self._rules.get((number, way)) or self._rules.get((None, way))) is not None:
                link.allow(way, *rule)
        link.flow = self._loop.create_task(self._flow(link))
        link.serving = self._loop.create_task(self._serve(link))
        link.serving.add_done_callback(lambda _: self._served(number, link))

    def _served(self, number: int, link: _Link) -> None:
        """Close both sockets, but not before the flow has let go of them; called however the serving ended."""

        def forget(_: object) -> None:
            for side in link.sockets():
                side.close()
            del self._links[number]
            for task in (link.serving, link.flow):
                failure = None if task.cancelled() else task.exception()
                if failure is not None and not isinstance(failure, OSError):
                    self._failure = failure

        if not link.flow.cancelling():  # a second cancel() would tear it from waiting for its own tasks
            link.flow.cancel()
        link.flow.add_done_callback(forget)

    async def _serve(self, link: _Link) -> None:
        both: list[asyncio.Future[Any]] = [link.flow, link.ended]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        link.flow.cancel()
        await asyncio.wait({link.flow})
        if link.ended.done():
            self.cuts += 1
            await self._end(link, link.ended.result())
        elif link.flow.exception() is not None:  # one side was reset, or there is no target: so is the other
            await self._end(link, "rst")

    async def _flow(self, link: _Link) -> None:
        """Pass bytes both ways until both sides have ended; OSError when one breaks."""
        if not await self._turn(link, "up", 0.0):
            return
        link.target = socket.socket()
        for side in link.sockets():
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._loop.sock_connect(link.target, (self.target.address, self.target.port))
        tasks = []
        for way in WAYS:
            queue: _Queue = asyncio.Queue(_QUEUE_CHUNKS)
            source, sink = (link.client, link.target) if way == "up" else (link.target, link.client)
            tasks.append(self._loop.create_task(self._read(source, queue)))
            tasks.append(self._loop.create_task(self._write(link, way, queue, sink)))
        try:
            for task in (await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))[0]:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, source: socket.socket, queue: _Queue) -> None:
        """Put what comes with its time of arrival, b"" for an orderly end, None for a reset."""
        data: bytes | None = b"."
        while data:
            try:
                data = await self._loop.sock_recv(source, _CHUNK_BYTES)
            except OSError:
                data = None
            await queue.put((self._loop.time(), data))

    async def _write(self, link: _Link, way: Way, queue: _Queue, sink: socket.socket) -> None:
        while True:
            arrived, data = await queue.get()
            view = memoryview(data or b"")
            while view and await self._turn(link, way, arrived):
                try:
                    view = view[self._send(link, way, view, sink) :]
                except BlockingIOError:
                    await self._writable(sink)
            if not await self._turn(link, way, arrived):
                return
            if data is None:
                raise ConnectionResetError
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return

    def _send(self, link: _Link, way: Way, view: memoryview, sink: socket.socket) -> int:
        """Send one piece at once, within the line's pace and what the connection may still pass; how much went."""
        line = self._lines[way]
        left, how = link.left.get(way, (len(view), "rst"))
        count = min(len(view), left)
        if line.bytes_per_s is not None:
            count = min(count, max(1, int(line.bytes_per_s / 100)))
        line.passed += count  # before it goes: who has received bytes finds them counted
        sent = 0
        try:
            sent = sink.send(view[:count])
        finally:
            line.passed -= count - sent
        if line.bytes_per_s is not None:
            line.free_at = max(line.free_at, self._loop.time() - _CATCH_UP_S) + sent / line.bytes_per_s
        if way in link.left:
            link.allow(way, left - sent, how)
        return sent

    async def _turn(self, link: _Link, way: Way, arrived: float) -> bool:
        """Return once bytes that arrived then may pass, which holds until the next await; False if none ever may."""
        line = self._lines[way]
        while not link.ended.done():
            wait_s = max(arrived + line.delay_s, line.free_at) - self._loop.time()
            if not line.held and wait_s <= 0:
                return True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if line.held else wait_s)
        return False

    async def _writable(self, sink: socket.socket) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(sink, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(sink)

    async def _end(self, link: _Link, how: How) -> None:
        """Let what was passed arrive, then reset both sides or end both in order."""
        if how == "fin":
            await asyncio.gather(*(self._swallow(side) for side in link.sockets()))
            return
        deadline = self._loop.time() + _DRAIN_S
        while self._loop.time() < deadline and not all(map(_is_drained, link.sockets())):
            await asyncio.sleep(0.001)
        for side in link.sockets():
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _swallow(self, side: socket.socket) -> None:
        """End our side, and read until the other has ended too: closing with bytes unread would be a reset."""
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_WR)
            while await self._loop.sock_recv(side, _CHUNK_BYTES):
                pass


def _is_drained(side: socket.socket) -> bool:
    """Whether the other end has received all that was sent, or is gone."""
    waiting: int = struct.unpack("i", fcntl.ioctl(side, termios.TIOCOUTQ, b"\0" * 4))[0]
    return waiting == 0 or side.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
