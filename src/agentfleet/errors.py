"""The one error hierarchy: everything agentfleet raises on purpose is an `AgentFleetError`.

::

    AgentFleetError
    ├── SpecError            the request itself is wrong: change it, nothing was done
    ├── OperationRefused     the request is fine, the fleet's present state forbids it
    │   ├── NotLeader        another manager leads this fleet now, or may: it acts, this one must not
    │   └── KeyReused            the idempotency key stands for another request: use a new one
    ├── NotFound             there is no such fleet or operation (any more)
    ├── AccessDenied         the token is not known, or may not do that: use another
    ├── RolloutFailed        the new revision does not work; the message says why and what runs now
    ├── DeadlineExceeded     an outside party did not answer in time; the outcome may be unknown
    ├── MissingExtra         an optional dependency is not installed; the message names the extra
    ├── BackendError         the engine that runs instances
    │   ├── BackendUnavailable   it cannot be reached now: retry later, conclude nothing
    │   │   └── RecordUnreadable     … or a newer version wrote it: upgrade this manager, or ask another one
    │   ├── BackendRefused       it answered no (quota, bad command): a retry alone will not help
    │   ├── Conflict             the decision was made on an old state: observe again
    │   │   └── Outdated             … and what has changed has not even been seen yet: wait until it is
    │   └── InstanceGone         the instance does not exist (any more)
    ├── ConfigError          the configuration store
    │   ├── ConfigInvalid        the document fails its schema: the message names the field
    │   ├── ConfigConflict       another writer was first: read the newer revision and retry
    │   └── ConfigNotFound       no such key or revision
    └── JournalError         a record could not be written or read back

Bad values in a spec's constructor raise `pydantic.ValidationError` (a `ValueError` that lists every field);
text formats (`from_yaml`, `from_json`) raise `SpecError` with the same lines.
"""

from __future__ import annotations


class AgentFleetError(Exception):
    """Base of every error agentfleet raises on purpose. Never raised itself."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = "agentfleet"  # tracebacks show the name users import


class SpecError(AgentFleetError, ValueError):
    """What was asked for is wrong; the message names the field and the fix. Nothing was changed."""


class OperationRefused(AgentFleetError):
    """The fleet cannot do this in its present state; the message says which state and what to do first."""


class NotLeader(OperationRefused):
    """This manager does not lead the fleet now, or not for long enough: nothing was sent. Whoever leads will act."""


class KeyReused(OperationRefused):
    """The idempotency key was used for another request. Nothing was changed; use a new key for each request."""


class NotFound(AgentFleetError, LookupError):
    """There is no such fleet or operation; the message names it. Nothing was changed."""


class AccessDenied(AgentFleetError):
    """Who asks is not known, or may not do that; the message says what is needed. Nothing was changed."""


class RolloutFailed(AgentFleetError):
    """A revision could not be rolled out. The message says why, and which revision the fleet runs now."""


class DeadlineExceeded(AgentFleetError, TimeoutError):
    """An outside party did not answer within its deadline. The effect of the call is unknown."""


class MissingExtra(AgentFleetError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class BackendError(AgentFleetError):
    """The engine that runs the instances failed. Subclasses say whether a retry can help."""


class BackendUnavailable(BackendError):
    """The engine cannot be reached. Retry with back-off; draw no conclusion about the instances."""


class RecordUnreadable(BackendUnavailable):
    """A newer version has written what is kept of this fleet or operation: ask another manager, or upgrade this one."""


class BackendRefused(BackendError):
    """The engine understood and said no. Retrying the same request will not help by itself."""


class Conflict(BackendError):
    """The object changed since it was observed. Observe again and decide again."""


class Outdated(Conflict):
    """It would have undone what somebody else did and nobody here has seen yet. Wait until it is seen, decide anew."""


class InstanceGone(BackendError):
    """The instance does not exist any more. Nothing is left to do to it."""


class ConfigError(AgentFleetError):
    """The configuration store refused or failed."""


class ConfigInvalid(ConfigError, ValueError):
    """The document fails validation; the message names each field. Nothing was stored."""


class ConfigConflict(ConfigError):
    """Another writer stored a newer revision first. Read it, merge, and try again."""


class ConfigNotFound(ConfigError, LookupError):
    """There is no such document or revision."""


class JournalError(AgentFleetError):
    """The journal could not be written or read. The fleet stops acting rather than act unrecorded."""
