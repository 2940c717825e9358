"""Models that are awkward to capture, with batch and loss: one list for the whole suite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebear.tasks import losses

B = 5


@dataclass(frozen=True)
class Case:
    """A model and what is asked of it.

    `fallback` are the parameters that no rule can see in it.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor] = losses.cross_entropy
    fallback: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """The model in evaluation mode and float64, the same each time."""
        torch.manual_seed(1)
        model = self.build()
        for p in model.parameters():  # zeros and ones of the initialisation would hide mistakes
            if p.ndim == 1:
                nn.init.normal_(p, 0.5, 0.3)
        return model.double().eval()

    def data(self) -> Any:
        """A batch of `B` examples, the same each time."""
        torch.manual_seed(2)
        return self.batch()

    def __str__(self) -> str:
        return self.name


class Net(nn.Module):
    """Modules by name and a forward that uses them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def vectors(features: int = 6, classes: int = 3) -> Callable[[], Any]:
    return lambda: (torch.randn(B, features).double(), torch.randint(0, classes, (B,)))


def sequences(length: int = 7, features: int = 6, classes: int = 3) -> Callable[[], Any]:
    return lambda: (torch.randn(B, length, features).double(), torch.randint(0, classes, (B,)))


def images(channels: int = 2, size: int = 8, classes: int = 3) -> Callable[[], Any]:
    return lambda: (
        torch.randn(B, channels, size, size).double(),
        torch.randint(0, classes, (B,)),
    )


def tokens(length: int = 6, words: int = 11, classes: int = 3) -> Callable[[], Any]:
    return lambda: (torch.randint(0, words, (B, length)), torch.randint(0, classes, (B,)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def in_place_relu() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 3),
    )


def frozen(*names: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return build


def called_twice() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x).tanh())
        return self.head(self.norm(self.layer(x).tanh()))

    return Net(forward, layer=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 3))


def tied_linears(bias: bool, share_bias: bool = False) -> Callable[[], nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()).tanh())

    def build() -> nn.Module:
        one, two = nn.Linear(6, 6, bias=bias), nn.Linear(6, 6, bias=bias)
        two.weight = one.weight
        if share_bias:
            two.bias = one.bias
        return Net(forward, one=one, two=two, head=nn.Linear(6, 3))

    return build


def tied_norms() -> nn.Module:
    one, two = nn.LayerNorm(6), nn.LayerNorm(6)
    two.weight = one.weight
    return nn.Sequential(one, nn.Linear(6, 6), two, nn.Linear(6, 3))


def tied_embedding() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.mix(self.words(x)).tanh()).mean(1)

    words, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = words.weight
    return Net(forward, words=words, mix=nn.Linear(6, 6), head=head)


def tied_transposed() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.linear(self.code(x).tanh(), self.code.weight.T))

    return Net(forward, code=nn.Linear(6, 4), head=nn.Linear(6, 3))


def two_names() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())

    layer = nn.Linear(6, 6)
    return Net(forward, first=layer, second=layer, head=nn.Linear(6, 3))


def in_place_residual() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.one(x)
        out = self.two(h.tanh())
        out += h
        out *= 2
        return self.head(self.norm(out))

    return Net(
        forward,
        one=nn.Linear(6, 8),
        two=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )


def shared_positions(flat: bool) -> Callable[[], nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        where = self.places(ids if flat else ids[None])
        return self.head((self.words(x) + self.scale(where)).tanh().mean(1))

    return lambda: Net(
        forward,
        words=nn.Embedding(11, 6),
        places=nn.Embedding(9, 6),
        scale=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )


def functional_use() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.linear(x, self.hidden.weight, self.hidden.bias).tanh()
        return self.head(h) + F.linear(h, self.head.weight)

    return Net(forward, hidden=nn.Linear(6, 8), head=nn.Linear(8, 3))


class BareParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


def attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(mixed.mean(1))

    return Net(
        forward, attention=nn.MultiheadAttention(6, 2, batch_first=True), head=nn.Linear(6, 3)
    )


def encoder_layer() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.first(x)).mean(1))

    return Net(
        forward,
        first=nn.Linear(6, 6),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False
        ),
        head=nn.Linear(6, 3),
    )


def nested_encoder() -> nn.Module:
    # torch packs this one's padded batch into a nested tensor when nothing requires a gradient.
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    return Net(lambda self, x: x, first=nn.Identity(), encoder=encoder, head=nn.Linear(6, 3))


def masked_padding(model: nn.Module, batch: Any) -> Tensor:
    """A loss over a dict batch whose encoder is told which positions are padding."""
    hidden = model.get_submodule("first")(batch["x"])
    padded = batch["padded"]
    hidden = model.get_submodule("encoder")(hidden, src_key_padding_mask=padded)
    mean = hidden.masked_fill(padded[..., None], 0).sum(1) / (~padded).sum(1, keepdim=True)
    return F.cross_entropy(model.get_submodule("head")(mean), batch["y"], reduction="none")


def padded_sequences() -> Any:
    lengths = torch.tensor([7, 3, 5, 1, 6])
    return {
        "x": torch.randn(B, 7, 6).double(),
        "padded": torch.arange(7) >= lengths[:, None],
        "y": torch.randint(0, 3, (B,)),
    }


def weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 3))


def recurrent(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.first(x))[0][:, -1])

    return lambda: Net(
        forward,
        first=nn.Linear(6, 4),
        recurrent=kind(4, 5, batch_first=True),
        head=nn.Linear(5, 3),
    )


RECURRENT = tuple(f"recurrent.{kind}_{of}_l0" for kind in ("weight", "bias") for of in ("ih", "hh"))


ATTENTION = tuple(
    f"encoder.layers.{i}.self_attn.{name}"
    for i in range(2)
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
)


def without_gradient() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.fixed(x)
        return self.head(self.hidden(x).tanh())

    return Net(forward, fixed=nn.Linear(6, 6), hidden=nn.Linear(6, 6), head=nn.Linear(6, 3))


def never_called() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(x)

    return Net(
        forward, idle=nn.Linear(6, 6), norm=nn.LayerNorm(4), conv=nn.Conv2d(1, 2, 3),
        words=nn.Embedding(5, 2), head=nn.Linear(6, 3),
    )  # fmt: skip


def folded() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        h = self.norm(self.hidden(x.reshape(size * length, -1)).tanh())
        return self.head(h).view(size, length, -1).mean(1)

    return Net(forward, hidden=nn.Linear(6, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 3))


def time_first() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        length, size = x.shape[1], x.shape[0]
        h = self.hidden(x.transpose(0, 1)).tanh()
        return self.head(h.reshape(length * size, -1)).view(length, size, -1).mean(0)

    return Net(forward, hidden=nn.Linear(6, 8), head=nn.Linear(8, 3))


class OddLinear(nn.Linear):
    """Has the name and the shapes of a linear layer, and computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.square(), self.bias)


def subclass() -> nn.Module:
    return nn.Sequential(OddLinear(6, 6), nn.Tanh(), nn.Linear(6, 3))


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over channels of `[b, c, h, w]`, where its parent's rule does not fit."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def channel_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), ChannelNorm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


CASES = [
    Case("mlp", mlp, vectors()),
    Case("only a linear layer", lambda: nn.Linear(6, 3), vectors()),
    Case("sequence mlp", lambda: nn.Sequential(mlp(), nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten()),
         sequences()),
    Case("in-place relu", in_place_relu, vectors()),
    Case("first weight frozen", frozen("0.weight"), vectors()),
    Case("first bias frozen", frozen("0.bias"), vectors()),
    Case("first layer frozen", frozen("0.weight", "0.bias"), vectors()),
    Case("norm weight frozen", frozen("1.weight", "3.bias"), vectors()),
    Case("norm bias frozen", frozen("1.bias", "3.weight"), vectors()),
    Case("called twice", called_twice, vectors()),
    Case("tied without biases", tied_linears(bias=False), vectors()),
    Case("tied with own biases", tied_linears(bias=True), vectors()),
    Case("tied with shared biases", tied_linears(bias=True, share_bias=True), vectors()),
    Case("tied norms", tied_norms, vectors()),
    Case("embedding tied to head", tied_embedding, tokens(classes=11)),
    Case("tied transposed", tied_transposed, vectors(), fallback=("code.weight", "code.bias")),
    Case("two names", two_names, vectors()),
    Case("in-place residual", in_place_residual, vectors()),
    Case("positions [1, t]", shared_positions(flat=False), tokens()),
    Case("positions [t]", shared_positions(flat=True), tokens(),
         fallback=("places.weight", "scale.weight", "scale.bias")),
    Case("positions [t], t = probe", shared_positions(flat=True), tokens(length=4),
         fallback=("places.weight", "scale.weight", "scale.bias")),
    Case("functional use", functional_use, vectors(),
         fallback=("hidden.weight", "hidden.bias", "head.weight", "head.bias")),
    Case("bare parameter", BareParameter, vectors(), fallback=("scale",)),
    Case("attention", attention, sequences(),
         fallback=("attention.in_proj_weight", "attention.in_proj_bias",
                   "attention.out_proj.weight", "attention.out_proj.bias")),
    Case("encoder", encoder_layer, sequences(), fallback=ATTENTION),
    Case("encoder with padding", encoder_layer, padded_sequences, masked_padding, ATTENTION),
    Case("encoder with nested tensors", nested_encoder, padded_sequences, masked_padding,
         ATTENTION),
    Case("weight norm", weight_norm, vectors(), fallback=(
        "0.parametrizations.weight.original0", "0.parametrizations.weight.original1")),
    Case("lstm", recurrent(nn.LSTM), sequences(), fallback=RECURRENT),
    Case("gru", recurrent(nn.GRU), sequences(), fallback=RECURRENT),
    Case("layer under no_grad", without_gradient, vectors()),
    Case("layer never called", never_called, vectors()),
    Case("positions folded into examples", folded, sequences()),
    Case("time first", time_first, sequences(), fallback=(
        "hidden.weight", "hidden.bias", "head.weight", "head.bias")),
    Case("time first, t = probe", time_first, sequences(length=4), fallback=(
        "hidden.weight", "hidden.bias", "head.weight", "head.bias")),
    Case("subclass with another forward", subclass, vectors(), fallback=("0.weight", "0.bias")),
    Case("subclass with other shapes", channel_norm, images(), fallback=("1.weight", "1.bias")),
    Case("convnet", convnet, images()),
]  # fmt: skip
