"""Re-make ``circuits/``: the circuit and mask of each task of the embedded model.

python scripts/make_circuits.py
"""

from __future__ import annotations

from pathlib import Path

from mansu_interp.circuits.discover import discover
from mansu_interp.models.load import load_model
from mansu_interp.runs.defaults import default_config
from mansu_interp.runs.edit import make_mask
from mansu_interp.tasks.load import load_task

OUT = Path(__file__).parents[1] / "circuits"


def main() -> None:
    """Discover with the settings of each task and write the circuit and the mask."""
    model = load_model("facts")
    for name in ("capitals", "countries"):
        task, config = load_task(name, model), default_config("facts", name)
        circuit = discover(model, task.forget, config=config.circuit, retain=task.retain)
        circuit.save(OUT / f"facts-{name}.json")
        mask = make_mask(config, model, task, circuit)
        mask.save(OUT / f"facts-{name}.mask.safetensors")
        print(f"{name}: {circuit.n_edges} edges, faithfulness {circuit.meta.faithfulness:.3f}")


if __name__ == "__main__":
    main()
