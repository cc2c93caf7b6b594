"""Finding the attention modules of a model, to ask before the first token whether a method can read what it needs."""

from __future__ import annotations

from torch import nn

__all__ = ["attention_modules"]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model's decoder layers, as transformers numbers and names them: the innermost ones."""
    found = [module for module in model.modules() if _attends(module)]
    return [module for module in found if not any(_attends(part) for part in module.modules() if part is not module)]


def _attends(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
