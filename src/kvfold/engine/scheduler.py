"""Who runs in the next step. `Scheduler.plan` proposes and changes nothing; the engine commits, one verb for each
change.

The order is first come, first served, with no exception: memory and tokens go to the oldest first, the youngest is
preempted first, and nobody overtakes the head of the queue. The oldest request therefore always moves, so that nobody
starves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvfold.engine.chunks import Chunking
from kvfold.engine.state import Branch, Status
from kvfold.errors import RequestError
from kvfold.memory.manager import CacheManager, Demand, PoolKey
from kvfold.memory.reservation import NOTHING
from kvfold.rule import KeepRule

__all__ = ["Admission", "Scheduler", "StepPlan", "Work"]


class Work(NamedTuple):
    """``chunk`` tokens of a branch from ``start`` on; ``sample``: they are its last, a new token follows; ``retain``:
    retention runs on it after them; ``watched``: it will run then or later.
    """

    branch: Branch
    start: int
    chunk: int
    sample: bool
    retain: bool = False
    watched: bool = False


class Admission(NamedTuple):
    """A waiting branch that gets a sequence; ``cached`` tokens come from the prefix index, ``work`` is its first
    chunk.
    """

    branch: Branch
    cached: int
    work: Work


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do next. If ``preempt`` or ``stuck`` is set, that is all there is: do it and plan again."""

    work: tuple[Work, ...] = ()
    """Chunks of branches that run already: decodes first, then prompts."""
    admit: tuple[Admission, ...] = ()
    preempt: Branch | None = None
    """Must give its blocks back, so that an older one can go on."""
    stuck: Branch | None = None
    """Alone, and still without room for a single token: it can only be ended."""
    blocked: Branch | None = None
    """Head of the queue, for which there is no room before something is given back."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.work and not self.admit


class Scheduler:
    """The queue of waiting branches, the list of running ones, and the rule that makes a plan of them."""

    def __init__(
        self,
        books: CacheManager,
        *,
        max_batched_tokens: int = 512,
        max_sequences: int = 64,
        prefix_caching: bool = True,
        rule: KeepRule | None = None,
        watches: int | None = 0,
        repeatable: bool = False,
    ) -> None:
        """``max_batched_tokens``: tokens of a step; ``max_sequences``: sequences that run at once. ``rule``,
        ``watches``, ``prefix_caching``, ``repeatable``: see `Chunking`.
        """
        if max_sequences < 1 or max_batched_tokens < max_sequences:
            raise RequestError(
                f"max_batched_tokens={max_batched_tokens} with max_sequences={max_sequences}",
                why="a step must have room for one token of each running sequence",
                hint="raise max_batched_tokens or lower max_sequences",
            )
        self.max_batched_tokens = max_batched_tokens
        self.max_sequences = max_sequences
        self._books = books
        self._rule = rule
        self._block_size = books.block_size
        self.chunking = Chunking(
            groups=books.groups,
            block_size=books.block_size,
            rule=rule,
            watches=watches,
            prefix_caching=prefix_caching,
            repeatable=repeatable,
        )
        self._token_demand = _worst_token(books)
        self._running: list[Branch] = []
        self._waiting: deque[Branch] = deque()
        self._blocked: Branch | None = None

    @property
    def running(self) -> Sequence[Branch]:
        """Branches that hold a sequence, oldest first."""
        return self._running

    @property
    def waiting(self) -> Sequence[Branch]:
        """Branches without one, oldest first."""
        return self._waiting

    # -- the proposal

    def plan(self) -> StepPlan:
        """The next step. Pure: asked twice it gives the same, and a plan that is dropped leaves nothing behind."""
        decoding = [b for b in self._running if len(b.tokens) - b.computed == 1]
        work = [self._work(b, b.computed, 1) for b in decoding]
        # Room for every decode whatever its next token needs: the common case, and one question. Only then others may
        # join.
        taken = sum((self._kept(w) for w in work), _times(self._token_demand, len(decoding)))
        roomy = self._books.fits(taken)
        if not roomy:
            work, taken, victim = self._tight_decodes(decoding)
            if victim is not None:
                return StepPlan(preempt=victim)
        budget = self.max_batched_tokens - len(work)
        owed = taken
        prompts = (
            [b for b in self._running if len(b.tokens) - b.computed > 1] if len(decoding) < len(self._running) else []
        )
        for branch in prompts:
            if budget == 0:
                break
            part = self._part(branch, branch.computed, budget)
            need = self._need(part)
            if roomy and not self._books.fits(taken, need):
                # The decodes may need less than their worst.
                roomy, taken = False, sum((self._need(w) for w in work), NOTHING)
            if not self._books.fits(taken, need):
                if branch is not self._running[-1]:
                    return StepPlan(preempt=self._running[-1])
                break  # the youngest holds what it has, and waits
            work.append(part)
            taken += need
            # A prompt that was admitted is owed the room for all of it; newcomers may not take that.
            rest = self._held_at_once(len(branch.tokens) - branch.computed)
            owed += self._books.demand(_seq(branch), rest) + self._kept_of(branch)
            budget -= part.chunk
        if not self._running:
            return self._first()
        admit, blocked = self._admissions(budget, owed, prompts) if roomy else ((), None)
        if work or admit:
            return StepPlan(work=tuple(work), admit=admit, blocked=blocked)
        return self._squeezed()

    def _tight_decodes(self, decoding: Sequence[Branch]) -> tuple[list[Work], Demand, Branch | None]:
        """Decodes that fit by their exact demand; or the branch to preempt, if an older one does not fit."""
        work: list[Work] = []
        taken = NOTHING
        for branch in decoding:
            part = self._work(branch, branch.computed, 1)
            need = self._need(part)
            if not need or self._books.fits(taken, need):
                work.append(part)
                taken += need
            elif branch is not self._running[-1]:
                return [], NOTHING, self._running[-1]
        return work, taken, None

    def _admissions(
        self, budget: int, owed: Demand, prompts: Sequence[Branch]
    ) -> tuple[tuple[Admission, ...], Branch | None]:
        """Newcomers beside the running, as long as there is room for the whole of each; and the first that is
        blocked.
        """
        admit: list[Admission] = []
        slots = self.max_sequences - sum(branch.slots for branch in self._running) if self._waiting else 0
        for branch in self._waiting:
            if budget == 0 or branch.slots > slots:
                break
            if branch is self._blocked:
                return tuple(admit), branch
            cached = self._cached(branch)
            if any(self._worth_awaiting(branch, cached, other) for other in [*prompts, *(a.branch for a in admit)]):
                break
            # Beside the prompt itself, a block for each completion to grow into: else it is preempted as soon as
            # admitted.
            owed += self._arrival(branch, cached, self._held_at_once(len(branch.tokens) - cached))
            owed += self._kept_of(branch) + _times(self._token_demand, branch.slots)
            if not self._books.fits(owed):
                return tuple(admit), branch
            part = self._part(branch, cached, budget)
            admit.append(Admission(branch, cached, part))
            slots -= branch.slots
            budget -= part.chunk
        return tuple(admit), None

    def _first(self) -> StepPlan:
        """Nothing runs: the head of the queue is served if a single token of it fits, and others beside it if all of
        it does.
        """
        if not self._waiting:
            return StepPlan()
        admit, _ = self._admissions(self.max_batched_tokens, NOTHING, [])
        if admit:
            return StepPlan(admit=admit)
        head = self._waiting[0]
        cached = self._cached(head)
        part = self._part(head, cached, self.max_batched_tokens)
        while part.chunk and not self._books.fits(self._arrival(head, cached, part.chunk) + self._kept(part)):
            part = self._work(head, cached, part.chunk // 2)
        if not part.chunk:
            return StepPlan(stuck=head)
        return StepPlan(admit=(Admission(head, cached, part),))

    def _squeezed(self) -> StepPlan:
        """Nothing fits beside what is held: the youngest gives way; the last one left goes on in smaller steps."""
        if len(self._running) > 1:
            return StepPlan(preempt=self._running[-1])
        branch = self._running[0]
        part = self._part(branch, branch.computed, self.max_batched_tokens)
        while part.chunk and not self._books.fits(self._need(part)):
            part = self._work(branch, branch.computed, part.chunk // 2)
        return StepPlan(work=(part,)) if part.chunk else StepPlan(stuck=branch)

    def _worth_awaiting(self, branch: Branch, cached: int, other: Branch) -> bool:
        """Whether ``other``, whose prompt is being computed, will soon offer ``branch`` more than the index does
        now.
        """
        size = self._block_size
        if not self.chunking.prefix_caching or branch.shared or branch.salt != other.salt:
            return False
        if branch.tokens[:size] != other.tokens[:size]:
            return False
        final = self.chunking.final(self.expected(other, 0))
        most = min(final, self._shareable(branch))
        shared = range(size, most + 1, size)
        # How many blocks the two have in common, by bisection: a comparison of slices is fast, one of tokens is not.
        blocks = bisect_left(shared, True, key=lambda end: branch.tokens[:end] != other.tokens[:end])
        return blocks * size > max(cached, min(final, other.computed // size * size))

    def _cached(self, branch: Branch) -> int:
        """Tokens at the start of a waiting branch that need not be computed."""
        if (shared := branch.shared) is not None:
            return len(shared.tokens)
        return self._books.match(self.shareable(branch), branch.salt)

    def _arrival(self, branch: Branch, cached: int, count: int) -> Demand:
        """The demand of ``count`` tokens after ``cached`` ones from the index, which cease to be free when they are
        taken; or from a shared context, of which there will be a fork.
        """
        if (shared := branch.shared) is not None:
            return self._books.demand_fork(shared.seq, count)
        return self._books.demand_for(
            cached, count, expected=self.expected(branch, cached), tokens=branch.tokens, salt=branch.salt
        )

    def _part(self, branch: Branch, start: int, budget: int) -> Work:
        """The next chunk of a branch, of at most ``budget`` tokens."""
        end = self.chunking.end(start, len(branch.tokens), branch.request.context, budget)
        return self._work(branch, start, end - start)

    def _work(self, branch: Branch, start: int, count: int) -> Work:
        point = self._next_point(branch, start)
        retain = count > 0 and point == start + count
        return Work(branch, start, count, start + count == len(branch.tokens), retain, point is not None)

    # -- retention

    def shareable(self, branch: Branch) -> Sequence[int]:
        """The tokens whose blocks a branch may take from the prefix index, and one more, which it computes anyway."""
        return branch.tokens[: self._shareable(branch) + 1]

    def _shareable(self, branch: Branch) -> int:
        return self.chunking.shareable(len(branch.tokens), branch.request.context)

    def expected(self, branch: Branch, start: int) -> int:
        """The length up to which a branch is read from ``start`` on before retention changes what is stored."""
        return self.chunking.expected(start, len(branch.tokens), branch.request.context)

    def retains_after(self, branch: Branch, length: int) -> bool:
        """Whether retention will run again on a branch beyond ``length`` tokens."""
        return self._next_point(branch, length) is not None

    def _next_point(self, branch: Branch, start: int) -> int | None:
        return self.chunking.next_point(start, branch.request.context)

    def _need(self, part: Work) -> Demand:
        """Blocks for a part of a running branch, and for what retention keeps after it."""
        return self._books.demand(_seq(part.branch), part.chunk) + self._kept(part)

    def _kept(self, part: Work) -> Demand:
        return self._books.demand_keep(part.start + part.chunk) if part.retain else NOTHING

    def _kept_of(self, branch: Branch) -> Demand:
        """Blocks for what retention will keep of the tokens a branch has yet to compute."""
        return NOTHING if self._rule is None else self._books.demand_keep(len(branch.tokens))

    def _held_at_once(self, tokens: int) -> int:
        """So many of ``tokens`` new ones are in the cache at once: of a prompt that is compressed while it is read, a
        chunk beside what was kept before.
        """
        chunk = 0 if self._rule is None else self._rule.chunk
        return min(tokens, 2 * chunk) if chunk else tokens

    # -- the changes

    def add(self, branch: Branch) -> None:
        """A new branch goes to the end of the queue."""
        self._waiting.append(branch)

    def admit(self, branch: Branch, seq: int) -> None:
        """The head of the queue runs now, on the cache sequence ``seq``."""
        if branch is not self._waiting[0]:
            raise ValueError("only the head of the queue can be admitted")
        self._waiting.popleft()
        branch.status, branch.seq = Status.RUNNING, seq
        self.join(branch)

    def join(self, branch: Branch) -> None:
        """A branch that holds a sequence already (a fork) runs too."""
        insort(self._running, branch, key=lambda b: b.key)

    def note(self, plan: StepPlan) -> None:
        """Remember whom a plan found blocked, so that the next ones need not look again before something is given
        back.
        """
        # A prompt that moves on may have computed a prefix for it, so that it needs less.
        moving = bool(plan.admit) or any(work.chunk > 1 for work in plan.work)
        self._blocked = None if moving else plan.blocked

    def preempt(self, branch: Branch, *, hold: bool = False) -> None:
        """A running branch, whose sequence has been freed, waits again; with ``hold``, until others give something
        back.
        """
        self._leave(branch, Status.PREEMPTED)
        self.requeue(branch)
        if hold and self._running:
            self._blocked = branch

    def requeue(self, branch: Branch) -> None:
        """A branch without a sequence takes its place in the queue, in the order of age."""
        older = 0
        while older < len(self._waiting) and self._waiting[older].key < branch.key:
            older += 1
        self._waiting.insert(older, branch)

    def finish(self, branch: Branch) -> None:
        """A branch has ended, wherever it was."""
        if branch.status is Status.RUNNING:
            self._leave(branch, Status.FINISHED)
        else:
            self._waiting.remove(branch)
            branch.status = Status.FINISHED

    def _leave(self, branch: Branch, status: Status) -> None:
        self._running.remove(branch)
        self._blocked = None
        branch.status, branch.seq, branch.computed = status, None, 0


def _worst_token(books: CacheManager) -> Demand:
    """What one more token of a sequence can need at worst: in each group a new or copied raw block, and a packed
    one.
    """
    blocks: dict[PoolKey, int] = {}
    for group, spec in enumerate(books.groups):
        blocks[group, "raw"] = 1
        blocks[group, "packed"] = int(spec.seals)
    return Demand(blocks, entries=len(books.groups))


def _times(demand: Demand, n: int) -> Demand:
    return Demand({key: n * count for key, count in demand.items()}, entries=n * demand.entries)


def _seq(branch: Branch) -> int:
    if branch.seq is None:
        raise ValueError("the branch holds no sequence")
    return branch.seq
