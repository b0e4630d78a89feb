"""``r1mega prepare``: text or problems to tokenizer, token files, sample files and problem files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1mega.config.knob import REQUIRED, at_least, between, knob, one_of
from r1mega.config.run import ComputeConfig, RunConfig


@dataclass
class ProblemSourceConfig:
    """Where problems come from: a reasoning-gym data set, or a file."""

    kind: str = knob("reasoning_gym", "reasoning_gym or file (jsonl: the same)", "name", **one_of("reasoning_gym", "file", "jsonl"))
    dataset: str = knob("chain_sum", "reasoning-gym data set (kind reasoning_gym)", "name")
    path: str | None = knob(
        None, "JSONL or Parquet, compressed or not, a folder of them, a URL or hf:OWNER/NAME (kind file)", "path"
    )
    options: dict[str, Any] = knob({}, "the data set's own options", "option: value")
    question_column: str | None = knob(None, "column of the question (a.b: inside a); null: the first known name", "name")
    answer_column: str | None = knob(None, "column of the answer (a.b: inside a); null: the first known name", "name")
    num_train: int = knob(1000, "training problems; -1: all that a file has left", "problems", **at_least(-1))
    num_valid: int = knob(0, "validation problems; -1: all that a file has left", "problems", **at_least(-1))
    num_test: int = knob(
        0, "held-out problems, disjoint from all others by normalised text; -1: all of a file", "problems", **at_least(-1)
    )


@dataclass
class TokenizerConfig:
    """A byte-level BPE trained on the run's own text, or one that exists."""

    path: str | None = knob(None, "existing tokenizer folder, or hf:OWNER/NAME; null: train one", "path")
    vocab_size: int = knob(1024, "entries to train, special tokens included", "tokens", **at_least(300))
    split_digits: bool = knob(True, "each digit is a token of its own", "bool")


@dataclass
class PrepareConfig(RunConfig):
    """``r1mega prepare``: everything that training reads, into one folder.

    Writes ``tokenizer/``; ``text.{bin,idx,json}`` and ``text_valid.*`` (pretraining text); ``problems/{train,valid,test}.jsonl``;
    ``worked.*`` (problems with worked solutions as pretraining documents); ``sft.*`` (conversations with a loss mask); with
    validation problems also ``worked_valid.*`` and ``sft_valid.*``.
    """

    text: list[str] = knob(
        [], "text files, JSONL or Parquet with a text column, folders, URLs, hf:OWNER/NAME, or stdlib (Python's library)", "path"
    )
    text_column: str = knob("text", "column of the text in JSONL and Parquet", "name")
    text_bytes: int = knob(0, "text taken at most; 0: all", "bytes", **at_least(0))
    valid_share: float = knob(0.01, "share of documents held out for the validation loss", "1", **between(0, 0.5))
    tokenizer: TokenizerConfig = knob(TokenizerConfig, "the tokenizer", "section")
    problems: dict[str, ProblemSourceConfig] = knob({}, "problem sources by name", "name: section")
    worked: int = knob(
        0, "training problems written as pretraining documents with worked solutions; -1: all", "problems", **at_least(-1)
    )
    worked_careful_share: float = knob(
        0.5, "share of worked solutions in the careful style, the rest are terse", "1", **between(0, 1)
    )
    sft: int = knob(
        0, "training problems (the last ones) written as conversations; -1: all; with sft_from 0 is all", "problems", **at_least(-1)
    )
    sft_careful_share: float = knob(0.5, "share of conversations in the careful style", "1", **between(0, 1))
    sft_from: str | None = knob(
        None,
        "problems with responses (rejection sampling), or with turns [model's, tool's, ..., model's], instead of worked solutions: "
        "JSONL or Parquet",
        "path",
    )


@dataclass
class ReportConfig(RunConfig):
    """``r1mega report``: one self-contained HTML page of a run."""

    run: str = knob(REQUIRED, "folder of the run", "path")
    target: str = knob("${run}/report.html", "the page", "path")


@dataclass
class CompareConfig(RunConfig):
    """``r1mega compare``: what differs between runs in config, data, code and environment, their results, their curves on one page.

    Two or more runs: ``run=A run=B``, or ``run=[A,B]``.
    """

    run: list[str] = knob(REQUIRED, "folders of two or more runs: run=A run=B, or run=[A,B]", "path")
    target: str = knob("${out}/compare.html", "the page", "path")


@dataclass
class StageConfig:
    """One stage of a recipe: a command and its overrides."""

    command: str = knob(REQUIRED, "the command that the stage runs", "name")
    needs: list[str] = knob([], "stages whose results this one reads", "stage")
    overrides: list[str] = knob(
        [], "Hydra overrides; {stage} stands for a needed stage's folder, {recipe} for the run's", "override"
    )
    copy_to: str | None = knob(None, "also place the stage's result here, below the run's folder", "path")


@dataclass
class RecipeConfig(ComputeConfig):
    """``r1mega recipe``: stages as a graph, results kept by the hash of their inputs.

    device, launch, parallel, precision and log hold for every stage that runs a model and does not choose them itself.
    """

    recipe: Any = knob(None, "description, and stages by name (StageConfig)", "section")
    only: list[str] = knob([], "stages to run, with what they need; empty: all", "stage")
