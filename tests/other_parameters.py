"""Other values of every notebook's parameters.

    python tests/other_parameters.py [notebook's number ...]

runs each notebook with each of them alone, and with five random mixtures, in this process. That
takes an hour or so; the suite (test_parameters.py) runs two mixtures of every notebook.
"""

import ast
import random
import sys
from pathlib import Path

import nbformat
from in_process import execute

from solved import NOTEBOOKS, tags

# {notebook: {parameter: other values}}: small ones where the notebook trains.
TRAINED = {
    "data_dir": ["generated"],
    "model_name": ["tiny-roberta"],
    "method": ["lora", "drlora"],
    "seed": [1, 2],
    "init_r": [4, 5],
    "target_r": [1, 3],
    "learning_rate": [3e-3, 5e-4],
    "epochs": [1, 3],
    "max_steps": [10, 14],
    "train_size": [24, 40],
    "dem_weight": [0.0, 0.1],
    "deltaT": [2, 4],
    "beta": [0.5, 0.8],
    "score": ["frobenius_norm", "abs_c"],
    "curve": ["adalora", "paper"],
    "lora_alpha": [16.0, 32.0],
    "weight_decay": [0.01, 0.1],
    "warmup": [0.0, 0.2],
    "grad_accumulation": [2, 3],
    "overwrite": [True],
}
MORE = TRAINED | {
    "method": ["adalora", "p-adapter"],
    "bottleneck": [4, 2],
    "lora_dropout": [0.0, 0.2],
    "max_grad_norm": [0.5, 2.0],
    "eval_batch_size": [32, 16],
    "precision": ["fp32"],
    "checkpoint_every": [5, 7],
}
VALUES: dict[str, dict[str, list]] = {
    "00": {
        "layers": [4, 24],
        "hidden": [128, 1024],
        "feed_forward": [512, 4096],
        "target_r": [1, 4],
    },
    "01": {"d_out": [3, 9], "d_in": [4, 12], "r": [1, 4], "seed": [0, 5]},
    "02": {
        "d_out": [3, 9],
        "d_in": [4, 12],
        "r": [2, 4],
        "batch": [2, 8],
        "lora_alpha": [1.0, 32.0],
        "learning_rate": [0.001, 0.1],
        "hidden": [16, 64],
        "n_layers": [1, 3],
        "seed": [1, 2],
    },
    "03": {
        "d_out": [3, 9],
        "d_in": [4, 12],
        "r": [1, 4],
        "n_inputs": [5_000, 10_000],
        "needs": [[1, 3, 5], [0, 6]],
        "seed": [1, 3],
    },
    "04": {
        "beta": [0.5, 0.99],
        "betas": [[0.0, 0.8], [0.0, 0.3, 0.6, 0.9, 0.95]],
        "dim": [12, 20],
        "equal_ranks": [[5, 5], [4, 4]],
        "unequal_ranks": [[1, 6], [0, 3, 5]],
        "init_r": [7, 8],
        "target_r": [3, 5],
        "batch": [4, 16],
        "noise": [0.5, 2.0],
        "learning_rate": [0.02, 0.1],
        "total_steps": [60, 80],
        "deltaT": [2, 10],
        "seeds": [[1], [5]],
    },
    "05": {
        "matrices": [12, 100],
        "init_r": [6, 12],
        "target_r": [1, 3],
        "total_steps": [200, 2000],
        "deltaT": [30, 100],
    },
    "06": {
        "needs": [[1, 2, 4], [0, 1, 1, 6]],
        "dim": [12, 20],
        "init_r": [7, 8],
        "target_r": [3, 5],
        "total_steps": [100, 140],
        "deltaT": [5, 30],
        "batch_size": [16, 64],
        "noise": [0.1, 1.0],
        "learning_rate": [0.005, 0.02],
        "seed": [5, 1],
        "n_seeds": [2, 1],
    },
    "07": {
        "d_in": [9, 20],
        "d_out": [5, 16],
        "dem_weight": [0.05, 0.3],
        "strong_weight": [10.0, 100.0],
        "hidden": [256, 1024],
        "n_components": [72, 432],
        "weight_decay": [0.001, 0.1],
        "needs": [[0, 2, 4], [2, 2, 3]],
        "dim": [12, 20],
        "init_r": [5, 8],
        "target_r": [3, 2],
        "total_steps": [100, 140],
        "deltaT": [10, 30],
        "batch_size": [16, 48],
        "noise": [0.1, 1.0],
        "learning_rate": [0.005, 0.02],
        "n_runs": [4, 6],
        "example_seeds": [1, 2],
        "seed": [1, 2],
    },
    "08": {
        "planted_ranks": [[0, 1, 3], [0, 0, 2, 5]],
        "dim": [16, 20],
        "init_r": [5, 6],
        "target_r": [2, 3],
        "total_steps": [20, 30],
        "noise_levels": [[0.0, 1.0], [0.1, 0.3]],
        "tiny_noises": [[1e-7], [1e-8, 1e-3]],
        "n_seeds": [2, 1],
        "pair_seeds": [1, 2],
        "seed": [1, 2],
    },
    "09": TRAINED | {"task": ["cola", "mrpc"], "batch_size": [8, 32], "max_length": [32, 48]},
    "10": MORE | {"task": ["mrpc", "boolq"], "batch_size": [8, 4], "max_length": [32, 64]},
    "11": MORE
    | {
        "task": ["squad_v2"],
        "batch_size": [2, 4],
        "lora_dropout": [0.1, 0.2],
        "max_length": [40, 64],
        "stride": [8, 16],
        "scoring": ["authors"],
    },
    "12": MORE
    | {
        "task": ["xsum"],
        "model_name": ["tiny-bart"],
        "method": ["lora", "bitfit"],
        "batch_size": [2, 8],
        "lora_dropout": [0.1, 0.2],
        "max_length": [32, 48],
        "summary_length": [6, 10],
        "num_beams": [1, 2],
        "scoring": ["authors"],
    },
    "13": {
        "d_out": [3, 9],
        "d_in": [4, 12],
        "r": [1, 4],
        "lora_alpha": [1.0, 16.0],
        "planted_dim": [16, 30],
        "planted_steps": [50, 100],
        "task_steps": [10, 20],
        "seed": [1, 2],
    },
    "14": {
        "results_dir": ["../results/cola_minilm", "../results/trial_sst2_rates"],
        "baseline": ["drlora", "full"],
        "overwrite": [True],
    },
    "15": {
        "init_r": [4, 6],
        "target_r": [1, 3],
        "deltaT": [1, 8],
        "dem_weight": [0.0, 0.3],
        "learning_rate": [1e-3, 1e-2],
        "lora_alpha": [8.0, 64.0],
        "batch_size": [16, 32],
        "epochs": [4, 6],
        "warmup": [0.0, 0.2],
        "seed": [1, 2],
    },
    "16": {
        "R": [2, 5],
        "r": [1, 4],
        "d_in": [6, 20],
        "d_out": [4, 12],
        "batch": [1, 8],
        "counts": [[1, 2], [2, 3]],
        "batch_size": [4, 8],
        "repeats": [2, 3],
        "task_steps": [12, 16],
        "seed": [1, 2],
    },
    "17": {
        "d_in": [5, 10],
        "d_out": [3, 8],
        "r": [2, 4],
        "n_rows": [500, 1000],
        "small_ranks": [[0, 2, 2, 4], [1, 1, 3, 3]],
        "small_dim": [12, 20],
        "small_steps": [60, 100],
        "n_draws": [2, 8],
        "seed": [1, 2],
    },
    "18": {
        "results_dir": ["../results/trial_sst2_rates"],
        "task": ["cola", "grammar"],
        "permutations": [50, 200],
        "seed": [1, 2],
    },
    "19": {
        "model_name": ["tiny-llama"],
        "init_r": [5, 3],
        "target_r": [3, 1],
        "deltaT": [2, 1],
        "dem_weight": [0.0, 0.3],
        "lora_alpha": [8.0, 32.0],
        "learning_rate": [1e-3, 1e-2],
        "steps": [12, 10],
        "batch_size": [2, 3],
        "answers": [4, 6],
        "max_length": [200, 160],
        "measured": [["1B"], ["135M"]],
        "seed": [1, 2],
        "overwrite": [True],
    },
    "20": {
        "baseline": ["lora rank32-dora", "lora rank64-rslora"],
        "level": [0.01, 0.1],
        "entries": [10, 200],
        "draws": [2_000, 5_000],
        "orth_reg_weight": [0.1, 2.0],
        "seed": [1, 2],
    },
    "21": {
        "small_ranks": [[0, 2, 2, 4], [0, 1, 3, 3]],
        "small_dim": [12, 20],
        "small_init_r": [5, 8],
        "small_target_r": [1, 3],
        "small_steps": [100, 140],
        "small_weight": [0.1, 3.0],
        "seed": [1, 2],
    },
    "22": {
        "batch": [1, 2],
        "length": [8, 16],
        "repeats": [1, 3],
        "matrices": [12, 100],
        "stop": [70, 190],
        "seed": [1, 3],
    },
}


def mixture(number: str, index: int) -> dict:
    """Every parameter at its first other value (0), or its last (1)."""
    return {name: values[-index] for name, values in VALUES[number].items()}


def declared(path: Path) -> dict:
    """{parameter: default} of a notebook."""
    (cell,) = [cell for cell in nbformat.read(path, 4).cells if "parameters" in tags(cell)]
    tree = ast.parse(cell.source)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body}


def main(numbers: list[str]) -> int:
    failed = 0
    for path in NOTEBOOKS:
        number = path.name[:2]
        if numbers and number not in numbers:
            continue
        draw = random.Random(number)
        values = VALUES[number]
        sets = [{name: value} for name, others in values.items() for value in others]
        if number in ("09", "10", "11", "12", "19"):  # by themselves these would train for minutes
            small = "data_dir model_name max_steps train_size steps answers measured".split()
            short = {k: values[k][0] for k in small if k in values}
            sets = [short | given for given in sets]
        sets += [{n: draw.choice(others) for n, others in values.items()} for _ in range(5)]
        for given in sets:
            try:
                said = execute(path, given)
                print("ran   ", number, given, said.count("not seen with"), "not seen", flush=True)
            except Exception as error:
                failed += 1
                print("FAILED", number, given, f"{type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
