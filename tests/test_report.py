import copy
import json
import re
import shutil
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sast_jax import load_run
from sast_jax.cli import main
from sast_jax.data import take_batch
from sast_jax.evaluation.suites import SUITES
from sast_jax.report import charts
from sast_jax.report.charts import Series
from sast_jax.report.gather import gather
from sast_jax.report.markup import element, table
from sast_jax.report.page import SECTIONS
from sast_jax.training.build import load_data
from tests.browser import CHROMIUM, open_browser
from tests.test_cli import move_recordings, refused

METHODS = ("none", "threshold_layer", "threshold_channel", "gain_layer", "gain_channel", "search_layer", "gradient_channel")
LAYERS = ("dense_0", "dense_1")
STEP = 6  # 30 training recordings in batches of 10, for 2 epochs.


def fitted(accuracy):
    return {"accuracy": accuracy, "loss": 0.5, "ece": 0.081, "temperature": 1.37, "scaled_loss": 0.4, "scaled_ece": 0.03}


def synops(scale=1):
    return {
        "effective_acs": 12_345.0 * scale,
        "effective_macs": 678.0,
        "dense": 99_000,
        "event_acs": 23_456.0,
        "spike_rate": 0.125,
    }


def evaluation(gap=0.1):
    """What `sast-jax evaluate --suite=all` writes, in the format of `sast_jax.evaluation`, with numbers easy to find again."""
    modes = {"surrogate_accuracy": 0.85, "hard_accuracy": 0.85 - gap}
    memory = {"weights": 1000, "biases": 100, "thresholds": 8, "potentials": 200, "total": 1308}
    operations = {key: value for key, value in synops().items() if key != "spike_rate"} | {"activation_sparsity": 0.875}
    return {
        "step": STEP,
        "transfer": {
            **modes,
            "transfer_gap": gap,
            "surrogate_loss": 0.3,
            "hard_loss": 0.6,
            "num_test": 20,
            "layer_swap": {
                "prefix": [
                    {"hard": list(LAYERS[:i]), "accuracy": accuracy, "loss": 0.4} for i, accuracy in enumerate((0.85, 0.8, 0.75))
                ],
                "single": [{"hard": [name], "accuracy": 0.8, "loss": 0.4} for name in LAYERS],
            },
            "agreement": {
                "decisions": 0.8642,
                "layers": {
                    name: {"surrogate_activation": 0.2, "hard_rate": 0.1, "count_correlation": r, "count_difference": 0.7}
                    for name, r in zip(LAYERS, (0.91, None), strict=True)
                },
            },
            "confusion": {mode: (np.eye(10, dtype=int) + 1).tolist() for mode in ("surrogate", "hard")},
        },
        "calibration": {
            "split": "validation",
            "num_calibration": 10,
            "num_test": 20,
            "num_bins": 15,
            "surrogate": fitted(0.85),
            "methods": {
                name: {**fitted(0.75), "calibration_accuracy": 0.7, "calibration_loss": 0.6, "gap_removed": removed}
                for name, removed in zip(METHODS, (0.0, 0.3, None, 0.1, 0.2, 0.5, 0.6), strict=True)
            },
            "chosen": "search_layer",
        },
        "quantization": {
            "num_test": 20,
            "float": {"accuracy": 0.75, "synops": operations, "memory": {**memory, "total": 4200}},
            "configurations": [
                {
                    "weight_bits": bits,
                    "granularity": granularity,
                    "decay_form": "power",
                    "potential_bits": 16,
                    "accuracy": 0.7,
                    "agreement": 0.9,
                    "synops": operations,
                    "memory": memory,
                    "layers": {},
                    "reference": {"num_compared": 4, "equal": bits == 8},
                }
                for bits, granularity in ((8, "tensor"), (4, "channel"))
            ],
        },
        "synops": {
            **operations,
            "num_test": 20,
            "layers": {**{name: synops() for name in LAYERS}, "readout": {**synops(), "spike_rate": None}},
        },
        "robustness": {
            "num_test": 20,
            "severities": [1, 2, 3, 4, 5],
            "clean": modes,
            "corruptions": {
                kind: {key: [value - 0.1 * severity for severity in range(1, 6)] for key, value in modes.items()}
                for kind in ("drop_events", "hot_pixels")
            },
            "area": {kind: {"surrogate": 0.6, "hard": 0.4321} for kind in ("drop_events", "hot_pixels", "mean")},
        },
    }


def theory():
    """What `sast-jax theory` writes."""
    row = {"layer": "dense_0", "statement": "contraction", "assumption": "kappa < 1: 1.25", "holds": False}
    row |= {"measured": 0.5, "bound": 1.25, "vacuous": True, "tightness": 0.4}
    none = {"layer": "training", "holds": True, "measured": None, "bound": None, "vacuous": False, "tightness": None}
    return {"step": STEP, "recordings": "validation", "num_recordings": 10, "statements": [row, {**row, **none}]}


@pytest.fixture
def full(pair):
    """The pair with all that can be measured."""
    for name, gap in (("baseline", 0.1), ("sast", 0.05)):
        (pair / name / "evaluation.json").write_text(json.dumps(evaluation(gap)))
        (pair / name / "theory.json").write_text(json.dumps(theory()))
    return pair


def report(folder, *arguments):
    """Runs the command and returns the text of the page."""
    assert main(["report", f"--workdir={folder}", *arguments]) == 0
    return (folder / "report.html").read_text()


class Page(HTMLParser):
    """What a page says: its texts, headings, tables, and every element and attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.rows, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def row(self, *start):
        """The cells of the first row that starts with these, without them."""
        return next(row[len(start) :] for row in self.rows if row[: len(start)] == list(start))

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@given(st.text(), st.text())
def test_text_and_attributes_come_back_as_they_went_in(text, attribute):
    parser = Page(element("p", text, title=attribute))
    newlines = str.maketrans({"\r": "\n"})  # What HTML makes of them is the browser's affair.
    assert "".join(parser.texts).translate(newlines) == text.translate(newlines)
    assert parser.attributes("p") == [{"title": attribute}]


def test_elements_nest_and_nothing_is_left_out():
    assert element("p", "a", None, 1, [element("b", "<"), 2.5], class_="x", aria_label=None) == (
        '<p class="x">a1<b>&lt;</b>2.5</p>'
    )
    parser = Page(table(["name", "value"], [("a", 1), ("b", "<")], caption="Two & more"))
    assert parser.rows == [["name", "value"], ["a", "1"], ["b", "<"]]
    assert parser.attributes("td")[0] == {"class": "number"}


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))
def test_ticks_are_few_round_and_within_the_axis(low, size):
    values = charts.ticks(low, low + size)
    assert 2 <= len(values) <= 10
    steps = np.diff(values)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0], rel=1e-3)
    assert low - 1e-6 * size <= values[0]
    assert values[-1] <= low + size * (1 + 1e-6)


def test_line_goes_through_its_points_and_breaks_where_there_is_none():
    # The plane of the chart: x from 54 to 328, y from 172 (bottom) to 12.
    series = Series("a", [0, 1, 2, 3, 4], [0.0, 1.0, np.nan, 0.5, 0.25], markers=True)
    chart = Page(charts.line_chart([series], title="t", x_label="x", y_label="y", y_range=(0, 1)))
    (path,) = chart.attributes("path")
    assert path["d"] == "M54 172L122.5 12M259.5 92L328 132"
    assert [(circle["cx"], circle["cy"]) for circle in chart.attributes("circle")] == [
        ("54", "172"),
        ("122.5", "12"),
        ("259.5", "92"),
        ("328", "132"),
    ]


@pytest.mark.parametrize("ys", [[0.5], [0.5, 0.5], [0.0, 0.0], [-1e-9, 1e9]])
def test_degenerate_lines_can_be_drawn(ys):
    chart = charts.line_chart([Series("a", range(len(ys)), ys)], title="t", x_label="x", y_label="y")
    assert "nan" not in chart
    assert "inf" not in chart


def test_gap_chart_puts_both_accuracies_on_one_scale():
    chart = Page(charts.gap_chart([("a", 0.9, 0.7), ("b", 0.8, 0.85)], title="t"))
    xs = [float(circle["cx"]) for circle in chart.attributes("circle")]
    assert np.diff(xs) == pytest.approx(np.diff([0.9, 0.7, 0.8, 0.85]) / 0.1 * (xs[0] - xs[2]), abs=0.2)
    assert [circle["class"].split()[0] for circle in chart.attributes("circle")] == ["open", "full"] * 2


def test_grid_chart_has_a_cell_for_each_value_that_is_not_zero():
    chart = Page(charts.grid_chart(np.array([[0, 1.0], [0.5, 0]]), title="t", cell=(10, 5), levels=2))
    assert [(path["opacity"], path["d"]) for path in chart.attributes("path")] == [
        ("0.50", "M0 5h9.4v4.4h-9.4z"),
        ("1.00", "M10 0h9.4v4.4h-9.4z"),
    ]


def test_run_without_evaluation_names_the_commands_for_the_rest(pair, capsys):
    page = Page(report(pair))
    assert str(pair / "report.html") in capsys.readouterr().out
    assert page.headings == ["What the swap costs", "Training", "One recording", "Config and environment", "Not in this report"]
    results = json.loads((pair / "results.json").read_text())["runs"]
    for name, result in results.items():
        accuracies = [f"{100 * result[f'{mode}_accuracy']:.1f} %" for mode in ("surrogate", "hard")]
        assert page.row(name)[:4] == [*accuracies, f"{100 * result['transfer_gap']:+.1f}", "20"]
    assert page.row(next(iter(results)))[4] == "6"
    assert page.row("sast")[4] == "12 (2.00x)"
    assert page.row("sam.rho") == ["0.0", "0.2"]
    text = "".join(page.texts)
    for suite in SUITES:
        assert f"sast-jax evaluate --suite={suite} --workdir={pair}" in text
    assert f"sast-jax theory --workdir={pair}" in text


def test_everything_measured_is_on_the_page(full):
    page = Page(report(full))
    assert page.headings == [section.title for section in SECTIONS]
    assert page.row("baseline, dense_0", "20.0 %", "10.0 %") == ["0.91", "0.7"]
    assert page.row("sast, dense_1", "20.0 %") == ["10.0 %", "-", "0.7"]
    assert page.row("sast", "search by layer (chosen)")[:3] == ["75.0 %", "50.0 %", "0.5"]
    assert page.row("baseline", "threshold by channel")[:2] == ["75.0 %", "-"]
    assert page.row("sast, float32") == ["-", "-", "75.0 %", "-", "23,456", "4.2", "-"]
    assert page.row("sast, INT8") == ["per tensor", "power", "70.0 %", "90.0 %", "23,456", "1.3", "equal on 4"]
    assert page.row("sast, INT4")[-1] == "DIFFERENT on 4"
    assert page.row("baseline, total") == ["12,345", "678", "23,456", "99,000", "12.5 %"]
    assert page.row("baseline, readout")[-1] == "-"
    assert page.row("hot pixels") == ["60.0 %", "43.2 %"] * 2
    contraction = ["contraction", "kappa < 1: 1.25", "no", "0.5", "1.25 (vacuous)", "0.4"]
    assert [row[1:] for row in page.rows if row[0] == "dense_0"] == [contraction] * 2
    assert "baseline 86.4 %" in "".join(page.texts)
    titles = [title for title in page.texts if title.startswith("Test accuracy with the first layers in hard mode. ")]
    assert "baseline: 85 %, 80 %, 75 %" in titles[0]


def test_page_needs_nothing_but_itself(full):
    text = report(full)
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert len(text) < 400_000
    assert text == report(full)  # And it is a function of the run.


def test_every_picture_says_what_it_shows(full):
    page = Page(report(full))
    pictures = [attributes for attributes in page.attributes("svg") if "aria-hidden" not in attributes]
    assert len(pictures) > 20
    assert all(attributes["role"] == "img" for attributes in pictures)
    titles = re.findall(r"<svg [^>]*role=\"img\"[^>]*><title>([^<]+)</title>", report(full))
    assert len(titles) == len(pictures)


def test_texts_of_the_user_are_only_texts(full):
    nasty = '<script>alert("x")</script>&amp;\'"<b>'
    for name in ("baseline", "sast"):
        run = json.loads((full / name / "run.json").read_text())
        run["environment"][f"my {nasty}"] = nasty
        (full / name / "run.json").write_text(json.dumps(run))
        found = json.loads((full / name / "evaluation.json").read_text())
        found["robustness"]["corruptions"] = {nasty: found["robustness"]["corruptions"]["hot_pixels"]}
        found["robustness"]["area"][nasty] = found["robustness"]["area"]["mean"]
        (full / name / "evaluation.json").write_text(json.dumps(found))
        statements = json.loads((full / name / "theory.json").read_text())
        statements["statements"][0]["assumption"] = nasty
        (full / name / "theory.json").write_text(json.dumps(statements))
    renamed = full.rename(full.with_name("<b>pair"))
    page = Page(report(renamed))
    assert not page.attributes("script") + page.attributes("b")
    assert page.row(f"my {nasty}") == [nasty, nasty]
    assert page.row("dense_0", "contraction", nasty)[0] == "no"
    assert "<b>pair: baseline, sast" in page.texts


def test_single_run_has_a_page_of_its_own(full):
    page = Page(report(full / "sast"))
    assert page.headings == [section.title for section in SECTIONS]
    assert "Fields in which the runs differ" not in page.texts
    assert "sast" in page.texts


def test_what_only_one_run_has_is_shown_and_the_other_named(full):
    (full / "sast" / "evaluation.json").unlink()
    page = Page(report(full))
    assert "Robustness" in page.headings
    assert "Robustness of sast: " in page.texts
    assert page.row("baseline, INT8")
    assert not [row for row in page.rows if row[0] == "sast, INT8"]


def test_measurements_of_other_weights_are_not_shown(full):
    for name in ("evaluation.json", "theory.json"):
        found = json.loads((full / "sast" / name).read_text())
        (full / "sast" / name).write_text(json.dumps({**found, "step": STEP - 1}))
    page = Page(report(full))
    assert "Theory of sast: " in page.texts
    assert "Calibration of sast: " in page.texts


def test_unfinished_run_is_shown_as_far_as_it_is(pair):
    shutil.rmtree(pair / "sast")
    (pair / "baseline" / "results.json").unlink()
    page = Page(report(pair))
    assert page.headings == ["Training", "One recording", "Config and environment", "Not in this report"]
    assert "What the swap costs: " in page.texts
    shutil.rmtree(pair / "baseline" / "checkpoints")
    (pair / "baseline" / "metrics.jsonl").unlink()
    assert Page(report(pair)).headings == ["Config and environment", "Not in this report"]


def test_recordings_that_are_gone_are_told_and_found_elsewhere(full, trained):
    moved = full.parent / "moved"
    for name in ("baseline", "sast"):
        move_recordings(full / name, moved)
    page = Page(report(full))
    assert "One recording" not in page.headings
    assert any(f"{str(moved)!r} does not exist" in text for text in page.texts)
    assert "One recording" in Page(report(full, f"--config.dataset.root={trained.data}")).headings


def test_folder_that_is_no_run_and_damaged_files_are_refused(full, capsys, tmp_path):
    assert "is no run" in refused(capsys, main(["report", f"--workdir={tmp_path / 'none'}"]))
    assert not (tmp_path / "none").exists()
    path = full / "baseline" / "evaluation.json"
    found = json.loads(path.read_text())
    for suite, damage in (("synops", {}), ("quantization", {"configurations": 3}), ("calibration", {"methods": ["a"]})):
        broken = copy.deepcopy(found)
        broken[suite] = {**found[suite], **damage}
        broken[suite].pop("num_test")
        path.write_text(json.dumps(broken))
        (full / "report.html").write_text("before")
        assert f"evaluation.json: is damaged or not of sast-jax: {suite}" in refused(
            capsys, main(["report", f"--workdir={full}"])
        )
        assert (full / "report.html").read_text() == "before"
    path.write_text("{")
    assert "evaluation.json" in refused(capsys, main(["report", f"--workdir={full}"]))
    path.write_text("[]")
    assert "evaluation.json" in refused(capsys, main(["report", f"--workdir={full}"]))


def test_recording_is_shown_as_the_networks_see_it(pair):
    example = gather(pair).example
    apply = jax.jit(lambda network, params, frames, mode: network.apply({"params": params}, frames, mode), static_argnums=(0, 3))
    for name in ("baseline", "sast"):
        run = load_run(pair / name)
        test = load_data(run.config).test
        place = np.flatnonzero(test.ids == example.id)
        frames = take_batch(test, place).frames
        np.testing.assert_array_equal(example.frames, frames[:, 0])
        assert example.label == test.labels[place]
        for mode in ("surrogate", "hard"):
            np.testing.assert_allclose(example.logits[name][mode], run.predict(frames, mode)[0], atol=1e-5)
            spikes = apply(run.network, run.params, frames.astype(np.float32), mode).spikes
            for layer, expected in zip(example.layers[name], spikes, strict=True):
                assert layer.num_neurons == expected.shape[-1]
                assert {tuple(each) for each in layer.spikes[mode].T.round(5)} <= {
                    tuple(each) for each in np.asarray(expected)[:, 0].T.round(5)
                }
        for layer in example.layers[name]:
            counts = layer.spikes["hard"].sum(axis=0)
            assert (np.diff(counts) <= 0).all()
            assert np.isfinite(layer.potentials["hard"]).all()
    first = load_run(pair / "baseline")
    test = load_data(first.config).test
    decisions = [np.asarray(first.predict(test.frames.swapaxes(0, 1), mode)).argmax(-1) for mode in ("surrogate", "hard")]
    disputed = np.flatnonzero(decisions[0] != decisions[1])
    assert example.is_disputed == bool(len(disputed))
    assert example.id == test.ids[disputed[0] if len(disputed) else 0]


@pytest.mark.slow
def test_page_shows_what_evaluate_writes(pair):
    assert main(["evaluate", f"--workdir={pair}", "--suite=all"]) == 0
    headings = Page(report(pair)).headings
    assert headings == [section.title for section in SECTIONS if section.title != "Theory"] + ["Not in this report"]


CONTRAST = """(() => {
  const parse = text => text.match(/[\\d.]+/g).slice(0, 3).map(value => {
    value /= 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  const luminance = text => { const [r, g, b] = parse(text); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const background = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = color => {
    const [high, low] = [luminance(color), background].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const worst = (selector, property) => Math.min(...[...document.querySelectorAll(selector)].map(
    found => contrast(getComputedStyle(found)[property])));
  const texts = worst("h1, h2, p, td, th, a, li, figcaption", "color");
  return [texts, worst("svg text:not(.on)", "fill"), worst(".line", "stroke"), background];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome")
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_browser_shows_the_page_without_complaint(width, scheme, full, browser):
    report(full)
    browser.open(full / "report.html", width=width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requested() == [(full / "report.html").as_uri()]
    browser.evaluate("document.querySelectorAll('details').forEach(found => found.open = true)")
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
    assert (browser.evaluate(boxes) > 0) == (width < 600)  # On a phone tables scroll in their boxes, elsewhere they fit.
    text, labels, lines, background = browser.evaluate(CONTRAST)
    assert (background > 0.5) == (scheme == "light")
    assert min(text, labels) >= 4.5
    assert lines >= 3
    empty = "[...document.querySelectorAll('svg')].filter(found => found.getBoundingClientRect().height < 5).length"
    assert browser.evaluate(empty) == 0
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(found => found.getBoundingClientRect().height))"
    assert browser.evaluate(smallest) >= 9
    cut = """[...document.querySelectorAll('svg text')].filter(found => {
      const [box, frame] = [found.getBoundingClientRect(), found.closest('svg').getBoundingClientRect()];
      return box.left < frame.left - 1 || box.right > frame.right + 1;
    }).map(found => found.textContent)"""
    assert browser.evaluate(cut) == []
    links = "[...document.querySelectorAll('nav a')].filter(found => !document.querySelector(found.getAttribute('href'))).length"
    assert browser.evaluate(links) == 0
    assert browser.evaluate("document.querySelectorAll('nav a').length") == len(SECTIONS)
