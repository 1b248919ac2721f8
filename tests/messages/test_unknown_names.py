"""A name that nobody knows: the nearest right spelling, and the names there are."""

from __future__ import annotations

import pytest

import adaptc
from adaptc.errors import unknown

PASSES = ["factor", "fold", "insert"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            unknown("pass", "fodl", PASSES),
            "unknown pass 'fodl'; did you mean 'fold'? known: factor, fold, insert",
        ),
        (unknown("pass", "xyz", PASSES), "unknown pass 'xyz'; known: factor, fold, insert"),
        (unknown("pass", 3, PASSES, listed=["fold"]), "unknown pass 3; known: fold"),
        (unknown("pass", "fodl", PASSES, listed=()), "unknown pass 'fodl'; did you mean 'fold'?"),
        (unknown("pass", None, PASSES, listed=()), "unknown pass nothing"),
        (
            unknown("task", "merge", PASSES, close=["fold", "factor"]),
            "unknown task 'merge'; did you mean 'fold' or 'factor'? known: factor, fold, insert",
        ),
    ],
)
def test_one_wording_for_all(message: str, expected: str) -> None:
    assert message == expected


def test_a_pass_of_python_that_nobody_wrote() -> None:
    with pytest.raises(AttributeError, match=r"unknown pass 'Fodl'; did you mean 'Fold'\? known: .*Factor.*"):
        adaptc.passes.Fodl  # noqa: B018
