"""What a run tells torch about arithmetic; no GPU is needed to set it."""

from __future__ import annotations

import pytest
import torch

from fbopt.train.precision import set_arithmetic


@pytest.fixture
def settings():
    """CUDA's settings, put back afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision
    cudnn.deterministic = False
    yield cudnn, matmul
    cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = before


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")]
)
def test_cuda_adds_in_a_fixed_order_and_multiplies_as_told(settings, precision, kind):
    cudnn, matmul = settings
    set_arithmetic(precision, torch.device("cuda"))
    assert cudnn.deterministic
    assert (matmul.fp32_precision, cudnn.conv.fp32_precision) == (kind, kind)


def test_a_run_on_the_cpu_changes_nothing(settings):
    cudnn, matmul = settings
    before = matmul.fp32_precision
    set_arithmetic("bf16", torch.device("cpu"))
    assert not cudnn.deterministic and matmul.fp32_precision == before
