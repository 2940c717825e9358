"""EK-FAC scores of a small network by kronfluence, as a reference for the test suite.

    python benchmarks/kronfluence_reference.py tests/methods/kronfluence_reference.safetensors

Run it in the environment of `peers_requirements.txt`. The file holds the network's weights, the
data and kronfluence's scores `[query, train]` with the true labels, in float32.
"""

import copy
import sys
import tempfile
from importlib.metadata import version

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Classification(Task):
    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def main(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)
    )
    x, y = torch.randn(230, 12), torch.randint(4, (230,))
    train, queries = TensorDataset(x[:200], y[:200]), TensorDataset(x[200:], y[200:])
    task = Classification()
    prepared = prepare_model(copy.deepcopy(model), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "reference", prepared, task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=200,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=30,
            per_device_train_batch_size=200,
            score_args=ScoreArguments(damping_factor=None),  # 0.1 × the mean eigenvalue
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {"x": x, "y": y, "scores": scores.float().contiguous()}
    save_file(tensors, path, metadata={"kronfluence": version("kronfluence")})


if __name__ == "__main__":
    main(sys.argv[1])
