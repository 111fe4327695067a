"""The engine's answers equal those of a naive loop of full forwards with plain hooks."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.ablation_engine import AblationEngine
from lib.cli import UserError
from lib.interventions import DecodeScope, Intervention, build_table
from lib.neurons import Neuron
from tests.models import FAMILIES, tiny_model
from tests.naive_ablation import naive_answer

PROMPTS = ["1+2=", "10+20=", "7*8=", "123-4=", "9/3=", "a, b", "5", "2+3=5; 4+4="]
REFERENCES = ["3+4=", "11-5=", "6*7=", "100+1=", "8/2=", "c"]


@pytest.fixture(autouse=True, scope="module")
def rivals_are_found():
    """Rivals, which pay for many single neurons only, take part in all tests but those that say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.ablation_engine._SINGLES_WORTH_RIVALS", 0)
        yield


def make_engine(
    lm, intervention, *, decode_only=True, scope=DecodeScope.ANSWER, max_new_tokens=4, memory_mb=64, seed=0
):
    table = build_table(lm, intervention, REFERENCES, max_new_tokens=max_new_tokens, prompts=PROMPTS, seed=seed)
    return AblationEngine(
        lm,
        PROMPTS,
        table,
        max_new_tokens=max_new_tokens,
        decode_only=decode_only,
        decode_scope=scope,
        memory_mb=memory_mb,
    )


def random_groups(lm, seed, n_groups, *, with_heads=True):
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(n_groups):
        size = int(generator.choice([1, 1, 2, 6, 20]))
        layers = generator.choice(lm.n_layers, size=1 if generator.random() < 0.5 else lm.n_layers)
        group = set()
        for _ in range(size):
            layer = int(generator.choice(layers))
            head = int(generator.integers(lm.n_heads)) if with_heads and generator.random() < 0.3 else None
            label = f"m{layer}" if head is None else f"a{layer}.h{head}"
            group.add(Neuron(label, int(generator.integers(lm.d_model))))
        groups.append(sorted(group, key=lambda neuron: neuron.sort_key))
    return groups


def assert_equal_to_naive(lm, engine, groups, datapoints, *, decode_only, scope, max_new_tokens=4):
    result = engine.answers(groups, datapoints)
    n_changed = 0
    for g, group in enumerate(groups):
        for column, datapoint in enumerate(datapoints):
            expected = naive_answer(
                lm,
                PROMPTS[datapoint],
                datapoint,
                group,
                engine.table,
                max_new_tokens=max_new_tokens,
                decode_only=decode_only,
                scope=scope,
            )
            actual = result.texts.get((g, column), engine.baseline_answers[datapoint])
            assert actual == expected, (group, PROMPTS[datapoint])
            assert result.changed[g, column] == ((g, column) in result.texts)
            n_changed += expected != engine.baseline_answers[datapoint]
    return n_changed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("intervention", list(Intervention))
@pytest.mark.parametrize("mode", ["answer", "generated", "whole"])
def test_answers_equal_naive_hooks(family, intervention, mode):
    decode_only = mode != "whole"
    scope = DecodeScope.GENERATED if mode == "generated" else DecodeScope.ANSWER
    lm = tiny_model(family, seed=3)
    engine = make_engine(lm, intervention, decode_only=decode_only, scope=scope)
    groups = random_groups(lm, seed=len(mode), n_groups=5)
    n_changed = assert_equal_to_naive(lm, engine, groups, range(len(PROMPTS)), decode_only=decode_only, scope=scope)
    # A test in which nothing changes would prove little.
    assert n_changed > 0 or mode == "generated"


@settings(max_examples=12)
@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 10_000),
    intervention=st.sampled_from(list(Intervention)),
    mode=st.sampled_from(["answer", "generated", "whole"]),
    with_bos=st.booleans(),
    at_once=st.sampled_from([1, 30, 2048]),
    is_packed=st.booleans(),
)
def test_fresh_models_and_groups(family, seed, intervention, mode, with_bos, at_once, is_packed):
    decode_only = mode != "whole"
    scope = DecodeScope.GENERATED if mode == "generated" else DecodeScope.ANSWER
    lm = tiny_model(family, seed=seed, with_bos=with_bos)
    groups = random_groups(lm, seed=seed, n_groups=3)
    generator = np.random.default_rng(seed)
    datapoints = generator.choice(len(PROMPTS), size=4, replace=False).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.engine_chunk._POSITIONS_AT_ONCE", at_once)
        if not is_packed:
            patch.setattr("lib.packed_weights._packed", weakref.WeakKeyDictionary())
            patch.setattr("lib.packed_weights._is_supported", lambda weights: False)
        engine = make_engine(lm, intervention, decode_only=decode_only, scope=scope)
        assert_equal_to_naive(lm, engine, groups, datapoints, decode_only=decode_only, scope=scope)


def test_small_memory_and_order_do_not_change_answers():
    lm = tiny_model("llama", seed=5)
    groups = random_groups(lm, seed=1, n_groups=12)
    wide = make_engine(lm, Intervention.MEAN_POSITIONAL).answers(groups, range(8))
    narrow = make_engine(lm, Intervention.MEAN_POSITIONAL, memory_mb=0.02)
    assert len(narrow._blocks) > 1
    backwards = narrow.answers(groups[::-1], list(range(8))[::-1])
    assert (backwards.changed[::-1, ::-1] == wide.changed).all()
    assert {(11 - g, 7 - d): text for (g, d), text in backwards.texts.items()} == wide.texts


def test_empty_group_changes_nothing():
    lm = tiny_model("gpt2", seed=2)
    result = make_engine(lm, Intervention.ZERO).answers([[], [Neuron("m0", 1)]], range(8))
    assert not result.changed[0].any()


def test_neurons_the_model_does_not_have_are_refused():
    engine = make_engine(tiny_model("llama"), Intervention.ZERO)
    with pytest.raises(UserError, match="m9:1 is not part of"):
        engine.answers([[Neuron("m9", 1)]], [0])


SHARED = [f"2+3=5; {text}" for text in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_a_common_beginning(family, monkeypatch):
    # The common tokens are run once for all prompts; answers must be those of each prompt alone.
    monkeypatch.setattr("tests.lib.test_ablation_engine.PROMPTS", SHARED)
    lm = tiny_model(family, seed=8)
    together = [generation.answer for generation in lm.generate(SHARED, 4, batch_size=8)]
    assert together == [lm.generate([prompt], 4)[0].answer for prompt in SHARED]
    engine = make_engine(lm, Intervention.MEAN_POSITIONAL)
    groups = random_groups(lm, seed=2, n_groups=4)
    assert_equal_to_naive(lm, engine, groups, range(8), decode_only=True, scope=DecodeScope.ANSWER)


@pytest.mark.parametrize("n_rivals", [1, 5])
def test_few_kept_rivals_fall_back_to_the_vocabulary(monkeypatch, n_rivals):
    monkeypatch.setattr("lib.engine_logits.N_RIVALS", n_rivals)
    lm = tiny_model("gptj", seed=4)
    engine = make_engine(lm, Intervention.ZERO)
    groups = random_groups(lm, seed=6, n_groups=6)
    assert assert_equal_to_naive(lm, engine, groups, range(8), decode_only=True, scope=DecodeScope.ANSWER) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rivals_or_not_gives_the_same_answers(family, monkeypatch):
    lm = tiny_model(family, seed=3)
    groups = random_groups(lm, seed=7, n_groups=9)
    n_singles = sum(len(group) == 1 for group in groups)
    assert n_singles > 1
    found = []
    for worth, is_found in ((n_singles, True), (n_singles + 1, False)):
        monkeypatch.setattr("lib.ablation_engine._SINGLES_WORTH_RIVALS", worth)
        engine = make_engine(lm, Intervention.ZERO)
        found.append(engine.answers(groups, range(8)))
        assert bool(engine._rivals_of) is is_found
    assert found[0].texts == found[1].texts and len(found[0].texts) > 0


def test_answers_end_where_the_task_says_so():
    # Nothing after the first digit matters: answers are the full ones, cut after their first digit.
    def is_complete(text):
        return any(character.isdigit() for character in text)

    lm = tiny_model("llama", seed=3)
    groups = random_groups(lm, seed=4, n_groups=8)
    full = make_engine(lm, Intervention.MEAN)
    table = full.table
    cut = AblationEngine(lm, PROMPTS, table, max_new_tokens=4, is_complete=is_complete)

    def first_digit(text):
        return next((character for character in text if character.isdigit()), text)

    expected = full.answers(groups, range(8))
    actual = cut.answers(groups, range(8))
    for g in range(len(groups)):
        for d in range(8):
            whole = expected.texts.get((g, d), full.baseline_answers[d])
            ended = actual.texts.get((g, d), cut.baseline_answers[d])
            assert first_digit(whole) == first_digit(ended)
    assert cut.counters.n_diverged <= full.counters.n_diverged


def test_a_settled_answer_is_left_there_and_nothing_else_changes():
    lm = tiny_model("llama", seed=3)
    groups = random_groups(lm, seed=4, n_groups=8)
    engine = make_engine(lm, Intervention.MEAN)
    whole = engine.answers(groups, range(8))

    def is_settled(group, datapoint, text):
        # One group and datapoint at a time: a wrong place would be noticed.
        return group % 2 == 0 and datapoint % 3 == 0 and len(text) >= 1

    cut = engine.answers(groups, [7, *range(7)], is_settled=is_settled)
    places = [7, *range(7)]
    assert (cut.changed == whole.changed[:, places]).all()
    n_shorter = 0
    for (group, column), text in cut.texts.items():
        datapoint = places[column]
        expected = whole.texts[group, datapoint]
        assert expected.startswith(text)
        n_shorter += text != expected
        assert text == expected or is_settled(group, datapoint, text)
    assert n_shorter > 0


@pytest.mark.parametrize("fewest", [1, 10**9])
def test_windows_of_unlike_length_together_or_apart(monkeypatch, fewest):
    monkeypatch.setattr("lib.ablation_engine._FEWEST_ROWS", fewest)
    lm = tiny_model("qwen2", seed=6)
    engine = make_engine(lm, Intervention.MEAN_POSITIONAL, decode_only=False)
    assert len(engine._parts(range(8), 3)) == (1 if fewest > 1 else len({len(w.tokens) for w in engine._windows}))
    groups = random_groups(lm, seed=5, n_groups=3)
    assert_equal_to_naive(lm, engine, groups, [5, 0, 7, 2], decode_only=False, scope=DecodeScope.ANSWER)


def test_screened_logits_give_the_same_answers(monkeypatch):
    monkeypatch.setattr("lib.engine_screen.pays", lambda head, state: True)
    monkeypatch.setattr("lib.engine_logits.N_RIVALS", 1)
    lm = tiny_model("llama", seed=9)
    engine = make_engine(lm, Intervention.ZERO)
    groups = random_groups(lm, seed=3, n_groups=6)
    assert assert_equal_to_naive(lm, engine, groups, range(8), decode_only=True, scope=DecodeScope.ANSWER) > 0
