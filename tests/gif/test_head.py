"""Heads of a user's own: what the training loop asks of them, by the example in docs/training.md."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gif
from gif.backbones import BackboneConfig
from gif.data import IdentityImages
from gif.errors import InputError
from gif.head import as_head
from gif.training import TrainingConfig, check_training, train
from gif.training import loop as loop_module

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"
BACKBONE = BackboneConfig(embedding_size=16, image_size=16, width=4)
CONFIG = TrainingConfig(epochs=2, batch_size=8, save_steps=2, keep=9)
IDENTITIES = 40


def center_loss() -> Any:
    """The head of the document, as it stands there."""
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)
    return scope["CenterLoss"](IDENTITIES, 16)


@pytest.fixture(scope="module")
def dataset() -> IdentityImages:
    labels = torch.arange(IDENTITIES)
    pixels = torch.randint(0, 256, (IDENTITIES, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return IdentityImages(pixels.to(torch.uint8), labels, [str(i) for i in range(IDENTITIES)])


def run(dataset: IdentityImages, seed: int = 0, config: TrainingConfig = CONFIG, **options: Any) -> dict[str, Any]:
    """What a run leaves behind: losses, weights, centres."""
    torch.manual_seed(seed)
    backbone, head = BACKBONE.build(), center_loss()
    log = train(backbone, head, dataset, config, **options)
    return {"losses": log.losses, "centers": head.centers, **backbone.state_dict(), **head.state_dict()}


def test_a_table_of_its_own_continues_bit_by_bit(dataset, tmp_path):
    whole = run(dataset)
    assert whole["centers"].any(1).all(), "every centre has moved"
    steps = []

    def stopped(images):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return loop_module.RandomAffine()(images)

    with pytest.raises(KeyboardInterrupt):
        run(dataset, augment=stopped, checkpoints=tmp_path)
    again = run(dataset, seed=1, checkpoints=tmp_path)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    files = {path.name for path in (tmp_path / "centers").iterdir()}
    assert {"000000002-all.safetensors", "000000004-rows.safetensors"} <= files, (
        "a table is copied once, then its moves"
    )


def test_what_moves_takes_its_share_of_a_step(dataset):
    """Each centre is moved once, by half of the way for a whole batch, and by half of that for half a batch."""
    whole = TrainingConfig(epochs=1, batch_size=IDENTITIES)
    distance = [run(dataset, config=each)["centers"].norm() for each in (whole, replace(whole, micro_batch_size=20))]
    assert 0.4 < distance[1] / distance[0] < 0.6  # batch normalisation sees the part, so embeddings differ a little


def test_each_step_begins_with_its_rate(dataset, monkeypatch):
    called = []
    head = center_loss()
    monkeypatch.setattr(head, "begin_step", lambda *given: called.append(given))
    monkeypatch.setattr(head, "before_step", lambda *given: called.append("begun"))
    config = replace(CONFIG, lr=0.2)
    train(BACKBONE.build(), head, dataset, config)
    rates = [(config.rate(step / 10), step / 10) for step in range(10)]
    assert called == [each for rate, done in rates for each in ((rate, pytest.approx(rate / 0.2), done), "begun")]


def test_a_plain_module_answers_nothing():
    plain = as_head(torch.nn.Linear(2, 2))
    assert plain.tables() == {} and plain.health(torch.randn(2, 2), torch.arange(2)) == {}
    assert not plain.under_autocast
    plain.check_processes(9)
    plain.begin_step(0.1, 1.0, 0.0)
    head = center_loss()
    assert as_head(head) is head


def test_a_head_that_does_not_mark_its_moves_is_refused_before_work(dataset, tmp_path):
    class Careless(torch.nn.Module, gif.Head):
        def tables(self):
            return {"table": torch.zeros(4, 2)}

    with pytest.raises(NotImplementedError, match="Careless has tables, so it must override mark_moves"):
        train(BACKBONE.build(), Careless(), dataset, CONFIG, checkpoints=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_head_may_refuse_several_processes(dataset, monkeypatch):
    monkeypatch.setattr(loop_module, "world_size", lambda: 2)
    with pytest.raises(InputError, match="would differ between 2 processes"):
        check_training(center_loss(), dataset, CONFIG)
