"""How a cell is called and what it returns; the ways a cell may be called, from its parameter names or a signature string."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from seqparc import held
from seqparc.errors import ShapeError, SignatureError, StateError
from seqparc.surroundings import autocast
from seqparc.tree import LEAF, Structure, describe, flatten, seen

#: What a parameter's name says about it. A name in neither set says nothing.
_ROLES = {
    "x": frozenset(
        """x x_t xt xs inp inp_t inps input inputs input_ input_t u u_t ut i data obs observation token tokens emb frame features
        dt delta_t mask timespans ts elapsed action""".split()
    ),
    "state": frozenset(
        """h h_t ht hx hid hidden state states s s_t carry prev previous hprev h0 c c_t ct cx cell_state mem memory membrane syn v
        m n""".split()
    ),
}
_STATE_PARTS = ("state", "hidden", "carry", "prev")
HELP = 'Say it with signature="x, state -> out, state" (or "state, x -> state", "x, h, c -> h, c").'


def called(cell: Any) -> str:
    return str(getattr(cell, "__name__", type(cell).__name__))


@dataclass(frozen=True)
class Convention:
    """How a cell is called and what comes back.

    `order` lists the arguments: "x" and "state" whole, or leaves of them as "x.0", "state.1". `keywords` runs beside it:
    the name an argument is passed by, "" for by position. `returns` is a list of the same kind: "state", "out, state",
    "state, out", "out, state.0, state.1".
    """

    order: tuple[str, ...]
    state: Structure
    inputs: Structure
    returns: str = "state"
    out: Structure | None = None
    keywords: tuple[str, ...] = ()
    #: Attributes that the cell keeps its state in, if it does: the state is then a dict of them, and no argument.
    held: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.order, self.returns))  # at every call, so of a few words only

    @property
    def separate(self) -> bool:
        """Whether the state's leaves are arguments of their own."""
        return any(w.startswith("state.") for w in self.order)

    @property
    def spread_x(self) -> bool:
        """Whether the leaves of x are arguments of their own."""
        return any(w.startswith("x.") for w in self.order)

    def unflatten(self, outputs: Sequence[Any], last: Sequence[Any]) -> tuple[Any, Any]:
        """(y, last) as the user gets them, from their leaves."""
        return (self.state if self.out is None else self.out).unflatten(outputs), self.state.unflatten(last)

    def invoke(self, cell: Any, x: Sequence[Any], state: Sequence[Any], leave: bool = False) -> Any:
        """What the cell returns, as it is; and what it holds then, if that is its state, which is put back unless it is to be left."""
        given = {"x": (x, self.inputs), "state": (state, self.state)}

        def value(word: str) -> Any:
            role, _, leaf = word.partition(".")
            leaves, structure = given[role]
            return leaves[int(leaf)] if leaf else structure.unflatten(leaves)

        names = self.keywords or ("",) * len(self.order)
        pairs = [(name, value(word)) for name, word in zip(names, self.order, strict=True)]
        args, named = [v for n, v in pairs if not n], {n: v for n, v in pairs if n}
        return held.call(cell, args, named, self.state.unflatten(state), leave) if self.held else cell(*args, **named)

    def call(self, cell: Any, x_leaves: Sequence[Tensor], state_leaves: Sequence[Tensor]) -> tuple[list[Tensor] | None, list[Tensor]]:
        """One step: (output leaves or None, new state leaves). Raises StateError where the state comes back another."""
        return self.read(called(cell), self.invoke(cell, x_leaves, state_leaves), state_leaves)

    def read(self, name: str, result: Any, before: Sequence[Tensor]) -> tuple[list[Tensor] | None, list[Tensor]]:
        """Take what the cell returned apart: (output leaves or None, new state leaves)."""
        words = self.returns.split(", ")
        if words == ["state"]:
            parts = {"state": result}
        elif isinstance(result, (tuple, list)) and len(result) == len(words):
            parts = dict(zip(words, result, strict=True))
        else:
            raise StateError(f"cell {name} was to return ({self.returns}) with state {self.state}, and returned {seen(result)}")
        if "state" in parts:
            tree, structure = parts["state"], self.state
            after = structure.conform(tree)
            if after is None and self.separate:  # arguments of their own come back as a plain tuple
                after = Structure("tuple", children=(LEAF,) * self.state.count).conform(tree)
        else:
            tree = tuple(parts[f"state.{i}"] for i in range(self.state.count))
            after = list(tree) if all(isinstance(t, Tensor) for t in tree) else None
        if after is None:
            raise StateError(f"cell {name}: the state goes in as {self.state} = {describe(before)} and comes out as {seen(tree)}")
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            cast = a.is_floating_point() and b.is_floating_point() and autocast(b.device.type) is not None  # it decides about dtypes
            if a.shape != b.shape or (a.dtype != b.dtype and not cast):
                raise StateError(
                    f"cell {name}: the state's leaf {i} goes in as {describe([a])} and comes out as {describe([b])}. A state keeps its "
                    "shape and dtype from step to step: give the right initial state with state=, or correct the cell."
                )
        tree = self._out(parts)
        if self.out is None:
            return None, after
        out = self.out.conform(tree)
        if out is None:
            raise SignatureError(f"cell {name}: its output was {self.out} and is now {seen(tree)}; it must stay the same")
        return out, after

    def _out(self, parts: dict[str, Any]) -> Any:
        outs = [v for w, v in parts.items() if w.startswith("out")]
        return outs[0] if len(outs) == 1 else tuple(outs)

    def completed(self, name: str, result: Any, before: Sequence[Tensor]) -> Convention:
        """This convention with `out` as this result has it. Raises StateError or SignatureError if the result does not fit."""
        self.read(name, result, before)
        words = self.returns.split(", ")
        if not any(w.startswith("out") for w in words):
            return self
        try:
            leaves, structure = flatten(self._out(dict(zip(words, result, strict=True))))
        except ShapeError as error:
            raise SignatureError(f"cell {name}: its output cannot be kept: {error}") from error
        if any(t.dim() < 1 or t.shape[0] != before[0].shape[0] for t in leaves):
            raise SignatureError(f"cell {name}: its output is {describe(leaves)}; every output starts with the batch axis")
        return dataclasses.replace(self, out=structure)


# -- which calls are worth trying ------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    positional: list[tuple[str, bool]]  # (name, whether it must be given)
    keyword: list[tuple[str, bool]]  # those that can only be given by name
    variadic: bool

    def __str__(self) -> str:
        return f"({', '.join([n for n, _ in (*self.positional, *self.keyword)] + ['*'] * self.variadic)})"


def parameters_of(cell: Any) -> Parameters:
    function = cell.forward if isinstance(cell, nn.Module) else cell
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled functions need not tell
        return Parameters([], [], True)
    place = [(p.name, p.default is p.empty) for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    word = [(p.name, p.default is p.empty) for p in found if p.kind == p.KEYWORD_ONLY]
    return Parameters(place, word, any(p.kind == p.VAR_POSITIONAL for p in found))


def role(name: str) -> str:
    name = name.lower()
    for role, names in _ROLES.items():
        if name in names:
            return role
    return "state" if any(part in name for part in _STATE_PARTS) or name.startswith("h_") else ""


class Order(NamedTuple):
    """A way to pass the arguments, and how many parameter names speak against it and for it."""

    words: tuple[str, ...]
    keywords: tuple[str, ...]
    against: int
    speak: frozenset[str]
    agree: int

    @property
    def rank(self) -> tuple[int, int]:
        return self.against, -self.agree


def _ranked(parameters: Parameters, words: tuple[str, ...]) -> Order:
    pairs = [(role(n), w.split(".")[0]) for (n, _), w in zip(parameters.positional, words, strict=False)]
    agreed = [r for r, w in pairs if r == w]
    return Order(words, (), sum(r not in ("", w) for r, w in pairs), frozenset(agreed), len(agreed))


def orders(parameters: Parameters, inputs: Structure, state: Structure) -> list[Order]:
    """Every way to pass x and the state that the parameters have room for, the likeliest first."""
    xs = [("x",)] + [tuple(f"x.{i}" for i in range(inputs.count))] * (inputs.count > 1 and inputs.kind != "dict")
    ss = [("state",)] + [tuple(f"state.{i}" for i in range(state.count))] * (state.count > 1)
    words = []
    for x in xs:
        for s in ss:
            words += [x + s, s + x] + [x[:1] + s + x[1:]] * (len(x) > 1)
    required = sum(must for _, must in parameters.positional)
    most = 99 if parameters.variadic else len(parameters.positional)
    found = [_ranked(parameters, w) for w in words if required <= len(w) <= most and not any(m for _, m in parameters.keyword)]
    found += [o for s in ss if (o := _by_name(parameters, inputs, s)) is not None]
    if any(o.against == 0 and o.speak == {"x", "state"} for o in found):  # the names say both: nothing against them is tried
        found = [o for o in found if o.against == 0]
    return sorted(found, key=lambda o: (o.rank, len(o.words)))


def _by_name(parameters: Parameters, inputs: Structure, state: tuple[str, ...]) -> Order | None:
    """A dict of inputs whose keys are names of parameters is passed by those names; the state takes the first others."""
    names = [n for n, _ in (*parameters.positional, *parameters.keyword)]
    if inputs.kind != "dict" or inputs.count != len(inputs.names) or not set(inputs.names) <= set(names):
        return None
    others = [n for n in names if n not in inputs.names]
    taken = dict(zip(others, state, strict=False)) | {n: f"x.{i}" for i, n in enumerate(inputs.names)}
    missing = [n for n, must in (*parameters.positional, *parameters.keyword) if must and n not in taken]
    if missing or len(others) < len(state):
        return None
    keywords = tuple(n for n in names if n in taken)
    return Order(tuple(taken[n] for n in keywords), keywords, 0, frozenset(("x", "state")), len(keywords))


def declared_order(signature: str, inputs: Structure) -> tuple[Order, list[str], int]:
    """What a signature string says: the arguments, the ways to read what comes back, the number of state arguments."""
    before, arrow, after = signature.partition("->")
    left, right = ([w.strip() for w in side.split(",")] for side in (before, after))
    bad = f"signature {signature!r}"
    if not arrow or not all(w.isidentifier() for w in (*left, *right)) or len(set(left)) < len(left) or len(set(right)) < len(right):
        raise SignatureError(f"{bad} is not of the form 'x, state -> out, state': names, each once a side, and one arrow")
    states, xs = [w for w in left if w in right], [w for w in left if w not in right]
    if "state" in {*left, *right} - {*states} or (not states and len(right) > 1):
        raise SignatureError(f"{bad} names no state: the state stands on both sides, as in 'x, state -> out, state'")
    if len(xs) not in (1, inputs.count) or not xs:
        raise SignatureError(f"{bad} has {len(xs)} inputs beside the state, x is {inputs}; name one, or one for each tensor of x")
    outs = [w for w in right if w not in states]

    def word(w: str, role: str, group: list[str]) -> str:
        return role if len(group) == 1 else f"{role}.{group.index(w)}"

    flat = [word(w, "state", states) if w in states else word(w, "out", outs) for w in right]
    whole = [w for w in flat if not w.startswith("state.")]
    readings = [", ".join(flat)]
    if len(states) > 1 and [w for w in right if w in states] == states and len(outs) < 2:  # (out, (h, c)) for "-> out, h, c"
        readings.append(", ".join([*whole, "state"] if flat[-1].startswith("state.") else ["state", *whole]))
    words = tuple(word(w, "state", states) if w in states else word(w, "x", xs) for w in left)
    return Order(words, (), 0, frozenset(("x", "state")), len(words)), readings, len(states)
