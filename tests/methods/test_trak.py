"""TRAK against a dense reference, and its projections against their promises."""

import torch
from torch import Tensor, nn

import forebear as fb
from forebear.capture import Capture
from forebear.data import Data
from forebear.plan import make_plan
from forebear.projections import Gaussian, TensorSketch
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, N, flat, network
from tests.oracles import gradients_one_at_a_time


def log_odds(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    p = model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    return (p / (1 - p)).log()


def output_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    grads = gradients_one_at_a_time(model, log_odds, batch)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def residual(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 1 - model(batch[0]).softmax(1).detach().gather(1, batch[1][:, None])[:, 0]


def test_trak_is_the_dense_kernel_of_projected_output_gradients() -> None:
    """With the drawn Gaussian matrices taken from the method, everything else is dense algebra."""
    models = [network(seed) for seed in (1, 2)]
    task = fb.Task(network(), LOSS, checkpoints=[m.state_dict() for m in models])
    method = fb.TRAK(dimension=16, projection="gaussian", damping=0.05, seed=7)
    fitted = method.fit(task, TRAIN)
    products, weights = [], []
    for i, model in enumerate(models):
        generator = torch.Generator().manual_seed(7 + i)
        # Blocks are drawn layer by layer, in a layer's [o, i + 1] layout with the bias last.
        matrices = [torch.randn(size, 16, generator=generator) / 4 for size in (35, 18)]

        def features(batch: tuple[Tensor, Tensor], model=model, matrices=matrices) -> Tensor:
            grads = gradients_one_at_a_time(model, log_odds, batch)
            layers = [
                torch.cat([grads[f"{k}.weight"], grads[f"{k}.bias"][:, :, None]], 2).flatten(1)
                for k in ("0", "2")
            ]
            return sum(g @ m.double() for g, m in zip(layers, matrices, strict=True))

        phi, query = features(TRAIN), features(QUERIES)
        kernel = phi.T @ phi / N
        kernel += 0.05 * kernel.trace() / 16 * torch.eye(16).double()
        products.append(query @ torch.linalg.solve(kernel, phi.T))
        weights.append(residual(model, TRAIN))
    expected = torch.stack(products).mean(0) * torch.stack(weights).mean(0) / N
    assert torch.allclose(fitted.score(QUERIES).values, expected, rtol=1e-6)


def test_the_link_takes_a_loss_gradient_apart() -> None:
    model = network()
    outputs, weights = LOSS.link(model, TRAIN)
    assert torch.allclose(outputs, log_odds(model, TRAIN), rtol=1e-9)
    assert torch.allclose(weights, residual(model, TRAIN), rtol=1e-9)
    assert torch.allclose(
        -flat(model, TRAIN), output_gradients(model, TRAIN) * weights[:, None], rtol=1e-7
    )


def test_the_regression_link_takes_a_loss_gradient_apart() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    batch = (TRAIN[0], torch.randn(N, 2).double())
    loss = fb.losses.squared_error

    def output(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss.link(model, batch)[0]

    _, weights = loss.link(model, batch)
    of_loss = gradients_one_at_a_time(model, loss, batch)
    of_output = gradients_one_at_a_time(model, output, batch)
    for name in of_loss:
        scaled = of_output[name] * weights.view(-1, *[1] * (of_output[name].ndim - 1))
        assert torch.allclose(of_loss[name], -scaled, rtol=1e-9)


def features_of(projection, model: nn.Module, batch: tuple[Tensor, Tensor], seed: int) -> Tensor:
    task = fb.Task(model, LOSS)
    plan = make_plan(task, Data(batch))
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, batch)
        return projection.prepare(plan, seed).features(gradients)


def test_sketches_keep_inner_products_in_expectation() -> None:
    model = network()
    expected = flat(model, TRAIN) @ flat(model, TRAIN).T
    for kind in (TensorSketch, Gaussian):
        estimates = []
        for seed in range(60):
            phi = features_of(kind(64), model, TRAIN, seed)
            assert phi.shape == (N, 64)
            estimates.append(phi @ phi.T)
        mean = torch.stack(estimates).mean(0)
        assert ((mean - expected).norm() / expected.norm()) < 0.08, kind


def test_a_tensor_sketch_is_a_count_sketch_of_the_written_out_gradient() -> None:
    """The hashes of pairs, applied entry by entry, give the same inner products."""
    model = network()
    task = fb.Task(model, LOSS)
    plan = make_plan(task, Data(TRAIN))
    prepared = TensorSketch(32).prepare(plan, 3)
    phi = features_of(TensorSketch(32), model, TRAIN, 3)
    grads = gradients_one_at_a_time(model, LOSS, TRAIN)
    sketch = torch.zeros(N, 32, dtype=torch.float64)
    for name, hashed in prepared.hashes.items():
        written = torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"][:, :, None]], 2)
        for i in range(written.shape[1]):
            for j in range(written.shape[2]):
                bucket = int(hashed.rows.buckets[i] + hashed.cols.buckets[j]) % 32
                sign = int(hashed.rows.signs[i] * hashed.cols.signs[j])
                sketch[:, bucket] += sign * written[:, i, j]
    assert torch.allclose(phi @ phi.T, sketch @ sketch.T, rtol=1e-9)


def test_positions_and_tokens_are_sketched_by_every_route() -> None:
    """Sequences, long and short, and embeddings agree with the written-out sketch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3)).double().eval()

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0]).square().cumsum(1).mean((1, 2)) * 10

    ids = (torch.randint(9, (12, 6)),)
    task = fb.Task(model, loss)
    plan = make_plan(task, Data(ids))
    prepared = TensorSketch(64).prepare(plan, 0)
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, ids)
        phi = prepared.features(gradients)
    grads = gradients_one_at_a_time(model, loss, ids)
    sketch = torch.zeros(12, 64, dtype=torch.float64)
    for name, hashed in prepared.hashes.items():
        block = plan.blocks[name]
        written = torch.stack(
            [block.matrix({p: grads[p][i] for p in block.parameters}) for i in range(12)]
        )
        if block.cols == 1:
            hashed_cols, signs = torch.zeros(1, dtype=torch.long), torch.ones(1)
        else:
            hashed_cols, signs = hashed.cols.buckets, hashed.cols.signs
        bucket = (hashed.rows.buckets[:, None] + hashed_cols) % 64
        for i in range(block.rows):
            for j in range(block.cols):
                sign = hashed.rows.signs[i] * signs[j]
                sketch[:, bucket[i, j]] += sign * written[:, i, j]
    assert torch.allclose(phi @ phi.T, sketch @ sketch.T, rtol=1e-9)


def test_parameters_of_the_fallback_are_sketched_too() -> None:
    """Position embeddings `[t]` have no rule; their gradients must not carry a graph along."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(7, 4), nn.Embedding(5, 4)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.token(x) + self.place(torch.arange(5))).mean(1))

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    train = (
        torch.randint(7, (40, 5), generator=generator),
        torch.randint(3, (40,), generator=generator),
    )
    fitted = fb.TRAK(dimension=16, damping=1.0).fit(fb.Task(Positions().eval(), LOSS), train)
    assert "place.weight" in fitted.details()["differentiated_one_by_one"]
    assert torch.isfinite(fitted.score(train).values).all()
