"""The report as a file: complete, escaped, self-contained, small, and the same for the same facts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.results import HarnessRow
from pipeline.metrics.intervals import Interval
from pipeline.report.charts import _gate_limits, layer_panels, smoothed, thinned
from pipeline.report.facts import (
    LayerFacts,
    ReportFacts,
    SampleFacts,
    duration,
    metric_change,
    metric_value,
    significant,
)
from pipeline.report.render import compare, outcome, render_report
from tests.support.report_facts import full_facts, layer_facts, training_records

VOID = {"meta", "br", "hr", "img", "link", "input"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action"}


class Page(HTMLParser):
    """Checks that tags balance, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str | None] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [value for name, value in attrs if name in LOADING and value and not value.startswith("#")]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag == "svg":
            self.labels.append(given.get("aria-label"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"line {self.getpos()[0]}: stray </{tag}>")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rendered(facts: ReportFacts, folder: Path) -> tuple[str, Page]:
    out = folder / "reports" / "report.html"
    render_report(facts, out)
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.problems == []
    return text, page


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The report of all facts: its charts of 30 blocks take seconds."""
    return rendered(full_facts(), tmp_path_factory.mktemp("full"))


def facts_of(**changes: Any) -> ReportFacts:
    """All facts with some changed, of a model of one block."""
    return full_facts(**({"layers": layer_facts(1)} | changes))


def test_full_report_has_everything_in_the_readers_order(full: tuple[str, Page]) -> None:
    _, page = full
    wanted = ["Promoted", "the whole interval lies above zero", "48.0%", "89.0%", "84.2%", "+41.0", "+35.2 to +46.5",
              "models:/quickstart@champion", "kasa ask", "Base and adapted", "18.41", "from 3.488 to 3.482", "Layers that lose most",
              "model.layers.1.self_attn.v_proj gives a loss of 3.489", "80 optimizer steps",
              "What each layer learned", "self_attn.q_proj", "All values of 210 weights", "a sometimes tedious film.",
              "2,041", "movie-reviews.jsonl:977: empty completion", "train_adapter", "3 min 32 s",
              "7e6d5c4b3a2918f7e6d5c4b3a2918f70", "thinkpad", "2.60.0", "deepspeed: cpu_zero2"]  # fmt: skip
    position = 0
    for words in wanted:
        found = page.text.find(words, position)
        assert found >= 0, f"{words!r} is missing after {page.text[max(position - 40, 0) : position]!r}"
        position = found


def test_page_loads_nothing_and_every_chart_is_labelled_with_ids_of_its_own(full: tuple[str, Page]) -> None:
    text, page = full
    assert page.loaded == []
    assert not re.search(r"@import|@font-face|url\((?!['\"]?#)", text)
    # The gate, 2 intervals, the lost shares, 5 training charts, 7 module types, 6 stages.
    assert len(page.labels) == 1 + 2 + 1 + 5 + 7 + 6
    assert all(page.labels)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(page.ids)


def test_same_facts_give_the_same_bytes_and_leave_no_other_file(tmp_path: Path) -> None:
    render_report(facts_of(), tmp_path / "a.html")
    render_report(facts_of(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_charts_take_their_colours_from_the_page(full: tuple[str, Page]) -> None:
    text, _ = full
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "stroke: var(--adapted)" in svgs
    assert "fill: var(--muted)" in svgs
    assert not re.search(r"(fill|stroke): #", svgs)


def test_tick_labels_keep_their_decimals(tmp_path: Path) -> None:
    text, _ = rendered(facts_of(training=training_records(1)), tmp_path)
    parts = re.search(r"<svg[^>]*Task loss, singular.*?</svg>", text, flags=re.DOTALL)
    assert parts
    assert re.findall(r"<text[^>]*>([^<]*)<", parts[0])[1:] == ["0.001", "0.01", "0.1"]


def test_kept_out_without_model_uri(tmp_path: Path) -> None:
    text, page = rendered(facts_of(promoted=False, model_uri="", commands={}), tmp_path)
    assert "Kept out" in page.text
    assert "Promoted" not in page.text
    assert '<dl class="commands">' not in text


def test_single_step(tmp_path: Path) -> None:
    text, page = rendered(facts_of(training=training_records(1)), tmp_path)
    assert "One optimizer step, with a loss of" in page.text
    loss = re.search(r'<svg[^>]*aria-label="Loss by step.*?</svg>', text, flags=re.DOTALL)
    assert loss
    assert re.findall(r"<text[^>]*>([^<]*)<", loss[0]).count("1") == 1


def test_nothing_to_show_is_said_in_words(tmp_path: Path) -> None:
    empty = full_facts(
        training=[],
        layers=[],
        samples=[],
        rejected_rows=[],
        interruptions=[],
        stages=[],
        differences={},
        metrics={},
        dataset={},
    )
    _, page = rendered(empty, tmp_path)
    for sentence in ("no record of optimizer steps", "No adapted weight", "No sample", "No row was rejected",
                     "No metric was measured"):  # fmt: skip
        assert sentence in page.text
    assert page.labels == []


def test_html_in_the_facts_stays_text(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script> & <b>\"bold\"</b>"
    facts = full_facts(
        title=attack,
        verdict=attack,
        samples=[SampleFacts(attack, [attack], {"base": attack, attack: "no"})],
        layers=[LayerFacts(attack, [0.1], [0.01], 1.0, 0.1)],
        metrics={"base": {"accuracy": 0.5, attack: 1.0}, "adapted": {"accuracy": 0.6, attack: 2.0}},
        differences={"accuracy": Interval(0.1, 0.0, 0.2), attack: Interval(1.0, 0.5, 1.5)},
        dataset={attack: {attack: [attack]}},
        rejected_rows=[attack],
        recipe_yaml=attack,
        commands={attack: attack},
    )
    text, page = rendered(facts, tmp_path)
    assert "<b>" not in text
    assert text.count("<script>") == 1
    assert page.text.count("<script>alert('x')</script> & <b>\"bold\"</b>") > 10


def test_thirty_thousand_steps_stay_small(tmp_path: Path) -> None:
    text, page = rendered(facts_of(training=training_records(30_000)), tmp_path)
    assert len(text.encode()) < 2_000_000
    assert "30,000 optimizer steps" in page.text


def test_thinning_keeps_spikes_and_ends() -> None:
    values = np.zeros(30_000)
    values[[0, 12_345, 29_999]] = [1.0, 9.0, 2.0]
    kept = thinned(values)
    assert {0, 12_345, 29_999} <= set(kept.tolist())
    assert len(kept) < 700
    assert thinned(values[:10]).tolist() == list(range(10))


def test_smoothing_is_a_mean_of_the_neighbours_without_padding() -> None:
    values = np.arange(80.0) ** 2
    smooth = smoothed(values)
    assert smooth[40] == pytest.approx(values[37:44].mean())
    assert smooth[0] == pytest.approx(values[:4].mean())
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_penalty_that_is_zero_throughout_is_named_not_drawn(tmp_path: Path) -> None:
    records = [record | {"orthogonality_penalty": 0.0} for record in training_records(20)]
    _, page = rendered(facts_of(training=records), tmp_path)
    assert "Zero throughout, so not drawn: orthogonality penalty." in page.text


def test_a_training_without_gradient_norms_has_no_chart_of_them(tmp_path: Path) -> None:
    # DeepSpeed's stage 0 tells none unless it clips.
    records = [
        {key: value for key, value in record.items() if key != "gradient_norm"} for record in training_records(5)
    ]
    text, _ = rendered(facts_of(training=records), tmp_path)
    assert 'aria-label="Tokens per second by step' in text
    assert "radient norm by step" not in text


@pytest.mark.parametrize(
    ("lower_is_better", "low", "high", "expected"),
    [
        (False, 0.1, 0.2, "better"),
        (False, -0.2, -0.1, "worse"),
        (False, -0.1, 0.2, "unclear"),
        (False, 0.0, 0.2, "unclear"),
        (True, -0.2, -0.1, "better"),
        (True, 0.1, 0.2, "worse"),
        (True, -2, 1, "unclear"),
    ],
)
def test_outcome_knows_the_direction(lower_is_better: bool, low: float, high: float, expected: str) -> None:
    assert outcome(Interval((low + high) / 2, low, high), lower_is_better) == expected


def test_the_harness_has_a_table_of_its_own(full: tuple[str, Page], tmp_path: Path) -> None:
    rows = [
        HarnessRow("arc_easy/acc", False, {"base": 0.51, "adapted": 0.56}, {"base": Interval(0.05, 0.02, 0.08)}),
        HarnessRow("wikitext/word_perplexity", True, {"base": 21.5, "adapted": 23.25}, {}),
    ]
    easy, wikitext = compare(full_facts(harness=rows)).harness
    assert (easy.best, wikitext.best) == ("adapted", "base")
    assert easy.change is not None
    assert easy.change.outcome == "better"
    assert wikitext.change is None
    text, _ = rendered(facts_of(harness=rows), tmp_path)
    assert re.search(r"wikitext/word_perplexity<small>lower is better.*?>23\.25<", text, re.DOTALL)
    assert "lm-evaluation-harness" not in full[0]


def test_gate_comes_first_and_best_follows_the_direction() -> None:
    metrics = {"adapted": {"loss": 0.3, "rouge_l": 0.2, "chrf": 30.0}, "base": {"loss": 0.4, "rouge_l": 0.3}}
    comparison = compare(full_facts(gate_metric="rouge_l", metrics=metrics, differences={}))
    assert comparison.candidates == ["base", "adapted"]
    assert [(row.label, row.best) for row in comparison.rows] == [
        ("ROUGE-L", "base"),
        ("Loss", "adapted"),
        ("chrF", None),
    ]


def test_right_answers_are_marked_after_stripping(tmp_path: Path) -> None:
    outputs = {"base": "negative", "adapted": " positive\n"}
    text, _ = rendered(facts_of(samples=[SampleFacts("Good?", ["positive"], outputs)]), tmp_path)
    assert text.count('aria-label="correct"') == 1
    assert re.search(r'positive\s+<span role="img" aria-label="correct">', text)


def test_layers_are_grouped_by_module_type() -> None:
    panels = layer_panels(layer_facts(30))
    assert [panel.title for panel in panels][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert all(list(panel.layers) == list(range(30)) for panel in panels)


def test_stacks_with_the_same_modules_stay_apart() -> None:
    names = ["encoder.block.0.q", "decoder.block.0.q"]
    panels = layer_panels([LayerFacts(name, [0.1], [0.1], 1.0, 0.0) for name in names])
    assert [panel.title for panel in panels] == ["encoder.block.q", "decoder.block.q"]


def test_other_layer_names_fall_back_to_a_list_of_the_most_learned(tmp_path: Path) -> None:
    layers = [LayerFacts(f"head_{i}", [0.001 * (i + 1)], [0.0005], 1.0, 0.0) for i in range(60)]
    text, page = rendered(full_facts(layers=layers), tmp_path)
    assert "The 40 of 60 weights that learned most" in page.text
    drawn = re.findall(r"<text[^>]*>(head_\d+)</text>", text)
    assert drawn == [f"head_{i}" for i in range(59, 19, -1)]


@pytest.mark.parametrize("blocks", [1, 30])
def test_layers_that_learned_or_lost_nothing_are_drawn(blocks: int, tmp_path: Path) -> None:
    layers = [LayerFacts(f"model.layers.{i}.q_proj", [0.0] * 8, [], 3.0, 0.0) for i in range(blocks)]
    _, page = rendered(full_facts(layers=layers), tmp_path)
    assert f"q_proj: largest learned and largest dropped singular value in {blocks} blocks" in page.labels


@pytest.mark.parametrize("name", ["model.layers.0.q_proj", "head"])
def test_what_drops_nothing_shows_what_was_learned_and_no_shares(name: str, tmp_path: Path) -> None:
    text, page = rendered(full_facts(truncation=None, layers=[LayerFacts(name, [0.5, 0.2], [], None, 0.0)]), tmp_path)
    assert "Nothing was cut from the base weights." in page.text
    assert any("largest learned singular value" in label for label in page.labels)
    layers = text[text.index('<section id="layers">') : text.index('<section id="samples">')]
    assert "ropped" not in layers
    assert "%" not in re.sub("<style.*?</style>|<[^>]*>", "", layers, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (significant(0.27139), "0.2714"),
        (significant(18.4071), "18.41"),
        (significant(-2.6413), "−2.641"),
        (significant(0.0000423), "4.23e-5".replace("-", "−")),
        (significant(123456.7), "123,457"),
        (significant(0.0), "0"),
        (significant(float("inf")), "∞"),
        (metric_value("accuracy", 0.8425), "84.2%"),
        (metric_value("chrf", 51.234), "51.23"),
        (metric_change("exact_match", -0.0312), "−3.1"),
        (metric_change("loss", 0.5), "+0.5000"),
        (duration(59.97), "1 min 00 s"),
        (duration(7260), "2 h 01 min"),
        (duration(0.04), "0.0 s"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize(
    ("metric", "shown"),
    [("rouge_l", [21.0, 44.5]), ("rouge_l", [0.2, 0.9]), ("accuracy", [0.2, 0.9]), ("loss", [2.0, 2.1])],
)
def test_every_candidate_lies_within_the_gates_chart(metric: str, shown: list[float]) -> None:
    low, high = _gate_limits(metric, shown)
    assert low < min(shown) < max(shown) < high
