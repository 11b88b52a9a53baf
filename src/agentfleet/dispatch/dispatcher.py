"""The dispatcher: a queue in front of a fleet. Every task ends exactly once, whatever dies on the way.

- A task goes to the serving instance with the fewest in flight.
- An instance that leaves the endpoints (it drains, or is sick) is still awaited: it has the task, and may answer. Only
  when it is gone for good does its task go to another one, as the next attempt.
- A task whose instances were gone `max_kills` times is poison: it ends quarantined instead of taking another.
- Everything is journaled before it is done, and `recover` goes on from the journal after a crash: it asks the instance
  that had a task for it before it sends it anywhere else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from agentfleet.clock import Clock
from agentfleet.dispatch.flight import Fate, Flight, fly
from agentfleet.dispatch.job import Job, Result, Submission, new_job
from agentfleet.dispatch.lanes import Lane, Lanes
from agentfleet.dispatch.ports import Endpoints, Requests
from agentfleet.dispatch.record import Past, Record
from agentfleet.errors import OperationRefused, SpecError
from agentfleet.loops import end_loops
from agentfleet.stores.journal import Journal
from agentfleet.waiting import period_of

_REST_LIMIT = 30.0  # seconds that an instance which nobody reaches is left alone at most
_LATE = 5.0  # seconds that an abandoned flight may still bring an answer


class Dispatcher:
    """Sends tasks to a fleet's instances. Use as ``async with``; leaving it leaves open tasks to the journal.

    Args:
        endpoints: Where work may go.
        http: How to get there; the caller opens and closes it.
        clock: Dates events and paces repetitions.
        journal: Where everything is recorded.
        fleet: Name under which it is recorded.
        per_instance: Tasks that one instance is given at once. Agents that refuse (429) are left alone for a while.
        max_attempts: How often a task may fail by an agent's own answer before that is final.
        max_kills: How many instances may be gone before they have answered until a task is quarantined.
        timeout: Time that one attempt may take, in seconds or like "30m". Past it the task has failed ("timeout"): its
            instance may still be working on it, so it is not run again.
        max_open: Tasks waiting and in flight together.
        keep: Results kept for callers who submit an id again.

    Raises:
        SpecError: A limit is no whole number of at least 1, or `timeout` is no time span of more than 0.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        http: Requests,
        clock: Clock,
        journal: Journal,
        fleet: str,
        per_instance: int = 1,
        max_attempts: int = 1,
        max_kills: int = 3,
        timeout: float | str = 3600.0,
        max_open: int = 100_000,
        keep: int = 1024,
    ) -> None:
        limits = {"per_instance": per_instance, "max_attempts": max_attempts, "max_kills": max_kills}
        for name, value in (limits | {"max_open": max_open, "keep": keep}).items():
            if type(value) is not int or value < 1:
                raise SpecError(f"{name} is {value!r:.80}; it must be a whole number of at least 1")
        self._endpoints = endpoints
        self._http = http
        self._clock = clock
        self._record = Record(journal, clock, fleet)
        self._lanes = Lanes(per_instance)
        self._max_attempts = max_attempts
        self._max_kills = max_kills
        self._timeout = period_of(timeout, "timeout")
        self._max_open = max_open
        self._keep = keep
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._flights: dict[str, set[Flight]] = {}
        self._results: OrderedDict[str, Job] = OrderedDict()
        self._line: deque[anyio.Event] = deque()
        self._looked = anyio.Event()
        self._group: TaskGroup | None = None

    # ------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise OperationRefused("this dispatcher is open already")
        self._look()
        self._group = await anyio.create_task_group().__aenter__()
        self._group.start_soon(self._watch)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        group, self._group = self._group, None
        assert group is not None
        try:
            return await end_loops(group, kind, error, trace)
        finally:
            for job in self._jobs.values():
                job.done.set()  # without a result: whoever waits is told that the dispatcher was closed
            self._jobs.clear()
            self._queue.clear()
            while self._line:
                self._line.popleft().set()

    async def recover(self) -> int:
        """Take up the tasks that the journal says are open; call it once the endpoints have been observed.

        A task that was with an instance which still exists is asked for there, and not run a second time. The others
        wait in front of those submitted since. Returns how many tasks were taken up.

        Raises:
            JournalError: The journal cannot be read or makes no sense.
        """
        await anyio.lowlevel.checkpoint()
        past, ended = self._record.replay()
        for result in ended:
            if result.id not in self._results:
                self._keep_result(Job(result.id, "null"), result)
        self._look()
        waiting: list[Job] = []
        fresh = [found for id, found in past.items() if id not in self._jobs]  # not submitted again since the start
        for found in fresh:
            job = found.job
            self._jobs[job.id] = job
            if found.instance is None:
                waiting.append(job)
            elif self._endpoints.exists(found.instance):
                lane = self._lanes.get(found.instance) or self._lanes.known(found.instance, found.address or "", None)
                self._launch(Flight(job, lane, resume=True))
            else:
                self._died(job, found.instance)
        for job in reversed(waiting):
            self._wait_in_line(job, first=True)
        self._pump()
        return len(fresh)

    # ------------------------------------------------------------------------------------ what callers use

    @property
    def depth(self) -> int:
        """Tasks waiting and in flight: the queue length to scale on."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Tasks that are with no instance."""
        return len(self._queue)

    def in_flight(self, id: str) -> int:
        """Tasks that the instance has."""
        return len(self._flights.get(id, ()))

    async def submit(self, id: str, payload: object) -> Result:
        """Do a task and wait for its end; waits for room first when `max_open` tasks are open.

        An id that is open, or has ended lately, is not run again: its result is returned. A cancelled caller does not
        cancel the task.

        Raises:
            SpecError: The id or the payload cannot be sent.
            OperationRefused: The dispatcher is not open, or was closed before the task ended.
            JournalError: The task could not be recorded, and so was not taken.
        """
        while self._group and len(self._jobs) >= self._max_open and id not in self._jobs and id not in self._results:
            await self._wait_for_room()
        return await self.submit_nowait(id, payload).result()

    def submit_nowait(self, id: str, payload: object) -> Submission:
        """Take a task on and return at once; see `submit`. Refuses when `max_open` tasks are open."""
        if self._group is None:
            raise OperationRefused("the dispatcher is not open; use it as `async with`")
        known = self._jobs.get(id) or self._results.get(id)
        if known is not None:
            return Submission(known)
        if len(self._jobs) >= self._max_open:
            raise OperationRefused(f"{self._max_open} tasks are open already; wait for some to end, or use submit()")
        job = new_job(id, payload)
        self._record.submitted(job, payload)
        self._jobs[id] = job
        self._wait_in_line(job)
        self._pump()
        return Submission(job)

    async def _wait_for_room(self) -> None:
        turn = anyio.Event()
        self._line.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn in self._line:
                self._line.remove(turn)
            else:
                self._call_next()  # the room was ours, and we do not take it
            raise

    def _call_next(self) -> None:
        if self._line:
            self._line.popleft().set()

    # ------------------------------------------------------------------------------------ instances

    async def _watch(self) -> None:
        while True:
            self._look()  # before the first wait too: the fleet may have changed since this task was created
            self._pump()
            await self._endpoints.changed()

    def _look(self) -> None:
        """Take over the endpoints as they are. No await in here: nothing may change between looking and waiting."""
        serving = set()
        for id in self._endpoints:
            target = self._endpoints[id]
            serving.add(id)
            self._lanes.open(id, target.address, target.token)
        for lane in self._lanes:
            if lane.id not in serving:
                self._lanes.close(lane)
                if not self._endpoints.exists(lane.id):
                    self._lanes.forget(lane)
                    self._abandon(lane)
        self._looked.set()
        self._looked = anyio.Event()

    def _abandon(self, lane: Lane) -> None:
        """The instance is gone: hand its tasks on, but listen a little longer for answers already on their way."""
        for flight in self._flights.get(lane.id, ()):
            if not flight.abandoned:
                flight.abandoned = True
                flight.scope.deadline = anyio.current_time() + _LATE
                self._died(flight.job, lane.id)

    def _leave_alone(self, lane: Lane, seconds: float) -> None:
        if self._group is not None and lane.serving and not lane.resting:
            self._lanes.rest(lane, resting=True)
            self._group.start_soon(self._rest, lane, seconds)

    async def _rest(self, lane: Lane, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._lanes.rest(lane, resting=False)
        self._pump()

    # ------------------------------------------------------------------------------------ tasks

    def _wait_in_line(self, job: Job, *, first: bool = False) -> None:
        (self._queue.appendleft if first else self._queue.append)(job)

    def _pump(self) -> None:
        """Send what waits, while an instance has room."""
        while self._queue and self._group is not None:
            job = self._queue[0]
            lane = None if job.result else self._lanes.least(avoid=job.last)
            if lane is None and job.result is None:
                return
            self._queue.popleft()
            if lane is not None:  # otherwise a late answer ended it while it waited
                self._launch(Flight(job, lane))

    def _launch(self, flight: Flight) -> None:
        assert self._group is not None, "tasks are taken by an open dispatcher only"
        job, lane = flight.job, flight.lane
        job.last = lane.id
        self._lanes.take(lane, 1)
        self._flights.setdefault(lane.id, set()).add(flight)
        if not flight.resume:
            seq = self._record.assigned(job, lane.id, lane.address)
            if self._record.due(seq, len(self._jobs)):
                self._record.checkpoint(self._open())
        self._group.start_soon(self._fly, flight)

    def _open(self) -> Iterator[Past]:
        flying = {
            flight.job.id: flight for flights in self._flights.values() for flight in flights if not flight.abandoned
        }
        for job in self._jobs.values():
            flight = flying.get(job.id)
            yield Past(job) if flight is None else Past(job, flight.lane.id, flight.lane.address)

    async def _fly(self, flight: Flight) -> None:
        end: Result | Fate = Fate.DIED
        try:
            with flight.scope:
                end = await fly(flight, self._http, self._clock, self._timeout)
                while end is Fate.BARRED:
                    # without its token it cannot be asked: until it serves again, or is gone and so abandoned
                    if flight.asked != flight.lane.door:
                        end = await fly(flight, self._http, self._clock, self._timeout)
                    else:
                        await self._looked.wait()
        finally:
            self._land(flight)
        self._settle(flight, end)
        self._pump()

    def _land(self, flight: Flight) -> None:
        lane = flight.lane
        self._lanes.take(lane, -1)
        flights = self._flights[lane.id]
        flights.discard(flight)
        if not flights:
            del self._flights[lane.id]

    def _settle(self, flight: Flight, end: Result | Fate) -> None:
        job, lane = flight.job, flight.lane
        if isinstance(end, Result):
            self._answered(flight, end)
        elif flight.abandoned:
            return  # handed on when the instance went
        elif end is Fate.DIED:
            self._died(job, lane.id)
        else:
            # not a try: the task did not run, or was given back; nobody is to be asked for it after a crash
            lane.silences = lane.silences + 1 if end is Fate.UNREACHED else 0
            self._leave_alone(lane, min(flight.rest * 2.0 ** min(lane.silences, 10), _REST_LIMIT))
            self._hand_on(job, lane.id, end.value)

    def _answered(self, flight: Flight, result: Result) -> None:
        """An agent's own answer: the end, unless it is a failure and the task may try again."""
        job = flight.job
        flight.lane.silences = 0
        if job.result is not None:
            self._record.write("task.duplicate", flight.lane.id, id=job.id, attempt=flight.attempt, ok=result.ok)
            return
        if not result.ok:
            if flight.abandoned:
                return  # it has been handed on already
            job.failures += 1
            if job.failures < self._max_attempts and result.cause != "timeout":
                job.attempt += 1
                self._hand_on(job, flight.lane.id, result.cause or "failed")
                return
        self._record.completed(result)
        self._end(job, result)

    def _died(self, job: Job, instance: str) -> None:
        """The instance was gone before it answered: hand the task on, unless it has done this too often."""
        if job.result is not None:
            return
        job.kills.append(instance)
        if len(job.kills) < self._max_kills:
            job.attempt += 1
            self._hand_on(job, instance, "instance-gone")
            return
        error = f"task {job.id} was with {len(job.kills)} instances that died: {', '.join(job.kills)}"
        self._record.write(
            "task.quarantined",
            instance,
            id=job.id,
            attempt=job.attempt,
            kills=job.kills,
            cause="quarantined",
            error=error,
        )
        self._end(job, Result(job.id, ok=False, cause="quarantined", error=error, attempt=job.attempt))

    def _hand_on(self, job: Job, instance: str, cause: str) -> None:
        self._record.write(
            "task.retried",
            instance,
            id=job.id,
            attempt=job.attempt,
            cause=cause,
            kills=list(job.kills),
            failures=job.failures,
        )
        self._wait_in_line(job, first=True)

    def _end(self, job: Job, result: Result) -> None:
        self._jobs.pop(job.id, None)
        self._keep_result(job, result)
        self._call_next()

    def _keep_result(self, job: Job, result: Result) -> None:
        job.result = result
        job.done.set()
        job.payload = "null"  # not needed any more, and it may be large
        self._results[job.id] = job
        while len(self._results) > self._keep:
            self._results.popitem(last=False)
