"""What the user holds: a module that runs their cell over whole sequences."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seqparc import signature as sig
from seqparc.captured import Made, parts, reachable
from seqparc.draws import drawn
from seqparc.errors import InexactError, SeqparcError, SeqparcWarning, ShapeError, SignatureError, StateError, UnsupportedOpError
from seqparc.exact import is_count
from seqparc.held import Watch, untouched
from seqparc.locks import LOOKING
from seqparc.options import Options
from seqparc.plan import Plan, Stats
from seqparc.runtime import variant
from seqparc.runtime.calls import Admit, Call, Known, about_call, check_state, check_x, mixed, numbered, paired, settled
from seqparc.runtime.derived import Derived, Paired, Redrawn
from seqparc.runtime.engine import Engine
from seqparc.runtime.making import uncollected
from seqparc.runtime.own import TRANSFORMED, OwnGradientCall
from seqparc.runtime.reference import loop
from seqparc.runtime.replay import Replays
from seqparc.runtime.run import run
from seqparc.runtime.slabs import answer
from seqparc.surroundings import apart, autocast, bare, empty, hollow, modes, places, plain, size, stand_in, transformed, watched, wrapped

#: The stages a compiled module calls, put here by the package: the runtime imports none of them.
TOOLS: dict[str, Callable[..., Any]] = {}


def _nothing() -> None:
    """No parameter."""


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
        self._parts: tuple[list[nn.Module], list[Any]] = [], []  # of the cell: modules, which may be training or not, and ways to values
        self._made = Made()  # what they are made of
        self._first: Callable[[], Tensor | None] = _nothing  # the first parameter, which stands for where the cell is and its dtype
        self._engines: dict[Any, Engine | str] = {}
        self._last: Engine | Stats = Stats()
        self._replays = Replays()
        self._wide = 0  # 1: integers were met that float32 does not hold, 2: that float64 does not
        self._number = numbered(self)

    @property
    def stats(self) -> Stats:
        """What the last call did; its `backward` appears once backward has run."""
        return self._last.stats if isinstance(self._last, Engine) else self._last

    def __getstate__(self) -> dict[str, Any]:
        keep = dict(self.__dict__)
        for name in ("_understood", "_first", "_parts", "_made", "_engines", "_last", "_replays", "_wide", "_number"):
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
        if torch.compiler.is_compiling():
            from seqparc.runtime import traced

            return traced.call(self, self.name, state is None, x=x, state=state, lengths=lengths, reset=reset)
        return self.compute(x, state, lengths, reset)

    def compute(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None, admit: Admit | None = None) -> tuple[Any, Any]:
        """A call, without the hooks that there may be on this module."""
        simple = lengths is None and reset is None and admit is None
        if simple and (known := self._replays.answer(self, x, state)) is not None:
            return known
        call = self._call(x, state)
        if lengths is not None or reset is not None:
            return self._varied(call, lengths, reset, admit)
        result = call.convention.unflatten(*self._answer(call, self.cell, admit))
        if simple:
            self._replays.note(self, call, self._last, x, state)
        return result

    def _answer(self, call: Call, cell: Any, admit: Admit | None) -> tuple[list[Tensor], list[Tensor]]:
        """Output leaves [batch, time, ...] and last state leaves of a call of the cell, or of a step made from it."""
        whole, whole_cell = call, cell
        call, cell = paired(call, cell)
        leaves, convention, start, _ = call
        engine = self._engine(call, cell)
        if admit is not None:
            admit(self, engine)
        if isinstance(engine, str):
            self._last = Stats(backend="eager", strategy="sequential", chunk_length=leaves[0].shape[1], passes=1, fallback=engine)
            looped = loop(lambda a, b: convention.call(cell, a, b), leaves, start)
            return cell.own(*looped) if isinstance(cell, Paired) else looped
        try:
            answer = self._run(engine, cell, convention, leaves, start, call.about[0])
        except InexactError as error:
            self._widen(engine, error)
            return self._answer(whole, whole_cell, admit)
        self.__dict__["_last"] = engine  # past nn.Module's own setter, which looks for parameters
        return cell.own(*answer) if isinstance(cell, Paired) else answer

    def _varied(self, call: Call, lengths: Any, reset: Any, admit: Admit | None) -> tuple[Any, Any]:
        """A call with lengths or resets."""
        leaves, convention, start, _ = call
        again = None if reset is None else variant.checked_reset(reset, leaves[0])
        ends = None if lengths is None else variant.checked_lengths(lengths, leaves[0])
        live = None if ends is None else variant.inside(ends, leaves[0].shape[1])
        if ends is not None and live is not None:
            leaves = variant.prolonged(leaves, ends, live)
            again = None if again is None else again | ~live
        step = variant.Variant(self.cell, convention, len(leaves), reset is not None)
        given = variant.given_to(step, leaves, start, again)
        home, *_ = call.about
        outputs, last = self._answer(Call(given, step.signature, start, about_call(step.signature, given, start, home)), step, admit)
        shown, states = outputs[: step.n_out], outputs[step.n_out :]
        if live is not None and again is None and torch.is_grad_enabled() and not variant.bounded(states):
            return self._varied(call, lengths, ~live, admit)
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
        """Values and gradients against the plain loop in `reference_dtype`: a Report, which prints as a table and has `.ok`.

        >>> rnn = seqparc.compile(torch.nn.GRUCell(2, 3))
        >>> rnn.validate(torch.zeros(1, 20, 2)).ok
        True
        """
        return TOOLS["validate"](self, x, state, grad, reference_dtype)

    def explain(self, x: Any = None, state: Any = None) -> Any:
        """What was found out about the cell and what is done about it: an Explanation, which prints.

        For the shapes of x [batch, time, ...], or of the last call.
        """
        return TOOLS["explain"](self, x, state)

    def engine(self, x: Any = None, state: Any = None) -> Engine | str | None:
        """The engine for the shapes of x, made if need be; of the last call if x is None. A string says why there is none."""
        if x is not None:
            return self._engine(*paired(self._call(x, state), self.cell))
        return self._last if isinstance(self._last, Engine) else self._last.fallback

    def kernels(self) -> dict[tuple[str, str], str]:
        """{(backend, direction): source} of every kernel made so far; of states solved in stages "forward", "forward 2" and so on.

        With save="store" calls with gradients have kernels of their own, "forward stored" and "backward stored".
        """
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
        if not plain(leaves if given is None else (*leaves, *given[0])):
            return self._stood_in(leaves, structure, given)
        return self._known(leaves, structure, given)

    def _known(self, leaves: list[Tensor], structure: sig.Structure, given: tuple[list[Tensor], sig.Structure] | None) -> Call:
        """A call of tensors that hold numbers, understood by what is known from those like it."""
        if not self._made.unchanged():
            with LOOKING():
                if not self._made.unchanged():  # also when no other thread is looking
                    self._made = Made(*self._parts)
                    self._understood.clear()
                    self._replays.clear()
                    self._engines.clear()
        parameter = self._first()
        about = (
            structure, *[(v.shape[0], v.shape[2:], v.dtype, v.device) for v in leaves],
            None if given is None else (given[1], *[(s.shape, s.dtype, s.device) for s in given[0]]),
            autocast(leaves[0].device.type) if leaves else None,
            None if parameter is None else (parameter.dtype, parameter.device),
        )  # fmt: skip
        known = self._understood.get(about)
        if known is not None:
            steps = leaves[0].shape[1]
            anew = given is None and ((known.watch is not None and known.watch.changed()) or self.start_learns())
            start = given[0] if given is not None else None if anew else known.start
            if start is not None and steps and (len(leaves) == 1 or all(v.shape[1] == steps for v in leaves)):
                return Call(leaves, known.convention, start, known.about)
        if leaves and not leaves[0].shape[:1].numel():
            return self._stood_in(leaves, structure, given)
        with LOOKING():
            return self._understand(about, leaves, structure, None if given is None else given[1].unflatten(given[0]))

    def _stood_in(self, leaves: list[Tensor], structure: sig.Structure, given: tuple[list[Tensor], sig.Structure] | None) -> Call:
        """A call whose tensors hold no numbers that could be looked at, understood by others in their place."""
        check_x(self, leaves)
        rows = max(size(leaves[0].shape[0]), 1)
        like = [stand_in(v[:, :1], rows) for v in leaves]
        with LOOKING(), self._apart():
            kept = None if given is None else ([stand_in(s, rows) for s in given[0]], given[1])
            asked = self._known(like, structure, kept)
        if given is not None:
            start = given[0]
        elif asked.convention.held and not empty(bare(leaves[0])[0]):  # what it holds
            start = [s[: leaves[0].shape[0]] for s in asked.start]
        elif self._given is None and not any(hasattr(self.cell, m) for m in sig.METHODS):
            start = [leaves[0].new_zeros((leaves[0].shape[0], *s.shape[1:]), dtype=s.dtype) for s in asked.start]
        else:
            start, _ = sig.flatten(self._initial(leaves, structure))
        check_state(start, leaves)
        return Call(leaves, asked.convention, start, asked.about)

    def start_learns(self) -> bool:
        """Whether the initial state that was given is to have a gradient, which goes through what is made of it, anew for each call."""
        given = self._given
        if given is None or callable(given) or not torch.is_grad_enabled():
            return False
        return any(isinstance(t, Tensor) and t.requires_grad for t in sig.flatten(given)[0])

    def _initial(self, leaves: list[Tensor], structure: sig.Structure) -> Any:
        """The initial state."""
        x_t = structure.unflatten([v[:, 0] for v in leaves])
        return sig.initial_state(self.cell, x_t, leaves[0].shape[0], given=self._given, signature=self._signature)

    def _understand(self, about: Any, leaves: list[Tensor], structure: sig.Structure, state: Any) -> Call:
        """The same, at length; what can be reused is remembered for calls like this one."""
        check_x(self, leaves)
        fixed = state is None and not callable(self._given) and not any(hasattr(self.cell, m) for m in sig.METHODS)
        if state is None and not fixed:
            state = self._initial(leaves, structure)
        try:
            with self._apart():
                if state is None:
                    state = self._initial(leaves, structure)
                start, _ = sig.flatten(state)
                check_state(start, leaves)
                known = self._understood.get(about)
                if known is None:
                    x_t = structure.unflatten([v[:, 0] for v in leaves])
                    convention = sig.discover(self.cell, x_t, leaves[0].shape[0], state, self._signature, self.name)
                else:
                    convention = known.convention
        except (SignatureError, StateError) as error:
            if (why := mixed(self, leaves)) is not None:
                raise ShapeError(why) from error
            raise
        keep = fixed and not any(t.requires_grad for t in start)
        places = (functools.partial(m._parameters.get, name) for m in self.modules() for name, p in m._parameters.items() if p is not None)
        self._first, self._parts = next(places, _nothing), parts(self.cell)
        self._made = Made(*self._parts)
        about = (*about[:-1], None if (parameter := self._first()) is None else (parameter.dtype, parameter.device))
        watch = Watch(self.cell) if convention.held and keep else None
        asked = about_call(convention, leaves, start, leaves[0].device.type)
        self._understood[about] = Known(convention, start if keep else None, asked, watch)
        return Call(leaves, convention, start, self._understood[about].about)

    def _engine(self, call: Call, cell: Any = None) -> Engine | str:
        """The engine of the cell, or of a step made from it, for these shapes; or, where it can only be looped over, why."""
        cell = self.cell if cell is None else cell
        training = tuple([m.training for m in self._parts[0]])
        wide = self._wide
        if not plain(call.leaves) and any(is_count(t.dtype) for t in (*call.leaves, *call.start)):
            wide = max(wide, 1)  # integers that cannot be looked at may be large
        key: tuple[Any, ...] = call.about, training, modes(), autocast(call.about[0]), wide
        engine = self._engines.get(key)
        if isinstance(engine, Engine) and engine.plan.stale():
            engine = None
        if engine is not None:
            return engine
        with LOOKING():
            return self._make_engine(call, cell, key)

    def _make_engine(self, call: Call, cell: Any, key: tuple[Any, ...]) -> Engine | str:
        """The same, where it has to be made, unless another thread has."""
        engine = self._engines.get(key)
        if engine is not None and not (isinstance(engine, Engine) and engine.plan.stale()):
            return engine
        engine = None
        surrounded = not plain(call.leaves)
        if surrounded and any(hollow(t) for _, _, t in places(self._parts[0])):
            engine = self._engines.get(key := (*key, "numbers made up"))
        if engine is None:
            rows = max(size(call.leaves[0].shape[0]), 1)
            convention, start = call.convention, [stand_in(s, rows) for s in call.start]
            like = [stand_in(v[:, :1], rows) for v in call.leaves]
            name = self._elsewhere() if surrounded else None
            try:
                if key[4] > 1:
                    raise UnsupportedOpError("Its integers are larger than the 53 bits that are exact in float64")
                if name is not None:
                    raise UnsupportedOpError(f"{name} belongs to a transform or mode that surrounds the call, and is in no module")
                # No draw of the user's is used up.
                with uncollected(), apart(parts(self.cell)[0]), untouched(self.cell, like, torch.is_grad_enabled()):
                    x_t = [v[:, 0] for v in like]
                    backends = TOOLS["backends"](self.options, x_t[0].device)
                    if key[3] is not None:
                        start = settled(cell, convention, x_t, start)
                    plan = TOOLS["compile_plan"](cell, convention, x_t, start, fold=backends[0][0] != "triton", wide=key[4] > 0)
                    engine = Engine(plan, backends, self.options, TOOLS["choose"])
                    TOOLS["check"](plan, convention, cell, x_t, start, self._trial)
            except InexactError as error:
                self._widen(engine, error)
                return self._make_engine(call, cell, (*key[:4], self._wide, *key[5:]))
            except (UnsupportedOpError, NotImplementedError) as error:
                engine = str(error)
                if cell is self.cell or isinstance(cell, Derived):
                    message = f"{self.name} is not compiled; it runs as the plain loop. {error}"
                    warnings.warn(message, SeqparcWarning, stacklevel=5)
            if isinstance(engine, Engine):
                for _, part in engine.parts:
                    part.changed, part.name = self._watch(), self.name
                if engine.plan.step is not None and (cell is self.cell or isinstance(cell, Derived)):
                    why = engine.plan.own_gradient[0]
                    message = f"{self.name} runs on the torch backend, by calls of the cell for all chunks at once. {why}"
                    warnings.warn(message, SeqparcWarning, stacklevel=5)
            if name is None:
                self._engines[key] = engine
        return engine

    def _widen(self, engine: Engine | str | None, error: InexactError) -> None:
        """Take arithmetic that holds larger integers from now on; that of the loop where there is no other."""
        if not isinstance(engine, Engine):
            raise error
        narrow = any(part.plan.given and part.plan.dtype is torch.float32 for _, part in engine.parts)
        self._wide = max(self._wide, 1) if narrow else 2

    def _watch(self) -> Callable[[], bool]:
        """A way to see whether the cell has changed, as it is now: its settings and parts, and which of those are training."""
        self._made = made = Made(*self._parts)
        training = [m.training for m in made.modules]
        return lambda: not made.unchanged() or [m.training for m in made.modules] != training

    def _apart(self) -> contextlib.AbstractContextManager[Any]:
        """Where the cell can be looked at, apart from what surrounds the call if that is possible."""
        inside = (transformed() or watched()) and self._elsewhere() is not None
        return contextlib.nullcontext() if inside else apart(parts(self.cell)[0])

    def _elsewhere(self) -> str | None:
        """The name of a tensor that holds no numbers that could be looked at, and is neither parameter nor buffer."""
        modules, _ = parts(self.cell)
        own = {id(t) for _, _, t in places(modules)}
        name, found = next(((n, t) for n, _, t in reachable(self.cell) if id(t) not in own and (wrapped(t) or hollow(t))), (None, None))
        if found is not None and bare(found)[1]:
            raise SeqparcError(
                f"under vmap {self.name} uses {name}, different for each member and neither parameter nor buffer of a module; make "
                "it one, and call the module by torch.func.functional_call"
            )
        return name

    def _trial(self, plan: Plan, x: list[Tensor], start: list[Tensor], make: Callable[..., Any]) -> list[Tensor]:
        engine = Engine(plan, [("torch", make)], Options(strategy="sequential"), TOOLS["choose"])
        return run(engine, x, start).outputs

    def _run(
        self, engine: Engine, cell: Any, convention: sig.Convention, x: list[Tensor], start: list[Tensor], home: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        own = bool(engine.plan.own_gradient)
        if engine.plan.step is not None and transformed():
            raise SeqparcError(f"{self.name} runs by calls of the cell ({engine.plan.own_gradient[0]}), {TRANSFORMED}")
        with LOOKING() if own else contextlib.nullcontext():  # a backward in another thread has others in their places for a while
            used = [(get, get()) for get in engine.plan.attributes.values()] if own else []
        if not own or not (torch.is_grad_enabled() and any(t.requires_grad for t in (*x, *start, *(t for _, t in used)))):
            return answer(run, engine, x, start)
        if transformed():
            raise SeqparcError(f"{self.name} has a gradient of its own ({engine.plan.own_gradient[0]}), {TRANSFORMED}")
        if draws := engine.plan.draws:  # the same numbers forward and backward
            cell = Redrawn(cell, convention, len(x), len(draws))
            x, convention = [*x, *drawn(draws, x[0].shape[0], x[0].shape[1], x[0].device)], cell.signature

        def adjoint(given: list[Tensor], mu: list[Tensor]) -> Engine:
            step = TOOLS["adjoint_step"](cell, convention, len(x), [s.dtype.is_floating_point for s in start])
            found = self._engine(Call(given, step.signature, mu, about_call(step.signature, given, mu, home)), step)
            if isinstance(found, str):
                raise UnsupportedOpError(f"the gradient of {self.name}, which is its own, cannot be compiled: {found}")
            return found

        return OwnGradientCall(cell, convention, engine, adjoint, used, places(self._parts[0]), autocast(home))(x, start)
