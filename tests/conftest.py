"""What several test files need: the shipped model, and tiny random ones."""

from __future__ import annotations

import os
from pathlib import Path

# Before transformers is imported: tests never touch the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable
from functools import lru_cache

import checked  # before the package is imported
import pytest
import torch

from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import Pair, PairSet
from mansu_interp.tasks.task import Task
from mansu_interp.utils.libraries import quiet

with quiet():  # torchao, where it is installed, tells which of its parts do not load
    from transformers import LlamaConfig, LlamaForCausalLM

TEST_DEVICE = os.environ.get("MANSU_TEST_DEVICE", "pretend")
if TEST_DEVICE == "pretend":
    # Before anything is differentiated: autograd counts the devices of a process once.
    import pretend  # noqa: F401

SHIPPED = Path(__file__).parents[1] / "circuits"
"""The exported circuits and masks."""
VOCAB = 50
torch.set_num_threads(1)  # pytest-xdist runs a worker a core


@lru_cache
def make_tiny(kv_heads: int = 4) -> LanguageModel:
    """A random three-layer Llama whose attention and MLP matter (large initial weights)."""
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return LanguageModel("tiny", LlamaForCausalLM(config).eval(), None)


def make_pairs(lengths: tuple[int, ...] = (4, 6, 6, 3, 7), seed: int = 0) -> PairSet:
    """Pairs of random tokens; lengths differ, so that batches are padded."""
    rng = random.Random(seed)
    pairs = []
    for k, length in enumerate(lengths):
        answers = rng.sample(range(1, VOCAB), 5)
        pairs.append(
            Pair(
                clean=tuple(rng.randrange(1, VOCAB) for _ in range(length)),
                corrupt=tuple(rng.randrange(1, VOCAB) for _ in range(length)),
                answer=answers[0],
                counterfactual=answers[1],
                distractors=tuple(answers[2:]),
                relation="random",
                subject=f"s{k}",
                phrasing=f"of {length}",
                prompt=f"prompt {k}",
                answer_text=f"answer {k}",
            )
        )
    return PairSet("random", tuple(pairs))


@pytest.fixture
def tiny_model() -> Callable[[int], LanguageModel]:
    """``tiny_model(kv_heads)``, shared (its bridge takes a while): edit only a ``.copy()``."""
    return make_tiny


@pytest.fixture(scope="session")
def pairs() -> PairSet:
    return make_pairs()


@pytest.fixture(scope="session")
def facts() -> LanguageModel:
    """The shipped model; never edit it, take ``facts.copy()``."""
    return load_model("facts")


@pytest.fixture(scope="session")
def capitals(facts: LanguageModel) -> Task:
    return load_task("capitals", facts)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the run-time checker would refuse first is left to `test_unchecked`."""
    if not checked.UNCHECKED:
        for item in items:
            if item.get_closest_marker("wrong_type"):
                item.add_marker(pytest.mark.skip(reason="run by test_unchecked"))
