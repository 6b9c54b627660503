"""dropout="off" reaches attention, recurrent layers and any module that reads self.training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fbopt.analysis import Hessian, Objective, gradient_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """As the models of transformers: dropout is an argument of the functional, by self.training."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, x):
        p = 0.3 if self.training else 0.0
        return F.scaled_dot_product_attention(self.query(x), x, x, dropout_p=p)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def layer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)


class Encoder(nn.TransformerEncoder):
    """Padded: the fast path of eval mode without gradients returns zeros there."""

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        return super().forward(x, src_key_padding_mask=padding)


PARTS = {
    "functional": Attention,
    "multihead": lambda: SelfAttention(8, 2, dropout=0.3, batch_first=True),
    "layer": layer,
    "encoder": lambda: Encoder(layer(), 2),
    "recurrent": lambda: Recurrent(8, 8, 2, dropout=0.4, batch_first=True),
    "rrelu": nn.RReLU,
}


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.part(x).mean(1))


def build(name):
    torch.manual_seed(0)
    model = Model(PARTS[name]()).double()
    return model, [(torch.randn(6, 5, 8, dtype=torch.float64), torch.randint(3, (6,)))]


def without_dropout(model):
    """The loss with gradients on, dropout set to zero by hand, all in train mode but RReLU."""
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.RReLU, Attention)):
            module.eval()


@pytest.mark.parametrize("name", PARTS)
def test_dropout_is_off_everywhere(name):
    model, chunks = build(name)
    objective = Objective(model, F.cross_entropy, chunks)
    modes = [m.training for m in model.modules()]
    found = gradient_statistics(objective).loss, objective.loss()
    assert [m.training for m in model.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled()
    vector = torch.ones(objective.size, dtype=torch.float64)
    exact, central = (Hessian(objective, method)(vector) for method in ("exact", "central"))
    torch.testing.assert_close(exact, central, rtol=1e-4, atol=1e-6)
    without_dropout(model)
    expected = float(F.cross_entropy(model(chunks[0][0]), chunks[0][1]).detach())
    assert found == (pytest.approx(expected, rel=1e-12), pytest.approx(expected, rel=1e-12))


class OwnNorm(nn.Module):
    """A normalisation layer that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.full((8,), 5.0, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.running_mean = x.mean((0, 1)).detach()
            return (x - x.mean((0, 1))) * self.scale
        return (x - self.running_mean) * self.scale


@pytest.mark.parametrize("kind", [OwnNorm, lambda: nn.InstanceNorm1d(5, track_running_stats=True)])
def test_batchnorm_chunk_reaches_every_normalisation_layer(kind):
    torch.manual_seed(0)
    model = Model(kind()).double()
    chunks = [(torch.randn(6, 5, 8, dtype=torch.float64), torch.randint(3, (6,)))]
    losses = [
        Objective(model, F.cross_entropy, chunks, batchnorm=b).loss() for b in ("chunk", "frozen")
    ]
    expected = []
    for training in (False, True):
        model.train(training)
        expected.append(float(F.cross_entropy(model(chunks[0][0]), chunks[0][1]).detach()))
    assert losses == expected[::-1] and not math.isclose(*losses)


def test_dropout_whether_or_not_in_eval_mode_is_named():
    class Always(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x.mean(1)))

    chunks = [(torch.randn(6, 5, 8), torch.randint(3, (6,)))]
    with pytest.raises(RuntimeError, match=r"model\.eval\(\).*dropout='seeded'"):
        gradient_statistics(Objective(Always(8, 3), F.cross_entropy, chunks))
