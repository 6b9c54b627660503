"""The networks of the training program: layers, initial values and numbers of parameters."""

from __future__ import annotations

import copy
import hashlib
import sys

import pytest
import torch
from torch import nn

from fbopt.train import models
from fbopt.train.models.nfnet import NFBlock
from fbopt.train.models.norms import GhostBatchNorm2d, Scale


def test_cnn_is_the_mnist1d_baseline():
    model = models.build("cnn", (1, 40), 10)
    assert models.count_parameters(model) == 5210
    assert [type(m) for m in model].count(nn.Conv1d) == 3
    assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    assert model(torch.zeros(2, 1, 40)).shape == (2, 10)


@pytest.mark.parametrize("shape", [(1, 40), (1, 8, 8), (7,)])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_mlp_is_its_equation(shape, activation):
    torch.manual_seed(0)
    model = models.build("mlp", shape, 4, width=5, depth=3, activation=activation).double()
    x = torch.randn(6, *shape, dtype=torch.float64)
    h, layers = x.flatten(1), [m for m in model if isinstance(m, nn.Linear)]
    for layer in layers[:-1]:
        h = getattr(torch.nn.functional, activation)(h @ layer.weight.T + layer.bias)
    torch.testing.assert_close(model(x), h @ layers[-1].weight.T + layers[-1].bias)
    assert [layer.out_features for layer in layers] == [5, 5, 5, 4]
    assert models.count_parameters(models.build("mlp", (1, 8, 8), 10, width=32)) == 3466


def test_mlp_drops_inputs_of_the_last_layer():
    model = models.build("mlp", (1, 4), 2, dropout=0.5)
    assert isinstance(model[-2], nn.Dropout) and model[-2].p == 0.5


@pytest.mark.parametrize("shape", [(1, 3), (2, 41), (1, 8, 8), (3, 32, 32), (1, 5, 9)])
def test_cnn_takes_signals_and_images(shape):
    assert models.build("cnn", shape, 4, width=3)(torch.zeros(2, *shape)).shape == (2, 4)


def test_resnet18_is_the_papers():
    model = models.build("resnet18", (3, 32, 32), 10)
    assert models.count_parameters(model) == 11_173_962
    assert len(list(model.parameters())) == 62
    assert model.stem.kernel_size == (3, 3) and model.stem.stride == (1, 1)
    shortcut = model.stage2[0].downsample
    assert [type(m) for m in shortcut] == [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]
    assert shortcut[1].kernel_size == (1, 1) and shortcut[1].stride == (1, 1)
    assert model.stage1[0].downsample is None
    for stage in (model.stage1, model.stage2, model.stage3, model.stage4):
        for block in stage:
            assert not block.bn2.weight.any() and (block.bn1.weight == 1).all()
    fan_out = 9 * 512
    deviation = model.stage4[1].conv2.weight.std().item()
    assert deviation == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)


@pytest.mark.parametrize("side", [8, 28, 32, 33])
def test_resnet18_takes_any_side(side):
    model = models.build("resnet18", (1, side, side), 5, width=4)
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "shape", "names"),
    [("cnn", (1, 40), "77ba59402e8781e6"), ("resnet18", (3, 32, 32), "499f930d4a9743d0")],
)
def test_published_results_began_like_this(name, shape, names):
    """The README's results: no network added may change names, shapes or initial values."""
    torch.manual_seed(3)
    model = models.build(name, shape, 10, width=8)
    shapes = "".join(f"{key} {tuple(t.shape)}\n" for key, t in model.state_dict().items())
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == names
    again = copy.deepcopy(model)
    torch.manual_seed(3)
    layers = [m for m in again.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.reset_parameters()
    for layer in layers[:-1] if name == "resnet18" else []:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def convolution(inner: int, outer: int, side: int = 3) -> int:
    """Weights of a convolution without bias and its BatchNorm's scales and shifts."""
    return side * side * inner * outer + 2 * outer


def imagenet(published: int, features: int, classes: int, width: int = 64) -> int:
    """ImageNet's count with a 3×3 stem for 7×7 and a head for `classes`."""
    stem = (9 - 49) * 3 * width
    return published + stem + (features + 1) * (classes - 1000)


def pyramid(depth: int, widening: int, classes: int) -> int:
    """Han et al., equation 2 (rounded), BatchNorm before each convolution and at both ends."""
    sizes = (3, 3) if depth == 110 else (1, 3, 1)
    blocks = (depth - 2) // len(sizes)
    inner, count = 16, 27 * 16 + 2 * 16
    for k in range(1, blocks + 1):
        planes = round(16 + widening * k / blocks)
        outers = [planes, planes] if depth == 110 else [planes, planes, 4 * planes]
        for size, outer in zip(sizes, outers, strict=True):
            count += size**2 * inner * outer + 2 * inner
            inner = outer
        count += 2 * inner
    return count + 2 * inner + (inner + 1) * classes


def nfnet(classes: int) -> int:
    """NFNet-F0 of its published 71.49 million (at ImageNet), with another stem and head."""
    with torch.device("meta"):
        published = models.build("nfnet-f0", (3, 224, 224), 1000, stem="imagenet")
    stem = [9 * inner * outer + 2 * outer for inner, outer in ((3, 16), (16, 32), (32, 64))]
    last = 9 * 64 * 128 - 9 * 3 * 128
    return models.count_parameters(published) - sum(stem) - last + 3073 * (classes - 1000)


def he(depth: int, classes: int) -> int:
    """He et al., section 4.2: 2n convolutions for each of three sizes, and nothing in shortcuts."""
    n = (depth - 2) // 6
    count = convolution(3, 16) + 65 * classes
    for inner, outer in ((16, 16), (16, 32), (32, 64)):
        count += convolution(inner, outer) + (2 * n - 1) * convolution(outer, outer)
    return count


def vgg(published: int, classes: int) -> int:
    """ImageNet's count (with BatchNorm) with one linear layer for three."""
    three = (512 * 49 + 1) * 4096 + 4097 * 4096 + 4097 * 1000
    return published - three + 513 * classes


# From torchvision's documented counts for ImageNet, with another stem and head.
COUNTS = {
    "resnet18": lambda classes: imagenet(11_689_512, 512, classes),
    "resnet34": lambda classes: imagenet(21_797_672, 512, classes),
    "resnet50": lambda classes: imagenet(25_557_032, 2048, classes),
    "resnet101": lambda classes: imagenet(44_549_160, 2048, classes),
    "resnet152": lambda classes: imagenet(60_192_808, 2048, classes),
    "resnet20": lambda classes: he(20, classes),
    "resnet32": lambda classes: he(32, classes),
    "resnet56": lambda classes: he(56, classes),
    "resnet110": lambda classes: he(110, classes),
    "vgg11": lambda classes: vgg(132_868_840, classes),
    "vgg13": lambda classes: vgg(133_053_736, classes),
    "vgg16": lambda classes: vgg(138_365_992, classes),
    "vgg19": lambda classes: vgg(143_678_248, classes),
    "densenet121": lambda classes: imagenet(7_978_856, 1024, classes),
    "densenet161": lambda classes: imagenet(28_681_000, 2208, classes, 96),
    "densenet169": lambda classes: imagenet(14_149_480, 1664, classes),
    "densenet201": lambda classes: imagenet(20_013_928, 1920, classes),
    "pyramidnet110": lambda classes: pyramid(110, 84, classes),
    "pyramidnet272": lambda classes: pyramid(272, 200, classes),
    "nfnet-f0": lambda classes: nfnet(classes),
}
NEEDS_TORCHVISION = (
    "resnet50", "resnet101", "resnet152", "densenet121", "densenet161", "densenet169", "densenet201"
)  # fmt: skip


def build(name: str, *arguments, **more) -> nn.Module:
    if name in NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")
    return models.build(name, *arguments, **more)


def test_every_network_is_counted():
    assert set(COUNTS) == set(models.NAMES) - {"cnn", "mlp"}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_parameters(name, classes):
    with torch.device("meta"):
        model = build(name, (3, 32, 32), classes)
    assert models.count_parameters(model) == COUNTS[name](classes)


@pytest.mark.parametrize(
    ("name", "millions"), [("20", 0.27), ("32", 0.46), ("56", 0.85), ("110", 1.7)]
)
def test_he_et_al_table_6(name, millions):
    assert COUNTS[f"resnet{name}"](10) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_pass_at_reduced_width(name):
    """Finite logits, and a non-zero gradient for every parameter that affects them."""
    torch.manual_seed(0)
    model = build(name, (1, 32, 32), 5, width=4, dropout=0.1).train()
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.1]
    for block in model.modules():  # starts as the identity: let the gradient through
        if block.__class__.__name__ in ("BasicBlock", "Bottleneck"):
            nn.init.ones_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)
        elif isinstance(block, Scale):
            nn.init.ones_(block.weight)
    output = model(torch.randn(3, 1, 32, 32))
    assert output.shape == (3, 5) and output.isfinite().all()
    nn.functional.cross_entropy(output, torch.tensor([0, 1, 4])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        bias_before_norm = name.startswith("vgg") and parameter_name.endswith(".bias")
        assert parameter.grad.any() or bias_before_norm, parameter_name


@pytest.mark.parametrize(
    ("depth", "widening", "published", "tolerance"),
    [(110, 48, 1.7, 0.05), (110, 84, 3.8, 0.03), (110, 270, 28.3, 0.01), (272, 200, 26.0, 0.01)],
)
def test_han_et_al_table_4(depth, widening, published, tolerance):
    """The authors' code, whose counts these are, has a little more than their table says."""
    with torch.device("meta"):
        model = models.build(f"pyramidnet{depth}", (3, 32, 32), 10, widening=widening)
    count = models.count_parameters(model)
    assert count == pyramid(depth, widening, 10)
    assert count / 1e6 == pytest.approx(published, rel=tolerance)


def test_nfnet_is_the_published():
    """Brock et al., table 3: 71.5 million; in detail the equations of their section 2."""
    with torch.device("meta"):
        model = models.build("nfnet-f0", (3, 224, 224), 1000, stem="imagenet")
    assert models.count_parameters(model) == pytest.approx(71.5e6, rel=5e-4)
    torch.manual_seed(0)
    model = models.build("nfnet-f0", (3, 8, 8), 10, width=8)
    blocks = [m for m in model.modules() if isinstance(m, NFBlock)]
    assert len(blocks) == 12 and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    variances = [block.beta**-2 for block in blocks]
    stages = [[1.0], [1.04, 1.04], [1.08, 1.04, 1.08, 1.12, 1.16, 1.2], [1.24, 1.04, 1.08]]
    assert variances == pytest.approx([v for stage in stages for v in stage])
    layer = blocks[1].convolutions[0]
    x, weight = torch.randn(2, 16, 5, 5), layer.weight
    mean, var = weight.mean((1, 2, 3)), weight.var((1, 2, 3), correction=0)
    nn.init.uniform_(layer.gain), nn.init.uniform_(layer.bias)
    standard = (weight - mean.view(-1, 1, 1, 1)) / (16 * var).sqrt().view(-1, 1, 1, 1)
    expected = nn.functional.conv2d(x, layer.gain * standard, layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "densenet161"])
def test_the_stem_of_imagenet_makes_the_published_network(name):
    networks = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.build(name, (3, 224, 224), 1000, stem="imagenet")
        published = getattr(networks, name)()
    shapes = [[p.shape for p in m.parameters()] for m in (model, published)]
    assert sorted(shapes[0]) == sorted(shapes[1])
    x = torch.zeros(1, 3, 224, 224, device="meta")
    for network in (model, published):
        for module in network.modules():
            if isinstance(module, nn.AdaptiveAvgPool2d):
                module.register_forward_hook(lambda m, i, o: sides.append(i[0].shape))
    sides: list[torch.Size] = []
    assert model(x).shape == published(x).shape
    assert sides and all(shape[2:] == (7, 7) for shape in sides)


def test_pyramids_widen_with_zeros():
    model = models.build("pyramidnet110", (3, 32, 32), 10, width=4)
    block = model.stage2[0]
    x = torch.randn(2, block.residual[0].num_features, 7, 7)
    shortcut = block.shortcut(x)
    halved = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    assert torch.equal(shortcut[:, : x.shape[1]], halved) and not shortcut[:, x.shape[1] :].any()
    assert block(x).shape == shortcut.shape == (2, block.residual[-1].num_features, 4, 4)


@pytest.mark.parametrize("name", [n for n in models.NAMES if n.startswith("resnet")])
def test_no_shortcut_where_shapes_agree(name):
    model = build(name, (3, 32, 32), 10, width=4)
    he_et_al = name in ("resnet20", "resnet32", "resnet56", "resnet110")
    blocks = [b for key, stage in model.named_children() if key.startswith("stage") for b in stage]
    for index, block in enumerate(blocks):
        inner, outer = block.conv1.in_channels, (block.conv3 if hasattr(block, "conv3")
                                                 else block.conv2).out_channels  # fmt: skip
        assert (block.downsample is None) == (inner == outer), index
        if he_et_al and block.downsample is not None:
            assert not list(block.downsample.parameters())
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        assert bool(last.weight.any()) == he_et_al, index
    per_block = 3 if hasattr(blocks[0], "conv3") else 2
    assert len(blocks) * per_block + 2 == int(name.removeprefix("resnet"))


def test_option_a_shortcut():
    block = models.build("resnet20", (3, 32, 32), 10, width=2).stage2[0]
    x = torch.randn(2, 2, 5, 5)
    shortcut = block.downsample(x)
    assert torch.equal(shortcut[:, :2], x[:, :, ::2, ::2]) and not shortcut[:, 2:].any()
    assert block(x).shape == shortcut.shape == (2, 4, 3, 3)


def test_bottleneck_is_the_papers():
    pytest.importorskip("torchvision")
    model = models.build("resnet50", (3, 32, 32), 10, width=4)
    first, later = model.stage1[0].downsample, model.stage2[0].downsample
    assert [type(m) for m in first] == [nn.Conv2d, nn.BatchNorm2d]
    assert [type(m) for m in later] == [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]
    assert model.stage2[0].conv2.stride == (2, 2) and model.stage2[0].conv1.stride == (1, 1)


@pytest.mark.parametrize(("name", "stage"), [("vgg11", 5), ("densenet121", 0)])
def test_stems_keep_the_image(name, stage):
    """Sides are halved by the named pools alone: 32 → 1 in VGG, 32 → 4 in DenseNet."""
    sides = []
    model = build(name, (3, 32, 32), 10, width=4)
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            module.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert sides == ([16, 8, 4, 2, 1] if stage else [16, 8, 4])


BAD_SHAPES = [
    ("resnet18", (1, 40), None, "--model resnet18 takes images.*use --model cnn"),
    ("vgg16", (3, 40), None, "--model vgg16 takes images"),
    ("cnn", (1, 2), None, "--model cnn takes signals or images of at least 3"),
    ("vgg16", (3, 28, 32), None, "at least 32 pixels a side, not of 28×32"),
    ("densenet121", (3, 7, 7), None, "at least 8 pixels"),
    ("densenet121", (3, 8, 8), 1, "--width 1: densenet121 grows by half of it"),
]


@pytest.mark.parametrize(("name", "shape", "width", "message"), BAD_SHAPES)
def test_networks_refuse_shapes(name, shape, width, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, shape, 10, width)


@pytest.mark.parametrize("name", NEEDS_TORCHVISION)
def test_torchvision_is_asked_for(name, monkeypatch):
    module = name.rstrip("0123456789")
    monkeypatch.setitem(sys.modules, f"torchvision.models.{module}", None)
    with pytest.raises(ValueError, match=f"--model {name} needs the package torchvision: pip"):
        models.build(name, (3, 32, 32), 10, width=4)


# --- normalisation and shortcuts of the ResNets ---------------------------------------------------

NORMS = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "ghost": GhostBatchNorm2d}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_norms_have_the_same_names(name, norm):
    """Parameters of the same names and shapes, all norms of the kind, block ends at 0 alike."""
    plain = build(name, (3, 32, 32), 10, width=4)
    model = build(name, (3, 32, 32), 10, width=4, norm=norm)
    shapes = [{k: p.shape for k, p in m.named_parameters()} for m in (plain, model)]
    assert shapes[0] == shapes[1]
    kinds = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == {NORMS[norm]}
    last = "bn3" if name == "resnet50" else "bn2"
    assert bool(getattr(model.stage1[0], last).weight.any()) == (name == "resnet20")


def test_groups_are_wu_and_hes():
    model = models.build("resnet18", (3, 32, 32), 10, norm="group")
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {32}
    narrow = models.build("resnet18", (3, 32, 32), 10, width=12, norm="group")
    assert narrow.norm.num_groups == 4


@pytest.mark.parametrize(("samples", "parts"), [(12, [4, 4, 4]), (14, [5, 5, 4]), (7, [7])])
def test_ghost_batchnorm(samples, parts):
    """Each sub-batch as BatchNorm takes it; running statistics are the weighted mean of theirs."""
    torch.manual_seed(0)
    ghost = GhostBatchNorm2d(4, 3).double()
    nn.init.uniform_(ghost.weight), nn.init.uniform_(ghost.bias)
    x = torch.randn(samples, 3, 5, 5, dtype=torch.float64)
    plain = [copy.deepcopy(nn.BatchNorm2d(3).double()) for _ in parts]
    for norm in plain:
        norm.load_state_dict(ghost.state_dict())
    expected = torch.cat([n(part) for n, part in zip(plain, x.split(parts), strict=True)])
    torch.testing.assert_close(ghost(x), expected)
    for name in ("running_mean", "running_var"):
        mean = sum(getattr(n, name) * len_ for n, len_ in zip(plain, parts, strict=True)) / samples
        torch.testing.assert_close(getattr(ghost, name), mean)
    assert int(ghost.num_batches_tracked) == 1
    evaluated = nn.BatchNorm2d(3).double().eval()
    evaluated.load_state_dict(ghost.state_dict())
    assert torch.equal(ghost.eval()(x), evaluated(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_skipinit_begins_as_its_shortcuts(name):
    torch.manual_seed(0)
    model = build(name, (3, 16, 16), 10, width=4, norm="skipinit")
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    blocks = [b for key, stage in model.named_children() if key.startswith("stage") for b in stage]
    scales = [m for m in model.modules() if isinstance(m, Scale)]
    assert len(scales) == len(blocks) and not any(s.weight.any() for s in scales)
    x = model.stem(torch.randn(2, 3, 16, 16)).relu()
    for block in blocks:
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), shortcut.relu())
        x = shortcut.relu()
    nn.init.constant_(blocks[-1].bn3.weight if name == "resnet50" else blocks[-1].bn2.weight, 0.5)
    assert not torch.equal(blocks[-1](x), x)


@pytest.mark.parametrize("kind", ["A", "B", "C", "pool"])
@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_shortcuts(name, kind):
    """Which blocks have one, of which layers, and that odd sides fit."""
    model = build(name, (3, 9, 9), 10, width=4, shortcut=kind)
    blocks = [b for key, stage in model.named_children() if key.startswith("stage") for b in stage]
    kinds = {
        "A": [nn.AvgPool2d, nn.ConstantPad3d],
        "B": [nn.Conv2d, nn.BatchNorm2d],
        "C": [nn.Conv2d, nn.BatchNorm2d],
        "pool": [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d],
    }
    for block in blocks:
        last = block.conv3 if hasattr(block, "conv3") else block.conv2
        stride = max(block.conv1.stride[0], block.conv2.stride[0])
        changes = stride > 1 or block.conv1.in_channels != last.out_channels
        assert (block.downsample is not None) == (changes or kind == "C")
        if block.downsample is not None:
            expected = kinds[kind][(kind == "pool" and stride == 1) :]
            assert [type(m) for m in block.downsample] == expected
            strides = [m.stride for m in block.downsample if hasattr(m, "stride")]
            assert stride == 1 or any(s in (2, (2, 2)) for s in strides)
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, 10)


def test_old_networks_are_the_default():
    for name, shortcut in (("resnet18", "pool"), ("resnet20", "A")):
        states = []
        for changes in ({}, {"norm": "batch", "shortcut": shortcut}):
            torch.manual_seed(0)
            states.append(models.build(name, (3, 32, 32), 10, width=4, **changes).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
