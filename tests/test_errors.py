"""One hierarchy; each class is public, documented, and also the built-in that a caller would expect."""

from __future__ import annotations

import pytest

from agentfleet import errors
from agentfleet.errors import AgentFleetError

ALL = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_one_hierarchy(error: type[Exception]) -> None:
    assert issubclass(error, AgentFleetError)
    assert error.__doc__
    assert errors.__doc__ is not None
    assert f" {error.__name__} " in errors.__doc__.replace("\n", " ").replace("`", " ")
    assert str(error("what happened")) == "what happened"
    if error is not AgentFleetError:
        assert error.__module__ == "agentfleet"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.SpecError, ValueError),
        (errors.DeadlineExceeded, TimeoutError),
        (errors.MissingExtra, ImportError),
        (errors.ConfigInvalid, ValueError),
        (errors.ConfigNotFound, LookupError),
    ],
)
def test_expected_builtins(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)


def test_a_subclass_of_a_user_keeps_working() -> None:
    class Mine(errors.BackendUnavailable):
        """A backend's own."""

    with pytest.raises(errors.BackendError):
        raise Mine("not now")
