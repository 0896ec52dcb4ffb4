"""DNSMOS P.835 (arXiv 2110.01763) and P.808 (arXiv 2010.15258), by the package speechmos, whose wheel holds the models.

Shapes: L samples.
"""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from higgs.checksums import digest_of
from higgs.errors import UserError
from higgs.eval.judges.base import QualityJudge
from higgs.eval.judges.pretrained import packages

FILES = ("sig_bak_ovr.onnx", "model_v8.onnx")  # P.835, P.808


@dataclass
class DNSMOS(QualityJudge):
    """Quality of speech, of its background, and overall, on windows of 9 s; shorter clips are repeated.

    Attributes:
        path: folder with sig_bak_ovr.onnx and model_v8.onnx; None: the package's own.
    """

    path: str | None = None
    _scorer: Any = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._scorer is not None:
            return
        folder = self.folder()
        with packages():
            from speechmos.dnsmos import DNSMOS as Scorer

        self._scorer = Scorer(*(str(folder / name) for name in FILES))

    def folder(self) -> Path:
        if self.path is not None:
            folder = Path(self.path)
        else:
            package = importlib.util.find_spec("speechmos")
            if package is None:
                raise UserError("DNSMOS needs the package speechmos: pip install -e '.[eval,judges]'.")
            folder = Path(next(iter(package.submodule_search_locations))) / "dnsmos_models"
        absent = [name for name in FILES if not (folder / name).is_file()]
        if absent:
            raise UserError(
                f"{folder} lacks {', '.join(absent)}; give the folder of the DNSMOS models, or leave path out."
            )
        return folder

    def describe(self) -> dict[str, Any]:
        folder = self.folder()
        digests = {name: digest_of(folder / name) for name in FILES}
        return {"name": "DNSMOS", "version": importlib.metadata.version("speechmos"), "sha256": digests}

    def score(self, clips: Sequence[Tensor]) -> list[dict[str, float]]:
        self.load()
        return [self._score(clip) for clip in clips]

    def _score(self, clip: Tensor) -> dict[str, float]:
        if not len(clip):
            raise UserError("An empty clip has no quality.")
        found = self._scorer(clip.clamp(-1, 1).numpy(), self.sample_rate, False)
        return {f"dnsmos_{name}": float(found[f"{name}_mos"]) for name in ("sig", "bak", "ovrl", "p808")}
