"""Where a subject's facts sit: can they be read from its embedding row, and what if that is new?

    python research/scripts/subject_rows.py --task countries --seeds 0 1 2

Prints two tables for an embedded model. First, per stage of the model, how often a linear map from
the states at the *subject's* position to the answers' unembedding rows, fitted on half A of the
forget subjects, names the answers of half B (four-way); for the original, for the reference
models that were never taught, and for --models. Then, per seed, what the model answers once those
embedding rows are drawn anew (`redrawn`), and once they are then trained on the retained facts
alone with everything else frozen (`relearnt`): forget and retain on unseen phrasings, and the
relearning attack on them.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor
from zoo_edits import redrawn

from mansu_interp.audit.config import RelearnConfig
from mansu_interp.audit.probes import answer_rows, last_states, linear_map
from mansu_interp.audit.relearning import halves, of_subjects, relearn, rivals_within
from mansu_interp.evaluation.scores import evaluate
from mansu_interp.evaluation.versions import EDITED, ModelVersion
from mansu_interp.losses.answers import nll
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.models.load import load_model
from mansu_interp.quantizers.survival import quantize
from mansu_interp.tasks.load import load_task
from mansu_interp.tasks.pairs import PairSet, by_phrasing
from mansu_interp.tasks.task import Task

SPLIT, RIDGES = 1, (0.01, 0.1, 1.0)
MARKS = (5, 10, 20, 40, 80)
STEPS, BATCH, RATE = 400, 32, 0.02


@torch.no_grad()
def at_subject(model: LanguageModel, pairs: PairSet) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt a fact: states [fact, stage, d_model] at the subject's last token, the answer,
    and the four choices."""
    seen: dict[tuple[str, str], int] = {}
    found, answers, choices = [], [], []
    for pair in pairs:
        if seen.setdefault((pair.relation, pair.subject), 1) > 1:
            continue
        seen[pair.relation, pair.subject] += 1
        both = torch.cat(last_states(model, [pair], subject=True))
        found.append(both[len(both) // 2 :])  # at the last token, then at the subject
        answers.append(pair.answer)
        choices.append(list(pair.choices))
    return torch.stack(found), torch.tensor(answers), torch.tensor(choices)


def readable(model: LanguageModel, task: Task) -> list[float]:
    """Per stage, the share of half B's facts that half A's map names (the best of three ridges)."""
    rows = answer_rows(model)
    parts = [rivals_within(of_subjects(task.forget, h)) for h in halves(task.forget, SPLIT)]
    (x, answer, _), (asked, _, choices) = (at_subject(model, p) for p in parts)
    out = []
    for stage in range(x.shape[1]):
        best = 0.0
        for ridge in RIDGES:
            read_out = linear_map(x[:, stage], rows[answer], ridge)
            said = (read_out(asked[:, stage]) @ rows.T).gather(1, choices)
            best = max(best, float((said.argmax(1) == 0).float().mean()))
        out.append(best)
    return out


def relearnt(model: LanguageModel, original: LanguageModel, task: Task, seed: int) -> LanguageModel:
    """The rows that differ from the original's, trained on the retained facts about them."""
    out, rng = model.copy(), random.Random(seed)
    table = out.hf.get_input_embeddings().weight
    own = (table != original.hf.get_input_embeddings().weight).any(1)
    ids = set(own.nonzero()[:, 0].tolist())
    groups = by_phrasing([p for p in task.retain if ids & set(p.clean)])
    optimiser = torch.optim.Adam([table], lr=RATE)
    for step in range(STEPS if groups else 0):
        table.requires_grad_(True)
        for _ in range(3):
            some = rng.choice(groups)
            nll(out, rng.sample(some, min(BATCH, len(some)))).mean().backward()
        assert table.grad is not None
        table.grad.mul_(own[:, None])
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        table.requires_grad_(False)
    return out


def line(name: str, model: LanguageModel, task: Task) -> str:
    """A row of the second table."""
    nf4 = EDITED.after("nf4")
    scores = evaluate({EDITED: model, nf4: quantize(model)}, task)

    def mean(role: str, of: ModelVersion) -> str:
        means = scores.mean(role, "choice", of), scores.mean(role, "top1", of)
        return " / ".join(f"{x:.2f}" for x in means)

    attacked = relearn(model, task, config=RelearnConfig(steps=MARKS))
    marks = [f"{attacked.at(k):.2f} / {attacked.at(k, 'top1'):.2f}" for k in MARKS]
    cells = [name, mean("forget", EDITED), mean("forget", nf4), mean("retain", EDITED)]
    return f"| {' | '.join([*cells, *marks])} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a subject's embedding row holds.")
    parser.add_argument("--task", default="countries")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--models", nargs="*", default=[], help="folders to read, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("facts")
    task = load_task(args.task, model)
    never = {name: load_model(name) for name in task.reference_models}
    print(
        "| | embedding | " + " | ".join(f"block {k}" for k in range(4)) + " |\n" + "|---" * 6 + "|"
    )
    more = {name: load_model(name) for name in args.models}
    for name, one in {"original": model, **never, **more}.items():
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in readable(one, task)) + " |")
    if not args.seeds:
        return
    print("\n| | forget | after NF4 | retain | " + " | ".join(f"{k} steps" for k in MARKS) + " |")
    print("|---" * (4 + len(MARKS)) + "|")
    for name, one in never.items():
        print(line(name, one, task), flush=True)
    for seed in args.seeds:
        drawn = redrawn(model, task, seed)
        print(line(f"redrawn, seed {seed}", drawn, task), flush=True)
        trained = relearnt(drawn, model, task, seed)
        if not all(torch.equal(w, drawn.weights[n]) for n, w in trained.weights.items()):
            print(line(f"relearnt, seed {seed}", trained, task), flush=True)


if __name__ == "__main__":
    main()
