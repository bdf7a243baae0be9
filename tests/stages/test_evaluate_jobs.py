"""Job planning: names, hashes, baselines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.evaluate.jobs import StudentJob, plan_jobs
from stages.evaluate.options import EvaluateOptions, Protocol
from stages.teachers.options import NetworkSpec

OPTIONS = EvaluateOptions(
    students={
        "resnet18": NetworkSpec(arch="builtin:resnet18"),
        "conv": NetworkSpec(arch="builtin:convnet_d3"),
    },
    seeds=[0, 5],
    protocol=Protocol(name="kl20", loss="kl", val_every=4),
)


def jobs(method: str = "prism", **changes: Any) -> list[StudentJob]:
    fields: dict[str, Any] = {
        "recipe": "prism",
        "images_uri": "/a/images",
        "labels_uri": "/a/labels",
        "epochs": 10,
        "ipc": 1,
        "inputs_sha": "x",
    }
    return plan_jobs(OPTIONS, method, **{**fields, **changes})


def test_every_student_with_every_seed_under_a_file_safe_name() -> None:
    ids = [job.id for job in jobs()]
    assert ids == [
        "prism--resnet18--kl20--s0",
        "prism--resnet18--kl20--s5",
        "prism--conv--kl20--s0",
        "prism--conv--kl20--s5",
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in ids)


def test_hard_label_changes_the_loss_alone() -> None:
    (hard, *_), (soft, *_) = jobs("hard_label"), jobs()
    assert hard.protocol == soft.protocol.model_copy(update={"loss": "ce"})
    assert soft.protocol.loss == "kl"
    assert jobs("random_real")[0].protocol == soft.protocol


def test_a_student_from_before_there_was_a_choice_of_precision_is_the_same() -> None:
    before = jobs()[0]
    assert "precision" in before.model_dump()["protocol"]
    others = [
        before.model_copy(update={"protocol": before.protocol.model_copy(update={"precision": precision})})
        for precision in ("fp32", "tf32", "bf16")
    ]
    fp32, tf32, bf16 = (job.content_sha for job in others)
    assert before.content_sha == tf32
    assert len({fp32, tf32, bf16}) == 3
    # Recorded when there was none.
    assert before.content_sha == "6e0d84b373cb8839c57ae506b4ff9a22274647773cc9922c0c774397cc4b5608"


def test_content_hash_knows_what_matters() -> None:
    base = jobs()[0].content_sha
    assert jobs(images_uri="/moved/images", labels_uri="s3://moved/labels")[0].content_sha == base
    others = [
        jobs("other")[0], jobs(epochs=11)[0], jobs(ipc=2)[0], jobs(inputs_sha="y")[0], jobs(workers=2)[0],
        jobs()[1], jobs()[2],
        jobs("hard_label")[0],
    ]  # fmt: skip
    hashes = {job.content_sha for job in others}
    assert len(hashes) == len(others)
    assert base not in hashes


def test_users_code_counts_and_not_where_it_lies(tmp_path: Path) -> None:
    def sha(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "net.py"
        file.write_text(text)
        options = OPTIONS.model_copy(update={"students": {"mine": NetworkSpec(arch=f"user:{file}:net")}})
        return plan_jobs(
            options, "prism", recipe="prism", images_uri="/i", labels_uri="/l", epochs=1, ipc=1, inputs_sha="x"
        )[0].content_sha

    assert sha("here", "def net(): ...") == sha("there", "def net(): ...") != sha("here", "def net(): return 1")


@pytest.mark.parametrize(
    ("epochs", "every", "expected"), [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (3, 10, [3]), (3, 1, [1, 2, 3])]
)
def test_last_epoch_is_always_validated(epochs: int, every: int, expected: list[int]) -> None:
    job = jobs(epochs=epochs)[0]
    assert job.model_copy(update={"protocol": Protocol(val_every=every)}).val_epochs == expected


def test_names_that_would_leave_the_folder_are_refused() -> None:
    with pytest.raises(ValidationError, match="method"):
        jobs("../prism")


def test_jobs_survive_json() -> None:
    job = jobs()[0]
    assert StudentJob.model_validate_json(job.model_dump_json()) == job
