"""Rows that are read before a step asks for them are those that it would have found."""

import pytest
import torch

from gif.errors import DamagedFileError
from gif.files import map_tensor, save_tensors
from gif.vectors.staging import Stage

M, WIDTH = 40, 6
CPU = torch.device("cpu")


def table():
    return torch.randn(M, WIDTH, generator=torch.Generator().manual_seed(0))


def batches(number, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(M, generator=generator)[:15].sort().values for _ in range(number)]


def step(values, number):
    return torch.nn.functional.normalize(values + number, dim=1)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_steps_are_those_of_a_table_that_waits(ahead):
    """Rows are asked for up to three steps ahead, and moved by the steps between."""
    wanted, given = table(), table()
    rows = batches(20)
    for number, some in enumerate(rows):
        wanted[some] = step(wanted[some], number)
    stage = Stage(given, CPU)
    staged = [stage.stage(some) for some in rows[:ahead]]
    for number in range(len(rows)):
        current = staged.pop(0)
        if number + ahead < len(rows):
            staged.append(stage.stage(rows[number + ahead]))
        values = current.values()
        assert current.values() is values
        current.give_back(step(values, number))
    stage.settle()
    assert torch.equal(given, wanted)


def test_what_was_asked_for_and_not_used_changes_nothing():
    given = table()
    stage = Stage(given, CPU)
    first, dropped, second = (stage.stage(rows) for rows in batches(3))
    first.give_back(step(first.values(), 0))
    del dropped
    values = second.values()
    second.give_back(values)
    stage.settle()
    wanted = table()
    wanted[first.rows] = step(wanted[first.rows], 0)
    assert torch.equal(given, wanted)


def test_a_step_that_moves_none_of_these_rows():
    """As on a process that owns none of a step's, while the next one's rows are being read."""
    stage = Stage(table(), CPU)
    nobody, later = stage.stage(torch.arange(0)), stage.stage(torch.tensor([1, 4]))
    nobody.give_back(nobody.values())
    assert torch.equal(later.values(), table()[[1, 4]])
    stage.settle()


def test_values_stay_what_a_step_has_seen():
    """A forward pass that is repeated, after the rows have moved, reads what it read."""
    stage = Stage(table(), CPU)
    rows = torch.arange(5)
    staged = stage.stage(rows)
    values = staged.values().clone()
    staged.give_back(step(values, 1))
    stage.settle()
    assert torch.equal(staged.values(), values)


def test_reading_does_not_wait_for_the_step():
    """What is read while the caller does something else: here it never takes the rows."""
    stage = Stage(table(), CPU)
    staged = stage.stage(torch.arange(3))
    assert staged._reading.result(timeout=10).shape == (3, WIDTH)


def test_a_disk_that_fails_is_an_error(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"vectors": torch.randn(4000, WIDTH)}, format="t")
    mapped = map_tensor(path, "vectors", format="t", writable=True)
    stage = Stage(mapped, CPU, mapped=True)
    staged = stage.stage(torch.arange(3))
    staged.values()
    path.open("r+b").truncate(100)
    staged.give_back(torch.zeros(3, WIDTH))
    with pytest.raises(DamagedFileError, match="was shortened while it was in use"):
        stage.settle()
    with pytest.raises(DamagedFileError, match="was shortened while it was in use"):
        stage.stage(torch.arange(3)).values()


def test_moved_rows_reach_a_mapped_file(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"vectors": table()}, format="t")
    stage = Stage(map_tensor(path, "vectors", format="t", writable=True), CPU, mapped=True)
    staged = stage.stage(torch.tensor([3, 7]))
    staged.give_back(staged.values() + 1)
    stage.settle()
    changed = map_tensor(path, "vectors", format="t") - table()
    assert torch.equal(changed.ne(0).any(1).nonzero()[:, 0], torch.tensor([3, 7]))
