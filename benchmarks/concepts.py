"""Which training pictures taught a model a concept: precision at 10, by concept and whole image.

Run: python benchmarks/concepts.py
"""

import torch

from forebear.zoo.concepts import compare

torch.set_num_threads(1)
SEEDS = (0, 1, 2)


def main() -> None:
    each = [compare(seed=seed) for seed in SEEDS]
    print(f"networks {SEEDS}: seen pairs, withheld pair")
    for name in each[0]:
        values = torch.tensor([found[name] for found in each])
        shown = "; ".join(f"{seen:.2f} {held:.2f}" for seen, held in values.tolist())
        mean = " ".join(f"{value:.2f}" for value in values.mean(0).tolist())
        print(f"{name:36s} mean {mean}   ({shown})", flush=True)


if __name__ == "__main__":
    main()
