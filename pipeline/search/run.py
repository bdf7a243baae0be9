"""``prism search``: from a configuration with a ``search`` section to the best one, and what it is worth."""

from __future__ import annotations

from cluster import storage
from cluster.capacity import read_capacity
from cluster.errors import RunError, UserError
from cluster.lease import Lease
from cluster.progress import StageProgress, console
from cluster.resources import ActorResources
from cluster.runner import run_ray
from cluster.session import ray_session
from pipeline.config import Config
from pipeline.loading import dump_yaml, parse_yaml
from pipeline.paths import absolute
from pipeline.preflight import Ready, check_networks, preflight
from pipeline.run import execute
from pipeline.rundir import differences
from pipeline.search.bench import Bench
from pipeline.search.fields import overrides
from pipeline.search.findings import planned_rungs, winner
from pipeline.search.ladder import Ladder
from pipeline.search.measure import PREPARED
from pipeline.search.options import SearchOptions
from pipeline.search.report import write_search_report
from pipeline.search.sampler import Sampler
from pipeline.search.space import Space, make_space
from pipeline.search.split import check_split, split_dataset
from pipeline.search.table import write_trials
from pipeline.search.trial import Trial
from pipeline.search.tuning import run_tune
from pipeline.summary import SUMMARY_FILE

FOLDER = "search"
SEARCH_FILE, TRIALS_FILE, BEST_FILE, FINAL_FILE = "search.yaml", "trials.parquet", "best.yaml", "final.json"


def search(config: Config, *, dry_run: bool = False) -> None:
    """Find the best point of the space, and measure it and the default in full.

    Args:
        config: with a ``search`` section.
        dry_run: check and show what would be searched.

    Raises:
        UserError: bad input, before any work.
        RunError: too many trials failed, or something else on the way.
    """
    config = absolute(config)
    options = config.search
    if options is None:
        raise UserError(
            "search: the configuration has no such section; add one, e.g. search: {space: {recover.r_bn: {log: [0.1, "
            "100]}}}"
        )
    root = storage.join(config.out, FOLDER)
    ready = preflight(final_config(config, "default"))
    pool = [name for name, facts in ready.networks.items() if facts.bn_channels]
    space = make_space(config, pool)
    check_split(ready.train, options.split.per_class, _most_images(config, options))
    if dry_run:
        _show(config, options, ready, space)
        return
    with Lease(root, say=_say) as lease, ray_session(config.resources.session), lease.guard():
        parallel, gpus = _claim(root, config, options, ready)
        prepared = _prepare(root, config, options, ready)
        trials = _try(root, prepared, options, ready, pool, parallel, gpus)
        best = _best(trials, options)
        where = storage.join(root, BEST_FILE)
        found = final_config(space.apply(best.point), "best" if best.number else "default")
        # The full run as users know it, with the baselines that a comparison with the default does without.
        evaluate = found.evaluate.model_copy(update={"baselines": config.evaluate.baselines})
        storage.write_bytes(where, dump_yaml(found.model_copy(update={"evaluate": evaluate})).encode())
        _finish(root, final_config(config, "default"), best.number, found)
    _say(f"best: {where}")
    _say(f"report: {write_search_report(config.out)}")


def final_config(config: Config, name: str) -> Config:
    """A full run, as an ordinary configuration.

    Args:
        config: of the search, at some point.
        name: of the run's folder below the search's.
    """
    assert config.search is not None
    root = storage.join(config.out, FOLDER)
    evaluate = config.evaluate.model_copy(update={"seeds": config.search.final_seeds, "baselines": []})
    # Both full runs, and the search's own teachers where they are the same, train each teacher once.
    cache = config.squeeze.cache or storage.join(root, "teachers")
    return config.model_copy(
        update={
            "name": f"{config.name}-{name}",
            "out": storage.join(root, "final", name),
            "evaluate": evaluate,
            "squeeze": config.squeeze.model_copy(update={"cache": cache}),
            "search": None,
        }
    )


def _claim(root: str, config: Config, options: SearchOptions, ready: Ready) -> tuple[int, float]:
    """Write ``search.yaml``; returns virtual machines and GPUs of a job, those of an earlier start of this search.

    Raises:
        UserError: the folder holds another search, or a job fits nowhere.
    """
    where = storage.join(root, SEARCH_FILE)
    content = {
        **config.identity(),
        "evaluate": config.evaluate.model_dump(mode="json"),
        # A longer search goes on where a shorter one ended.
        "search": options.model_dump(mode="json", exclude={"trials", "final_seeds"}),
        "data_fingerprints": ready.fingerprints,
    }
    if storage.exists(where):
        kept = parse_yaml(storage.read_bytes(where), where)["provenance"]
        changed = differences(kept["content"], content)
        if changed:
            names = ", ".join(changed[:6]) + (" …" if len(changed) > 6 else "")
            raise UserError(f"out: {config.out} holds another search; it differs in {names}; choose another out")
        return kept["parallel"], kept["gpus"]
    capacity = read_capacity()
    gpus = options.gpus if options.gpus is not None else float(capacity.gpus > 0)
    room = capacity.room(options.cpus, gpus)
    if not room:
        raise UserError(
            f"search: a job asks for {options.cpus:g} CPUs and {gpus:g} GPUs, but no node has as many; lower "
            "search.cpus or search.gpus"
        )
    parallel = options.parallel or min(room, options.trials)
    provenance = {"parallel": parallel, "gpus": gpus, "content": content}
    storage.write_bytes(where, dump_yaml(config.model_copy(update={"provenance": provenance})).encode())
    return parallel, gpus


def _prepare(root: str, config: Config, options: SearchOptions, ready: Ready) -> Config:
    """Cut the search split and train the teachers without it; returns the configuration with the split as its data."""
    train, val = split_dataset(
        ready.train,
        storage.join(root, "data"),
        options.split.per_class,
        config.seed,
        run_ray,
        ActorResources(gpus=0),
        need=_most_images(config, options),
    )
    prepared = config.model_copy(
        update={
            "out": storage.join(root, PREPARED),
            "data": config.data.model_copy(update={"train": train, "val": val}),
            "search": None,
        }
    )
    execute(prepared, ["squeeze"])
    return prepared


def _most_images(config: Config, options: SearchOptions) -> int:
    """Real images of a class that recovery starts from, at most."""
    if config.recover.init != "real":
        return 1
    return max([overrides(config, rung).recover.ipc for rung in options.rungs] + [config.recover.ipc])


def _try(
    root: str,
    prepared: Config,
    options: SearchOptions,
    ready: Ready,
    pool: list[str],
    parallel: int,
    gpus: float,
) -> list[Trial]:
    """All trials."""
    space = make_space(prepared.model_copy(update={"search": options}), pool)
    bench = Bench(space, options, ready.networks, ready.students, ready.data.num_classes)
    sampler = Sampler(
        space.suggest,
        space.defaults(),
        options.sampler,
        [{"top1_last": "top1"}.get(name, name) for name in options.objectives],
        options.trials,
        prepared.seed,
    )
    where = storage.join(root, TRIALS_FILE)
    with StageProgress("search", options.trials, "trials") as shown:

        def tell(trial: Trial) -> None:
            write_trials(where, ladder.trials)
            shown.advance(_sentence(trial, len(bench.rungs)))

        ladder = Ladder(
            sampler.suggest,
            sampler.observe,
            space.point,
            bench.planned,
            trials=options.trials,
            rungs=len(bench.rungs),
            parallel=parallel,
            reduction_factor=options.reduction_factor,
            tell=tell,
        )
        return run_tune(root, bench, ladder, gpus)


def _sentence(trial: Trial, rungs: int) -> str:
    if trial.state == "failed":
        return f"trial {trial.number} failed: {trial.reason}"
    return f"trial {trial.number}: {trial.rungs[-1].top1:.2f} % at rung {len(trial.rungs)} of {rungs}"


def _best(trials: list[Trial], options: SearchOptions) -> Trial:
    """The winner, if there were trials enough.

    Raises:
        RunError: too many trials failed, or none was measured at the last rung.
    """
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(trials) - len(failed) < options.min_succeeded * len(trials):
        raise RunError(
            f"search: {len(failed)} of {len(trials)} trials failed, more than search.min_succeeded allows; trial "
            f"{failed[0].number}: {failed[0].reason}"
        )
    best = winner(trials, planned_rungs(options))
    if best is None:
        raise RunError("search: no trial was measured at the last rung; raise search.trials")
    return best


def _finish(root: str, default: Config, number: int, best: Config) -> None:
    """Default and winner, trial ``number``, in full; these see the test data."""
    for run in [default, best] if number else [default]:
        execute(run)
    found = {name: {"out": run.out, "top1": _accuracies(run)} for name, run in (("default", default), ("winner", best))}
    storage.write_json(storage.join(root, FINAL_FILE), {**found, "winner": {"number": number, **found["winner"]}})


def _accuracies(config: Config) -> dict[str, list[float]]:
    """Student → top-1 after the last epoch of every seed."""
    found: dict[str, list[float]] = {}
    for result in storage.read_json(storage.join(config.out, SUMMARY_FILE))["results"]:
        found.setdefault(result["student"], []).append(result["top1_last"])
    return found


def _show(config: Config, options: SearchOptions, ready: Ready, space: Space) -> None:
    """What would be searched, and what the rungs are planned to cost."""
    networks = check_networks(config, ready.data.num_classes)
    bench = Bench(space, options, networks, ready.students, ready.data.num_classes)
    _say(f"{config.name}: {options.trials} trials, {options.sampler}, objectives {', '.join(options.objectives)}")
    for field, dimension in options.space.items():
        kind = dimension.kind
        _say(f"  {field}: {kind} {getattr(dimension, kind)}")
    point = space.point(space.defaults())
    for index, rung in enumerate(bench.rungs):
        words = ", ".join(f"{field} = {value}" for field, value in rung.items()) or "as configured"
        _say(f"  rung {index + 1}: {words}; about {bench.planned(point, index)[0]:.3g} GPU-seconds for the default")


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
