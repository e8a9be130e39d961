"""How a cell wants to be called, what it returns and what state it starts from: found out by names and by trying."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seqparc import held
from seqparc.convention import Convention, Order, called, declared_order, orders, parameters_of
from seqparc.draws import seed
from seqparc.errors import SeqparcError, ShapeError, SignatureError, StateError, pass_on
from seqparc.matching import TRIAL_BATCH, Declared, alike, checked, match, match_held, no_room, refuse_more, rows_of, trial, x_only
from seqparc.tree import LEAF, Structure, describe, flatten

__all__ = ["METHODS", "Convention", "Structure", "broadcast_state", "called", "describe", "discover", "flatten", "initial_state"]

#: Methods of a cell that make its initial state for a batch size.
METHODS = ("init_state", "initial_state", "init_hidden")


def discover(
    cell: Any, x_t: Any, batch: int, state: Any = None, signature: str | None = None, name: str | None = None
) -> Convention:
    """Find out how a cell is called, from an example step: x_t [batch, ...] and state [batch, ...] (found if left away).

    Raises SignatureError where it stays unclear, StateError where the cell returns another state than it was given.
    """
    name = name or called(cell)
    x, inputs = checked(x_t, batch, "x", ShapeError)
    declared = declared_order(signature, inputs) if signature is not None else None
    if state is None:
        with held.untouched(cell, x):
            state = _initial(cell, name, x, inputs, batch, declared)
    leaves, structure = checked(state, batch, f"the state of {name}", StateError)
    if declared is not None and not declared[2]:
        return match_held(cell, name, x, inputs, leaves, structure, declared)
    if declared is not None and declared[2] not in (1, structure.count):
        raise SignatureError(f"signature {signature!r} names {declared[2]} state arguments, the state is {structure}")
    if structure.kind == "dict" and set(structure.names) <= set(held.attributes(cell)):
        with contextlib.suppress(SignatureError):
            return match_held(cell, name, x, inputs, leaves, structure, declared)
    found = match(cell, name, x, inputs, leaves, structure, declared)
    refuse_more(cell, found, name, x, leaves)
    return found


def broadcast_state(example: Any, batch: int) -> Any:
    """A state for one sample, [...], as the state of every sample of a batch, [batch, ...]; expanded, not copied."""
    leaves, structure = flatten(example)
    return structure.unflatten([t.expand(batch, *t.shape) for t in leaves])


def initial_state(
    cell: Any, x_t: Any, batch: int, convention: Convention | None = None, given: Any = None, signature: str | None = None
) -> Any:
    """The state before the first step, a tree of [batch, ...]; x_t [batch, ...] is one step of the input.

    In this order: `given` (an example for one sample, or a callable batch -> state); the cell's own init_state,
    initial_state or init_hidden(batch); zeros, where the cell takes None for them; zeros of hidden_size; what a cell that keeps
    its state on itself holds. Raises StateError where none of these is there, or where None means something else to the cell than zeros.
    """
    name = called(cell)
    x, inputs = checked(x_t, batch, "x", ShapeError)
    if given is None:
        declared = None
        if convention is not None:
            order = Order(convention.order, convention.keywords, 0, frozenset(), 0)
            declared = (order, [convention.returns], convention.state.count if convention.separate else 1)
        elif signature is not None:
            declared = declared_order(signature, inputs)
        methods = any(callable(getattr(cell, m, None)) for m in METHODS)
        start = None if methods or (declared is not None and declared[2]) else held_state(cell, x, inputs)
        if start is not None:
            return start
        if declared is not None and not declared[2]:
            raise StateError(f"signature {signature!r} names no state, and {name} changes none of its attributes, where else it could be")
        return _initial(cell, name, x, inputs, batch, declared)
    made = given(batch) if callable(given) else broadcast_state(given, batch)
    leaves, structure = checked(made, batch, f"the state= given for {name}", StateError)
    return structure.unflatten([t.to(x[0].device) for t in leaves])


def _initial(cell: Any, name: str, x: list[Tensor], inputs: Structure, batch: int, declared: Declared | None) -> Any:
    """The initial state by what the cell itself shows: a method, what None does, hidden_size."""
    for method in METHODS:
        make = getattr(cell, method, None)
        if callable(make):
            try:
                made = make(batch)
            except Exception as error:  # whatever the user's code raises
                pass_on(error)
                raise StateError(
                    f"{name}.{method}({batch}) raised {type(error).__name__}: {error}. It is called with the batch size and returns a "
                    "state [batch, ...]; or give state= to seqparc.compile."
                ) from error
            checked(made, batch, f"what {name}.{method}({batch}) returned", StateError)
            return made
    zeros = _from_none(cell, name, rows_of(x, TRIAL_BATCH), inputs, declared)
    if zeros is not None:
        leaves, structure = flatten(zeros)
        return structure.unflatten([t.new_zeros(batch, *t.shape[1:]) for t in leaves])
    size, tried = getattr(cell, "hidden_size", None), ""
    if isinstance(size, int) and not isinstance(size, bool):
        weights = cell.parameters() if isinstance(cell, nn.Module) else ()
        dtypes = dict.fromkeys(t.dtype for t in (*weights, *x) if t.is_floating_point() or t.is_complex())
        real = [d for d in dtypes if not d.is_complex]
        zeros = [torch.zeros(batch, size, dtype=d, device=x[0].device) for d in (*real[:1], *[d for d in dtypes if d.is_complex][:1])]
        # The pair first: a tensor can be indexed like a pair, a pair not used like a tensor.
        for state in [s for h in zeros for s in ((h, h.clone()), h)]:
            try:
                match(cell, name, x, inputs, *flatten(state), declared)
            except SeqparcError as error:
                tried = f" It has hidden_size {size}, but neither a tensor [batch, {size}] nor a pair of them is its state: {error}"
            else:
                return state
    raise StateError(
        f"the initial state of {name} is not known. Give it in one of four ways: state= to seqparc.compile (an example for one sample, or "
        "a callable batch -> state); a method init_state(batch) on the cell; a cell that takes None for its first state; an attribute "
        f"hidden_size.{tried}"
    )


def _from_none(cell: Any, name: str, x: list[Tensor], inputs: Structure, declared: Declared | None) -> Any:
    """Zeros like the state of a cell that takes None as its first state and means zeros by it; None if it takes no None.

    What the cell returns for None shows candidates for the state; zeros in the place of None must then give the same,
    through the same parameters: a learned initial state may be zero today.
    """
    for order, n in [(declared[0], declared[2])] if declared is not None else _ways(cell, name, inputs):
        shape = LEAF if n == 1 else Structure("tuple", children=(LEAF,) * n)
        way = Convention(order.words, shape, inputs, keywords=order.keywords)
        try:
            result = trial(cell, way, x, [None] * n)
        except Exception as error:  # whatever the user's code raises: it takes no None here
            pass_on(error)
            continue
        fits, other = [], False
        for state in _candidates(result, n, len(x[0])):
            zeros, structure = flatten(state)
            same = dataclasses.replace(way, state=structure)
            try:
                again = trial(cell, same, x, zeros)
            except Exception as error:  # this part of what came back is not the state
                pass_on(error)
                continue
            if not alike(result, again) or _own_start(cell, way, same, x, [None] * n, zeros):
                other = True
            else:
                fits.append((same, zeros))
        if len(fits) > 1:
            fits = [f for f in fits if _by_sample(cell, f[0], x, f[1])]
        if len(fits) == 1:
            return fits[0][0].state.unflatten(fits[0][1])
        if fits or other:
            why = "and zeros of more than one structure do the same" if fits else "which is not the same as zeros"
            raise StateError(
                f"{name} starts from a state of its own when it is given None, {why}. Say what it is with state=: an example for one "
                "sample, or a callable batch -> state, which may hold parameters."
            )
    return None


def _ways(cell: Any, name: str, inputs: Structure) -> list[tuple[Order, int]]:
    """Ways to call a cell whose state is unknown, as one argument or up to three; the likeliest first."""
    parameters = parameters_of(cell)
    found = [(o, 1) for o in orders(parameters, inputs, LEAF)]
    for n in (2, 3):
        split = orders(parameters, inputs, Structure("tuple", children=(LEAF,) * n))
        found += [(o, n) for o in split if any(w.startswith("state.") for w in o.words)]
    if not found:
        raise SignatureError(no_room(cell, name, inputs, None))
    return sorted(found, key=lambda f: (f[0].rank, len(f[0].words)))


def _candidates(result: Any, n: int, rows: int) -> Iterator[Any]:
    """Zeros like the parts of a result that may be the state: all of it, the second of two, all but the first."""
    parts = [result]
    if isinstance(result, (tuple, list)):
        parts += [result[1]] * (len(result) == 2) + [tuple(result[1:])] * (len(result) > 2)
    for part in parts:
        try:
            leaves, structure = flatten(part)
        except ShapeError:
            continue
        one_each = n == 1 or (structure.kind in ("tuple", "list") and len(structure.children) == n == len(leaves))
        if leaves and one_each and all(t.dim() and t.shape[0] == rows for t in leaves):
            yield structure.unflatten([torch.zeros_like(t) for t in leaves])


def _own_start(cell: Any, none: Convention, zero: Convention, x: list[Tensor], nones: list[None], zeros: list[Tensor]) -> bool:
    """Whether the cell uses parameters for None that it does not use for zeros: a learned initial state."""
    try:
        used = [_parameters_used(trial(cell, way, x, state, grad=True)) for way, state in ((none, nones), (zero, zeros))]
    except Exception as error:  # the cell cannot be differentiated, so nothing in it is learned
        pass_on(error)
        return False
    return not used[0] <= used[1]


def _parameters_used(result: Any) -> set[int]:
    todo = [t.grad_fn for t in flatten(result)[0]]
    done: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in done:
            done.add(node)
            todo += [following for following, _ in node.next_functions]
    return {id(node.variable) for node in done if hasattr(node, "variable")}


def _by_sample(cell: Any, way: Convention, x: list[Tensor], zeros: list[Tensor]) -> bool:
    """Whether samples in another order give the same results in that order: not so for a tensor indexed like a pair."""
    generator = torch.Generator().manual_seed(0)
    state = [z + torch.rand(z.shape, generator=generator, device="cpu").to(z) for z in zeros]
    turned = torch.arange(len(x[0]), device=x[0].device).flip(0)
    try:
        return alike(trial(cell, way, x, state), trial(cell, way, [t[turned] for t in x], [s[turned] for s in state]), turned)
    except Exception as error:  # whatever the user's code raises
        pass_on(error)
        return False


# -- what a cell holds before the first step ---------------------------------------------------------------------------


def held_state(cell: Any, x: list[Tensor], inputs: Structure) -> dict[str, Any] | None:
    """What a cell that keeps its state on itself holds before the first step, {attribute: [batch, ...]}; None if it keeps none.

    That is what it holds now; where that is nothing, a number or of another batch, tensors that do the same. Raises StateError where
    neither zeros nor that number does.
    """
    name = called(cell)
    for words in x_only(cell, inputs):
        way = Convention(words, LEAF, inputs)
        with held.untouched(cell, x):
            before, watch = held.attributes(cell), held.Watch(cell)
            seed(x[0].device)
            try:
                result = way.invoke(cell, [t.clone() for t in x], [])
                flatten(result)
            except Exception as error:  # whatever the user's code raises: it is not called so, or gives nothing out
                pass_on(error)
                continue
            after = {n: v for n, v in watch.changed().items() if _per_sample(v, len(x[0])) and n in before}
        if not after:
            continue
        fits = {n: _per_sample(before[n], len(x[0])) and _shapes(before[n]) == _shapes(v) for n, v in after.items()}
        start = {n: before[n] if fits[n] else _like(v, before[n]) for n, v in after.items()}
        structure = flatten(start)[1]
        same = Convention(words, structure, inputs, "out, state", held=structure.names)
        with held.untouched(cell, x), held.Used() as used:
            seed(x[0].device)
            given = {n: structure_of.unflatten([t.clone() for t in leaves]) for n, (leaves, structure_of) in _parts(start).items()}
            again = same.invoke(cell, [t.clone() for t in x], flatten(given)[0])
        read = {n: start[n] for n in start if used.reads(given[n])}
        if not read:  # what a cell only writes there is not its state
            continue
        if not alike((result, after), again):
            raise StateError(
                f"{name} keeps its state on itself ({', '.join(read)}) and starts from something else than zeros. Say from what with "
                "state=, a dict {attribute: tensor} for one sample, or a callable batch -> state."
            )
        return read
    return None


def _parts(state: dict[str, Any]) -> dict[str, tuple[list[Tensor], Structure]]:
    return {n: flatten(v) for n, v in state.items()}


def _per_sample(value: Any, batch: int) -> bool:
    """Whether a value is a tree of tensors [batch, ...]."""
    try:
        leaves, _ = flatten(value)
    except ShapeError:
        return False
    return bool(leaves) and all(t.dim() > 0 and t.shape[0] == batch for t in leaves)


def _shapes(value: Any) -> tuple[Any, ...]:
    leaves, structure = flatten(value)
    return structure, *[(t.shape, t.dtype) for t in leaves]


def _like(value: Any, number: Any) -> Any:
    """A tree of tensors like another's, all of one number; zeros where there is none."""
    leaves, structure = flatten(value)
    number = number if isinstance(number, (int, float)) and not isinstance(number, bool) else 0
    return structure.unflatten([torch.full_like(t, number, requires_grad=False) for t in leaves])
