"""The page of a profile: one HTML file that needs nothing else, in the look of the evaluation's report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

from kvfold.quality.profile.curves import check_drawings, held_drawings
from kvfold.quality.profile.results import LEVELS, SHARES, LayerProfile, Profile, Retrieval, distance_edges
from kvfold.quality.profile.suggest import ANSWERED
from kvfold.quality.profile.tables import layer_table
from kvfold.quality.report.canvas import Drawing, Sheet, house_style, require_matplotlib
from kvfold.quality.report.heat import Grid, Shades, grids_sheet, percent
from kvfold.quality.report.layout import Section, html_page, render, write_whole
from kvfold.quality.report.maps import error_shades
from kvfold.quality.report.tables import facts_table
from kvfold.quality.results import ErrorMap

__all__ = ["write_page"]

_SMALL: Final = 0.001  # a share below this is not told in figures


def _told(share: float) -> str:
    return percent(share) if share >= _SMALL or share == 0 else "<0.1"


_SHARE: Final = Shades(0.0, 1.0, log=False, text=_told, unit=" %")


def write_page(profile: Profile, file: Path) -> Path:
    """Writes the page, whole or not at all; the same profile gives the same bytes. ReportError if that cannot be."""
    require_matplotlib()
    with house_style("kvfold-profile"):
        sections = "".join(render(section)[0] for section in _sections(profile)).replace(" %", "\u00a0%")
    body = _head(profile) + _advice(profile) + sections + _reproduce(profile)
    write_whole({file: html_page(f"kvfold profile: {profile.model}", body)})
    return file


def _sections(profile: Profile) -> list[Section]:
    sections = [_distance(profile), _heads(profile)]
    if profile.retrieval is not None:
        sections += [_gates(profile, profile.retrieval), _checks(profile, profile.retrieval)]
    sections += [_held(profile), _budgets(profile)]
    if profile.errors is not None:
        sections.append(_errors(profile, profile.errors))
    return sections


def _map(
    name: str,
    title: str,
    alt: str,
    grids: Sequence[tuple[str, Grid]],
    shades: Shades,
    rows: Sequence[str],
    across: str = "KV head",
    columns: Sequence[str] | None = None,
) -> Drawing:
    def draw(width: float) -> Sheet:
        return grids_sheet(title, grids, shades, width, across=across, rows=rows, columns=columns, bar=True)

    return Drawing(name, alt, draw)


def _flat(grid: Grid) -> list[float]:
    return [value for line in grid for value in line]


def _range(what: str, grid: Grid) -> str:
    return f"{what} by layer and head: {min(_flat(grid)):.1%} to {max(_flat(grid)):.1%}."


def _names(layers: Sequence[LayerProfile]) -> list[str]:
    """Layer numbers; those with a window are marked."""
    return [f"{layer.layer}{'~' if layer.window else ''}" for layer in layers]


def _learned(layers: Iterable[LayerProfile]) -> bool:
    return any(value > 0 for layer in layers for value in layer.nowhere)


def _distance(profile: Profile) -> Section:
    layers, edges = profile.layers, distance_edges(profile.tokens)
    grid = [[statistics.fmean(layer.sinks) + statistics.fmean(layer.nowhere), *layer.distance] for layer in layers]
    columns = ["first", *(f"{edge // 1024}k" if edge >= 1024 else str(edge) for edge in edges)]
    near = statistics.fmean(_flat([layer.local for layer in layers]))
    sinks = statistics.fmean(_flat([layer.sinks for layer in layers]))
    text = (
        "Each row is a layer, its colours show where the mass of its heads lies: on the first "
        f"{profile.sinks} tokens of the text (left), on the token itself (0), on the one before it (1), and so on by "
        "powers of two. What sinks and a window would keep stands at the left; what lies to the right is far."
    )
    if _learned(layers):
        text += " What goes to a learned sink logit counts as the first."
    if any(layer.window for layer in layers):
        text += " ~ marks layers with a window."
    shades = Shades(0.0, max(0.01, *_flat(grid)), log=False, text=_told, unit=" %")
    alt = f"Mass by distance and layer: {sinks:.1%} on the first tokens, {near:.1%} within {profile.recent}."
    across = "tokens back: where a bin begins"
    drawing = _map("distance", "Mass by distance, %", alt, [("", grid)], shades, _names(layers), across, columns)
    title = (
        f"{_told(near)} % of the attention stays within {profile.recent} tokens, {_told(sinks)} % goes to the first "
        f"{profile.sinks}"
    )
    return Section(title, text, "distance", 1, [drawing], kind="maps")


def _heads(profile: Profile) -> Section:
    layers, names = profile.layers, _names(profile.layers)
    broad = [layer.effective for layer in layers]
    low, high = max(min(_flat(broad)), 1.0), max(_flat(broad))
    nowhere = _learned(layers)
    sinks = [[a + b for a, b in zip(layer.sinks, layer.nowhere, strict=True)] for layer in layers]
    local = [layer.local for layer in layers]
    first = f"On the first {profile.sinks} tokens{' or the sink' if nowhere else ''}, %"
    recent = f"Within the last {profile.recent} tokens, %"
    tokens = Shades(low, max(high, low * 2), log=True, text=_tokens)
    text = (
        "Each cell is a query head. Sinks: mass on the first tokens of the text"
        f"{', and on the logit that a layer has learned for looking nowhere' if nowhere else ''}. Locality: mass on "
        "the latest tokens. Breadth: e to the power of the entropy of the weights, the number of tokens a head would "
        "look at if it looked at all of them alike."
    )
    drawings = [
        _map("sinks", first, _range("Mass on sinks", sinks), [("", sinks)], _SHARE, names, "query head"),
        _map("local", recent, _range("Local mass", local), [("", local)], _SHARE, names, "query head"),
        _map(
            "breadth",
            "Breadth, tokens",
            f"Breadth by layer and head: {_tokens(low)} to {_tokens(high)} tokens.",
            [("", broad)],
            tokens,
            names,
            "query head",
        ),
    ]
    title = f"The narrowest head looks at {_tokens(low)} tokens, the broadest at {_tokens(high)}"
    return Section(title, text, "heads", 3, drawings, kind="maps")


def _tokens(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.5 else f"{value:.1f}"


def _gates(profile: Profile, found: Retrieval) -> Section:
    gates = [list(values) for values in found.gates.heads.values()]
    high = sum(gate >= 0.5 for gate in _flat(gates))
    asked = {
        "question": f"{found.asked} tokens of answers to questions about {found.texts} documents",
        "repeat": f"{found.asked} tokens of {found.texts} random passages that are read a second time",
    }[found.kind]
    text = (
        f"Asked for {asked}, how much does a KV head need tokens beyond the first {profile.sinks} and the latest "
        f"{profile.recent}? Recall: mass on the tokens that hold what is asked for. Change: how far its output moves "
        "without far tokens. The gate is the mean of the two; near 100 is a retrieval head."
    )
    if found.checks[-1].answers < ANSWERED:
        answered = f"{_told(found.checks[-1].answers)} %"
        text += f" This model finds only {answered} of it with all heads: its gates say little."
    halves = [("recall", list(found.recall.values())), ("change", list(found.change.values()))]
    rows = [str(layer) for layer in found.gates.heads]
    alt = f"Gates by layer and KV head: {high} of {len(_flat(gates))} are at least one half."
    drawings = [
        _map("gates", "Gates, %", alt, [("", gates)], _SHARE, rows),
        _map("halves", "Their halves, %", "Recall and change by layer and KV head.", halves, _SHARE, rows),
    ]
    title = f"{high} of {len(_flat(gates))} KV heads find{'s' * (high == 1)} what is far back"
    return Section(title, text, "gates", 2, drawings, kind="maps")


def _checks(profile: Profile, found: Retrieval) -> Section:
    text = (
        f"All but so many heads, those of the highest gates, see the first {profile.sinks} and the latest "
        f"{profile.recent} tokens only, in the prompt too. Left: the tokens asked for that are still the likeliest. "
        "Right: divergence on plain text, which uses far tokens in more ways than lookups do."
    )
    return Section("What is left when the other heads forget", text, "checks", 2, check_drawings(found.checks))


def _held(profile: Profile) -> Section:
    tenth = SHARES.index(0.1)
    once = statistics.fmean(layer.held_once[tenth] for layer in profile.layers)
    anew = statistics.fmean(layer.held_anew[tenth] for layer in profile.layers)
    text = (
        "The first half of the text is the past, its second half the queries; what is newer than the past is always "
        "kept. Left: tokens are dropped once, so that all queries share those that stay: as good as an eviction can "
        "get. Right: every query finds its own, the bound for page retrieval. The wider the gap, the more retrieval "
        "gains over dropping. The axis is stretched at its left end."
    )
    title = f"A tenth of the past, chosen once, holds {percent(once)} % of the mass; chosen anew, {percent(anew)} %"
    return Section(title, text, "held", 2, held_drawings(profile.layers))


def _budgets(profile: Profile) -> Section:
    layers = profile.layers
    grids = {level: [layer.budgets[f"{level:g}"] for layer in layers] for level in LEVELS}
    need = _flat(grids[LEVELS[0]])
    text = (
        "The share of the past that a KV head must keep, its best tokens first, so that with everything newer its "
        "query heads hold 95 or 99 % of their mass. Where heads differ, budgets per head pay (adakv); heads near zero "
        "can stream."
    )
    drawings = [
        _map(
            f"budget-{level:g}",
            f"Past tokens needed for {percent(level)} % of the mass, %",
            _range(f"Budgets for {percent(level)} %", grid),
            [("", grid)],
            _SHARE,
            _names(layers),
        )
        for level, grid in grids.items()
    ]
    title = (
        f"For {percent(LEVELS[0])} % of their mass, heads need {_told(min(need))} to {_told(max(need))} % of the past"
    )
    return Section(title, text, "budgets", 2, drawings, kind="maps")


def _errors(profile: Profile, errors: ErrorMap) -> Section:
    shades, rows = error_shades([errors]), [str(layer) for layer in profile.stored]
    drawings = [
        _map(f"errors-{side}", f"{side}, error in %", _range(f"{side}: error", grid), [("", grid)], shades, rows)
        for side, grid in (("Keys", errors.k), ("Values", errors.v))
    ]
    keys, values = (percent(statistics.fmean(_flat(grid))) for grid in (errors.k, errors.v))
    text = (
        "What the recipe's code changes, relative to the size of the vectors (rms), by layer and KV head, on the "
        "first passage of the text."
    )
    title = f"{profile.recipe} moves keys by {keys} % and values by {values} %"
    return Section(title, text, "errors", 2, drawings, kind="maps")


def _head(profile: Profile) -> str:
    read = f"{profile.passages} passage{'s' * (profile.passages != 1)} of {profile.tokens:,} tokens"
    return (
        f'<header><h1>Where attention goes: {escape(profile.model)}</h1><p class="lead">{len(profile.layers)} '
        f"layers on {read} ({escape(profile.text)}), observed at {profile.queries} queries of the second half of each."
        "</p></header>"
    )


def _advice(profile: Profile) -> str:
    advice = profile.suggestion
    return (
        f'<div class="verdict"><p><b>A recipe to try.</b> Found: {escape(advice.why)}.</p>'
        f"<pre>{escape(advice.recipe)}</pre></div>"
    )


def _reproduce(profile: Profile) -> str:
    settings = {
        "model": profile.model, "text": profile.text, "passages": profile.passages, "context": profile.tokens,
        "recipe": profile.recipe, "sinks": profile.sinks, "recent": profile.recent, "seed": profile.seed,
    }  # fmt: skip
    tables: list[tuple[str, Mapping[str, object]]] = [
        ("Settings", settings),
        ("Versions", profile.versions),
        ("Hardware", profile.hardware),
    ]
    facts = "".join(facts_table(title, values) for title, values in tables)
    return (
        "<section><h2>All layers</h2><p class='lead'>Means over a layer's heads; of the gates, the highest. "
        "top 10%: mass that a tenth of the past holds if kept once. for 95%, 99%: the share of the past needed for "
        "so much.</p>"
        f"{layer_table(profile)}</section>"
        f"<section><h2>How to get these figures</h2><pre>{escape(profile.command)}</pre>"
        f'<div class="facts">{facts}</div></section>'
    )
