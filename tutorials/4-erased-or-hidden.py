# %% [markdown]
# # 4. Did my unlearning erase, or only hide?
#
# A model can stop predicting answers that are still in its weights. What tells the two apart is what comes back when half
# of the facts are taught again: a model that holds nothing has nothing to bring back. We unlearn twice, and look.

# %%
from mansu_interp import (
    CircuitConfig,
    Mansu,
    RelearnConfig,
    attribute,
    circuit_mask,
    default_config,
    discover,
    judge_erasure,
    load_model,
    load_task,
    make_mask,
    other_half,
    quantize,
    relearn,
    relearned,
    unlearn,
)
from mansu_interp.viz.view import changes_view

model = load_model("facts")
capitals = load_task("capitals", model)  # one relation of every country
settings = CircuitConfig(pairs=24, faithfulness_pairs=12)
circuit = discover(model, capitals.forget, config=settings, retain=capitals.retain)
mask = circuit_mask(circuit, model, budget=0.005, retain=capitals.retain_sets)
first = unlearn(model, capitals, mask, Mansu(steps=120, lr=0.06)).model

countries = load_task("countries", model)  # everything about 36 countries
config = default_config("facts", "countries")  # as `mansu run`
other_circuit = discover(model, countries.forget, config=config.circuit, retain=countries.retain)
other_mask = make_mask(config, model, countries, other_circuit)
second = unlearn(model, countries, other_mask, config.unlearn).model

# %% [markdown]
# Neither answers much better than a guess (0.25). Now one half of the forgotten subjects, drawn at random, is taught again for 20
# steps, and the *other* half is asked for, in phrasings never trained on:

# %%
for name, edited, task in (("capitals", first, capitals), ("countries", second, countries)):
    attack = relearn(edited, task, config=RelearnConfig(steps=(20,)))
    print(
        f"{name:<10} before {attack.at(0):.2f}, after relearning the other half {attack.up_to(20):.2f}"
    )

# %% [markdown]
# The capitals were hidden: half of them bring back the rest. The countries stay away. `judge_erasure` asks ten such questions
# without training anything, fact by fact ([how to read it](../docs/cad.md)):

# %%
print(judge_erasure(model, first, capitals).verdict)
print(judge_erasure(model, second, countries).verdict)

# %% [markdown]
# ## See it
#
# Four graphs on one layout: the original, the edited model, the edited model in 4 bits, and the edited model after relearning
# half, on prompts of the other half. Every edge is *kept*, *recovered* (quantization brought it back), *suppressed* (the other
# half of the facts did, more than in a reference model that was never taught), *erased* (neither) or *new*.


# %%
def picture(task, circuit, mask, edited, title):
    unseen = other_half(task, task.held_out).sample(16, seed=0)
    never = load_model(task.reference_models[0])  # trained from scratch without the facts
    steps = RelearnConfig(steps=(20,))
    after, never_after = (relearned(m, task, rate=1e-3, config=steps) for m in (edited, never))
    graphs = [attribute(m, unseen) for m in (model, edited, quantize(edited), after)]
    return changes_view(
        circuit,
        *graphs,
        never_taught=attribute(never_after, unseen),
        model=model,
        mask=mask,
        title=title,
    )


# %% [markdown]
# The capitals: empty after the edit, and there again after relearning.

# %%
view = picture(capitals, circuit, mask, first, "Capitals: hidden")
print(view.data.counts)
view

# %% [markdown]
# The countries: gone, and nothing comes back that a model would not show that was never taught.

# %%
view = picture(countries, other_circuit, other_mask, second, "Countries: erased")
print(view.data.counts)
view

# %% [markdown]
# `mansu relearn` attacks copies in eight ways before you rely on it. Next: [my own model and
# data](5-my-own-model-and-data.ipynb).
