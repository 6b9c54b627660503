"""What another user could have put into the cache is not loaded, whatever owners and modes are."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fbopt._build import cache, trust
from fbopt._build.compiler import BuildError

IS_ROOT = hasattr(os, "getuid") and os.getuid() == 0
OTHER = 12345
pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners and modes here")


def give(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a path another user's: by its owner where that can be changed, else by who we are."""
    if IS_ROOT:
        os.chown(path, OTHER, OTHER)
        return
    own = path.stat()
    looked_up, of_open = os.stat, os.fstat

    def as_other(found):
        same = (found.st_ino, found.st_dev) == (own.st_ino, own.st_dev)
        return os.stat_result([*found[:4], OTHER, *found[5:]]) if same else found

    monkeypatch.setattr(os, "fstat", lambda fd: as_other(of_open(fd)))
    monkeypatch.setattr(os, "stat", lambda *a, **k: as_other(looked_up(*a, **k)))


def library(folder: Path, content: bytes = b"planted") -> Path:
    """A file by a name that the cache would take."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "new.so"
    path.write_bytes(content)
    path.chmod(0o755)
    return path.rename(folder / f"tiny-0.{cache.digest(path)}.so")


@pytest.mark.parametrize("part", ["folder", "library"])
@pytest.mark.parametrize("owner", ["me", "other"])
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o777])
def test_sixteen_ways_to_plant_a_library(tmp_path, monkeypatch, capsys, part, owner, mode):
    monkeypatch.setattr(trust, "_is_own_group", lambda found: False)
    monkeypatch.setattr(cache, "_told", set())
    folder = tmp_path / "cache"
    planted = library(folder)
    folder.chmod(0o755)
    changed = folder if part == "folder" else planted
    changed.chmod(mode)
    if owner == "other":
        give(changed, monkeypatch)
    safe = owner == "me" and not mode & 0o022
    assert (cache.cached(folder, "tiny-0") == planted) == safe
    said = capsys.readouterr().err
    assert ("is not used" in said) == (part == "folder" and not safe)
    if said:
        assert "set FBOPT_CACHE_DIR to a folder that only you can write to" in said


def test_folders_above_count_too(tmp_path, monkeypatch):
    """Whoever can write to one of them can put another folder in place; not so in a sticky one."""
    monkeypatch.setattr(trust, "_is_own_group", lambda found: False)
    above = tmp_path / "above"
    planted = library(above / "cache")
    assert cache.cached(planted.parent, "tiny-0") == planted
    for mode, safe in ((0o775, False), (0o777, False), (0o1777, True), (0o755, True)):
        above.chmod(mode)
        assert (cache.cached(planted.parent, "tiny-0") == planted) == safe, oct(mode)
    link = tmp_path / "link"
    link.symlink_to(above)
    assert cache.cached(link / "cache", "tiny-0") == planted  # by the path without the link
    above.chmod(0o777)
    assert cache.cached(link / "cache", "tiny-0") is None


def test_a_link_that_others_can_turn_is_of_no_account(tmp_path, monkeypatch):
    """In the middle of the path, in a folder that is open to all: what is found stays found."""
    planted, other = library(tmp_path / "good"), library(tmp_path / "evil", b"evil")
    (open_to_all := tmp_path / "open").mkdir()
    open_to_all.chmod(0o777)
    (turned := open_to_all / "link").symlink_to(tmp_path)
    found = cache.cached(turned / "good", "tiny-0")
    assert found == planted
    turned.unlink()
    turned.symlink_to(other.parent)
    assert found.read_bytes() == b"planted"
    monkeypatch.setattr(cache, "_told", set())
    give(other.parent, monkeypatch)
    assert cache.cached(turned, "tiny-0") is None


@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_a_folder_that_is_open_to_all_is_left_as_it_is(tmp_path, monkeypatch, capsys, mode):
    """It may be /tmp, which others need: it is refused, and its mode not changed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cache, "_told", set())
    library(folder := tmp_path / "cache")
    folder.chmod(mode)
    assert cache.writable(folder) == tmp_path / f"fbopt-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert "everybody can write to" in capsys.readouterr().err


def test_folders_that_are_made_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        folder = cache.writable(tmp_path / "a" / "b" / "cache")
    finally:
        os.umask(before)
    assert folder == tmp_path / "a" / "b" / "cache"
    for made in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_the_group_that_a_user_has_alone_is_no_other(tmp_path, monkeypatch):
    import grp
    import pwd

    me = pwd.getpwuid(os.getuid())
    found = tmp_path.stat()
    own = grp.struct_group([me.pw_name, "x", found.st_gid, []])
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: me.__class__([*me[:3], found.st_gid, *me[4:]]))
    for group, alone in (
        (own, True),
        (grp.struct_group([*own[:3], [me.pw_name]]), True),
        (grp.struct_group([*own[:3], [me.pw_name, "mallory"]]), False),
        (grp.struct_group(["staff", *own[1:]]), False),
    ):
        monkeypatch.setattr(grp, "getgrgid", lambda gid, group=group: group)
        assert trust._is_own_group(found) == alone


@pytest.mark.skipif(not IS_ROOT, reason="a site's cache is root's")
def test_a_cache_of_root_that_only_root_can_change_is_shared(tmp_path):
    """Seen by another user, in a process of its own: it loads, and builds elsewhere."""
    site = tmp_path / "site"
    planted = library(site)
    program = (
        "import os, sys, tempfile\n"
        "from pathlib import Path\n"
        "from fbopt._build import cache\n"
        f"os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER})\n"
        "os.environ['FBOPT_CACHE_DIR'] = sys.argv[1]\n"
        "folder = cache.cache_folder()\n"
        "print(cache.cached(folder, 'tiny-0') is not None, cache.writable(folder) == folder)\n"
    )
    assert _run_open(program, site) == "True False"
    site.chmod(0o777)
    assert _run_open(program, site) == "False False"
    assert planted.exists()


def _run_open(program: str, site: Path) -> str:
    """Run a program that becomes another user, where that user can look."""
    root = Path(tempfile.mkdtemp(prefix="fbopt-site-"))
    try:
        root.chmod(0o755)
        moved = root / "site"
        shutil.copytree(site, moved)
        moved.chmod(stat.S_IMODE(site.stat().st_mode))
        temporary = root / "tmp"
        temporary.mkdir(mode=0o1777)
        temporary.chmod(0o1777)
        done = subprocess.run(
            [sys.executable, "-c", program, str(moved)],
            env={
                **os.environ,
                "TMPDIR": str(temporary),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
    finally:
        shutil.rmtree(root)


def test_the_temporary_cache_is_private_or_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o1777)
    folder = cache._temporary_cache()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)  # by a program with another idea of it
    assert stat.S_IMODE(cache._temporary_cache().stat().st_mode) == 0o755
    give(folder, monkeypatch)
    with pytest.raises(BuildError, match=r"belongs to .*; set FBOPT_CACHE_DIR"):
        cache._temporary_cache()


def test_links_pipes_and_folders_are_no_files(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path):
        with pytest.raises(OSError):
            trust.open_file(path)
        with pytest.raises(OSError), cache.lock(path, "trying"):
            pytest.fail("locked it")
    assert target.read_text() == "precious"


def test_a_lock_names_its_holder_and_gives_up(tmp_path, monkeypatch, capsys):
    import fcntl

    monkeypatch.setenv("FBOPT_WAIT_MINUTES", "0.005")
    path = tmp_path / "a.lock"
    with cache.lock(path, "compiling"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(BuildError) as raised, cache.lock(path, "compiling"):
            pytest.fail("locked it twice")
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert f"has been locked for 0.005 minutes by {holder}, which is compiling" in str(raised.value)
    assert f"waiting for at most 0.005 minutes for {holder}" in capsys.readouterr().err
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was given back
