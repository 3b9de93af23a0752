"""A comparison from its recipe to its table: the trials that are missing are run, side by side where the cluster has room."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa.errors import nearest
from kasa.targets import Target
from pipeline.apps.compare.analysis import Findings, MethodResult, findings
from pipeline.apps.compare.methods import BASE, ChosenRate, ComparedMethod, choose_rate, entrants, recipe_for
from pipeline.apps.compare.paper import write_comparison
from pipeline.apps.compare.trials import Trial, costs, made_already, run_trial, trial, trial_keys
from pipeline.artifacts.store import Artifact, ArtifactStore
from pipeline.cluster.connection import cluster_capacity, ray_cluster
from pipeline.config.evaluate import HarnessSettings
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.console import ProgressBars
from pipeline.core.errors import RecipeError, TrainingError
from pipeline.core.files import content_digest
from pipeline.core.journal import append_journal, read_journal
from pipeline.core.provenance import code_tags
from pipeline.data.sources import DataSources, resolve_sources
from pipeline.methods.choice import check_ranks
from pipeline.metrics.catalogue import check_measurable
from pipeline.models.base import BaseModel, find_base
from pipeline.models.shapes import meta_model, model_config
from pipeline.run import graph as keys
from pipeline.run.context import NestedRun, close_context, open_context
from pipeline.run.report_facts import environment_tags
from pipeline.run.stages.evaluate import results_of
from pipeline.run.stages.train import deepspeed_settings
from pipeline.run.state import ready_workspace
from pipeline.storage.workspace import Workspace, look_into
from pipeline.tracking.runs import Tracking

FOLDER = "comparisons"
_FINISHED = "trials.jsonl"
# What a comparison with nothing else to hold against uses.
DEFAULT_AGAINST = "lora"


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        recipe: as it was given.
        methods: their names, without the base.
        seeds: of the trainings.
        rates: the learning rates to choose from for each method; none: the recipe's.
        against: the method, or the base, that all others are held against.
    """

    recipe: Recipe
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    against: str

    @property
    def name(self) -> str:
        """Of its folder and its MLflow run: the same comparison has the same."""
        values = recipe_values(self.recipe)
        values.pop("workspace")
        key = content_digest([values, self.methods, self.seeds, self.rates, self.against])
        return f"{self.recipe.name}-{key[:8]}"


@dataclass(frozen=True)
class TrialPlan:
    """A trial in a dry run: which of its stages are there, and which are to be made; both empty while that is not known."""

    name: str
    parameters: int | None
    reused: tuple[str, ...]
    made: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """A finished comparison.

    Attributes:
        folder: holds `comparison.md`, `comparison.json` and the plots.
        reused: how many of the trials had been finished before.
    """

    plan: Plan
    findings: Findings
    folder: Path
    trials: int
    reused: int
    run_id: str


def plan_comparison(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    seed_from: int | None,
    rates: Sequence[float],
    against: str | None,
) -> Plan:
    """The comparison that the options describe; of tasks of lm-evaluation-harness it runs none.

    Raises:
        RecipeError: `against` is not among the methods, or one of them cannot do with the recipe.
    """
    for method in methods:
        deepspeed_settings(recipe_for(recipe, method))
    first = recipe.train.seed if seed_from is None else seed_from
    if against is None:
        against = DEFAULT_AGAINST if DEFAULT_AGAINST in methods else BASE
    if against not in (BASE, *methods):
        raise RecipeError(
            f"--against {against} is not compared here{nearest(against, methods) or f'; choose from {BASE}, ' + ', '.join(methods)}"
        )
    evaluate = recipe.evaluate.model_copy(update={"harness": HarnessSettings()})
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    return Plan(recipe, tuple(methods), tuple(range(first, first + seeds)), tuple(rates), against)


def compare(plan: Plan, bars: ProgressBars, side_by_side: int | None = None) -> Compared:
    """Run what is missing and say what comes out; after an interruption the same call goes on.

    Args:
        side_by_side: how many trials at once at most; default: as many as the cluster has cores and GPUs for.

    Raises:
        KasaError: a mistake in the recipe, the data, the base or the environment; what was made so far is kept.
    """
    recipe = plan.recipe
    check_measurable(recipe.evaluate.measured)
    storage = ready_workspace(recipe)
    sources = resolve_sources(recipe.data, recipe.workspace)
    base = find_base(recipe.base, recipe.workspace)
    assert sources is not None
    assert base is not None
    targets = base.targets(recipe.adapter.targets)
    entered = entrants(recipe, plan.methods, targets, meta_model(base.config, recipe.base.head))
    for entrant in entered:
        check_ranks(entrant.recipe, targets)
    storage.upload_input(base.folder, base.digest)
    tracking = Tracking(recipe.workspace, recipe.name)
    tags = {**environment_tags(), **code_tags(), "kasa.comparison": plan.name}
    run_id = tracking.start_run(f"compare {plan.name}", tags, origin=f"compare.{plan.name}")
    tracking.resume_run(run_id)
    bench = _ComparisonRunner(plan, storage, base, sources, targets, bars, run_id, side_by_side)
    with tracking.open_run(run_id), ray_cluster(recipe.workspace, *keys.needed_resources(recipe)), bars.showing():
        ran = bench.run_all(entered)
        found = findings(ran, recipe.evaluate.gate_metric, recipe.evaluate.measured, plan.against, len(plan.seeds))
        write_comparison(bench.folder, plan.name, recipe, found)
        for file in bench.folder.glob("comparison.*"):
            storage.save(file)
            tracking.log_files(run_id, file)
        _log_findings(tracking, run_id, plan, found)
    return Compared(plan, found, bench.folder, bench.done, bench.reused, run_id)


def plan_trials(plan: Plan) -> list[TrialPlan]:
    """`--dry-run`: the trials, and what of them is there; makes, fetches and starts nothing.

    Raises:
        KasaError: what the comparison itself would refuse, as far as it can be seen from here.
    """
    recipe = plan.recipe
    sources = resolve_sources(recipe.data, recipe.workspace, fetch=False)
    base = find_base(recipe.base, recipe.workspace, fetch=False)
    config = model_config(recipe.base.model, recipe.base.revision, base.folder if base else None)
    if base is None or sources is None or config is None:
        names = [f"{method}, seed {seed}" for seed in plan.seeds for method in plan.methods]
        return [TrialPlan(name, None, (), ()) for name in [BASE, *names]]
    targets = base.targets(recipe.adapter.targets)
    entered = entrants(recipe, plan.methods, targets, meta_model(config, recipe.base.head))
    for entrant in entered:
        check_ranks(entrant.recipe, targets)
    store = ArtifactStore(recipe.workspace, look_into(recipe.location))

    def planned(one: Trial, parameters: int | None) -> TrialPlan:
        wanted = trial_keys(one, base.digest, sources.digest, targets)
        there = made_already(store, wanted)
        return TrialPlan(one.name, parameters, tuple(there), tuple(stage for stage in wanted if stage not in there))

    trials = [planned(Trial(BASE, recipe), None)]
    trials += [
        planned(trial(entrant, plan.seeds[0], rate, is_tuning=True), entrant.parameters)
        for rate in plan.rates
        for entrant in entered
    ]
    for seed in plan.seeds:
        for entrant in entered:
            if plan.rates:
                trials.append(TrialPlan(f"{entrant.name}, seed {seed}, at the chosen rate", entrant.parameters, (), ()))
            else:
                trials.append(planned(trial(entrant, seed, recipe.train.learning_rate), entrant.parameters))
    return trials


@dataclass
class _Outcome:
    """What became of a trial: its artifacts by stage, or why training could not go on."""

    made: Mapping[str, Artifact]
    failure: str | None = None


@dataclass
class _ComparisonRunner:
    plan: Plan
    storage: Workspace
    base: BaseModel
    sources: DataSources
    targets: Sequence[Target]
    bars: ProgressBars
    run_id: str
    side_by_side: int | None
    done: int = 0
    reused: int = 0
    total: int = 0
    _opening: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        return self.storage.folder / FOLDER / self.plan.name

    def run_all(self, entered: Sequence[ComparedMethod]) -> list[MethodResult]:
        plan = self.plan
        self.folder.mkdir(parents=True, exist_ok=True)
        self.storage.load(self.folder / _FINISHED)
        self.total = 1 + len(entered) * (len(plan.seeds) + len(plan.rates))
        base = Trial(BASE, plan.recipe)
        rates = self._tune(entered)
        trials = {
            entrant.name: [trial(entrant, seed, chosen.rate) for seed in plan.seeds]
            for entrant in entered
            if (chosen := rates[entrant.name])
        }
        # Seed by seed, so that what several methods share is made once and early.
        trained = [one for pairs in zip(*trials.values(), strict=True) for one in pairs]
        outcomes = self._run([base, *trained])
        untrained = [MethodResult(BASE, [results_of(outcomes[base.name].made[keys.EVALUATE])])]
        return untrained + [
            self._gathered(entrant, rates[entrant.name], [outcomes[one.name] for one in trials.get(entrant.name, [])])
            for entrant in entered
        ]

    def _tune(self, entered: Sequence[ComparedMethod]) -> dict[str, ChosenRate | None]:
        """The learning rate of each method; None where it diverged at all of them."""
        plan = self.plan
        if not plan.rates:
            own = ChosenRate(plan.recipe.train.learning_rate, {}, False)
            return {entrant.name: own for entrant in entered}
        trials = {
            (entrant.name, rate): trial(entrant, plan.seeds[0], rate, is_tuning=True)
            for rate in plan.rates
            for entrant in entered
        }
        outcomes = self._run(trials.values())
        losses: dict[str, dict[float, float]] = {entrant.name: {} for entrant in entered}
        for (name, rate), one in trials.items():
            if not outcomes[one.name].failure:
                losses[name][rate] = outcomes[one.name].made[keys.TRAIN].facts["validation_loss"]
        return {name: choose_rate(plan.rates, found) for name, found in losses.items()}

    def _gathered(
        self, entrant: ComparedMethod, chosen: ChosenRate | None, outcomes: Sequence[_Outcome]
    ) -> MethodResult:
        rank = None if entrant.recipe.adapter.spec.parameters is None else entrant.recipe.adapter.rank
        if chosen is None:
            return MethodResult(entrant.name, [], rank=rank, failure="training diverged at every learning rate tried")
        tuned = chosen if chosen.losses else None
        if failures := [outcome.failure for outcome in outcomes if outcome.failure]:
            return MethodResult(entrant.name, [], {}, rank, chosen.rate, tuned, failures[0])
        each = [costs(outcome.made) for outcome in outcomes]
        means = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        # Later trainings find the spectra of the first one; what they took was paid once, and is paid for each new base.
        means["start_s"] = max(one["start_s"] for one in each)
        runs = [results_of(outcome.made[keys.EVALUATE]) for outcome in outcomes]
        return MethodResult(entrant.name, runs, means, rank, chosen.rate, tuned)

    def _run(self, trials: Iterable[Trial]) -> dict[str, _Outcome]:
        """All of them, those that were finished before from the workspace; outcomes by name."""
        store = ArtifactStore(self.storage.folder, self.storage)
        finished = {record["trial"] for record in read_journal(self.folder / _FINISHED)}
        outcomes, missing = {}, []
        for one in trials:
            wanted = trial_keys(one, self.base.digest, self.sources.digest, self.targets)
            there = made_already(store, wanted) if one.name in finished else {}
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
        """How many of the trials the cluster has room for; the first of them to be run may wait for a connection."""
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
        nest = NestedRun(one.name, self.run_id, f"compare.{self.plan.name}.{one.name}")
        with self._opening:  # connecting to MLflow passes through the environment
            context = open_context(one.recipe, self.storage, bars, {"kasa.trial": one.name}, within=nest)
        with context.tracking.open_run(context.parent_run):
            context.describe_run()
            yield context
        close_context(context)

    def _count(self) -> None:
        self.done += 1
        self.bars.update("compare", self.done, self.total, "trials")


def _log_findings(tracking: Tracking, run_id: str, plan: Plan, found: Findings) -> None:
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
            name = row.ran.name.replace(":", "-")
            tracking.log_metrics(run_id, {f"{name}.{found.metric}": interval.estimate})
            if row.difference:
                tracking.log_metrics(run_id, {f"{name}.difference": row.difference.interval.estimate})
    tracking.describe(run_id, "\n\n".join([found.conclusion, *found.limits]))
