"""Where a process compiles, and what it finds there of other processes of its node."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import importlib
import inspect
import logging
import os
import platform
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import RunError, first_line
from cluster.nodecache import node_cache

log = logging.getLogger("prism")

Code = Callable[..., Any]
"""A compiled function; what torch compiled ahead of time has ``save_compiled_function``."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
OWN = "prism-compiled-"
# Changes when what is kept of compiled code does.
FORM = 2
# Of the teacher that an archive is for: what was traced, with which libraries to load.
GRAPH = "graph"
OFF = "or set recover.compile=false and choose another out"


def prepare_compiler(device: torch.device) -> None:
    """To be called by a process that will compile: no more compilers at a time than it has threads, in its own folder.

    A process that is killed while it compiles leaves half a library behind, which the next one in the same folder would
    take for a whole one. ``TORCHINDUCTOR_CACHE_DIR`` of the user's is left as it is.

    Args:
        device: where the teachers are.

    Raises:
        RunError: the machine has no compiler.
    """
    # On GPUs Triton makes the kernels, and wants a C compiler for what calls them.
    names = ("CC", "gcc", "clang", "cc") if device.type == "cuda" else ("CXX", "g++", "clang++", "c++")
    if not any(shutil.which(name) for name in (os.environ.get(names[0]) or names[1], *names[1:])):
        raise RunError(f"recover.compile: this machine has no compiler ({names[1]}); install one, {OFF}")
    from torch._functorch import config as autograd_config
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its default there as soon as it is imported, and a driver's folder is inherited by its workers.
    there, own = os.environ.get(CACHE, ""), f"{OWN}{os.getpid()}-"
    name = os.path.basename(there)
    if there in ("", default_cache_dir()) or (name.startswith(OWN) and not name.startswith(own)):
        os.environ[CACHE] = tempfile.mkdtemp(prefix=own)
        atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
    config.compile_threads = max(1, torch.get_num_threads())
    # Ours are written in torch alone, all of which the graph's key holds. Another torch may not have the switch.
    with contextlib.suppress(AttributeError):
        autograd_config.autograd_cache_allow_custom_autograd_functions = True


def kept_code(known: Sequence[object], compile_it: Callable[[], Code], network: nn.Module, x: Tensor) -> Code:
    """Compile, with the help of what another process of this node compiled, or so that later ones are helped.

    One process at a time makes the code for what is ``known``, and the others wait for it.

    Args:
        known: plain values that the code depends on.
        compile_it: does it in this process's folder.
        network: the code's first argument, no part of which is kept.
        x: its second one.
    """
    folder = Path(os.environ.get(CACHE, ""))
    if not folder.name.startswith(OWN):
        # The user's, where torch keeps most of it.
        return compile_it()
    failed: list[Exception] = []
    made: list[Code] = []
    external: dict[str, object] = {"network": network}
    graph = folder / GRAPH

    def fill(path: Path, reserve: Callable[[int], None]) -> None:
        try:
            made.append(compile_it())
        except Exception as error:
            # The cache would take some errors for its own.
            failed.append(error)
            raise
        # Without it, other processes find the code all the same, after they traced the network again.
        try:
            if hasattr(made[0], "save_compiled_function"):
                made[0].save_compiled_function(str(graph), external_data=external)
        except Exception as error:
            log.info("recover.compile: traced by every process: %s", first_line(error))
        # All of it: code that an earlier teacher had in common with this one was not made again.
        files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
        reserve(sum(file.stat().st_size for file in files))
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for file in files:
                archive.add(file, file.relative_to(folder))

    machine = [
        torch.__version__,
        platform.python_version(),
        torch.version.cuda,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
    ]
    graph.unlink(missing_ok=True)
    kept = node_cache().make(["compiled", FORM, *machine, *known], fill)
    if failed:
        raise failed[0]
    if made:
        return made[0]
    if kept:
        # Without it, everything is compiled here.
        with contextlib.suppress(OSError, tarfile.TarError, EOFError, zlib.error):
            _unpack(kept, folder)
    if graph.is_file():
        try:
            with graph.open("rb") as file:
                code: Any = torch.compiler.load_compiled_function(file, external_data=external)
            if _same_sources(code) and code.guard_check(network, x):
                return code  # type: ignore[no-any-return]
        except Exception as error:
            # torch says that this form may change.
            log.info("recover.compile: a kept trace was not usable: %s", first_line(error))
    return compile_it()


def _same_sources(code: Any) -> bool:
    """Whether all functions that were traced stand in files that are what they were."""
    sources = {each.module: each.content for each in code.source_info().inlined_sources}
    return all(inspect.getsource(importlib.import_module(name)) == content for name, content in sources.items())


def _unpack(kept: Path, folder: Path) -> None:
    """Add what is not there yet, every file as a whole or not at all: some of those there are in use."""
    with gzip.open(kept) as content:
        # To the end, where the checksum is.
        while content.read(2**20):
            pass
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=folder) as aside, tarfile.open(kept) as archive:
        for member in archive:
            target = folder / member.name
            if member.isfile() and not target.exists():
                archive.extract(member, aside, filter="data")
                target.parent.mkdir(parents=True, exist_ok=True)
                (Path(aside) / member.name).replace(target)
