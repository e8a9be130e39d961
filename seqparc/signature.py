"""How a cell wants to be called and what it returns, found out by its parameter names and by trying."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqparc.errors import ShapeError, SignatureError, StateError

_X_NAMES = frozenset("x x_t xt xs inp inps input inputs input_ u u_t ut data obs observation token tokens emb frame features".split())
_STATE_NAMES = frozenset(
    """h h_t ht hx hidden hidden_state state states s s_t carry prev prev_state previous h_prev hprev h0 c c_t ct cx cell_state cell
    mem memory v membrane m n last_state old_state recurrent""".split()
)
_HELP = 'Say it with signature="x, state -> out, state" (or "state, x -> state", "x, h, c -> h, c").'


# -- trees of tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """The shape of a tree of tensors: `kind` is "leaf" or how to build the node; children in order."""

    kind: str
    build: Any = None  # the class of a named tuple or dataclass
    names: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def count(self) -> int:
        """Number of tensors."""
        return 1 if self.kind == "leaf" else sum(c.count for c in self.children)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The tree with these leaves."""
        if self.kind == "leaf":
            return leaves[0]
        parts, at = [], 0
        for child in self.children:
            parts.append(child.unflatten(leaves[at : at + child.count]))
            at += child.count
        match self.kind:
            case "tuple":
                return tuple(parts)
            case "list":
                return parts
            case "dict":
                return dict(zip(self.names, parts, strict=True))
            case "namedtuple":
                return self.build(*parts)
            case _:
                return self.build(**dict(zip(self.names, parts, strict=True)))

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.children))
        match self.kind:
            case "leaf":
                return "tensor"
            case "tuple":
                return f"({inner})"
            case "list":
                return f"[{inner}]"
            case "dict":
                return "{" + ", ".join(f"{n!r}: {c}" for n, c in zip(self.names, self.children, strict=True)) + "}"
            case _:
                return f"{self.build.__name__}({inner})"


def flatten(tree: Any) -> tuple[list[Tensor], Structure]:
    """The tensors of a tree in order, and its structure. Raises ShapeError for anything else in it."""
    if isinstance(tree, Tensor):
        return [tree], Structure("leaf")
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind, build, names, parts = "namedtuple", type(tree), tuple(tree._fields), list(tree)
    elif isinstance(tree, (tuple, list)):
        kind, build, names, parts = type(tree).__name__ if type(tree) in (tuple, list) else "tuple", None, (), list(tree)
    elif isinstance(tree, dict):
        kind, build, names, parts = "dict", None, tuple(tree), list(tree.values())
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = tuple(f.name for f in dataclasses.fields(tree))
        kind, build, parts = "dataclass", type(tree), [getattr(tree, n) for n in names]
    else:
        raise ShapeError(f"expected a tensor or a tuple, list, dict, named tuple or dataclass of tensors, not {type(tree).__name__}")
    leaves: list[Tensor] = []
    children = []
    for part in parts:
        inner, structure = flatten(part)
        leaves += inner
        children.append(structure)
    return leaves, Structure(kind, build, names, tuple(children))


def _try_flatten(tree: Any) -> tuple[list[Tensor], Structure] | None:
    try:
        return flatten(tree)
    except ShapeError:
        return None


def describe(leaves: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in leaves)


# -- the convention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convention:
    """How a cell is called. `order` lists its arguments: "x", "state", or leaves of them as "x.0", "state.1"."""

    order: tuple[str, ...]
    inputs: Structure
    state: Structure
    returns: str = "state"  # or "out, state"
    out: Structure | None = None
    separate: bool = False  # the state's leaves come back one by one

    def arguments(self, x: Sequence[Tensor], state: Sequence[Tensor]) -> list[Any]:
        def one(word: str) -> Any:
            role, _, leaf = word.partition(".")
            leaves, structure = (x, self.inputs) if role == "x" else (state, self.state)
            return leaves[int(leaf)] if leaf else structure.unflatten(list(leaves))

        return [one(word) for word in self.order]

    def call(self, cell: Any, x: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[list[Tensor] | None, list[Tensor]]:
        """One step: (output leaves or None, new state leaves). Raises StateError if the state comes back another."""
        result = cell(*self.arguments(x, state))
        out, following = self.split(result)
        found = _try_flatten(following)
        name = getattr(cell, "__name__", type(cell).__name__)
        if found is None:
            raise StateError(f"cell {name}: the new state is {type(following).__name__}, not {self.state}")
        leaves, structure = found
        if structure.count != self.state.count:
            raise StateError(f"cell {name}: the state goes in as {self.state} and comes out as {structure}")
        for i, (before, after) in enumerate(zip(state, leaves, strict=True)):
            if before.shape != after.shape or before.dtype != after.dtype:
                raise StateError(
                    f"cell {name}: the state's leaf {i} goes in as {describe([before])} and comes out as {describe([after])}. A state "
                    "must keep its shape and dtype; give the right initial state with state=, or correct the cell."
                )
        return (None if out is None else flatten(out)[0]), leaves

    def split(self, result: Any) -> tuple[Any, Any]:
        if self.returns == "state":
            return None, result
        if self.separate:
            rest = result[1:]
            return result[0], (rest[0] if len(rest) == 1 else tuple(rest))
        return result[0], result[1]


def discover(cell: Any, x_t: Any, state: Any, signature: str | None = None) -> Convention:
    """Find out how a cell is called, from an example step x_t [batch, ...] and state [batch, ...].

    Raises SignatureError where it stays unclear, StateError where the cell returns another state than it was given.
    """
    x, inputs = flatten(x_t)
    leaves, structure = flatten(state)
    name = getattr(cell, "__name__", type(cell).__name__)
    fits: list[Convention] = []
    failures: list[tuple[str, Exception]] = []
    near: StateError | None = None
    for order in _orders(cell, inputs, structure, signature):
        trial = Convention(order, inputs, structure)
        try:
            with _untouched(cell):
                result = cell(*trial.arguments(x, leaves))
        except Exception as error:
            failures.append((", ".join(order), error))
            continue
        fit = _returns(trial, result, leaves, signature)
        if isinstance(fit, Convention):
            fits.append(fit)
            if signature is not None or _named(cell, order):
                return fit
        else:
            near = near or StateError(f"cell {name} called as ({', '.join(order)}): {fit}")
    if len({f.order for f in fits}) == 1:
        return fits[0]
    if fits:
        raise SignatureError(
            f"cell {name} can be called as {' or as '.join('(' + ', '.join(f.order) + ')' for f in fits)} and gives a state either way, and "
            f"its parameter names do not tell which is meant. {_HELP}"
        )
    if near is not None:
        raise near
    told = "; ".join(f"({order}) raised {type(e).__name__}: {e}" for order, e in failures[:3])
    raise SignatureError(
        f"cell {name} could not be called with x {inputs} = {describe(x)} and state {structure} = {describe(leaves)}: "
        f"{told or 'it takes no such arguments'}. {_HELP}"
    ) from (failures[0][1] if failures else None)


def _returns(trial: Convention, result: Any, state: list[Tensor], signature: str | None) -> Convention | str:
    """The convention completed by what came back, or why it does not fit."""

    def like_state(tree: Any) -> bool:
        found = _try_flatten(tree)
        return (
            found is not None
            and len(found[0]) == len(state)
            and (found[1] == trial.state or trial.state.count > 1 or found[1].kind == "leaf")
            and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found[0], state, strict=True))
        )

    wanted = signature.split("->")[1].split(",")[0].strip() if signature is not None else None
    outs = [] if wanted is None or wanted in ("out", "y", "output") else ["state"]
    pair = isinstance(result, (tuple, list)) and len(result) >= 2
    if outs != ["state"] and pair:
        if len(result) == 2 and like_state(result[1]) and not (trial.state.count == 2 and like_state(result)):
            out = _try_flatten(result[0])
            if out is not None:
                return dataclasses.replace(trial, returns="out, state", out=out[1])
        if len(result) == 1 + trial.state.count and trial.state.count > 1 and like_state(tuple(result[1:])):
            out = _try_flatten(result[0])
            if out is not None:
                return dataclasses.replace(trial, returns="out, state", out=out[1], separate=True)
    if like_state(result) and wanted not in ("out", "y", "output"):
        return dataclasses.replace(trial, returns="state")
    found = _try_flatten(result[-1] if pair and len(result) == 2 and trial.state.count == 1 else result)
    came = f"{found[1]} = {describe(found[0])}" if found is not None else type(result).__name__
    return (
        f"the state goes in as {trial.state} = {describe(state)} and nothing like it comes out ({came}). A cell returns its new state, "
        "or (out, new state), of the same shape and dtype; give the right initial state with state=."
    )


def _parameters(cell: Any) -> list[inspect.Parameter]:
    function = cell.forward if isinstance(cell, nn.Module) else cell
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _role(name: str) -> str:
    name = name.lower()
    if name in _X_NAMES:
        return "x"
    return "state" if name in _STATE_NAMES or "state" in name or "hidden" in name or name.startswith(("h_", "prev")) else ""


def _named(cell: Any, order: tuple[str, ...]) -> bool:
    """Whether the parameter names say this order and no other."""
    roles = [_role(p.name) for p in _parameters(cell)][: len(order)]
    words = [w.split(".")[0] for w in order]
    return len(roles) == len(words) and all(r in ("", w) for r, w in zip(roles, words, strict=True)) and any(roles)


def _orders(cell: Any, inputs: Structure, state: Structure, signature: str | None) -> Iterator[tuple[str, ...]]:
    """Argument orders worth trying, the likeliest first."""
    if signature is not None:
        yield _declared(signature, inputs, state)
        return
    xs = ("x",), tuple(f"x.{i}" for i in range(inputs.count))
    ss = ("state",), tuple(f"state.{i}" for i in range(state.count))
    orders = []
    for x in xs if inputs.count > 1 else xs[:1]:
        for s in ss if state.count > 1 else ss[:1]:
            orders += [x + s, s + x]
            if len(x) > 1:
                orders.append(x[:1] + s + x[1:])
    parameters = _parameters(cell)
    required = sum(p.default is p.empty for p in parameters)
    count = len(parameters)
    fitting = [o for o in orders if required <= len(o) <= count] if parameters else orders
    yield from sorted(fitting, key=lambda o: (not _named(cell, o), abs(len(o) - count)))


def _declared(signature: str, inputs: Structure, state: Structure) -> tuple[str, ...]:
    """The order a signature string asks for."""
    before, arrow, after = signature.partition("->")
    words = [w.strip() for w in before.split(",")]
    results = [w.strip() for w in after.split(",")]
    if not arrow or not all(w.isidentifier() for w in (*words, *results)):
        raise SignatureError(f"signature {signature!r} is not of the form 'x, state -> out, state'")
    if "state" in words:
        states = ["state"]
    else:
        states = [w for w in words if w in results and w not in ("out", "y")]
        if len(states) != state.count:
            raise SignatureError(f"signature {signature!r} names {len(states)} state(s) that come back; the state is {state}")
    xs = [w for w in words if w not in states]
    if len(xs) not in (1, inputs.count):
        raise SignatureError(f"signature {signature!r} has {len(xs)} inputs; x is {inputs}")
    if not xs:
        raise SignatureError(f"signature {signature!r} has no input")

    def word(w: str) -> str:
        if w in states:
            return "state" if states == ["state"] or state.count == 1 else f"state.{states.index(w)}"
        return "x" if len(xs) == 1 else f"x.{xs.index(w)}"

    return tuple(word(w) for w in words)


@contextmanager
def _untouched(cell: Any) -> Iterator[None]:
    """A trial call that leaves no trace: buffers and the random state are put back, no graph is built."""
    buffers = [(b, b.detach().clone()) for b in cell.buffers()] if isinstance(cell, nn.Module) else []
    random = torch.get_rng_state()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


# -- the initial state ---------------------------------------------------------------------------------------------------


def initial_state(cell: Any, x_t: Any, batch: int, given: Any) -> Any:
    """The state before the first step, [batch, ...]: given, made by the cell's own method, or what None means to the cell."""
    if given is not None:
        if callable(given) and not isinstance(given, Tensor):
            return given(batch)
        leaves, structure = flatten(given)
        return structure.unflatten([t.expand(batch, *t.shape) for t in leaves])
    for method in ("init_state", "initial_state", "init_hidden"):
        make = getattr(cell, method, None)
        if callable(make):
            try:
                return make(batch)
            except TypeError as error:
                raise StateError(f"{type(cell).__name__}.{method}({batch}) failed: {error}. It is called with the batch size.") from error
    x, _ = flatten(x_t)
    like = next((p for p in (cell.parameters() if isinstance(cell, nn.Module) else ()) if p.dtype.is_floating_point), x[0])
    dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()

    def zeros(size: int) -> Tensor:
        return torch.zeros(batch, size, dtype=dtype, device=x[0].device)

    if isinstance(cell, nn.RNNCellBase):
        h = zeros(cell.hidden_size)
        return (h, torch.zeros_like(h)) if isinstance(cell, nn.LSTMCell) else h
    tried = _from_none(cell, x_t, x)
    if tried is not None:
        return tried
    if isinstance(getattr(cell, "hidden_size", None), int):
        return zeros(cell.hidden_size)
    raise StateError(
        f"the initial state of {getattr(cell, '__name__', type(cell).__name__)} is not known. Give it in one of four ways: "
        "seqparc.compile(cell, state=example of one sample, or a function batch -> state); a method init_state(batch) on the cell; a cell "
        "that takes None for its first state; or a hidden_size attribute."
    )


def _from_none(cell: Any, x_t: Any, x: list[Tensor]) -> Any:
    """Zeros shaped like the state, for a cell that takes None as its first state and means zeros by it."""
    calls: list[Callable[[Any], Any]] = [lambda s: cell(x_t, s), lambda s: cell(s, x_t)]
    if [_role(p.name) for p in _parameters(cell)][:1] == ["state"]:
        calls.reverse()
    for call in calls:
        try:
            with _untouched(cell):
                result = call(None)
        except Exception:  # noqa: S112  any failure only says that this is not how the cell is called
            continue
        options = [result[1], result] if isinstance(result, (tuple, list)) and len(result) == 2 else [result]
        for tree in options:
            found = _try_flatten(tree)
            if found is None:
                continue
            zeros = found[1].unflatten([torch.zeros_like(t) for t in found[0]])
            try:
                with _untouched(cell):
                    again = call(zeros)
            except Exception:  # noqa: S112
                continue
            one, two = _try_flatten(result), _try_flatten(again)
            if one is None or two is None or one[1] != two[1]:
                continue
            if not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(one[0], two[0], strict=True)):
                raise StateError(
                    f"{type(cell).__name__} starts from a state of its own when given None, which is not zero. Say what it is with "
                    "state=: an example for one sample, or a function batch -> state."
                )
            return zeros
    return None
