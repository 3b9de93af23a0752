"""Running a comparison: the missing trials, side by side where the cluster has room, then the table and the report.

Tuning a recipe's learning rate is the first half of a comparison of one method.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa.targets import Target
from pipeline.apps.compared_methods import (
    BASE,
    ChosenRate,
    ComparedMethod,
    ComparisonPlan,
    Trial,
    choose_rate,
    compared_methods,
    costs,
    made_already,
    run_trial,
    trial,
    trial_keys,
)
from pipeline.apps.comparison_analysis import Findings, MethodResult, findings, write_comparison
from pipeline.cluster.connection import cluster_capacity, ray_cluster
from pipeline.config.recipe import recipe_values
from pipeline.core.code import code_tags
from pipeline.core.console import ProgressBars
from pipeline.core.errors import TrainingError
from pipeline.core.files import append_journal, read_journal
from pipeline.data.first_rows import check_first_rows
from pipeline.data.sources import DataSources, resolve_sources
from pipeline.methods.choice import check_ranks
from pipeline.models.base import BaseModel, find_base
from pipeline.models.loading import empty_base
from pipeline.run import graph as keys
from pipeline.run.context import NestedRun, alone, close_context, open_context, ready_workspace
from pipeline.run.preflight import check_before_work, check_lengths
from pipeline.run.report_facts import environment_tags
from pipeline.run.stages.evaluate import results_of
from pipeline.storage.artifacts import Artifact, ArtifactStore
from pipeline.storage.workspace import Workspace
from pipeline.tracking.runs import Tracking

FOLDER = "comparisons"
_FINISHED = "trials.jsonl"


@dataclass(frozen=True)
class Compared:
    """A finished comparison.

    Attributes:
        plan: what was compared.
        findings: the result.
        folder: holds `comparison.md`, `comparison.json` and the plots.
        trials: number of trials.
        reused: how many of them had been finished before.
        run_id: the comparison's MLflow run.
    """

    plan: ComparisonPlan
    findings: Findings
    folder: Path
    trials: int
    reused: int
    run_id: str


def compare(plan: ComparisonPlan, bars: ProgressBars, side_by_side: int | None = None) -> Compared:
    """Run the missing trials and compare the results; after an interruption the same call resumes.

    Args:
        plan: what to compare.
        bars: where progress is shown.
        side_by_side: most trials at once; None runs as many as the cluster has cores and GPUs for.

    Raises:
        KasaError: a mistake in the recipe, the data, the base or the environment; finished artifacts are kept.
    """
    with _trials_of(plan, "compare", bars, side_by_side) as (runner, methods):
        results = runner.run_all(methods)
        recipe, evaluate = plan.recipe, plan.recipe.evaluate
        found = findings(results, evaluate.gate_metric, evaluate.measured, plan.against, len(plan.seeds))
        write_comparison(runner.folder, plan.name, recipe, found)
        for file in runner.folder.glob("comparison.*"):
            runner.storage.save(file)
            runner.tracking.log_files(runner.run_id, file)
        _log_findings(runner.tracking, runner.run_id, plan, found)
    return Compared(plan, found, runner.folder, runner.done, runner.reused, runner.run_id)


def tune(plan: ComparisonPlan, bars: ProgressBars, side_by_side: int | None = None) -> ChosenRate:
    """Train the plan's one method at each of its rates; after an interruption the same call resumes.

    The training at the chosen rate is what a run of the recipe with that rate reuses.

    Raises:
        KasaError: as `compare`; or training diverged at every rate.
    """
    with _trials_of(plan, "tune", bars, side_by_side) as (runner, methods):
        (chosen,) = runner.tune(methods).values()
    if chosen is None:
        rates = ", ".join(f"{rate:g}" for rate in plan.rates)
        raise TrainingError(f"training diverged at every learning rate tried ({rates}); name smaller ones")
    return chosen


@contextmanager
def _trials_of(
    plan: ComparisonPlan, kind: str, bars: ProgressBars, side_by_side: int | None
) -> Iterator[tuple[_ComparisonRunner, list[ComparedMethod]]]:
    """What runs the plan's trials, and its methods, on a cluster and within the MLflow run `KIND NAME`."""
    recipe = plan.recipe
    check_before_work(recipe).require()
    storage = ready_workspace(recipe)
    sources = resolve_sources(recipe.data, recipe.workspace)
    assert sources is not None
    check_first_rows(recipe.data, sources.sides, recipe.base.head)
    base = find_base(recipe.base, recipe.workspace)
    assert base is not None
    targets = base.targets(recipe.adapter.targets)
    methods = compared_methods(recipe, plan.methods, targets, empty_base(base.folder, recipe.base.head))
    for method in methods:
        check_ranks(method.recipe, targets)
    check_lengths(recipe, base.context_tokens)
    for remark in base.remarks:
        bars.say(f"base: {remark}")
    storage.upload_input(base.folder, base.digest, base.check_unchanged)
    with alone(storage, f"{kind} {plan.name}", f"the comparison {plan.name}"):
        tracking = Tracking(recipe.workspace, recipe.name)
        tags = {**environment_tags(), **code_tags(), "kasa.comparison": plan.name}
        run_id = tracking.start_run(f"{kind} {plan.name}", tags, origin=f"{kind}.{plan.name}")
        tracking.resume_run(run_id)
        runner = _ComparisonRunner(plan, kind, storage, base, sources, targets, bars, tracking, run_id, side_by_side)
        with tracking.open_run(run_id), ray_cluster(recipe.workspace, *keys.needed_resources(recipe)), bars.showing():
            yield runner, methods


@dataclass
class _Outcome:
    """The end of a trial: its artifacts by stage, or why its training failed."""

    made: Mapping[str, Artifact]
    failure: str | None = None


@dataclass
class _ComparisonRunner:
    """Runs the trials of one comparison.

    Attributes:
        kind: `compare`, or `tune` where only a learning rate is chosen.
        done: trials finished, those of earlier calls included.
        reused: trials finished by earlier calls.
        total: trials of the comparison.
    """

    plan: ComparisonPlan
    kind: str
    storage: Workspace
    base: BaseModel
    sources: DataSources
    targets: Sequence[Target]
    bars: ProgressBars
    tracking: Tracking
    run_id: str
    side_by_side: int | None
    done: int = 0
    reused: int = 0
    total: int = 0
    _opening: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """The comparison's folder in the workspace."""
        return self.storage.folder / FOLDER / self.plan.name

    def run_all(self, methods: Sequence[ComparedMethod]) -> list[MethodResult]:
        """Run or find all trials; the results, the base's first."""
        plan = self.plan
        self.total = 1 + len(methods) * len(plan.seeds)
        base = Trial(BASE, plan.recipe)
        rates = self.tune(methods)
        trials = {
            method.name: [trial(method, seed, chosen.rate) for seed in plan.seeds]
            for method in methods
            if (chosen := rates[method.name])
        }
        # Seed by seed, so that artifacts that several methods share are computed once, and early.
        trained = [one for pairs in zip(*trials.values(), strict=True) for one in pairs]
        outcomes = self._run([base, *trained])
        untrained = [MethodResult(BASE, [results_of(outcomes[base.name].made[keys.EVALUATE])])]
        return untrained + [
            self._result(method, rates[method.name], [outcomes[one.name] for one in trials.get(method.name, [])])
            for method in methods
        ]

    def tune(self, methods: Sequence[ComparedMethod]) -> dict[str, ChosenRate | None]:
        """The learning rate of each method; None where it diverged at all of them."""
        plan = self.plan
        self.total += len(methods) * len(plan.rates)
        if not plan.rates:
            own = ChosenRate(plan.recipe.train.learning_rate, {}, False)
            return {method.name: own for method in methods}
        trials = {
            (method.name, rate): trial(method, plan.seeds[0], rate, is_tuning=True)
            for rate in plan.rates
            for method in methods
        }
        outcomes = self._run(trials.values())
        losses: dict[str, dict[float, float]] = {method.name: {} for method in methods}
        for (name, rate), one in trials.items():
            if not outcomes[one.name].failure:
                losses[name][rate] = outcomes[one.name].made[keys.TRAIN].facts["validation_loss"]
        return {name: choose_rate(plan.rates, found) for name, found in losses.items()}

    def _result(self, method: ComparedMethod, chosen: ChosenRate | None, outcomes: Sequence[_Outcome]) -> MethodResult:
        rank = None if method.recipe.adapter.spec.parameters is None else method.recipe.adapter.rank
        if chosen is None:
            return MethodResult(method.name, [], rank=rank, failure="training diverged at every learning rate tried")
        tuned = chosen if chosen.losses else None
        if failures := [outcome.failure for outcome in outcomes if outcome.failure]:
            return MethodResult(method.name, [], {}, rank, chosen.rate, tuned, failures[0])
        each = [costs(outcome.made) for outcome in outcomes]
        means = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        # Only the first training waited for the spectra, which the later ones reuse; a new base would need them once.
        means["start_s"] = max(one["start_s"] for one in each)
        runs = [results_of(outcome.made[keys.EVALUATE]) for outcome in outcomes]
        return MethodResult(method.name, runs, means, rank, chosen.rate, tuned)

    def _run(self, trials: Iterable[Trial]) -> dict[str, _Outcome]:
        """Run trials, or find them in the workspace; their outcomes by name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.storage.load(self.folder / _FINISHED)
        store = ArtifactStore(self.storage.folder, self.storage)
        finished = {record["trial"] for record in read_journal(self.folder / _FINISHED)}
        outcomes, missing = {}, []
        for one in trials:
            wanted = trial_keys(one, self.base.digest, self.sources.digest, self.targets, self.base.drops)
            there = made_already(store.reuse, wanted) if one.name in finished else {}
            if len(there) == len(wanted):
                outcomes[one.name] = _Outcome(there)
                self.reused += 1
                self._count()
            else:
                missing.append(one)
        with ThreadPoolExecutor(self._at_once(missing), "trial") as pool:
            futures = {pool.submit(self._run_one, one): one for one in missing}
            try:
                for future in as_completed(futures):
                    one = futures[future]
                    outcomes[one.name] = future.result()
                    if not outcomes[one.name].failure:
                        append_journal(self.folder / _FINISHED, [{"trial": one.name}])
                        self.storage.save(self.folder / _FINISHED)
                    self._count()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return outcomes

    def _at_once(self, trials: Sequence[Trial]) -> int:
        """How many of the trials run at once, by the cluster's capacity."""
        if len(trials) < 2 or self.side_by_side == 1:
            return 1
        cpus, gpus = cluster_capacity()
        needed_cpus, needed_gpus = keys.needed_resources(self.plan.recipe)
        fits = min(cpus // needed_cpus, gpus // needed_gpus if needed_gpus else len(trials))
        return max(1, min(int(fits), len(trials), self.side_by_side or len(trials)))

    def _run_one(self, one: Trial) -> _Outcome:
        with self.bars.labelled(one.name) as bars, self._opened(one, bars) as context:
            try:
                made = run_trial(context, one, self.base, self.sources, self.targets)
            except TrainingError as error:
                bars.say(str(error))
                context.tracking.tag(context.parent_run, {"kasa.failure": str(error)})
                return _Outcome({}, str(error))
            if keys.EVALUATE in made:
                context.tracking.log_metrics(context.parent_run, made[keys.EVALUATE].facts["metrics"])
            return _Outcome(made)

    @contextmanager
    def _opened(self, one: Trial, bars: ProgressBars) -> Iterator[Any]:
        nested = NestedRun(one.name, self.run_id, f"{self.kind}.{self.plan.name}.{one.name}")
        with self._opening:  # MLflow is configured through the environment, which threads share
            context = open_context(one.recipe, self.storage, bars, {"kasa.trial": one.name}, within=nested)
        with context.tracking.open_run(context.parent_run):
            context.describe_run()
            yield context
        close_context(context)

    def _count(self) -> None:
        self.done += 1
        self.bars.update(self.kind, self.done, self.total, "trials")


def _log_findings(tracking: Tracking, run_id: str, plan: ComparisonPlan, found: Findings) -> None:
    tracking.log_parameters(
        run_id,
        {
            "recipe": recipe_values(plan.recipe),
            "methods": ",".join(plan.methods),
            "seeds": ",".join(map(str, plan.seeds)),
            "against": plan.against,
            "metric": found.metric,
        },
    )
    for row in found.rows:
        if interval := row.metrics.get(found.metric):
            # MLflow takes no colon in the name of a metric on some systems.
            name = row.result.name.replace(":", "-")
            tracking.log_metrics(run_id, {f"{name}.{found.metric}": interval.estimate})
            if row.difference:
                tracking.log_metrics(run_id, {f"{name}.difference": row.difference.interval.estimate})
    tracking.describe(run_id, "\n\n".join([found.conclusion, *found.limits]))
