"""The processes of one run on this machine, which torch's elastic launcher forks from this one.

Each finds torch, the data and the kernels in memory, and torchrun's environment. Signals are for
this process, which passes them on: a terminal, like `timeout`, sends one to all of them, and a
single request to stop must not count as two. When this process dies, the system ends the others.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType
from typing import Any, NoReturn

import torch

from fbopt._distributed import PeerError
from fbopt._ops import dispatch
from fbopt.train.begin import Loaded, find, read
from fbopt.train.build import build_chunks
from fbopt.train.checkpoint.resume import Start
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.cores import usable_cores
from fbopt.train.config.options import Options
from fbopt.train.config.parser import fail
from fbopt.train.distributed import DistributedContext, distributed_context, select_device
from fbopt.train.loop import train, train_from
from fbopt.train.outcome import AT_ONCE, status_of
from fbopt.train.output import CLOSED_PIPE, guarded, nobody_reads
from fbopt.train.parent import end_with
from fbopt.train.processes import may_start_some, settle
from fbopt.train.signals import STOP
from fbopt.train.torchrun import is_rank_zero, rank_and_world_size

PASSED_ON = signal.SIGUSR1
UNKNOWN = -1
STOPPED = 130  # the exit status of a process that SIGINT has ended, for a shell
NOTICED_SECONDS = 20.0  # within which the launcher sees that a process is gone, and says so


def start(options: Options) -> int:
    """Train in as many processes as the options say or as pay; return the exit status.

    What can be wrong with options and data is found before the first is started.
    """
    if rank_and_world_size()[1] > 1:  # torchrun has started them
        train(options)
        return 0
    with ExitStack() as lock:
        begin = find(options, lock)
        wanted = begin.options
        threads = torch.get_num_threads()
        if may_start_some(wanted):
            torch.set_num_threads(1)  # more would not survive the fork
        select_device(wanted.device)
        loaded = read(wanted)
        chunks = build_chunks(wanted, loaded.data.train, stochastic=wanted.stochastic)
        begin = begin._replace(options=settle(wanted, chunks.groups))
        if begin.options.processes == 1:
            torch.set_num_threads(threads)
            train_from(begin, DistributedContext(), lock, loaded=loaded)
            return 0
    dispatch.table("cpu")  # compiled, if need be, and loaded once for all
    return Launcher(begin, loaded).run()


class Launcher:
    """Starts the processes of a run and waits for them.

    Attributes:
        status: the exit status that rank 0 ends with.
        stops: how often a stop was asked for.
        reported: a hash of the last error that was printed.
    """

    def __init__(self, begin: Start, loaded: Loaded) -> None:
        self.begin, self.loaded, self.pid = begin, loaded, os.getpid()
        shared = multiprocessing.get_context("fork")
        self.status, self.stops = shared.RawValue("i", UNKNOWN), shared.RawValue("i", 0)
        self.reported, self.printing = shared.RawValue("L", 0), shared.Lock()

    def run(self) -> int:
        """Start the processes, wait until all have ended, and return the exit status."""
        # Imported here: not every torch has these modules.
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        handlers = {number: signal.signal(number, self._pass_on) for number in STOP}
        handlers[PASSED_ON] = signal.signal(PASSED_ON, signal.SIG_IGN)
        logging.disable(logging.CRITICAL)  # the launcher's own messages
        failed = None
        try:
            self._launch()
        except ChildFailedError as error:
            failed = error.get_first_failure()
        except KeyboardInterrupt:  # before there was a process
            self.stops.value += 1
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.status.value != UNKNOWN:
            return self.status.value
        if failed is None or failed[1].exitcode == STOPPED:
            return fail(AT_ONCE, STOPPED)
        return fail(self._reason(*failed), 1)

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.begin.options.processes,
            run_id="fbopt",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            max_restarts=0,
            start_method="fork",
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            signals_to_handle="",
        )
        elastic_launch(config, self._work)()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # in a process that has not set its own handlers yet
            return
        processes = multiprocessing.active_children()
        if not processes:
            raise KeyboardInterrupt
        self.stops.value += 1
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # one that has just ended
                os.kill(process.pid, PASSED_ON)

    def _reason(self, rank: int, failure: Any) -> str:
        """What happened to a process that could not say so itself."""
        code, number = failure.exitcode, self.begin.options.processes
        names = {s.value: s.name for s in signal.Signals}
        how = f"gone with status {code}"
        if code < 0:
            how = f"ended by {names.get(-code, f'signal {-code}')}"
        memory = " (the system does that where memory runs out)" if code == -signal.SIGKILL else ""
        folder = self.begin.folder
        then = f"go on with\n  {folder.resume_command}" if folder.checkpoints() else "start again"
        return f"fbopt train: process {rank} of {number} was {how}{memory}; {then}"

    # --- in the processes -------------------------------------------------------------------------

    def _work(self) -> None:
        """Train in one of the processes. Only one that ends with status 0 returns."""
        signal.signal(PASSED_ON, _stop_at_once)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with(self.pid)
        if self.stops.value:
            _stop_at_once()
        logging.disable(logging.NOTSET)
        torch.set_num_threads(max(1, usable_cores() // self.begin.options.processes))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            with guarded():
                status = status_of(self._train)
                sys.stdout.flush()
                status = CLOSED_PIPE if nobody_reads() else status
        except BaseException:
            self._report(traceback.format_exc())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        if is_rank_zero():
            self.status.value = status
        if status:
            os._exit(status)

    def _train(self) -> int:
        with ExitStack() as group, ExitStack() as lock:
            with _silent_stdout():  # gloo says that it is connected (torch 2.10)
                joined = distributed_context("cpu", self.begin.options.timeout)
                context = group.enter_context(joined)
            # The launcher sends it as soon as one process has ended, which it then names; the
            # others end by themselves, and rank 0 may have to say why.
            noticed = threading.Event()
            signal.signal(signal.SIGTERM, lambda number, frame: noticed.set())
            folder = RunFolder(self.begin.folder.path)  # whose lock was not made before the fork
            begin = self.begin._replace(folder=folder)
            try:
                context.from_rank_zero(lambda: folder.lock_existing(lock))
                train_from(begin, context, lock, loaded=self.loaded, stop_by=[PASSED_ON])
            except PeerError as error:
                if error.rank is not None or context.why(error):
                    raise
                noticed.wait(NOTICED_SECONDS)
                os._exit(1)
        return 0

    def _report(self, text: str) -> None:
        """Print an error, unless another process has printed the same."""
        code = zlib.crc32(text.strip().splitlines()[-1].encode())
        with self.printing:
            if self.reported.value != code:
                self.reported.value = code
                print(text, end="", file=sys.stderr, flush=True)


def _stop_at_once(number: int = PASSED_ON, frame: FrameType | None = None) -> NoReturn:
    """End this process; an exception could be lost in the launcher's own code."""
    os._exit(STOPPED)


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Discard what is written to stdout, also by C++."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
