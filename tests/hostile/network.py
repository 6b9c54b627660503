"""Two hosts as network namespaces, torchrun on both: a link cut, late or lossy; a lost rank.

    python -m tests.hostile network            needs root; about 15 minutes, most of them waiting
    python -m tests.hostile network "50 ms"    those whose names have these letters

Every run has to end on the bits of an undisturbed run in one process: the SHA-256 of parameters,
momentum and buffers at every fifth step.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fbopt.train.checkpoint import atomic
from tests.hostile.link import ADDRESSES, Link, obstacle
from tests.hostile.tables import Row, show

ROOT = Path(__file__).resolve().parents[2]
STEPS, EARLY = 60, 8  # of a run; taken before the disturbance
PORT = 29511
RUN = (
    "--data", "digits", "--recipe", "fb-penalty", "--width", "4", "--chunk-size", "128",
    "--samples", "512", "--vectorize", "1", "--steps", f"{STEPS}", "--log-every", "1",
    "--fingerprint-every", "5", "--save-every", "10", "--threads", "1", "--model", "cnn",
)  # fmt: skip
SLOW = 0.25  # seconds that a step waits, so that there is a time to disturb it
PROGRAM = """import sys, time
from fbopt.train import trainer
take_step = trainer.Trainer.take_step
def slow(self):
    time.sleep({seconds})
    take_step(self)
trainer.Trainer.take_step = slow
from fbopt.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
HEADER = ("what happened to two hosts", "the run meanwhile", "said", "how it ended")
GRACE = 120.0  # seconds for which torchrun may go on without processes, as between two restarts
LONGEST = 900.0  # seconds after which a job hangs


class Case(NamedTuple):
    """What happens to a job of two hosts."""

    name: str
    processes: int = 1  # on each host
    cut: float = 0.0  # seconds without a link; inf: for good
    between: bool = False  # the cut is: neither host sees that its own interface is down
    delay: float = 0.0
    loss: float = 0.0
    kills: int = 0  # ranks that are killed, one after the other
    minutes: float = 30.0  # --timeout
    read_timeout: int = 1800  # torchrun's --rdzv-conf; seconds, its own default is 60


CASES = (
    Case("undisturbed"),
    Case("undisturbed, two each", processes=2),
    Case("cut for 5 s", cut=5),
    Case("cut for 30 s", cut=30),
    Case("cut for 300 s", cut=300),
    Case("cut for 5 s, between the hosts", cut=5, between=True),
    Case("cut for 30 s, between the hosts", cut=30, between=True),
    Case("cut for 300 s, between the hosts", cut=300, between=True),
    Case("cut for 100 s, torchrun's own limit of 60 s", cut=100, read_timeout=60),
    Case("cut for good, `--timeout 0.5`", cut=float("inf"), minutes=0.5, read_timeout=60),
    Case("50 ms late", delay=0.05),
    Case("50 ms late, 5 % lost", delay=0.05, loss=0.05),
    Case("a rank killed", kills=1),
    Case("two ranks killed, two each", processes=2, kills=2),
)


class Job:
    """torchrun on both hosts of a link; host 0 has the run folder."""

    def __init__(self, link: Link, home: Path, case: Case) -> None:
        self.folder, self.logs = home / "run", [home / f"host{end}.log" for end in (0, 1)]
        self.hosts = [self._start(link, home, case, end) for end in (0, 1)]
        self.begin = time.monotonic()

    def _start(self, link: Link, home: Path, case: Case, end: int) -> subprocess.Popen[bytes]:
        own = home / f"host{end}"
        own.mkdir(exist_ok=True)
        program = own / "program.py"
        program.write_text(PROGRAM.format(seconds=SLOW))
        words = [*link.words(end), sys.executable, "-m", "torch.distributed.run"]
        words += [
            "--nnodes",
            "2",
            "--nproc-per-node",
            f"{case.processes}",
            "--rdzv-backend",
            "c10d",
        ]
        words += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "hostile"]
        words += ["--local-addr", ADDRESSES[end], "--rdzv-conf"]
        words += [f"is_host={int(end == 0)},read_timeout={case.read_timeout}"]
        words += ["--max-restarts", f"{case.kills}", f"{program}", "--", *RUN]
        words += ["--out", f"{self.folder}", "--timeout", f"{case.minutes:g}", "--resume", "auto"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
            "GLOO_SOCKET_IFNAME": link.faces[end], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        with open(self.logs[end], "ab") as log:
            return subprocess.Popen(
                words, cwd=own, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def steps(self) -> int:
        """How many have been logged."""
        return len(atomic.read_lines(self.folder / "metrics.jsonl"))

    @property
    def ended(self) -> bool:
        return all(host.poll() is not None for host in self.hosts)

    def wait_for(self, steps: int) -> None:
        """Wait until so many steps are logged or the job has ended."""
        while self.steps < steps and not self.ended and time.monotonic() - self.begin < LONGEST:
            time.sleep(0.05)

    def workers(self, end: int) -> list[int]:
        """The processes that torchrun has started on a host."""
        pid = self.hosts[end].pid  # ip has become torchrun
        try:
            words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:  # it has ended
            return []
        return [int(word) for word in words]

    def finish(self) -> list[int]:
        """The exit statuses; a torchrun that goes on without its processes is killed."""
        alive = time.monotonic()
        while not self.ended and time.monotonic() - self.begin < LONGEST:
            time.sleep(0.1)
            if self.workers(0) or self.workers(1):
                alive = time.monotonic()
            if time.monotonic() - alive > GRACE:
                break
        for host in self.hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
        return [host.wait() for host in self.hosts]

    def said(self) -> list[str]:
        """What fbopt said of other processes, on either host."""
        text = "\n".join(log.read_text(errors="replace") for log in self.logs)
        return re.findall(r"^fbopt train: (.*)$", text, re.M)


def alone(home: Path) -> list[dict]:
    """The fingerprints of the undisturbed run in one process."""
    words = [sys.executable, "-m", "fbopt.train", *RUN, "--processes", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    home.mkdir()
    done = subprocess.run(
        [*words, "--out", f"{home / 'run'}"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return atomic.read_lines(home / "run" / "fingerprints.jsonl")


def disturb(link: Link, job: Job, case: Case) -> str:
    """Do what the case says once some steps are done; say what it did to the run."""
    job.wait_for(EARLY)
    if case.cut:
        link.cut()
        before = job.steps
        if case.cut == float("inf"):
            return f"at step {before}"
        time.sleep(case.cut)
        while_cut = job.steps - before
        link.heal()
        healed = time.monotonic()
        job.wait_for(before + while_cut + 2)  # one may have been on its way
        wait = "ended" if job.ended else f"went on {time.monotonic() - healed:.0f} s after healing"
        return f"at step {before}, {while_cut} more while cut; {wait}"
    for number in range(case.kills):
        job.wait_for(2 * EARLY + 20 * number)  # a checkpoint is there
        if workers := job.workers(number % 2):
            os.kill(workers[-1], signal.SIGKILL)
    return f"{case.kills} killed" if case.kills else ""


def run(case: Case, wanted: list[dict], home: Path) -> Row:
    """One case as a row of the table."""
    home.mkdir()
    with Link(case.delay, case.loss, case.between) as link:
        job = Job(link, home, case)
        what = disturb(link, job, case)
        statuses = job.finish()
        if link.is_carried:
            counted = f"{link.carried:,} packets carried, {link.dropped:,} dropped"
            what = f"{what}; {counted}" if what else counted
        said, resumed = job.said(), ""
        if any(statuses):  # go on from the last save, on a sound link
            link.heal()
            again = Job(link, home, case)
            resumed = f"; ended with {statuses}, and was started again"
            resumed += " (-9: torchrun itself hung)" if -9 in statuses else ""
            statuses = again.finish()
    steps = {record["step"] for record in wanted}
    found = atomic.read_lines(home / "run" / "fingerprints.jsonl")
    found = [record for record in found if record["step"] in steps]  # a save adds its own
    same = statuses == [0, 0] and found == wanted
    steps = f"{len(found)} of {len(wanted)} fingerprints"
    restarts = (home / "host0.log").read_text(errors="replace").count("resumed at step")
    if restarts:
        resumed += f"; resumed {restarts} times"
    end = f"the same bits ({steps})" if same else f"DIFFERS, status {statuses} ({steps})"
    return Row((case.name, what + resumed, "<br>".join(dict.fromkeys(said)) or "–", end), same)


def main(names: Sequence[str] = ()) -> tuple[list[Row], str]:
    """Run the cases, or those that are named."""
    if why := obstacle():
        return [], f"skipped: {why}"
    rows = []
    with tempfile.TemporaryDirectory(prefix="fbopt-network-") as folder:
        wanted = alone(Path(folder, "alone"))
        for number, case in enumerate(CASES):
            if not names or any(name in case.name for name in names):
                rows.append(run(case, wanted, Path(folder, f"case{number}")))
                show(rows[-1])
    return rows, ""
