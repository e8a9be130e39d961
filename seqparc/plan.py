"""What the compiler knows about one cell at one set of shapes: the split, the programs, the structure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from seqparc.draws import Draw
from seqparc.ir import Contract, Program, topological
from seqparc.surroundings import same


@dataclass(frozen=True)
class StateShape:
    shape: tuple[int, ...]  # of one sample
    dtype: torch.dtype


class Stage(NamedTuple):
    """Some of the state's leaves, solved when the earlier ones are known: x is followed by each of those before and after every step.

    `plan` runs them, or, where they are no recurrence of their own, `piece`, which torch runs; `uses`: the inputs that either reads.
    """

    leaves: tuple[int, ...]
    earlier: tuple[int, ...]
    plan: Plan | None
    piece: Any
    uses: frozenset[int]


@dataclass
class Plan:
    """Everything fixed at compile time. Pieces are `seqparc.graphs.Piece`: parts of the cell that torch runs."""

    states: tuple[StateShape, ...]
    dtype: torch.dtype  # of the arithmetic
    prelude: Any  # Piece: streams from x, once over the whole sequence
    weights: Any  # Piece: parameter slots from parameters, once per call
    readout: Any  # Piece or None: outputs from states, once over the whole sequence
    direct: tuple[int | None, ...]  # stream slot -> the x leaf it simply is
    core: Program  # one lane, as traced
    program: Program  # the lane program that runs
    scalar: bool
    structure: Any  # seqparc.passes.dependency.Structure
    attributes: dict[str, Callable[[], torch.Tensor]]  # tensors the cell was found to use, looked up anew at every call
    frozen: dict[str, torch.Tensor]  # attributes whose values the structure relies on
    coarse: bool  # some of the cell is computed in 16 bits, by its dtypes or by autocast
    adjoint: Callable[[], Any]
    jacobian: Callable[[str, str], Program]  # (name of a kernel, update) -> the program that carries that update's matrices too
    stored: Callable[[], Any]  # seqparc.passes.stored.Stored: the program and the adjoint of save="store"; None if there is nothing to keep
    given: int | None = None  # what integers that come in and go out are to be below, if they could be larger than they are exact
    inputs: int = 0  # leaves of x, before the draws
    draws: tuple[Draw, ...] = ()  # random numbers of every step, further leaves of x
    own_gradient: tuple[str, ...] = ()  # where the cell cuts or replaces its own gradient, in words
    cut: tuple[bool, ...] = ()  # output leaves (or none) and next state leaves that no gradient leaves, where it does
    step: Any = None  # of a cell that is called itself, in place of a program: see runtime.opaque
    twins: tuple[tuple[Callable[[], torch.Tensor], str], ...] = ()  # other ways to an attribute: a parameter that is tied
    stages: tuple[Stage, ...] = ()  # in whose order it runs, if in more than one; then only the readout is its own
    notes: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._known = [(get, get().shape, get().dtype) for get in self.attributes.values()]

    def stale(self) -> bool:
        """Whether a tensor the cell uses has another shape or dtype now or is no longer tied to another, or a constant has other values."""
        for get, shape, dtype in self._known:
            t = get()
            if t.shape != shape or t.dtype != dtype:
                return True
        if self.twins and any(get() is not self.attributes[name]() for get, name in self.twins):
            return True
        frozen = [(self.attributes[name](), value) for name, value in self.frozen.items()]
        # While a model is exported its tensors hold no numbers; the operator that the graph holds asks again.
        return any(t.requires_grad or not same(t, v) for t, v in frozen)

    @functools.cached_property
    def read(self) -> tuple[Any, ...]:
        """Keys of what the readout reads."""
        return () if self.readout is None else tuple(self.readout.inputs)

    @functools.cached_property
    def products(self) -> int:
        """Matrix products of a step."""
        roots = (*self.program.next, *(e.value for e in self.program.emits))
        return sum(isinstance(v, Contract) for v in topological(roots))

    @functools.cached_property
    def place(self) -> np.ndarray:
        """[lanes, n]: where each state number of a lane lies in the flat state of a sample."""
        offsets = np.concatenate([[0], np.cumsum(self.program.state_sizes)])
        return np.concatenate([v.index.array + offsets[v.slot] for v in self.program.state], axis=1)


@dataclass(frozen=True)
class Choice:
    """The decision for one run.

    updates: the first is made until the gap falls too slowly, then the next; given_up: sequential because passes did not pay.
    """

    strategy: str
    chunks: int
    warmup: int
    updates: tuple[str, ...]
    reasons: tuple[str, ...]
    given_up: bool = False


class Setting(NamedTuple):
    """How a GPU kernel is launched: lanes of a program and its warps, and how many warm-ups long a chunk is at least."""

    block: int
    warps: int
    chunk_per_warmup: int


@dataclass
class History:
    """Over all calls of an engine in one direction, since it was made.

    passes: of all calls together; fallbacks: calls that the sequential kernel finished; given_up: those that it ran from the start because
    earlier ones had shown that passes do not pay; gap: the worst at the end of a call that converged. Of runs on a GPU that nobody watches
    only those show there that were looked at.
    """

    calls: int = 0
    passes: int = 0
    fallbacks: int = 0
    given_up: int = 0
    gap: float = 0.0

    def add(self, passes: int, gap: float, converged: bool, given_up: bool) -> None:
        self.calls += 1
        self.passes += passes
        self.fallbacks += not converged
        self.given_up += given_up
        if converged and gap > self.gap:
            self.gap = gap


@dataclass
class Stats:
    """Of the last call.

    gap: the largest move of a chunk's start state at the end, relative to its magnitude; gaps: after each pass; history: of all calls;
    steps, seconds: of the recurrence alone, without what is done before and after it; seconds None where a run was only begun.
    """

    backend: str = ""
    strategy: str = ""
    chunks: int = 1
    chunk_length: int = 0
    warmup: int = 0
    update: str = "none"
    passes: int = 0
    gap: float = 0.0
    gaps: tuple[float, ...] = ()
    converged: bool = True
    fallback: str | None = None
    reasons: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    batch: int = 0
    steps: int = 0
    seconds: float | None = None
    history: History = field(default_factory=History)
    backward: Stats | None = None

    @property
    def memory(self) -> float | None:
        """Steps in which what is left of an earlier state falls to 1/e, roughly, by the first gap after the warm-up, or by what the
        second pass has left of it.

        At most that, where the gap was rounding; infinite where neither fell; None where there was no warm-up.
        """
        if self.chunks == 1 or not self.warmup or not self.gaps:
            return None
        falls = [(self.warmup, self.gaps[0])]
        if len(self.gaps) > 1 and self.update == "none" and self.gaps[0] > 0:
            falls.append((self.chunk_length, self.gaps[1] / self.gaps[0]))
        return min((steps / -math.log(max(left, 1e-17)) for steps, left in falls if left < 1), default=math.inf)

    @property
    def verdict(self) -> str:
        """Whether the last call ran in parallel, and why, in words."""
        if self.chunks == 1:
            return f"sequential: {self.reasons[-1] if self.reasons else 'asked for'}"
        if not self.converged:
            return f"not in parallel: {self.fallback}"
        forgets = "" if self.memory in (None, math.inf) else f"; an earlier state is down to 1/e in {self.memory:.3g} steps or fewer"
        return f"in parallel, {self.passes} pass{'es' * (self.passes != 1)} over {self.chunks} chunks{forgets}"


def combined(told: Sequence[Stats]) -> Stats:
    """What several stages did, as one: the figures of the one that was hardest, the worst gap, everybody's time."""
    hardest = max(told, key=lambda s: (s.fallback is not None, s.passes, s.chunks))
    backward = [s.backward for s in told if s.backward is not None]
    return replace(
        hardest, backend="+".join(dict.fromkeys(s.backend for s in told)), gap=max(s.gap for s in told),
        converged=all(s.converged for s in told), compile_seconds=sum(s.compile_seconds for s in told),
        backward=combined(backward) if backward else None,
    )  # fmt: skip
