# %% [markdown]
# # 3. Unlearn and quantize
#
# A model that forgot can remember again when its weights are rounded to 4 bits. MANSU moves each edited weight by at least
# one whole quantizer cell or not at all, so that rounding cannot undo it. A run with full settings is `mansu run`.

# %%
from mansu_interp import (
    circuit_mask,
    CircuitConfig,
    Mansu,
    ModelVersion,
    discover,
    evaluate,
    load_model,
    load_task,
    quantize,
    survival,
    unlearn,
)
from mansu_interp.quantizers.bitsandbytes import NF4

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)
mask = circuit_mask(circuit, model, budget=0.005, retain=task.retain_sets)

# %%
edited = unlearn(model, task, mask, Mansu(steps=40)).model
print(survival(model, edited, NF4()))

# %% [markdown]
# `survived` counts edited weights whose 4-bit code changed, `collateral` other weights whose code did. Now the scores, on
# phrasings that unlearning never saw; chance is 0.25 in four-way choice.

# %%
models = {
    ModelVersion("original"): model,
    ModelVersion("original", "nf4"): quantize(model),
    ModelVersion("unlearned"): edited,
    ModelVersion("unlearned", "nf4"): quantize(edited),
}
scores = evaluate(models, task)
print(f"{'':<22}" + "".join(f"{version!s:>16}" for version in models))
for row in scores.rows:
    cells = "".join(f"{row[version].choice:>16.3f}" for version in models)
    print(f"{row.role + ' ' + row.label:<22}{cells}")

# %% [markdown]
# Forty steps are few: the default is 250. Next: [erasure or suppression?](4-erasure-or-suppression.ipynb)
