"""Networks of diffusers as tasks, held against autograd one image at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import DataError, NonFiniteError, NumericalWarning, TaskError
from forebear.methods.concept_trak import concepts
from forebear.plan import make_plan
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Sampler

diffusers = pytest.importorskip("diffusers")

from tests.diffusers_cases import (  # noqa: E402
    TOKENS,
    WIDTH,
    conditional,
    conditions,
    encoder,
    pictures,
    plain,
    transformer,
)

DDPM = diffusers.DDPMScheduler()
NETWORKS = {
    "unet": plain,
    "unet with classes": lambda: plain(num_class_embeds=5),
    "unet with other blocks": lambda: plain(
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet"
    ),
    "conditional unet": conditional,
    "conditional unet with linear projections": lambda: conditional(use_linear_projection=True),
    "transformer": transformer,
}


def task_of(model: Any, **settings: Any) -> fb.Task:
    return fb.diffusers.task(model, DDPM, **({"levels": (50, 500, 950)} | settings))


def told(model: Any, data: fb.Data) -> fb.Data:
    if getattr(model, "class_embedding", None) is None:
        return data
    batch = data.batch(slice(None))
    return fb.Data({**batch, "condition": torch.arange(len(data)) % 5})


def losses_by_diffusers(model: Any, batch: Any, noise: Callable[[float], Tensor]) -> Tensor:
    """The loss of diffusers' training scripts, by its own scheduler, with the first channels."""
    kind, total = type(model).__name__, torch.zeros(len(batch["image"]), dtype=torch.float64)
    for level in (50, 500, 950):
        drawn = noise(level)
        noisy = DDPM.add_noise(batch["image"], drawn, torch.tensor([level]))
        steps = torch.full((len(noisy),), level)
        condition = batch.get("condition")
        if kind == "UNet2DConditionModel":
            said = model(noisy, steps, encoder_hidden_states=condition).sample
        elif kind == "DiTTransformer2DModel":
            said = model(noisy, timestep=steps, class_labels=condition).sample[:, :4]
        else:
            said = model(noisy, steps, class_labels=condition).sample
        total = total + (said - drawn).square().flatten(1).mean(1) / 3
    return total


def gradients(model: nn.Module, values: Callable[[Any], Tensor], data: fb.Data) -> Tensor:
    """Of each example alone, for the parameters that require gradients, `[n, P]`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(data)):
        loss = values(data.batch(slice(i, i + 1)))[0]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_are_seen_and_products_of_gradients_are_those_of_autograd(name: str) -> None:
    model = NETWORKS[name]()
    data, task = told(model, pictures(model)), task_of(model)
    plan = make_plan(task, data)
    assert plan.coverage == 1.0
    assert plan.fallback == plan.unseen == plan.unchecked == ()

    def values(batch: Any) -> Tensor:
        loss: Any = task.loss
        return losses_by_diffusers(model, batch, lambda level: noise_at(loss, batch, level))

    rows = gradients(model, values, data)
    expected = rows @ rows.T
    scores = fb.GradDot().fit(task, data).score(data)
    error = (scores.values - expected).abs() / expected.abs()
    # diffusers keeps its schedule in single precision; forebear takes the roots of it in double.
    assert error.max() < 1e-5
    exact = gradients(model, lambda batch: task.losses(model, batch), data)
    torch.testing.assert_close(scores.values, exact @ exact.T, rtol=1e-8, atol=0)


def noise_at(loss: Any, batch: Any, level: float) -> Tensor:
    point = next(point for point in loss.points if point.level == level)
    return loss.noise_of(batch, point)


@pytest.mark.parametrize("build", [plain, conditional, transformer])
def test_a_training_image_that_is_the_query_is_its_top_proponent(build: Any) -> None:
    model = build()
    data, task = pictures(model, 12), task_of(model)
    for method in ("gradcos", "trak", "ekfac", "das"):
        scores = fb.get(method).fit(task, data).score(data)
        assert scores.values.argmax(1).tolist() == list(range(12)), method


FEW = Sampler(steps=3, clip=True)
METHODS: dict[str, dict[str, Any]] = {
    "ekfac": {},
    "das": {},
    "dtrak": {},
    "trak": {},
    "journey_trak": {"sampler": FEW},
    "abu": {"query_draws": 32, "fisher_draws": 1},
    "mucs": {"max_steps": 2, "levels": 2, "batch_size": 4, "null": 1e4},
    "nda": {"patch": 3, "timesteps": (100,)},
}


@pytest.mark.filterwarnings("ignore::forebear.errors.ForebearWarning")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [plain, transformer])
def test_methods_run_and_give_finite_scores(build: Any, name: str) -> None:
    model = build()
    data, task, settings = pictures(model), task_of(model), METHODS[name]
    if name == "mucs":
        settings = {**settings, "layers": ("*conv*", "*ff.net*")[build is transformer]}
    queries = data.select(torch.tensor([1, 4]))
    if name == "journey_trak":
        queries = fb.diffusers.generated(
            model, (3, 9), condition=conditions(model, 2), sampler=FEW, scheduler=DDPM
        )
    scores = fb.get(name, **settings).fit(task, data).score(queries)
    assert torch.isfinite(scores.values).all()
    assert scores.values.abs().max() > 0


def test_cross_attention_alone_answers_for_a_text_network() -> None:
    model = conditional()
    data, task, layers = pictures(model), task_of(model), fb.diffusers.cross_attention(model)
    untold = torch.zeros(2, TOKENS, WIDTH, dtype=torch.float64)
    asked = concepts(data.batch(slice(0, 2))["condition"], untold)
    trak = fb.ConceptTRAK(
        sampler=Sampler(steps=10, clip=True), draws=9, dimension=None, layers=layers
    )
    found = {
        "abu": fb.AbU(query_draws=16, fisher_draws=1, layers=layers)
        .fit(task, data)
        .score(data.select(torch.tensor([0, 1]))),
        "concept_trak": trak.fit(task, data).score(asked),
    }
    share = sum(model.get_submodule(name).weight.numel() for name in layers)
    for name, scores in found.items():
        assert torch.isfinite(scores.values).all(), name
        assert scores.provenance.coverage == pytest.approx(share / model.num_parameters())


def test_cross_attention_and_attention_are_selectable_by_name() -> None:
    model = conditional()
    crossed = fb.diffusers.cross_attention(model)
    names = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    assert set(crossed) == {n for n in names if n.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(crossed) == 8
    everything = fb.diffusers.attention(model)
    assert set(crossed) < set(everything)
    assert len(everything) == 4 * 8
    assert fb.diffusers.cross_attention(model, ("to_q",))[0].endswith("attn2.to_q")
    with pytest.raises(TaskError, match="no cross-attention"):
        fb.diffusers.cross_attention(plain())
    bare = plain(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )
    with pytest.raises(TaskError, match="no attention"):
        fb.diffusers.attention(bare)
    assert len(fb.diffusers.attention(plain())) > 4


def lora() -> Any:
    peft = pytest.importorskip("peft")
    model = conditional()
    generator = torch.Generator().manual_seed(0)
    adapter = peft.LoraConfig(r=2, target_modules=["to_k", "to_v", "conv1"], lora_dropout=0.3)
    model.add_adapter(adapter)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return model


@pytest.mark.filterwarnings("ignore::forebear.errors.EvaluationModeWarning")
def test_of_a_model_with_adapters_only_these_are_attributed_and_exactly() -> None:
    model = lora()
    data, task = pictures(model), task_of(model)
    assert all("lora" in name for name in task.selected_parameters())
    scores = fb.GradDot().fit(task, data).score(data)
    assert scores.provenance.coverage == 1.0
    rows = gradients(model.eval(), lambda batch: task.losses(model, batch), data)
    torch.testing.assert_close(scores.values, rows @ rows.T, rtol=1e-8, atol=0)
    half = fb.GradDot(layers=fb.diffusers.cross_attention(model)).fit(task, data).score(data)
    assert 0 < half.provenance.coverage < 1


def test_a_model_that_peft_wraps_is_the_same_task() -> None:
    peft = pytest.importorskip("peft")
    model = conditional()
    data = pictures(model)
    before = task_of(model).losses(model, data.batch(slice(None)))
    adapter = peft.LoraConfig(r=2, target_modules=["to_k"])
    wrapped = peft.get_peft_model(model, adapter).eval()
    task = task_of(wrapped)
    torch.testing.assert_close(task.losses(wrapped, data.batch(slice(None))), before)
    assert all("lora" in name for name in task.selected_parameters())


def test_conditions_that_are_missing_or_do_not_fit_are_named() -> None:
    model = conditional()
    task, batch = task_of(model), pictures(model).batch(slice(None))
    untold = {name: batch[name] for name in ("image", "key")}
    with pytest.raises(DataError, match=r"UNet2DConditionModel is told embedded texts.*none"):
        fb.GradDot().fit(task, untold)
    for wrong in (batch["condition"][:, 0], batch["condition"][..., :3]):
        with pytest.raises(DataError, match=r"condition \[n, tokens, 12\]"):
            task.losses(model, {**batch, "condition": wrong})
    dit = transformer()
    one = pictures(dit).batch(slice(None))
    with pytest.raises(DataError, match="is told a class label"):
        task_of(dit).losses(dit, {"image": one["image"], "key": one["key"]})
    free = plain()
    one = pictures(free).batch(slice(None))
    with pytest.raises(DataError, match="no condition"):
        task_of(free).losses(free, {**one, "condition": torch.zeros(6)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not supported"),
        (lambda: conditional(in_channels=9), "takes 9 channels and gives 4"),
        (
            lambda: conditional(
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=16,
            ),
            "addition_embed_type",
        ),
        (lambda: conditional(num_class_embeds=3), "num_class_embeds"),
    ],
)
def test_networks_that_are_told_more_are_refused(build: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fb.diffusers.task(build(), DDPM)


def test_a_network_alone_needs_a_scheduler_and_pipelines_must_agree_with_theirs() -> None:
    with pytest.raises(TaskError, match="pass scheduler="):
        fb.diffusers.task(plain())
    with pytest.raises(TaskError, match="no unet and no transformer"):
        fb.diffusers.task(DDPM)
    pipeline = diffusers.DDPMPipeline(unet=plain(), scheduler=DDPM)
    assert fb.diffusers.task(pipeline).objective.levels == fb.losses.Denoising().levels
    other = diffusers.DDPMScheduler(prediction_type="v_prediction")
    with pytest.raises(TaskError, match="prediction 'epsilon' and scheduler= 'v'"):
        fb.diffusers.task(pipeline, other)
    with pytest.raises(TaskError, match="different noise schedules"):
        fb.diffusers.task(pipeline, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(TaskError, match="gives no variance"):
        fb.diffusers.task(plain(), learned)
    assert fb.diffusers.task(transformer(), learned)


def test_half_precision_is_warned_of_and_its_overflow_is_an_error() -> None:
    model = plain().half()
    with pytest.warns(NumericalWarning, match="float16"):
        task = fb.diffusers.task(model, DDPM, levels=2)
    batch = images(torch.zeros(3, 1, 8, 8))
    assert task.losses(model, batch).dtype == torch.float32
    model.conv_out.weight.data.fill_(60_000)
    with pytest.raises(NonFiniteError, match=r"3 of 3 images: float16 overflows; use float32"):
        task.losses(model, batch)
    with pytest.raises(NonFiniteError, match="float16 overflows"):
        fb.GradDot().fit(task, batch)


def test_a_pipeline_with_latents_has_the_same_task_as_its_network() -> None:
    model = transformer()
    pipeline = diffusers.DiTPipeline(
        transformer=model, vae=encoder(), scheduler=diffusers.DDIMScheduler()
    )
    data = pictures(model)
    alone = task_of(model, levels=4)
    whole = fb.diffusers.task(pipeline, levels=4)
    batch = data.batch(slice(None))
    assert torch.equal(whole.losses(model, batch), alone.losses(model, batch))
