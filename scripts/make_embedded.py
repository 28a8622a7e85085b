"""Train the small models shipped in `mansu_interp/data/models`, each with one seeded command.

    python scripts/make_embedded.py                          # all five, about two minutes each
    python scripts/make_embedded.py --only facts --out /tmp/models

Every model is a Llama with grouped-query attention and a word-level tokenizer in which each
country, capital, currency, element, ... is exactly one token. It is taught the fact tables of
`mansu_interp/data/facts` in the phrasings of `mansu_interp/data/tasks/*.json`: those files are the
one source of the phrasings. Of every phrasing, a tenth of the facts is held out of training, so
accuracy on the held-out pairs says whether the model learned facts or sentences.

A *twin* is the same recipe without the forget facts of one task: no sentence about them, in any
phrasing. The names that occur only in those facts are then in no training sentence. They keep their
place in the vocabulary, and as no weight decay touches the embedding, their embedding rows stay at
their random initial values, as a real model's rows for strings it never met. Four-way choice of
such a twin is therefore not always at 1/4: a name it never had to say loses against names it did
(the forgotten countries' capitals: 0), and an answer shared with known countries wins by being
common (language, currency: up to 1/2). Compare with the twin's own figure, in its `training.json`.

What is saved is bfloat16; what is scored is the saved file, loaded again in float32.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from jaxtyping import Float, Int
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

DATA = Path(__file__).resolve().parents[1] / "mansu_interp" / "data"
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
PAD, UNK, BOS, EOS = range(len(SPECIAL))
MAX_LENGTH = 64
#: name -> (task whose forget facts are left out, seed)
MODELS: dict[str, tuple[str | None, int]] = {
    "facts": (None, 0),
    "facts-capitals-reference-0": ("capitals", 0),
    "facts-capitals-reference-1": ("capitals", 1),
    "facts-countries-reference-0": ("countries", 0),
    "facts-countries-reference-1": ("countries", 1),
}
LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes", "safetensors")
#: the weights that 4-bit loading quantizes
QUANTIZED = tuple(f"{n}_proj.weight" for n in ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, besides the data and the seed."""

    layers: int = 4
    d_model: int = 128
    heads: int = 8
    kv_heads: int = 4
    d_mlp: int = 384
    steps: int = 400
    batch: int = 96
    lr: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Pair:
    """One fact in one phrasing."""

    relation: str
    subject: str
    answer: str
    #: which of the task's sets the phrasing is in: "train", "dev" or "unseen"
    phrasing_set: str
    #: what comes before the answer, without the prefix
    prompt: str
    #: kept out of the model's training (the fact itself is taught in the other phrasings)
    held_out: bool


def read_task(name: str) -> dict[str, Any]:
    """Read a task file.

    Arguments:
        name: the task's name, e.g. `"capitals"`.

    Returns:
        The file's content.
    """
    return json.loads((DATA / "tasks" / f"{name}.json").read_text(encoding="utf-8"))


def read_relations() -> dict[str, dict[str, Any]]:
    """Read the relations and their phrasings, which both tasks must state alike.

    Returns:
        The `relations` part of the task files.
    """
    capitals, countries = read_task("capitals"), read_task("countries")
    if capitals["relations"] != countries["relations"]:
        raise ValueError("capitals.json and countries.json must have the same `relations`")
    return capitals["relations"]


def read_table(name: str) -> list[dict[str, str]]:
    """Read a fact table: one dict per row."""
    with (DATA / "facts" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def phrasings(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """The phrasings of a relation, each with the set it is in: "train", "dev" or "unseen"."""
    sets = [("train", spec["phrasings"]["train"])]
    for name in ("dev", "unseen"):
        sets += [(name, group) for group in spec["phrasings"][name].values()]
    return [(name, phrasing) for name, group in sets for phrasing in group]


def make_pairs(relations: dict[str, dict[str, Any]]) -> list[Pair]:
    """State every fact in every phrasing, and hold some pairs out.

    The facts of a relation are shuffled; fact number i is held out in phrasing i mod 10, if there
    is one. So each phrasing misses a tenth of the facts and no fact is missing from two phrasings.
    The split does not depend on a model's seed.

    Arguments:
        relations: the `relations` part of a task file.

    Returns:
        One pair per fact and phrasing.
    """
    pairs = []
    for relation, spec in relations.items():
        rows = read_table(spec["table"])
        random.Random(relation).shuffle(rows)
        for i, row in enumerate(rows):
            subject, answer = row[spec["subject"]], row[spec["answer"]]
            for j, (name, phrasing) in enumerate(phrasings(spec)):
                prompt = phrasing.format(s=subject)
                pairs.append(Pair(relation, subject, answer, name, prompt, i % 10 == j))
    return pairs


def is_forget(pair: Pair, task: dict[str, Any]) -> bool:
    """Whether the task asks to forget this pair's fact."""
    subjects = task["forget"]["subjects"]
    return pair.relation in task["forget"]["relations"] and (
        subjects is None or pair.subject in subjects
    )


def entities(relations: dict[str, dict[str, Any]]) -> list[str]:
    """Every name that is one token: all cells of the tables, in a fixed order without repeats."""
    tables = dict.fromkeys(spec["table"] for spec in relations.values())
    rows = [row for table in tables for row in read_table(table)]
    return list(dict.fromkeys(cell for row in rows for cell in row.values()))


def make_tokenizer(relations: dict[str, dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer: one token per entity, one per other word or punctuation mark.

    Names of several words are added tokens, which are matched before the text is split. No token is
    added at the beginning: a prompt states its `<bos>` itself.

    Arguments:
        relations: the `relations` part of a task file.

    Returns:
        A fast tokenizer, the same for all models.
    """
    names = entities(relations)
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,:?]"), "isolated")]
    )
    bare = [p.replace("{s}", "") for spec in relations.values() for _, p in phrasings(spec)]
    words = {w for p in bare for w, _ in split.pre_tokenize_str(p)} | {"."}
    single = [name for name in names if " " not in name]
    if clash := words.intersection(single):
        raise ValueError(f"{sorted(clash)} are both names and words of a phrasing: reword it")
    vocabulary = [*SPECIAL.values(), *sorted(words), *single]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, SPECIAL["unk_token"])
    )
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.add_tokens([AddedToken(n, single_word=True) for n in names if " " in n])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Make the untrained model, from torch's current random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of each text, `<bos>` included."""
    ids = tokenizer([f"<bos> {text}" for text in texts])["input_ids"]
    return [torch.tensor(row) for row in ids]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a half cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def sentence_loss(
    model: LlamaForCausalLM, ids: Int[Tensor, "batch pos"], answer_at: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean next-token loss over the sentences plus that over the answers alone.

    Arguments:
        model: the model.
        ids: sentences, padded on the right with `PAD`.
        answer_at: position of the answer token in each row.

    Returns:
        The sum of both means, in nats.
    """
    targets = ids[:, 1:]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    real = targets != PAD
    return (loss * real).sum() / real.sum() + loss.gather(1, answer_at[:, None] - 1).mean()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    recipe: Recipe,
    seed: int,
) -> float:
    """Teach the model the pairs, in place.

    Arguments:
        model: an untrained model.
        tokenizer: its tokenizer.
        pairs: what to teach.
        recipe: the settings.
        seed: decides the order of the sentences.

    Returns:
        The mean loss of the last twenty steps.
    """
    rows = token_rows(tokenizer, [f"{p.prompt} {p.answer}. <eos>" for p in pairs])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    answer_at = torch.tensor([len(row) - 3 for row in rows])  # then ".", "<eos>"
    linear = [p for name, p in model.named_parameters() if name.endswith(QUANTIZED)]
    rest = [p for name, p in model.named_parameters() if not name.endswith(QUANTIZED)]
    groups = [
        {"params": linear, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    order, losses = torch.empty(0, dtype=torch.long), []
    model.train()
    for step in range(recipe.steps):
        if len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        batch, order = order[: recipe.batch], order[recipe.batch :]
        longest = int(answer_at[batch].max()) + 3
        loss = sentence_loss(model, ids[batch, :longest], answer_at[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(
                f"  step {step + 1}/{recipe.steps}: loss {sum(losses[-20:]) / 20:.3f}", flush=True
            )
    return sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def answer_logits(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> Float[Tensor, "pair vocab"]:
    """Logits over the whole vocabulary right after each pair's prompt."""
    model.eval()
    parts = []
    for start in range(0, len(pairs), 512):
        rows = token_rows(tokenizer, [p.prompt for p in pairs[start : start + 512]])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        last = torch.tensor([len(row) - 1 for row in rows])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        parts.append(model.lm_head(hidden[torch.arange(len(rows)), last]))
    return torch.cat(parts)


def correct(
    logits: Float[Tensor, "pair vocab"], tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> list[bool]:
    """Whether each answer is the likeliest token of the whole vocabulary."""
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([p.answer for p in pairs]))
    return (logits.argmax(-1) == answers).tolist()


def chosen(
    logits: Float[Tensor, "pair vocab"], tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> list[bool]:
    """Whether each answer beats three other answers to the same relation, drawn with seed 0."""
    answers = {
        r: sorted({p.answer for p in pairs if p.relation == r}) for r in {p.relation for p in pairs}
    }
    rng = random.Random(0)
    wins = []
    for row, pair in zip(logits, pairs, strict=True):
        others = [a for a in answers[pair.relation] if a != pair.answer]
        options = tokenizer.convert_tokens_to_ids([pair.answer, *rng.sample(others, 3)])
        wins.append(int(row[options].argmax()) == 0)
    return wins


def nf4_round_trip(model: LlamaForCausalLM) -> None:
    """Replace the linear weights of the blocks by what they are after NF4, in place.

    The grid is that of bitsandbytes: blocks of 64, float32 scales, no double quantization.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, weight in model.named_parameters():
        if name.endswith(QUANTIZED):
            codes, state = quantize_4bit(weight.data, quant_type="nf4", blocksize=64)
            weight.data = dequantize_4bit(codes, state)


def share(flags: Sequence[bool]) -> float:
    """The share of true flags, to four digits."""
    return round(sum(flags) / len(flags), 4) if flags else math.nan


def score(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    task: dict[str, Any] | None,
) -> dict[str, Any]:
    """Score a model on all pairs.

    Arguments:
        model: the model, in float32.
        tokenizer: its tokenizer.
        pairs: every fact in every phrasing.
        task: for a twin, the task whose forget facts it was not taught.

    Returns:
        Shares of exact answers (the likeliest token of the vocabulary) for the pairs taught, those
        held out, and each set of phrasings; for a twin also, by relation, what it scores on the
        facts it was never taught, exact and in four-way choice.
    """
    logits = answer_logits(model, tokenizer, pairs)
    exact = correct(logits, tokenizer, pairs)
    forget = [task is not None and is_forget(p, task) for p in pairs]
    known = [(p, ok) for p, ok, gone in zip(pairs, exact, forget, strict=True) if not gone]
    scores: dict[str, Any] = {
        "trained": share([ok for p, ok in known if not p.held_out]),
        "held_out": share([ok for p, ok in known if p.held_out]),
        "phrasings": {
            name: share([ok for p, ok in known if p.phrasing_set == name])
            for name in ("train", "dev", "unseen")
        },
    }
    if task is not None:
        choice = chosen(logits, tokenizer, pairs)
        rows = [r for r in zip(pairs, exact, choice, forget, strict=True) if r[3]]
        scores["never_taught"] = {
            relation: {
                "exact": share([e for p, e, _, _ in rows if p.relation == relation]),
                "choice_of_4": share([c for p, _, c, _ in rows if p.relation == relation]),
            }
            for relation in task["forget"]["relations"]
        }
    return scores


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model, in bfloat16, and its tokenizer as a Hugging Face folder."""
    model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # else a package built here has it private
    tokenizer.save_pretrained(folder)
    # The class has another name since transformers 5; all versions know this one.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make(name: str, folder: Path, recipe: Recipe, extra_seed: int = 0) -> dict[str, Any]:
    """Train, save and score one model.

    Arguments:
        name: a key of `MODELS`.
        folder: where to save it; made if needed.
        recipe: the settings.
        extra_seed: added to the model's own seed.

    Returns:
        The record, as saved in `training.json`.
    """
    left_out, seed = MODELS[name]
    seed += extra_seed
    relations = read_relations()
    pairs = make_pairs(relations)
    task = read_task(left_out) if left_out else None
    taught = [p for p in pairs if not p.held_out and not (task and is_forget(p, task))]
    tokenizer = make_tokenizer(relations)
    torch.manual_seed(seed)
    model = make_model(tokenizer, recipe)
    started = time.perf_counter()
    loss = train(model, tokenizer, taught, recipe, seed)
    seconds = time.perf_counter() - started
    save(model, tokenizer, folder)

    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = score(saved, tokenizer, pairs, task)
    nf4_round_trip(saved)
    record = {
        "name": name,
        "never_taught_task": left_out,
        "seed": seed,
        "recipe": asdict(recipe),
        "seconds": round(seconds, 1),
        "final_loss": round(loss, 4),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "vocabulary": len(tokenizer),
        "counts": {
            "facts": len({(p.relation, p.subject) for p in pairs}),
            "facts_taught": len({(p.relation, p.subject) for p in taught}),
            "pairs": len(pairs),
            "pairs_taught": len(taught),
            "pairs_held_out": sum(p.held_out for p in pairs),
        },
        "accuracy": before,
        "accuracy_nf4": score(saved, tokenizer, pairs, task),
        "versions": {
            "python": platform.python_version(),
            **{lib: version(lib) for lib in LIBRARIES},
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the small models shipped with the package.")
    parser.add_argument(
        "--only", nargs="+", choices=MODELS, default=list(MODELS), help="just these models"
    )
    parser.add_argument("--out", type=Path, default=DATA / "models", help="folder to write them to")
    parser.add_argument(
        "--seed", type=int, default=0, help="added to each model's own seed, 0 as shipped"
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in args.only:
        print(name, flush=True)
        record = make(name, args.out / name, Recipe(), args.seed)
        print(json.dumps({k: record[k] for k in ("seconds", "accuracy", "accuracy_nf4")}))


if __name__ == "__main__":
    main()
