"""Where the images stand, against a batch built from images by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from pleas.symmetry import export_program
from pleas.symmetry.batch import USUAL, BatchPlace, batch_places, images_first
from pleas.symmetry.program import execute, state_of
from tests.cases import CASES

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """torch's own transformer, tokens first unless told otherwise."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 8, 2, 2), batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2)
        tokens = self.body(tokens.transpose(1, 2) if self.first else tokens.permute(2, 0, 1))
        return self.head(tokens.mean(1 if self.first else 0))


class Windows(nn.Module):
    """Four windows of every image, in the batch dimension (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.conv(x).reshape(n, 6, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(n * 4, 16, 6)
        return self.head(torch.relu(self.mix(x)).reshape(n, 64, 6).mean(1))


def linear_inputs(model: nn.Module) -> list[tuple[str, BatchPlace]]:
    program = export_program(model, IMAGES)
    places = batch_places(program, model, IMAGES)
    linear = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    return [(str(node.args[1].target), places[node.args[0].name]) for node in linear]


def test_tokens_first() -> None:
    assert dict(linear_inputs(Encoder())) == {
        "body.layers.0.self_attn.in_proj_weight": BatchPlace(1),
        "body.layers.0.self_attn.out_proj.weight": BatchPlace(0, 16, 1),
        "body.layers.0.linear1.weight": BatchPlace(1),
        "body.layers.0.linear2.weight": BatchPlace(1),
        "head.weight": USUAL,
    }


def test_images_first_needs_no_trial() -> None:
    places = dict(linear_inputs(Windows()))
    assert places == {"mix.weight": BatchPlace(0, 1, 4), "head.weight": USUAL}
    assert places["mix.weight"].is_usual
    case = CASES["residual"]
    program = export_program(case.model(), case.example())
    assert set(batch_places(program, case.model(), case.example()).values()) == {USUAL}


@pytest.mark.parametrize("build", [Encoder, Windows, lambda: Encoder(batch_first=True)])
def test_images_first_gives_what_one_image_gives(build: type[nn.Module]) -> None:
    """Every value of a batch, brought to images first, is the values of its images run alone."""
    model = build().eval()
    program = export_program(model, IMAGES)
    places = batch_places(program, model, IMAGES)

    def values(images: Tensor) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def visit(node: fx.Node, args: list[tuple], kwargs: list[dict]) -> None:
            if node.target is torch.ops.aten.linear.default:
                kept[node.name] = images_first(args[0][0], places[node.args[0].name])  # type: ignore[union-attr]

        with torch.no_grad():
            execute(program.graph, [state_of(program, model)], [images], visit)
        return kept

    together, alone = values(IMAGES), [values(IMAGES[i : i + 1]) for i in range(4)]
    assert together
    for name, value in together.items():
        assert len(value) == 4
        torch.testing.assert_close(value, torch.cat([kept[name] for kept in alone]), rtol=1e-4, atol=1e-5)


def test_a_batch_size_that_is_fixed_is_found_by_the_trial() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.mix(x.flatten(2).permute(2, 0, 1).reshape(64 * 4, 3)))
            return self.head(x.reshape(64, 4, 5).mean(0))

    assert dict(linear_inputs(Fixed())) == {"mix.weight": BatchPlace(0, 64, 1), "head.weight": USUAL}
