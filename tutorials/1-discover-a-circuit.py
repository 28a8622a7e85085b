# %% [markdown]
# # 1. Discover a circuit
#
# Which parts of a model answer *"the capital of France is"*? We score every connection, keep the few that matter, and
# look at them. It takes seconds, on the one-million-parameter model that ships with the package.

# %%
from mansu_interp import CircuitConfig, discover, load_model, load_task
from mansu_interp.viz.view import circuit_view

model = load_model("facts")
task = load_task("capitals", model)
pair = task.forget[0]
print(f"{pair.prompt!r} -> {pair.answer_text!r}")
print(f"{model.graph.n_edges:,} edges between {model.graph.architecture}")

# %% [markdown]
# `discover` runs each prompt beside the same prompt about another country. An edge's score says how much of the difference
# in the answer flows along it (EAP-IG). Then it searches for the fewest edges that keep 85 % of the difference when
# all others are corrupted.

# %%
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)
print(f"{circuit.n_edges} edges, faithfulness {circuit.meta.faithfulness:.2f}")

# %% [markdown]
# ## Look at it
#
# Layers go upward, heads side by side, MLPs at the right. In a live notebook this is a widget: move the threshold, hover
# for exact scores and the weights behind a component, click to select. Elsewhere you see its static picture.

# %%
view = circuit_view(circuit, model=model)
widget = view.widget()
widget

# %% [markdown]
# What you select comes back to Python. Here we select from Python, which is the same:

# %%
widget.selected = ["m0"]
part = widget.circuit(circuit)
for source, target, score in sorted(
    part.to_networkx().edges(data="score"), key=lambda e: -abs(e[2])
)[:5]:
    print(f"{source:>8} -> {target:<10} {score:+.3f}")

# %% [markdown]
# `view.to_html("circuit.html")` writes the same as one page to send to somebody; `to_svg` and `to_png` write pictures. Next:
# [from circuit to mask](2-from-circuit-to-mask.ipynb).
