"""What is looked at of many things."""

import itertools

import pytest

from gif.spacing import evenly_spaced


@pytest.mark.parametrize("total", [2, 7, 1000, 2**24 + 3, 42_474_558, 64_000_000, 2**40 + 1])
@pytest.mark.parametrize("most", [2, 5, 256])
def test_places_are_inside_and_evenly_apart(total, most):
    places = evenly_spaced(total, most)
    assert len(places) == min(total, most) and places[0] == 0 and places[-1] == total - 1
    steps = {after - before for before, after in itertools.pairwise(places)}
    assert min(steps) >= 1 and max(steps) - min(steps) <= 1


def test_of_nothing_and_of_one():
    assert evenly_spaced(0, 5) == [] and evenly_spaced(1, 5) == [0] == evenly_spaced(9, 1)
