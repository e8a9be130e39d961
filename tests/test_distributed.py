"""DDP and FSDP on two processes: gradients are those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqparc

SIZE = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = seqparc.compile(nn.GRUCell(3, 5)), nn.Linear(5, 3)
        self.layer = seqparc.compile(nn.LSTM(3, 4, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.head(self.rnn(x)[0])))[0]  # type: ignore[no-any-return]


def worker(rank: int, meeting: str, model: Model, x: Tensor, right: dict[str, Tensor]) -> None:
    """One process; the model has come to it as any module does that is sent to another process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE)
    mine = x.chunk(SIZE)[rank]
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(mine).square().mean().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, right[name], msg=lambda m, name=name: f"DDP, {name}: {m}")
    model.zero_grad()
    mesh = init_device_mesh("cpu", (SIZE,))
    for part in (model.rnn, model.layer, model):
        fully_shard(part, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        model(mine).square().mean().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), right[name], msg=lambda m, name=name: f"FSDP, {name}: {m}")
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    model, x = Model(), torch.randn(2 * SIZE, 12, 3)
    model(x).square().mean().backward()
    right = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.multiprocessing.spawn(worker, (str(tmp_path / "meeting"), model, x, right), nprocs=SIZE)
