"""The device that is benchmarked: its name and state, its caches, its precisions, its graphs."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

CPU = torch.device("cpu")
_compiles: dict[torch.device, bool] = {}
# Read, never set: a benchmark takes the card as it finds it.
SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "compute_mode",
)
# Data that has to pass before nothing of what was there is left in a cache, in sizes of the cache.
CACHES = 4
WARM_UPS = 3


def name(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """What the processor is called."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works for the device.

    It needs Triton, a C compiler and Python's headers. Tried once, on a function of one line; what
    stands in the way is printed.
    """
    if device not in _compiles:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
            _compiles[device] = True
        except Exception as error:  # whatever it is, the other contenders can be timed
            print(f"nothing is timed compiled, torch.compile fails: {str(error).splitlines()[0]}")
            _compiles[device] = False
    return _compiles[device]


def facts(device: torch.device) -> dict[str, str]:
    """What figures on the device depend on, besides the versions."""
    if device.type != "cuda":
        return {"device": name(device)}
    about = torch.cuda.get_device_properties(device)
    found = {
        "device": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": str(about.multi_processor_count),
        "memory": f"{about.total_memory / 2**30:.0f} GiB",
        "L2 cache": f"{cache_bytes(device) / 2**20:.0f} MiB",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }
    return found | smi(getattr(about, "uuid", None))


def smi(uuid: object) -> dict[str, str]:
    """What nvidia-smi says of a card; nothing where there is no such tool or it fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    command += ["-i", f"GPU-{uuid}"] if uuid else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split("\n")[0].split(", ")
    if done.returncode != 0 or len(values) != len(SMI_FIELDS):
        return {}
    return dict(zip(SMI_FIELDS, values, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """The size of the cache that all of a GPU shares; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20


def sets_beyond_cache(device: torch.device, nbytes: int, most: int) -> int:
    """How many sets of operands of so many bytes, used in turn, meet a cache without them.

    1 where it would take more than `most`, and on the CPU: the operands stay where they are.
    """
    if device.type != "cuda":
        return 1
    sets = 1 + -(-CACHES * cache_bytes(device) // max(1, nbytes))
    return sets if sets <= most else 1


class Eviction:
    """Empties a GPU's cache by reading other data, so that nothing is left to be written back."""

    def __init__(self, device: torch.device) -> None:
        size = CACHES * cache_bytes(device) // 4
        self._data = torch.ones(size, device=device)
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        if len(self._data):
            torch.sum(self._data, dim=0, out=self._sum)


@dataclass(frozen=True)
class Precision:
    """How a model computes: the arithmetic of its products and the order of its images."""

    name: str
    tf32: bool = False
    autocast: torch.dtype | None = None
    # Of a whole gradient: 18 layers deep, algorithms that sum in another order show as much.
    tolerance: float = 1e-3

    @property
    def memory_format(self) -> torch.memory_format:
        """channels_last for half precision, which the tensor cores' convolutions work in."""
        return torch.channels_last if self.autocast else torch.contiguous_format

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Set torch's switches, and put them back; cuDNN may try what is fastest."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
        try:
            cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = self.tf32, self.tf32, True
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


FLOAT32 = Precision("float32")
TF32 = Precision("TF32", tf32=True, tolerance=2e-2)
BFLOAT16 = Precision("bfloat16, channels_last", True, torch.bfloat16, tolerance=0.1)
PRECISIONS = {"float32": FLOAT32, "tf32": TF32, "bf16": BFLOAT16}


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Record what `run` launches in a CUDA graph and return its replay; on the CPU, `run` itself.

    It is called a few times first, on a stream of its own, to allocate and choose algorithms.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay
