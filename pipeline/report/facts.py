"""The contents of a report as plain values, how numbers are written on the page, and figures as inline SVG.

Rendering needs no tracking server and no model. Matplotlib draws in stand-in colours, one for each role; the SVG names a CSS
variable instead, so that one drawing takes the page's colours in light, dark and print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from pipeline.metrics.catalogue import METRICS, SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.evaluation.results import HarnessRow
    from pipeline.metrics.intervals import Interval


ACRONYMS = frozenset({"cpu", "cpus", "gpu", "gpus", "id", "os", "sha256", "uri", "url"})
MINUS = "\u2212"
# Any distinct colours do that no drawing would use by chance.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "rule": "#010205",
    "base": "#010206",
    "adapted": "#010207",
    "champion": "#010208",
    "better": "#010209",
    "worse": "#01020a",
    "extra": "#01020b",
    "paper": "#01020c",
}
FONT_SIZE = 11
MAX_ENLARGEMENT = 1.3


@dataclass(frozen=True)
class StageFacts:
    """One stage of the run; `status` is `computed` or `reused`."""

    name: str
    status: str
    seconds: float
    key: str
    mlflow_run_id: str


@dataclass(frozen=True)
class LayerFacts:
    """What one adapted weight learned, beside what it lost.

    Attributes:
        name: name of the layer.
        learned: singular values of the update s * B diag(d) A, in the weight's units, descending.
        dropped: singular values that truncation took from the base weight, likewise.
        largest: the base weight's largest singular value; None where nothing was dropped, and so no weight decomposed.
        output_share: share of the energy of the layer's output that truncation takes, on held-out text.
    """

    name: str
    learned: list[float]
    dropped: list[float]
    largest: float | None
    output_share: float


@dataclass(frozen=True)
class TruncationFacts:
    """The cost of the truncation before training: mean losses in nats over `tokens` held-out tokens.

    `worst` has the layers that lose the largest share of their output, each with the loss when it alone is truncated. With a
    new head (`below_head`) the loss is the share of the head's input features that changes.
    """

    rule: str
    rank: int
    tokens: int
    base_loss: float
    truncated_loss: float
    worst: list[tuple[str, float]]
    warning: str | None
    below_head: bool = False

    @property
    def cost(self) -> float:
        """The rise of the loss in nats per token."""
        return self.truncated_loss - self.base_loss


@dataclass(frozen=True)
class SampleFacts:
    """One held-out prompt with each candidate's answer (`base`, `adapted`, maybe `champion`)."""

    prompt: str
    references: list[str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class ReportFacts:
    """Everything on the page.

    Attributes:
        title: name of the recipe.
        finished: when the run finished.
        verdict: the gate's reason.
        promoted: whether the model became the champion.
        model_uri: URI of the registered version.
        gate_metric: the metric that the gate decided on.
        metrics: candidate -> metric -> value.
        intervals: candidate -> metric -> both ends of the value's own 95% interval.
        differences: metric -> adapted - base.
        harness: results of lm-evaluation-harness.
        heldout_rows: number of held-out samples.
        truncation: the cost of the truncation; None where nothing was dropped.
        training: a record per optimizer step with `step`, `loss`, `task_loss`, `singular_value_penalty`,
            `orthogonality_penalty`, `learning_rate`, `tokens_per_second`, `gradient_norm` where DeepSpeed computes it (not at
            stage 0 without clipping), and `validation_loss` at some steps.
        layers: what each layer learned and lost.
        samples: held-out prompts with the candidates' answers.
        stages: the stages of the run.
        dataset: summary of the prepared data.
        rejected_rows: rows of the data that were rejected, with the reason.
        interruptions: what interrupted the training.
        recipe_yaml: the resolved recipe.
        versions: package -> version.
        machine: hardware and operating system of the run.
        commands: caption -> shell command (use the model, open the MLflow UI).
    """

    title: str
    finished: str
    verdict: str
    promoted: bool
    model_uri: str
    gate_metric: str
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, list[float]]]
    differences: dict[str, Interval]
    harness: list[HarnessRow]
    heldout_rows: int
    truncation: TruncationFacts | None
    training: list[dict[str, float]]
    layers: list[LayerFacts]
    samples: list[SampleFacts]
    stages: list[StageFacts]
    dataset: dict[str, Any]
    rejected_rows: list[str]
    interruptions: list[str]
    recipe_yaml: str
    versions: dict[str, str]
    machine: dict[str, str]
    commands: dict[str, str] = field(default_factory=dict)


def spoken(name: str) -> str:
    """`exact_match` -> `Exact match`; metrics with a spelling of their own keep it."""
    if name in METRICS:
        return METRICS[name].label
    words = [word.upper() if word in ACRONYMS else word for word in name.split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def significant(value: float) -> str:
    """At most four significant digits and four decimals; scientific below 0.001."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        text = f"{value:.2e}".replace("e-0", "e-")
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        decimals = 4 if size < 1 else 3 - math.floor(math.log10(size))
        text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS)


def metric_value(metric: str, value: float) -> str:
    """Shares as percentages, everything else with four digits."""
    return f"{100 * value:.1f}%" if metric in SHARES and math.isfinite(value) else significant(value)


def metric_change(metric: str, value: float) -> str:
    """A signed difference, without its unit."""
    sign = "+" if value > 0 else ""
    return sign + (f"{100 * value:.1f}".replace("-", MINUS) if metric in SHARES else significant(value))


def change_unit(metric: str) -> str:
    """The unit of a difference: percentage points for shares, none for other metrics."""
    return " points" if metric in SHARES else ""


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `4 min 12 s` or `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def scalar(value: Any) -> str:
    """A scalar value, such as a setting."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of CSS pixels (at natural size) with one bare, transparent axes."""
    from matplotlib.figure import Figure  # not before: every run imports this module, and few draw

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=FONT_SIZE, labelcolor=COLOURS["muted"])
    return figure, axes


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an `<svg>` element.

    Args:
        name: unique on the page: it salts the element ids, which are global in HTML.
        label: what a screen reader says.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with _svg_settings(name):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    drawn = buffer.getvalue()
    width = figure.get_figwidth() * 72
    body = _tidy(drawn[drawn.index("<defs>") : drawn.rindex("</svg>")])
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {figure.get_figheight() * 72:g}" '
        f'style="max-width:{width * MAX_ENLARGEMENT:g}px">{body}</svg>'
    )


@contextmanager
def _svg_settings(name: str) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}):
        yield


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


def _tidy(body: str) -> str:
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[\w.]+_\d+"', "<g", body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", body)
    # Inside tags only: between them stand the tick labels.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _rounded, tag[0]), body)
    for role, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{role})")
    return re.sub(r"\s*\n\s*", " ", body)
