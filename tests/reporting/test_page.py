"""The HTML report without a browser: what is on the page, that nothing untrusted gets through, what may be missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.checked_lines import encode_line
from lib.cli import UserError
from lib.flip_answer_log import AnswerLog
from lib.neurons import Neuron
from lib.reporting.naming import MAIN_RUN
from lib.reporting.page.build import open_model, run_names_of, script_json, write_page
from lib.reporting.page.charts import neuron_map, rate_class
from lib.reporting.page.inputs import PageOptions
from lib.reporting.page.neurons import NeuronFacts
from lib.reporting.page.search_tree import Fate, search_tree
from lib.reporting.page.texts import shared_prefix, visible
from tests import published_tree
from tests.report_tree import ReportWorld
from tests.scripts import run_script

STATS = Path("rule_extraction_results/neuron_flip_rules/stats") / MAIN_RUN
HOSTILE = {
    0: "<script>window.owned = 1</script>",
    3: "</script><script>window.owned = 2</script>",
    6: "\"'><img src=x onerror='window.owned = 3'>",
    9: "right\u202eleft \u200b \u2066",
    12: "<!--" + "long " * 20_000 + "-->",
}
ANSWERS = {0: "nul \x00 here", 3: "surrogate \ud800", 6: "</script><!--", 9: "{{ 7 * 7 }}", 12: "]]>\u2028"}


@pytest.fixture(scope="module")
def world() -> ReportWorld:
    return ReportWorld()


@pytest.fixture(scope="module")
def model(world, tmp_path_factory) -> Path:
    return world.write(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def page(model) -> str:
    return written(model)


def written(model: Path, run_name: str | None = None) -> str:
    """The page of a model root, as text."""
    return write_page(open_model(model), run_name, None, PageOptions()).path.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def shown_section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)[0]


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += text


# ---------------------------------------------------------------- the page of a finished run


def test_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in Tags(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert not {"src", "srcset", "action", "style"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    policy = next(a["content"] for tag, a in Tags(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and policy.count("'sha256-") == 2


def test_every_table_has_a_caption_and_scoped_heads(page):
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert len(tables) > 8
    for table in tables:
        assert re.match(r'<table>\s*<caption id="[^"]+">[^<]+</caption>', table), table[:200]
        assert "<th>" not in table
        assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", table))


def test_every_id_is_used_once_and_every_reference_leads_somewhere(page):
    tags = Tags(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        for name in ("aria-labelledby", "href"):
            if attributes.get(name):
                assert attributes[name].lstrip("#") in ids


def test_flip_counts_are_those_of_the_raw_flips(world, page):
    rows = {row[0]: row for row in data_of(page)["grids"]["flips"]["rows"]}
    assert set(rows) == {str(neuron) for neuron in world.neurons}
    for neuron, flips in zip(world.neurons, world.flips, strict=True):
        lost, gained, both, held_out = rows[str(neuron)][3:7]
        assert f"({(flips & world.baseline).sum()}/{world.baseline.sum()})" in lost[0]
        assert f"({(flips & ~world.baseline).sum()}/{(~world.baseline).sum()})" in gained[0]
        assert f"({flips.sum()}/{world.n_rows})" in both[0]
        assert f"({(flips & world.is_test).sum()}/{world.is_test.sum()})" in held_out[0]


def test_interval_of_a_flip_rate_is_the_exact_one(world, page):
    from scipy.stats import binomtest

    rows = {row[0]: row for row in data_of(page)["grids"]["flips"]["rows"]}
    hits = int(world.flips[0].sum())
    exact = binomtest(hits, world.n_rows).proportion_ci(0.95, method="exact")
    assert rows[str(world.neurons[0])][5][1:] == pytest.approx([hits / world.n_rows, *exact], abs=1e-4)


def test_details_name_the_flipped_prompts_before_and_after(world, page):
    data = data_of(page)["neurons"]
    found = data["neurons"][str(world.neurons[0])]
    assert found["n"] == world.flips[0].sum() == 20
    shown = [(*data["prompts"][number], before, fires, after) for number, before, fires, after in found["flips"]]
    # Row 9 is held out and was wrong before; the worked example in front of every prompt is left out.
    assert ("9+10=", "9", "test", 0, 1, "10 after") in shown
    assert all(fires == 1 for *_, fires, _ in shown)
    roles = [role for _, _, role, *_ in shown]
    assert roles == sorted(roles)  # "test" before "train"
    assert "2+3=5; " in shown_section(page, "behaviour")


def test_number_of_prompts_per_neuron_is_limited_and_the_rest_counted(world, model, tmp_path):
    other = write_page(open_model(model), None, tmp_path / "other.html", PageOptions(max_prompts=3)).path
    found = data_of(other.read_text(encoding="utf-8"))["neurons"]["neurons"][str(world.neurons[0])]
    assert len(found["flips"]) == 3 and found["n"] == 20


def test_costs_are_named_against_both_denominators(world, page):
    costs = data_of(page)["grids"]["costs"]["rows"]
    n_groups = len(data_of(page)["trees"]["tree-positive-0"])
    first = costs[0]
    assert [cell[1] for cell in (first[2], first[3], first[5])] == [n_groups, 96, 191]
    assert first[4][0] == f"{100 * n_groups / 96:.2f} %" and first[6][0] == f"{100 * n_groups / 191:.2f} %"
    assert "2N-1: every node of a binary tree" in page and "N: every candidate alone" in page


def test_scopes_are_counted_at_each_threshold(world, page):
    rules = world.rule_rows()
    for row, scope in zip(data_of(page)["grids"]["scopes"]["rows"], ("test", "all_fit"), strict=True):
        values = rules[rules["score_scope"] == scope]["MCC"]
        assert row[1][1] == len(values)
        assert [cell[1] for cell in row[3:]] == [
            int((values >= cut).sum()) for cut in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
        ]


def test_the_tree_holds_every_group_test_and_all_agonists(world, page):
    tree = data_of(page)["trees"]["tree-positive-0"]
    assert {node[1] for node in tree if node[7] == Fate.AGONIST} == {str(neuron) for neuron in world.neurons}
    # A tree for each third of the layers.
    roots = [node[:3] for node in tree if node[0] == 0]
    assert roots == [[0, "m0 … m1 (2 layers)", 32], [0, "m2 … m3 (2 layers)", 32], [0, "m4 … m5 (2 layers)", 32]]
    sizes: list[int] = []
    for depth, _, size, *_ in tree:
        del sizes[depth:]
        assert not sizes or size < sizes[-1]
        sizes.append(size)


def test_equal_inputs_give_equal_bytes_and_leave_the_file_alone(world, model, page, tmp_path):
    path = model / "report" / f"{MAIN_RUN}.html"
    before = path.stat().st_mtime_ns
    assert written(model) == page and path.stat().st_mtime_ns == before
    assert written(world.write(tmp_path)) == page


def test_no_place_of_this_machine_is_on_the_page(model, page):
    assert str(model.parent) not in page and "/tmp" not in page


# ---------------------------------------------------------------- untrusted texts


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    world = ReportWorld(texts=HOSTILE, answers=ANSWERS, description="<svg onload=alert(1)> & {{ 1 }}")
    model = world.write(tmp_path_factory.mktemp("hostile"))
    path = model / "feature_report" / "dataset_stats.json"
    path.write_text(path.read_text().replace('"+"', '"<b>plus</b>\\u202e"'))
    return model


def test_hostile_texts_are_shown_and_never_markup(hostile):
    page = written(hostile)
    parsed = Tags(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert not {"img", "b"} & {tag for tag, _ in parsed.tags}
    for character in ("\u202e", "\u200b", "\u2066", "\x00", "\ud800", "\u2028"):
        assert character not in page
    assert "<b>plus</b>⟨U+202E⟩" in parsed.text and "<script>window.owned = 1</script>" in parsed.text
    texts = json.dumps(data_of(page)["neurons"], ensure_ascii=False)
    assert "nul ⟨U+0000⟩ here" in texts and "surrogate ⟨U+D800⟩" in texts and "{{ 7 * 7 }}" in texts
    assert "characters left out" in texts and len(page) < 400_000


@settings(max_examples=50)
@given(st.text())
def test_visible_text_keeps_what_can_be_seen_and_nothing_else(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert all(character.isprintable() or character in "\n\t" or character.isspace() for character in shown)
    if text.isascii() and text.isprintable() and len(text) <= 600:
        assert shown == text


def test_long_text_keeps_both_ends():
    assert visible("a" * 50 + "b" * 50, limit=30) == f"{'a' * 20} … 70 characters left out … {'b' * 10}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(json_values)
def test_script_json_reads_back_and_cannot_end_its_element(value):
    text = script_json(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


def test_shared_prefix_ends_at_a_space_and_never_takes_a_whole_text():
    assert shared_prefix(["1+1=2; 3+4=", "1+1=2; 3+5="]) == "1+1=2; "
    assert shared_prefix(["1+1=2; ", "1+1=2; 3+5="]) == ""
    assert shared_prefix(["alone here"]) == ""


# ---------------------------------------------------------------- figures and trees by hand


def test_classes_of_flip_rates_begin_at_their_edge():
    assert [rate_class(rate) for rate in (0.0, 0.019, 0.02, 0.2, 0.4, 1.0)] == [0, 0, 1, 4, 5, 5]
    assert rate_class(float("nan")) == 0


def test_map_places_neurons_by_layer_and_coordinate():
    facts = [NeuronFacts(Neuron("m0", 0), flips=(5, 10, 0.2, 0.8)), NeuronFacts(Neuron("a2.h1", 9), effects={"x": 0.1})]
    chart = neuron_map(facts, {"m0": 4, "m1": 4, "a2.h1": 3, "a2.h2": 2}, 10)
    assert [row.label for row in chart.rows] == ["a0", "m0", "a1", "m1", "a2", "m2"]
    assert [(row.n_agonists, row.n_candidates) for row in chart.rows] == [
        (0, None), (1, 4), (0, None), (0, 4), (1, 5), (0, None)]  # fmt: skip
    # Ten columns over 700 units from 52 on; rows of 15 from 8 on.
    assert chart.points == [["m0:0", 87.0, 30.5], ["a2.h1:9", 717.0, 75.5]]
    assert {marks.css: marks.n for marks in chart.classes if marks.n} == {"q5": 1, "q3": 1}


def test_tree_is_built_from_members_whatever_the_order_of_the_records():
    def record(depth, layers, **more):
        return {"layers_neurons_dict": layers, "group_size": sum(map(len, layers.values())), "depth": depth, **more}

    detail = {
        "ablations": [
            record(
                2,
                {"m1": [4]},
                k_effect_associated=3,
                n_associated_eval=8,
                k_effect_unrelated=0,
                n_unrelated_eval=8,
            ),
            record(1, {"m0": [1, 2]}),
            record(0, {"m0": [1, 2], "m1": [3, 4]}),
            record(1, {"m1": [3, 4]}),
            record(2, {"m1": [3]}),
            record(0, {"m2": [7]}, split=True),
            record(0, {"m0": [1]}, audit=True),
        ]
    }
    tree = search_tree(detail, {"m1:4"})
    assert tree.n_audit == 1 and not tree.is_flat
    assert tree.to_json() == [
        [0, "m0 … m1 (2 layers)", 4, None, None, None, None, Fate.SPLIT],
        [1, "m0", 2, None, None, None, None, Fate.PRUNED],
        [1, "m1", 2, None, None, None, None, Fate.SPLIT],
        [2, "m1:4", 1, 3, 8, 0, 8, Fate.AGONIST],
        [2, "m1:3", 1, None, None, None, None, Fate.SILENT],
        [0, "m2:7", 1, None, None, None, None, Fate.SPLIT],
    ]


# ---------------------------------------------------------------- unfinished, broken and published runs


def test_unfinished_run_says_what_is_missing(world, model, tmp_path):
    root = tmp_path / "data" / "arithmetic" / "Tiny"
    root.mkdir(parents=True)
    steps = [
        ("feature_report", ("rules", "map", "flips", "anchored", "search", "scopes", "controls")),
        ("rule_extraction_results", ("map", "flips", "anchored", "search", "scopes", "controls")),
        ("neural_circuit_discovery_results", ("anchored", "scopes", "controls")),
        (str(STATS), ()),
    ]
    for part, lacking in steps:
        ignore = shutil.ignore_patterns("neuron_flip_rules") if part == "rule_extraction_results" else None
        shutil.copytree(model / part, root / part, ignore=ignore)
        page = written(root)
        found = [name for name in ("behaviour", "rules", "map", "flips", "anchored", "search", "scopes", "controls")
                 if '<p class="missing">' in re.sub(r'<div class="tree".*?</div>', "", shown_section(page, name))]
        assert found == list(lacking), part
    # The run was known by the folder of its search before there were any flips.
    assert {path.name for path in (root / "report").iterdir()} == {f"{MAIN_RUN}.html", "no_run_yet.html"}


BREAKABLE = [
    "feature_report/scores.csv",
    "feature_report/features.json",
    "feature_report/dataset_stats.json",
    "rule_extraction_results/rule_combo_is_correct.csv",
    "rule_extraction_results/association_rules_is_correct.csv",
    STATS / "scores.csv",
    STATS / "ablated_answers.jsonl",
    STATS / "flip_stats_global.json",
    STATS / "rule_combo_metrics_test_all.csv",
    "neural_circuit_discovery_results/*/*/*/positive_baseline/neuron_buckets.json",
    "neural_circuit_discovery_results/*/*/*/positive_baseline/rule_knockout.json",
    "neural_circuit_discovery_results/*/*/*/positive_baseline/per_rule/is_correct/rule_0000.json",
]


BROKEN = [b"", b'{"n', b"\x00\xff\xfe"]


def test_a_broken_file_costs_only_its_part(model, tmp_path):
    root = tmp_path / "data" / "arithmetic" / "Tiny"
    shutil.copytree(model, root)
    for number, pattern in enumerate(BREAKABLE):
        (broken,) = root.glob(str(pattern))
        whole = broken.read_bytes()
        broken.write_bytes(BROKEN[number % len(BROKEN)])
        page = written(root)
        broken.write_bytes(whole)
        assert page.rstrip().endswith("</html>"), pattern
        assert len(data_of(page)["grids"]) >= 6, pattern


@pytest.mark.parametrize("content", BROKEN, ids=["empty", "cut", "binary"])
def test_a_run_of_broken_files_has_a_page_that_says_so(model, tmp_path, content):
    root = tmp_path / "data" / "arithmetic" / "Tiny"
    shutil.copytree(model, root)
    for pattern in BREAKABLE:
        (broken,) = root.glob(str(pattern))
        broken.write_bytes(content)
    page = written(root)
    assert "What this page had to do without" in shown_section(page, "controls")


def test_files_that_name_impossible_things_cost_only_those(model, tmp_path):
    root = tmp_path / "data" / "arithmetic" / "Tiny"
    shutil.copytree(model, root)
    (path,) = root.glob("neural_circuit_discovery_results/*/*/*/positive_baseline/neuron_buckets.json")
    record = {"last_record": {"max_effect": 0.5}}
    names = ["<b>:1", "m1", "m99999999:1", "m1:99999999999", f"m{'9' * 5000}:1", "m1:5"]
    path.write_text(json.dumps({"non_catastrophic_agonists": dict.fromkeys(names, record)}))
    frame = (root / STATS / "scores.csv").read_text().splitlines()
    strange = ["flip_h5_3,flip_c2i_h5_3,flip_i2c_h5_3", *["True,True,False"] * (len(frame) - 1)]
    (root / STATS / "scores.csv").write_text("\n".join(map(",".join, zip(frame, strange, strict=True))) + "\n")
    statistics = {"controls": {"random_neurons": {"flip_any_rate": 0.1, "n_neurons": "many"}, "no_op": 3}}
    (root / STATS / "flip_stats_global.json").write_text(json.dumps(statistics))
    joint = {"share_positive_lost": 1, "share_positive_lost_random": 2}
    (root / STATS / "joint_ablation.json").write_text(json.dumps({"test": joint}))
    page = written(root)
    found = {row[0] for row in data_of(page)["grids"]["flips"]["rows"]}
    assert "m1:5" in found and not found & set(names[:5]) and "h5:3" not in found
    assert shown_section(page, "controls").count("neuron_buckets.json") == 5


def test_reading_a_damaged_log_of_answers_leaves_it_as_it_is(model, tmp_path):
    path = tmp_path / "ablated_answers.jsonl"
    whole = (model / STATS / "ablated_answers.jsonl").read_bytes()
    for content, reason in ((whole + b'{"group": "m0', "damaged"), (encode_line({"group": "m0:1"}), "no log")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            AnswerLog.read(path)
        assert path.read_bytes() == content


def test_published_runs_of_every_mode_have_a_page(tmp_path):
    # One control that found nothing, one file of buckets that is cut off.
    task, llm = "arithmetic", published_tree.MODELS[2]
    tree = published_tree.build(tmp_path, tasks=(task,), models=(llm,), sensitivity=False)
    assert len(run_names_of(open_model(tree.data / task / llm))) == 5
    for mode in published_tree.MODES:
        cell = tree.cells[task, llm, mode]
        data = data_of(written(tree.data / task / llm, cell.run_name))
        rows = {row[0]: row for row in data["grids"].get("flips", {"rows": []})["rows"]}
        for neuron, flipped in cell.flips.items():
            assert rows[neuron][5][1] == pytest.approx(len(flipped) / published_tree.N_ROWS, abs=1e-4)
        anchored = {row[0]: row for row in data["grids"].get("anchored", {"rows": []})["rows"]}
        shown = {name.replace(":", "_"): row[3][1] for name, row in anchored.items() if row[3][1] is not None}
        assert shown == pytest.approx(cell.best("test"))
        # Brute force tests each candidate alone, and a control without agonists has nothing to open: no tree.
        assert bool(data["trees"]) or mode in ("brute_force", "fake_targets")


# ---------------------------------------------------------------- the command


def test_command_writes_the_page_and_prints_its_path(model, tmp_path, capsys):
    output = tmp_path / "out" / "page.html"
    assert run_script("make_report", [str(model), "--output", str(output)]) == 0
    assert output.is_file() and capsys.readouterr().out.strip().endswith(str(output))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{model}/nowhere"], "no results at"),
        (["{model}/feature_report"], "no run at"),
        (["{model}", "--run", "other"], "no run 'other'"),
        (["{model}", "--all_runs", "--run", "other"], "leave out"),
    ],
)
def test_mistakes_are_one_line(model, arguments, reason, capsys):
    assert run_script("make_report", [text.format(model=model) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_bare_folder_of_runs_is_refused(model, tmp_path):
    shutil.copytree(model / STATS, tmp_path / "stats" / MAIN_RUN)
    with pytest.raises(UserError, match="no run at"):
        open_model(tmp_path / "stats")
    assert [path.name for path in (tmp_path / "stats").iterdir()] == [MAIN_RUN]


def test_a_folder_of_several_models_is_refused(tmp_path):
    published_tree.build(tmp_path, tasks=("arithmetic",), models=published_tree.MODELS[:2], sensitivity=False)
    with pytest.raises(UserError, match="holds 2 models"):
        open_model(tmp_path / "data")
