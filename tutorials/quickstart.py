# %% [markdown]
# # Make a small model forget 36 countries
#
# The whole job in a few lines: find the circuit that answers questions such as *"the capital of Japan is"*, edit a few of its
# weights in steps that 4-bit quantization cannot undo, and check what is left. It runs on a CPU in about a minute, on
# a one-million-parameter model that ships with the package and was taught about 950 facts.

# %%
from IPython.display import SVG

from mansu_interp import (
    ModelVersion,
    default_config,
    discover,
    evaluate,
    judge_erasure,
    load_model,
    load_task,
    make_mask,
    quantize,
    relearn,
    survival,
    unlearn,
)
from mansu_interp.viz.svg import circuit_svg

model = load_model("facts")
task = load_task("countries", model)
config = default_config("facts", "countries")  # as `mansu run`
print(f"{model.n_parameters:,} parameters, {model.graph.n_edges:,} edges between components")
print(f"{len(task.forget)} prompts to forget, {len(task.retain)} to retain, for example:")
pair = task.forget[0]
print(f"  {pair.prompt!r} -> {pair.answer_text!r}; predicted: {model.generate(pair.prompt, 1)!r}")

# %% [markdown]
# ## 1. The circuit
#
# `discover` scores every edge with EAP-IG: how much of the difference between a prompt and the same prompt about another
# country flows along it? Then it looks for the fewest edges that carry at least 85 % of that difference when all others
# are corrupted. With `retain`, edges that the other facts need as much are discounted.

# %%
circuit = discover(model, task.forget, config=config.circuit, retain=task.retain)
print(
    f"{circuit.n_edges} of {circuit.graph.n_edges:,} edges, "
    f"faithfulness {circuit.meta.faithfulness:.2f}"
)
SVG(circuit_svg(circuit))

# %% [markdown]
# It is an ordinary networkx graph. These are its strongest edges; a positive score supports the answer, and
# `a1.kv0<v>` is the value input of the first key/value head of layer 1.

# %%
graph = circuit.to_networkx()
edges = sorted(graph.edges(data="score"), key=lambda edge: -abs(edge[2]))
for source, target, score in edges[:8]:
    print(f"{source:>8} -> {target:<10} {score:+.3f}")

# %% [markdown]
# ## 2. The mask
#
# The weights behind the circuit's components are the candidates, and here the countries' own rows of the embedding.
# They are ranked by how much one step of a whole quantizer cell would forget, against how much it would harm; half a percent
# of the model may be edited.

# %%
mask = make_mask(config, model, task, circuit)
print(f"{mask.n_parameters:,} candidates, of which at most {mask.limit:,} are edited at once")

# %% [markdown]
# ## 3. Unlearning
#
# Each weight either moves into another NF4 cell or has its exact old value. That is why quantization cannot bring
# the old value back: the edited weight has another 4-bit code.

# %%
edited = unlearn(model, task, mask, config.unlearn).model
nf4 = quantize(edited)  # the real bitsandbytes round trip
print(survival(model, edited, "nf4"))

# %% [markdown]
# `survived` counts the edited weights whose 4-bit code changed; `collateral` the others whose code did.
#
# ## 4. What is left
#
# All scores are on phrasings that unlearning never saw. Chance is 0.25 in four-way choice. The quantized original is there
# because 4 bits cost something by themselves.

# %%
models = {
    ModelVersion("original"): model,
    ModelVersion("original", "nf4"): quantize(model),
    ModelVersion("unlearned"): edited,
    ModelVersion("unlearned", "nf4"): nf4,
}
scores = evaluate(models, task)
print(f"{'':<22}" + "".join(f"{version!s:>16}" for version in models))
for row in scores.rows:
    choice = "".join(f"{row[version].choice:>16.3f}" for version in models)
    print(f"{row.role + ' ' + row.label:<22}{choice}")

# %% tags=["varies"]
for pair in task.scored["unseen"]["forget"]["capital"][:4]:
    answers = ", ".join(f"{v}: {m.generate(pair.prompt, 1)}" for v, m in models.items())
    print(f"{pair.subject} ({pair.answer_text})  {answers}")

# %% [markdown]
# ## 5. Erased, or only suppressed?
#
# A model can stop predicting an answer that is still in its weights. So half of the countries are taught again, and the *other*
# half is asked for. A model that holds nothing has nothing to bring back (chance is 0.25):

# %%
attack = relearn(edited, task)
for steps in attack.marks:
    print(f"after {steps:>3} steps of relearning: {attack.at(steps):.2f}")

# %% [markdown]
# CAD asks ten questions without training anything, fact by fact:

# %%
print(judge_erasure(model, edited, task, quantized=nf4).verdict)

# %% [markdown]
# The command `mansu run` does all this with the full settings, saves the edited checkpoint for transformers, and writes a
# report: open `runs/latest/report.html`.
