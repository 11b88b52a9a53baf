"""Calls that wait for a server, from where nobody may wait for long: each has a deadline of our own.

A driver's time-outs are the server's to keep, and the network's: a server that is paused while its kernel goes on
acknowledging keeps a caller waiting for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from agentfleet.errors import JournalError

_T = TypeVar("_T")


class Session(Protocol):
    """What calls are made on, by one thread at a time."""

    def probe(self) -> None:
        """Ask the server for as little as possible; raises if it does not answer."""
        ...

    def abort(self) -> None:
        """Have a call fail that another thread is waiting for. Never waits."""
        ...

    def drop(self) -> None:
        """Let go of what it holds; it may be used again."""
        ...


_S = TypeVar("_S", bound=Session)


class Direct(Generic[_S]):
    """Makes calls where they are asked for: for what never waits longer than its own time-out, such as a file.

    Args:
        session: What they are made on.
    """

    def __init__(self, session: _S) -> None:
        self._session = session

    def call(self, work: Callable[[_S], _T]) -> _T:
        """Do it now."""
        return work(self._session)

    def close(self) -> None:
        """Let go of what the session holds."""
        self._session.drop()


class Bounded(Generic[_S]):
    """Makes calls in a thread of its own, one after the other, and waits for each no longer than a deadline.

    A call that has taken too long breaks the circuit (Nygard, Release It!, 2007): further ones are refused at once, so
    that a server which does not answer costs the caller one deadline and not one for each call, until it has answered a
    probe.

    Args:
        make: Makes a session.
        timeout: Seconds that a call may take, with those before it.
        pause: Seconds between two probes.
    """

    def __init__(self, make: Callable[[], _S], *, timeout: float, pause: float = 1.0) -> None:
        self._make, self._timeout, self._pause = make, timeout, pause
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._worker: _Worker[_S] | None = _Worker(make())

    def call(self, work: Callable[[_S], _T]) -> _T:
        """Have it done; raises what it raises.

        Raises:
            JournalError: It took too long, and its effect is unknown; or an earlier one has, and was not done.
        """
        worker = self._worker
        if worker is None:
            raise JournalError("the database does not answer; it is asked again and again")
        future = worker.submit(work)
        try:
            return future.result(self._timeout)
        except TimeoutError:
            if future.done():
                raise  # its own
        self._break(worker)
        raise JournalError(
            f"the database did not answer within {self._timeout:g} s; whether it has done what it was asked is unknown"
        )

    def close(self) -> None:
        """Let go of what the session holds; returns when that is done, or would take too long."""
        self._ended.set()
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()
            worker.join(self._timeout)

    def _break(self, stuck: _Worker[_S]) -> None:
        with self._lock:
            if self._worker is not stuck:
                return  # another caller was first
            self._worker = None
        stuck.session.abort()
        stuck.end()
        threading.Thread(target=self._mend, name="database probe", daemon=True).start()

    def _mend(self) -> None:
        """Probe the server until it answers, then let calls through again."""
        while not self._ended.wait(self._pause):
            session = self._make()
            timer = threading.Timer(self._timeout, session.abort)
            timer.daemon = True
            timer.start()
            try:
                session.probe()
            except Exception:  # noqa: BLE001 - whatever it is, it does not answer yet; callers are told so
                session.drop()
                continue
            finally:
                timer.cancel()
            with self._lock:
                if self._ended.is_set():
                    session.drop()
                else:
                    self._worker = _Worker(session)
            return


class _Worker(Generic[_S]):
    """One thread that makes calls on one session. A daemon: the process may end while a call never does."""

    def __init__(self, session: _S) -> None:
        self.session = session
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[_S], _T]) -> Future[_T]:
        future: Future[_T] = Future()

        def do() -> None:
            try:
                future.set_result(work(self.session))
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                future.set_exception(error)

        self._asked.put(do)
        return future

    def end(self) -> None:
        """End after what was asked for."""
        self._asked.put(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        while (do := self._asked.get()) is not None:
            do()
        self.session.drop()
