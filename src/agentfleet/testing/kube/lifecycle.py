"""How pods on a fake node live: pulled, started, ready, crashed, backed off, restarted, ended. No API in here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from agentfleet.testing.kube.behaviour import Timing
from agentfleet.testing.kube.podagent import PodAgent, Vitals
from agentfleet.testing.kube.podrun import PodRun, Stage

_STEADY = 2  # a container that ran so many times the longest back-off has its crashes forgiven, as a kubelet does


class Listener(Protocol):
    """Who is told what happens."""

    def changed(self, run: PodRun) -> None:
        """Its status is another now."""

    def warned(self, run: PodRun, reason: str, message: str) -> None:
        """A kubelet would write a Warning event about this."""

    def lost_work(self, run: PodRun) -> None:
        """It was ended while work was in flight."""

    def look_up(self, run: PodRun) -> None:
        """Ask the API server for what its variables come from; `Lifecycle.looked_up` gets the answer."""


class Lifecycle:
    """Moves pods from stage to stage, by timers of the running event loop."""

    def __init__(self, timing: Timing, listener: Listener) -> None:
        self._timing = timing
        self._listener = listener

    # ------------------------------------------------------------------------------------------------ up

    def begin(self, run: PodRun) -> None:
        """Pull the image and start the containers."""
        self._cancel(run)
        pull = run.behaviour.pull
        if pull is None:
            image = run.view.spec.containers[run.lead].image
            run.stage, run.message = Stage.PULL_FAILED, f'failed to pull and unpack image "{image}": not found'
            self._listener.warned(run, "Failed", f'Failed to pull image "{image}": not found')
            self._later(run, self._timing.pull_backoff, self._back_off_pull)
            self._listener.changed(run)
            return
        run.stage, run.message = Stage.CREATING, ""
        wait = pull + run.behaviour.start
        if wait > 0:
            self._listener.changed(run)  # otherwise the first report is that it runs
        self._later(run, wait, self._start)

    def _back_off_pull(self, run: PodRun) -> None:
        image = run.view.spec.containers[run.lead].image
        run.stage, run.message = Stage.PULL_BACKOFF, f'Back-off pulling image "{image}"'
        self._listener.warned(run, "BackOff", run.message)
        self._listener.changed(run)

    def _start(self, run: PodRun) -> None:
        if run.stopping or run.stage is Stage.STOPPED:
            return
        if run.view.needs:
            self._listener.look_up(run)
        else:
            self._launch(run)

    def looked_up(self, run: PodRun, turn: int, missing: Mapping[int, str]) -> None:
        """What its containers cannot be made without is there, but for what is missing; asked in that turn of its.

        A kubelet looks again until all is there, and then makes them.
        """
        if turn != run.turn or run.stopping or run.stage is Stage.STOPPED:
            return
        if not missing:
            self._launch(run)
            return
        self._later(run, self._timing.restart, self._start)
        if (run.stage, run.missing) == (Stage.CONFIG_FAILED, missing):
            return
        run.stage, run.missing = Stage.CONFIG_FAILED, missing
        for why in missing.values():
            self._listener.warned(run, "Failed", f"Error: {why}")
        self._listener.changed(run)

    def _launch(self, run: PodRun) -> None:
        image = run.view.spec.containers[run.lead].image
        run.vitals = Vitals(version=image.rpartition(":")[2], task_seconds=run.behaviour.task)
        run.vitals.changed = lambda: self._finish_if_idle(run)
        run.decreed = None
        agent = PodAgent(run.vitals)
        try:
            agent.listen(run.address, run.ports)
        except OSError as error:
            agent.close()
            run.stage, run.message = Stage.START_FAILED, f"cannot listen on {run.address}: {error}"
            self._later(run, self._timing.restart, self._start)
            self._listener.changed(run)
            return
        run.agent = agent
        run.started()
        behaviour = run.behaviour
        if behaviour.ready == 0:
            run.app_ready = True
        elif behaviour.ready is not None:
            self._later(run, behaviour.ready, self._become_ready)
        run.vitals.ready = run.app_ready
        if behaviour.crash is not None:
            self._later(run, behaviour.crash, self._crash_as_told)
        self._later(run, self._timing.backoff_cap * _STEADY, self._forgive)
        self._listener.changed(run)

    def _become_ready(self, run: PodRun) -> None:
        run.app_ready = run.vitals.ready = True
        self._listener.changed(run)

    @staticmethod
    def _forgive(run: PodRun) -> None:
        run.streak = 0

    # ------------------------------------------------------------------------------------------------ down

    def _crash_as_told(self, run: PodRun) -> None:
        self.crash(run, run.behaviour.exit_code, run.behaviour.reason)

    def crash(self, run: PodRun, exit_code: int, reason: str) -> None:
        """The leading container ends by itself; what follows is its pod's restart policy."""
        if run.stage is not Stage.RUNNING or run.stopping:
            return
        self._silence(run)
        policy = run.view.spec.restart_policy
        if policy == "Never" or (policy == "OnFailure" and exit_code == 0):
            run.crashed(exit_code, reason, Stage.ENDED)
        else:
            run.crashed(exit_code, reason, Stage.CRASHED)
            run.streak += 1
            timing = self._timing
            if run.streak == 1:
                self._later(run, timing.restart, self._restart)
            else:
                wait = min(timing.backoff_cap, timing.backoff * 2 ** (run.streak - 2))
                self._later(run, min(timing.restart, wait), self._back_off, wait)
        self._listener.changed(run)

    def _back_off(self, run: PodRun, wait: float) -> None:
        name = run.view.spec.containers[run.lead].name
        run.stage = Stage.BACKOFF
        run.message = f"back-off {wait:g}s restarting failed container={name} pod={run.view.metadata.name}"
        self._listener.warned(run, "BackOff", "Back-off restarting failed container")
        self._later(run, wait, self._restart)
        self._listener.changed(run)

    def _restart(self, run: PodRun) -> None:
        run.restarts += 1
        self._start(run)

    def stop(self, run: PodRun, grace: float) -> None:
        """The pod is deleted: it is told to end, and killed when `grace` seconds are over."""
        if run.stopping:
            if grace < run.grace:  # deleted once more, in more of a hurry
                run.grace = grace
                self._later(run, grace, self.kill)
            return
        run.stopping, run.grace = True, grace
        run.vitals.draining = True
        if run.stage is not Stage.RUNNING or grace <= 0:
            self.kill(run)
            return
        self._cancel(run)
        self._later(run, grace, self.kill)
        self._finish_if_idle(run)

    def _finish_if_idle(self, run: PodRun) -> None:
        if run.stopping and run.stage is Stage.RUNNING and run.vitals.in_flight == 0:
            self._later(run, run.behaviour.stop, self._kill_if_idle)

    def _kill_if_idle(self, run: PodRun) -> None:
        if run.vitals.in_flight == 0:
            self.kill(run)

    def kill(self, run: PodRun) -> None:
        """It ends now, for good."""
        if run.stage is Stage.STOPPED:
            return
        if run.stage is Stage.RUNNING and run.vitals.in_flight:
            self._listener.lost_work(run)
        run.stopping = True
        self._silence(run)
        run.stage = Stage.STOPPED
        self._listener.changed(run)

    def pardon(self, run: PodRun) -> None:
        """It crashes no more. One that runs goes on; one in back-off is restarted when that is over, as always."""
        if run.stage is Stage.RUNNING and not run.stopping:
            self._cancel(run)
            if not run.app_ready and run.behaviour.ready is not None:
                self._later(run, run.behaviour.ready, self._become_ready)

    def _silence(self, run: PodRun) -> None:
        self._cancel(run)
        run.vitals.changed = lambda: None
        if run.agent is not None:
            run.agent.close()
            run.agent = None

    # ------------------------------------------------------------------------------------------------ time

    @staticmethod
    def _later(run: PodRun, wait: float, act: Callable[..., None], *arguments: float) -> None:
        if wait <= 0:
            act(run, *arguments)
            return
        loop = asyncio.get_running_loop()
        run.timers = [timer for timer in run.timers if timer.when() > loop.time() and not timer.cancelled()]
        run.timers.append(loop.call_later(wait, act, run, *arguments))

    @staticmethod
    def _cancel(run: PodRun) -> None:
        run.turn += 1
        for timer in run.timers:
            timer.cancel()
        run.timers.clear()
