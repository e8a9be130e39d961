"""Cells that a GPU computes in one operation, in the operations they are made of: what PyTorch's own cells give."""

from __future__ import annotations

import torch
from torch import nn

from seqparc.fused import FUSED


def test_gru_and_lstm_are_torchs_own() -> None:
    torch.manual_seed(0)
    x, h, c = torch.randn(3, 4), torch.randn(3, 5), torch.randn(3, 5)
    for bias in (True, False):
        gru, lstm = nn.GRUCell(4, 5, bias), nn.LSTMCell(4, 5, bias)
        biases = {cell: (cell.bias_ih, cell.bias_hh) if bias else () for cell in (gru, lstm)}
        made = FUSED["aten._thnn_fused_gru_cell.default"](x @ gru.weight_ih.t(), h @ gru.weight_hh.t(), h, *biases[gru])
        torch.testing.assert_close(made[0], gru(x, h))
        made = FUSED["aten._thnn_fused_lstm_cell.default"](x @ lstm.weight_ih.t(), h @ lstm.weight_hh.t(), c, *biases[lstm])
        for mine, right in zip(made[:2], lstm(x, (h, c)), strict=True):
            torch.testing.assert_close(mine, right)
