"""The page for people: cells that cannot break the table, parts that are left out."""

import numpy as np
import pandas as pd
import pytest

from lib.flip_markdown import RunFacts, code, page
from lib.flip_metrics import QualityCut
from lib.flip_rows import EvaluatedRows
from lib.flip_table import FlipTable
from lib.neuron_intervention import FlipMatrix


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b `c`\n d", "`a\\|b 'c' d`"),
        ("", "(empty)"),
        ("x" * 100, f"`... {'x' * 80}`"),
        ("question " * 20 + "2+3=", f"`... {('question ' * 20 + '2+3=')[-80:].strip()}`"),
    ],
)
def test_cells_hold_any_text(text, shown):
    assert code(text) == shown


def test_a_run_without_rules_or_controls_says_so():
    nothing = np.zeros((0, 2))
    matrix = FlipMatrix(np.ones(2, dtype=bool), nothing.astype(np.int8), nothing.astype(bool))
    table = FlipTable((), EvaluatedRows(np.arange(2), np.array(["train", "test"], dtype=object)), matrix)
    text = page(pd.DataFrame(columns=["neuron"]), RunFacts(table, "p", QualityCut(), {}, None))
    assert "0 neurons, each ablated alone on 2 prompts (1 train, 1 test); run `p`." in text
    assert "No neuron flips enough prompts" in text
    assert "|" not in text and "random" not in text and "All neurons" not in text
