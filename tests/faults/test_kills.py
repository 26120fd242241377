"""A few kills in every run of the tests, sixty in the slow ones; see kills.py."""

import pytest

from faults.kills import SETTINGS, survive


@pytest.mark.parametrize("setting", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_nothing_had_been(tmp_path, setting):
    (row,) = survive(2, tmp_path, seed=setting, settings=[SETTINGS[setting]])
    assert row["kills"] == 2 and row["runs_compared"] >= 1


@pytest.mark.slow
def test_sixty_kills(tmp_path):
    rows = survive(60, tmp_path, seed=0)
    assert sum(row["kills"] for row in rows) == 60 and sum(row["in_the_middle_of_a_save"] for row in rows) >= 5
