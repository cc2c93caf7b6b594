"""What people see: tables on the terminal. The numbers come from elsewhere; nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvfold.doctor import STORAGES, Examination
from kvfold.formats import format_bytes
from kvfold.quality.calibrate import CalibrationReport
from kvfold.quality.demo import DemoRow
from kvfold.quality.profile import Profile
from kvfold.quality.profile.tables import headings, layer_rows
from kvfold.quality.results import Evaluation, Generation, Row, TaskScore
from kvfold.quality.tasks import Document
from kvfold.quality.train_retention import LEAST_R2, TrainingReport
from kvfold.tables import Figures

__all__ = [
    "calibration_report",
    "demo_report",
    "doctor_report",
    "eval_report",
    "lm_eval_report",
    "profile_report",
    "stats_report",
    "training_report",
]


NOT_MEASURED: Final = "–"


def demo_report(console: Console, document: Document, rows: Sequence[DemoRow], *, answers: bool) -> None:
    """The document in one line, a sample of questions and answers, and the table of recipes."""
    if not rows:
        return
    first = rows[0]
    console.print(
        f"A stretch of Python's own documentation, {len(document.text):,} characters, in which "
        f"{first.answers_total} facts\nare planted. The model reads it ({first.context_tokens:,} tokens with "
        "the questions) and is asked for each.\n"
    )
    _print_answers(console, rows, limit=None if answers else 3)
    headings = ("recipe", "KV cache", "smaller", "answers", "mean KL", "top-1")
    table = Figures("The same questions, from caches of different size", headings)
    for row in rows:
        table.add(
            row.recipe,
            format_bytes(row.kv_bytes),
            f"{row.compression:.2f}x",
            f"{row.answers_right} of {row.answers_total}",
            NOT_MEASURED if row.kl is None else f"{row.kl:.4f}",
            _share(row.top1_agreement),
        )
    table.print(console)
    console.print(
        "KV cache: all blocks allocated for the text; sinks, recent window, scales,\n"
        "slack and tables counted. KL (nats) and top-1 agreement: against raw, on the\n"
        f"same {first.positions:,} teacher-forced tokens, through the runtime that serves.\n",
        style="dim",
    )
    _print_idle(console, (name for row in rows for name in row.idle))


def _print_answers(console: Console, rows: Sequence[DemoRow], limit: int | None) -> None:
    width = max(len(row.recipe) for row in rows)
    for i, answer in enumerate(rows[0].answers[:limit]):
        console.print(f"[bold]{escape(answer.question)}[/]")
        for row in rows:
            said = row.answers[i]
            mark = "[green]right[/]" if said.right else f"[red]wrong[/], planted: {escape(said.expected)}"
            console.print(f"  {row.recipe:<{width}} {escape(said.said.strip())}  {mark}")
    if limit is not None and len(rows[0].answers) > limit:
        console.print(f"(the first {limit} of {len(rows[0].answers)}; all of them with --answers)\n", style="dim")


def eval_report(console: Console, evaluation: Evaluation) -> None:
    """What every contestant costs and keeps, then its answers to the tasks."""
    if not evaluation.rows:
        return
    settings = evaluation.settings
    title = f"{evaluation.model}, {settings['context']:,} tokens, seed {evaluation.seed}"
    table = Figures(title, ("", "bits", "B/token", "smaller", "KL", "p99", "top-1", "Δppl", "tok/s"))
    generation = Figures("Long generation", ("", "KL", "p99", "top-1", "parts at"))
    for row in evaluation.rows:
        table.add(
            row.contestant,
            "" if row.bits_per_value is None else f"{row.bits_per_value:.2f}",
            f"{row.kv_bytes_per_token:,.0f}",
            f"{row.compression:.2f}x",
            _nats(row.kl_mean),
            _nats(row.kl_p99),
            _share(row.top1_agreement),
            NOT_MEASURED if row.ppl_delta is None else f"{row.ppl_delta:+.3f}",
            f"{row.decode_tok_s:.0f}" if row.decode_tok_s else "",
        )
        if (long := row.generation) is not None:
            parts = _divergence(long)
            generation.add(row.contestant, _nats(long.kl_mean), _nats(long.kl_p99), _share(long.top1_agreement), parts)
    table.print(console)
    first = evaluation.rows[0]
    own = "" if first.ppl is None or first.ppl_delta is None else f"\n(perplexity {first.ppl - first.ppl_delta:.3f})"
    console.print(
        f"KL (nats, mean and 99th percentile), top-1 agreement and perplexity: against raw{own}, "
        f"over {first.positions:,} teacher-forced tokens of text, "
        "through the runtime\nthat serves. bits: of a number in a packed block, scales included. B/token: all\n"
        "bytes allocated for a passage.\n",
        style="dim",
    )
    _print_idle(console, (name for row in evaluation.rows for name in row.idle))
    if len(generation) and (long := first.generation) is not None:
        generation.print(console)
        console.print(
            f"Raw's own greedy continuations ({long.passages} of {long.tokens:,} tokens), teacher-forced. parts at:\n"
            "tokens after which a contestant's own greedy generation leaves raw's (median).\n",
            style="dim",
        )
        longs = [row.generation for row in evaluation.rows if row.generation is not None]
        _print_idle(console, (name for long in longs for name in long.idle))
    _print_tasks(console, evaluation.rows)


def _divergence(long: Generation) -> str:
    if long.first_divergence is None:
        return NOT_MEASURED
    return "never" if long.first_divergence >= long.tokens else f"{long.first_divergence:g}"


def _print_idle(console: Console, idle: Iterable[str]) -> None:
    """Which figures are not measured, and why."""
    if names := ", ".join(dict.fromkeys(idle)):
        console.print(
            f"{NOT_MEASURED}: not measured. The text is too short for {names} to leave anything out: the figure "
            "would be that of the full cache. Give longer texts, or smaller numbers in the recipe.\n",
            style="yellow",
            highlight=False,
        )


def _print_tasks(console: Console, rows: Sequence[Row]) -> None:
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    if not tasks:
        return
    table = Figures("Tasks, % right (95 % interval)", ("", *tasks))
    for row in rows:
        table.add(row.contestant, *(_score(row.tasks.get(task)) for task in tasks))
    table.print(console)


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-4 else f"{value:.4f}"


def _score(score: TaskScore | None) -> str:
    return "" if score is None else f"{100 * score.score:.0f} ({100 * score.low:.0f}–{100 * score.high:.0f})"


def calibration_report(console: Console, report: CalibrationReport) -> None:
    """Where the energy lies and what bits would cost, and a recipe to paste."""
    console.print(f"Calibrated on {report.tokens:,} tokens, {report.entropy:.2f} nats each.\n")
    table = Figures(
        None,
        ("layer", "99 % of K in", "99 % of V in", "K at 3 bits", "V at 3 bits"),
    )
    for layer in report.layers:
        table.add(
            str(layer.layer),
            f"{layer.k_rank} of {layer.k_dim}",
            f"{layer.v_rank} of {layer.v_dim}",
            *(" ".join(f"{dims}x{bits}" for bits, dims in bands) for bands in (layer.k_bands, layer.v_bands)),
        )
    table.print(console)
    console.print("Predicted KL per token, in nats, if all of a context is packed:")
    table = Figures(None, ("bits", "of K", "of V"))
    for bits, (keys, values) in report.costs.items():
        table.add(bits, f"{keys:.4f}", f"{values:.4f}")
    table.print(console)
    console.print(f"A recipe to try: int2.5:calibrated({report.file})", highlight=False, soft_wrap=True)


def profile_report(console: Console, found: Profile) -> None:
    """A row for each layer, what is left with few full heads, and a recipe to paste."""
    table = Figures(f"{found.model}, {found.passages} x {found.tokens:,} tokens", headings(found))
    for row in layer_rows(found):
        table.add(*row)
    table.print(console)
    console.print(
        f"sinks, last {found.recent}: part of the attention. breadth: tokens a head looks at.\n"
        "top 10%: what a tenth of the past holds if kept once, with all that is newer.\n"
        "for 95%, 99%: how much of the past heads need for so much. gate: the highest.\n",
        style="dim",
    )
    if found.retrieval is not None:
        table = Figures("KV heads that keep every token", ("", *(f"{check.full}" for check in found.retrieval.checks)))
        table.add("answer tokens right", *(f"{check.answers:.0%}" for check in found.retrieval.checks))
        table.add("KL on the text", *(_nats(check.kl) for check in found.retrieval.checks))
        table.print(console)
    console.print(f"{found.suggestion.why[:1].upper()}{found.suggestion.why[1:]}.", highlight=False)
    console.print(f"A recipe to try: {found.suggestion.recipe}", highlight=False, soft_wrap=True)


def training_report(console: Console, report: TrainingReport) -> None:
    """How well each head's scores are predicted on held-out passages, and a recipe to paste if that is good enough."""
    size = format_bytes(report.bytes)
    console.print(f"Learned from {report.tokens:,} tokens, judged on {report.held_out:,} of them; {size}.\n")
    table = Figures(None, ("layer", "head", "map", "R²", "Spearman"))
    for layer in report.layers:
        for number, head in enumerate(layer.heads):
            table.add(str(layer.layer), str(number), layer.kind, f"{head.r2:.3f}", f"{head.spearman:.3f}")
    table.print(console)
    if report.useful:
        console.print(f"A recipe to try: raw+learned({report.file},keep=0.25)", highlight=False, soft_wrap=True)
        return
    console.print(
        f"No recipe is recommended: on held-out passages the heads have a mean R² of {report.mean_r2:.3g}, and "
        f"{LEAST_R2:g} is the least that is useful. R² is the share of the differences between tokens that the scorer "
        "explains: 1 is all of it, 0 is no better than a constant, below 0 is worse.\n"
        "Try more --tokens, a --text like the texts to be served, or longer passages (--length). "
        "raw+kvzip(keep=0.25) needs no file.",
        style="yellow",
        highlight=False,
    )


def lm_eval_report(console: Console, outcome: Mapping[str, Any]) -> None:
    """The harness' tasks and metrics, a row each, with a column for each recipe: value ± standard error."""
    recipes: Mapping[str, Any] = outcome["recipes"]
    table = Figures(f"{outcome['model']}, lm-eval {outcome['lm_eval']}", ("", "metric", *recipes), names=2)
    results = {recipe: {**found["results"], **found.get("groups", {})} for recipe, found in recipes.items()}
    for task, metrics in next(iter(results.values())).items():
        for name in metrics:
            metric, comma, kind = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = f"{metric}_stderr,{kind}"
                figures = (_harness_value(found[task].get(name), found[task].get(error)) for found in results.values())
                table.add(task, metric if kind == "none" else f"{metric} ({kind})", *figures)
    table.add("", "cache at most", *(format_bytes(found["kv_peak_bytes"]) for found in recipes.values()))
    table.print(console)
    if idle := [f"{recipe}: {', '.join(found['idle'])}" for recipe, found in recipes.items() if found.get("idle")]:
        console.print(
            "These methods left nothing out before any scored answer, so that its likelihoods are those of the full "
            f"cache: {'; '.join(idle)}. Give longer prompts, or smaller numbers in the recipe.",
            style="yellow",
            highlight=False,
        )
    if outcome["limit"] is not None:
        console.print(f"The first {outcome['limit']} documents of each task only: no result to publish.", style="dim")


def _harness_value(value: object, error: object) -> str:
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.4g} ± {error:.2g}" if isinstance(error, int | float) else f"{value:.4g}"


_HOW_TO_BUILD = """\
To get it, install a C++20 compiler (apt install g++, dnf install gcc-c++, xcode-select --install)
and then kvfold anew: make clean venv in a clone, elsewhere
  pip install -v --force-reinstall --no-deps --no-cache-dir SOURCE"""


def doctor_report(console: Console, found: Examination) -> None:
    """The machine in a few lines, then the self-test."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("software", ", ".join(f"{name} {version}" for name, version in found.versions.items()))
    facts.add_row("processor", f"{escape(found.processor)}, {found.cpus} may be used")
    if found.features:
        marks = (name if here else f"[dim strike]{name}[/]" for name, here in found.features.items())
        facts.add_row("can do", "  ".join(marks))
    facts.add_row("kernel", f"[green]{found.kernel}[/]" if found.missing is None else f"[yellow]{found.kernel}[/]")
    for why in dict.fromkeys(found.passed_over.values()):
        builds = ", ".join(build for build, reason in found.passed_over.items() if reason == why)
        facts.add_row("", f"not {builds}: {why}", style="dim")
    facts.add_row("threads", f"{found.threads}: {found.threads_from}")
    if found.wake_seconds is not None:
        facts.add_row("", f"at work {found.wake_seconds * 1e6:.0f} µs after a call", style="dim")
    facts.add_row("memory", f"{format_bytes(found.memory_bytes)} available, read at {found.stream_gb_s:.1f} GB/s")
    facts.add_row("GPU", escape(found.cuda or f"none: {found.no_cuda}"))
    console.print(facts)
    if found.missing is not None:
        console.print(f"\n[yellow]No native kernel, decode is slower[/]: {escape(found.missing)}.", soft_wrap=True)
        console.print(_HOW_TO_BUILD, highlight=False, soft_wrap=True)
    _print_self_test(console, found)


def _print_self_test(console: Console, found: Examination) -> None:
    table = Figures("\nSelf-test: error against the float32 reference", ("", *STORAGES))
    for kernel in dict.fromkeys(test.kernel for test in found.tests):
        tests = {test.storage: test for test in found.tests if test.kernel == kernel}
        style = {True: "green", False: "bold red"}
        cells = (f"[{style[test.passed]}]{test.error:.1e}[/]" for test in (tests[storage] for storage in STORAGES))
        table.add(kernel, *cells)
    table.print(console)
    if found.passed:
        console.print("Every kernel agrees with the reference.", style="green")
    for test in found.tests:
        if not test.passed:
            said = f"FAILED: {test.kernel} on {test.storage}, error {test.error:.1e}, at most {test.tolerance:.0e}"
            console.print(said, style="bold red", highlight=False)


def stats_report(console: Console, stats: Mapping[str, object]) -> None:
    """Name and value, one a line; what retention has done on a line of its own."""
    if stats.get("retention_runs"):
        blocks, sizes = (
            [stats[f"retention_{what}_{when}"] for when in ("before", "after")] for what in ("blocks", "bytes")
        )
        before, after = (format_bytes(size) if isinstance(size, int) else size for size in sizes)
        console.print(f"retention: {blocks[0]} blocks before, {blocks[1]} after ({before} before, {after} after)")
    for name, value in stats.items():
        if value is None:
            console.print(f"{name.replace('_', ' ')}: not told by this system")
            continue
        shown = format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else value
        console.print(
            f"{name.replace('_', ' ')}: {shown:.4g}"
            if isinstance(shown, float)
            else f"{name.replace('_', ' ')}: {shown}"
        )
