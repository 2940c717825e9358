"""The ladder from the Hessian to K-FAC: what is equal to what, and where each step loses.

All matrices of the oracle are made here from autograd's Jacobians and Hessians.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.curvature import Dense, Kronecker
from forebear.data import Data
from forebear.metrics.curvature import joined_blocks, kronecker_error, matrix_of
from forebear.plan import make_plan
from forebear.stream import Stream

N, TINY = 40, fb.Absolute(1e-3)
CROSS_ENTROPY, SQUARED_ERROR = fb.losses.cross_entropy, fb.losses.squared_error

Batch = tuple[Tensor, Tensor]


def network(*sizes: int, activation: Callable[[], nn.Module] | None = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), *([activation()] if activation else [])]
    return nn.Sequential(*(layers[:-1] if activation else layers)).double().eval()


def examples(features: int, outputs: int, kind: str = "classes") -> Batch:
    torch.manual_seed(5)
    x = torch.randn(N, features, dtype=torch.float64)
    if kind == "classes":
        return x, torch.randint(outputs, (N,))
    return x, torch.randn(N, outputs, dtype=torch.float64)


def stream_of(model: nn.Module, loss: Any, batch: Batch, size: int = 512) -> Stream:
    task, data = fb.Task(model, loss), Data(batch)
    return Stream(task, make_plan(task, data), data, size)


def written(model: nn.Module, loss: Any, batch: Batch, **options: Any) -> Tensor:
    """The library's dense curvature."""
    matrices = Dense(**options).matrices(stream_of(model, loss, batch), loss)
    return torch.from_numpy(joined_blocks(matrices))


def kronecker(model: nn.Module, loss: Any, batch: Batch, **options: Any) -> Tensor:
    """The library's K-FAC or EK-FAC, multiplied out."""
    options = {"targets": "exact"} | options
    stream = stream_of(model, loss, batch, options.pop("batch_size", 512))
    return torch.from_numpy(matrix_of(Kronecker(**options).fit(stream, loss, TINY, 0)))


# The oracle: parameters as one vector, layer by layer, each `[o, i + 1]` with the bias last.


def layers_of(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def sizes_of(model: nn.Module) -> list[int]:
    return [layer.out_features * (layer.in_features + 1) for layer in layers_of(model)]


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat(
        [torch.cat([m.weight, m.bias[:, None]], 1).detach().flatten() for m in layers_of(model)]
    )


def outputs_at(model: nn.Sequential, vector: Tensor, x: Tensor) -> Tensor:
    pieces = iter(vector.split(sizes_of(model)))
    for module in model:
        if isinstance(module, nn.Linear):
            matrix = next(pieces).view(module.out_features, module.in_features + 1)
            x = x @ matrix[:, :-1].T + matrix[:, -1]
        else:
            x = module(x)
    return x


def jacobians(model: nn.Sequential, x: Tensor) -> Tensor:
    """`[n, c, P]`."""
    point = vector_of(model)
    return torch.func.jacrev(lambda vector: outputs_at(model, vector, x))(point)


def hessian(model: nn.Sequential, batch: Batch, kind: str = "classes") -> Tensor:
    def mean_loss(vector: Tensor) -> Tensor:
        outputs = outputs_at(model, vector, batch[0])
        if kind == "classes":
            return F.cross_entropy(outputs, batch[1])
        return 0.5 * (outputs - batch[1]).square().sum(1).mean()

    return torch.func.hessian(mean_loss)(vector_of(model))


def gauss_newton(model: nn.Sequential, x: Tensor, kind: str = "classes") -> Tensor:
    jacobian = jacobians(model, x)
    if kind != "classes":
        return torch.einsum("ncp,ncq->pq", jacobian, jacobian) / len(x)
    p = model(x).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / len(x)


def fisher(model: nn.Sequential, x: Tensor) -> Tensor:
    """The expectation over labels drawn from the model, class by class."""
    total = torch.zeros(1).double()
    log_p = outputs_at(model, vector_of(model), x).log_softmax(1)
    for label in range(log_p.shape[1]):

        def losses(vector: Tensor, label: int = label) -> Tensor:
            return -outputs_at(model, vector, x).log_softmax(1)[:, label]

        grads = torch.func.jacrev(losses)(vector_of(model))  # [n, P]
        total = total + grads.T @ (log_p[:, label].exp()[:, None] * grads) / len(x)
    return total


def blocks_of(matrix: Tensor, model: nn.Module) -> Tensor:
    kept = torch.zeros_like(matrix)
    start = 0
    for size in sizes_of(model):
        where = slice(start, start + size)
        kept[where, where] = matrix[where, where]
        start += size
    return kept


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_the_exact_matrices_are_those_of_autograd(activation: Any) -> None:
    model, batch = network(4, 5, 3, activation=activation), examples(4, 3)
    exact, approximate = hessian(model, batch), gauss_newton(model, batch[0])
    assert close(written(model, CROSS_ENTROPY, batch, kind="hessian"), exact)
    assert close(written(model, CROSS_ENTROPY, batch, kind="gauss_newton"), approximate)
    assert close(approximate, fisher(model, batch[0]))  # of the oracle: exact Fisher = Gauss-Newton
    for kind, matrix in (("hessian", exact), ("gauss_newton", approximate)):
        found = written(model, CROSS_ENTROPY, batch, kind=kind, blocks="layers")
        assert close(found, blocks_of(matrix, model))


def test_the_fisher_matrix_of_squared_error_is_its_gauss_newton_matrix() -> None:
    """Gradients under Gaussian noise have `JᵀJ` as second moment; unit vectors are exact."""
    model, batch = network(4, 5, 3), examples(4, 3, "numbers")
    found = written(model, SQUARED_ERROR, batch, kind="gauss_newton")
    assert close(found, gauss_newton(model, batch[0], "numbers"))
    torch.manual_seed(0)
    draws, jacobian = 20_000, jacobians(model, batch[0][:2])
    noise = torch.randn(draws, 2, 3, dtype=torch.float64)
    grads = torch.einsum("dnc,ncp->dnp", noise, jacobian)
    sampled = torch.einsum("dnp,dnq->pq", grads, grads) / draws
    assert close(sampled, torch.einsum("ncp,ncq->pq", jacobian, jacobian), 0.05)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_of_a_generalised_linear_model_hessian_and_gauss_newton_are_equal(kind: str) -> None:
    model, batch = network(4, 3, activation=None), examples(4, 3, kind)
    loss = CROSS_ENTROPY if kind == "classes" else SQUARED_ERROR
    assert close(
        written(model, loss, batch, kind="hessian"),
        written(model, loss, batch, kind="gauss_newton"),
    )


def test_same_layer_blocks_of_a_relu_network_are_equal_and_the_others_are_not() -> None:
    model, batch = network(4, 6, 5, 3, activation=nn.ReLU), examples(4, 3)
    options: dict[str, Any] = {"blocks": "layers"}
    one = written(model, CROSS_ENTROPY, batch, kind="hessian", **options)
    other = written(model, CROSS_ENTROPY, batch, kind="gauss_newton", **options)
    assert close(one, other)
    exact = written(model, CROSS_ENTROPY, batch, kind="hessian")
    assert not close(exact, written(model, CROSS_ENTROPY, batch, kind="gauss_newton"), 0.05)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_only_the_last_block_is_equal_where_the_activation_is_curved(activation: Any) -> None:
    model, batch = network(4, 6, 5, 3, activation=activation), examples(4, 3)
    stream = stream_of(model, CROSS_ENTROPY, batch)
    hessians = Dense(kind="hessian", blocks="layers").matrices(stream, CROSS_ENTROPY)
    others = Dense(kind="gauss_newton", blocks="layers").matrices(stream, CROSS_ENTROPY)
    *early, last = hessians
    assert close(hessians[last], others[last])
    assert not any(close(hessians[name], others[name], 0.01) for name in early)


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
def test_of_a_deep_linear_network_all_block_approximations_are_exact(corrected: bool) -> None:
    model, batch = network(4, 6, 5, 3, activation=None), examples(4, 3, "numbers")
    exact = blocks_of(gauss_newton(model, batch[0], "numbers"), model)
    assert close(kronecker(model, SQUARED_ERROR, batch, corrected=corrected), exact)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_kfac_has_the_factors_of_its_definition(activation: Any) -> None:
    """`B ⊗ A` with A over inputs with a one, B over exact expectations of output gradients."""
    model, (x, y) = network(4, 5, 3, activation=activation), examples(4, 3)
    inputs, outs, expected = x, [], []
    for module in model:
        if isinstance(module, nn.Linear):
            ones = torch.cat([inputs, torch.ones(N, 1).double()], 1).detach()
            inputs = module(inputs)
            outs.append((inputs, ones))
        else:
            inputs = module(inputs)
    p = inputs.softmax(1).detach()
    for out, ones in outs:
        grads = []
        for label in range(3):
            loss = F.cross_entropy(inputs, torch.full_like(y, label), reduction="sum")
            grads.append(torch.autograd.grad(loss, out, retain_graph=True)[0])
        left = sum((p[:, c, None] * g).T @ g for c, g in enumerate(grads)) / N
        expected.append(torch.kron(torch.as_tensor(left), ones.T @ ones / N))
    found = kronecker(model, CROSS_ENTROPY, (x, y), corrected=False)
    assert close(found, torch.from_numpy(joined_blocks(expected)))


@pytest.mark.parametrize("targets", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_kfacs_error_is_that_of_its_basis_and_that_of_its_eigenvalues(
    activation: Any, targets: str
) -> None:
    model, batch = network(4, 6, 5, 3, activation=activation), examples(4, 3)
    if targets == "exact":
        exact = blocks_of(gauss_newton(model, batch[0]), model)
    else:  # what the factors are an approximation of: the moments of these very gradients
        exact = blocks_of(moments_of(model, batch, targets), model)
    options: dict[str, Any] = {"targets": targets}
    corrected = kronecker(model, CROSS_ENTROPY, batch, corrected=True, **options)
    products = kronecker(model, CROSS_ENTROPY, batch, corrected=False, **options)
    error = kronecker_error(exact, corrected, products)
    assert error.defect < 1e-12
    assert 0 < error.eigenvalues < error.total
    assert (exact - corrected).norm() < (exact - products).norm()
    assert corrected.trace() == pytest.approx(exact.trace().item(), rel=1e-12)


def moments_of(model: nn.Sequential, batch: Batch, targets: str) -> Tensor:
    stream = stream_of(model, CROSS_ENTROPY, batch)
    objective, generator = CROSS_ENTROPY, torch.Generator().manual_seed(0)
    weights = torch.ones(N).double()
    labels = batch[1]
    if targets == "sampled":
        labels, weights = objective.sample(model(batch[0]).detach(), batch, generator)
    assert len(stream.data) == N

    def losses(vector: Tensor) -> Tensor:
        outputs = outputs_at(model, vector, batch[0])
        return weights * F.cross_entropy(outputs, labels, reduction="none")

    grads = torch.func.jacrev(losses)(vector_of(model))
    return grads.T @ grads / N


def test_on_a_full_factorial_set_kfac_and_ekfac_are_the_block_itself() -> None:
    """Each of the inputs meets each of the output gradients: they are independent exactly."""
    torch.manual_seed(2)
    inputs, noises = torch.randn(4, 3).double(), torch.randn(5, 2).double()
    x = inputs.repeat_interleave(5, 0)
    model = network(3, 2, activation=None)
    y = model(x).detach() + noises.repeat(4, 1)  # so that the output gradient is minus the noise
    ones = torch.cat([x, torch.ones(20, 1).double()], 1)
    grads = torch.einsum("no,ni->noi", noises.repeat(4, 1), ones).flatten(1)
    exact = grads.T @ grads / 20
    for corrected in (True, False):
        options: dict[str, Any] = {"targets": "empirical", "corrected": corrected}
        assert close(kronecker(model, SQUARED_ERROR, (x, y), **options), exact)
    assert close(written(model, SQUARED_ERROR, (x, y), kind="fisher", blocks="layers"), exact)


class Pooled(nn.Module):
    """A linear layer at every position, the mean over positions, and a linear layer."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.one, self.activation, self.two = nn.Linear(3, 4), activation, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(x)).mean(1))


def pooled(activation: nn.Module, outputs: str = "classes") -> tuple[nn.Module, Batch]:
    torch.manual_seed(1)
    model = Pooled(activation).double().eval()
    x = torch.randn(N, 5, 3).double()
    y = torch.randint(3, (N,)) if outputs == "classes" else torch.randn(N, 3).double()
    return model, (x, y)


def test_reduced_factors_are_exact_where_a_linear_layer_is_pooled() -> None:
    model, batch = pooled(nn.Identity(), "numbers")
    exact = written(model, SQUARED_ERROR, batch, kind="gauss_newton", blocks="layers")
    reduced = kronecker(model, SQUARED_ERROR, batch, corrected=False, sharing="reduce")
    expanded = kronecker(model, SQUARED_ERROR, batch, corrected=False)
    assert close(reduced, exact)
    assert not close(expanded, exact, 0.1)


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("targets", ["exact", "sampled"])
def test_batches_and_padding_change_nothing(sharing: str, targets: str, corrected: bool) -> None:
    model, (x, y) = pooled(nn.Tanh())

    def masked(model: Any, batch: Any) -> Tensor:  # the mean over the positions that are not zero
        hidden = model.activation(model.one(batch[0]))
        mask = batch[0].any(-1, keepdim=True)
        return model.two((hidden * mask).sum(1) / mask.sum(1))

    class Masked(fb.losses.CrossEntropy):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return masked(model, batch)

        def sample(self, outputs: Any, batch: Any, generator: Any) -> tuple[Tensor, Tensor]:
            return outputs.argmin(1), outputs.new_full((len(outputs),), 0.3)  # no chance

    options: dict[str, Any] = {"sharing": sharing, "targets": targets, "corrected": corrected}
    whole = kronecker(model, Masked(), (x, y), **options)
    small = kronecker(model, Masked(), (x, y), batch_size=7, **options)
    padded = torch.cat([x, torch.zeros(N, 3, 3).double()], 1)
    assert close(small, whole, 1e-11)
    assert close(kronecker(model, Masked(), (padded, y), **options), whole, 1e-11)


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, SQUARED_ERROR], ids=["softmax", "squares"])
def test_ready_losses_and_the_general_way_through_the_hessian_agree(loss: Any) -> None:
    class Plain(type(loss)):
        """Of the same value; only the ready ones have a closed form."""

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().loss(outputs, batch)

    kind = "classes" if loss is CROSS_ENTROPY else "numbers"
    model, batch = network(4, 5, 3), examples(4, 3, kind)
    for corrected in (True, False):
        options: dict[str, Any] = {"corrected": corrected}
        assert close(
            kronecker(model, Plain(), batch, **options), kronecker(model, loss, batch, **options)
        )


def test_many_draws_approach_the_exact_expectation() -> None:
    model, batch = network(4, 6, 3), examples(4, 3)
    exact = kronecker(model, CROSS_ENTROPY, batch, corrected=False)
    stream = stream_of(model, CROSS_ENTROPY, batch)

    def error(draws: int) -> float:
        method = Kronecker(corrected=False, draws=draws)
        found = [matrix_of(method.fit(stream, CROSS_ENTROPY, TINY, seed)) for seed in range(3)]
        errors = [(torch.from_numpy(one) - exact).norm() / exact.norm() for one in found]
        return float(sum(errors)) / len(errors)

    few, many = error(2), error(512)
    assert few > 4 * many  # 1/√m would be a factor of sixteen
    assert many < 0.02


def test_parameters_without_a_rule_are_pulled_back_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x * self.scale).tanh())

    torch.manual_seed(0)
    model, (x, y) = Scaled().double().eval(), examples(4, 3)
    rows = []
    for input in x:
        logits = model(input)
        jacobian = torch.stack(
            [torch.autograd.grad(z, model.scale, retain_graph=True)[0] for z in logits]
        )
        p = logits.detach().softmax(0)
        rows.append(jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian)
    expected = torch.stack(rows).mean(0)
    found = written(model, CROSS_ENTROPY, (x, y), kind="gauss_newton")[:4, :4]
    assert close(found, expected)


def test_factored_damping_is_that_of_the_two_factors() -> None:
    model, batch = network(4, 5, 3), examples(4, 3)
    options: dict[str, Any] = {"targets": "empirical", "corrected": False, "rank": None}
    stream, damping = stream_of(model, CROSS_ENTROPY, batch), 0.03
    method = Kronecker(damping_form="factored", **options)
    fitted = method.fit(stream, CROSS_ENTROPY, fb.Absolute(damping), 0)
    undamped = joined_blocks([torch.eye(size) for size in sizes_of(model)])
    solved = fitted.solve(torch.from_numpy(undamped))
    start = 0
    for name, block in fitted.blocks.items():
        rows, cols = block.basis.block.rows, block.basis.block.cols
        q_left, q_right = block.basis.left_vectors, block.basis.right_vectors
        assert q_left is not None
        assert q_right is not None
        left = q_left @ torch.diag(block.basis.left_moments) @ q_left.T
        right = q_right @ torch.diag(block.basis.right_moments) @ q_right.T
        pi = ((right.trace() / cols) / (left.trace() / rows)).sqrt()
        one = left + damping**0.5 / pi * torch.eye(rows).double()
        other = right + damping**0.5 * pi * torch.eye(cols).double()
        where = slice(start, start + rows * cols)
        expected = torch.linalg.inv(torch.kron(one.contiguous(), other.contiguous()))
        assert close(solved[where, where], expected, 1e-9), name
        start += rows * cols


def test_scores_with_blocks_are_those_of_blocks_inverted_one_by_one(tmp_path: Any) -> None:
    model, batch = network(4, 5, 3), examples(4, 3)
    task = fb.Task(model, CROSS_ENTROPY)
    grads = per_example(model, batch)
    for kind, indefinite in (
        ("gauss_newton", "absolute"),
        ("hessian", "clip"),
        ("hessian", "absolute"),
        ("fisher", "absolute"),
    ):
        method = fb.Exact(curvature=kind, blocks="layers", indefinite=indefinite, damping=0.1)
        fitted = method.fit(task, batch)
        matrices = {
            "hessian": hessian(model, batch),
            "gauss_newton": gauss_newton(model, batch[0]),
            "fisher": grads.T @ grads / N,
        }
        expected, start, used = torch.zeros(N, N).double(), 0, []
        for size in sizes_of(model):
            where = slice(start, start + size)
            values, vectors = torch.linalg.eigh(matrices[kind][where, where])
            values = values.clamp_min(0) if indefinite == "clip" else values.abs()
            used.append(0.1 * values.mean().item())
            rotated = grads[:, where] @ vectors
            expected += rotated / (values + used[-1]) @ rotated.T / N
            start += size
        assert list(fitted.details()["damping_used"].values()) == pytest.approx(used, rel=1e-9)
        assert torch.allclose(fitted.score(batch).values, expected, rtol=1e-8, atol=1e-12)
        assert torch.allclose(fitted.self_influence(), expected.diagonal(), rtol=1e-8)
        fitted.save(tmp_path / f"{kind}-{indefinite}")
        again = fb.load(tmp_path / f"{kind}-{indefinite}", task, batch)
        assert torch.allclose(again.score(batch).values, expected, rtol=1e-8, atol=1e-12)


def per_example(model: nn.Sequential, batch: Batch) -> Tensor:
    def losses(vector: Tensor) -> Tensor:
        return F.cross_entropy(outputs_at(model, vector, batch[0]), batch[1], reduction="none")

    return torch.func.jacrev(losses)(vector_of(model))


def test_the_pseudo_inverse_leaves_out_what_is_nearly_zero() -> None:
    """Softmax cannot tell a shift of all logits: the last layer's block is singular."""
    model, batch = network(4, 3, activation=None), examples(4, 3)
    task, zero = fb.Task(model, CROSS_ENTROPY), fb.Absolute(0.0)
    with pytest.raises(fb.errors.TaskError, match=r"singular.*smallest eigenvalue is"):
        fb.Exact(curvature="gauss_newton", blocks="layers", damping=zero).fit(task, batch)
    method = fb.Exact(curvature="gauss_newton", indefinite="pseudo_inverse", damping=zero)
    grads = per_example(model, batch)
    inverse = torch.linalg.pinv(gauss_newton(model, batch[0]), rtol=1e-6, hermitian=True)
    scores = method.fit(task, batch).score(batch).values
    assert torch.allclose(scores, grads @ inverse @ grads.T / N, rtol=1e-7, atol=1e-10)


def test_damping_can_be_changed_without_fitting_again() -> None:
    model, batch = network(4, 5, 3), examples(4, 3)
    stream = stream_of(model, CROSS_ENTROPY, batch)
    rows = torch.randn(3, sum(sizes_of(model))).double()
    for options in ({}, {"blocks": "layers"}, {"kind": "gauss_newton"}):
        method = Dense(**options)  # type: ignore[arg-type]
        one = method.fit(stream, CROSS_ENTROPY, fb.Absolute(1.0), 0)
        again = method.restore(stream, CROSS_ENTROPY, one.tensors())
        other = method.fit(stream, CROSS_ENTROPY, fb.Absolute(0.01), 0).solve(rows)
        for fitted in (one, again):
            assert close(fitted.with_damping(fb.Absolute(0.01)).solve(rows), other, 1e-9)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(fb.errors.TaskError, match="draws is 3 with targets='exact'"):
        fb.KFAC(targets="exact", draws=3)
    with pytest.raises(fb.errors.TaskError, match="damping_form='factored'"):
        Kronecker(corrected=True, damping_form="factored")
    with pytest.raises(fb.errors.TaskError, match="cutoff is -1"):
        Dense(cutoff=-1)
    model, batch = network(4, 5, 3), examples(4, 3)
    many = network(2, 1001, activation=None)
    data = (torch.randn(4, 2).double(), torch.zeros(4, dtype=torch.long))
    with pytest.raises(fb.errors.TaskError, match="each of 1001 outputs"):
        fb.EKFAC(targets="exact").fit(fb.Task(many, CROSS_ENTROPY), data)
    with pytest.raises(fb.errors.TaskError, match="singular"):
        fb.KFAC(targets="exact", damping=0.0).fit(fb.Task(model, CROSS_ENTROPY), batch)
    assert replace(Kronecker(), draws=2).draws == 2
