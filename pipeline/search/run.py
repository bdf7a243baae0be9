"""``prism search``: from a configuration with a ``search`` section to the best one, and what it is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cluster import storage
from cluster.errors import RunError, UserError, some
from cluster.lease import Lease
from cluster.progress import StageProgress, console
from cluster.resources import WORKER_BYTES, ActorResources
from cluster.runner import run_ray, run_serial
from cluster.session import ray_session
from pipeline.config import Config, DataConfig
from pipeline.loading import dump_yaml, parse_yaml
from pipeline.paths import absolute
from pipeline.preflight import Ready, preflight
from pipeline.run import execute
from pipeline.rundir import differences
from pipeline.search.bench import Bench, Remembered, make_work
from pipeline.search.classes import cut_classes
from pipeline.search.fields import overrides, rung_fields
from pipeline.search.findings import planned_rungs, winner
from pipeline.search.ladder import Ladder
from pipeline.search.options import SearchOptions
from pipeline.search.report import FINAL_FILE, SEARCH_FILE, gains, read_final, write_search_report
from pipeline.search.space import Space, make_space
from pipeline.search.split import check_split, split_dataset
from pipeline.search.table import TRIALS_FILE, write_trials
from pipeline.search.trial import FOLDER, PREPARED, Trial, full_run
from pipeline.summary import SUMMARY_FILE

BEST_FILE = "best.yaml"
# Where the number of virtual machines is left open, so many results come for each of them.
LESSONS = 8
# Names of the objectives in ``Measured``, and which way is better.
OBJECTIVES = {"top1_last": ("top1", "max"), "gpu_seconds": ("gpu_seconds", "min")}


def search(config: Config, *, dry_run: bool = False, serial: bool = False) -> None:
    """Find the best point of the space, and measure it and the default in full.

    Args:
        config: with a ``search`` section.
        dry_run: check and show what would be searched.
        serial: in this process, without Ray; on one virtual machine where ``parallel`` is left open.

    Raises:
        UserError: bad input, before any work.
        RunError: too many trials failed, or something else on the way.
    """
    config = absolute(config)
    options = config.search
    if options is None:
        raise UserError(
            "search: is not given; say what to vary, e.g. search: {space: {recover.r_bn: {log: [0.1, 100]}}}"
        )
    ready = preflight(final_config(config, options))
    found = Search(config, options, ready, serial)
    check_split(ready.train, options.split.per_class, found.most_images)
    # Before the teachers are trained; Tune asks for them later.
    callbacks = found.callbacks(reach=not dry_run)
    if dry_run:
        found.show()
        return
    session = contextlib.nullcontext() if serial else ray_session(config.resources.session)
    with Lease(found.root, say=_say) as lease, session, lease.guard():
        trials = found.try_all(callbacks)
        report = write_search_report(config.out)
        best = found.best_of(trials, report)
        lease.check()
        found.finish(best)
    for student, gain in gains(read_final(config.out)).items():
        _say(f"{student}: {gain.sentence}")
    _say(f"best: {storage.join(found.root, BEST_FILE)}")
    _say(f"report: {write_search_report(config.out)}")


def final_config(config: Config, options: SearchOptions, number: int = 0) -> Config:
    """A full run, as an ordinary configuration.

    Args:
        config: of the search, at some point.
        options: of the search.
        number: of the trial at that point.
    """
    root, where = storage.join(config.out, FOLDER), full_run(number)
    # Both full runs, and the next search, train each teacher once.
    cache = config.squeeze.cache or storage.join(root, "teachers")
    return config.model_copy(
        update={
            "name": f"{config.name}-{where.rpartition('/')[2]}",
            "out": storage.join(root, *where.split("/")),
            "evaluate": config.evaluate.model_copy(update={"seeds": options.final_seeds, "baselines": []}),
            "squeeze": config.squeeze.model_copy(update={"cache": cache}),
            "search": None,
        }
    )


@dataclass(frozen=True)
class Search:
    """A checked search.

    Attributes:
        config: of the user.
        options: its ``search`` section.
        ready: what the checks found.
        serial: without Ray.
    """

    config: Config
    options: SearchOptions
    ready: Ready
    serial: bool

    @property
    def root(self) -> str:
        """Folder of all that the search makes."""
        return storage.join(self.config.out, FOLDER)

    @cached_property
    def space(self) -> Space:
        """Over the user's configuration."""
        facts = self.ready.networks
        pool = [name for name in self.config.teachers if facts[name].bn_channels and not facts[name].bn_repeated]
        return make_space(self.config, pool, self.ready.data.num_classes)

    @property
    def most_images(self) -> int:
        """Real images of a class that recovery starts from, at most."""
        tried = {variable.path: variable.axis.ends() for variable in self.space.variables}
        if "real" not in [self.config.recover.init, *tried.get("recover.init", [])]:
            return 1
        at_rungs = [overrides(self.config, rung_fields(rung)).recover.ipc for rung in self.options.rungs]
        return max([*at_rungs, *tried.get("recover.ipc", []), self.config.recover.ipc])

    def callbacks(self, reach: bool) -> Sequence[Any]:
        """What tells the trackers of the jobs.

        Args:
            reach: see whether they answer.

        Raises:
            UserError: a tracker cannot be used.
        """
        if self.serial or not self.options.trackers:
            return []
        from cluster.trackers import make_trackers

        return make_trackers(self.options.trackers, self.config.name, "search.trackers", reach=reach)

    def show(self) -> None:
        """What would be searched, and what its rungs are planned to cost."""
        _say(f"{self.config.name}: {self.options.trials} trials, objectives {', '.join(self.options.objectives)}")
        for field, dimension in self.options.space.items():
            _say(f"  {field}: {dimension.kind} {getattr(dimension, dimension.kind)}")
        bench, point = self._bench(self.space), self.space.point(self.space.defaults())
        for index, rung in enumerate(bench.rungs):
            words = ", ".join(f"{field} = {value}" for field, value in rung.items()) or "as configured"
            seconds = bench.planned(point, index)[0]
            _say(f"  rung {index + 1}: {words}; the default takes {seconds:.3g} s of an RTX 4090 by arithmetic")

    def try_all(self, callbacks: Sequence[Any] = ()) -> list[Trial]:
        """Every trial, on data and teachers of the search's own.

        Args:
            callbacks: told of the jobs.

        Raises:
            UserError: the folder holds another search, or a job fits nowhere.
            RunError: Tune gave up, or the teachers could not be trained.
        """
        kept = self._claim()
        bench = self.prepare(gpu=kept["gpus"] > 0)
        with StageProgress("search", self.options.trials, "trials") as shown:

            def tell(trial: Trial) -> None:
                write_trials(storage.join(self.config.out, TRIALS_FILE), ladder.trials)
                shown.advance(_sentence(trial, len(bench.rungs)))

            ladder = self._ladder(bench, kept, tell)
            self._run(bench, ladder, kept, callbacks)
        return ladder.trials

    def best_of(self, trials: list[Trial], report: str) -> Trial:
        """The winner.

        Args:
            trials: all.
            report: where more is said, for errors.

        Raises:
            RunError: too many trials failed, or none was measured at the last rung.
        """
        failed = [trial for trial in trials if trial.state == "failed"]
        if len(trials) - len(failed) < self.options.min_succeeded * len(trials):
            raise RunError(
                f"search: {len(failed)} of {len(trials)} trials failed, more than search.min_succeeded allows; trial "
                f"{failed[0].number}: {failed[0].reason}; all reasons are in {report}"
            )
        best = winner(trials, planned_rungs(self.options))
        if best is None:
            raise RunError(f"search: no trial was measured at the last rung ({report}); raise search.trials")
        return best

    def finish(self, best: Trial) -> None:
        """Write the best configuration; measure it and the default in full, on the test data."""
        default = final_config(self.config, self.options)
        won = final_config(self.space.apply(best.point), self.options, best.number) if best.number else default
        # As users know a run, with the baselines that a comparison with the default does without.
        evaluate = won.evaluate.model_copy(update={"baselines": self.config.evaluate.baselines})
        runnable = dump_yaml(won.model_copy(update={"evaluate": evaluate}))
        storage.write_bytes(storage.join(self.root, BEST_FILE), runnable.encode())
        for run in [default, won] if best.number else [default]:
            execute(run, serial=self.serial)
        found = {
            "default": {"out": default.out, "top1": _accuracies(default)},
            "winner": {"number": best.number, "out": won.out, "top1": _accuracies(won)},
        }
        storage.write_json(storage.join(self.config.out, FINAL_FILE), found)

    def _bench(self, space: Space, gpu: bool = False) -> Bench:
        ready = self.ready
        return Bench(space, self.options, ready.networks, ready.students, ready.data.num_classes, gpu)

    def _claim(self) -> dict[str, Any]:
        """Write ``search.yaml``; returns what stays as at the first start of this search, for the table hangs on it.

        ``parallel`` = virtual machines, ``gpus`` = of a job, ``trials`` = by which the sampler plans.
        """
        where, options = storage.join(self.config.out, SEARCH_FILE), self.options
        evaluate = self.config.evaluation()
        # Trials have seeds of their own and no baselines; the full runs may get more.
        del evaluate["seeds"], evaluate["baselines"]
        content = {
            **self.config.identity(),
            "evaluate": evaluate,
            # A longer search goes on where a shorter one ended.
            "search": options.model_dump(mode="json", exclude={"trials", "final_seeds", "min_succeeded", "trackers"}),
            "data_fingerprints": self.ready.fingerprints,
        }
        if storage.exists(where):
            kept = parse_yaml(storage.read_bytes(where), where)["provenance"]
            changed = differences(kept["content"], content)
            if changed:
                raise UserError(
                    f"out: {self.config.out} holds another search; it differs in {some(changed)}; choose another out"
                )
        else:
            parallel, gpus = self._room()
            kept = {"parallel": parallel, "gpus": gpus, "trials": options.trials, "content": content}
        claimed = dump_yaml(self.config.model_copy(update={"provenance": kept}))
        storage.write_bytes(where, claimed.encode())
        _say(f"search: {options.trials} trials on {kept['parallel']} virtual machines, {kept['gpus']:g} GPUs a job")
        return kept

    def _room(self) -> tuple[int, float]:
        """Virtual machines and GPUs of a job, by what the cluster can hold."""
        options = self.options
        if self.serial:
            return options.parallel or 1, options.gpus or 0.0
        from cluster.capacity import read_capacity

        capacity = read_capacity()
        gpus = options.gpus if options.gpus is not None else float(capacity.gpus > 0)
        room = capacity.room(options.cpus, gpus)
        if not room:
            raise UserError(
                f"search: a job asks for {options.cpus:g} CPUs and {gpus:g} GPUs, but no node has as many; lower "
                "search.cpus or search.gpus"
            )
        if not gpus:
            room = max(1, int(min(capacity.memory / WORKER_BYTES, room)))
        # The more at once, the less each suggestion has learnt from: of 24 at once, nothing.
        return options.parallel or min(room, max(1, options.trials // LESSONS)), gpus

    def prepare(self, gpu: bool = False) -> Bench:
        """Cut the split and train teachers without it; returns the bench of jobs on the split."""
        cut = self._cut()
        # The same points over other data, so nothing is to be checked anew.
        bench = self._bench(Space(cut, self.space.variables), gpu)
        bench = replace(bench, subsets=self._subsets(bench))
        # Last, because it may take hours: want of room for the images shows before.
        execute(cut.model_copy(update={"search": None}), ["squeeze"], serial=self.serial)
        return bench

    def _cut(self) -> Config:
        """The configuration with the split as its data."""
        train, val = split_dataset(
            self.ready.train,
            storage.join(self.root, "data"),
            self.options.split.per_class,
            self.config.seed,
            run_serial if self.serial else run_ray,
            ActorResources(gpus=0),
            need=self.most_images,
        )
        data = self.config.data.model_copy(update={"train": train, "val": val})
        evaluate = self.config.evaluate.model_copy(update={"baselines": []})
        out = storage.join(self.root, PREPARED)
        return self.config.model_copy(update={"out": out, "data": data, "evaluate": evaluate})

    def _subsets(self, bench: Bench) -> dict[int, DataConfig]:
        """Cut the data of rungs with fewer than all classes out of the split's."""
        counts = {bench.classes(rung) for rung in range(len(bench.rungs))} - {bench.num_classes}
        return {
            count: cut_classes(
                bench.space.config.data,
                storage.join(self.root, "data", f"classes-{count}"),
                count,
                self.config.seed,
                run_serial if self.serial else run_ray,
                ActorResources(gpus=0),
            )
            for count in sorted(counts)
        }

    def _ladder(self, bench: Bench, kept: dict[str, Any], tell: Callable[[Trial], None]) -> Ladder:
        from cluster.tune import Halving, Sampler

        space = bench.space
        chosen = dict(OBJECTIVES[name] for name in self.options.objectives)
        sampler = Sampler(
            space.suggest, space.defaults(), self.options.sampler, chosen, kept["trials"], self.config.seed
        )

        def observe(trial: Trial) -> None:
            found = bench.lesson(trial)
            sampler.observe(trial.number, {name: getattr(found, name) for name in chosen} if found else None)

        return Ladder(
            sampler.suggest,
            observe,
            Halving(len(bench.rungs), self.options.reduction_factor).goes_on,
            space.point,
            bench.planned,
            trials=self.options.trials,
            rungs=len(bench.rungs),
            parallel=kept["parallel"],
            tell=tell,
        )

    def _run(self, bench: Bench, ladder: Ladder, kept: dict[str, Any], callbacks: Sequence[Any]) -> None:
        from cluster.tune import run_here, run_tune

        work, jobs = make_work(self.root, bench), Remembered(ladder, self.root, bench)
        if jobs.finished:
            return
        if self.serial:
            run_here(work, jobs)
        else:
            run_tune(work, jobs, self.root, self.options.cpus, kept["gpus"], kept["parallel"], callbacks)


def _sentence(trial: Trial, rungs: int) -> str:
    if trial.state == "failed":
        return f"trial {trial.number} failed: {trial.reason}"
    return f"trial {trial.number}: {trial.rungs[-1].top1:.2f} % at rung {len(trial.rungs)} of {rungs}"


def _accuracies(config: Config) -> dict[str, list[float]]:
    """Student → top-1 after the last epoch of every seed."""
    found: dict[str, list[float]] = {}
    for result in storage.read_json(storage.join(config.out, SUMMARY_FILE))["results"]:
        found.setdefault(result["student"], []).append(result["top1_last"])
    return found


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
