"""HANS (McCoy et al. 2019): does the model tell entailment from its look-alikes?

Each premise contains the hypothesis' words, or the hypothesis as a subsequence or constituent; half of the hypotheses
follow and half do not, so shallow heuristics fail. The data are a local file in the published tab-separated format
(`--hans_file` or `HANS_LOCAL_FILE`), or are downloaded once. Answers are read as E (entailment) or N.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import UserError, require_file, rng
from lib.task_spec import AnswerScore, FeatureTaskSpec, TaskSettings, setting, target_statistics

if TYPE_CHECKING:
    import pandas as pd

    from lib.feature_representation import Feature

FILES = {"validation": "heuristics_evaluation_set.txt", "train": "heuristics_train_set.txt"}
BASE_URL = "https://raw.githubusercontent.com/tommccoy1/hans/master/"
PUBLISHED_ROWS = 30_000
INSTRUCTION = "Does the premise entail the hypothesis? E: entailment, N: non-entailment."
SHOTS = (("The teachers thanked the baker .", "The baker thanked the teachers .", "N"),
         ("The cat near the dog slept .", "The dog slept .", "N"),
         ("The cat slept and the dog ran .", "The dog ran .", "E"),
         ("Because the baby cried , the nurse woke .", "The baby cried .", "E"))
"""Solved examples in our own words, in the order in which `--few_shot` takes them from the end. Without them a small
model goes on with a story instead of a label."""
HEURISTICS = ("lexical_overlap", "subsequence", "constituent")
LABELS = {"entailment": "E", "non-entailment": "N"}

_COLUMNS = {"gold_label": ("gold_label", "label"), "premise": ("sentence1", "premise"),
            "hypothesis": ("sentence2", "hypothesis"), "heuristic": ("heuristic",), "subcase": ("subcase",),
            "template": ("template",)}
_PAIR_ID = ("pairID", "pair_id")
_WORD = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)?")
_ARTICLES = {"a", "an", "the"}
_NEGATIONS = {"no", "not", "never", "none", "nobody", "nothing", "neither"}
_SPLITS = {**dict.fromkeys(("valid", "validation", "dev", "eval", "evaluation"), "validation"),
           **dict.fromkeys(("train", "training"), "train")}


@dataclass(frozen=True)
class HansSettings(TaskSettings):
    """Flags of the HANS task."""

    max_new_tokens: int = setting(3, "greedy tokens per answer, here and in every ablation", env="HANS_MAX_NEW_TOKENS")
    few_shot: int = setting(len(SHOTS), f"number of solved examples before each prompt, at most {len(SHOTS)}")
    hans_split: str = setting("validation", "validation or train", env="HANS_SPLIT")
    num_examples: int = setting(1024, "number of examples, drawn at random; 0: all", env="HANS_NUM_EXAMPLES")
    balance_labels: bool = setting(True, "draw as many of each label", env="HANS_BALANCE_LABELS")
    hans_seed: int = setting(-1, "seed of the draw; -1: that of the run", env="HANS_TASK_SEED")
    hans_file: str = setting("", "local file in the HANS format, instead of the download", env="HANS_LOCAL_FILE",
                             identity=False)
    hans_cache_dir: str = setting("./cache/hans", "folder of the download", env="HANS_CACHE_DIR", identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hans_split.lower() not in _SPLITS:
            raise UserError(f"--hans_split {self.hans_split!r}: choose validation or train")
        if not 0 <= self.few_shot <= len(SHOTS):
            raise UserError(f"--few_shot {self.few_shot}: from 0 to {len(SHOTS)}")

    @property
    def split(self) -> str:
        """`validation` or `train`."""
        return _SPLITS[self.hans_split.lower()]


# ---------------------------------------------------------------- the data

def read_hans(path: Path, split: str) -> list[dict[str, Any]]:
    """The examples of a HANS file, with what is derived from their words.

    Raises:
        UserError: a column is missing, a label is unknown, or there is no example.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"HANS file cannot be read: {path} ({error})") from None
    return parse_hans(text, split, str(path))


def parse_hans(text: str, split: str, where: str) -> list[dict[str, Any]]:
    """`read_hans` on the content of a file; `where` names it in errors."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    header = reader.fieldnames or []
    found = {name: next((column for column in names if column in header), None) for name, names in _COLUMNS.items()}
    missing = [_COLUMNS[name][0] for name, column in found.items() if column is None]
    if missing:
        raise UserError(f"{where} is not in the HANS format: its header has no {', '.join(missing)}")
    pair_column = next((column for column in _PAIR_ID if column in header), None)
    examples = []
    for number, row in enumerate(reader):
        values = {name: (row[column] or "").strip() for name, column in found.items()}
        if values["gold_label"] in ("", "-"):
            continue
        if values["gold_label"] not in LABELS:
            raise UserError(f"{where}, example {number}: unknown label {values['gold_label']!r}; "
                            f"known are {', '.join(LABELS)}")
        pair_id = (row[pair_column] or "") if pair_column else ""
        examples.append(_example(values, number, pair_id or f"{split}_{number}", split))
    if not examples:
        raise UserError(f"{where} holds no labelled examples")
    return examples


def _example(values: Mapping[str, str], number: int, pair_id: str, split: str) -> dict[str, Any]:
    """One example, keys in the published order, before the prompt is added."""
    premise, hypothesis = values["premise"], values["hypothesis"]
    p_words, h_words = words(premise), words(hypothesis)
    p_content, h_content = ([word for word in some if word not in _ARTICLES] for some in (p_words, h_words))
    shared = set(p_content) & set(h_content)
    ratio = len(shared) / len(set(h_content)) if h_content else 0.0
    return {
        "example_id": number, "pair_id": pair_id, "split": split, "premise": premise, "hypothesis": hypothesis,
        "gold_label": values["gold_label"], "expected_label": LABELS[values["gold_label"]],
        "heuristic": values["heuristic"], "subcase": values["subcase"], "template": values["template"],
        "premise_num_words": len(p_words), "hypothesis_num_words": len(h_words),
        "premise_num_chars": len(premise), "hypothesis_num_chars": len(hypothesis),
        "premise_content_words": len(p_content), "hypothesis_content_words": len(h_content),
        "lexical_overlap_ratio": ratio, "full_lexical_overlap": ratio >= 0.999,
        "hypothesis_is_subsequence": is_subsequence(h_words, p_words),
        "premise_has_negation": bool(_NEGATIONS & set(p_words)),
        "hypothesis_has_negation": bool(_NEGATIONS & set(h_words))}


def prompt_text(premise: str, hypothesis: str, few_shot: int) -> str:
    """The instruction, some solved examples, and the pair in question."""
    pairs = [*SHOTS[len(SHOTS) - few_shot:], (premise, hypothesis, "")]
    blocks = [f"Premise: {before}\nHypothesis: {after}\nLabel: {label}".rstrip() for before, after, label in pairs]
    return "\n\n".join([INSTRUCTION, *blocks])


def words(text: str) -> list[str]:
    """Lower-case words; inner hyphens and apostrophes belong to them."""
    return [word.lower() for word in _WORD.findall(text)]


def is_subsequence(inner: Sequence[str], outer: Sequence[str]) -> bool:
    """True if `inner` occurs in `outer` in order, gaps allowed."""
    remaining = iter(outer)
    return all(word in remaining for word in inner)


def draw(examples: list[dict[str, Any]], n_examples: int, balance: bool, seed: int) -> list[dict[str, Any]]:
    """A random sample in random order; all examples if that many are asked for, or none (0)."""
    if not 0 < n_examples < len(examples):
        return examples
    generator = rng(seed, "hans")
    if not balance:
        return [examples[index] for index in generator.permutation(len(examples))[:n_examples]]
    chosen: list[int] = []
    for label, count in (("E", n_examples // 2), ("N", n_examples - n_examples // 2)):
        pool = [index for index, example in enumerate(examples) if example["expected_label"] == label]
        if len(pool) < count:
            raise UserError(f"--num_examples {n_examples} needs {count} examples labelled {label}, the file has "
                            f"{len(pool)}; ask for fewer or use --no-balance_labels")
        chosen += [pool[index] for index in generator.permutation(len(pool))[:count]]
    return [examples[chosen[index]] for index in generator.permutation(len(chosen))]


# ---------------------------------------------------------------- answers

def predicted_label(answer: str) -> str | None:
    """E, N or None: the word entailment if it is there, else the last stand-alone letter e or n."""
    text = answer.strip().lower()
    if re.search(r"\bnon[- ]?entailment\b", text):
        return "N"
    if re.search(r"\bentailment\b", text):
        return "E"
    letters = re.findall(r"\b[en]\b", text)
    return letters[-1].upper() if letters else None


class HansTask(FeatureTaskSpec):
    """Entailment or not, on the HANS examples."""

    NAME = "hans_nli"
    Settings = HansSettings
    TOKENS_DICT_KEYS = (
        "premise_num_words, hypothesis_num_words, premise_num_chars, hypothesis_num_chars, premise_content_words, "
        "hypothesis_content_words, lexical_overlap_ratio, full_lexical_overlap, hypothesis_is_subsequence, "
        "premise_has_negation, hypothesis_has_negation, heuristic, subcase, template")
    SYSTEM_PROMPT = (
        "You study why a language model labels some premise-hypothesis pairs correctly as entailment or non-entailment "
        "and others not. Propose short, testable properties of a pair that tell the two groups apart and say different "
        "things: shared words, word order, subsequences and constituents, lengths, negation, passive voice, relative "
        "clauses, conjunctions, adverbs, verbs that do not imply their complement.")

    settings: HansSettings

    @property
    def SEED_FEATURES(self) -> list[Feature]:  # noqa: N802 (published name)
        """11 features: overlap, order, lengths, negation, and the heuristic that an example targets."""
        return _seed_features()

    @property
    def depends_on_seed(self) -> bool:
        """Only a draw without a seed of its own."""
        return self.settings.hans_seed < 0 and self.settings.num_examples > 0

    def input_files(self) -> dict[str, Path]:
        """The local file, if one is given; the download is named by its split."""
        if not self.settings.hans_file:
            return {}
        hint = "check --hans_file or HANS_LOCAL_FILE"
        return {"HANS file": require_file(self.settings.hans_file, "HANS file", hint)}

    def examples(self, seed: int) -> list[dict[str, Any]]:
        """The drawn examples; `dataset_index` is the position in the draw."""
        path = self.input_files().get("HANS file") or self._downloaded()
        examples = read_hans(path, self.settings.split)
        own_seed = self.settings.hans_seed if self.settings.hans_seed >= 0 else seed
        chosen = draw(examples, self.settings.num_examples, self.settings.balance_labels, own_seed)
        return [{**example, "prompt": prompt_text(example["premise"], example["hypothesis"], self.settings.few_shot),
                 "dataset_index": index} for index, example in enumerate(chosen)]

    def _downloaded(self) -> Path:
        from lib.downloads import download

        split = self.settings.split
        name = FILES[split]
        hint = ("without network access give a local copy with --hans_file or HANS_LOCAL_FILE "
                "(github.com/tommccoy1/hans)")

        def check(content: bytes) -> None:
            count = len(parse_hans(content.decode("utf-8"), split, name))
            if count != PUBLISHED_ROWS:
                raise UserError(f"{name} holds {count} examples instead of {PUBLISHED_ROWS}")

        return download(BASE_URL + name, Path(self.settings.hans_cache_dir) / name, what="HANS", hint=hint, check=check)

    def score_answers(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[AnswerScore]:
        """Right if the answer's label is the expected one; an answer without a label is wrong."""
        scores = []
        for row, answer in zip(rows, answers, strict=True):
            label = predicted_label(answer)
            scores.append(AnswerScore(label == row["expected_label"], "" if label else "neither E nor N in the answer"))
        return scores

    def cache_from_answers(self, examples: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[dict[str, Any]]:
        """One dictionary per example, in the published order of keys."""
        scores = self.score_answers(examples, answers)
        return [{**example, "raw_output": answer, "predicted_label": predicted_label(answer), "is_correct": score.label}
                for example, answer, score in zip(examples, answers, scores, strict=True)]

    def dataset_from_cache(self, cache: Any) -> pd.DataFrame:
        """One row per example, with the keys of the cache as columns."""
        frame = super().dataset_from_cache(cache)
        if "expected_label" not in frame or frame["expected_label"].isna().any():
            raise UserError("not a cache of HANS answers: it has no expected_label; is it another task's?")
        return frame

    def get_basic_statistics(self, frame: pd.DataFrame) -> dict[str, Any]:
        """Accuracy, also by heuristic and subcase; labels expected and given."""
        given = Counter("none" if label is None or label != label else label for label in frame["predicted_label"])
        return target_statistics(frame, self.DEFAULT_TARGETS) | {
            "accuracy": float(frame["is_correct"].mean()),
            "label_counts": dict(sorted(Counter(frame["expected_label"]).items())),
            "predicted_label_counts": dict(sorted(given.items())),
            **{f"accuracy_by_{name}": _accuracy_by(frame, name) for name in ("heuristic", "subcase")}}

    def parse_prompt_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The derived fields of the example."""
        return {key: row[key] for key in self.TOKENS_DICT_KEYS.split(", ")}


def _accuracy_by(frame: pd.DataFrame, column: str) -> dict[str, dict[str, float | int]]:
    return {str(name): {"accuracy": float(labels.mean()), "n": len(labels)}
            for name, labels in sorted(frame.groupby(column)["is_correct"])}


def _seed_features() -> list[Feature]:
    from lib.feature_representation import Feature, Origin, per_row

    def field(label: str, description: str, key: str) -> Feature:
        name = f"get_{key}"
        source = f"def {name}(prompt: str, info: dict):\n    return float(info['{key}'])\n"
        return Feature(label, description, source, name, Origin.SEED, per_row(float, key))

    def heuristic(label: str, value: str) -> Feature:
        name = f"is_{value}"
        source = f"def {name}(prompt: str, info: dict):\n    return 1.0 if info['heuristic'] == '{value}' else 0.0\n"
        return Feature(label, f"1 if the example targets the {value.replace('_', ' ')} heuristic", source, name,
                       Origin.SEED, per_row(lambda found: found == value, "heuristic"))

    shorter = ("def hypothesis_is_shorter(prompt: str, info: dict):\n"
               "    return 1.0 if info['hypothesis_num_words'] < info['premise_num_words'] else 0.0\n")
    return [
        field("Lexical overlap ratio", "share of the hypothesis' content words that the premise has",
              "lexical_overlap_ratio"),
        field("Full lexical overlap", "1 if the premise has all content words of the hypothesis",
              "full_lexical_overlap"),
        field("Hypothesis is subsequence", "1 if the hypothesis' words occur in the premise in order",
              "hypothesis_is_subsequence"),
        field("Premise has negation", "1 if the premise has a negation word", "premise_has_negation"),
        field("Hypothesis has negation", "1 if the hypothesis has a negation word", "hypothesis_has_negation"),
        field("Premise length", "words of the premise", "premise_num_words"),
        field("Hypothesis length", "words of the hypothesis", "hypothesis_num_words"),
        Feature("Hypothesis shorter than premise", "1 if the hypothesis has fewer words", shorter,
                "hypothesis_is_shorter", Origin.SEED,
                per_row(lambda h, p: h < p, "hypothesis_num_words", "premise_num_words")),
        *[heuristic(f"{value.replace('_', ' ').capitalize()} heuristic", value) for value in HEURISTICS]]


TASK_SPEC = HansTask()
