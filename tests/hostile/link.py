"""Two hosts on one machine: network namespaces with a link between them that can be cut or be bad.

A link is a veth pair, or two tun devices whose packets a thread here carries over, late or not at
all: not every kernel has tc's netem. Both need root, and Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PACKET_BYTES = 65536
NUMBER = os.getpid() % 100000  # names of interfaces have at most 15 letters


def obstacle() -> str | None:
    """Why there can be no second host here; None where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"):
        return "it takes root and the program ip (Linux: iproute2)"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no network namespaces ({tried.stderr.strip()})"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Link:
    """Two namespaces, `spaces`, whose interfaces `faces` are joined by a cable.

    Packets are carried by this process where they have a `delay` or `loss`, or if `is_carried`:
    then a cut is somewhere between the hosts, and neither sees that its own interface is down.

    Attributes:
        dropped: packets that were lost on purpose.
        carried: those that were not, where this process carries them.
    """

    def __init__(
        self, delay: float = 0.0, loss: float = 0.0, is_carried: bool = False, seed: int = 0
    ) -> None:
        self.spaces = tuple(f"fbopt-{NUMBER}-{end}" for end in "ab")
        self.faces = tuple(f"fb{NUMBER}{end}" for end in "ab")
        self.delay, self.loss, self.random = delay, loss, random.Random(seed)
        self.is_carried = bool(delay or loss or is_carried)
        self.is_cut = False
        self.dropped = self.carried = 0
        self._ended = threading.Event()
        self._carrier: threading.Thread | None = None

    def __enter__(self) -> Link:
        for space in self.spaces:
            ip("netns", "add", space)
        if self.is_carried:
            ends = [_tun(*pair) for pair in zip(self.spaces, self.faces, strict=True)]
            self._carrier = threading.Thread(target=self._carry, args=ends, daemon=True)
        else:
            a, b = self.faces
            ip("link", "add", a, "type", "veth", "peer", "name", b)
            for space, face in zip(self.spaces, self.faces, strict=True):
                ip("link", "set", face, "netns", space)
        for space, face, address in zip(self.spaces, self.faces, ADDRESSES, strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", face)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", face, "up")
        if self._carrier is not None:
            self._carrier.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._carrier is not None:
            self._carrier.join()
        for space in self.spaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)

    def cut(self) -> None:
        """Take the cable out."""
        self.is_cut = True
        if not self.is_carried:
            ip("-n", self.spaces[0], "link", "set", self.faces[0], "down")

    def heal(self) -> None:
        """Put it in again."""
        self.is_cut = False
        if not self.is_carried:
            ip("-n", self.spaces[0], "link", "set", self.faces[0], "up")

    def words(self, end: int) -> list[str]:
        """What a command on the host `end` begins with."""
        return ["ip", "netns", "exec", self.spaces[end]]

    def _carry(self, *ends: int) -> None:
        """Carry packets over: each `delay` later, but for a share `loss` of them."""
        waiting: list[tuple[float, int, int, bytes]] = []  # when due, number, to where, packet
        while not self._ended.is_set():
            left = waiting[0][0] - time.monotonic() if waiting else 0.1
            for end in select.select(ends, [], [], max(0.0, min(left, 0.1)))[0]:
                packet = os.read(end, PACKET_BYTES)
                if self.is_cut or self.random.random() < self.loss:
                    self.dropped += 1
                    continue
                self.carried += 1
                other = ends[0] if end == ends[1] else ends[1]
                due = time.monotonic() + self.delay
                heapq.heappush(waiting, (due, self.carried, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(waiting)
                os.write(end, packet)
        for end in ends:
            os.close(end)


def _tun(space: str, face: str) -> int:
    """A new tun device in a namespace; what is written here arrives there."""
    with _within(space):
        end = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", face.encode(), IFF_TUN | IFF_NO_PI))
    return end


@contextlib.contextmanager
def _within(space: str) -> Iterator[None]:
    """Let this thread be in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(Path("/var/run/netns", space), os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")
        yield
    finally:
        libc.setns(here, CLONE_NEWNET)
        os.close(here)
        os.close(there)
