"""Checks of what FullBatchClosure is given: arguments, chunks and their weights, losses."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fbopt._checks import check_number
from fbopt._direction import PerturbationRule
from fbopt._sharding import any_sharded
from fbopt.penalty import GradientPenalty
from fbopt.sharpness import SharpnessAware

SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
ORDER_CURE = (
    "pass shuffle=False, or list(loader) to draw once; if new chunks in every call are meant, an "
    "object of your own whose __iter__ returns iter(loader)"
)
FUNCTIONS = ("loss_fn", "evaluate", "observe", "on_pass_start", "weight")
FLAGS = ("chunk_norms", "cuda_graph", "backward", "debug", "compile", "flatten_parameters")
RETURNS = ("loss", "objective")
# What may be replaced between calls, and is then checked again.
ARGUMENTS = (
    *("model", "chunks", "penalty", "optimizer", "autocast", "chunk_max_norm", "vectorize"),
    "returns",
    *FUNCTIONS,
    *FLAGS,
)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the arguments of FullBatchClosure; its docstring says what each one is."""
    if not isinstance(given["model"], nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_kind(given['model'])}")
    loss_fn, evaluate = given["loss_fn"], given["evaluate"]
    if (loss_fn is None) == (evaluate is None):
        raise ValueError(
            "pass either loss_fn, for chunks of (input, target), or evaluate=, for any others"
        )
    for name in FUNCTIONS:
        if given[name] is not None and not callable(given[name]):
            raise TypeError(f"{name} must be callable, got {_kind(given[name])}")
    reduction = loss_options(loss_fn)[1].get("reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"loss_fn has reduction={reduction!r}: a chunk's loss must be its mean, use "
            "reduction='mean'"
        )
    _check_iterable(given["chunks"])
    _check_order(given)
    rules, optimizers = (GradientPenalty, SharpnessAware), (torch.optim.Optimizer,)
    for name, wanted in (("penalty", rules), ("optimizer", optimizers)):
        if given[name] is not None and not isinstance(given[name], wanted):
            names = ", ".join(f"a {kind.__name__}" for kind in wanted)
            raise TypeError(f"{name} must be {names} or None, got {_kind(given[name])}")
    autocast = given["autocast"]
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {autocast}")
    if given["chunk_max_norm"] is not None:
        check_number("chunk_max_norm", given["chunk_max_norm"], above=0)
    _check_returns(given)
    for name in FLAGS:
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be True or False, got {_kind(given[name])}")
    if given["backward"] and given["cuda_graph"]:
        raise ValueError("backward=True runs Python in every backward pass: leave cuda_graph out")
    _check_vectorize(given)


def _check_returns(given: Mapping[str, Any]) -> None:
    if given["returns"] not in RETURNS:
        raise ValueError(f"returns must be one of {RETURNS}, got {given['returns']!r}")
    if given["returns"] == "loss":
        return
    cause = 'returns="objective" needs a gradient that is that of a function, which {} is not: {}'
    if isinstance(given["penalty"], SharpnessAware):
        cure = 'pass a GradientPenalty, of power=1 for one that resembles SAM, or returns="loss"'
        raise ValueError(cause.format("SAM's", cure))
    if given["chunk_max_norm"] is not None:
        cure = 'leave chunk_max_norm out, or pass returns="loss"'
        raise ValueError(cause.format("the sum of clipped ones", cure))


def _check_vectorize(given: Mapping[str, Any]) -> None:
    count = given["vectorize"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"vectorize must be a number of chunks, at least 1, got {count!r}")
    option = "compile=True" if given["compile"] else f"vectorize={count}"
    if count == 1 and not given["compile"]:
        return
    if given["backward"]:
        raise ValueError(
            f"backward=True takes gradients from loss.backward(), {option} from torch.func: leave "
            "one of both out"
        )
    if (name := compiled_module(given["model"])) is not None:
        raise ValueError(
            f"{option} needs the model before torch.compile, and {name} is compiled: pass that "
            "model, with compile=True to the closure"
        )


def loss_options(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """A loss's function, or its class where it is a module, and the options it was made with."""
    given: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial):
        given, loss_fn = loss_fn.keywords, loss_fn.func
    if isinstance(loss_fn, nn.Module):
        return type(loss_fn), {**vars(loss_fn), **loss_fn._buffers, **given}
    return loss_fn, given


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in a DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def refuse_twice(penalty: PerturbationRule) -> None:
    """Refuse double backward with ``backward=True``, whose hooks take gradients without graph."""
    if penalty.method == "exact":
        raise ValueError(
            "method='exact' differentiates twice, which backward=True cannot: use method='forward' "
            "or 'central', or leave backward out"
        )


def _check_iterable(chunks: Any) -> None:
    if chunks is None or not hasattr(chunks, "__iter__"):
        raise TypeError("chunks must be an iterable of chunks, such as a list or a DataLoader")
    if iter(chunks) is chunks:
        raise TypeError(
            "chunks can be iterated only once (a generator or iterator), but every call visits all "
            "of it: pass a list, a DataLoader, or an object whose __iter__ starts anew"
        )


def _check_order(given: Mapping[str, Any]) -> None:
    """Refuse a DataLoader that draws other samples in each call, or other chunks where it matters
    which samples share one.
    """
    batches = getattr(given["chunks"], "batch_sampler", None)
    if batches is None:  # batches from the data set itself
        batches = getattr(given["chunks"], "sampler", None)
    sampler = getattr(batches, "sampler", None)
    _refuse_repeated(sampler)
    if not isinstance(sampler, SHUFFLED):
        return
    found, matters = _draws_other_samples(batches, sampler), {}
    if found is None and 1 < getattr(batches, "batch_size", 1) < len(sampler):
        matters = {
            "a penalty": given["penalty"] is not None,
            "chunk_max_norm": given["chunk_max_norm"] is not None,
            'accumulation="exact"': given["accumulation"] == "exact",
        }
    if found is not None:
        raise ValueError(
            f"chunks is a DataLoader that draws other samples in every call ({found}), and a step "
            f"is by all samples: {ORDER_CURE}"
        )
    for name, here in matters.items():
        if here:
            raise ValueError(
                f"chunks is a DataLoader that draws other chunks in every call, and with {name} "
                f"the result depends on which samples share a chunk: {ORDER_CURE}"
            )


def _draws_other_samples(batches: Any, sampler: Any) -> str | None:
    """How a shuffled DataLoader leaves out or repeats samples, which are others in every call."""
    if getattr(sampler, "replacement", False):
        return "with replacement"
    data = getattr(sampler, "data_source", getattr(sampler, "weights", None))
    if data is not None and len(sampler) != len(data):
        return f"{len(sampler)} of {len(data)}"
    if getattr(batches, "drop_last", False) and len(sampler) % batches.batch_size:
        return "drop_last=True"
    return None


def _refuse_repeated(sampler: Any) -> None:
    """Refuse a DistributedSampler that repeats samples, which would count twice."""
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return
    samples = len(cast("Sized", sampler.dataset))
    if samples % sampler.num_replicas:
        raise ValueError(
            f"chunks has a DistributedSampler, which repeats some of {samples} samples to give "
            f"{sampler.num_replicas} processes as many, and they would count twice: shares may be "
            "uneven, take torch.utils.data.Subset(dataset, range(rank, len(dataset), world_size))"
        )


def _kind(value: Any) -> str:
    return type(value).__name__


def compiled_module(model: nn.Module) -> str | None:
    """The name of the first module that torch.compile has wrapped, None if there is none."""
    for name, module in model.named_modules():
        if _kind(module) == "OptimizedModule" or module._compiled_call_impl is not None:
            return name or "model"
    return None


def refuse_compiled(model: nn.Module) -> None:
    """Refuse double backward through torch.compile, which would fail with an obscure error."""
    if (name := compiled_module(model)) is not None:
        raise RuntimeError(
            f"method='exact' differentiates twice, which a compiled model ({name}) cannot: use "
            "method='forward' or 'central', or the model before torch.compile"
        )


def refuse_inference_mode() -> None:
    """Refuse a call in a mode that makes no autograd graph, whatever is set within it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "FullBatchClosure needs gradients: call it outside torch.inference_mode()"
        )


def refuse_sharded_graph(params: Sequence[Tensor]) -> None:
    """Refuse CUDA graphs of what talks to other processes."""
    if any_sharded(params):
        raise ValueError(
            "cuda_graph=True does not go with sharded parameters (DTensor): leave it out"
        )


def refuse_sharded_groups(params: Sequence[Tensor]) -> None:
    """Refuse torch.func with parameters that processes share."""
    if any_sharded(params):
        raise ValueError(
            "vectorize= and compile= do not go with sharded parameters (DTensor): leave them out"
        )


def refuse_sharded(params: Sequence[Tensor]) -> None:
    """Refuse double backward through DTensors, where torch's own loses terms without a word."""
    if any_sharded(params):
        raise RuntimeError(
            "method='exact' differentiates twice, which gives wrong values for sharded parameters "
            "(DTensor): use method='forward' or 'central'"
        )


def check_loss(index: int, loss: Any, source: str) -> None:
    """Check that a chunk's loss is a 0-dim tensor with an autograd graph."""
    if not isinstance(loss, Tensor):
        more = ", or (loss, aux)" if source == "evaluate" else ""
        raise TypeError(
            f"{source} returned {_kind(loss)} for chunk {index}: return a 0-dim tensor{more}"
        )
    if loss.dim() != 0:
        raise ValueError(
            f"{source} returned shape {tuple(loss.shape)} for chunk {index}: return the mean loss, "
            "a 0-dim tensor (reduction='mean')"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of chunk {index} does not depend on any trainable parameter: {source} "
            "detached it, or ran without gradients"
        )


def refuse_second_loss(index: int, pair: Any) -> None:
    """Refuse another loss in the place of aux, which would not be differentiated."""
    if all(isinstance(x, Tensor) and x.dim() == 0 and x.requires_grad for x in pair):
        raise TypeError(
            f"evaluate returned two losses for chunk {index}, of which the second would be ignored "
            "(it has the place of aux, for observe=): return their sum, or detach the second"
        )


def pair(index: int, chunk: Any) -> tuple[Any, Any]:
    """Return a chunk's (input, target)."""
    if (type(chunk) is not tuple and not isinstance(chunk, Sequence)) or len(chunk) != 2:
        raise TypeError(
            f"chunk {index} is no (input, target) pair but {_kind(chunk)}: for other "
            "chunks pass evaluate=lambda model, chunk: mean_loss"
        )
    return chunk[0], chunk[1]


def tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested sequences and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):  # most chunks: without a generator for each tensor
        for item in value:
            if isinstance(item, Tensor):
                yield item
            else:
                yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors(item)
