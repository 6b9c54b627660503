"""Finding a CUDA toolkit, over fake ones of every layout, and the real one where there is one."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fbopt._build import compiler as _toolchain, nvcc as _nvcc, toolkit as _toolkit
from fbopt._build.compiler import BuildError

TARGET = _nvcc.TARGETS[0]
# Answers as nvcc does; like it, it looks for its profile where it was called, not where a link to
# it leads. Of the shell alone, as the tests leave nothing else on the PATH.
NVCC = """#!/bin/sh
here=${{0%/*}}
case " $* " in
*" --version "*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
*" --dryrun "*)
  [ -e "$here/nvcc.profile" ] || exit 0
  echo "#\\$ _HERE_=$here" >&2
  while read -r line; do echo "#\\$ $line" >&2; done < "$here/nvcc.profile" ;;
*" -E "*) echo 'x.h:1:2: error: #error -- unsupported GNU version! The nvcc flag' >&2; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """A machine with a compiler and a torch for CUDA 13.0, and without any toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FBOPT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_toolkit, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(_toolkit, "_packaged", lambda: [])
    tools = _toolchain.Toolchain(("/bin/c++",), (), "#define __GNUC__ 99\n")
    monkeypatch.setattr(_nvcc, "toolchain", lambda: tools)


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def fake(
    home, version="13.0", include="include", cudart="lib64/libcudart.so", profile="", lacks=""
):
    """Put a toolkit into a folder; return its nvcc."""
    headers = [f"{include}/{name}" for name in _nvcc.HEADERS]
    files(home, *(name for name in [*headers, cudart] if not (lacks and name.endswith(lacks))))
    nvcc = program(home / "bin" / "nvcc", NVCC.format(version=version))
    (home / "bin" / "nvcc.profile").write_text(f"TOP={home}/bin/..\n{profile}")
    return nvcc


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# --- where a toolkit is found ------------------------------------------------------------------
# Each case puts something into the folder `here` and returns what the toolkit has to be, as far as
# it matters: by default all parts of it are in here/cuda, with the nvcc there.


def by_cuda_home(here, monkeypatch):
    fake(here / "cuda")
    fake(here / "other")
    monkeypatch.setenv("CUDA_HOME", str(here / "cuda"))
    monkeypatch.setenv("CUDA_PATH", str(here / "other"))
    monkeypatch.setenv("PATH", str(here / "other" / "bin"))
    return {"origin": "CUDA_HOME"}


def by_cuda_path(here, monkeypatch):
    fake(here / "cuda")
    fake(here / "usual")
    monkeypatch.setenv("CUDA_PATH", str(here / "cuda"))
    monkeypatch.setenv("CUDA_HOME", "")
    return {"origin": "CUDA_PATH"}


def on_the_path(here, monkeypatch):
    fake(here / "cuda")
    fake(here / "usual")
    monkeypatch.setenv("PATH", f"/nowhere:{here}/cuda/bin")
    return {"origin": "nvcc on the PATH"}


def through_a_link(here, monkeypatch):
    """Called through the link, nvcc would not find its profile."""
    link(here / "path" / "nvcc", fake(here / "cuda"))
    return {}


def through_a_linked_folder(here, monkeypatch):
    fake(here / "cuda")
    link(here / "usual", here / "cuda")
    return {"nvcc": here / "usual" / "bin" / "nvcc", "origin": "its usual place"}


def through_a_wrapper(here, monkeypatch):
    nvcc = fake(here / "cuda")
    return {"nvcc": program(here / "path" / "nvcc", f'#!/bin/sh\nexec "{nvcc}" "$@"\n')}


def through_ccache(here, monkeypatch):
    """A link to a program that takes its name for what it is to run."""
    nvcc = fake(here / "cuda")
    text = f'#!/bin/sh\ncase $0 in */nvcc) exec "{nvcc}" "$@" ;; esac\nexit 9\n'
    link(here / "path" / "nvcc", program(here / "ccache", text))
    return {"nvcc": here / "path" / "nvcc"}


def for_one_target(here, monkeypatch):
    target = f"targets/{TARGET}"
    fake(here / "cuda", include=f"{target}/include", cudart=f"{target}/lib/libcudart.so")
    monkeypatch.setenv("PATH", f"{here}/cuda/bin")
    folder = here / "cuda" / target
    return {"include": folder / "include", "cudart": folder / "lib" / "libcudart.so"}


def of_debian(here, monkeypatch):
    """nvcc in a folder of its own, headers and libraries among the system's."""
    monkeypatch.setattr(_nvcc, "SYSTEM", here / "cuda" / "include")
    cudart = f"lib/{platform.machine()}-linux-gnu/libcudart.so"
    fake(here / "cuda", cudart=cudart)
    own = here / "cuda" / "lib" / "nvidia-cuda-toolkit" / "bin"
    (here / "cuda" / "bin" / "nvcc").rename(program(own / "nvcc", ""))
    (own / "nvcc.profile").write_text(f"TOP={own.parent}\n")
    nvcc = program(here / "cuda" / "bin" / "nvcc", f'#!/bin/sh\nexec "{own}/nvcc" "$@"\n')
    monkeypatch.setenv("PATH", f"{here}/cuda/bin")
    return {"nvcc": nvcc, "cudart": here / "cuda" / cudart, "includes": ()}


def by_the_profile_alone(here, monkeypatch):
    """Folders that only nvcc knows of, quoted and not, CCCL apart."""
    nvcc = fake(here / "cuda", include="my headers", cudart="libraries/libcudart.so")
    headers, cccl = here / "cuda" / "my headers", here / "cuda" / "cccl"
    shutil.move(headers / "nv", cccl / "nv")
    shutil.move(headers / "cuda", cccl / "cuda")
    (_nvcc.parent / "nvcc.profile").write_text(
        f'TOP={here}/nowhere\nINCLUDES="-I{headers}"  \nSYSTEM_INCLUDES="-isystem" "{cccl}"  \n'
        f'LIBRARIES=  "-L{here}/cuda/stubs" -L{here}/cuda/libraries\n'
    )
    monkeypatch.setenv("PATH", str(_nvcc.parent))
    cudart = here / "cuda" / "libraries" / "libcudart.so"
    return {"include": headers, "cudart": cudart, "includes": (headers, cccl)}


def in_two_parts_of_cccl(here, monkeypatch):
    """As CUDA 13 has it: nv/ in include as well, the rest in include/cccl."""
    fake(here / "cuda")
    include = here / "cuda" / "include"
    (include / "cccl").mkdir()
    shutil.move(include / "cuda", include / "cccl" / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(here / "cuda"))
    return {"includes": (include, include / "cccl")}


def among_pythons_packages(here, monkeypatch):
    """No plain name for libcudart; and the nvcc on the PATH is for another CUDA."""
    home = here / "site" / "nvidia" / "cu13"
    fake(home, cudart="lib/libcudart.so.13")
    fake(here / "old", version="12.8")
    monkeypatch.setenv("PATH", f"{here}/old/bin")
    packages(monkeypatch, here / "site")
    found = {"home": home, "nvcc": home / "bin" / "nvcc", "include": home / "include"}
    found |= {"cudart": home / "lib" / "libcudart.so.13", "includes": (home / "include",)}
    return {**found, "origin": "nvcc among Python's packages"}


def among_two_pythons_packages(here, monkeypatch):
    """nvcc in a virtual environment, the runtime in the Python that it extends.

    What is left there of CUDA 12's packages makes of nvidia a package in one place.
    """
    compiler, runtime = (here / name / "nvidia" / "cu13" for name in ("site", "base"))
    fake(compiler, include="include", cudart="none", lacks="cuda_runtime.h")
    files(runtime, "include/cuda_runtime.h", "lib/libcudart.so.13")
    files(runtime.parent, "__init__.py")
    packages(monkeypatch, here / "site", here / "base")
    found = {"home": runtime, "nvcc": compiler / "bin" / "nvcc", "include": runtime / "include"}
    found |= {"includes": (runtime / "include", compiler / "include")}
    return {**found, "cudart": runtime / "lib" / "libcudart.so.13"}


def after_ones_that_do_not_fit(here, monkeypatch):
    fake(here / "older", version="12.8")
    fake(here / "newer", version="14.0")
    fake(here / "half", lacks="libcudart.so")
    program(here / "broken" / "bin" / "nvcc", "#!/bin/sh\nexit 1\n")
    fake(here / "cuda", version="13.5")
    names = ("older", "newer", "half", "broken", "cuda", "older")
    monkeypatch.setenv("PATH", ":".join(f"{here}/{name}/bin" for name in names))
    return {"version": (13, 5)}


def packages(monkeypatch, *folders):
    monkeypatch.setattr(_toolkit, "_packaged", PACKAGED)
    monkeypatch.setattr(sys, "path", [*map(str, folders), *sys.path])


PACKAGED = _toolkit._packaged
LAYOUTS = [
    by_cuda_home,
    by_cuda_path,
    on_the_path,
    through_a_link,
    through_a_linked_folder,
    through_a_wrapper,
    through_ccache,
    for_one_target,
    of_debian,
    by_the_profile_alone,
    in_two_parts_of_cccl,
    among_pythons_packages,
    among_two_pythons_packages,
    after_ones_that_do_not_fit,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_toolkit_is_found(layout, monkeypatch, tmp_path):
    home = tmp_path / "cuda"
    usual = {"home": home, "nvcc": home / "bin" / "nvcc", "include": home / "include"}
    usual |= {"cudart": home / "lib64" / "libcudart.so", "version": (13, 0)}
    expected = {**usual, **layout(tmp_path, monkeypatch)}
    expected.setdefault("includes", (expected["include"],))
    found = vars(_toolkit.toolkit())
    assert {name: found[name] for name in expected} == expected


# --- what is wrong, and what to do about it ----------------------------------------------------


def nothing(here, monkeypatch):
    pass


def home_is_nowhere(here, monkeypatch):
    fake(here / "usual")
    monkeypatch.setenv("CUDA_HOME", str(here / "nowhere"))


def home_is_of_another_cuda(here, monkeypatch):
    fake(here / "usual")
    fake(here / "old", version="12.8")
    monkeypatch.setenv("CUDA_HOME", str(here / "old"))


def all_are_of_another_cuda(here, monkeypatch):
    fake(here / "usual", version="12.8")
    fake(here / "path", version="14.0")
    link(here / "linked", here / "path")
    monkeypatch.setenv("PATH", f"{here}/path/bin:{here}/linked/bin")


def home_takes_too_few_arguments(here, monkeypatch):
    fake(here / "old", version="12.0", cudart="lib64/libcudart.so.12")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(here / "old"))


def torch_is_older(here, monkeypatch):
    fake(here / "usual")
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def torch_is_without_cuda(here, monkeypatch):
    fake(here / "usual")
    monkeypatch.setattr(torch.version, "cuda", None)


def parts_are_missing(here, monkeypatch):
    fake(here / "usual", lacks="target")


def cudart_is_of_another_cuda(here, monkeypatch):
    fake(here / "usual", cudart="lib64/libcudart.so.12")


def nvcc_is_no_program(here, monkeypatch):
    program(here / "usual" / "bin" / "nvcc", "\0\1\2")


def nvcc_says_nothing(here, monkeypatch):
    program(here / "usual" / "bin" / "nvcc", "#!/bin/sh\n")


def dry_run_fails(here, monkeypatch):
    fake(here / "usual")
    (here / "usual" / "bin" / "nvcc.profile").unlink()


INSTALL = "pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'"
TROUBLES = [
    (nothing, "no CUDA toolkit for torch's CUDA 13.0 (CUDA_HOME is not set", INSTALL),
    (home_is_nowhere, "CUDA_HOME is set to {here}/nowhere, but", "set CUDA_HOME to the folder"),
    (home_is_of_another_cuda, "is of CUDA 12.8, and torch of CUDA 13.0", "a CUDA 13 toolkit"),
    (home_takes_too_few_arguments, "is of CUDA 12.0, and torch", "toolkit, 12.1 at the least"),
    (all_are_of_another_cuda, "{here}/path/bin/nvcc is of CUDA 14.0; {here}/usual/", INSTALL),
    (torch_is_older, "{here}/usual/bin/nvcc is of CUDA 13.0", "CUDA toolkit 12.8 and set"),
    (torch_is_without_cuda, f"torch {torch.__version__} was built without CUDA", "install one"),
    (parts_are_missing, "(CUDA 13.0) comes without nv/target", INSTALL),
    (cudart_is_of_another_cuda, "(CUDA 13.0) comes without libcudart.so", INSTALL),
    (nvcc_is_no_program, "{here}/usual/bin/nvcc does not run (Exec format error)", INSTALL),
    (nvcc_says_nothing, "{here}/usual/bin/nvcc --version tells no version", INSTALL),
    (dry_run_fails, "{here}/usual/bin/nvcc --dryrun does not tell its folders (exit", INSTALL),
]


@pytest.mark.parametrize(
    ("trouble", "cause", "cure"), TROUBLES, ids=[trouble.__name__ for trouble, *_ in TROUBLES]
)
def test_what_is_wrong_is_told(trouble, cause, cure, monkeypatch, tmp_path):
    trouble(tmp_path, monkeypatch)
    with pytest.raises(BuildError) as caught:
        _toolkit.toolkit()
    assert cause.format(here=tmp_path) in caught.value.cause
    assert cure in caught.value.cure
    assert "linked" not in caught.value.cause, "what two names lead to is named twice"


def test_for_cuda_12_no_package_is_advised(monkeypatch):
    """PyPI's nvcc of CUDA 12 is without the nvcc."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(BuildError) as caught:
        _toolkit.toolkit()
    assert "pip install" not in caught.value.cure


def test_a_host_compiler_that_is_too_new(tmp_path):
    tools = _nvcc.inspect(fake(tmp_path / "cuda"))
    with pytest.raises(BuildError, match=r"g\+\+ 99.* \(unsupported GNU version\); set CXX"):
        _nvcc.check_host(tools)


# --- whether CUDA is wanted --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "cuda", "available", "expected"),
    [
        (None, "13.0", True, True),
        ("", "13.0", True, True),
        (None, "13.0", False, False),
        (None, None, True, False),  # ROCm
        ("1", "13.0", False, True),
        ("1", None, False, True),
        ("0", "13.0", True, False),
    ],
)
def test_whether_cuda_is_wanted(variable, cuda, available, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    if variable is not None:
        monkeypatch.setenv("FBOPT_CUDA", variable)
    assert _toolkit.wanted() is expected


def test_fbopt_cuda_has_to_be_0_or_1(monkeypatch):
    monkeypatch.setenv("FBOPT_CUDA", "yes")
    with pytest.raises(ValueError, match="FBOPT_CUDA is 'yes'; set it to 1 or 0, or unset it"):
        _toolkit.wanted()


# --- the real one ------------------------------------------------------------------------------

SOURCE = """#include <cuda_bf16.h>
#include <cuda/std/limits>
__global__ void one(__nv_bfloat16* x) { x[threadIdx.x] = __float2bfloat16(1.0f); }
void launch(__nv_bfloat16* x) { one<<<1, 32>>>(x); }
extern "C" int version() {
  int found = 0;
  return cudaRuntimeGetVersion(&found) == cudaSuccess ? found : -1;
}
"""


@pytest.mark.slow
def test_the_real_toolkit_compiles_and_links(monkeypatch, tmp_path):
    monkeypatch.undo()
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on the PATH")
    major, minor = _nvcc.inspect(Path(shutil.which("nvcc"))).version
    # Whatever torch there is: the toolkit is what is tested.
    monkeypatch.setattr(torch.version, "cuda", f"{major}.{minor}")
    tools, host = _toolkit.toolkit(), _toolchain.toolchain().bare
    _nvcc.check_host(tools)
    (tmp_path / "one.cu").write_text(SOURCE)
    flags = _toolkit.gencode(_toolkit.architectures(tools)[-1:])
    includes = [f"-I{folder}" for folder in tools.includes]
    steps = [
        [tools.nvcc, "-ccbin", host, *flags, "-Xcompiler=-fPIC", "-c", "one.cu", "-o", "one.o"],
        [host, "-shared", "one.o", tools.cudart, "-o", "one.so"],
        # The host compiler alone, for what the C++ files of the CUDA part include.
        [host, "-x", "c++", *includes, "-include", "cuda_runtime.h", "-fsyntax-only", "one.cpp"],
    ]
    (tmp_path / "one.cpp").write_text("#include <cuda/std/limits>\n")
    for step in steps:
        subprocess.run([str(word) for word in step], cwd=tmp_path, check=True)
    ctypes.CDLL(str(tools.cudart), mode=ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL(str(tmp_path / "one.so")).version() // 1000 == major
