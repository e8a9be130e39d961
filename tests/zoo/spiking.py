"""Spiking cells, whose gradients are surrogates: snntorch, norse, spikingjelly."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .rows import H, Lazy, Row, X

snntorch, surrogate = Lazy("snntorch"), Lazy("snntorch.surrogate")
norse, izhikevich = Lazy("norse.torch"), Lazy("norse.torch.functional.izhikevich")
jelly_rnn, jelly = Lazy("spikingjelly.activation_based.rnn"), Lazy("spikingjelly.activation_based.neuron")
Snn, Norse, Jelly = partial(Row, "snntorch"), partial(Row, "norse"), partial(Row, "spikingjelly")
IMAGE = (2, 4, 4)


def loud(x: Tensor) -> Tensor:
    """So that there are spikes."""
    return 10 * x


def on_itself(*names: str) -> Any:
    """The state of a cell that keeps it on itself: {attribute: tensor}."""
    return lambda *tensors: dict(zip(names, tensors, strict=True))


# -- snntorch --------------------------------------------------------------------------------------------------------

SNNTORCH = (
    Snn("Leaky", lambda: snntorch.Leaky(beta=0.9), (H,), (H,), "diagonal"),
    Snn("Leaky, reset to zero, learned", lambda: snntorch.Leaky(
        beta=0.9, learn_beta=True, learn_threshold=True, reset_mechanism="zero"
    ), (H,), (H,), "diagonal"),
    Snn("Leaky, no reset", lambda: snntorch.Leaky(
        beta=0.9, reset_mechanism="none", spike_grad=surrogate.fast_sigmoid()
    ), (H,), (H,), "diagonal"),
    Snn("Leaky, hidden state", lambda: snntorch.Leaky(beta=0.9, init_hidden=True), (H,), (H,), "diagonal", pack=on_itself("mem")),
    Snn("Lapicque", lambda: snntorch.Lapicque(beta=0.9), (H,), (H,), "diagonal", given=loud),
    Snn("DeltaLeaky", lambda: Lazy("snntorch._neurons.deltaleaky").DeltaLeaky(beta=0.9), (H,), (H, H), "8 triangular blocks of 2"),
    Snn("Synaptic", lambda: snntorch.Synaptic(alpha=0.8, beta=0.9), (H,), (H, H), "8 triangular blocks of 2"),
    Snn("Alpha", lambda: snntorch.Alpha(alpha=0.9, beta=0.8), (H,), (H, H, H), "8 blocks of 3"),
    Snn("RLeaky", lambda: snntorch.RLeaky(beta=0.9, linear_features=8), (H,), (H, H), "dense"),
    Snn("RSynaptic", lambda: snntorch.RSynaptic(alpha=0.8, beta=0.9, linear_features=8), (H,), (H, H, H), "dense"),
    Snn("SLSTM", lambda: snntorch.SLSTM(8, 8, threshold=0.1), (H,), (H, H), "dense"),
    # As its state is not as wide as its input, it takes zeros for it at every step.
    Snn("SLSTM, of another width", lambda: snntorch.SLSTM(5, 8, threshold=0.1), (X,), (H, H), "none"),
    Snn("SConv2dLSTM", lambda: snntorch.SConv2dLSTM(2, 2, 3, threshold=0.1), (IMAGE,), (IMAGE, IMAGE), "dense"),
)  # fmt: skip

# -- norse -----------------------------------------------------------------------------------------------------------


def norse_state(name: str) -> Any:
    return lambda *tensors: getattr(norse, name)(*tensors)


def refractory(z: Tensor, v: Tensor, i: Tensor, rho: Tensor) -> Any:
    return norse.LIFRefracState(norse.LIFState(z, v, i), rho)


def feedforward(name: str, state: str, count: int, structure: str) -> Row:
    return Norse(name, lambda: getattr(norse, name)(), (H,), (H,) * count, structure, pack=norse_state(state), given=loud)


def with_weights(name: str, state: str, count: int, structure: str, module: Any = norse) -> Row:
    return Norse(name, lambda: getattr(module, name)(5, 8), (X,), (H,) * count, structure, pack=norse_state(state), given=loud)


NORSE = (
    feedforward("LIFCell", "LIFFeedForwardState", 2, "8 triangular blocks of 2"),
    feedforward("LICell", "LIState", 2, "8 triangular blocks of 2"),
    feedforward("LSNNCell", "LSNNFeedForwardState", 3, "8 triangular blocks of 3"),
    feedforward("LIFExCell", "LIFExFeedForwardState", 2, "8 triangular blocks of 2"),
    feedforward("LIFAdExCell", "LIFAdExFeedForwardState", 3, "8 triangular blocks of 3"),
    feedforward("IAFCell", "IAFFeedForwardState", 1, "diagonal"),
    feedforward("LIFBoxCell", "LIFBoxFeedForwardState", 1, "diagonal"),
    feedforward("LIBoxCell", "LIBoxState", 1, "diagonal"),
    Norse("IzhikevichCell", lambda: norse.IzhikevichCell(izhikevich.tonic_spiking), (H,), (H, H), "8 blocks of 2",
          pack=norse_state("IzhikevichState"), given=loud),
    with_weights("LIFRecurrentCell", "LIFState", 3, "dense"),
    with_weights("LSNNRecurrentCell", "LSNNState", 4, "dense"),
    with_weights("CobaLIFCell", "CobaLIFState", 4, "dense", Lazy("norse.torch.module.coba_lif")),
    with_weights("LILinearCell", "LIState", 2, "8 triangular blocks of 2", Lazy("norse.torch.module.leaky_integrator")),
    Norse("LIFRefracRecurrentCell", lambda: norse.LIFRefracRecurrentCell(5, 8), (X,), (H, H, H, H), "dense", pack=refractory, given=loud),
)  # fmt: skip

# -- spikingjelly: neurons keep their state on themselves ---------------------------------------------------------------

SPIKINGJELLY = (
    Jelly("SpikingLSTMCell", lambda: jelly_rnn.SpikingLSTMCell(5, 8), (X,), (H, H), "dense"),
    Jelly("SpikingGRUCell", lambda: jelly_rnn.SpikingGRUCell(5, 8), (X,), (H,), "dense"),
    Jelly("SpikingVanillaRNNCell", lambda: jelly_rnn.SpikingVanillaRNNCell(5, 8), (X,), (H,), "dense"),
    Jelly("IFNode", lambda: jelly.IFNode(), (H,), (H,), "diagonal", pack=on_itself("v")),
    Jelly("LIFNode", lambda: jelly.LIFNode(tau=2.0), (H,), (H,), "diagonal", pack=on_itself("v")),
    Jelly("LIFNode, soft and detached reset", lambda: jelly.LIFNode(
        tau=2.0, v_reset=None, detach_reset=True
    ), (H,), (H,), "diagonal", pack=on_itself("v")),
    Jelly("ParametricLIFNode", lambda: jelly.ParametricLIFNode(), (H,), (H,), "diagonal", pack=on_itself("v")),
    Jelly("QIFNode", lambda: jelly.QIFNode(), (H,), (H,), "diagonal", pack=on_itself("v")),
    Jelly("EIFNode", lambda: jelly.EIFNode(), (H,), (H,), "diagonal", pack=on_itself("v")),
    Jelly("IzhikevichNode", lambda: jelly.IzhikevichNode(), (H,), (H, H), "8 blocks of 2", pack=on_itself("v", "w")),
)  # fmt: skip

ROWS = (*SNNTORCH, *NORSE, *SPIKINGJELLY)
