"""The table of a profile, a row for each layer: the page and the terminal show the same figures."""

from __future__ import annotations

import statistics
from html import escape

from kvfold.quality.profile.results import LEVELS, SHARES, LayerProfile, Profile
from kvfold.quality.report.heat import percent

__all__ = ["headings", "layer_rows", "layer_table"]

_TOP = SHARES.index(0.1)


def headings(profile: Profile) -> tuple[str, ...]:
    """What stands above the columns of `layer_rows`."""
    budgets = (f"for {level:.0%}" for level in LEVELS)
    return ("layer", "sinks", f"last {profile.recent}", "breadth", "top 10%", *budgets, "gate", "K err", "V err")


def layer_rows(profile: Profile) -> list[tuple[str, ...]]:
    """For each layer: name and kind; mass on sinks and recent window; breadth; mass held by a tenth of the past kept
    once; shares of the past for `LEVELS`; the highest gate; quantization error. Means over heads but for the gate.
    """
    return [_row(profile, layer) for layer in profile.layers]


def _row(profile: Profile, layer: LayerProfile) -> tuple[str, ...]:
    gates = {} if profile.retrieval is None else profile.retrieval.gates.heads
    at = profile.stored.index(layer.layer) if layer.layer in profile.stored else None
    errors = profile.errors
    kind = "" if layer.kind == "full" else f" {layer.kind}"
    return (
        f"{layer.layer}{kind}",
        f"{statistics.fmean(layer.sinks) + statistics.fmean(layer.nowhere):.1%}",
        f"{statistics.fmean(layer.local):.0%}",
        f"{statistics.fmean(layer.effective):,.0f}",
        f"{layer.held_once[_TOP]:.0%}",
        *(f"{statistics.fmean(layer.budgets[f'{level:g}']):.0%}" for level in LEVELS),
        f"{max(gates[layer.layer]):.2f}" if layer.layer in gates else "",
        *(
            "" if errors is None or at is None else percent(statistics.fmean(grid[at])) + "%"
            for grid in (() if errors is None else (errors.k, errors.v))
        ),
        *(("", "") if errors is None else ()),
    )


def layer_table(profile: Profile) -> str:
    """The rows as HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in headings(profile))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in layer_rows(profile)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
