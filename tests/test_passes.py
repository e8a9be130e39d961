"""Each pass by itself: before and after, and numbers against an independent derivation."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import ir
from seqparc.codegen.launch import CKernel
from seqparc.ops import ATEN, OPS
from seqparc.options import Options
from seqparc.passes import dependency, derivative, lanes, partial, simplify, strategy
from seqparc.plan import Plan
from seqparc.runtime.interpreter import TorchKernel
from seqparc.scan import doubling
from seqparc.spans import Spans, cut_evenly

from .cells import CELLS


@functools.cache
def plan(name: str) -> Plan:
    torch.manual_seed(0)
    rnn = seqparc.compile(CELLS[name].make().double())
    engine = rnn.engine(torch.zeros(1, 2, CELLS[name].inputs, dtype=torch.float64))
    assert engine is not None and not isinstance(engine, str)
    return engine.plan


# -- the table -------------------------------------------------------------------------------------------------------


def numbers(op: str, count: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [lo + (hi - lo) * torch.rand(count, generator=generator, dtype=torch.float64) for lo, hi in OPS[op].domains]


def evaluate(value: ir.Value, env: dict[ir.Value, Tensor]) -> Tensor:
    done = dict(env)
    for v in ir.topological([value]):
        if v not in done:
            match v:
                case ir.Const(value=number):
                    done[v] = torch.full((v.size,), number, dtype=torch.float64)
                case ir.Map(op=op, operands=operands):
                    done[v] = OPS[op].torch(*(done[a] for a in operands))
                case _:
                    raise TypeError(type(v).__name__)
    return done[value]


@pytest.mark.parametrize("op", OPS)
def test_partials_are_autograds(op: str) -> None:
    """The derivative that a row gives, as values, against autograd through the row's own function."""
    args = [a.requires_grad_() for a in numbers(op)]
    size = args[0].numel()
    leaves = [ir.leaf("stream", i, np.arange(size)[None]) for i in range(len(args))]
    y, g = ir.map_(op, *leaves), ir.leaf("stream", 9, np.arange(size)[None])
    cotangent = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cotangent = cotangent.to(torch.bfloat16).to(torch.float64)  # which autograd's casts of it leave as it is
    result = OPS[op].torch(*args)
    right = torch.autograd.grad(result, args, cotangent, allow_unused=True) if result.requires_grad else [None] * len(args)
    env = {**dict(zip(leaves, (a.detach() for a in args), strict=True)), y: result.detach(), g: cotangent}
    for i, want in enumerate(right):
        value = partial.carry(op, i, tuple(leaves), y, g)
        mine = torch.zeros(size, dtype=torch.float64) if value is None else evaluate(value, env)
        torch.testing.assert_close(mine, torch.zeros_like(mine) if want is None else want, rtol=1e-9, atol=1e-9)


def test_the_derivatives_that_are_kept_are_sympys() -> None:
    from seqparc.passes import symbolic

    assert symbolic.templates() == partial.KEPT.read_text("utf-8"), "made anew by python -m seqparc.passes.symbolic; read the difference"


def test_every_row_is_complete() -> None:
    for name, row in OPS.items():
        assert name == row.name and row.c and row.form and len(row.domains) == row.arity and row.cost >= 1
        assert row.partials is None or len(row.partials) == row.arity
    for name, row in ATEN.items():
        assert OPS[row.name] is row
        packet, overload = name.removeprefix("aten.").rsplit(".", 1)
        assert hasattr(getattr(torch.ops.aten, packet), overload), name


# -- structure -------------------------------------------------------------------------------------------------------


def one_step(name: str) -> tuple[Any, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    cell = CELLS[name].make().double()
    rnn = seqparc.compile(cell)
    x = torch.randn(1, 2, CELLS[name].inputs, dtype=torch.float64)
    _, convention, start = rnn.understand(x)

    def step(*state: Tensor) -> Tensor:
        _, following = convention.call(cell, [x[:, 0]], list(state))
        return torch.cat([f.reshape(-1) for f in following])

    return step, x, [torch.rand(s.shape, dtype=torch.float64) * 0.7 + 0.1 for s in start]


@pytest.mark.parametrize("name", CELLS)
def test_the_pattern_holds_every_entry_of_the_jacobian(name: str) -> None:
    step, _, state = one_step(name)
    with torch.no_grad():
        assert step(*state).shape == (plan(name).core.n,)
    blocks = torch.func.jacrev(step, argnums=tuple(range(len(state))))(*state)
    jacobian = torch.cat([b.detach().reshape(b.shape[0], -1) for b in blocks], 1)
    pattern = plan(name).structure.pattern
    assert not bool((jacobian[~torch.from_numpy(pattern)] != 0).any())
    if name not in ("RNN relu", "IndRNN", "sLSTM"):  # where a kink makes an entry zero here and not there
        assert np.array_equal(jacobian.numpy() != 0, pattern)


def test_groups_and_their_order() -> None:
    p = np.zeros((6, 6), bool)
    for to, source in ((0, 0), (1, 0), (1, 1), (2, 1), (1, 2), (3, 3), (4, 5), (5, 4)):
        p[to, source] = True
    components, order = dependency.groups(p)
    assert components == ((0, 1, 2), (3,), (4, 5))
    assert set(order) == {(0,), (1, 2), (3,), (4, 5)} and order.index((0,)) < order.index((1, 2))


@pytest.mark.parametrize("seed", range(200))
def test_groups_are_a_graph_librarys(seed: int) -> None:
    import networkx as nx

    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 14))
    p = generator.random((n, n)) < generator.choice([0.05, 0.15, 0.3, 0.6])
    if seed % 2:  # numbers that are alike
        same = generator.integers(0, n, 2 * n)
        p = p[np.ix_(same, same)]
    graph = nx.from_numpy_array(p.T, create_using=nx.DiGraph)
    components, order = dependency.groups(p)
    assert set(components) == {tuple(sorted(c)) for c in nx.weakly_connected_components(graph)}
    assert set(order) == {tuple(sorted(c)) for c in nx.strongly_connected_components(graph)}
    at = {i: k for k, group in enumerate(order) for i in group}
    assert all(at[source] <= at[to] for to, source in np.argwhere(p).tolist())


def test_groups_of_a_large_pattern_are_found_by_one_walk() -> None:
    """A dense one of many numbers that are not interchangeable, as a large LSTM has, took a graph library a quarter of a minute."""
    n = 700
    looked: list[int] = []

    class Counted(list[int]):
        def __getitem__(self, i: Any) -> Any:
            looked.append(i)
            return super().__getitem__(i)

    every = (1 << n) - 1
    rows = Counted([every ^ (1 << (i * 7 % n)) for i in range(n)])
    columns = Counted([sum(1 << i for i in range(n) if list.__getitem__(rows, i) >> j & 1) for j in range(n)])
    assert dependency.strongly_connected(rows, columns) == (tuple(range(n)),)
    assert len(looked) <= 4 * n


def test_a_permuted_block_cell_is_found() -> None:
    """The blocks are scattered over the state by a permutation in the weights' values."""
    permutation = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    block = torch.kron(torch.eye(3), torch.ones(3, 3))[permutation][:, permutation]
    w = nn.Parameter(torch.randn(9, 9))
    rnn = seqparc.compile(lambda x, h: torch.tanh(h @ (w * block).t() + x), state=torch.zeros(9))
    found = rnn.engine(torch.zeros(1, 2, 9)).plan
    assert found.structure.kind == "block" and sorted(map(len, found.structure.components)) == [3, 3, 3]
    assert (found.program.lanes, found.program.n) == (3, 3)
    x = torch.randn(2, 30, 9)
    torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0], rtol=1e-5, atol=1e-6)


def test_another_mask_compiles_anew() -> None:
    mask = torch.eye(4)
    rnn = seqparc.compile(lambda x, h: torch.tanh(h @ (mask * 0.5) + x), state=torch.zeros(4))
    x = torch.randn(2, 30, 4)
    torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0], rtol=1e-5, atol=1e-6)
    assert rnn.engine().plan.structure.kind == "diagonal"
    mask[0, 1] = 1.0
    torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0], rtol=1e-5, atol=1e-6)
    assert rnn.engine().plan.structure.kind == "block-triangular"


def test_elementwise_products_with_constant_zeros() -> None:
    """Synapses as a matrix per sample, of which a constant mask leaves a part: what it leaves out is proved and not computed."""
    mask = torch.triu(torch.ones(4, 4))

    class Synapses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("mask", mask.clone())

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            open_ = torch.sigmoid(h[:, :, None] * self.w) * self.mask  # [batch, from, to]
            return x + (open_ * self.w).sum(1) / (1 + open_.sum(1))

    cell = Synapses()
    rnn = seqparc.compile(cell)
    x, h = torch.randn(3, 30, 4), torch.randn(3, 4)
    torch.testing.assert_close(rnn(x, h)[0], rnn.sequential(x, h)[0])
    plan = rnn.engine().plan
    assert (plan.structure.pattern == mask.T.bool().numpy()).all()
    assert sum(isinstance(v, ir.Map) and v.op == "sigmoid" for v in ir.topological(plan.program.outputs)) == 10
    cell.mask[3, 0] = 1.0  # another mask compiles anew
    torch.testing.assert_close(rnn(x, h)[0], rnn.sequential(x, h)[0])
    assert rnn.engine().plan.structure.pattern[0, 3]


# -- lanes and programs ----------------------------------------------------------------------------------------------


def run(program: ir.Program, state: Tensor, streams: list[Tensor], params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One step of any program by the interpreter: end state and emits."""
    kernel = TorchKernel(program, torch.float64)
    emits = [torch.zeros(len(state), 1, n, dtype=torch.float64) for n in program.emit_sizes]
    sums = [None] * len(program.sum_sizes)
    end = kernel.sweep(Spans(np.zeros(1, np.int64), np.ones(1, np.int64)), state[None], streams, kernel.prepare(params, [])[0], emits, sums)
    return end[0], emits


def inputs_of(program: ir.Program, batch: int = 2) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1

    return draw(batch, sum(program.state_sizes)), [draw(batch, 1, n) for n in program.stream_sizes], [draw(n) for n in program.param_sizes]


@pytest.mark.parametrize("name", CELLS)
def test_every_form_of_a_program_computes_the_same(name: str) -> None:
    """As traced, split into lanes, and written out number by number."""
    p = plan(name)
    given = inputs_of(p.core)
    end, emits = run(p.core, *given)
    split = lanes.split_lanes(p.core, p.structure)
    for other in (split, p.program, lanes.scalarise(split)):
        if other is not None:
            assert other.lanes * other.n == p.core.n
            again, emits_again = run(other, *given)
            torch.testing.assert_close(again, end, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(emits_again, emits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_the_jacobian_program_carries_the_jacobian(name: str) -> None:
    p = plan(name)
    state, streams, params = inputs_of(p.program, 1)
    n, count = p.program.n, p.program.lanes
    program = p.jacobian("forward", "exact")
    eye = torch.eye(n, dtype=torch.float64).expand(count, n, n).reshape(1, -1)
    end, _ = run(program, torch.cat((state, eye), 1), streams, params)
    mine = end[0, state.shape[1] :].reshape(count, n, n)
    right = torch.func.jacrev(lambda s: run(p.program, s[None], streams, params)[0][0])(state[0])
    for lane, place in enumerate(p.place):
        torch.testing.assert_close(mine[lane], right[place][:, place], rtol=1e-10, atol=1e-12)


#: Cells with a way from a state number to itself through others within one step, and how far the diagonal may be off for it.
DETOURS = {"layer norm GRU": 0.2, "LEM": 1e-4}


@pytest.mark.parametrize("name", CELLS)
def test_the_diagonal_program_carries_the_diagonal(name: str) -> None:
    p = plan(name)
    state, streams, params = inputs_of(p.program, 1)
    end, _ = run(p.jacobian("forward", "diagonal"), torch.cat((state, torch.ones_like(state)), 1), streams, params)
    right = torch.func.jacrev(lambda s: run(p.program, s[None], streams, params)[0][0])(state[0]).diagonal()
    torch.testing.assert_close(end[0, state.shape[1] :], right[p.place.reshape(-1)], rtol=1e-10, atol=DETOURS.get(name, 1e-12))


def test_symbolic_entries_are_the_jacobian() -> None:
    p = plan("block GRU")
    state, streams, params = inputs_of(p.program, 1)
    right = torch.func.jacrev(lambda s: run(p.program, s[None], streams, params)[0][0])(state[0])
    place = p.place[0]
    offsets = np.concatenate([[0], np.cumsum(p.program.state_sizes)])
    for i, row in enumerate(derivative.entries(p.program)):
        for j, value in enumerate(row):
            env: dict[ir.Value, Tensor] = {}
            for v in ir.leaves([value]):
                at = int(v.index.array[0, 0])
                source = {"state": state[0, offsets[v.slot] :], "stream": streams[v.slot][0, 0] if v.kind == "stream" else None,
                          "param": params[v.slot] if v.kind == "param" else None}[v.kind]  # fmt: skip
                assert source is not None
                env[v] = source[at].reshape(1)
            torch.testing.assert_close(evaluate(value, env)[0], right[place[i], place[j]], rtol=1e-10, atol=1e-12)


def test_simplify_folds_what_it_may() -> None:
    x, one, zero = ir.leaf("stream", 0, [[0, 1]]), ir.const(1.0, 2), ir.const(0.0, 2)
    table = [
        (ir.map_("mul", x, one), x), (ir.map_("mul", one, x), x), (ir.map_("mul", zero, x), zero), (ir.map_("add", x, zero), x),
        (ir.map_("add", zero, x), x), (ir.map_("sub", x, zero), x), (ir.map_("sub", zero, x), ir.map_("neg", x)),
        (ir.map_("div", x, one), x),
        (ir.map_("exp", zero), one), (ir.map_("tanh", ir.map_("mul", zero, x)), zero), (ir.map_("where", one, x, x), x),
        (ir.map_("div", one, x), ir.map_("div", one, x)),
    ]  # fmt: skip
    for before, after in table:
        assert simplify.simplify([before]) == [after]


def test_equal_values_are_one_value() -> None:
    x = ir.leaf("stream", 0, [[0, 1, 2]])
    assert ir.map_("tanh", ir.take(x, [2, 1])) is ir.map_("tanh", ir.take(x, [2, 1]))
    assert ir.take(ir.take(x, [2, 1, 0]), [2, 1, 0]) is x
    assert ir.take(x, [0, -1, 2]).which.array.tolist() == [0, -1, 0]  # type: ignore[attr-defined]


# -- how it is run ---------------------------------------------------------------------------------------------------


def test_strategy_says_why() -> None:
    def decide(options: Options, **over: Any) -> strategy.Choice:
        known = {"steps": 10_000, "paces": alike(16), "n": 4, "scalar": True, "affine": False, "warmup": None}
        return strategy.choose(options, **{**known, **over})

    def alike(most: int) -> tuple[tuple[int, float], ...]:
        return tuple((1 << k, 1.0) for k in range(most.bit_length()))

    assert decide(Options()).strategy == "shooting" and decide(Options()).chunks == 16
    assert decide(Options(), paces=alike(1)).strategy == "sequential" and decide(Options(), paces=alike(1)).chunks == 1
    assert decide(Options(), steps=60).strategy == "sequential"
    assert decide(Options(), warmup=5001).chunks == 1
    # 16 chunks take 256 + 100 steps, 8 take 512 + 100 in four thirds of the time; then the other way round; and nearly as long is enough.
    for pace, chunks in ((1.8, 8), (1.6, 16), (1.7, 8)):
        assert decide(Options(), steps=4096, warmup=100, paces=((8, 1.0), (16, pace))).chunks == chunks
    assert decide(Options(), steps=1000, passes=3, paces=((2, 0.9), (4, 2.0))).given_up
    assert decide(Options(), steps=40, warmup=8, paces=alike(64)).chunks == 5
    assert decide(Options(), steps=600, warmup=100, paces=((2, 1.0), (4, 1.0), (8, 1.3))).chunks == 4, "six may take as long as eight"
    never = ((2, 2.0), (4, 4.0))
    assert decide(Options(), paces=never).chunks == 1 and "as long" in decide(Options(), paces=never).reasons[-1]
    assert decide(Options(strategy="shooting"), paces=never).chunks == 2
    assert decide(Options(strategy="sequential")).chunks == 1
    newton = decide(Options(strategy="newton"))
    assert newton == strategy.Choice("newton", 10_000, 0, ("exact",), newton.reasons)
    assert decide(Options(strategy="newton"), n=33, scalar=False).updates == ("diagonal",)
    assert decide(Options(), n=32, scalar=False).updates == ("none", "diagonal", "exact")
    assert decide(Options(), n=32, scalar=False, products=12).updates == ("none",)
    assert decide(Options(update="diagonal"), n=32, scalar=False, products=12).updates == ("diagonal",)
    assert decide(Options(), n=33, scalar=False).updates == ("none", "diagonal")
    assert decide(Options(strategy="shooting", update="exact"), n=33, scalar=False).updates == ("diagonal",)
    assert decide(Options(strategy="shooting", chunks=7, warmup=5)).chunks == 7
    assert all(decide(o, paces=alike(b)).reasons for o in (Options(), Options(strategy="newton"), Options(chunks=3)) for b in (1, 16))


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1025])
@pytest.mark.parametrize("chunks", [1, 2, 7, 64])
def test_chunks_cover_time(steps: int, chunks: int) -> None:
    chunks = min(chunks, steps)
    cut = cut_evenly(steps, chunks)
    t0, length = cut.t0, cut.length
    assert t0[0] == 0 and t0[-1] + length[-1] == steps and (t0[1:] == t0[:-1] + length[:-1]).all()
    assert length.max() - length.min() <= 1 and length[-1] == length.max()  # no chunk reads past the end


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_scan_is_the_loop(count: int, n: int) -> None:
    a, r = torch.randn(count - 1, 2, 3, n, n, dtype=torch.float64) * 0.5, torch.randn(count, 2, 3, n, dtype=torch.float64)
    scan = CKernel(plan("minGRU").program, torch.float64).scan
    for largest, both in ((False, torch.add), (True, torch.fmax)):
        a, r = (a.abs(), r.abs()) if largest else (a, r)
        rows = [r[0]]
        for c in range(1, count):
            rows.append(both(r[c], (a[c - 1] @ rows[-1].unsqueeze(-1)).squeeze(-1)))
        torch.testing.assert_close(scan(a, r, largest), torch.stack(rows))
        if n == 1 or not largest:
            torch.testing.assert_close(doubling(a, r, largest), torch.stack(rows))
        else:  # a product of sums of the larger is at least the larger of the products
            assert (doubling(a, r, largest) <= torch.stack(rows) + 1e-9).all()


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_the_gap_is_relative_to_what_was_lately(backend: str) -> None:
    make = {"c": CKernel, "torch": TorchKernel}[backend]
    kernel = make(plan("minGRU").program, torch.float64)
    n = sum(plan("minGRU").program.state_sizes)
    start = torch.full((5, 1, n), 1e-9, dtype=torch.float64)
    end = torch.full((5, 1, n), 1e-9, dtype=torch.float64)
    sizes = end.clone()
    end[1, 0, 2] *= 1 + 1e-6
    sizes[2, 0, 0] = 1.0  # crosses zero
    end[2, 0, 0] = 1e-6 + 1e-9
    start[3, 0, 0], end[2, 0, 1], start[3, 0, 1] = 1e-9, float("nan"), float("nan")
    end[3, 0, 1], start[4, 0, 1] = 1e20, 1.0
    start[0], end[4] = 3, 7  # neither is part of a gap
    largest, worst = kernel.gap(start, end, sizes, 0.0, 1e-7)
    assert worst[0] == 0 and worst[1] == pytest.approx(10, rel=1e-3) and worst[2] == pytest.approx(10, rel=1e-3)
    assert worst[3] == largest == pytest.approx(1e7)
    start[1, 0, 0] = end[0, 0, 0] = 1.0
    assert kernel.gap(start, end, sizes, 1e-7, 0.0)[1][2] == pytest.approx(10, rel=1e-3)  # of the largest so far
    end[3, 0, 3] = float("inf")
    assert kernel.gap(start, end, sizes, 1e-7, 1e-7)[0] == float("inf")


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", ["elementwise GRU", "GRU"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_kernel_leads_up_to_its_chunks(name: str, backend: str, backwards: bool) -> None:
    p = plan(name)
    kernel = {"c": CKernel, "torch": TorchKernel}[backend](p.program, torch.float64)
    n, t0, length, lead = sum(p.program.state_sizes), np.array([0, 5, 12]), np.array([5, 7, 8]), np.array([0, 4, 9])
    _, streams, params = inputs_of(p.program, 2)
    streams, weights = [torch.randn(2, 20, x.shape[-1], dtype=torch.float64) for x in streams], kernel.prepare(params, [])[0]
    start, nothing = torch.randn(3, 2, n, dtype=torch.float64), [None] * len(p.program.emit_sizes)
    reached = torch.zeros_like(start)
    end = kernel.sweep(Spans(t0, length, lead), start, streams, weights, nothing, [], backwards, reached)
    for c in range(3):
        one = slice(c, c + 1)
        before = kernel.sweep(Spans(t0[one] - lead[one], lead[one]), start[one], streams, weights, nothing, [], backwards)
        torch.testing.assert_close(reached[one], before)
        after = kernel.sweep(Spans(t0[one], length[one]), before, streams, weights, nothing, [], backwards)
        torch.testing.assert_close(end[one], after)


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", ["elementwise GRU", "GRU"])
def test_a_kernel_says_how_large_the_state_was_lately(name: str, backend: str) -> None:
    p = plan(name)
    kernel = {"c": CKernel, "torch": TorchKernel}[backend](p.program, torch.float64)
    steps, n, t0, length = 13, sum(p.program.state_sizes), np.array([0, 6]), np.array([6, 7])
    _, streams, params = inputs_of(p.program, 2)
    streams = [torch.randn(2, steps, x.shape[-1], dtype=torch.float64) for x in streams]
    states = [torch.zeros(2, steps, size, dtype=torch.float64) for size in p.program.emit_sizes]
    start = torch.randn(2, 2, n, dtype=torch.float64) * 5
    sizes = torch.empty_like(start)
    kernel.sweep(Spans(t0, length), start, streams, kernel.prepare(params, [])[0], states, [], sizes=sizes)
    for c, count in enumerate(length.tolist()):
        seen = [start[c], *torch.cat(states, -1)[:, t0[c] : t0[c] + count].unbind(1)]
        right = torch.stack([s.abs() / 2 ** (len(seen) - 1 - k) for k, s in enumerate(seen)]).amax(0)
        torch.testing.assert_close(sizes[c], right)
