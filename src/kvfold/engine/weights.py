"""Whether a model still has the weights that blocks were computed with, found out at a request's price."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

__all__ = ["WeightsWatch"]


class WeightsWatch:
    """Notices changes of a model's parameters and saved buffers (quantized weights often are): other tensors, other
    memory, updates in place (torch counts them); and adapters that are switched, merged, disabled or scaled (by the
    attributes that peft's layers have).

    What torch does not count is not noticed: writing through ``parameter.data``, and tensors made in inference mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watched = _Watched(model)
        self._seen = self._watched.state()

    def changed(self) -> bool:
        """Whether anything has changed since the last call."""
        state = self._watched.state()
        if state == self._seen:
            return False
        self._watched = _Watched(self._model)  # modules may have come and gone
        self._seen = self._watched.state()
        return True


class _Watched:
    """The places where a model's modules keep parameters, buffers and children: walking the modules takes ten times as
    long.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._parameters = [module._parameters for module in modules if module._parameters]
        # Buffers that are not saved, such as rotary frequencies, may change with every forward.
        self._buffers = [
            (module._buffers, names)
            for module in modules
            if (names := [name for name in module._buffers if name not in module._non_persistent_buffers_set])
        ]
        self._children = [module._modules for module in modules if module._modules]
        self._adapted = [module for module in modules if hasattr(module, "merged_adapters")]

    def state(self) -> tuple[Hashable, ...]:
        """What is equal as long as nothing has changed."""
        tensors: list[Tensor] = [p for each in self._parameters for p in each.values() if p is not None]
        tensors += [b for each, names in self._buffers for name in names if (b := each.get(name)) is not None]
        return (
            tuple([(id(p), p.data_ptr(), _version(p)) for p in tensors]),
            tuple([id(child) for each in self._children for child in each.values()]),
            tuple([_adapters(module) for module in self._adapted]),
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _adapters(module: nn.Module) -> Hashable:
    active = getattr(module, "active_adapters", ())
    scaling = getattr(module, "scaling", None)
    return (
        tuple(active),
        tuple(getattr(module, "merged_adapters", ())),
        getattr(module, "disable_adapters", False),
        tuple(scaling.items()) if isinstance(scaling, dict) else (),
    )
