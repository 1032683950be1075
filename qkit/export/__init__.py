"""The stage `export`: one file per format here; the file's name is the format's name.

A recipe says `onnx-int4`: the file onnx.py, its variant `int4`. `EXPORT/NAME/` appears whole in RUN/export/. How the stage goes about it is in
_stage.py: recipes ask the exporters what they make, and must not wait for what the stage needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkit.run import Run


def run(run: Run, out: Path) -> None:
    """Make every format that the recipe names.

    Raises:
        NotDeployable: one of them cannot be made, or not be loaded where it goes.
        ParityFailed: the fine-tune is not in the best there is of one.
    """
    from qkit.export import _stage

    _stage.run(run, out)
