# %% [markdown]
# # 2. From circuit to mask
#
# A circuit names components; unlearning edits single parameters. A mask is the choice of parameters behind a circuit that
# would forget most and harm least.

# %%
from mansu_interp import circuit_mask, CircuitConfig, discover, load_model, load_task
from mansu_interp.viz.view import circuit_view

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)

# %% [markdown]
# The budget is a share of *all* parameters. `retain` is what must stay: each candidate is ranked by its forget gain against
# the damage that one step of a whole quantizer cell would do to the retain answers.

# %%
mask = circuit_mask(circuit, model, budget=0.005, retain=task.retain_sets)
print(f"{mask.n_parameters:,} candidates; at most {mask.limit:,} are edited at once")
for name, index in sorted(mask.indices.items(), key=lambda item: -len(item[1])):
    print(f"{name:<46} {len(index):>6,} of {model.weights[name].numel():,}")

# %% [markdown]
# With the mask, each component also says how many of its parameters are in it:

# %%
view = circuit_view(circuit, model=model, mask=mask, title="The circuit and its mask")
for line in view.data.weights["m0"]:
    print(line)
view

# %% [markdown]
# ## A mask of a selection
#
# Masks can be restricted to what you select in the widget, for example to MLPs alone.

# %%
widget = view.widget()
widget.selected = [f"m{layer}" for layer in range(model.graph.architecture.n_layers)]
small = circuit_mask(
    widget.circuit(circuit), model, budget=0.002, retain=task.retain_sets, forget=task.forget
)
print(f"{small.n_parameters:,} candidates in {sorted(small.indices)}")

# %% [markdown]
# Next: [unlearn and quantize](3-unlearn-and-quantize.ipynb).
