"""The one way of calling a cell that fits a state: every way its parameters have room for is tried, on copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqparc import held
from seqparc.convention import HELP, Convention, Order, orders, parameters_of
from seqparc.draws import seed
from seqparc.errors import SeqparcError, ShapeError, SignatureError, StateError, pass_on
from seqparc.tree import Structure, describe, flatten, seen

#: The batch at which a cell is tried with None: no tuple of states is as long, so it cannot be unpacked in a tuple's place.
TRIAL_BATCH = 7


def rows_of(leaves: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The same samples as a batch of another size, in memory of their own."""
    return [t.detach().index_select(0, torch.arange(rows, device=t.device) % t.shape[0]) for t in leaves]


def checked(tree: Any, batch: int, what: str, error: type[SeqparcError]) -> tuple[list[Tensor], Structure]:
    try:
        leaves, structure = flatten(tree)
    except ShapeError as wrong:
        raise error(f"{what}: {wrong}") from wrong
    if not leaves:
        raise error(f"{what} holds no tensor")
    for i, t in enumerate(leaves):
        if t.dim() < 1 or t.shape[0] != batch:
            raise error(f"{what}: leaf {i} has shape {list(t.shape)}; its first axis must be the batch of {batch}")
    return leaves, structure


#: What a signature says: the arguments, the ways to read what comes back, the number of state arguments.
Declared = tuple[Order, list[str], int]


def match(
    cell: Any, name: str, x: list[Tensor], inputs: Structure, state: list[Tensor], structure: Structure, declared: Declared | None
) -> Convention:
    """The one way of calling the cell that gives its state back."""
    n = structure.count
    ways = [declared[0]] if declared is not None else orders(parameters_of(cell), inputs, structure)
    flat = ", ".join(("out", *(f"state.{i}" for i in range(n))))
    readings = declared[1] if declared is not None else ["state", "out, state"] + [flat] * (n > 1)
    if not ways:
        raise SignatureError(no_room(cell, name, inputs, structure))
    # A batch as large as a tuple is long could be unpacked in its place.
    rows = len(x[0]) if len(x[0]) > 1 + max(n, inputs.count) else TRIAL_BATCH + n + inputs.count
    x, state = rows_of(x, rows), rows_of(state, rows)
    failures: list[tuple[Order, Exception]] = []
    near: SeqparcError | None = None
    for rank in sorted({o.rank for o in ways}):
        fits = []
        for order in (o for o in ways if o.rank == rank):
            way = Convention(order.words, structure, inputs, keywords=order.keywords)
            try:
                result = trial(cell, way, x, state)
            except Exception as error:  # whatever the user's code raises, it says only that this is not the way to call it
                pass_on(error)
                failures.append((order, error))
                continue
            fit = _reading(way, readings, name, result, state)
            if isinstance(fit, Convention):
                fits.append(fit)
            else:
                near = near or fit
        if len(fits) == 1:
            return fits[0]
        if fits:
            seen_ways = " and as ".join(f"({', '.join(f.order)})" for f in fits)
            raise SignatureError(
                f"cell {name}{parameters_of(cell)} can be called as {seen_ways}, gives a state each way, and its parameter names do "
                f"not tell which is meant. {HELP}"
            )
    if near is not None:
        raise near
    told = "; ".join(f"called as ({', '.join(o.words)}) it raised {type(e).__name__}: {e}" for o, e in failures[:3])
    raise SignatureError(
        f"cell {name} could not be called with x {inputs} = {describe(x)} and state {structure} = {describe(state)}: {told}. {HELP}"
    ) from failures[0][1]


def trial(cell: Any, way: Convention, x: Sequence[Tensor], state: Sequence[Any], grad: bool = False) -> Any:
    """What the cell returns, on copies of its arguments."""
    with held.untouched(cell, x, grad):
        return way.invoke(cell, [t.clone() for t in x], [t if t is None else t.clone() for t in state])


def _reading(
    way: Convention, readings: list[str], name: str, result: Any, state: list[Tensor]
) -> Convention | SeqparcError:
    """The convention completed by what came back, or the most telling of the reasons why it does not fit."""
    problems: list[StateError | SignatureError] = []
    for returns in readings:
        try:
            return dataclasses.replace(way, returns=returns).completed(name, result, state)
        except (StateError, SignatureError) as error:
            problems.append(error)
    chosen = next((p for p in problems if isinstance(p, SignatureError) or "leaf" in str(p)), problems[0])
    return type(chosen)(f"{chosen} (called as ({', '.join(way.order)}), it returned {seen(result)}. {HELP})")


def no_room(cell: Any, name: str, inputs: Structure, state: Structure | None) -> str:
    parameters = parameters_of(cell)
    if len(parameters.positional) + len(parameters.keyword) <= 1:
        return (
            f"cell {name}{parameters} takes no state. If it keeps its state on itself (self.h = ...), the attribute must be there before "
            "the first call: None, a number, or a tensor [batch, ...]. Or have it passed in and returned: forward(x, state) -> state."
        )
    return f"cell {name}{parameters} has no place for x {inputs} and state {state or 'tensor'}, or needs more than these. {HELP}"


def match_held(
    cell: Any, name: str, x: list[Tensor], inputs: Structure, state: list[Tensor], structure: Structure, declared: Declared | None
) -> Convention:
    """The way of calling a cell that keeps this state, {name: tensors}, on itself."""
    there = held.attributes(cell)
    missing = [n for n in structure.names if n not in there] if structure.kind == "dict" else [structure]
    if missing:
        raise StateError(f"{name} keeps its state on itself: it is a dict {{attribute: tensor}} of {', '.join(there)}, not {structure}")
    failures: list[Exception] = []
    for words in [declared[0].words] if declared is not None and inputs.count > 1 else x_only(cell, inputs):
        way = Convention(words, structure, inputs, "out, state", held=structure.names)
        copies = [t.clone() for t in state]
        try:
            with held.untouched(cell, x), held.Used() as used:
                result = way.invoke(cell, [t.clone() for t in x], copies)
        except Exception as error:  # whatever the user's code raises
            pass_on(error)
            failures.append(error)
            continue
        if not used.reads(copies):
            failures.append(SignatureError(f"it reads none of {', '.join(structure.names)}"))
            continue
        found = way.completed(name, result, state)
        refuse_more(cell, found, name, x, state)
        return found
    why = f"{type(failures[0]).__name__}: {failures[0]}" if failures else f"its parameters are {parameters_of(cell)}"
    raise SignatureError(f"cell {name} could not be called with x {inputs} = {describe(x)} alone: {why}")


def x_only(cell: Any, inputs: Structure) -> list[tuple[str, ...]]:
    """Ways to call a cell with x alone."""
    parameters = parameters_of(cell)
    required = sum(must for _, must in parameters.positional)
    ways = [("x",)] + [tuple(f"x.{i}" for i in range(inputs.count))] * (inputs.count > 1)
    most = 99 if parameters.variadic else len(parameters.positional)
    return [w for w in ways if required <= len(w) <= most and not any(must for _, must in parameters.keyword)]


#: Calls that are compared of a cell that keeps count of them.
CALLS = 33


def refuse_more(cell: Any, way: Convention, name: str, x: list[Tensor], state: list[Tensor]) -> None:
    """Raises StateError where the cell keeps more on itself from step to step than the state that is known, and uses it."""
    with held.untouched(cell, x):
        watch, results = held.Watch(cell), []
        seed(x[0].device)
        state = [s + torch.rand_like(s) if s.is_floating_point() else s for s in state]  # zeros would hide what multiplies them
        for _ in range(CALLS):  # of a cell that counts; one that does not is done after the first
            seed(x[0].device)
            try:
                results.append(way.invoke(cell, [t.clone() for t in x], [t.clone() for t in state], leave=True))
            except Exception as error:  # a state that the cell cannot have; what is compiled is compared with the cell anyhow
                pass_on(error)
                return
            changed = [n for n in watch.replaced() if n not in way.held]
            if not changed:
                return
    if not all(alike(results[0], result) for result in results[1:]):
        what = "an attribute that is not per sample, [batch, ...]" if way.held else "an attribute of its own"
        raise StateError(
            f"{name} changes {' and '.join(changed)} at each step, {what}, and its results depend on it. Have that passed in and returned "
            "as part of the state."
        )


def alike(one: Any, two: Any, rows: Tensor | slice = slice(None)) -> bool:
    """Whether two results are the same numbers; `rows` picks samples of the first."""
    (a, first), (b, second) = flatten(one), flatten(two)
    return first == second and all(
        p.shape == q.shape and p.dtype == q.dtype and torch.allclose(p[rows], q, rtol=1e-4, atol=1e-6, equal_nan=True)
        for p, q in zip(a, b, strict=True)
    )
