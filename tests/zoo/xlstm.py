"""xLSTM cells: xlstm, torchxlstm, and the plain versions that come with flashrnn's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .rows import H, Lazy, Row

slstm, mlstm, layers = Lazy("xlstm.blocks.slstm.cell"), Lazy("xlstm.blocks.mlstm.cell"), Lazy("xlstm.blocks.mlstm.layer")
pointwise = Lazy("xlstm.blocks.slstm.src.vanilla.slstm")
blocks, flash = Lazy("torchxlstm.xlstm"), Lazy("flashrnn.flashrnn.vanilla")
Xlstm, Blocks = partial(Row, "xlstm"), partial(Row, "torchxlstm")

#: Whether it is the first step is decided by whether all states of all samples are zero.
DECIDES = r"slstm\.py:\d+ makes a Python decision .* out of a tensor's value"
ALL_SAMPLES = r"slstm\.py:\d+: .*aten\.all"


# -- xlstm: states of the sLSTM are [4, batch, ...], one step is a sequence of one ------------------------------------


def slstm_of_one(m: Any, x: Tensor, s: Tensor) -> Any:
    y, s = m(x[:, None], s.movedim(1, 0))
    return y.flatten(1), s.movedim(0, 1)


def slstm_gates(m: Any, x: Any, state: Any) -> Any:
    states, gates = m(x[0], state[1], x[1], state[0].movedim(1, 0), {})
    return gates.movedim(0, 1), (states.movedim(0, 1), state[1])


def mlstm_step(m: Any, x: Any, state: Any) -> Any:
    return m.step(*(v[:, None] for v in x), mlstm_state=state)


def mlstm_layer_step(m: Any, x: Tensor, state: Any) -> Any:
    y, s = m.step(x[:, None], mlstm_state=state[:3], conv_state=(state[3].clone(),))  # which it writes into
    return y[:, 0], (*s["mlstm_state"], *s["conv_state"])


XLSTM = (
    Xlstm("sLSTMCell", lambda: slstm.sLSTMCell(slstm.sLSTMCellConfig(hidden_size=8, num_heads=2, backend="vanilla")),
          ((32,),), ((4, 8),), call=slstm_of_one, refused=DECIDES),
    Xlstm("sLSTM, pointwise part", lambda: pointwise.slstm_forward_pointwise, ((32,), (32,)), ((4, 8), (32,)),
          call=slstm_gates, refused=DECIDES),
    Xlstm("mLSTMCell", lambda: mlstm.mLSTMCell(mlstm.mLSTMCellConfig(context_length=16, embedding_dim=8, num_heads=2)),
          (H, H, H), ((2, 4, 4), (2, 4, 1), (2, 1, 1)), "2 triangular blocks of 21", mlstm_step, writes=True),
    Xlstm("mLSTMLayer", lambda: layers.mLSTMLayer(layers.mLSTMLayerConfig(
        embedding_dim=8, context_length=16, num_heads=2, round_proj_up_to_multiple_of=8, conv1d_kernel_size=4, qkv_proj_blocksize=4
    )), (H,), ((2, 8, 8), (2, 8, 1), (2, 1, 1), (4, 16)), "triangular", mlstm_layer_step),
)  # fmt: skip

TORCHXLSTM = (
    Blocks("sLSTMBlock", lambda: blocks.sLSTMBlock(8, 4, 2), (H,), (H, H, H, H), "dense"),
    Blocks("mLSTMBlock", lambda: blocks.mLSTMBlock(8, 4, 2), (H,), (H, H, H, H),
           refused="one sample of the batch reads another"),
)  # fmt: skip

# -- flashrnn: a function of weights, which are held here --------------------------------------------------------------


class Flash(nn.Module):
    """Weights for 2 heads of 4, and the function that they are for. gates: of the recurrent product, and of the bias."""

    def __init__(self, kind: str, gates: int, biases: int) -> None:
        super().__init__()
        self.r, self.b = nn.Parameter(torch.randn(2, 4, gates, 4) / 3), nn.Parameter(torch.randn(biases, 2, 4) / 3)
        self.run, self.pointwise = flash.flashrnn_forward, flash.flashrnn_pointwise_function_registry[kind]


def flash_step(m: Any, x: Tensor, s: Tensor) -> Any:
    states, last = m.run(x[None], s[None], m.r, m.b, m.pointwise)
    return states[0, :, 0], last[0]


FLASHRNN = (
    Row("flashrnn", "Elman", lambda: Flash("elman", 1, 1), ((1, 2, 4),), ((1, 2, 4),), "2 blocks of 4", flash_step),
    Row("flashrnn", "GRU", lambda: Flash("gru", 3, 4), ((3, 2, 4),), ((1, 2, 4),), "2 blocks of 4", flash_step),
    Row("flashrnn", "LSTM", lambda: Flash("lstm", 4, 4), ((4, 2, 4),), ((2, 2, 4),), "2 blocks of 8", flash_step),
    Row("flashrnn", "sLSTM", lambda: Flash("slstm", 4, 4), ((4, 2, 4),), ((4, 2, 4),), call=flash_step, refused=ALL_SAMPLES),
)

ROWS = (*XLSTM, *TORCHXLSTM, *FLASHRNN)
