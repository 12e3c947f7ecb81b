"""The README's example runs as it stands."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def test_the_drop_in_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)
    assert scope["embeddings"].grad.abs().sum() > 0
    assert scope["loss_fn"].centers.grad.abs().sum() > 0
