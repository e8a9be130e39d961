"""Gated and plain cells: torch's own, torchrecurrent, ncps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from .rows import H, Lazy, Row, X

torchrecurrent = Lazy("torchrecurrent")
quantizable = Lazy("torch.ao.nn.quantizable")
ncps, wirings = Lazy("ncps.torch"), Lazy("ncps.wirings")
Torch, Ncps = partial(Row, "torch"), partial(Row, "ncps")
PAIR = (H, H)


# -- torch -----------------------------------------------------------------------------------------------------------


def layer(m: Any, x: Tensor, h: Tensor) -> Any:
    y, h = m(x[None], h[None])
    return y[0], h[0]


def layer_of_pair(m: Any, x: Tensor, state: Any) -> Any:
    y, (h, c) = m(x[None], (state[0][None], state[1][None]))
    return y[0], (h[0], c[0])


TORCH = (
    Torch("RNNCell", lambda: nn.RNNCell(5, 8), (X,), (H,), "dense"),
    Torch("RNNCell, relu", lambda: nn.RNNCell(5, 8, nonlinearity="relu"), (X,), (H,), "dense"),
    Torch("GRUCell", lambda: nn.GRUCell(5, 8), (X,), (H,), "dense"),
    Torch("LSTMCell", lambda: nn.LSTMCell(5, 8), (X,), PAIR, "dense"),
    Torch("LSTMCell, quantizable", lambda: quantizable.LSTMCell(5, 8), (X,), PAIR, "dense"),
    Torch("GRU, a step at a time", lambda: nn.GRU(5, 8), (X,), (H,), "dense", layer),
    Torch("LSTM, a step at a time", lambda: nn.LSTM(5, 8), (X,), PAIR, "dense", layer_of_pair),
)

# -- torchrecurrent --------------------------------------------------------------------------------------------------

#: Cells of one state, (x, h) -> h, by structure.
ONE = {
    "dense": """ATRCell FastRNNCell FastGRNNCell LiGRUCell STARCell CFNCell NBRCell MGUCell UGRNNCell MinimalRNNCell SGRNCell SGUCell
        DSGUCell MUT1Cell MUT2Cell MUT3Cell MiRU1Cell MiRU2Cell LightRUCell""",
    "diagonal": "BRCell IndRNNCell TRNNCell",
}
#: Cells of a pair of states, (x, (h, c)) -> (h, c).
TWO = {
    "dense": """RANCell PeepholeLSTMCell LEMCell WMCLSTMCell ResLSTMCell coRNNCell JANETCell OriginalLSTMCell MultiplicativeLSTMCell
        NASCell MCLSTMCell""",
    "triangular": "SCRNCell",
    "8 blocks of 2": "UnICORNNCell",
}


def made(name: str, inputs: int = 5, **options: Any) -> Any:
    return partial(lambda: getattr(torchrecurrent, name)(inputs, 8, **options))


def by_structure(table: dict[str, str], state: tuple[tuple[int, ...], ...]) -> Iterator[Row]:
    for structure, names in table.items():
        for name in names.split():
            yield Row("torchrecurrent", name, made(name), (X,), state, structure)


def delayed(m: Any, x: Tensor, state: Any) -> Any:
    h = m(x, state[0], state[1])
    return h, (h, state[0])


TORCHRECURRENT = (
    *by_structure(ONE, (H,)),
    *by_structure(TWO, PAIR),
    # With steps of one, which they have by default, these two are chaotic, and the loop itself loses half of its digits.
    Row("torchrecurrent", "AntisymmetricRNNCell", made("AntisymmetricRNNCell", epsilon=0.1), (X,), (H,), "dense"),
    Row("torchrecurrent", "GatedAntisymmetricRNNCell", made("GatedAntisymmetricRNNCell", epsilon=0.1), (X,), (H,), "dense"),
    Row("torchrecurrent", "IntersectionRNNCell", made("IntersectionRNNCell", 8), (H,), (H,), "dense"),
    Row("torchrecurrent", "TGRUCell", made("TGRUCell"), (X,), (H, X), "triangular"),
    Row("torchrecurrent", "TLSTMCell", made("TLSTMCell"), (X,), (H, X), "triangular"),
    Row("torchrecurrent", "tauGRUCell, a delay of one", made("tauGRUCell"), (X,), PAIR, "dense", delayed),
    Row("torchrecurrent", "RHNCell", made("RHNCell"), (X,), (H,),
        missing="its module imports a name that the package does not have, and its constructor calls others"),
)  # fmt: skip

# -- ncps ------------------------------------------------------------------------------------------------------------

TIMED = (X, (1,))  # the second input is the time since the step before


def later(x: Tensor, elapsed: Tensor) -> Any:
    return x, elapsed.abs()


def second(m: Any, x: Tensor, h: Tensor) -> Any:
    return m(x, h, 1.0)


def liquid(wiring: Any, **options: Any) -> Any:
    wiring.build(5)
    return ncps.LTCCell(wiring, 5, **options)


NCPS = (
    Ncps("CfCCell", lambda: ncps.CfCCell(5, 8, backbone_units=16), TIMED, (H,), "dense", given=later),
    Ncps("CfCCell, pure", lambda: ncps.CfCCell(5, 8, mode="pure", backbone_units=16), TIMED, (H,), "dense", given=later),
    Ncps("CfCCell, no gate, two layers, dropout", lambda: ncps.CfCCell(
        5, 8, mode="no_gate", backbone_activation="silu", backbone_units=16, backbone_layers=2, backbone_dropout=0.1
    ), TIMED, (H,), "dense", given=later),
    Ncps("CfCCell, even steps", lambda: ncps.CfCCell(5, 8, backbone_units=16), (X,), (H,), "dense", second),
    Ncps("WiredCfCCell", lambda: ncps.WiredCfCCell(5, wirings.AutoNCP(12, 4)), TIMED, ((12,),), "triangular", given=later),
    Ncps("LTCCell", lambda: liquid(wirings.AutoNCP(12, 4)), (X,), ((12,),), "triangular"),
    Ncps("LTCCell, softplus, fully connected", lambda: liquid(
        wirings.FullyConnected(8, 4), implicit_param_constraints=True
    ), TIMED, (H,), "dense", given=later),
    Ncps("LSTMCell", lambda: Lazy("ncps.torch.lstm").LSTMCell(5, 8), (X,), PAIR, "dense"),
)  # fmt: skip

ROWS = (*TORCH, *TORCHRECURRENT, *NCPS)
