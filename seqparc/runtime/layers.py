"""`nn.RNN`, `nn.GRU` and `nn.LSTM` that run compiled: the same modules, called the same way, with the same parameters and state_dict.

A compiled layer is an instance of a subclass of the user's own class, so nothing that looks at a module sees another one; each of its
layers and directions is a cell, compiled like any.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqparc.errors import SignatureError
from seqparc.options import Options
from seqparc.plan import Stats
from seqparc.runtime.calls import Admit, numbered
from seqparc.runtime.module import CompiledRNN
from seqparc.surroundings import autocast


class Step(nn.Module):
    """One step of one layer in one direction, on the parameters of the layer itself."""

    def __init__(self, layer: nn.RNNBase, number: int, direction: int) -> None:
        super().__init__()
        self.layer = layer
        self.suffix = f"_l{number}{'_reverse' if direction else ''}"

    def weights(self) -> list[Tensor | None]:
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.layer.bias else ()))
        return [getattr(self.layer, name + self.suffix) for name in names] + ([] if self.layer.bias else [None, None])

    def forward(self, x: Tensor, state: Any) -> Any:
        w = self.weights()
        if self.layer.mode == "GRU":
            return torch.gru_cell(x, state, *w)  # type: ignore[arg-type]
        if self.layer.mode != "LSTM":
            cell = {"RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell}[self.layer.mode]
            return cell(x, state, *w)  # type: ignore[arg-type]
        if not self.layer.proj_size:
            h, c = torch.lstm_cell(x, state, *w)  # type: ignore[arg-type]
            return h, (h, c)
        w_ih, w_hh, b_ih, b_hh = w
        h, c = state
        i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)  # type: ignore[arg-type]
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = F.linear(torch.sigmoid(o) * torch.tanh(c), getattr(self.layer, "weight_hr" + self.suffix))
        return h, (h, c)


class CompiledLayer(nn.RNNBase):
    """What the three have in common. `stats` tells what the last call did, by layer and direction."""

    _compiled: dict[tuple[int, int], CompiledRNN]
    _options: Options
    _number: int

    def steps(self) -> dict[tuple[int, int], CompiledRNN]:
        """The compiled cell of every layer and direction (0 forward, 1 backward)."""
        if not self._compiled:
            returns = "out, state" if self.mode == "LSTM" else "state"
            made = {}
            for number in range(self.num_layers):
                for direction in range(2 if self.bidirectional else 1):
                    step = Step(self, number, direction)
                    made[number, direction] = CompiledRNN(
                        step, state=None, signature=f"x, state -> {returns}", options=self._options, name=f"{self.mode}{step.suffix}"
                    )
            self._compiled.update(made)  # all at once, as another thread may be looking
        return self._compiled

    @property
    def stats(self) -> dict[tuple[int, int], Stats]:
        """Of the last call, by layer and direction."""
        return {key: step.stats for key, step in self._compiled.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_number"] = numbered(self)
        self.steps()  # now, and not while something is tracing a call

    def forward(self, input: Any, hx: Any = None) -> Any:  # the name is torch's
        """As the torch module: (output, final state), for a tensor or a PackedSequence, batched or not."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn:
                # Dynamo lets no graph hold an nn.RNNBase then, and this must be the first it sees of it: the graph ends here.
                torch._dynamo.graph_break()
                return torch.compiler.disable(CompiledLayer.forward)(self, input, hx)
            from seqparc.runtime import traced

            return traced.call(self, type(self).__name__, False, input=input, hx=hx)
        return self.compute(input, hx)

    def compute(self, input: Any, hx: Any = None, admit: Admit | None = None) -> Any:
        """A call, without the hooks that there may be on this module."""
        packed = input if isinstance(input, PackedSequence) else None
        lengths: Tensor | None = None
        single = False
        if packed is not None:
            x, lengths = pad_packed_sequence(packed, batch_first=True)
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
            single = input.dim() == 2
            x = input.unsqueeze(0) if single else input if self.batch_first else input.transpose(0, 1)
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}")
        if not x.shape[1]:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        weight = self.weight_ih_l0
        if x.dtype != weight.dtype and autocast(x.device.type) is None:
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). Convert input: input.to({weight.dtype}), or "
                f"convert model: model.to({x.dtype})"
            )
        start = self._start(x, hx, single)
        y, last = self._run(x, start, packed, lengths, admit)
        final = tuple(s.squeeze(1) if single else s for s in last)
        return self._as_given(y, packed, lengths, single), final if self.mode == "LSTM" else final[0]

    def _start(self, x: Tensor, hx: Any, single: bool) -> list[Tensor]:
        """[layers · directions, batch, numbers] of every state tensor."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            return [x.new_zeros(count, x.shape[0], n) for n in sizes]
        given = list(hx) if self.mode == "LSTM" else [hx]
        given = [h.unsqueeze(1) if single and h.dim() == 2 else h for h in given]
        for h, n in zip(given, sizes, strict=True):
            if tuple(h.shape) != (count, x.shape[0], n):
                raise RuntimeError(f"Expected hidden size {(count, x.shape[0], n)}, got {list(h.shape)}")
        return given

    def _run(
        self, x: Tensor, start: list[Tensor], packed: PackedSequence | None, lengths: Tensor | None, admit: Admit | None
    ) -> tuple[Tensor, list[Tensor]]:
        directions = 2 if self.bidirectional else 1
        ends: list[list[Tensor]] = []
        for number in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                own = [s[number * directions + direction] for s in start]
                given = turned(x, lengths) if direction else x
                step = self.steps()[number, direction]
                y, last = step.compute(given, tuple(own) if self.mode == "LSTM" else own[0], lengths, admit=admit)
                outputs.append(turned(y, lengths) if direction else y)
                ends.append(list(last) if self.mode == "LSTM" else [last])
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and number + 1 < self.num_layers:
                # Drawn over [time, batch, numbers], or what is packed, as torch does, so that a seeded run drops the same.
                if packed is None:
                    x = F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)
                else:
                    again = self._as_given(x, packed, lengths, False)
                    x = pad_packed_sequence(again._replace(data=F.dropout(again.data, self.dropout)), batch_first=True)[0]
        return x, [torch.stack(column) for column in zip(*ends, strict=True)]

    def _as_given(self, y: Tensor, packed: PackedSequence | None, lengths: Tensor | None, single: bool) -> Any:
        """The output in the form the input had."""
        if packed is None or lengths is None:
            return y.squeeze(0) if single else y if self.batch_first else y.transpose(0, 1)
        order = packed.sorted_indices
        if order is not None:
            y, lengths = y.index_select(0, order), lengths.index_select(0, order.to(lengths.device))
        again = pack_padded_sequence(y, lengths, batch_first=True)
        return PackedSequence(again.data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [batch, time, ...] with each sample's time reversed, within its length."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    ends = lengths.to(x.device).unsqueeze(1)
    at = torch.where(steps < ends, ends - 1 - steps, steps)
    return x.gather(1, at.unsqueeze(-1).expand_as(x))


class RNN(CompiledLayer, nn.RNN):
    """nn.RNN, compiled."""


class GRU(CompiledLayer, nn.GRU):
    """nn.GRU, compiled."""


class LSTM(CompiledLayer, nn.LSTM):
    """nn.LSTM, compiled."""


#: The user's class -> the compiled one. Subclasses of the user's own are left alone: their forward may do more.
LAYERS: dict[type[nn.Module], type[CompiledLayer]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}


def compiled_layer(layer: nn.Module, options: Options, in_place: bool) -> CompiledLayer:
    """The layer compiled: itself, or a module of its own that shares the layer's parameters."""
    made: Any = layer if in_place else copy.copy(layer)
    made.__class__ = LAYERS[type(layer)]
    made.__dict__.update(_compiled={}, _options=options, _number=numbered(made))
    made.steps()
    return made  # type: ignore[no-any-return]


def described(layer: nn.Module) -> str:
    """A layer in words."""
    assert isinstance(layer, nn.RNNBase)
    more = [f"{layer.input_size} to {layer.hidden_size}", f"{layer.num_layers} layer{'s' * (layer.num_layers != 1)}"]
    more += ["bidirectional"] if layer.bidirectional else []
    return f"{type(layer).__name__}, {', '.join(more)}"


def convert(model: nn.Module, options: Options) -> list[str]:
    """See `seqparc.convert`."""
    if not isinstance(model, nn.Module):
        raise SignatureError(f"convert takes an nn.Module, not {type(model).__name__}")
    done = []
    for name, module in list(model.named_modules()):
        if type(module) in LAYERS:
            compiled_layer(module, options, in_place=True)
            done.append(f"{name or 'the model itself'}: {described(module)}")
    return done
