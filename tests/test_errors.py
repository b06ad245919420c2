from __future__ import annotations

import pickle

import pytest

from dydit import errors


def test_a_message_is_one_line_of_seen_expected_remedy() -> None:
    error = errors.DyditError("two\n  lines", expected="one  line", remedy="join\tthem")
    assert str(error) == "two lines; expected one line; join them"
    assert str(errors.DyditError("seen")) == "seen"
    assert str(errors.DyditError("seen", remedy="act")) == "seen; act"


@pytest.mark.parametrize("name", [n for n in vars(errors) if n.endswith("Error")])
def test_every_error_is_a_value_error_and_survives_pickling(name: str) -> None:
    error = getattr(errors, name)("seen", expected="this", remedy="do that")
    assert isinstance(error, ValueError) and isinstance(error, errors.DyditError)
    copy = pickle.loads(pickle.dumps(error))  # worker processes hand errors over so
    assert type(copy) is type(error) and str(copy) == str(error)
