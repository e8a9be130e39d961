"""The generated C, word for word: a change of it is seen and read. `python -m tests.test_golden` writes it anew."""

from __future__ import annotations

import importlib.resources
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.codegen.c import emit
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


CELLS = {"leaky": (Leaky, 12), "dense": (Dense, 20)}


def generated(name: str) -> dict[str, str]:
    make, inputs = CELLS[name]
    engine = seqparc.compile(make(), backend="torch").engine(torch.zeros(1, 1, inputs))
    assert not isinstance(engine, str) and engine is not None
    plan: Plan = engine.plan
    header = importlib.resources.files("seqparc.codegen").joinpath("simd.h").read_text()
    programs = {"forward": plan.program, "backward": plan.adjoint().program, "forward diagonal": plan.jacobian("forward", "diagonal")}
    texts = {f"{name} {which}.c".replace(" ", "_"): emit(p, double=False).text for which, p in programs.items()}
    return {file: re.sub(r"(test_golden\.py):\d+", r"\1", text.replace(header, "@SIMD@\n")) for file, text in texts.items()}


@pytest.mark.parametrize("name", CELLS)
def test_generated_code_is_as_it_was(name: str) -> None:
    for file, text in generated(name).items():
        assert text == (FOLDER / file).read_text(), f"{file} has changed; if it should, run python -m tests.test_golden and read the diff"


X86 = ("-march=x86-64", "-march=haswell", "-march=skylake-avx512")
MACHINES = [*(("cc", f) for f in X86 if platform.machine() == "x86_64"), ("aarch64-linux-gnu-gcc", "-march=armv8-a")]


@pytest.mark.parametrize(("compiler", "machine"), MACHINES, ids=lambda v: v.removeprefix("-march="))
def test_it_compiles_for_every_vector_width(compiler: str, machine: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    header = importlib.resources.files("seqparc.codegen").joinpath("simd.h").read_text()
    for file in sorted(FOLDER.glob("*.c")):
        for double in (0, 1):
            text = file.read_text().replace("@SIMD@\n", header).replace("#define SP_DOUBLE 0", f"#define SP_DOUBLE {double}")
            (tmp_path / "kernel.c").write_text(text)
            command = [compiler, "-O1", machine, "-std=gnu11", "-fopenmp", "-w", "-S", "-o", "/dev/null", str(tmp_path / "kernel.c")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{file.name}: {done.stderr[:2000]}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for cell in CELLS:
        for path, source in generated(cell).items():
            (FOLDER / path).write_text(source)
