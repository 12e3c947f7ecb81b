"""The training loop, its checkpoints, the backbone it trains."""

import math
import re
from itertools import chain

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gif import CodeVectors, GIFLoss, IdentityCodes, cli
from gif.arguments import CONFIGS
from gif.backbones import BackboneConfig, load_backbone, save_backbone
from gif.data import IdentityImages, normalize_pixels
from gif.errors import InputError
from gif.evaluation import embed, judge
from gif.head import Head, as_head
from gif.losses import MarginSoftmax, PartialFC
from gif.progress import console
from gif.training import TrainingConfig, plot_losses, plot_validations, train
from gif.training import loop as loop_module
from gif.training.augmentation import AUGMENTATIONS, RandomAffine
from gif.training.loggers import TensorBoard
from gif.training.monitor import summary
from gif.training.order import EpochOrder, begin_epoch
from gif.training.statistics import recompute_statistics
from gif_kernels import checks

CONFIG_FILES = sorted(CONFIGS.glob("*.yaml"))
BACKBONE = BackboneConfig(embedding_size=16, image_size=16, width=4)


@pytest.fixture
def dataset():
    """Eight identities, each a fixed pattern under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(20)
    patterns = torch.randint(0, 200, (8, 1, 16, 16), generator=generator)
    noise = torch.randint(0, 55, (160, 1, 16, 16), generator=generator)
    return IdentityImages((patterns[labels] + noise).to(torch.uint8), labels, list("abcdefgh"))


def fresh() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return BACKBONE.build(), MarginSoftmax(8, 16, scale=16.0)


def unchanged(images):
    return images


def test_learns(dataset):
    backbone, head = fresh()
    log = train(backbone, head, dataset, TrainingConfig(epochs=6, batch_size=32), augment=unchanged)
    assert log.losses.shape == (30,) and log.images_per_second > 0
    assert log.losses[-5:].mean() < 0.5 * log.losses[:5].mean()
    embeddings = torch.nn.functional.normalize(embed(backbone, dataset), dim=1)
    similarity = embeddings @ embeddings.T
    same = dataset.labels[:, None] == dataset.labels
    assert similarity[same].mean() > similarity[~same].mean() + 0.5


def perceptron() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A backbone without batch normalisation: micro-batches do not change what it computes."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 16)), MarginSoftmax(8, 16, scale=16.0)


def weights(*modules):
    return {(i, name): value for i, module in enumerate(modules) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("micro", [3, 7, 32, 100])
def test_accumulated_gradients_are_the_whole_batchs(dataset, micro):
    whole, pieces = perceptron(), perceptron()
    log = train(*whole, dataset, TrainingConfig(epochs=1, batch_size=32), augment=unchanged)
    config = TrainingConfig(epochs=1, batch_size=32, micro_batch_size=micro)  # 11 of 3 or 2, 5 of 7 or 6, 1, 1
    again = train(*pieces, dataset, config, augment=unchanged)
    torch.testing.assert_close(again.losses, log.losses, rtol=1e-5, atol=1e-6)
    for name, value in weights(*whole).items():
        torch.testing.assert_close(weights(*pieces)[name], value, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_takes_its_share_of_the_code_vectors_step():
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(2)] * 3), 2)
    embeddings, labels = torch.randn(8, 16), torch.arange(8)
    moved = {}
    for share in (1.0, 0.25):
        table = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        head = GIFLoss(codes, CodeVectors(table), 16, vector_lr=1e-2)
        before = head.vectors.table.clone()
        head.step_share = share
        head.contrast_loss(embeddings, labels)
        moved[share] = head.vectors.table - before
    torch.testing.assert_close(moved[0.25], moved[1.0] / 4, rtol=0, atol=0.03 * float(moved[1.0].abs().max()))


def test_moved_rows_are_marked():
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
    head = GIFLoss(codes, CodeVectors(torch.randn(27, 16)), 16, negatives=0)
    before = head.vectors.table.clone()
    head.moved = torch.zeros(27, dtype=torch.bool)
    head(torch.randn(4, 16), torch.tensor([3, 20, -1, 3]))
    changed = (head.vectors.table != before).any(1)
    assert changed.sum() > 2 and not (changed & ~head.moved).any() and head.moved.sum() <= 6


class Overflowing(torch.nn.Module):
    """A backbone in which an image overflows, in float16 as on an accelerator, in each of ``steps`` in training."""

    def __init__(self, steps):
        super().__init__()
        self.network, self.steps, self.step = BACKBONE.build(), steps, 0

    def forward(self, images):
        self.step += self.training
        if self.training and self.step in self.steps:
            images = images.clone()
            images[1] = math.inf
        return self.network(images)


def train_overflowing(dataset, monkeypatch, steps, precision="fp16"):
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    torch.manual_seed(0)
    backbone = Overflowing(steps)
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(2)] * 3), 2)
    head = GIFLoss(codes, CodeVectors(torch.randn(8, 16)), 16)
    config = TrainingConfig(epochs=4, batch_size=32, precision=precision)  # 20 steps
    return train(backbone, head, dataset, config, augment=unchanged), backbone, head


@pytest.mark.parametrize("step", [3, 10])  # 10: a step whose loss is looked at
def test_an_overflow_outlives_its_step_nowhere(dataset, monkeypatch, step):
    log, backbone, head = train_overflowing(dataset, monkeypatch, {step})
    assert [i + 1 for i, loss in enumerate(log.losses) if not loss.isfinite()] == [step]
    assert all(value.isfinite().all() for value in weights(backbone, head).values())
    assert head.vectors.table.isfinite().all() and int(head.stayed) == 8
    assert embed(backbone, dataset).isfinite().all()


def test_what_never_recovers_is_an_error(dataset, monkeypatch):
    with pytest.raises(FloatingPointError, match="the loss is nan after 10 steps; lower lr") as told:
        train_overflowing(dataset, monkeypatch, set(range(1, 20)))
    assert isinstance(told.value, InputError)
    with pytest.raises(FloatingPointError, match="the loss is nan after 10 steps"):  # nothing skips a step here
        train_overflowing(dataset, monkeypatch, {10}, precision="fp32")


@pytest.mark.parametrize("options", [{"optimizer": "adamw", "lr": 0.01}, {"schedule": "polynomial"}])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_way_to_train_learns(dataset, options, precision):
    config = TrainingConfig(epochs=6, batch_size=32, precision=precision, channels_last=True, **options)
    log = train(*fresh(), dataset, config, augment=unchanged)
    assert log.losses[-5:].mean() < 0.6 * log.losses[:5].mean()


class Watched(torch.nn.Module, Head):
    """Notes which dtype autocast has when ``head`` computes, of which the loop does not know what it would lose."""

    def __init__(self, head, seen):
        super().__init__()
        self.head, self.seen = head, seen

    def begin_step(self, rate, share, done):
        as_head(self.head).begin_step(rate, share, done)

    def forward(self, embeddings, labels):
        enabled = torch.is_autocast_enabled("cpu")
        self.seen.append(torch.get_autocast_dtype("cpu") if enabled else torch.float32)
        loss = self.head(embeddings, labels)
        assert loss.dtype == torch.float32
        return loss


def watched_kind(kind, seen):
    """``kind`` with a forward pass that is watched."""

    class Own(kind):  # type: ignore[misc, valid-type]
        def forward(self, *arguments, **options):
            return Watched.forward(self, *arguments, **options)

        def head(self, *arguments, **options):
            return super().forward(*arguments, **options)

    Own.seen = seen
    return Own


def softmax_head(kind=MarginSoftmax):
    torch.manual_seed(2)
    return kind(8, 16, scale=16.0)


def partial_fc_head(kind=PartialFC):
    torch.manual_seed(2)
    return kind(8, 16, samples=4, scale=16.0)


def gif_head(kind=GIFLoss):
    codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(2)] * 3), 2)
    vectors = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return kind(codes, CodeVectors(vectors), 16)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_of_own_heads_are_in_the_training_s_precision(dataset, precision, dtype):
    config = TrainingConfig(epochs=1, batch_size=32, precision=precision)
    for kind, build in ((GIFLoss, gif_head), (MarginSoftmax, softmax_head), (PartialFC, partial_fc_head)):
        seen: list[torch.dtype] = []
        train(BACKBONE.build(), build(watched_kind(kind, seen)), dataset, config, augment=unchanged)
        assert seen == [dtype] * 5
    seen = []
    train(BACKBONE.build(), Watched(gif_head(), seen), dataset, config, augment=unchanged)
    assert seen == [torch.float32] * 5  # of another head nobody knows what it would lose


@pytest.mark.parametrize("head", [gif_head, softmax_head], ids=["gif", "softmax"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_operands_train_as_float32_does(dataset, precision, head):
    """The backbone is in the same precision both times; `Watched` keeps the head in float32."""
    found = []
    for wrap in (lambda inner: inner, lambda inner: Watched(inner, [])):
        torch.manual_seed(0)
        backbone, inner = BACKBONE.build(), head()
        config = TrainingConfig(epochs=8, batch_size=32, lr=0.01, precision=precision)
        losses = train(backbone, wrap(inner), dataset, config, augment=unchanged).losses
        found.append((losses, judge(embed(backbone, dataset), dataset.labels).tar[1e-3]))
    (narrow, narrow_tar), (exact, exact_tar) = found
    assert not torch.equal(narrow, exact)
    rounding = 2**-9 if precision == "bf16" else 2**-12
    assert abs(narrow[0] - exact[0]) < 16 * rounding  # logits are 16 times a cosine of rounded operands
    # five steps carry the difference on; later ones of so few images would differ by one bit's difference as well
    torch.testing.assert_close(narrow[:5], exact[:5], rtol=32 * rounding, atol=0)
    assert narrow[-10:].mean() < 0.1 * narrow[0] and exact[-10:].mean() < 0.1 * exact[0]
    assert exact_tar > 0.98 and narrow_tar > 0.98


def test_workers_read_the_same_images(dataset):
    logs = [train(*fresh(), dataset, TrainingConfig(epochs=2, batch_size=32, workers=n)) for n in (0, 2)]
    assert torch.equal(logs[0].losses, logs[1].losses)


def test_order_of_images():
    def rows(processes, begin):
        parts = [EpochOrder(50, 12, seed=7, begin=begin, rank=r, processes=processes) for r in range(processes)]
        assert all(len(part) == 4 - begin for part in parts)
        return [list(chain(*shares)) for shares in zip(*parts, strict=True)]

    alone = rows(1, 0)
    images = list(chain(*alone))
    assert len(set(images)) == 48 and images != sorted(images)
    assert all(rows(processes, 0) == alone for processes in (2, 3, 6))
    assert rows(3, 2) == alone[2:]


@pytest.mark.parametrize("steps", [3, 5, 7, 11])
def test_a_run_of_so_many_steps_is_the_begin_of_as_many_epochs_as_hold_it(dataset, steps, monkeypatch):
    """Five steps an epoch; only the learning rate, held here, knows where the run ends."""
    monkeypatch.setattr(TrainingConfig, "rate", lambda self, progress: self.lr)
    whole = train(*fresh(), dataset, TrainingConfig(epochs=3, batch_size=32))
    part = train(*fresh(), dataset, TrainingConfig(steps=steps, batch_size=32))
    assert torch.equal(part.losses, whole.losses[:steps])


def test_a_run_of_steps_continues(dataset, tmp_path):
    config = TrainingConfig(steps=8, batch_size=32, save_steps=1)
    whole = train(*fresh(), dataset, config)

    def stops(backbone):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(*fresh(), dataset, config, validate=stops, validate_every=6, checkpoints=tmp_path)
    continued = train(*fresh(), dataset, config, checkpoints=tmp_path)
    assert torch.equal(continued.losses, whole.losses)


def test_each_process_augments_by_itself_and_all_share_the_order():
    seeds = [begin_epoch(1, 2, rank) for rank in range(3)]
    assert seeds[0] == seeds[1] == seeds[2]
    draws = {float(torch.rand(())) for rank in range(3) for _ in [begin_epoch(1, 2, rank)]}
    assert len(draws) == 3


class TestHealth:
    def test_of_identity_codes(self):
        codes = IdentityCodes(torch.cartesian_prod(*[torch.arange(3)] * 3), 3)
        head = GIFLoss(codes, CodeVectors(torch.randn(27, 16)), 16, siblings=2)
        embeddings, labels = torch.randn(5, 16), torch.tensor([4, 9, 9, -1, 26])
        found = head.health(embeddings, labels)
        kept = [0, 1, 2, 4]
        hits = head.predict(embeddings)[kept] == codes.codes[labels[kept]].long()
        assert [float(found[f"token accuracy/{j}"]) for j in (1, 2, 3)] == hits.double().mean(0).tolist()
        assert float(found["code accuracy"]) == hits.all(1).double().mean()
        candidates = {*labels[kept].tolist(), *codes.siblings(labels[kept], 2).flatten().tolist()}
        self.check(found, embeddings[kept], labels[kept], head.vectors.table, candidates)
        bare = GIFLoss(codes, None, 16, regression_weight=0, contrast_weight=0)
        assert bare.health(embeddings, labels).keys() == {
            *(f"token accuracy/{j}" for j in (1, 2, 3)),
            "code accuracy",
        }

    def test_of_a_softmax(self):
        embeddings, labels = torch.randn(4, 16), torch.tensor([3, 8, 3, 0])
        for head in (MarginSoftmax(9, 16), PartialFC(9, 16, samples=2)):
            self.check(head.health(embeddings, labels), embeddings, labels, head.weight.detach(), {3, 8, 0})

    def check(self, found, embeddings, labels, vectors, candidates):
        """Against the definition, image by image, in float64."""
        own, impostor = [], []
        for embedding, label in zip(embeddings.double(), labels.tolist(), strict=True):
            cosines = torch.nn.functional.cosine_similarity(embedding[None], vectors.double())
            own.append(float(cosines[label]))
            impostor.append(max(float(cosines[other]) for other in candidates - {label}))
        nearer = [a > b for a, b in zip(own, impostor, strict=True)]
        assert float(found["cosine to own"]) == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert float(found["cosine to impostor"]) == pytest.approx(sum(impostor) / len(own), abs=1e-6)
        assert float(found["batch accuracy"]) == pytest.approx(sum(nearer) / len(own))

    def test_in_one_line(self):
        measures = {"token accuracy/1": 0.5, "token accuracy/2": 0.25, "code accuracy": 0.1}
        assert summary(measures) == "tokens 50/25 %, codes 10%"
        assert summary({"cosine to own": 0.5, "cosine to impostor": 0.25}) == "own 0.50, impostor 0.25"
        assert summary({"code vectors stayed": 0.0}) == ""
        assert summary({"code vectors stayed": 1200.0}) == "1,200 code vectors stayed"
        assert summary({}) == ""


def test_what_a_run_tells(dataset, tmp_path):
    config = TrainingConfig(epochs=8, batch_size=32, save_steps=12)

    def told(folder):
        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    with console.capture() as capture:
        log = train(*fresh(), dataset, config, loggers=[TensorBoard(tmp_path / "whole")])
    assert re.search(r"160/1,280 images|1,280/1,280 images, .*/s, 0 s left loss .*own .*impostor .* GB", capture.get())
    whole = told(tmp_path / "whole")
    assert [step for step, _ in whole["loss"]] == [10, 20, 30, 40]
    assert whole["loss"][1][1] == pytest.approx(float(log.losses[10:20].mean()), rel=1e-6)
    assert {"learning rate", "cosine to own", "batch accuracy", "images a second", "memory (GB)"} <= whole.keys()

    steps = []

    def interrupted(images):
        steps.append(1)
        if len(steps) == 24:  # told at 20, saved at 20: an epoch's end
            raise KeyboardInterrupt
        return RandomAffine()(images)

    places = {"checkpoints": tmp_path / "checkpoints", "loggers": [TensorBoard(tmp_path / "resumed")]}
    with pytest.raises(KeyboardInterrupt):
        train(*fresh(), dataset, config, augment=interrupted, **places)
    train(*fresh(), dataset, config, **places)
    resumed = told(tmp_path / "resumed")
    for name in ("loss", "learning rate", "cosine to own", "batch accuracy"):
        assert resumed[name] == whole[name], name


def test_a_batch_stays_full_where_images_cannot_be_read(dataset):
    class Broken(IdentityImages):
        """Image i cannot be read where i is in ``missing``."""

        missing = frozenset(range(0, 160, 9))

        def __getitems__(self, indices):
            return super().__getitems__([i for i in indices if i not in self.missing])

    sizes = []

    def counting(images):
        sizes.append(len(images))
        return images

    broken = Broken(dataset.images, dataset.labels, dataset.names)
    log = train(*fresh(), broken, TrainingConfig(epochs=2, batch_size=32), augment=counting)
    assert sizes == [32] * 10 and log.losses.isfinite().all()
    broken.missing = frozenset(range(160))
    with pytest.raises(ValueError, match="none of the 32 images of a batch can be read"):
        train(*fresh(), broken, TrainingConfig(epochs=2, batch_size=32))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_a_config_is_a_recipe_that_builds(path, monkeypatch, capsys):
    code, printed, _ = gif(monkeypatch, capsys, "train", f"--config={path}", "--print_config")
    assert code == 0
    given, found = yaml.safe_load(path.read_text()), yaml.safe_load(printed)
    assert all(found["training"][name] == value for name, value in given["training"].items())
    backbone = BackboneConfig(**found["backbone"])
    with torch.device("meta"):
        network = backbone.build()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    low, high = {"small": (0, 1e6), "iresnet100": (65e6, 66e6), "vit": (80e6, 90e6)}[backbone.name]
    assert low < parameters < high
    assert {"codes", "vectors", "output"}.isdisjoint(given)


def test_one_line_overrides_a_field(monkeypatch, capsys):
    config = f"--config={CONFIG_FILES[0]}"
    _, printed, _ = gif(monkeypatch, capsys, "train", config, "--training.lr=0.3", "--print_config")
    assert yaml.safe_load(printed)["training"]["lr"] == 0.3
    code, _, errors = gif(monkeypatch, capsys, "train", config, "--training.learning_rate=0.3")
    assert code == 2 and "learning_rate" in errors
    code, printed, _ = gif(monkeypatch, capsys, "train", config, "--training.batch_size=1", "--output=x")
    assert code == 1 and printed.startswith("error: wanted batch_size >= 2, got batch_size=1")


def gif(monkeypatch, capsys, *arguments):
    """Run `gif arguments...`; the exit code and what was printed to the two outputs."""
    monkeypatch.setattr("sys.argv", ["gif", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, *capsys.readouterr()


def test_rate():
    def rate(progress, warmup, schedule="cosine"):
        return TrainingConfig(lr=0.5, warmup=warmup, schedule=schedule).rate(progress)

    assert rate(0, 0.1) == 0
    assert rate(0.05, 0.1) == pytest.approx(0.25)
    assert rate(0.1, 0.1) == 0.5
    assert rate(0.55, 0.1) == pytest.approx(0.25)
    assert rate(1, 0.1) == pytest.approx(0)
    assert rate(0, 0) == 0.5
    assert rate(0.55, 0.1, "polynomial") == pytest.approx(0.125)
    assert rate(1, 0.1, "polynomial") == 0


@pytest.mark.parametrize(
    "wrong",
    [
        *({"epochs": 0}, {"batch_size": 1}, {"micro_batch_size": 2}, {"warmup": 1.0}, {"lr": math.nan}, {"keep": 0}),
        *({"precision": "fp8"}, {"optimizer": "lion"}, {"schedule": "step"}, {"save_minutes": 0}, {"weight_decay": -1}),
    ],
)
def test_a_wrong_field_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        TrainingConfig(**wrong)


def test_what_decides_a_result():
    settings = TrainingConfig(device="cuda", workers=3, save_minutes=1).settings()
    assert settings == TrainingConfig().settings()
    assert settings != TrainingConfig(precision="bf16").settings()


def test_errors(dataset):
    with pytest.raises(ValueError, match="160 images, fewer than a batch of 161"):
        train(*fresh(), dataset, TrainingConfig(batch_size=161))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"gif-recognition\[tensorboard\]"):
            train(*fresh(), dataset, TrainingConfig(batch_size=32), loggers=[TensorBoard("logs")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "world_size", lambda: 3)
        with pytest.raises(ValueError, match=r"32 does not divide among 3 processes, .*; give a multiple of 3"):
            train(*fresh(), dataset, TrainingConfig(batch_size=32))

    class Diverging(torch.nn.Module):
        def forward(self, embeddings, labels):
            return embeddings.sum() * math.inf

    with pytest.raises(FloatingPointError, match="lower lr"):
        train(fresh()[0], Diverging(), dataset, TrainingConfig(epochs=9, batch_size=16), augment=unchanged)


def test_backbone_file(tmp_path):
    backbone = BACKBONE.build().eval()
    save_backbone(tmp_path / "b.safetensors", backbone, BACKBONE)
    loaded, config = load_backbone(tmp_path / "b.safetensors")
    assert config == BACKBONE and not loaded.training
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(loaded(images), backbone(images))
    with pytest.raises(ValueError, match="multiple of 16, got 20"):
        BackboneConfig(image_size=20).build()
    other = BackboneConfig(embedding_size=8, image_size=16, width=4)
    with pytest.raises(ValueError, match="is not what its config builds"):
        save_backbone(tmp_path / "c.safetensors", backbone, other)


class TestAugmentation:
    def test_pixels(self):
        images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
        assert normalize_pixels(images).flatten().tolist() == [-1, 1]

    def test_no_change_at_zero(self):
        images = torch.rand(3, 1, 16, 16) * 2 - 1
        still = RandomAffine(degrees=0, scale=1, shift=0)(images)
        torch.testing.assert_close(still, images, rtol=0, atol=1e-5)

    def test_shift_moves_the_centre_of_mass_and_fills_with_black(self):
        images = torch.full((200, 1, 17, 17), -1.0)
        images[:, :, 8, 8] = 1.0
        moved = RandomAffine(degrees=0, scale=1, shift=0.25)(images) + 1
        columns = (moved.sum(2) * torch.arange(17)).sum((1, 2)) / moved.sum((1, 2, 3))
        assert moved.min() >= -1e-6
        assert columns.std() == pytest.approx(0.25 * 17 / 3**0.5, rel=0.2)
        assert columns.mean() == pytest.approx(8, abs=0.6)

    def test_rotation_keeps_the_radius(self):
        images = torch.full((100, 1, 33, 33), -1.0)
        images[:, :, 16, 28] = 1.0  # 12 pixels right of the centre
        turned = RandomAffine(degrees=90, scale=1, shift=0)(images) + 1
        rows = (turned.sum(3) * torch.arange(33)).sum((1, 2)) / turned.sum((1, 2, 3)) - 16
        columns = (turned.sum(2) * torch.arange(33)).sum((1, 2)) / turned.sum((1, 2, 3)) - 16
        torch.testing.assert_close((rows**2 + columns**2).sqrt(), torch.full((100,), 12.0), rtol=0, atol=0.3)
        assert rows.std() > 4


def test_images_check_their_labels():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\), got \[0, 1\]"):
        IdentityImages(images, torch.tensor([0, 1]), ["a"])
    with pytest.raises(ValueError, match="uint8"):
        IdentityImages(images.float(), torch.tensor([0, 0]), ["a"])
    with pytest.raises(ValueError, match="one an image"):
        IdentityImages(images, torch.tensor([0]), ["a"])


def test_pictures(tmp_path):
    plot_losses({"a": torch.rand(100) + 1, "short": torch.rand(3) + 1}, tmp_path / "losses.png")
    plot_validations({10: {"lfw": 0.9}, 20: {"lfw": 0.95, "agedb_30": 0.8}}, tmp_path / "validations.png")
    for name in ("losses", "validations"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no validation to draw"):
        plot_validations({}, tmp_path / "none.png")


def test_recomputed_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)
    network = torch.nn.Sequential(linear, norm, torch.nn.ReLU())
    network(torch.randn(8, 3) * 100)  # statistics of other inputs
    batches = [torch.randn(6, 3) for _ in range(4)]
    network.eval()
    recompute_statistics(network, batches)
    features = [linear(batch) for batch in batches]
    assert torch.allclose(norm.running_mean, torch.stack([each.mean(0) for each in features]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([each.var(0) for each in features]).mean(0), atol=1e-6)
    assert norm.momentum == 0.1 and not network.training


def test_photographs_keep_their_shape_and_range_and_have_no_black_corners():
    torch.manual_seed(0)
    images = torch.full((16, 3, 20, 20), 0.5)
    changed = AUGMENTATIONS["photo"](images)
    assert changed.shape == images.shape and changed.min() >= 0.5 / 1.3 - 0.2 - 1e-6 and changed.max() <= 1
    assert all(each.std() < 1e-5 for each in changed)  # one colour stays one colour, to the border
    assert len({round(float(each.mean()), 3) for each in changed}) > 8
