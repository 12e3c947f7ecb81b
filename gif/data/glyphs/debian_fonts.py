"""The fonts that draw `glyphs-80k`: which Debian packages hold them, and which of their files are one family.

A family is one design of a typeface. Each draws a character once, in its regular face:

- Files that continue each other are one family (HanaMin A and B, TW-Kai and its Ext-B and Plus, Unifont and its upper
  planes); a character is taken from the first file that has it.
- Variants of one design are one family, seen through their first: the Japanese face of the Noto CJK collections (their
  faces for China, Taiwan, Hong Kong and Korea share most glyphs), the mainland faces of AR PL, proportional rather than
  monospaced ones. As families of their own they would put characters of a single design above any minimum.
- TW-Sung is left out: like HanaMin and TW-Kai it has all of CJK Extension B, and with it 19,000 rare characters would
  be in exactly three families, two of them of one foundry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gif.errors import MissingFileError

FONT_FOLDER = Path("/usr/share/fonts")


@dataclass(frozen=True)
class Family:
    """A typeface: its name, the Debian package that holds it and its files, of a collection the first face."""

    name: str
    package: str
    files: tuple[str, ...]


FAMILIES = (
    Family("AR PL UKai", "fonts-arphic-ukai", ("ukai.ttc",)),
    Family("AR PL UMing", "fonts-arphic-uming", ("uming.ttc",)),
    Family("BabelStone Han", "fonts-babelstone-han", ("BabelStoneHan.ttf",)),
    Family("Baekmuk Batang", "fonts-baekmuk", ("batang.ttf",)),
    Family("Baekmuk Dotum", "fonts-baekmuk", ("dotum.ttf",)),
    Family("Baekmuk Gulim", "fonts-baekmuk", ("gulim.ttf",)),
    Family("Baekmuk Headline", "fonts-baekmuk", ("hline.ttf",)),
    Family("TW-Kai", "fonts-cns11643-kai", ("TW-Kai-98_1.ttf", "TW-Kai-Ext-B-98_1.ttf", "TW-Kai-Plus-98_1.ttf")),
    Family("Droid Sans Fallback", "fonts-droid-fallback", ("DroidSansFallbackFull.ttf",)),
    Family("HanaMin", "fonts-hanazono", ("HanaMinA.ttf", "HanaMinB.ttf")),
    Family("IPAmj Mincho", "fonts-ipamj-mincho", ("ipamjm.ttf",)),
    Family("LXGW WenKai", "fonts-lxgw-wenkai", ("LXGWWenKai-Regular.ttf",)),
    Family("Nanum Barun Gothic", "fonts-nanum", ("NanumBarunGothic.ttf",)),
    Family("Nanum Gothic", "fonts-nanum", ("NanumGothic.ttf",)),
    Family("Nanum Myeongjo", "fonts-nanum", ("NanumMyeongjo.ttf",)),
    Family("Nanum Square", "fonts-nanum", ("NanumSquareR.ttf",)),
    Family("Nanum Square Round", "fonts-nanum", ("NanumSquareRoundR.ttf",)),
    Family("Noto Sans CJK", "fonts-noto-cjk", ("NotoSansCJK-Regular.ttc",)),
    Family("Noto Serif CJK", "fonts-noto-cjk", ("NotoSerifCJK-Regular.ttc",)),
    Family("Unifont", "fonts-unifont", ("unifont.otf", "unifont_upper.otf")),
    Family("WenQuanYi Micro Hei", "fonts-wqy-microhei", ("wqy-microhei.ttc",)),
    Family("WenQuanYi Zen Hei", "fonts-wqy-zenhei", ("wqy-zenhei.ttc",)),
)


def find_fonts(families: Sequence[Family], folder: str | Path = FONT_FOLDER) -> list[list[Path]]:
    """The files of each family, found by name anywhere below ``folder``.

    Raises FileNotFoundError, naming the Debian packages to install, where a file is missing.
    """
    found = {path.name: path for path in sorted(Path(folder).rglob("*"), reverse=True)}  # of equal names the first
    packages = dict.fromkeys(family.package for family in families)
    missing = [
        package
        for package in packages
        if not all(file in found for family in families if family.package == package for file in family.files)
    ]
    if missing:
        present = [package for package in packages if package not in missing]
        raise MissingFileError(
            f"fonts are missing below {folder}: found those of {', '.join(present) or 'none'} of the {len(packages)} "
            f"Debian packages. Install the others: sudo apt-get install {' '.join(missing)}"
        )
    return [[found[file] for file in family.files] for family in families]
