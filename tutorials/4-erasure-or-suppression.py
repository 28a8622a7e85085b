# %% [markdown]
# # 4. Erasure or suppression?
#
# A model can stop saying something that it still knows. Two ways to look: the attribution graph before, after and after
# quantization; and a model that really never learnt the facts, for comparison.

# %%
from mansu_interp import (
    CircuitConfig,
    UnlearnConfig,
    attribute,
    compare,
    discover,
    load_model,
    load_task,
    quantize,
    unlearn,
)
from mansu_interp.viz import erasure_view

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, settings, retain=task.retain)
mask = circuit.mask(model, budget=0.005, retain=task.kept)
edited = unlearn(model, task, mask, UnlearnConfig(steps=40)).model
nf4 = quantize(edited)

# %% [markdown]
# The same held-out forget prompts for all, in the same metric:

# %%
unseen = task.scored["unseen"]["forget"]["capital"].sample(16, seed=0)
twin = load_model(task.twins[0])  # trained from scratch without the capitals
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
# Single edges do not settle it: attribution follows the metric, so whatever silences the answer empties the graph. That is
# why CAD compares *where* the rest flows, and why relearning tests matter (see the concepts in the docs). Next:
# [your own model and data](5-your-own-model-and-data.ipynb).
