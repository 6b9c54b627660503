"""The launcher of the CUDA kernels, as far as it is host code: on the emulated device of
tests/emulated. What runs on a GPU alone is at the end.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from op_cases import FORMS, LISTED, added, assert_same, cases, clone, make, scalar
from targets import emulator, rows, span, target

from fbopt._ops import dispatch, reference
from fbopt._ops.flat import flat_size

INT32_MAX = 2**31 - 1


@pytest.fixture(scope="module")
def device():
    """The library of the emulated kernels."""
    return emulator()


def launched(device):
    """The blocks of the launches since the last call."""
    blocks = (ctypes.c_int64 * 100)()
    return list(blocks[: device.launches(blocks, ctypes.c_int64(100))])


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [-1, 0, 1, 12345])
def test_more_than_two_to_the_31_elements(device, extra):
    n, chunk = 2**31 + extra, 4096
    blocks = -(-n // chunk)
    assert rows(device, [5, n, 3], 72, chunk) == [(0, 3, blocks + 2)]
    assert span(device, [5, n, 3], chunk, blocks) == (
        1,
        (blocks - 1) * chunk,
        n - (blocks - 1) * chunk,
    )
    assert span(device, [5, n, 3], chunk, blocks + 1) == (2, 0, 3)


def test_more_blocks_than_a_grid_takes(device):
    huge = 4096 * (INT32_MAX - 10)
    plan = rows(device, [huge, 9 * 4096, 2 * 4096, 5, huge, 8 * 4096], 72, 4096)
    assert plan == [(0, 2, INT32_MAX - 1), (2, 3, INT32_MAX - 7), (5, 1, 8)]
    last = INT32_MAX - 11
    assert span(device, [huge], 4096, last) == (0, last * 4096, 4096)


def test_the_tables_fit_what_a_kernel_takes(device):
    for depth in range(1, 6):
        capacity = device.capacity(ctypes.c_int64(depth))
        assert capacity > 500
        assert capacity * (8 * depth + 12) + 8 <= 32764 - 256
        assert device.few() * (8 * depth + 12) + 8 <= 4096 - 256


# --- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 62, 72, 73, 700, 1700])
@pytest.mark.parametrize("name, chunks", LISTED)
def test_lists_are_split_over_launches(device, name, chunks, count):
    """Few launches, of tables that fit; what they compute is the reference's."""
    arguments = cases(name, [(3,)] * count, torch.float32, chunks)[0]
    launched(device)
    result, found = target("emulated").call(name, arguments)
    blocks = launched(device)
    expected = clone(list(arguments))
    wanted = getattr(reference, name)(*expected)
    if name == "accumulate_exact_penalty_":
        found, expected = (added(arguments, x, torch.float32) for x in (found, expected))
    assert_same([result, *found], [wanted, *expected], terms=1 + 2 * chunks)
    depth = {"pack_": 2, "accumulate_": 2, "clip_": 1, "accumulate_exact_penalty_": 4}
    depth["adaptive_norms"] = 2
    per_launch = [device.capacity(ctypes.c_int64(depth.get(name, 3)))]
    norm = -(-count // device.capacity(ctypes.c_int64(1)))
    launches = {
        "squared_norm": norm + 1,
        "perturb_": norm + 1 + -(-count // per_launch[0]),
        "adaptive_norms": -(-count // per_launch[0]) + 1,
    }.get(name, -(-count // per_launch[0]))
    assert len(blocks) == launches
    assert sum(blocks) == {
        "squared_norm": count + max(1, chunks),
        "adaptive_norms": count + 2 * max(1, chunks),
        "perturb_": 2 * count + max(1, chunks),
    }.get(name, count)


def test_the_penalised_chunk_update_takes_four_launches(device):
    shapes = [(16,)] * 62  # as many as ResNet-18 has
    params, grads, plus = (make(shapes, torch.float32, seed) for seed in range(3))
    sums = [torch.zeros(s) for s in shapes]
    flat = torch.zeros(flat_size(params))
    ops = target("emulated").op
    launched(device)
    square = ops("perturb_")(flat, params, grads, 1e-2)
    ops("accumulate_penalty_")(sums, grads, plus, [], scalar(1.0), scalar(0.1), square, 1e-2)
    assert len(launched(device)) == 4


def test_both_norms_take_two_launches_for_any_number_of_chunks(device):
    """Each block reads its parameters once, for all chunks."""
    for chunks in (1, 65, 300):
        arguments = cases("adaptive_norms", [(9,)] * 62, torch.float32, chunks)[0]
        launched(device)
        target("emulated").call("adaptive_norms", arguments)
        assert launched(device) == [62, 2 * chunks]


def test_a_launch_takes_64_chunks(device):
    """A stacked update takes as many launches as that of one chunk, for 64 chunks each."""
    for chunks, updates in ((64, 1), (65, 2), (300, 5)):
        arguments = cases("accumulate_penalty_", [(9,)] * 62, torch.float32, chunks)[0]
        launched(device)
        target("emulated").call("accumulate_penalty_", arguments)
        assert len(launched(device)) == updates
        target("emulated").call("squared_norm", (arguments[1], True))
        assert launched(device) == [62, chunks]


def test_stored_vectors_take_a_launch_for_each_pass(device):
    rows, vector = torch.randn(17, 20_000), torch.randn(20_000)
    out = torch.zeros(2, 17, dtype=torch.float64)
    launched(device)
    target("emulated").op("row_products_")(out, rows, vector, vector)
    assert launched(device) == [3 * 3, 2 * 17]  # 8 rows and 8,192 columns a block; a sum each
    target("emulated").op("combine_rows_")(vector, rows, out[0])
    assert launched(device) == [-(-20_000 // (256 * 4))]


def test_nothing_is_launched_for_no_elements(device):
    empty = [torch.zeros(0), torch.zeros(0, 3)]
    ops = target("emulated").op
    launched(device)
    ops("accumulate_")(empty, empty, scalar(1.0))
    ops("clip_")(empty, scalar(1.0), 0.5)
    ops("accumulate_")([], [], scalar(1.0))
    assert launched(device) == []
    assert ops("squared_norm")(empty).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, chunks", FORMS)
def test_the_order_of_threads_does_not_matter(device, name, chunks, dtype):
    """A barrier that is missing, or two threads that write one place, would show."""
    arguments = cases(name, [(9001,), (64,), (70, 3)], dtype, chunks)[0]
    forwards = target("emulated").call(name, arguments)
    device.run_backwards(True)
    try:
        backwards = target("emulated").call(name, arguments)
    finally:
        device.run_backwards(False)
    torch.testing.assert_close(backwards, forwards, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", dispatch.NAMES)
def test_a_launch_that_fails_is_an_error(device, name):
    device.fail_launches(True)
    try:
        with pytest.raises(RuntimeError, match="not launched: no CUDA-capable device"):
            target("emulated").call(name, cases(name, [(5,)], torch.float32)[0])
    finally:
        device.fail_launches(False)


def test_a_sum_is_exact_where_float32_is_not(device):
    x = torch.full((100_001,), 4097.0)
    assert target("emulated").op("squared_norm")([x]).item() == 100_001 * 4097**2


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    n = 2**31 + 17
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    op = target("cuda").op
    assert op("squared_norm")([x]).item() == n
    op("clip_")([x], torch.tensor(2.0, device="cuda", dtype=torch.float64), 1.0)
    assert all(x[i].item() == 0.5 for i in (0, 2**31 - 1, 2**31, n - 1))
    assert op("squared_norm")([x]).item() == n / 4


@pytest.mark.cuda
def test_kernels_run_on_the_current_stream_and_device():
    squared_norm, stream = target("cuda").op("squared_norm"), torch.cuda.Stream()
    x = torch.ones(1 << 24, device="cuda")
    with torch.cuda.stream(stream):  # the first launches load code and may wait for the device
        torch.cuda._sleep(1)
        squared_norm([x.mul_(1)])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.mul_(2)
        square = squared_norm([x])
    assert not stream.query()
    stream.synchronize()
    assert square.item() == 4 * x.numel()
    if torch.cuda.device_count() > 1:
        other = torch.ones(1000, device="cuda:1")
        assert squared_norm([other]).device == other.device
        assert torch.cuda.current_device() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("name, chunks", FORMS)
def test_no_op_waits_for_the_device(name, chunks):
    arguments = clone(list(cases(name, [(5,), (3, 4)], torch.float32, chunks)[0]), "cuda")
    op = target("cuda").op(name)
    op(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name, chunks", FORMS)
def test_ops_can_be_captured(name, chunks):
    arguments = clone(list(cases(name, [(9001,), (3, 4)], torch.float32, chunks)[0]), "cuda")
    eager, captured = clone(arguments, "cuda"), clone(arguments, "cuda")
    op = target("cuda").op(name)
    op(*clone(arguments, "cuda"))
    wanted = op(*eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op(*captured)
    graph.replay()
    torch.testing.assert_close([found, *captured], [wanted, *eager], rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
def test_tensors_on_several_devices_are_refused():
    on_gpu, on_cpu = torch.zeros(3, device="cuda"), torch.zeros(3)
    op = target("cuda").op
    weight = torch.ones((), dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match=r"grads\[0\] is on another device"):
        op("accumulate_")([on_gpu], [on_cpu], weight)
    with pytest.raises(RuntimeError, match="weight must be a 0-dim tensor on the device"):
        op("accumulate_")([on_gpu], [on_gpu], weight.cpu())
