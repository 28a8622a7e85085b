# %% [markdown]
# # 5. Your own model and data
#
# A model is a Hugging Face folder or hub name. Data are pairs of prompts of equal length that differ in the subject. Here we
# make pairs by hand; a task file over CSV tables does it at scale.

# %%
from mansu_interp import AttributionConfig, Pair, PairSet, attribute, load_model
from mansu_interp.viz.tokens import token_log_probs

model = load_model("facts")  # or load_model("path/to/folder")


def pair(subject: str, other: str, answer: str, wrong: str) -> Pair:
    """One clean/corrupt pair; the first tokens of the answers are compared."""
    prompt = "<bos>the capital of {} is"
    first = [model.encode(" " + text)[0] for text in (answer, wrong, "Oslo", "Cairo", "Lima")]
    return Pair(
        clean=tuple(model.encode(prompt.format(subject))),
        corrupt=tuple(model.encode(prompt.format(other))),
        answer=first[0],
        counterfactual=first[1],
        distractors=tuple(first[2:]),
        relation="capital",
        subject=subject,
        phrasing=prompt,
        prompt=prompt.format(subject),
        answer_text=" " + answer,
    )


pairs = PairSet(
    "mine", (pair("France", "Spain", "Paris", "Madrid"), pair("Spain", "France", "Madrid", "Paris"))
)
print(pairs[0].prompt, "->", model.generate(pairs[0].prompt, 1))

# %% [markdown]
# That is all that attribution needs:

# %%
found = attribute(model, pairs, config=AttributionConfig(ig_steps=3))
print(f"metric {found.clean:.2f} clean, {found.corrupt:.2f} corrupt")
for name, score in sorted(found.node_scores().items(), key=lambda item: -abs(item[1]))[:5]:
    print(f"{name:<8}{score:+.3f}")

# %% [markdown]
# What the model says token by token (`.to_html(...)` draws it with CircuitsVis, offline):

# %%
print(repr(token_log_probs({"model": model}, pairs[0])))

# %% [markdown]
# To unlearn, name what must go and what must stay in a task file (`docs/tasks.md`) and run
#
#     mansu run --model path/to/folder --task my-task.json --out runs/mine
