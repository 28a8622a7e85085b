# %% [markdown]
# # 4. Erasure or suppression?
#
# A model can stop saying something that it still knows. Two ways to look: the attribution graph before, after and after
# quantization; and a model that really never learnt the facts, for comparison.

# %%
from mansu_interp import (
    circuit_mask,
    CircuitConfig,
    Mansu,
    attribute,
    compare,
    discover,
    judge_erasure,
    load_model,
    load_task,
    quantize,
    unlearn,
)
from mansu_interp.viz.view import erasure_view

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, settings, retain=task.retain)
mask = circuit_mask(circuit, model, budget=0.005, retain=task.retain_sets)
edited = unlearn(model, task, mask, Mansu(steps=40)).model
nf4 = quantize(edited)

# %% [markdown]
# The same held-out forget prompts for all, in the same metric:

# %%
unseen = task.scored["unseen"]["forget"]["capital"].sample(16, seed=0)
twin = load_model(task.reference_models[0])  # trained from scratch without the capitals
cad = compare(circuit, model, {"unlearned": edited, "unlearned nf4": nf4}, unseen, reference=twin)
print(f"{cad.verdict}: {cad.sentence}")

# %% [markdown]
# Every edge falls into one class: *kept*, *erased*, *suppressed* (weakened or reversed), *recovered* (brought back by
# quantization) or *new*. Colours and dashes tell them apart.

# %%
before, after, quantized = (attribute(m, unseen) for m in (model, edited, nf4))
view = erasure_view(circuit, before, after, quantized, cad, model, mask)
print(view.data["counts"])
view.widget()

# %% [markdown]
# And the twin in the place of the unlearned model. This is what never having known looks like:

# %%
erasure_view(circuit, before, attribute(twin, unseen), title="A twin that was never taught")

# %% [markdown]
# Single edges do not settle it: attribution follows the metric, so whatever silences the answer empties the graph. What
# settles it is relearning: teach one half of the facts again, ask for the *other* half. A model that never knew has nothing
# to bring back. `mansu relearn` trains a copy; the verdict below takes six steps in closed form instead, and a linear probe
# reads the states after every block (see [How to read CAD](../docs/cad.md)):

# %%
for name, other in {"unlearned": edited, "never taught": twin}.items():
    print(f"{name.upper()}", *judge_erasure(model, other, task).lines()[:12], "", sep="\n")

# %% [markdown]
# This edit hid the capitals: half of them bring back the rest. What it takes to erase them is in the
# [results](../docs/results.md). Next: [your own model and data](5-your-own-model-and-data.ipynb).
