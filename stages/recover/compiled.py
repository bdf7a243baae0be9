"""One teacher's forward pass and BN distances as compiled code (``recover.compile``).

A function of its own for every teacher, not for every subset of a pool, so that a pool compiles once whatever is drawn
from it. What nobody asks for (logits, and the layers between the last BatchNorm and them) is not computed, and what the
backward pass needs beside the inputs of the BN layers, it computes again instead of keeping it.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import shutil
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cluster.errors import RunError, TransientError, UserError, first_line
from cluster.nodecache import node_cache
from stages.recover.frozen import fold_batch_norm, widen_depthwise_gradients
from stages.recover.speed import processor
from stages.teachers.build import memory_format

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher

CACHE = "TORCHINDUCTOR_CACHE_DIR"
OWN = "prism-compiled-"
OFF = "or set recover.compile=false and choose another out"


class CompiledTeacher:
    """A compiled function [B, C, S, S] → (logits or None, distances [layers] or None); see ``compiling`` for errors.

    It compiles at the first call, and at the first with images of another shape.

    Args:
        name: for messages.
        teacher: frozen; its hooks are left alone.
        layers: BN layers of it that each forward pass runs once.
        distance: (layer, its input) → scalar.
        logits: whether they are wanted.
        example: images to try it out with, [1, C, S, S].

    Raises:
        UserError: the network does not work as a copy.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        layers: Sequence[nn.BatchNorm2d],
        distance: Callable[[nn.BatchNorm2d, Tensor], Tensor],
        logits: bool,
        example: Tensor,
    ):
        # A network with hooks for good, because compiled code keeps those that it was made with; the same weights.
        memo: dict[int, object] = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
        seen: dict[int, Tensor] = {}

        def measure_as(index: int) -> Callable[[nn.BatchNorm2d, tuple[Tensor]], None]:
            def measure(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
                seen[index] = distance(layer, inputs[0])

            return measure

        try:
            network = copy.deepcopy(teacher, memo)
            fold_batch_norm(network)
            if not example.is_cuda and torch.is_autocast_enabled(example.device.type):
                widen_depthwise_gradients(network)
            for index, layer in enumerate(layers):
                tapped = memo[id(layer)]
                assert isinstance(tapped, nn.BatchNorm2d)
                tapped.register_forward_pre_hook(measure_as(index))
            with torch.no_grad():
                network(example)
            if len(seen) != len(layers):
                raise ValueError("its copy does not run its own layers")
            seen.clear()
        except Exception as error:
            raise UserError(
                f"recover.compile: teacher {name} cannot be copied ({first_line(error)}); mend it, {OFF}"
            ) from None
        count = len(layers)

        def run(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
            # Empty before and after, or torch would compile once for each. Before: the last pass may have failed.
            seen.clear()
            out = network(x)
            terms = torch.stack([seen[index] for index in range(count)]) if count else None
            seen.clear()
            return out if logits else None, terms

        # torch counts recompilations by code object, and gives up after a few: each teacher has one of its own.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        options: dict[str, str | int | bool | Callable[..., object]] = {
            # No choice among kernels by their time, for they add in different orders.
            "deterministic": True,
            "shape_padding": False,
            # Where channels last are not safe, see ``memory_format``.
            "layout_optimization": memory_format(teacher.network) == torch.channels_last,
        }
        # As a whole or not at all: what runs between two parts of a network would not be compiled, and which parts are
        # would depend on what the process did before.
        self._run = torch.compile(own, dynamic=False, fullgraph=True, options=options)
        self._ready: set[torch.Size] = set()
        # What the code is made from, as far as it takes to find it: torch looks closer.
        self._what = [repr(network), count, logits, dict(options)]

    def __call__(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits and distances."""
        if x.shape not in self._ready:
            autocast = torch.is_autocast_enabled(x.device.type)
            kept_code([*self._what, processor(x.device), list(x.shape), autocast], lambda: self._try_out(x))
            self._ready.add(x.shape)
        return self._run(x)  # type: ignore[no-any-return]

    def _try_out(self, x: Tensor) -> None:
        """Forward and backward, both of which compile at their first call."""
        x = x.detach().requires_grad_()
        found = [out.float().sum() for out in self._run(x) if out is not None]
        torch.autograd.grad(torch.stack(found).sum(), [x])


def kept_code(what: list[object], compile_it: Callable[[], None]) -> None:
    """Compile, with the help of what another process of this node compiled, or so that later ones are helped.

    One process at a time makes the code of a teacher; the others wait for it.

    Args:
        what: tells code apart.
        compile_it: does it in this process's folder, quickly where the code is there.
    """
    folder = Path(os.environ.get(CACHE, ""))
    if not folder.name.startswith(OWN):
        # The user's, where torch keeps it.
        return compile_it()
    done = False

    def fill(path: Path, reserve: Callable[[int], None]) -> None:
        nonlocal done
        before = set(_files(folder))
        compile_it()
        done = True
        new = [file for file in _files(folder) if file not in before]
        reserve(sum(file.stat().st_size for file in new))
        with tarfile.open(path, "w") as archive:
            for file in new:
                archive.add(file, file.relative_to(folder))

    known = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    kept = node_cache().make(["compiled", *known, *what], fill)
    if done:
        return None
    if kept:
        with tarfile.open(kept) as archive:
            archive.extractall(folder, filter="data")
    return compile_it()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """For a body that calls compiled teachers and their backward passes, which compile at their first call too.

    Raises:
        UserError: a teacher's code is such that it cannot be compiled.
        TransientError: the machine did not get it done.
    """
    try:
        yield
    except RuntimeError as error:
        # Here, because this part of torch takes seconds to import, and few runs need it.
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        if isinstance(error, BackendCompilerFailed):
            reason = first_line(getattr(error, "inner_exception", error))
            raise TransientError(
                f"recover.compile: a teacher did not get compiled here ({reason}); mend it, {OFF}"
            ) from error
        raise UserError(
            f"recover.compile: a teacher cannot be compiled ({first_line(error)}); mend it, {OFF}"
        ) from error


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
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its default there as soon as it is imported, and a driver's folder is inherited by its workers.
    there, own = os.environ.get(CACHE, ""), f"{OWN}{os.getpid()}-"
    name = os.path.basename(there)
    if there in ("", default_cache_dir()) or (name.startswith(OWN) and not name.startswith(own)):
        os.environ[CACHE] = tempfile.mkdtemp(prefix=own)
        atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
    config.compile_threads = max(1, torch.get_num_threads())
