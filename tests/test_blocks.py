import pytest
import torch
from cases import CASES, Case
from torch import nn

from forebear.blocks import candidate_blocks
from forebear.task import Task
from forebear.tasks import losses


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_split_and_joined_is_itself(case: Case) -> None:
    task = Task(case.model(), case.loss)
    blocks, _, _ = candidate_blocks(task)
    values = {name: torch.randn_like(p) for name, p in task.selected_parameters().items()}
    for block in blocks.values():
        matrix = block.matrix(values)
        assert matrix.shape == (block.rows, block.cols)
        parts = block.split(matrix)
        assert parts.keys() == set(block.parameters)
        assert all(torch.equal(parts[name], values[name]) for name in block.parameters)
        other = torch.randn(block.rows, block.cols)
        assert torch.equal(block.matrix(block.split(other)), other)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_is_in_one_block_or_left_without_a_rule(case: Case) -> None:
    task = Task(case.model(), case.loss)
    blocks, _, without = candidate_blocks(task)
    inside = [name for block in blocks.values() for name in block.parameters]
    assert sorted(inside + without) == sorted(task.selected_parameters())


def test_a_bias_is_the_last_column_of_its_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    blocks, _, _ = candidate_blocks(Task(model, losses.cross_entropy))
    values = {name: p.detach() for name, p in model.named_parameters()}
    joined = blocks["0"].matrix(values)
    assert torch.equal(joined, torch.cat([values["0.weight"], values["0.bias"][:, None]], 1))
    assert torch.equal(
        blocks["1"].matrix(values)[:, 0], torch.cat([values["1.weight"], values["1.bias"]])
    )


def test_only_selected_layers_have_blocks() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    blocks, uses, _ = candidate_blocks(Task(model, losses.cross_entropy, layers=["1", "2"]))
    assert list(blocks) == ["1", "2"]
    assert {use.module for use in uses} == {"1", "2"}


def test_tied_layers_share_a_block_named_after_the_parameter() -> None:
    case = next(case for case in CASES if case.name == "tied with own biases")
    blocks, uses, _ = candidate_blocks(Task(case.model(), case.loss))
    assert list(blocks) == ["one.weight", "one.bias", "two.bias", "head"]
    assert [use.module for use in uses if use.block == "one.weight"] == ["one", "two"]
