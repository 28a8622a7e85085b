# %% [markdown]
# # 2. Which weights carry it?
#
# A circuit names components; unlearning edits single parameters. A mask is the choice of parameters behind a circuit that
# would forget most and harm least. Here we make one, and use it in a training loop of our own.

# %%
import torch

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
# ## In a training loop
#
# `mask.indices` holds flat positions by the weights' Hugging Face names. So any optimiser can be kept inside it: put the
# gradient elsewhere to zero. Three steps of gradient ascent on one prompt:

# %%
inside = load_model("facts")
weights = [inside.weights[name].requires_grad_() for name in mask.indices]
optimiser = torch.optim.SGD(weights, lr=0.1)
row = torch.tensor([task.forget[0].clean])
for _ in range(3):
    loss = -torch.nn.functional.cross_entropy(
        inside.all_logits(row)[:, -1], torch.tensor([task.forget[0].answer])
    )
    optimiser.zero_grad()
    loss.backward()
    for weight, index in zip(weights, mask.indices.values(), strict=True):
        kept = torch.zeros_like(weight.grad).view(-1)
        kept[index] = weight.grad.view(-1)[index]
        weight.grad = kept.view_as(weight)
    optimiser.step()
changed = sum(int((inside.weights[n] != w).sum()) for n, w in model.weights.items())
print(f"{changed:,} parameters changed; the mask holds {mask.n_parameters:,}")

# %% [markdown]
# `mask.save("mask.safetensors")` keeps it; `unlearn(model, task, mask)` is our own loop. Masks can be restricted to what you
# select in the widget, for example to MLPs alone:

# %%
widget = circuit_view(circuit, model=model).widget()
widget.selected = [f"m{layer}" for layer in range(model.graph.architecture.n_layers)]
small = circuit_mask(
    widget.circuit(circuit), model, budget=0.002, retain=task.retain_sets, forget=task.forget
)
print(f"{small.n_parameters:,} candidates in {sorted(small.indices)}")

# %% [markdown]
# ## Look at it
#
# With the mask each component says on hover how many of its parameters are candidates:

# %%
view = circuit_view(circuit, model=model, mask=mask, title="The circuit and its mask")
for line in view.data.weights["m0"]:
    print(line)
view

# %% [markdown]
# Next: [will it survive my deployment?](3-will-it-survive-my-deployment.ipynb)
