"""What the user holds: a module that runs their cell over whole sequences."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqparc import signature as sig
from seqparc.captured import parts
from seqparc.draws import drawn
from seqparc.errors import SeqparcError, SeqparcWarning, ShapeError, StateError, UnsupportedOpError
from seqparc.held import Watch, untouched
from seqparc.options import Options
from seqparc.plan import Plan, Stats
from seqparc.runtime import variant
from seqparc.runtime.derived import Derived, Paired, Redrawn, as_real
from seqparc.runtime.engine import Engine, uncollected
from seqparc.runtime.own import OwnGradientCall
from seqparc.runtime.reference import loop
from seqparc.runtime.run import run

#: The stages a compiled module calls, put here by the package: the runtime imports none of them.
TOOLS: dict[str, Callable[..., Any]] = {}
#: All that are there, by the number that a call which is being traced gives for them.
MODULES: weakref.WeakValueDictionary[int, CompiledRNN] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Call(NamedTuple):
    """A call, understood: leaves of x, how the cell is called, leaves of the state to start from, and what an engine depends on."""

    leaves: list[Tensor]
    convention: sig.Convention
    start: list[Tensor]
    about: tuple[Any, ...]


class Known(NamedTuple):
    """What calls alike have in common; the start state only if it is the same in all of them."""

    convention: sig.Convention
    start: list[Tensor] | None
    about: tuple[Any, ...]
    watch: Watch | None  # on what the cell holds, if that is what it starts from


def about_call(convention: sig.Convention, leaves: Sequence[Tensor], start: Sequence[Tensor]) -> tuple[Any, ...]:
    """What an engine depends on, the type of device first: of tensors, all but the values and the batch and time axes."""
    shapes = [*[(v.shape[2:], v.dtype) for v in leaves], *[(s.shape[1:], s.dtype) for s in start]]
    return leaves[0].device.type, convention, len(leaves), *shapes


def paired(call: Call, cell: Any) -> tuple[Call, Any]:
    """The same call of a step with real states, if the cell's are not."""
    if not any(s.is_complex() for s in call.start):
        return call, cell
    step, start = Paired(cell, call.convention, len(call.leaves), call.start), as_real(call.start)
    return Call(call.leaves, step.signature, start, about_call(step.signature, call.leaves, start)), step


class CompiledRNN(nn.Module):
    """A recurrent cell compiled to run over time.

    Call it with x [batch, time, ...] (a tensor or a tree of tensors) and, if wanted, an initial state: it returns `(y, last)`,
    y [batch, time, ...] being the outputs (the states, if the cell returns only its state) and last the final state.
    Make one with `seqparc.compile`.
    """

    def __init__(self, cell: Any, *, state: Any, signature: str | None, options: Options, name: str | None) -> None:
        super().__init__()
        self.cell = cell
        if inspect.ismethod(cell) and isinstance(cell.__self__, nn.Module):
            self._modules["cell"] = cell.__self__  # a method's parameters are its module's
        self.options = options
        self.name: str = name or sig.called(cell)
        self._given, self._signature = state, signature
        self._forget()

    def _forget(self) -> None:
        """Drop everything that is remade at the next call."""
        self._understood: dict[Any, Known] = {}
        self._parts: tuple[nn.Module, ...] = ()  # that the cell uses, each of which may be training or not
        self._first: tuple[Tensor, ...] = ()  # the first parameter, which stands for where the cell is and its dtype
        self._engines: dict[Any, Engine | str] = {}
        self._last: Engine | Stats = Stats()
        MODULES[number := next(_NUMBERS)] = self
        self._number = number

    @property
    def stats(self) -> Stats:
        """What the last call did; its `backward` appears once backward has run."""
        return self._last.stats if isinstance(self._last, Engine) else self._last

    def __getstate__(self) -> dict[str, Any]:
        keep = dict(self.__dict__)
        for name in ("_understood", "_first", "_parts", "_engines", "_last", "_number"):
            keep.pop(name, None)
        return keep

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledRNN:
        new = CompiledRNN.__new__(CompiledRNN)
        memo[id(self)] = new
        new.__setstate__({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        return new

    # -- calls -----------------------------------------------------------------------------------------------------------

    def forward(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None) -> tuple[Any, Any]:
        """Run the cell over x [batch, time, ...] from `state` (default: the initial state).

        lengths  ints [batch]: y is zero past each sample's length, and last is the state at it; what x holds there does not matter
        reset    bools [batch, time]: before these steps the state is put back to what the run started from

        Returns (y, last). Raises ShapeError for an input of the wrong shape, dtype or device, and what `seqparc.compile`
        documents for cells that cannot be compiled.
        """
        if lengths is not None or reset is not None:
            return self._varied(x, state, lengths, reset)
        if torch.compiler.is_compiling():
            from seqparc.runtime import traced

            return traced.call(self, x, state)
        call = self._call(x, state)
        return call.convention.unflatten(*self._answer(call, self.cell))

    def _answer(self, call: Call, cell: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Output leaves [batch, time, ...] and last state leaves of a call of the cell, or of a step made from it."""
        call, cell = paired(call, cell)
        leaves, convention, start, _ = call
        engine = self._engine(call, cell)
        if isinstance(engine, str):
            self._last = Stats(backend="eager", strategy="sequential", chunk_length=leaves[0].shape[1], passes=1, fallback=engine)
            looped = loop(lambda a, b: convention.call(cell, a, b), leaves, start)
            return cell.own(*looped) if isinstance(cell, Paired) else looped
        answer = self._run(engine, cell, convention, leaves, start)
        self.__dict__["_last"] = engine  # past nn.Module's own setter, which looks for parameters
        return cell.own(*answer) if isinstance(cell, Paired) else answer

    def _varied(self, x: Any, state: Any, lengths: Any, reset: Any) -> tuple[Any, Any]:
        """A call with lengths or resets."""
        if torch.compiler.is_compiling():  # a graph ends here, and goes on after the call
            torch._dynamo.graph_break()
            return torch.compiler.disable(CompiledRNN._varied)(self, x, state, lengths, reset)
        leaves, convention, start, _ = self._call(x, state)
        again = None if reset is None else variant.checked_reset(reset, leaves[0])
        ends = None if lengths is None else variant.checked_lengths(lengths, leaves[0])
        live = None if ends is None else variant.inside(ends, leaves[0].shape[1])
        if ends is not None and live is not None:
            leaves = variant.prolonged(leaves, ends, live)
        step = variant.Variant(self.cell, convention, len(leaves), reset is not None)
        given = variant.given_to(step, leaves, start, again)
        outputs, last = self._answer(Call(given, step.signature, start, about_call(step.signature, given, start)), step)
        shown, states = outputs[: step.n_out], outputs[step.n_out :]
        y = states if convention.out is None else shown
        if ends is not None and live is not None:
            y, last = variant.masked(y, live), variant.last_of(states, start, ends)
        return convention.unflatten(y, last)

    def step(self, x_t: Any, state: Any = None) -> tuple[Any, Any]:
        """One step, for streaming and decoding: x_t [batch, ...] -> (y_t, state)."""
        leaves, structure = sig.flatten(x_t)
        y, last = self(structure.unflatten([v.unsqueeze(1) for v in leaves]), state)
        outputs, y_structure = sig.flatten(y)
        return y_structure.unflatten([v[:, 0] for v in outputs]), last

    def sequential(self, x: Any, state: Any = None) -> tuple[Any, Any]:
        """The plain loop over the cell itself: the oracle."""
        leaves, convention, start = self.understand(x, state)
        outputs, last = loop(lambda a, b: convention.call(self.cell, a, b), leaves, start)
        return convention.unflatten(outputs, last)

    def validate(
        self, x: Any, state: Any = None, grad: bool = True, reference_dtype: torch.dtype = torch.float64
    ) -> Any:
        """Values and gradients against the plain loop in `reference_dtype`: a Report, which prints as a table and has `.ok`."""
        return TOOLS["validate"](self, x, state, grad, reference_dtype)

    def explain(self, x: Any = None, state: Any = None) -> Any:
        """What was found out about the cell and what is done about it: an Explanation, which prints.

        For the shapes of x [batch, time, ...], or of the last call.
        """
        return TOOLS["explain"](self, x, state)

    def engine(self, x: Any = None, state: Any = None) -> Engine | str | None:
        """The engine for the shapes of x, made if need be; of the last call if x is None. A string says why there is none."""
        if x is not None:
            return self._engine(self._call(x, state))
        return self._last if isinstance(self._last, Engine) else self._last.fallback

    def kernels(self) -> dict[tuple[str, str], str]:
        """{(backend, direction): source} of every kernel made so far; of states solved in stages "forward", "forward 2" and so on."""
        found = {}
        for engine in self._engines.values():
            if isinstance(engine, Engine):
                for suffix, part in engine.parts:
                    found.update({(by, direction + suffix): kernel.source for direction, (by, kernel) in part.kernels.items()})
        return found

    def source(self, backend: str, direction: str = "forward") -> str:
        """Source of one kernel. Raises SeqparcError if there is none yet: kernels are made by the calls that need them."""
        found = self.kernels()
        if (backend, direction) not in found:
            there = ", ".join(map(str, found)) or "none yet"
            raise SeqparcError(f"there is no {direction} kernel of the {backend} backend; there are: {there}. Call the module first.")
        return found[backend, direction]

    def captured(self) -> dict[str, Tensor]:
        """Tensors the cell was found to use in the calls so far: parameters, buffers, and tensors it closes over."""
        found: dict[str, Tensor] = {}
        for engine in self._engines.values():
            if isinstance(engine, Engine):
                found.update({name: get() for name, get in engine.plan.attributes.items()})
        return found

    # -- arguments -------------------------------------------------------------------------------------------------------

    def understand(self, x: Any, state: Any = None) -> tuple[list[Tensor], sig.Convention, list[Tensor]]:
        """Leaves of x, how the cell is called, leaves of the state to start from. Raises ShapeError, StateError, SignatureError."""
        call = self._call(x, state)
        return call.leaves, call.convention, call.start

    def _call(self, x: Any, state: Any) -> Call:
        leaves, structure = sig.flatten(x)
        given = None if state is None else sig.flatten(state)
        parameter = self._first[0] if self._first else None
        about = (
            structure, *[(v.shape[0], v.shape[2:], v.dtype, v.device) for v in leaves],
            None if given is None else (given[1], *[(s.shape, s.dtype, s.device) for s in given[0]]),
            None if parameter is None else (parameter.dtype, parameter.device),
        )  # fmt: skip
        known = self._understood.get(about)
        if known is not None:
            steps = leaves[0].shape[1]
            start = given[0] if given is not None else None if known.watch is not None and known.watch.changed() else known.start
            if start is not None and steps and (len(leaves) == 1 or all(v.shape[1] == steps for v in leaves)):
                return Call(leaves, known.convention, start, known.about)
        return self._understand(about, leaves, structure, state)

    def _understand(self, about: Any, leaves: list[Tensor], structure: sig.Structure, state: Any) -> Call:
        """The same, at length; what can be reused is remembered for calls like this one."""
        if not leaves:
            raise ShapeError("x holds no tensor; give [batch, time, ...]")
        lead = leaves[0].shape[:2]
        for i, leaf in enumerate(leaves):
            if leaf.dim() < 2:
                raise ShapeError(f"x's leaf {i} has shape {list(leaf.shape)}; the first two axes must be batch and time")
            if leaf.shape[:2] != lead:
                raise ShapeError(f"x's leaves disagree about batch and time: {list(lead)} and {list(leaf.shape[:2])} (leaf {i})")
        batch, steps = lead
        if steps == 0 or batch == 0:
            raise ShapeError(f"x has shape {list(leaves[0].shape)}: an empty {'sequence' if steps == 0 else 'batch'} has no states")
        self._check_place(leaves)
        x_t = structure.unflatten([v[:, 0] for v in leaves])
        fixed = state is None and not callable(self._given) and not any(hasattr(self.cell, m) for m in sig.METHODS)
        if state is None:
            state = sig.initial_state(self.cell, x_t, batch, given=self._given, signature=self._signature)
        start, _ = sig.flatten(state)
        for i, leaf in enumerate(start):
            if leaf.dim() < 1 or leaf.shape[0] != batch:
                raise StateError(f"the state's leaf {i} has shape {list(leaf.shape)}, x has batch {batch}; a state is [batch, ...]")
            if leaf.device != leaves[0].device:
                raise ShapeError(f"the state's leaf {i} is on {leaf.device}, x on {leaves[0].device}")
        known = self._understood.get(about)
        convention = sig.discover(self.cell, x_t, batch, state, self._signature, self.name) if known is None else known.convention
        keep = fixed and not any(t.requires_grad for t in start)
        self._first = tuple(itertools.islice(self.parameters(), 1))
        self._parts = tuple(dict.fromkeys((*self.modules(), *parts(self.cell))))
        about = (*about[:-1], (self._first[0].dtype, self._first[0].device) if self._first else None)
        watch = Watch(self.cell) if convention.held and keep else None
        self._understood[about] = Known(convention, start if keep else None, about_call(convention, leaves, start), watch)
        return Call(leaves, convention, start, self._understood[about].about)

    def _check_place(self, leaves: Sequence[Tensor]) -> None:
        parameter = next(self.parameters(), None)
        for i, leaf in enumerate(leaves):
            if parameter is not None and leaf.device != parameter.device:
                raise ShapeError(f"x's leaf {i} is on {leaf.device}, the cell's parameters on {parameter.device}; move one to the other")
        if parameter is not None and parameter.dtype.is_floating_point and all(v.dtype.is_floating_point for v in leaves):
            wrong = next((v.dtype for v in leaves if v.dtype != parameter.dtype), None)
            dtypes = {p.dtype for p in self.parameters()}
            if wrong is not None and wrong not in dtypes and not torch.is_autocast_enabled(leaves[0].device.type):
                raise ShapeError(f"x is {wrong}, the cell's parameters are {parameter.dtype}; convert one with .to(dtype)")

    def _engine(self, call: Call, cell: Any = None) -> Engine | str:
        """The engine of the cell, or of a step made from it, for these shapes; or, where it can only be looped over, why."""
        cell = self.cell if cell is None else cell
        modes = tuple([m.training for m in self._parts])
        key = call.about, modes, torch.is_autocast_enabled(call.about[0])
        engine = self._engines.get(key)
        if isinstance(engine, Engine) and (engine.plan.stale() or engine.numbers != self._numbers()):
            engine = None
        if engine is None:
            convention, start, x_t = call.convention, call.start, [v[:, 0] for v in call.leaves]
            try:
                with uncollected(), untouched(self.cell, x_t, torch.is_grad_enabled()):  # no draw of the user's is used up either
                    backends = TOOLS["backends"](self.options, x_t[0].device)
                    plan = TOOLS["compile_plan"](cell, convention, x_t, start, fold=backends[0][0] != "triton")
                    engine = Engine(plan, backends, self.options, TOOLS["choose"])
                    TOOLS["check"](plan, convention, cell, x_t, start, self._trial)
            except (UnsupportedOpError, NotImplementedError) as error:
                engine = str(error)
                if cell is self.cell or isinstance(cell, Derived):
                    message = f"{self.name} is not compiled; it runs as the plain loop. {error}"
                    warnings.warn(message, SeqparcWarning, stacklevel=4)
            if isinstance(engine, Engine):
                engine.numbers = self._numbers()
                if engine.plan.step is not None and (cell is self.cell or isinstance(cell, Derived)):
                    why = engine.plan.own_gradient[0]
                    message = f"{self.name} runs on the torch backend, by calls of the cell for all chunks at once. {why}"
                    warnings.warn(message, SeqparcWarning, stacklevel=4)
            self._engines[key] = engine
        return engine

    def _numbers(self) -> tuple[float, ...]:
        """The numbers that the cell's modules hold (a step size, a dropout's p), which are part of what was traced."""
        return tuple([v for m in self._parts for v in m.__dict__.values() if type(v) is float])

    def _trial(self, plan: Plan, x: list[Tensor], start: list[Tensor], make: Callable[..., Any]) -> list[Tensor]:
        engine = Engine(plan, [("torch", make)], Options(strategy="sequential"), TOOLS["choose"])
        return run(engine, x, start).outputs

    def _run(
        self, engine: Engine, cell: Any, convention: sig.Convention, x: list[Tensor], start: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        own = bool(engine.plan.own_gradient)
        captured = [get() for get in engine.plan.attributes.values()] if own else []
        if not own or not (torch.is_grad_enabled() and any(t.requires_grad for t in (*x, *start, *captured))):
            done = run(engine, x, start)
            return done.outputs, done.last

        if draws := engine.plan.draws:  # the same numbers forward and backward
            cell = Redrawn(cell, convention, len(x), len(draws))
            x, convention = [*x, *drawn(draws, x[0].shape[0], x[0].shape[1], x[0].device)], cell.signature

        def adjoint(given: list[Tensor], mu: list[Tensor]) -> Engine:
            step = TOOLS["adjoint_step"](cell, convention, len(x), [s.dtype.is_floating_point for s in start])
            found = self._engine(Call(given, step.signature, mu, about_call(step.signature, given, mu)), step)
            if isinstance(found, str):
                raise UnsupportedOpError(f"the gradient of {self.name}, which is its own, cannot be compiled: {found}")
            return found

        asked = [t for t in captured if t.requires_grad and t.is_leaf]
        return OwnGradientCall(cell, convention, engine, adjoint, asked)(x, start)
