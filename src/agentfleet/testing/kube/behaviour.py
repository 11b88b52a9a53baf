"""How the containers of an image behave on fake nodes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What happens when a container of an image is started. Times are seconds.

    Attributes:
        pull: How long the image takes to pull; None: it never arrives (ErrImagePull, then ImagePullBackOff).
        start: From the pulled image to the running container.
        ready: From running to ready; None: never.
        crash: From running to its crash, each time it is started; None: it does not.
        exit_code: What it crashes with.
        reason: "Error", "OOMKilled", or "Completed".
        stop: From SIGTERM to its end, when no work is in flight. While there is, it goes on until its grace is over.
        task: How long a task takes that it is given over HTTP.
    """

    pull: float | None = 0.0
    start: float = 0.0
    ready: float | None = 0.0
    crash: float | None = None
    exit_code: int = 1
    reason: str = "Error"
    stop: float = 0.0
    task: float = 0.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds.

    Attributes:
        restart: From a first crash to the restart; from one look for a missing Secret or ConfigMap to the next.
        backoff: The first back-off of a crash-loop; it doubles.
        backoff_cap: Its longest.
        pull_backoff: From ErrImagePull to ImagePullBackOff.
    """

    restart: float = 1.0
    backoff: float = 10.0
    backoff_cap: float = 300.0
    pull_backoff: float = 1.0


class Rules:
    """Behaviours by patterns of image names, the newest first."""

    def __init__(self, default: Behaviour) -> None:
        self._default = default
        self._rules: dict[str, Behaviour] = {}

    def set(self, pattern: str, behaviour: Behaviour | None) -> None:
        """Give images that match a shell pattern a behaviour; None takes the rule back."""
        self._rules.pop(pattern, None)
        if behaviour is not None:
            self._rules = {pattern: behaviour} | self._rules

    def choose(self, images: list[str]) -> tuple[int, Behaviour]:
        """The first rule that any of a pod's images matches, and which image that is."""
        for pattern, behaviour in self._rules.items():
            for index, image in enumerate(images):
                if fnmatchcase(image, pattern):
                    return index, behaviour
        return 0, self._default
