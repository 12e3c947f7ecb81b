"""Documents in two forms, all pairs of images by their scores, thresholds, and the pictures of a report."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from gif.data import IdentityImages
from gif.data.inspection import plot_identities
from gif.data.pictures import Pictures
from gif.plotting import legible
from gif.report import Document
from gif.report.pairs import Pair, all_pairs
from gif.report.pictures import plot_head_cost, plot_pairs, plot_scores
from gif.training import plot_losses

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_document_in_both_forms(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG + b"pixels")
    document = Document("What <b> came out")
    document.heading("One & two")
    document.paragraph("Give `--output X`; 1 < 2.")
    document.table(["name", "value"], [["a | b", "1,234"], ["c", "0.5"]])
    document.picture(tmp_path / "pictures" / "a.png", 'the "a"', "A caption.")
    page = document.html()
    assert "<h1>What &lt;b&gt; came out</h1>" in page and '<a href="#one-two">One &amp; two</a>' in page
    assert '<h2 id="one-two">' in page and "<code>--output X</code>; 1 &lt; 2." in page
    assert '<td class="number">1,234</td>' in page and "<td>a | b</td>" in page
    assert 'src="data:image/png;base64,iVBORw0KGgpwaXhlbHM="' in page and 'alt="the &quot;a&quot;"' in page
    text = document.markdown(tmp_path)
    assert "# What <b> came out\n\n## One & two\n\nGive `--output X`; 1 < 2." in text
    assert "| a \\| b | 1,234 |" in text and '![the "a"](pictures/a.png)\n\n*A caption.*' in text


@pytest.mark.parametrize("count", [5, 513, 700])
def test_all_pairs_are_those_of_two_loops(count):
    generator = torch.Generator().manual_seed(count)
    embeddings = torch.randn(count, 8, generator=generator)
    labels = torch.randint(0, max(2, count // 6), (count,), generator=generator)
    found = all_pairs(embeddings, labels, wanted=3)
    cosines = (normalize(embeddings, dim=1) @ normalize(embeddings, dim=1).T).numpy()
    i, j = np.triu_indices(count, 1)
    same = (labels[i] == labels[j]).numpy()
    genuine, impostor = cosines[i, j][same], cosines[i, j][~same]
    for shares, scores in ((found.genuine, genuine), (found.impostor, impostor)):
        wanted = np.histogram(scores, found.edges)[0] / max(len(scores), 1)
        assert np.abs(np.cumsum(shares) - np.cumsum(wanted)).max() <= 2 / max(len(scores), 1)  # an edge, in float32
    assert found.hardest_impostor[0].cosine == pytest.approx(impostor.max(), abs=1e-6)
    if len(genuine):
        assert found.hardest_genuine[0].cosine == pytest.approx(genuine.min(), abs=1e-6)
    for pairs, kind in ((found.hardest_genuine, True), (found.hardest_impostor, False)):
        images = [index for pair in pairs for index in (pair.first, pair.second)]
        assert len(images) == len(set(images))  # none twice
        assert all((labels[pair.first] == labels[pair.second]) == kind for pair in pairs)
        assert all(abs(cosines[pair.first, pair.second] - pair.cosine) < 1e-5 for pair in pairs)


def test_pictures_turn_white_ink_on_black_and_leave_photographs():
    ink = torch.zeros(4, 1, 6, 6, dtype=torch.uint8)
    ink[:, :, 2:4, 2:4] = 255
    drawn = Pictures(IdentityImages(ink, torch.arange(4), list("abcd")))
    assert drawn[0].shape == (6, 6, 3) and drawn[0][0, 0, 0] == 255 and drawn[0][2, 2, 0] == 0
    colored = torch.tensor([20, 10, 60], dtype=torch.uint8)[:, None, None].expand(4, 3, 6, 6)
    for photos in (colored, torch.full((4, 1, 6, 6), 50, dtype=torch.uint8)):  # at night, and grey
        shown = Pictures(IdentityImages(photos, torch.arange(4), list("abcd")))
        assert shown[1][0, 0, 0] == photos[1, 0, 0, 0]
    same = Pictures(IdentityImages(ink.expand(-1, 3, -1, -1), torch.arange(4), list("abcd")))
    assert same[0][0, 0, 0] == 255  # read in colour, and grey all the same
    assert drawn.sheet([[0, 1], [2]]).shape == (14, 14, 3)


def test_names_are_drawn_in_letters_that_the_font_has(tmp_path, recwarn):
    assert legible("Zoë Müller") == "Zoë Müller" and legible("日本 a") == "\\u65e5\\u672c a"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 8, 8), generator=generator).to(torch.uint8)
    data = IdentityImages(images, torch.arange(6) // 2, ["日本", "ë", "c"])
    data.origin = "/data/日本"
    plot_identities(data, tmp_path / "identities.png")
    plot_pairs(data, [Pair(0, 1, 0.5), Pair(2, 4, 0.1)], "pairs", tmp_path / "pairs.png")
    assert not [each for each in recwarn if "missing from" in str(each.message)]


def test_pictures_of_a_report(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (24, 3, 20, 20), dtype=torch.uint8, generator=generator)
    names = ["$a_b$", "一", "c" * 50, "d"]
    data = IdentityImages(images, torch.arange(24) % 4, names)
    scores = all_pairs(torch.randn(24, 4, generator=generator), data.labels, 5)
    plot_scores(scores, {0.1: 0.4, 0.01: 0.8}, tmp_path / "scores.png")
    plot_scores(scores, {}, tmp_path / "none.png")
    plot_pairs(data, scores.hardest_impostor, "Two identities", tmp_path / "pairs.png")
    plot_head_cost(50, 128, 32, tmp_path / "cost.png")
    assert all(path.read_bytes()[:8] == PNG for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("steps", [1, 3, 24, 400])
def test_losses_of_few_steps_are_points(tmp_path, monkeypatch, steps):
    drawn = []
    monkeypatch.setattr("gif.training.curves.save_figure", lambda drawing, path: drawn.append(drawing))
    plot_losses({"GIF": torch.linspace(9, 3, steps)}, tmp_path / "losses.png")
    (axes,) = drawn[0].axes
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    (line,) = labelled
    x = np.asarray(line.get_xdata())
    assert x[-1] == steps  # the last step is there, and steps count from 1
    assert len(x) >= min(steps, 8) and (line.get_marker() == "o") == (steps < 16)
