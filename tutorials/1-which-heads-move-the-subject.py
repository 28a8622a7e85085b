# %% [markdown]
# # 1. Which heads move the subject?
#
# *"the capital of France is"* ends in *is*, and the answer depends on *France*, two tokens before. Some attention head must
# carry the country there. We score every connection of a small model, keep the few that matter, and look at the heads.

# %%
from mansu_interp import (
    AttributionConfig,
    CircuitConfig,
    attribute,
    discover,
    load_model,
    load_task,
)
from mansu_interp.viz.tokens import attention_patterns
from mansu_interp.viz.view import circuit_view

model = load_model("facts")  # a million parameters, ships with the package
task = load_task("capitals", model)
pair = task.forget[0]
print(f"{pair.prompt!r} -> {pair.answer_text!r}")
print(f"{model.graph.n_edges:,} edges between {model.graph.architecture}")

# %% [markdown]
# Each prompt runs beside the same prompt about another country. An edge's score says how much of the difference in the
# answer flows along it (EAP-IG). A head's score is the sum over the edges that leave it:

# %%
pairs = task.forget.sample(24, seed=0)
found = attribute(model, pairs, config=AttributionConfig(ig_steps=5))
scores = found.node_scores()
heads = sorted((n for n in scores if ".h" in n), key=lambda n: -abs(scores[n]))
for head in heads[:5]:
    print(f"{head:<8}{scores[head]:+.2f} of {found.clean - found.corrupt:.2f}")

# %% [markdown]
# Where does the first of them look? If it moves the subject, its last token looks at the country, whatever the country is:

# %%
layer, number = (int(part[1:]) for part in heads[0].split("."))
view = attention_patterns({"model": model}, pairs[0], layer, number)
print(repr(view))

# %% [markdown]
# ## The fewest edges that do it
#
# `discover` searches for the fewest edges that keep 85 % of the difference when all others are corrupted. Edges that the
# other facts need as much are discounted (`retain`).

# %%
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)
print(f"{circuit.n_edges} edges, faithfulness {circuit.meta.faithfulness:.2f}")

# %% [markdown]
# Does the circuit really answer? Ask it alone, everything else corrupted, on prompts that it was not chosen on:

# %%
unseen = task.scored["unseen"]["forget"]["capital"].sample(6, seed=0)
print(circuit.ablate(model, unseen).to_pandas().round(1).to_string(index=False))

# %% [markdown]
# ## Look at it
#
# Layers go upward, heads side by side, MLPs at the right. In a live notebook this is a widget: point at a head to see its way
# from the input to the output, click it to see where it looks and what it writes. Elsewhere you see its static picture.

# %%
widget = circuit_view(circuit, model=model, pairs=pairs).widget()
widget

# %% [markdown]
# What you select there comes back to Python, and a selection is again a circuit:

# %%
widget.selected = [heads[0]]
for edge in widget.circuit(circuit).top(4):
    print(f"{edge.source:>8} -> {edge.target:<10} {edge.score:+.3f}")

# %% [markdown]
# `view.to_html("circuit.html")` makes one page of it to send to somebody. Next: [which weights carry
# it?](2-which-weights-carry-it.ipynb)
