# %% [markdown]
# # 4. Erasure or suppression?
#
# A model can stop predicting answers that are still in its weights. What tells the two apart is what comes back when half
# of the facts are taught again. We look at it in the attribution graph, and beside a reference model that was never taught.

# %%
from mansu_interp import (
    circuit_mask,
    CircuitConfig,
    RelearnConfig,
    Mansu,
    attribute,
    compare,
    discover,
    judge_erasure,
    load_model,
    load_task,
    other_half,
    quantize,
    relearned,
    unlearn,
)
from mansu_interp.viz.view import changes_view

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)
mask = circuit_mask(circuit, model, budget=0.005, retain=task.retain_sets)
edited = unlearn(model, task, mask, Mansu(steps=40)).model
nf4 = quantize(edited)

# %% [markdown]
# The capitals are split in two halves at random. One is relearned, for 20 steps; the graphs are those of the *other* half's
# prompts, in a phrasing that was never trained on, in the same metric:

# %%
unseen = other_half(task, task.scored["unseen"]["forget"]["capital"]).sample(16, seed=0)
after_half = relearned(edited, task, rate=1e-3, config=RelearnConfig(steps=(20,)))
never = load_model(task.reference_models[0])  # trained from scratch without the capitals
never_after_half = relearned(never, task, rate=1e-3, config=RelearnConfig(steps=(20,)))
models = {"unlearned": edited, "unlearned nf4": nf4, "half relearned": after_half}
comparison = compare(circuit, model, models, unseen, reference=never)
for name, found in comparison.models.items():
    print(f"{name:14} mass {found.mass:.2f}, alignment {found.alignment:.2f}")

# %% [markdown]
# Every edge falls into one class: *kept*, *recovered* (brought back by quantization), *suppressed* (brought back by the other
# half of the facts, more than in the reference model), *erased* (by neither) or *new*.

# %%
graphs = [attribute(m, unseen) for m in (model, edited, nf4, after_half)]
view = changes_view(
    circuit,
    *graphs,
    never_taught=attribute(never_after_half, unseen),
    comparison=comparison,
    model=model,
    mask=mask,
)
print(view.data.counts)
view

# %% [markdown]
# After unlearning the graph is nearly empty, and after relearning half it is there again: the edit only *suppressed* the
# capitals. And the reference model in the place of the unlearned one, which has nothing to bring back:

# %%
changes_view(
    circuit,
    graphs[0],
    attribute(never, unseen),
    relearned=attribute(never_after_half, unseen),
    title="A model that was never taught",
)

# %% [markdown]
# The answers decide: after half of the facts were taught again, how many of the *other* half come back? `mansu relearn` attacks
# copies in eight ways; the verdict below relearns in closed form instead, and probes the states after every block (see
# [How to read CAD](../docs/cad.md)):

# %%
for name, other in {"unlearned": edited, "never taught": never}.items():
    print(f"{name.upper()}", *judge_erasure(model, other, task).lines()[:12], "", sep="\n")

# %% [markdown]
# This edit hid the capitals: half of them bring back the rest. What it takes to erase them is in the
# [results](../docs/results.md). Next: [your own model and data](5-your-own-model-and-data.ipynb).
