# %% [markdown]
# # 5. My own model, my own data
#
# A model is a Hugging Face folder or a name on the hub, data are prompts and answers. We ask a real model which facts it
# knows, find the circuit behind them, and see which heads matter. On two cores this takes about two minutes.
#
# The outputs below are of SmolLM2-135M-Instruct with the weights that `python scripts/get_smollm2.py` gets (its Q4_1 release,
# widened to float32); with the original's weights the digits differ.

# %%
from mansu_interp import AttributionConfig, CircuitConfig, PairSet, attribute, discover, load_model
from mansu_interp.viz.view import circuit_view

model = load_model("HuggingFaceTB/SmolLM2-135M-Instruct")  # or a folder
print(f"{model.n_parameters:,} parameters, {model.graph.n_edges:,} edges")

# %% [markdown]
# A pair is a prompt, the same prompt about something else, the answer, and wrong answers, of which the first is that of the
# other prompt. A model never tells what it does not know: ask first.

# %%
facts = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "Greece": "Athens",
    "Germany": "Berlin",
    "Cuba": "Havana",
    "Peru": "Lima",
}
names = list(facts)
others = names[1:] + names[:1]
pairs = PairSet.from_prompts(
    model,
    clean=[f"The capital of {name} is" for name in names],
    corrupt=[f"The capital of {name} is" for name in others],
    answers=[facts[name] for name in names],
    wrong=[[facts[x] for x in names[k + 1 :] + names[:k]][:3] for k in range(len(names))],
)
for pair in pairs:
    print(
        f"{pair.prompt:<26} wants {pair.answer_text!r:<10} says {model.generate(pair.prompt, 1)!r}"
    )

# %% [markdown]
# ## Which components carry the answer?

# %%
found = attribute(model, pairs, config=AttributionConfig(ig_steps=3))
print(f"logit difference {found.clean:.1f} on clean prompts, {found.corrupt:.1f} on corrupt ones")
found.to_pandas().head(8)

# %% [markdown]
# ## The circuit
#
# Of seventy thousand edges a few hundred keep most of the difference. Layers and heads that carry nothing are folded in the
# picture; in a live notebook they unfold, and a click on a head shows where it looks and what it writes.

# %%
circuit = discover(model, pairs, config=CircuitConfig(pairs=10, ig_steps=3, faithfulness_pairs=10))
print(circuit)
circuit_view(circuit, model=model)

# %% [markdown]
# Alone, with everything else corrupted, it still answers:

# %%
print(
    circuit.ablate(model, pairs)
    .to_pandas()[["prompt", "predicted in circuit", "predicted in model"]]
    .to_string(index=False)
)

# %% [markdown]
# To forget such facts, write them to a file, one row a line, and run. Before any long work the run says which of them the model
# knows, in which phrasing, what it will cost and why it chose its settings ([your own rows](../docs/tasks.md#your-own-rows)):
#
#     mansu run --model HuggingFaceTB/SmolLM2-135M-Instruct --task my.jsonl --out runs/mine
