"""The generated C and Triton, word for word: a change of it is seen and read. `python -m tests.test_golden` writes it anew."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.codegen import sweep
from seqparc.codegen.source import HEADERS, emit
from seqparc.plan import Plan

FOLDER = Path(__file__).parent / "golden"


class Leaky(nn.Module):
    """The smallest cell with a state, an input, a weight per number and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 12
        self.w = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        g = torch.sigmoid(x)
        return g * h + (1 - g) * torch.tanh(self.w * h)


class Dense(nn.Module):
    """The smallest dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 20
        self.w = nn.Parameter(torch.ones(20, 20))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.w + x)


class GRU(nn.Module):
    """Of groups of units that never meet; of one group it is dense, of groups of one unit elementwise."""

    def __init__(self, groups: int, units: int) -> None:
        super().__init__()
        self.hidden_size, self.shape = groups * units, (groups, units)
        self.u = nn.Parameter(torch.ones(3, groups, units, units))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        x, s = x.unflatten(-1, (3, *self.shape)), h.unflatten(-1, self.shape)
        z = torch.sigmoid(x[:, 0] + torch.einsum("bgi,gij->bgj", s, self.u[0]))
        r = torch.sigmoid(x[:, 1] + torch.einsum("bgi,gij->bgj", s, self.u[1]))
        c = torch.tanh(x[:, 2] + torch.einsum("bgi,gij->bgj", r * s, self.u[2]))
        return (z * s + (1 - z) * c).flatten(1)


class LSTM(nn.Module):
    """A dense one; its input comes already multiplied."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.ones(units, 4 * units))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.u.new_zeros(batch, len(self.u))
        return zero, zero

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (x + h @ self.u).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


CELLS = {"leaky": (Leaky, 12), "dense": (Dense, 20)}
GPU_CELLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "elementwise_gru": (lambda: GRU(8, 1), 24),
    "block_gru": (lambda: GRU(2, 16), 96),
    "dense_gru": (lambda: GRU(1, 16), 48),
    "lstm": (lambda: LSTM(16), 64),
}


def planned(cell: nn.Module, inputs: int, backend: str) -> Plan:
    engine = seqparc.compile(cell, backend=backend).engine(torch.zeros(1, 1, inputs))
    assert not isinstance(engine, str) and engine is not None
    return engine.plan


def headers() -> dict[str, str]:
    """What is pasted into every kernel, by file."""
    return {name: path.read_text() for name, path in HEADERS.items()}


def generated(name: str) -> dict[str, str]:
    make, inputs = CELLS[name]
    plan = planned(make(), inputs, "torch")
    programs = {"forward": plan.program, "backward": plan.adjoint().program, "forward diagonal": plan.jacobian("forward", "diagonal")}
    texts = {f"{name} {which}.c".replace(" ", "_"): emit(p, double=False).text for which, p in programs.items()}
    for header, text in headers().items():
        texts = {file: whole.replace(text, f"@{header}@\n") for file, whole in texts.items()}
    return {file: re.sub(r"(test_golden\.py):\d+", r"\1", text) for file, text in texts.items()}


def generated_triton(name: str) -> dict[str, str]:
    make, inputs = GPU_CELLS[name]
    text = sweep.emit(planned(make(), inputs, "triton").program, double=False).text
    return {f"{name}_forward.py.txt": re.sub(r"(test_golden\.py):\d+", r"\1", text)}


FILES = dict.fromkeys(CELLS, generated) | dict.fromkeys(GPU_CELLS, generated_triton)


@pytest.mark.parametrize("name", FILES)
def test_generated_code_is_as_it_was(name: str) -> None:
    for file, text in FILES[name](name).items():
        assert text == (FOLDER / file).read_text(), f"{file} has changed; if it should, run python -m tests.test_golden and read the diff"


X86 = ("-march=x86-64", "-march=haswell", "-march=skylake-avx512")
MACHINES = [*(("cc", f) for f in X86 if platform.machine() == "x86_64"), ("aarch64-linux-gnu-gcc", "-march=armv8-a")]


@pytest.mark.parametrize(("compiler", "machine"), MACHINES, ids=lambda v: v.removeprefix("-march="))
def test_it_compiles_for_every_vector_width(compiler: str, machine: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    for file in sorted(FOLDER.glob("*.c")):
        for double in (0, 1):
            text = file.read_text().replace("#define SP_DOUBLE 0", f"#define SP_DOUBLE {double}")
            for name, header in headers().items():
                text = text.replace(f"@{name}@\n", header)
            (tmp_path / "kernel.c").write_text(text)
            command = [compiler, "-O1", machine, "-std=gnu11", "-fopenmp", "-w", "-S", "-o", "/dev/null", str(tmp_path / "kernel.c")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{file.name}: {done.stderr[:2000]}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make_files in FILES.items():
        for path, source in make_files(name).items():
            (FOLDER / path).write_text(source)
