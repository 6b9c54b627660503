"""Options: what the recipe fills in, what is refused, what a resumed run may change."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from fbopt.train import models
from fbopt.train.__main__ import main
from fbopt.train.config import perturbation, recipes, rules
from fbopt.train.config.as_released import SWITCHES
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.diff import check_resume, differences, resolve_for
from fbopt.train.config.line_search import OF_LBFGS
from fbopt.train.config.options import ModelName, Options, OptionsError, RecipeName
from fbopt.train.config.resolve import resolve
from fbopt.train.data.rng import epoch_order
from fbopt.train.schedules import lr_factor


@pytest.mark.parametrize("data", ["mnist1d", "digits", "cifar10", "imagefolder:x"])
@pytest.mark.parametrize("recipe", recipes.NAMES)
def test_nothing_is_left_open(data, recipe):
    o = resolve(Options(data=data, recipe=recipe))
    open_names = {f.name for f in fields(o) if getattr(o, f.name) is None}
    allowed = {"width", "threads", "timeout", "out", "resume", "max_norm"}
    allowed |= {*perturbation.ALL, *SWITCHES}
    allowed |= {"save_every", "data_dir", "replicas", "chunk_max_norm", "samples", "log"}
    allowed |= {
        "vectorize",
        "agc",
        "clip_history",
        "gamma",
        "milestones",
        "ghost_size",
        "widening",
        "depth",
        "activation",
    }
    allowed |= {"line_search", *OF_LBFGS}
    allowed |= set(rules.OWN) - {"momentum", "nesterov"}
    allowed |= {"padding"} if o.augment == "none" else set()
    allowed |= {"stem", "norm", "shortcut"} if o.model == "cnn" else set()
    others = {"steps", "chunk_size", "accumulation"}
    allowed |= others if o.stochastic else {"epochs", "batch_size"}
    assert open_names <= allowed
    assert Options.from_json(o.as_json()) == o
    assert resolve(o) == o
    assert (o.penalty is None) == (o.radius is None)
    assert (o.method is None) == (o.penalty is None and o.rho is None)


def test_names_agree():
    assert get_args(RecipeName) == recipes.NAMES == tuple(recipes.RECIPES["images"])
    assert get_args(ModelName) == models.NAMES == tuple(models.WIDTHS)


def test_what_is_given_wins():
    o = resolve(Options(lr=0.3, penalty=0, max_norm=math.inf, momentum=0, chunk_size=7))
    assert (o.lr, o.penalty, o.method, o.max_norm) == (0.3, None, None, None)
    assert (o.momentum, o.nesterov, o.chunk_size, o.threads) == (0, False, 7, 1)
    o = resolve(Options(recipe="fb", penalty=0.1))
    assert (o.penalty, o.radius, o.method) == (0.1, 0.01, "forward")
    o = resolve(Options(scale="images", steps=300, cosine=77))
    assert (o.model, o.warmup, o.cosine, o.threads) == ("resnet18", 40, 77, None)


@pytest.mark.parametrize("data", ["mnist1d", "digits"])
def test_small_chunks_of_small_data_go_through_the_small_network_at_once(data):
    for recipe in recipes.NAMES:
        o = resolve(Options(data=data, recipe=recipe))
        assert o.vectorize == (32 if o.chunk_size == 32 else None)
    strong = Options(data=data, recipe="fb-strong")
    assert resolve(replace(strong, vectorize=8)).vectorize == 8
    others = {"vectorize": 1}, {"chunk_size": 33}, {"model": "resnet20"}, {"data": "npz:x.npz"}
    assert all(resolve(replace(strong, **change)).vectorize is None for change in others)


def test_a_run_keeps_how_many_chunks_go_through_the_model_at_once():
    """In older runs they went one by one, and their options do not say so."""
    strong = Options(recipe="fb-strong")
    older = {k: v for k, v in resolve(strong).as_json().items() if k != "vectorize"}
    assert resolve_for(older, strong).vectorize is None
    assert resolve_for(resolve(strong).as_json(), strong).vectorize == 32
    now = resolve_for(older, replace(strong, vectorize=8))
    assert differences(older, now.as_json()) == [("--vectorize", "none", "8")]
    assert not differences(older, resolve_for(older, replace(strong, vectorize=1)).as_json())


def test_a_run_that_does_not_know_an_option_goes_on():
    """None, or the default, is what was done before there was the option."""
    wanted = Options(data="cifar10", augment="random")
    new = {
        "padding",
        "augment_policy",
        "stem",
        "norm",
        "ghost_size",
        "shortcut",
        "widening",
        "depth",
        "activation",
        "timeout",
    }
    new |= {"loss", "max_up", "schedule", "floor", "gamma", "milestones"}
    older = {k: v for k, v in resolve(wanted).as_json().items() if k not in new}
    assert not differences(older, resolve_for(older, wanted).as_json())
    assert Options.from_json(older).shortcut is None
    for change in ({"norm": "group"}, {"shortcut": "B"}, {"schedule": "step"}, {"floor": 0.1}):
        now = resolve_for(older, replace(wanted, **change))
        names = {name.removeprefix("--") for name, *_ in differences(older, now.as_json())}
        assert names & change.keys()


def test_what_follows_from_the_data():
    """Sides, borders, stems and scales by the kind of data."""
    found = {}
    for data in ("digits", "cifar10", "imagefolder:x", "tinyimagenet:x", "imagenet:x"):
        o = resolve(Options(data=data, augment="random", model="resnet18"))
        found[data.partition(":")[0]] = (o.image_size, o.padding, o.stem, o.scale)
        assert resolve(o) == o
    assert found == {
        "digits": (32, 4, "cifar", "small"),
        "cifar10": (32, 4, "cifar", "images"),
        "imagefolder": (32, 4, "cifar", "images"),
        "tinyimagenet": (64, 8, "cifar", "images"),
        "imagenet": (224, None, "imagenet", "images"),
    }


def test_layers_of_networks():
    """Each network has the options of its layers, with its own as defaults."""
    names = ("stem", "norm", "ghost_size", "shortcut", "widening", "depth", "activation")
    found = {}
    for model in ("cnn", "mlp", "resnet18", "resnet20", "vgg11", "densenet161", "pyramidnet110"):
        o = resolve(Options(data="cifar10", model=model))
        found[model] = tuple(getattr(o, name) for name in names)
    assert found == {
        "cnn": (None,) * 7,
        "mlp": (None, None, None, None, None, 2, "relu"),
        "resnet18": ("cifar", "batch", None, "pool", None, None, None),
        "resnet20": (None, "batch", None, "A", None, None, None),
        "vgg11": (None,) * 7,
        "densenet161": ("cifar", None, None, None, None, None, None),
        "pyramidnet110": (None, None, None, None, 84, None, None),
    }
    ghost = resolve(Options(data="cifar10", norm="ghost", shortcut="C", stem="imagenet"))
    assert (ghost.ghost_size, ghost.shortcut, ghost.stem) == (32, "C", "imagenet")
    assert resolve(ghost) == ghost


def test_augmentation():
    assert [resolve(Options(recipe=r)).chunks for r in ("sgd", "fb")] == ["shuffled", "fixed"]
    o = resolve(Options())
    assert (o.augment, o.replicas, o.with_clean, o.decay) == ("none", None, False, "all")
    o = resolve(Options(augment="fixed"))
    assert (o.replicas, o.with_clean) == (10, False) and resolve(o) == o
    o = resolve(Options(augment="fixed", replicas=40, with_clean=True, chunks="shuffled"))
    assert (o.replicas, o.with_clean, o.chunks) == (40, True, "shuffled")
    o = resolve(Options(data="cifar10", data_dir=Path("x"), download=True))
    assert o.scale == "images" and Options.from_json(o.as_json()) == o
    assert str(o.folder) == "runs/cifar10-fb-penalty-s0"


def test_differences():
    made, now = (resolve(Options(**o)).as_json() for o in ({}, {"augment": "random", "keep": 5}))
    assert differences(made, now) == [
        ("--augment", "none", "random"),
        ("--padding", "none", "4"),
    ]
    assert not differences(made, made | {"data_dir": "elsewhere", "threads": 7})


def test_run_folder_names():
    assert str(Options().folder) == "runs/mnist1d-fb-penalty-s0"
    assert str(Options(data="npz:/a/b.npz", recipe="fb", seed=2).folder) == "runs/b-fb-s2"
    assert str(Options(data="imagefolder:/a/c/").folder) == "runs/c-fb-penalty-s0"


BAD = {
    "no samples": ({"samples": 0}, "--samples 0: has to be at least 1"),
    "unknown data": ({"data": "cifar"}, "--data cifar: unknown data set; choose mnist1d"),
    "path missing": ({"data": "npz:"}, "--data npz:: a path has to follow"),
    "unknown recipe": ({"recipe": "fb-best"}, "--recipe fb-best: choose sgd, fb"),
    "unknown model": ({"model": "vgg"}, "--model vgg: choose cnn, mlp, resnet18"),
    "unknown scale": ({"scale": "huge"}, "--scale huge: choose images, small"),
    "unknown method": ({"method": "fast"}, "--method fast: choose forward, central, exact"),
    "chunk 0": ({"chunk_size": 0}, "--chunk-size 0: has to be at least 1"),
    "steps 0": ({"steps": 0}, "--steps 0: has to be at least 1"),
    "negative lr": ({"lr": -0.1}, "--lr -0.1: has to be above 0"),
    "lr 0": ({"lr": 0.0}, "--lr 0.0: has to be above 0"),
    "lr inf": ({"lr": math.inf}, "--lr inf: has to be above 0 and finite"),
    "lr nan": ({"lr": math.nan}, "--lr nan: has to be above 0"),
    "warmup": ({"warmup": -1}, "--warmup -1: has to be at least 0"),
    "cosine": ({"cosine": 0}, "--cosine 0: has to be at least 1"),
    "max_norm": ({"max_norm": 0.0}, "--max-norm 0.0: has to be above 0; inf"),
    "max_norm nan": ({"max_norm": math.nan}, "--max-norm nan"),
    "penalty": ({"penalty": -1.0}, "--penalty -1.0: has to be at least 0"),
    "radius": ({"radius": 0.0}, "--radius 0.0: has to be above 0"),
    "momentum": ({"momentum": 1.0}, "--momentum 1.0: has to be at least 0 and below 1"),
    "nesterov": ({"momentum": 0.0, "nesterov": True}, "--nesterov needs momentum"),
    "weight decay": ({"weight_decay": -1e-4}, "--weight-decay -0.0001"),
    "width": ({"width": 0}, "--width 0"),
    "image size": ({"image_size": 0}, "--image-size 0"),
    "threads": ({"threads": 0}, "--threads 0"),
    "seed": ({"seed": -1}, "--seed -1"),
    "large seed": ({"seed": 2**63}, "--seed"),
    "eval": ({"eval_every": 0}, "--eval-every 0"),
    "log": ({"log_every": 0}, "--log-every 0"),
    "save": ({"save_every": 0}, "--save-every 0: has to be at least 1"),
    "keep": ({"keep": 0}, "--keep 0: has to be at least 1"),
    "fingerprints": ({"fingerprint_every": -1}, "--fingerprint-every -1: has to be at least 0"),
    "dropout": ({"dropout": 1.0}, "--dropout 1.0: has to be at least 0 and below 1"),
    "auto": ({"resume": "auto", "overwrite": True}, "--overwrite contradicts --resume auto"),
    "epochs for full batch": ({"epochs": 3}, "--epochs is only for --recipe sgd.*use --steps"),
    "batch for full batch": ({"batch_size": 3}, "--batch-size is only for.*use --chunk-size"),
    "steps for sgd": ({"recipe": "sgd", "steps": 3}, "--steps is only for .*use --epochs"),
    "chunks for sgd": ({"recipe": "sgd", "chunk_size": 3}, "--chunk-size.*use --batch-size"),
    "whole penalty for sgd": ({"recipe": "sgd", "full_penalty": 0.5}, "--full-penalty is only for"),
    "whole penalty too large": ({"full_penalty": 1e300}, "--full-penalty 1e.300: has to be at"),
    "augment": ({"augment": "flip"}, "--augment flip: choose none, random, fixed"),
    "chunks": ({"chunks": "sorted"}, "--chunks sorted: choose fixed, shuffled, replacement"),
    "decay": ({"decay": "none"}, "--decay none: choose all, weights"),
    "tta": ({"tta": "crop"}, "--tta crop: choose none, flip"),
    "smoothing": ({"label_smoothing": 1.0}, "--label-smoothing 1.0: has to be at least 0 and"),
    "replicas": ({"augment": "fixed", "replicas": 0}, "--replicas 0: has to be at least 1"),
    "replicas, random": (
        {"augment": "random", "replicas": 3},
        "--replicas has no effect without --augment fixed",
    ),
    "clean, none": ({"with_clean": True}, "--with-clean has no effect without --augment fixed"),
    "folder": ({"data_dir": Path("x")}, "--data-dir is only for --data cifar10 and cifar100"),
    "download": ({"download": True}, "--download is only for --data cifar10 and cifar100"),
    "radius, no penalty": ({"recipe": "fb", "radius": 0.1}, "--radius has no effect without"),
    "schedule": ({"schedule": "linear"}, "--schedule linear: choose cosine, step, expon"),
    "floor": ({"floor": 1.0}, "--floor 1.0: has to be at least 0 and below 1"),
    "gamma": ({"schedule": "step", "gamma": 0.0}, "--gamma 0.0: has to be above 0 and below 1"),
    "milestones": ({"schedule": "step", "milestones": "1,x"}, "--milestones 1,x: numbers with"),
    "milestone 1": ({"schedule": "step", "milestones": "0.5,1"}, "each has to be above 0 and be"),
    "no milestone": ({"schedule": "step", "milestones": ","}, "--milestones: name at least one"),
    "floor, step": ({"schedule": "step", "floor": 0.1}, "--floor has no effect without --sche"),
    "cosine, constant": ({"schedule": "constant", "cosine": 9}, "--cosine has no effect without"),
    "gamma, cosine": ({"gamma": 0.1}, "--gamma has no effect without --schedule step or exp"),
    "milestones, cosine": ({"milestones": "0.5"}, "--milestones has no effect without --sched"),
    "loss": ({"loss": "hinge"}, "--loss hinge: choose cross-entropy, misclassified, squared"),
    "max-up": ({"max_up": 0}, "--max-up 0: has to be at least 1"),
    "max-up, none": ({"max_up": 2}, "--max-up has no effect without --augment random"),
    "padding": ({"augment": "random", "padding": -1}, "--padding -1: has to be at least 0"),
    "padding, none": ({"padding": 2}, "--padding has no effect without --augment random or fix"),
    "policy, none": ({"augment_policy": "randaugment"}, "--augment-policy has no effect without"),
    "policy": ({"augment_policy": "auto"}, "--augment-policy auto: choose none, randaugment"),
    "padding, imagenet": (
        {"data": "imagenet:x", "augment": "random", "padding": 4},
        "--padding is for crops of whole images, and those of --data imagenet:PATH are resized",
    ),
    "no path": ({"data": "tinyimagenet"}, "--data tinyimagenet: a path has to follow"),
    "norm": ({"model": "resnet18", "norm": "layer"}, "--norm layer: choose batch, group, ghost"),
    "norm, cnn": ({"norm": "group"}, "--norm is for ResNets, not for --model cnn; leave it out"),
    "ghost, batch": (
        {"model": "resnet20", "ghost_size": 8},
        "--ghost-size is for ResNets with --norm ghost, not for --model resnet20 with --norm batch",
    ),
    "ghost 0": ({"model": "resnet20", "norm": "ghost", "ghost_size": 0}, "--ghost-size 0: has"),
    "shortcut, vgg": ({"model": "vgg11", "shortcut": "A"}, "--shortcut is for ResNets, not"),
    "stem, resnet20": ({"model": "resnet20", "stem": "cifar"}, "--stem is for resnet18 to resn"),
    "widening": ({"model": "resnet18", "widening": 48}, "--widening is for PyramidNets, not"),
    "depth": ({"model": "cnn", "depth": 3}, "--depth is for mlp, not for --model cnn"),
    "depth 0": ({"model": "mlp", "depth": 0}, "--depth 0: has to be at least 1"),
    "activation": ({"model": "cnn", "activation": "tanh"}, "--activation is for mlp, not"),
    "method, no penalty": ({"penalty": 0.0, "method": "exact"}, "--method has no effect without"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    changes, message = BAD[case]
    with pytest.raises((OptionsError, DataError), match=message):
        resolve(Options(**changes))


def test_resume_takes_no_other_options(tmp_path):
    check_resume(Options(resume=tmp_path, threads=1, device="cpu", save_every=1, keep=3))
    with pytest.raises(OptionsError, match="--lr cannot be given with --resume RUN"):
        check_resume(Options(resume=tmp_path, lr=0.1))


def rates(passes: int = 24, **changes) -> list[float]:
    """The learning rate at every pass and beyond, after a warm-up of 4, as a share of its peak."""
    options = resolve(Options(steps=20, warmup=4, **changes))
    return [lr_factor(step, options) for step in range(passes)]


def test_schedule():
    found = rates(cosine=10)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0] and found[4] == 1.0
    assert found[9] == pytest.approx(0.5) and found[14] == pytest.approx(0)
    assert found[14:] == [pytest.approx(0)] * 10
    assert lr_factor(0, resolve(Options(warmup=0, cosine=1))) == 1


def test_other_schedules():
    """All after the same warm-up; by default with the release's milestones and gammas."""
    assert rates(schedule="constant") == [0.25, 0.5, 0.75] + [1.0] * 21
    step = rates(schedule="step")
    expected = [1.0] * 4 + [0.1] * 5 + [0.01] * 5 + [0.001] * 6  # from 7.5, 12.5 and 17.5 of 20 on
    assert step[:4] == [0.25, 0.5, 0.75, 1.0]
    assert step[4:] == pytest.approx(expected)
    step = rates(schedule="step", gamma=0.5, milestones="0.75, 0.5")
    assert step[4:] == [1.0] * 6 + [0.5] * 5 + [0.25] * 9
    assert rates(schedule="exponential")[4:] == pytest.approx([0.99**k for k in range(20)])
    assert rates(schedule="exponential", gamma=0.5)[8] == 0.5**4
    floor = rates(cosine=10, floor=0.04)
    assert floor[:4] == [0.25, 0.5, 0.75, 1.0] and floor[14:] == pytest.approx([0.04] * 10)
    assert floor[9] == pytest.approx(0.52)


def test_every_epoch_has_its_own_order():
    a, b, other_seed = (epoch_order(50, *draw, "cpu") for draw in ((0, 0), (0, 1), (1, 0)))
    assert torch.equal(a, epoch_order(50, 0, 0, "cpu"))
    assert not torch.equal(a, b) and not torch.equal(a, other_seed)
    assert torch.equal(b.sort().values, torch.arange(50))


def test_bad_input_creates_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "ok.npz", x_train=np.zeros((4, 2)), y_train=[0, 1, 0, 1],
             x_test=np.zeros((2, 2)), y_test=[0, 1])  # fmt: skip
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (["--lr", "-1"], "--lr -1.0: has to be above 0"),
        (["--data", "npz:none.npz"], "no such file"),
        (["--data", "npz:ok.npz"], "--model cnn takes signals or images of at least 3"),
        (["--data", "digits", "--device", "tpu9"], "--device tpu9"),
        (["--data", "mnist1d", "--model", "resnet18"], "--model resnet18 takes images"),
        (["--resume", "runs/none"], "--resume runs/none: there is no checkpoint in it"),
        (["--out", "file"], "--out file: is a file"),
        (["--out", "mine"], "holds thesis.tex"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_backend_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FBOPT_BACKEND", "kernel")
    assert main(["--data", "digits", "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "fbopt train: FBOPT_BACKEND is 'kernel'; set it to kernels or reference, or unset it\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["out", "resume", "data_dir"])
@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_paths_that_nobody_could_follow_are_refused_from_python_too(name, path):
    from fbopt.train.checkpoint.resume import find_start

    data = {"data": "cifar10"} if name == "data_dir" else {}
    with pytest.raises(OptionsError, match=f"--{name.replace('_', '-')}: .*give another path"):
        find_start(Options(**data, **{name: Path(path)}), ExitStack())
