# %% [markdown]
# # 3. Will it survive my deployment?
#
# A model that forgot can remember again when its weights are rounded to 4 bits. MANSU moves each edited weight by at least
# one whole cell of every quantizer that you name, or not at all, so that rounding cannot undo it. We edit once for NF4 alone
# and once for four quantizers, and deploy both in ways that were and were not named.

# %%
from IPython.display import SVG

from mansu_interp import (
    CircuitConfig,
    Mansu,
    ModelVersion,
    circuit_mask,
    discover,
    evaluate,
    load_model,
    load_task,
    quantize,
    survival,
    unlearn,
)
from mansu_interp.viz.plots import Dots, strip_svg

model = load_model("facts")
task = load_task("capitals", model)
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, task.forget, config=settings, retain=task.retain)

edited = {}
for survive in (("nf4",), ("nf4", "fp4", "int4-g32", "q4_0")):
    mask = circuit_mask(circuit, model, budget=0.005, retain=task.retain_sets, survive=survive)
    config = Mansu(steps=60, lr=0.06, survive=survive)
    edited["for " + " ".join(survive)] = unlearn(model, task, mask, config).model

# %% [markdown]
# `survived` counts edited weights whose code changed, `collateral` other weights whose code did. Of the formats that were
# named, every edit survives and nothing else changes:

# %%
deployed = ("nf4", "fp4", "int4-g32", "q4_0", "int8")
for name, m in edited.items():
    for quantizer in deployed:
        s = survival(model, m, quantizer)
        print(
            f"{name:<26}{quantizer:<9}{s.survived:>6,} of {s.edited:,} survive; {s.collateral} collateral"
        )

# %% [markdown]
# ## Does it come back?
#
# Codes are promised, accuracy is measured: on phrasings that unlearning never saw, four-way (chance is 0.25), in full precision
# and after each quantizer.

# %%
rows = []
for name, m in edited.items():
    versions = {ModelVersion("edited"): m}
    versions |= {ModelVersion("edited", q): quantize(m, q) for q in deployed}
    scores = evaluate(versions, task, role="forget")
    for version in versions:
        value = scores.mean("forget", "choice", version)
        rows.append(Dots(f"{version.quantizer or 'full precision'}", [value], ours=len(name) > 10))
        print(f"{name:<26}{version.quantizer or 'full precision':<16}{value:.3f}")

# %% [markdown]
# In the picture, squares are the edit for four quantizers, circles that for NF4 alone; the dashed line is chance:

# %%
SVG(strip_svg(rows, "forget facts still answered, four-way, unseen phrasings", target=0.25))

# %% [markdown]
# Sixty steps are few: `mansu run --survive` takes more, and holds a margin against the scatter of rounding
# ([quantizers](../docs/quantizers.md)). Next: [erased or hidden?](4-erased-or-hidden.ipynb)
