"""Compiled teachers measure what the others measure, and compile once."""

from __future__ import annotations

import inspect
import json
import linecache
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import codecache, config
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch._inductor.utils import clear_caches, fresh_cache

from cluster.errors import RunError, TransientError, UserError
from stages.data import DataSpec
from stages.recover.compiler import Code, kept_code, prepare_compiler
from stages.recover.core import recover_unit
from stages.recover.objective import BNTap, LocalObjective, Measured
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher

DATA = DataSpec(12, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abcde"))


class Small(nn.Module):
    """Two BN layers and a tail behind them."""

    def __init__(self, channels: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, stride=2), nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 5)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.bn1(self.conv1(x)))
        return self.head(torch.nn.functional.silu(self.bn2(self.conv2(x))).mean((2, 3)))


class Choosy(Small):
    """What it does depends on the values, which no graph of the whole can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1.0 if x.mean().item() > 0 else 2.0))


@pytest.fixture(scope="module")
def teachers() -> dict[str, Teacher]:
    return {f"t{c}": Teacher(f"t{c}", Small(c, seed=c), DATA, num_outputs=5) for c in (4, 6)}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 3, 12, 12), torch.arange(5)


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch.compiler.reset()
    # It is in the folder of an earlier test.
    codecache._precompile_header.cache_clear()
    counters.clear()
    yield
    torch.compiler.reset()


def objective(teachers: dict[str, Teacher], compiled: bool = True) -> LocalObjective:
    return LocalObjective(teachers, RecoverOptions(r_bn=0.5, compile=compiled))


@pytest.mark.parametrize(
    ("logits", "matched"),
    [(["t4"], ["t4"]), pytest.param(["t6"], ["t4", "t6"], marks=pytest.mark.slow)],
    ids=["one teacher for both", "two"],
)
def test_equals_what_is_not_compiled(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor], logits: list[str], matched: list[str]
) -> None:
    """And compiles each teacher once, for all steps and units."""
    x, y = batch
    plain, fast = objective(teachers, compiled=False), objective(teachers)
    for step in range(3):
        for one in (plain, fast):
            # As at the start of a unit.
            one.prepare(logits, matched, x[:1])
        expected, found = (one.step(x + step, y, logits, matched) for one in (plain, fast))
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
        assert found.l_bn.keys() == expected.l_bn.keys() == set(matched)
        for name in matched:
            torch.testing.assert_close(found.l_bn[name], expected.l_bn[name], rtol=1e-6, atol=0)
    assert counters["stats"]["unique_graphs"] == len({*logits, *matched})


@pytest.mark.slow
def test_a_unit_has_the_same_bytes_every_time(teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor]) -> None:
    """With subsets drawn at every step; by the same code, and by code that is made anew without torch's cache."""
    unit = RecoverUnit(
        ipc=0, chunk=0, classes=list(range(5)), logit_teachers=["t4"], bn_teachers=["t4", "t6"], iterations=6, seed=1
    )
    options = RecoverOptions(selection="per_step", include_prob=0.5, roll=2, lr=0.1, compile=True)
    against = LocalObjective(teachers, options)
    first = recover_unit(unit, batch[0], against, options, DATA, "cpu")
    again = recover_unit(unit, batch[0], against, options, DATA, "cpu")
    torch.compiler.reset()
    with fresh_cache():
        anew = recover_unit(unit, batch[0], teachers, options, DATA, "cpu")
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.pixels, anew.pixels)
    plain = recover_unit(unit, batch[0], teachers, options.model_copy(update={"compile": False}), DATA, "cpu")
    assert (first.pixels.int() - plain.pixels.int()).abs().max() <= 1


@pytest.mark.slow
def test_shares_the_weights_and_leaves_the_teacher_alone(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor]
) -> None:
    teacher = teachers["t4"]
    tap = BNTap("t4", teacher, batch[0][:1], RecoverOptions(compile=True))
    before = tap(batch[0], logits=True)[0]
    assert all(not m._forward_pre_hooks for m in teacher.modules())
    with torch.no_grad():
        teacher.network.head.bias += 1  # type: ignore[union-attr, operator]
    after = tap(batch[0], logits=True)[0]
    with torch.no_grad():
        teacher.network.head.bias -= 1  # type: ignore[union-attr, operator]
    assert before is not None
    torch.testing.assert_close(after, before + 1)


@pytest.mark.slow
@pytest.mark.parametrize("nameless", [False, True])
def test_a_network_of_the_users_own_file(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nameless: bool
) -> None:
    """Whether or not torch can write down what it is made of, for which its class needs a name."""
    source = inspect.getsource(Small).replace("channels: int, seed: int", "num_classes=5, channels=4, seed=0")
    body = textwrap.indent(f"{source}\nreturn Small()\n", "    ") if nameless else source
    head = "def make(num_classes):\n" if nameless else "make = lambda num_classes: Small()\n"
    (tmp_path / "mine.py").write_text(f"import torch\nfrom torch import Tensor, nn\n{head}{body}")
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))

    def step(compiled: bool) -> Measured:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        prepare_compiler(torch.device("cpu"))
        torch.compiler.reset()
        clear_caches()
        counters.clear()
        network = build_network(TeacherSpec(arch=f"user:{tmp_path}/mine.py:make"), 5, 3)
        one = objective({"t": Teacher("t", network, DATA, num_outputs=5)}, compiled)
        one.prepare(["t"], ["t"], batch[0][:1])
        return one.step(*batch, ["t"], ["t"])

    expected, found = step(compiled=False), step(compiled=True)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
    assert counters["stats"]
    again = step(compiled=True)
    assert torch.equal(again.gradient, found.gradient)
    assert bool(counters["stats"]) == nameless, "traced again"
    # The user edits the file: a new process, which finds what was compiled before, reads it anew.
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("silu", "softplus"))
    for name in [name for name in sys.modules if name.startswith("prism_user_")]:
        monkeypatch.delitem(sys.modules, name)
    linecache.clearcache()
    expected, found = step(compiled=False), step(compiled=True)
    assert not torch.allclose(found.gradient, again.gradient, rtol=1e-2)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_more_teachers_and_shapes_than_torch_recompiles(batch: tuple[Tensor, Tensor]) -> None:
    """torch gives up on a code object after eight; ten teachers with two shapes each have twenty."""
    for seed in range(10):
        one = objective({"t": Teacher("t", Small(2, seed), DATA, num_outputs=5)})
        one.prepare(["t"], ["t"], batch[0][:1])
        for count in (5, 3):
            one.step(batch[0][:count], batch[1][:count], ["t"], ["t"])
    assert counters["stats"]["unique_graphs"] == 20


def test_a_network_that_is_no_graph_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    one = objective({"t": Teacher("t", Choosy(2, 0), DATA, num_outputs=5)})
    one.prepare(["t"], ["t"], x[:1])
    with pytest.raises(UserError, match=r"recover\.compile: .*cannot be compiled.*set recover\.compile=false"):
        one.step(x, y, ["t"], ["t"])


def test_a_network_that_has_no_copy_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    network = Small(2, 0)
    network.later = (layer for layer in ())  # type: ignore[assignment]
    one = objective({"t": Teacher("t", network, DATA, num_outputs=5)})
    one.prepare(["t"], ["t"], x[:1])
    with pytest.raises(UserError, match=r"recover\.compile: teacher t cannot be copied \(.*generator.*\); mend it, or"):
        one.step(x, y, ["t"], ["t"])


def test_a_failure_of_the_machine_is_no_fault_of_the_teacher(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor]
) -> None:
    """Hence nothing that a search would keep as the result of a point."""
    one = objective(teachers)
    one.prepare(["t4"], ["t4"], batch[0][:1])
    says = r"recover\.compile: .*compiler.*; mend it, or set recover\.compile=false"
    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(TransientError, match=says):
        one.step(*batch, ["t4"], ["t4"])


def test_every_process_compiles_in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a library of a killed one would stop the next."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    prepare_compiler(torch.device("cpu"))
    own = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert os.path.samefile(cache_dir(), own)
    assert os.listdir(own) == []
    prepare_compiler(torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == own
    for inherited in (default_cache_dir(), "/tmp/prism-compiled-1-abc"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", inherited)
        prepare_compiler(torch.device("cpu"))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] not in (own, inherited)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/theirs")
    prepare_compiler(torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/theirs"


@pytest.mark.slow
def test_code_is_compiled_once_a_node(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A later process, with a folder of its own, calls no compiler, also where it begins with another teacher."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PRISM_CACHE", str(cache))
    built: list[str] = []
    build = CppBuilder.build

    def watched(self: CppBuilder) -> None:
        built.append(self._target_file)
        build(self)

    monkeypatch.setattr(CppBuilder, "build", watched)

    def first_steps_of_a_process(names: list[str], teachers: dict[str, Teacher] = teachers) -> dict[str, Tensor]:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        prepare_compiler(torch.device("cpu"))
        torch.compiler.reset()
        # With the libraries that this process has loaded.
        clear_caches()
        counters.clear()
        built.clear()
        found = {}
        for name in names:
            one = objective(teachers)
            one.prepare([name], [name], batch[0][:1])
            found[name] = one.step(*batch, [name], [name]).gradient
        return found

    gradients = first_steps_of_a_process(["t4", "t6"])
    assert built
    archives = [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert len(archives) == 2
    for names in (["t4", "t6"], ["t6", "t4"]):
        again = first_steps_of_a_process(names)
        assert not built
        # Nothing is traced again either.
        assert not counters["stats"]
        assert all(torch.equal(again[name], gradients[name]) for name in names)
    # Weights are the teacher's own.
    other = {"t4": Teacher("t4", Small(4, seed=99), DATA, num_outputs=5)}
    found = first_steps_of_a_process(["t4"], other)["t4"]
    assert not built
    assert not counters["stats"]
    plain = objective(other, compiled=False)
    plain.prepare(["t4"], ["t4"], batch[0][:1])
    torch.testing.assert_close(found, plain.step(*batch, ["t4"], ["t4"]).gradient, rtol=1e-4, atol=1e-7)
    # Of the same size, so that the cache does not see it.
    for path in archives:
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:1000].ljust(path.stat().st_size, b"x"))
    again = first_steps_of_a_process(["t4"])
    assert built
    assert torch.equal(again["t4"], gradients["t4"])


@pytest.mark.slow
def test_a_process_in_another_state_is_compiled_for_anew(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor]
) -> None:
    """Where torch would only say that a guard failed."""
    one, plain = objective(teachers), objective(teachers, compiled=False)
    for each in (one, plain):
        each.prepare(["t4"], ["t4"], batch[0][:1])
    expected = plain.step(*batch, ["t4"], ["t4"])
    one.step(*batch, ["t4"], ["t4"])
    traced = counters["stats"]["unique_graphs"]
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = not matmul.allow_tf32
    try:
        found = one.step(*batch, ["t4"], ["t4"])
    finally:
        matmul.allow_tf32 = not matmul.allow_tf32
    assert counters["stats"]["unique_graphs"] == traced + 1
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-7)


def test_other_settings_are_other_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An archive that does not fit would be in the way for good."""
    keys: list[object] = []

    def never(known: object, compile_it: object, network: nn.Module, x: Tensor) -> object:
        keys.append(known)
        return lambda network, x: (None, x.sum()[None])

    monkeypatch.setattr("stages.recover.compiled.kept_code", never)
    x = torch.randn(3, 3, 12, 12)
    for options, size in (({}, 12), ({"var_weight": 2.0}, 12), ({"precision": "bf16"}, 12), ({}, 16)):
        teacher = Teacher("t", Small(4, 0), DATA, num_outputs=5, input_size=size)
        tap = BNTap("t", teacher, x[:1], RecoverOptions(compile=True, **options))
        tap(x, logits=False)
        tap(x[:2], logits=False)
    assert len({json.dumps(key) for key in keys}) == len(keys) == 8


def test_an_error_of_the_compiler_is_not_taken_for_one_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    prepare_compiler(torch.device("cpu"))
    calls: list[int] = []

    def full() -> Code:
        calls.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        kept_code(["x"], full, nn.Identity(), torch.zeros(1))
    assert calls == [1]
    (tmp_path / "cache").chmod(0o777)
    kept_code(["x"], lambda: calls.append(2), nn.Identity(), torch.zeros(1))  # type: ignore[arg-type, return-value]
    assert calls == [1, 2]


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_compiler(torch.device("cpu"))
    monkeypatch.setenv("PATH", "")
    for device, name in (("cpu", r"g\+\+"), ("cuda", "gcc")):
        with pytest.raises(RunError, match=rf"recover\.compile: this machine has no compiler \({name}\); install"):
            prepare_compiler(torch.device(device))
