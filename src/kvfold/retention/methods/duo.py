"""DuoAttention (arXiv 2410.10819): retrieval heads keep everything, streaming heads their first and latest tokens.

``s[h, i] = gate[layer, h]``: how much a KV head needs far tokens, from a file that ``kvfold profile --gates`` made:
``duo(gates.json,keep=0.5)``, or, without a name, the ``gates.json`` beside the model's weights. Pages go to the heads
in falling order of gate, all that a head has before the next gets any, until the budget is used up; the last one to
get some keeps its latest tokens. The others are left with the sinks and the recent tokens of the recipe.

The paper trains gates and sets a threshold; here the budget does. Nothing hangs on what the tokens are. Frees the
pages of the streaming heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.errors import ModelError
from kvfold.gates import GATES_FILE, Gates
from kvfold.retention.dealing import pages_there
from kvfold.retention.method import Notes, RetentionMethod
from kvfold.retention.view import LayerView

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["Duo"]


@dataclass(frozen=True)
class Duo(RetentionMethod):
    """Keeps all tokens of the heads with the highest gates in ``file``."""

    file: str = ""

    @cached_property
    def _gates(self) -> Gates:
        return Gates.read(self.file)

    def refusals(self, geometry: Geometry) -> list[str]:
        """No file, one that cannot be read, or one of another model."""
        if not self.file:
            return [f"no {GATES_FILE} lies beside its weights: make it (kvfold profile --gates) or name one"]
        try:
            gates = self._gates
        except ModelError as error:
            return [str(error)]
        if gates.model_type != geometry.model_type:
            return [f"the gates {self.file} are of a {gates.model_type}"]
        layers = {layer.index: layer.kv_heads for layer in geometry.layers if layer.stores and layer.window is None}
        given = {index: len(gates.heads.get(index, ())) for index in layers}
        if given != layers:
            return [f"the gates {self.file} are of a model with other layers or heads"]
        return []

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """A head's gate, for all of its tokens: of equal scores the later ones stay."""
        gates = torch.tensor(self._gates.heads[view.layer], dtype=torch.float32, device=view.device)
        return gates[:, None].expand(-1, view.candidates.stop - view.candidates.start)

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """All pages of one head after the other; of equal gates the lower layer comes first."""
        have = pages_there(scores, size)
        order = torch.cat([x.amax(1) for x in scores]).argsort(descending=True, stable=True)
        wanted = have.flatten()[order]
        counts = torch.empty_like(wanted)
        counts[order] = (pages - (wanted.cumsum(0) - wanted)).clamp_min(0).minimum(wanted)
        return counts.view_as(have)
