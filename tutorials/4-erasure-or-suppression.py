# %% [markdown]
# # 4. Erasure or suppression?
#
# A model can stop predicting answers that are still in its weights. Two ways to look: its attribution graph before and
# after the edit and after quantization; and a reference model that was never taught the facts.

# %%
from mansu_interp import (
    circuit_mask,
    CircuitConfig,
    UnlearnConfig,
    attribute,
    compare,
    discover,
    judge_erasure,
    load_model,
    load_task,
    quantize,
    unlearn,
)
from mansu_interp.viz.view import changes_view

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)
mask = circuit_mask(circuit, model, budget=0.005, retain=task.retain_sets)
edited = unlearn(model, task, mask, UnlearnConfig(steps=40)).model
nf4 = quantize(edited)

# %% [markdown]
# The same held-out forget prompts for all, in the same metric:

# %%
unseen = task.scored["unseen"]["forget"]["capital"].sample(16, seed=0)
never = load_model(task.reference_models[0])  # trained from scratch without the capitals
models = {"unlearned": edited, "unlearned nf4": nf4}
comparison = compare(circuit, model, models, unseen, reference=never)
for name, found in comparison.models.items():
    print(f"{name:14} mass {found.mass:.2f}, alignment {found.alignment:.2f}")

# %% [markdown]
# Every edge falls into one class: *kept*, *silent*, *weakened* (or reversed), *recovered* (brought back by quantization) or
# *new*. Colours and dashes tell them apart.

# %%
before, after, quantized = (attribute(m, unseen) for m in (model, edited, nf4))
view = changes_view(
    circuit, before, after, quantized, comparison=comparison, model=model, mask=mask
)
print(view.data.counts)
view.widget()

# %% [markdown]
# And the reference model in the place of the unlearned one: the graph of a model that was never taught the capitals.

# %%
changes_view(circuit, before, attribute(never, unseen), title="A model that was never taught")

# %% [markdown]
# Edges do not settle it: attribution follows the metric, so whatever silences the answer empties the graph. What settles
# it is relearning: teach one half of the facts again, ask for the *other* half. A model that was never taught has nothing
# to bring back. `mansu relearn` trains a copy; the verdict below takes six steps in closed form instead, and a linear probe
# of the states after every block (see [How to read CAD](../docs/cad.md)):

# %%
for name, other in {"unlearned": edited, "never taught": never}.items():
    print(f"{name.upper()}", *judge_erasure(model, other, task).lines()[:12], "", sep="\n")

# %% [markdown]
# This edit hid the capitals: half of them bring back the rest. What it takes to erase them is in the
# [results](../docs/results.md). Next: [your own model and data](5-your-own-model-and-data.ipynb).
