"""One step of the engine: plan, run, commit. Everything that changes while requests run is changed here."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from kvfold.engine.detokenize import Decoder
from kvfold.engine.output import make_chunk, make_output
from kvfold.engine.request import FinishReason, RequestOutput
from kvfold.engine.runner import ModelRunner, SeqWork, not_finite
from kvfold.engine.sampling import sample
from kvfold.engine.scheduler import Admission, Scheduler, StepPlan, Work
from kvfold.engine.state import Branch, Request, Status
from kvfold.errors import CacheFullError, KVFoldError, NumericsError
from kvfold.formats import format_bytes
from kvfold.telemetry import StepStats

__all__ = ["EngineCore"]


class EngineCore:
    """The requests under way, and the steps that move them. Not thread-safe."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, tokenizer: Decoder | None) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.requests: dict[str, Request] = {}
        """Requests that have not ended, by id."""
        self.stats = StepStats()
        """What has been done since the start."""
        self.peak_bytes = 0
        """Most bytes of the cache that were in use at the end of any step's forward."""
        self._tokenizer = tokenizer
        self._watched: list[Branch] = []  # branches of streamed requests that gained something in this step
        self._ended: list[RequestOutput] = []

    def add(self, request: Request) -> None:
        """A new request goes to the end of the queue."""
        self.requests[request.id] = request
        for branch in request.branches:
            self.scheduler.add(branch)

    def step(self) -> list[RequestOutput]:
        """Compute the next tokens of whoever has a turn; the requests that have ended by that."""
        began = time.perf_counter()
        plan = self._settle()
        if not plan.empty:
            work = [*plan.work, *map(self._start, plan.admit)]
            logits = self._run(work)
            if logits is not None:
                self._count(work)
                self._retain(work)
                self._advance(work, logits)
        ended = self._deliver()
        self.stats.seconds += time.perf_counter() - began
        return ended

    def abort(self, request: Request) -> RequestOutput:
        """End every unfinished completion of ``request`` now."""
        for branch in request.branches:
            if branch.status is not Status.FINISHED:
                self._finish(branch, "abort")
        return self._deliver()[-1]

    # -- plan

    def _settle(self) -> StepPlan:
        """The next plan that needs nobody to give way; whoever has to is dealt with."""
        while True:
            plan = self.scheduler.plan()
            if plan.preempt is not None:
                self._preempt(plan.preempt)
            elif plan.stuck is not None:
                self._fail(plan.stuck, _too_small(self.runner))
            else:
                self.scheduler.note(plan)
                return plan

    def _preempt(self, branch: Branch, *, hold: bool = False) -> None:
        if branch.seq is not None:
            self.runner.free(branch.seq)
        self.scheduler.preempt(branch, hold=hold)
        self.stats.preemptions += 1

    def _read_again(self, branch: Branch) -> None:
        """A branch has got too long for the rotary factors of its keys: it waits, like a preempted one, to be read."""
        if branch.seq is not None:
            self.runner.free(branch.seq)
        self.scheduler.preempt(branch)
        self.stats.rope_rereads += 1

    # -- run

    def _start(self, admission: Admission) -> Work:
        """Give a waiting branch its sequence: a fork of its shared context, or what the prefix index has of it."""
        branch, _, work = admission
        shared = branch.shared
        if shared is not None:
            seq, branch.computed = self.runner.fork(shared.seq), len(shared.tokens)
        else:
            seq = self.runner.create()
            try:
                shareable = self.scheduler.shareable(branch)
                branch.computed = self.runner.adopt(seq, shareable, branch.request.salt, branch.lengths)
            except BaseException:
                self.runner.free(seq)
                raise
        self.stats.prefix_hit_tokens += branch.computed
        if branch.request.cached_tokens is None:
            branch.request.cached_tokens = branch.computed
        self.runner.expect(seq, self.scheduler.expected(branch, branch.computed))
        self.scheduler.admit(branch, seq)
        return work._replace(start=branch.computed, chunk=work.start + work.chunk - branch.computed)

    def _run(self, work: Sequence[Work]) -> torch.Tensor | None:
        """The logits of the branches that sample; None if there was no room after all, and somebody had to give way."""
        items = []
        for branch, start, chunk, sampled, _, watched in work:
            if branch.seq is None:
                raise RuntimeError("a branch in the plan holds no sequence")
            tokens = branch.tokens[start : start + chunk] if chunk > 1 else (branch.tokens[start],)
            items.append(SeqWork(branch.seq, tokens, start, branch.request.salt, sampled, watched, branch.lengths))
        try:
            ran = self.runner.run(items)
        except CacheFullError as error:
            youngest = self.scheduler.running[-1]
            if len(self.scheduler.running) > 1:
                self._preempt(youngest, hold=True)
            else:
                self._fail(youngest, error)
            return None
        self.peak_bytes = max(self.peak_bytes, self.runner.manager.bytes_in_use())
        for i in ran.broken:
            if not work[i].sample:  # `_advance` looks at those that sample, with the rows forked from them
                self._fail(work[i].branch, _numerics(work[i].branch))
        return ran.logits

    def _retain(self, work: Sequence[Work]) -> None:
        """Runs retention where the plan says so. Its room was planned; should it lack all the same (a method may need
        more to find out what to keep), the youngest gives way, and whoever is alone is ended.
        """
        for part in work:
            branch = part.branch
            while part.retain and branch.seq is not None:
                try:
                    end = part.start + part.chunk
                    final = not self.scheduler.retains_after(branch, end)
                    self.runner.retain(branch.seq, branch.tokens[:end], final=final)
                    self.runner.expect(branch.seq, self.scheduler.expected(branch, end))
                    break
                except CacheFullError as error:
                    if len(self.scheduler.running) == 1:
                        self._fail(branch, error)
                    else:
                        self._preempt(self.scheduler.running[-1], hold=True)
                except KVFoldError as error:
                    self._fail(branch, error)

    # -- commit

    def _count(self, work: Sequence[Work]) -> None:
        self.stats.steps += 1
        for branch, start, chunk, *_ in work:
            prompt = min(chunk, max(0, len(branch.request.prompt) - start))
            self.stats.prefill_tokens += prompt
            self.stats.decode_tokens += chunk - prompt

    def _advance(self, work: Sequence[Work], logits: torch.Tensor) -> None:
        """Fork what is to be forked, sample, and append. ``logits`` [S, V], one row for each of ``work`` that
        samples.
        """
        rows: list[Branch] = []
        place: list[int] = []  # row of the logits, for each row
        sampling = 0
        for branch, start, chunk, sampled, *_ in work:
            if branch.status is not Status.RUNNING:  # had to give way to retention
                sampling += sampled
                continue
            branch.computed = start + chunk
            if not sampled:
                continue
            rows.append(branch)
            place.append(sampling)
            if len(branch.request.branches) < branch.request.params.n:
                forks = self._fork(branch)
                rows += forks
                place += [sampling] * len(forks)
            sampling += 1
        if not rows:
            return
        if len(rows) > sampling:
            logits = logits[place]
        found = sample(logits, [branch.sampler for branch in rows])
        bad = set(found.bad)
        for row, branch in enumerate(rows):
            if row in bad:
                self._fail(branch, _numerics(branch))
                continue
            if branch.logprobs is not None:
                branch.logprobs.append(found.logprobs[row])
                branch.cumulative_logprob += found.logprobs[row][0].logprob
            self._append(branch, found.tokens[row])

    def _fork(self, first: Branch) -> list[Branch]:
        """The other completions of a prompt that is computed now, on the same blocks."""
        request, forks = first.request, []
        if first.seq is None:
            raise RuntimeError("a branch that was computed holds no sequence")
        for index in range(1, request.params.n):
            try:
                seq: int | None = self.runner.fork(first.seq)
            except CacheFullError:
                seq = None  # it gets its first token with the others, and then waits like a preempted one
            fork = first.fork(index, seq=seq, seed=request.seed + index)
            forks.append(fork)
            if seq is not None:
                self.scheduler.join(fork)
            else:
                fork.status, fork.computed = Status.PREEMPTED, 0
                self.scheduler.requeue(fork)
        request.branches += forks
        return forks

    def _append(self, branch: Branch, token: int) -> None:
        """The hot path: one more token, and a closer look only if it may be the last."""
        request = branch.request
        branch.tokens.append(token)
        if not branch.sampler.plain:
            branch.sampler.accept(token)
        if request.on_chunk is not None:
            self._watched.append(branch)
        if branch.text is not None or token in request.end_ids or len(branch.tokens) >= request.limit:
            self._look_for_end(branch, token)
        if request.rotary.switches(len(branch.tokens)) and branch.seq is not None:
            self._read_again(branch)

    def _look_for_end(self, branch: Branch, token: int) -> None:
        request = branch.request
        searched = branch.generated > request.params.min_tokens
        if branch.text is not None and branch.text.push(token, search=searched):
            self._finish(branch, "stop", branch.text.stop_match)
        elif token in request.end_ids:
            self._finish(branch, "stop", token if token in request.params.stop_token_ids else None)
        elif len(branch.tokens) >= request.limit:
            self._finish(branch, "length")

    # -- ends

    def _fail(self, branch: Branch, error: KVFoldError) -> None:
        branch.request.error = error
        self._finish(branch, "error")

    def _finish(self, branch: Branch, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """A completion ends: its blocks go back, and with the last of them its request is over."""
        if branch.seq is not None:
            self.runner.free(branch.seq)
        self.scheduler.finish(branch)
        branch.finish_reason, branch.stop_reason = reason, stop_reason
        request = branch.request
        if branch.text is not None:
            branch.text.finish()
        if request.on_chunk is not None and branch not in self._watched:
            self._watched.append(branch)
        if request.finished:
            del self.requests[request.id]
            self.stats.finished_requests += 1
            self._ended.append(make_output(request, self._tokenizer))

    def _deliver(self) -> list[RequestOutput]:
        """Hand out the chunks of the step, when all its changes are made; and what has ended."""
        watched, self._watched = self._watched, []
        ended, self._ended = self._ended, []
        finals = {output.request_id: output for output in ended}
        last = {branch.request.id: branch for branch in watched}
        for branch in watched:
            request = branch.request
            final = finals.get(request.id) if last[request.id] is branch else None
            if request.on_chunk is not None:
                request.on_chunk(make_chunk(branch, self._tokenizer, final))
        return ended


def _too_small(runner: ModelRunner) -> CacheFullError:
    held = runner.manager.tokens_capacity()
    budget = format_bytes(runner.manager.usage().budget)
    return CacheFullError(
        "no room for a single token more",
        why=f"{budget} hold {held:,} tokens of one sequence, and shared contexts take part of them",
        hint="raise kv_memory, remove a context, or choose a recipe with fewer bits",
    )


def _numerics(branch: Branch) -> NumericsError:
    return not_finite(f"request {branch.request.id}", f"token {branch.generated + 1} of completion {branch.index}")
