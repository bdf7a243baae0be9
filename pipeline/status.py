"""What a run has done and is doing, from its directory alone: any machine that can read it can ask."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pydantic import BaseModel

from cluster import storage
from cluster.lease import PATIENCE_BEATS, read_holder
from cluster.progress import read_progress
from cluster.record import read_record
from pipeline.context import baseline_title, methods
from pipeline.plan import plan_size
from pipeline.rundir import read_run, read_seconds
from pipeline.summary import SUMMARY_FILE
from stages.evaluate.baselines import random_real_set
from stages.evaluate.jobs import student_id
from stages.teachers.card import CARD_FILE

# Single tasks that are looked at.
MAX_TASKS = 64


class Driver(BaseModel):
    """The process that drives the run, or did last.

    Attributes:
        host, pid: which.
        since: when it took the run directory, seconds since 1970 by its clock.
        beat_age: seconds since its last sign of life, by two clocks if it is on another machine.
        alive: it gives signs of life.
        dead: it is known to have ended.
    """

    host: str
    pid: int
    since: float
    beat_age: float
    alive: bool
    dead: bool


class Task(BaseModel):
    """A unit or training that is worked on.

    Attributes:
        stage: of the task.
        task: its name.
        done, total: steps or epochs.
        message: in its own words.
        age: seconds since it said so, by the worker's clock and this one.
    """

    stage: str
    task: str
    done: float
    total: float
    message: str
    age: float


class Failure(BaseModel):
    """A unit that failed in the last session."""

    stage: str
    task: str
    reason: str


class StageStatus(BaseModel):
    """One stage.

    Attributes:
        name: of the stage.
        unit: what ``planned`` and ``done`` count.
        planned: None: not known yet.
        done, failed, retried: so far; retries are starts beyond the first of a unit.
        running: None where units do not say.
        work: what speed is counted in: ``unit``, or epochs of what is trained.
        per_hour: speed over the recent past; None while no driver works on the stage or nothing has finished.
        seconds_left: at that speed.
        gpu_hours, cpu_hours: that work took, as far as it came to an end.
        wall_hours: that drivers spent on it.
    """

    name: str
    unit: str
    planned: int | None
    done: int
    failed: int = 0
    retried: int = 0
    running: int | None = None
    work: str = ""
    per_hour: float | None = None
    seconds_left: float | None = None
    gpu_hours: float = 0
    cpu_hours: float = 0
    wall_hours: float = 0


class Status(BaseModel):
    """A run.

    Attributes:
        name, recipe, out: of the run.
        state: ``running``, ``stopped`` or ``finished``.
        stage: that a driver works on now.
        driver: None: nobody has it.
        teachers: that are there.
        stages: in order.
        running: tasks, at most ``MAX_TASKS``.
        failed: as many as are recorded.
    """

    name: str
    recipe: str
    out: str
    state: str
    stage: str | None
    driver: Driver | None
    teachers: list[str]
    stages: list[StageStatus]
    running: list[Task]
    failed: list[Failure]

    @property
    def spent(self) -> tuple[float, float, float]:
        """GPU-hours, CPU-hours and hours of drivers, over all stages."""
        stages = self.stages
        return sum(s.gpu_hours for s in stages), sum(s.cpu_hours for s in stages), sum(s.wall_hours for s in stages)


@dataclass(frozen=True)
class _Part:
    """Where to look for a stage.

    Attributes:
        name, unit: shown.
        record: name of its record and of the folder of its tasks below ``progress``.
        folder: of what it commits, None: teachers.
        suffix: of these files.
        has_tasks: whether units say how far they are.
    """

    name: str
    unit: str
    record: str
    folder: str | None
    suffix: str = ".parquet"
    has_tasks: bool = False


PARTS = [
    _Part("squeeze", "teachers", "squeeze", None, has_tasks=True),
    _Part("recover", "units", "recover", "recovered", has_tasks=True),
    _Part("relabel", "label shards", "relabel", "labels/distilled"),
    _Part("evaluate", "students", "train_students", "eval", ".json", has_tasks=True),
]


class _Reader:
    """Looks at a run directory once.

    A few dozen requests, however many units there are: what a living driver has written down is believed, and without
    one each folder is listed.
    """

    def __init__(self, out: str):
        self.out, self.config = out, read_run(out)
        self.driver = read_driver(out)
        self.alive = self.driver is not None and self.driver.alive
        baselines = [
            _Part(baseline_title(draw), "label shards", baseline_title(draw), f"labels/{random_real_set(draw)}")
            for draw in self.config.evaluate.real_draws
        ]
        self.parts = [*PARTS[:-1], *baselines, PARTS[-1]]
        self.records = {part.name: read_record(self._tasks_uri(part)) for part in self.parts}
        begun = [(record.updated, name) for name, record in self.records.items() if record and not record.ended]
        self.current = max(begun)[1] if self.alive and begun else None
        self.teachers = [
            name for name in self.config.teachers if storage.exists(storage.join(out, "teachers", name, CARD_FILE))
        ]
        self.seconds = read_seconds(out)

    def status(self) -> Status:
        """All of it."""
        tasks = [task for part in self.parts if part.name == self.current for task in self._tasks(part)]
        stages = [self._stage(part, tasks) for part in self.parts]
        complete = all(stage.planned is not None and stage.done >= stage.planned for stage in stages)
        finished = complete and storage.exists(storage.join(self.out, SUMMARY_FILE))
        return Status(
            name=self.config.name,
            recipe=self.config.recipe,
            out=self.out,
            state="running" if self.alive else "finished" if finished else "stopped",
            stage=self.current,
            driver=self.driver,
            teachers=self.teachers,
            stages=stages,
            running=tasks,
            failed=[
                Failure(stage=name, task=task, reason=reason)
                for name, record in self.records.items()
                for task, reason in (record.failed.items() if record else ())
            ],
        )

    def _stage(self, part: _Part, tasks: list[Task]) -> StageStatus:
        record, now = self.records[part.name], part.name == self.current
        found = StageStatus(
            name=part.name,
            unit=part.unit,
            planned=self._planned(part),
            done=self._done(part),
            running=len(tasks) if now and part.has_tasks else None,
            wall_hours=self._wall_seconds(part.name) / 3600,
        )
        if record is None:
            return found
        return found.model_copy(
            update={
                "failed": record.num_failed,
                "retried": record.retried,
                "work": record.unit,
                "per_hour": record.rate() if now else None,
                "seconds_left": record.seconds_left() if now else None,
                "gpu_hours": record.gpu_seconds / 3600,
                "cpu_hours": record.cpu_seconds / 3600,
            }
        )

    def _wall_seconds(self, name: str) -> float:
        record, timed = self.records[name], self.seconds.get(name, 0.0)
        if name == "relabel":
            # One stage labels all image sets.
            baselines = [self.records[baseline_title(draw)] for draw in self.config.evaluate.real_draws]
            timed -= sum(baseline.seconds for baseline in baselines if baseline)
        return max(timed, record.seconds if record else 0.0)

    def _planned(self, part: _Part) -> int | None:
        record = self.records[part.name]
        if part.name == "squeeze":
            return len(self.config.teachers)
        if part.name == "evaluate":
            return len(self._students())
        if record:
            return int(record.planned)
        return plan_size(self.out) if part.name == "recover" else None

    def _done(self, part: _Part) -> int:
        record = self.records[part.name]
        if part.folder is None:
            return len(self.teachers)
        if record and self.alive and part.name != "evaluate":
            return int(record.done)
        there = storage.list_files(storage.join(self.out, *part.folder.split("/")), part.suffix)
        if part.name == "evaluate":
            # Results of students that are no longer asked for stay where they are.
            return sum(f"{name}{part.suffix}" in there for name in self._students())
        return len(there)

    def _students(self) -> list[str]:
        config, evaluate = self.config, self.config.evaluate
        return [
            student_id(method, student, evaluate.protocol.name, seed)
            for method in methods(config)
            for student in evaluate.students
            for seed in evaluate.seeds
        ]

    def _tasks_uri(self, part: _Part) -> str:
        return storage.join(self.out, "progress", part.record)

    def _tasks(self, part: _Part) -> list[Task]:
        """What is worked on: the driver removes what is done and counted."""
        if not part.has_tasks:
            return []
        uri, record = self._tasks_uri(part), self.records[part.name]
        gone = {*record.counted, *record.failed} if record else set()
        names = [name.removesuffix(".json") for name in storage.list_files(uri, ".json")]
        read = read_progress(uri, [name for name in names if name not in gone][:MAX_TASKS])
        return [
            Task(
                stage=part.name,
                task=name,
                done=task["done"],
                total=task["total"],
                message=str(task["message"]),
                age=round(time.time() - task["time"], 1),
            )
            for name, task in read.items()
            if task["done"] < task["total"]
        ]


def read_driver(out: str) -> Driver | None:
    """Who has a run directory, or had it last; None: nobody."""
    holder = read_holder(out)
    if holder is None:
        return None
    age, dead = time.time() - holder.time, holder.dead
    return Driver(
        host=holder.host,
        pid=holder.pid,
        since=holder.since,
        beat_age=round(age, 1),
        alive=not dead and age < PATIENCE_BEATS * holder.beat_s,
        dead=dead,
    )


def read_status(out: str) -> Status:
    """Look at a run directory, local or on an object store.

    Raises:
        UserError: ``out`` holds no run.
    """
    return _Reader(out).status()
