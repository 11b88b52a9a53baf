"""A fleet of well instances that a lossy network and their own pauses make look ill: how often does health fall for it?

Every failed probe that could matter is shown to `core.health.decide`. Probes that pass are skipped, and so is a failure
between two of them, because the next success wipes it out: of 43 million probes a day that leaves a few ten thousand.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from agentfleet.core.health import HealthMemory, Probed, Seen, decide
from agentfleet.instances import HealthState, Phase
from agentfleet.specs import HealthPolicy, HttpCheck

HOUR = 3600.0


@dataclass(frozen=True)
class Troubles:
    """What happens to every instance, independently of all others."""

    loss: float = 0.01
    """Share of probes that get no answer, each independently of all others."""
    pauses_an_hour: int = 1
    """At uniformly distributed instants."""
    longest: float = 8.0
    """A pause takes up to this many seconds, uniformly distributed; who is asked meanwhile answers at its end."""


@dataclass
class Alarms:
    """What came of it. All instances were well all the time, so every verdict is false."""

    probes: int = 0
    unconfirmed: int = 0
    """Times that failures reached the threshold: the verdicts of a rule that asks for no confirmation."""
    verdicts: int = 0
    """Times that an instance was found unhealthy."""


def watch(check: HttpCheck, troubles: Troubles, *, instances: int, hours: int, seed: int = 0) -> Alarms:
    """Watch that many instances for so long."""
    alarms = Alarms()
    for number in range(instances):
        _Subject(check, troubles, alarms, random.Random(f"{seed}/{number}")).live(hours)
    return alarms


class _Subject:
    """One well instance."""

    def __init__(self, check: HttpCheck, troubles: Troubles, alarms: Alarms, rng: random.Random) -> None:
        assert check.failures > 1, "with one failure as threshold a single lost probe matters, and may not be skipped"
        self.check = check
        self.policy = HealthPolicy(checks=(check,))
        self.troubles = troubles
        self.alarms = alarms
        self.rng = rng
        self.pause = (0.0, 0.0)
        _, self.memory = decide(self.policy, Seen(Phase.RUNNING, 0.0, started_at=0.0), HealthMemory(), 0.0)
        self.show(0.0, ok=True)
        self.well = self.memory

    def live(self, hours: int) -> None:
        """Go from one failed probe to the next."""
        end, period = hours * HOUR, self.check.period
        self.alarms.probes += int(end / period)
        pauses = self.pauses(hours)
        self.pause = next(pauses)
        slot = 0
        while slot * period < end:
            lost = slot + self.until_lost()
            paused = math.ceil(self.pause[0] / period)
            if paused < slot:
                self.pause = next(pauses)
            elif paused <= lost:  # what is lost from there on is drawn anew: the losses have no memory
                slot = self.fail(paused, lost=self.is_lost())
                self.pause = next(pauses)
            else:
                slot = self.fail(lost, lost=True)

    def pauses(self, hours: int) -> Iterator[tuple[float, float]]:
        """When each begins and ends; of an equal share of an hour each has one."""
        share = HOUR / self.troubles.pauses_an_hour
        for number in range(hours * self.troubles.pauses_an_hour):
            length = self.rng.uniform(0.0, self.troubles.longest)
            begin = number * share + self.rng.uniform(0.0, share - length)
            yield begin, begin + length
        yield 2 * hours * HOUR, 2 * hours * HOUR  # beyond the end

    def until_lost(self) -> int:
        """How many probes arrive before the next one that does not."""
        return int(math.log(1.0 - self.rng.random()) / math.log(1.0 - self.troubles.loss))

    def is_lost(self) -> bool:
        return self.rng.random() < self.troubles.loss

    def fail(self, slot: int, *, lost: bool) -> int:
        """Play the probes from a slot on, until one passes or the verdict falls; the first slot after that."""
        period, timeout = float(self.check.period), self.check.deadline
        at, failed = slot * period, 0
        while lost or self.is_silent(at):
            failed += 1
            at, judged = self.ended(at + timeout, failed)
            if judged:
                break
            lost = self.is_lost()
        self.memory = self.well
        return max(slot, math.floor(at / period)) + 1

    def is_silent(self, at: float) -> bool:
        """Whether a question comes too early in a pause to be answered in time."""
        begin, end = self.pause
        return begin <= at < end - self.check.deadline

    def ended(self, now: float, failed: int) -> tuple[float, bool]:
        """A probe has failed: when the next one is asked, and whether the verdict has fallen."""
        again = False
        if failed == 2:
            self.show(now - self.check.period, ok=False)  # the first, which did not matter until now
        if failed > 1:
            state, again = self.show(now, ok=False)
            self.alarms.unconfirmed += again
            if state is HealthState.UNHEALTHY:
                self.alarms.verdicts += 1
                return now, True
        period, asked = self.check.period, now - self.check.deadline
        return now if again else max(now, (math.floor(asked / period) + 1) * period), False

    def show(self, now: float, *, ok: bool) -> tuple[HealthState, bool]:
        """Have the instance judged."""
        error = None if ok else "no answer"
        latency = 0.001 if ok else self.check.deadline
        verdict, self.memory = decide(self.policy, Probed(0, ok, now, latency, 0.0, error), self.memory, now)
        return verdict.state, verdict.again
