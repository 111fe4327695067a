"""Stage 1: a task's prompts, the model's answers, their labels, and what they look like in numbers."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.artifacts import (
    StageRecord,
    exclusive,
    expecting,
    file_digest,
    json_text,
    plain,
    read_json,
    read_jsonl,
    read_pickle,
    text_digest,
    write_json,
    write_jsonl,
    write_pickle,
)
from lib.cli import Report, UserError
from lib.task_spec import FeatureTaskSpec, resolve_task_spec, typed_labels

if TYPE_CHECKING:
    import pandas as pd

    from lib.modeling_and_ablation import LanguageModel

STAGE = "1_generate_prompts_and_answers"
STATISTICS_FILE = "dataset_stats.json"
PROMPTS_PER_SHARD = 256
CACHE = "cache of answers (stage 1)"
PLAIN_SUFFIX = ".jsonl"
ROWS_PER_BLOCK = 10_000
MANY_EMPTY = 0.5
"""More empty answers than this share, and stage 1 says what to do."""


def answers_record_path(cache_path: str | Path) -> Path:
    """Where the record of a cache of answers is: beside it."""
    cache_path = Path(cache_path)
    return cache_path.with_name(f"{cache_path.stem}.run_metadata.json")


def write_answers(cache_path: Path, cache: Any, task: FeatureTaskSpec) -> list[Path]:
    """Write the cache in the published form, and beside it as plain text: a JSON object per datapoint. The paths."""
    write_pickle(cache_path, cache)
    plain_path = cache_path.with_suffix(PLAIN_SUFFIX)
    # Each datapoint has the columns of the table, so that whoever reads it needs neither this code nor a pickle.
    frame = task.dataset_from_cache(cache)
    blocks = (frame.iloc[start:start + ROWS_PER_BLOCK].astype(object) for start in range(0, len(frame), ROWS_PER_BLOCK))
    write_jsonl(plain_path, (record for block in blocks
                             for record in block.where(block.notna(), None).to_dict("records")))
    return [cache_path, plain_path]


def dataset_of(task: FeatureTaskSpec, cache: Any, cache_path: Path) -> pd.DataFrame:
    """The datapoints in the content of a cache, which may hold anything: prompts and answers are texts.

    Raises:
        UserError: the content is not what the task writes.
    """
    with expecting(f"a cache of answers of the task {task.NAME}", cache_path):
        frame = task.dataset_from_cache(cache)
        for name in (task.DEFAULT_INPUT, task.DEFAULT_OUTPUT):
            if not all(isinstance(text, str) for text in frame[name]):
                raise ValueError(f"{name} is not a text everywhere")
        return frame


def read_dataset(cache_path: Path, task: FeatureTaskSpec) -> pd.DataFrame:
    """The datapoints of a cache of answers: a pickle, or its plain copy (`.jsonl`).

    Raises:
        UserError: it cannot be read, is unsafe, or belongs to another task.
    """
    import pandas as pd

    if cache_path.suffix != PLAIN_SUFFIX:
        return dataset_of(task, read_pickle(cache_path, CACHE), cache_path)
    records = read_jsonl(cache_path, CACHE)
    names = {task.DEFAULT_INPUT, task.DEFAULT_OUTPUT, *task.DEFAULT_TARGETS}
    if not records or not all(isinstance(record, dict) and names <= set(record) for record in records):
        raise UserError(f"{cache_path} is not a cache of answers of the task {task.NAME}: each line needs "
                        f"{', '.join(sorted(names))}")
    return typed_labels(pd.DataFrame(records), task.DEFAULT_TARGETS)


def recorded_task(module: str, cache_path: str | Path) -> FeatureTaskSpec:
    """The task as stage 1 ran it for this cache; with its defaults if the cache has no record (an older archive).

    Raises:
        UserError: the cache was made by another task.
    """
    task = resolve_task_spec(module)
    path = answers_record_path(cache_path)
    if not path.is_file():
        return task
    record = read_json(path, "record of stage 1")
    with expecting("a record of stage 1", path):
        settings = record["settings"]
        if settings["task_module"] != module:
            raise UserError(f"{cache_path} holds answers of the task {settings['task_module']}, not {module}; "
                            "give the same --task_module as in stage 1")
        # The summary also has the settings that only say where things are.
        values = {**settings["task_settings"], **record.get("summary", {}).get("task_settings", {})}
        return task.configured(task.Settings.from_json(values), recorded_in=path)


@dataclass(frozen=True)
class BehaviourCache:
    """The cache of answers that stage 1 loads or makes."""

    task: FeatureTaskSpec
    path: Path
    record: StageRecord
    seed: int

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> BehaviourCache:
        """The cache that the flags of stage 1 ask for."""
        from lib.modeling_and_ablation import model_identity

        task = resolve_task_spec(args.task_module)
        task = task.configured(task.Settings.from_arguments(args))
        path = Path(args.prompts_answers_pkl_file)
        if path.is_dir():
            raise UserError(f"--prompts_answers_pkl_file must name a file, and {path} is a folder")
        if path.suffix == PLAIN_SUFFIX:
            raise UserError(f"--prompts_answers_pkl_file {path}: stage 1 writes a pickle; name it .pkl, and a copy in "
                            f"plain text appears beside it as {PLAIN_SUFFIX}")
        settings = {"task_module": args.task_module, "task_settings": task.settings.identity(),
                    "model": model_identity(args.ai_model), "dtype": args.dtype, "decoding": "greedy",
                    "seed": args.seed if task.depends_on_seed else None}
        is_archived = path.is_file() and not answers_record_path(path).is_file()
        inputs = {} if is_archived else task.input_files()
        record = StageRecord(STAGE, settings, inputs, answers_record_path(path))
        return cls(task, path, record, args.seed)

    @property
    def parts_dir(self) -> Path:
        """Answers of an unfinished run."""
        return self.path.with_name(f"{self.path.stem}.parts") / self.record.fingerprint[:16]

    @property
    def pending_path(self) -> Path:
        """The cache with labels added, while it takes the place of the one without."""
        return self.path.with_name(f"{self.path.stem}.mended.pkl")

    def is_usable(self, report: Report) -> bool:
        """True if the cache is there and answers what is asked; False if it is to be made.

        Raises:
            UserError: it is there, but made with other settings or changed since.
        """
        if not self.path.is_file():
            return False
        stored = self.record.stored()
        if stored is None:
            if self.parts_dir.is_dir():
                return False  # Interrupted between writing the cache and its record: made again from the parts.
            report.line(f"{self.path} has no record of how it was made (an archived cache): used as it is")
            return True
        differences = _differences(stored.get("settings", {}), plain(self.record.settings))
        differences += [f"content of the {name}" for name, path in self.record.inputs.items()
                        if stored.get("inputs", {}).get(name) != file_digest(path)]
        if differences:
            raise UserError(f"{self.path} was made with other settings ({'; '.join(differences)}); "
                            "use --force to make it again, or another --prompts_answers_pkl_file")
        is_changed = stored.get("outputs", {}).get(self.path.name) != file_digest(self.path)
        if is_changed and not self.pending_path.is_file():
            raise UserError(f"{self.path} was changed after stage 1 wrote it; use --force to make it again, "
                            f"or delete {self.record.metadata_path} to use it as it is")
        if not is_changed and not self.record.is_complete():
            with exclusive(self.path.parent):  # Only its plain copy is missing or damaged.
                write_answers(self.path, read_pickle(self.path, CACHE), self.task)
        return True

    def make(self, load_model: Callable[[], LanguageModel], batch_size: int, report: Report) -> None:
        """Answer every prompt, label the answers, write the cache and its record."""
        started = time.time()
        examples = self.task.examples(self.seed)
        if not examples:
            raise UserError(f"the task {self.task.NAME} has no prompts with these settings")
        with exclusive(self.path.parent):
            answers = answer_in_shards([example[self.task.DEFAULT_INPUT] for example in examples], load_model,
                                       self.task.MAX_NEW_TOKENS, batch_size, self.parts_dir, report)
            outputs = write_answers(self.path, self.task.cache_from_answers(examples, answers), self.task)
            summary = {"n_prompts": len(examples), "task_settings": self.task.settings.to_json()}
            self.record.finish(outputs, started=started, summary=summary)
            shutil.rmtree(self.parts_dir.parent)

    def mend_labels(self, report: Report) -> None:
        """Try again what could not be labelled; an archived cache stays as it is."""
        if self.record.stored() is None:
            return
        started = time.time()
        if self.pending_path.is_file():
            mended = read_pickle(self.pending_path, "mended cache of answers (stage 1)")
        else:
            mended = self.task.mend_labels(read_pickle(self.path, CACHE))
        if mended is not None:
            with exclusive(self.path.parent):
                # Until the record knows the new content, this copy says that it is no damage.
                write_pickle(self.pending_path, mended)
                outputs = write_answers(self.path, mended, self.task)
                self.record.finish(outputs, started=started, summary=self.record.summary())
                self.pending_path.unlink()
            report.line("labels that were missing have been added")

    def statistics(self, report: Report) -> dict[str, Any]:
        """The task's statistics of the labelled answers; says so if the model hardly answers at all."""
        frame = read_dataset(self.path, self.task)
        n_empty = int((frame[self.task.DEFAULT_OUTPUT].str.strip() == "").sum())
        if n_empty > MANY_EMPTY * len(frame):
            report.line(f"warning: {n_empty} of {len(frame)} answers are empty: the model ends at once. Models tuned "
                        "for chat often do so on a bare question; give the prompt a form that calls for an answer, "
                        "such as 'Q: ...', line break, 'A:'")
        return plain(self.task.get_basic_statistics(frame))


def _differences(stored: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, as `name: stored, asked for now`."""
    found = []
    for name in sorted({*stored, *asked}):
        old, new = stored.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old!r}, asked for {new!r}")
    return found


def answer_in_shards(prompts: list[str], load_model: Callable[[], LanguageModel], max_new_tokens: int, batch_size: int,
                     parts_dir: Path, report: Report) -> list[str]:
    """The model's answer to each prompt, in order.

    Prompts are taken by length, so that batches need little padding. Each shard is written when it is answered; a later
    call with the same folder goes on behind the last one, and loads no model if nothing is left.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    n_done = _n_answered(parts_dir)
    if n_done:
        report.line(f"{n_done} of {len(prompts)} answers are there from an interrupted run")
    if n_done < len(order):
        model = load_model()
        size = max(PROMPTS_PER_SHARD, batch_size)
        shards = [(start, order[start:start + size]) for start in range(n_done, len(order), size)]
        for start, shard in report.progress(shards, unit="shard", desc="answers"):
            generations = model.generate([prompts[index] for index in shard], max_new_tokens, batch_size=batch_size)
            answers = [generation.answer for generation in generations]
            write_json(_part(parts_dir, start), {"answers": answers, "sha256": text_digest(answers)}, indent=None)
    return _collect(parts_dir, order)


def _part(parts_dir: Path, start: int) -> Path:
    return parts_dir / f"answers_{start:08d}.json"


def _read_part(parts_dir: Path, start: int) -> list[str]:
    """The answers of the part that begins there; none if it is missing or damaged."""
    try:
        part = read_json(_part(parts_dir, start), "answers of an interrupted run")
        return part["answers"] if part["sha256"] == text_digest(part["answers"]) else []
    except (UserError, KeyError, TypeError):
        return []


def _n_answered(parts_dir: Path) -> int:
    """How many answers the parts hold without a gap from the start."""
    n_done = 0
    while part := _read_part(parts_dir, n_done):
        n_done += len(part)
    return n_done


def _collect(parts_dir: Path, order: list[int]) -> list[str]:
    """All answers from the parts, in the order of the prompts."""
    by_length: list[str] = []
    while part := _read_part(parts_dir, len(by_length)):
        by_length += part
    answers = [""] * len(order)
    for index, answer in zip(order, by_length, strict=True):
        answers[index] = answer
    return answers


def generate_prompts_and_answers(args: argparse.Namespace, report: Report) -> None:
    """Run stage 1: load or make the cache, print its statistics and write them where asked."""
    from lib.modeling_and_ablation import load_language_model

    cache = BehaviourCache.from_arguments(args)
    if args.force or not cache.is_usable(report):
        cache.make(lambda: load_language_model(args.ai_model, device=args.device, dtype=args.dtype,
                                               cache_dir=args.ai_model_cache_dir), args.batch_size, report)
    else:
        report.line(f"stage 1 is up to date: {cache.path}")
        if cache.record.stored() is not None:
            # Left if the run that made the cache was killed at its very end.
            shutil.rmtree(cache.parts_dir.parent, ignore_errors=True)
        cache.mend_labels(report)
    statistics = cache.statistics(report)
    report.heading("Basic Statistics")
    report.line(json_text(statistics))
    if args.stats_json_out:
        _write_if_changed(Path(args.stats_json_out) / STATISTICS_FILE, statistics)


def _write_if_changed(path: Path, statistics: dict[str, Any]) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != json_text(statistics) + "\n":
        write_json(path, statistics)
