"""Wrappers, computed weights and hooks: what stands between a network and its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from pleas.errors import UnsupportedModel
from pleas.symmetry import execute, export_program, plain, state_of, trace, unwrap
from tests.cases import CASES, conv_bn, pooled_head, randomise

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small(seed: int = 0) -> nn.Sequential:
    return CASES["residual"].model(seed)  # type: ignore[return-value]


WRAPPED: dict[str, Any] = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_seen_through(kind: str) -> None:
    model = small()
    wrapped: Any = WRAPPED[kind](model)
    symmetry = trace(wrapped, IMAGES)
    assert symmetry.program.parameters == trace(model, IMAGES).program.parameters
    outer = type(wrapped).__name__
    assert symmetry.program.notes[0] == f"{outer} is a wrapper: the Sequential inside is merged."
    found = execute(symmetry.program.graph, [state_of(symmetry.program, wrapped)], [IMAGES])[0]
    torch.testing.assert_close(found, unwrap(wrapped)(IMAGES), rtol=1e-4, atol=1e-5)


class Inside(nn.Module):
    """Wrappers of parts, as torchvision's ImageNet example makes them for VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.DataParallel(conv_bn(3, 6))
        self.middle, self.head = torch.compile(conv_bn(6, 6)), pooled_head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.features(x)))


def test_wrappers_inside_keep_their_names() -> None:
    model = Inside()
    symmetry = trace(model, IMAGES)
    assert symmetry.program.parameters[0] == "features.module.0.weight"
    assert symmetry.program.parameters[3] == "middle._orig_mod.0.weight"
    assert isinstance(model.features, nn.DataParallel)


def normalised(kind: str, seed: int = 0) -> nn.Module:
    """A network in train mode whose first and last weights are computed."""
    model = randomise(
        nn.Sequential(conv_bn(3, 6), conv_bn(6, 8), pooled_head(8)), torch.Generator().manual_seed(seed)
    )
    wrap = {
        "spectral": spectral_norm,
        "spectral, new": parametrizations.spectral_norm,
        "weight": weight_norm,
        "weight, new": parametrizations.weight_norm,
        "orthogonal": parametrizations.orthogonal,
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    }[kind]
    for layer in (model[1][0], model[2][2]):  # type: ignore[index]
        wrap(layer)
    model(IMAGES)  # one step of the power iteration; leaves a weight that hangs on a gradient
    return model


KINDS = ("spectral", "spectral, new", "weight", "weight, new", "orthogonal", "pruned")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_plain_is_the_same_function_with_plain_weights(kind: str) -> None:
    model = normalised(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = plain(model)
    assert folded.training
    assert set(folded.state_dict()) == set(
        nn.Sequential(conv_bn(3, 6), conv_bn(6, 8), pooled_head(8)).state_dict()
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(folded.eval()(IMAGES), model.eval()(IMAGES))
    assert trace(folded, IMAGES).permutable_share() == 1.0
    assert plain(folded) is folded


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["weight", "weight, new"])
def test_weight_norm_is_traced_after_a_call_that_kept_its_gradient(kind: str) -> None:
    assert trace(normalised(kind), IMAGES).gate_error < 1e-9


@pytest.mark.parametrize("kind", ["spectral", "spectral, new"])
def test_spectral_norm_is_refused_with_the_remedy(kind: str) -> None:
    message = (
        r"the weight of 1.0 by buffers that belong to it alone \(spectral_norm\): .*symmetry.plain\(model\)"
    )
    with pytest.raises(UnsupportedModel, match=message):
        trace(normalised(kind), IMAGES)


def with_hook(kind: str) -> tuple[nn.Module, list]:
    model, kept = small(), []
    first: Any = model[0]
    first.register_forward_hook(
        {
            "list": lambda module, images, output: kept.append(output),
            "numpy": lambda module, images, output: kept.append(output.detach().numpy()),
            "module": lambda module, images, output: setattr(module, "feature", output),
        }[kind]
    )
    return model, kept


@pytest.mark.parametrize("kind", ["list", "numpy", "module"])
def test_hooks_that_store_features_are_left_out_and_see_nothing(kind: str) -> None:
    model, kept = with_hook(kind)
    model(IMAGES)
    stored, feature = len(kept), getattr(model[0], "feature", None)  # type: ignore[index]
    symmetry = trace(model, IMAGES)
    assert symmetry.program.notes == ("The forward hook of 0 only watches: it is left out.",)
    assert symmetry.permutable_share() == trace(small(), IMAGES).permutable_share()
    assert len(kept) == stored
    assert getattr(model[0], "feature", None) is feature  # type: ignore[index]
    assert len(model[0]._forward_hooks) == 1  # type: ignore[index]


def doubles(module: nn.Module, images: Any, output: Tensor) -> Tensor:
    return 2 * output


def doubles_in_place(module: nn.Module, images: Any, output: Tensor) -> None:
    output.mul_(2)


@pytest.mark.parametrize("hook", [doubles, doubles_in_place])
def test_hooks_that_act_are_part_of_the_forward(hook: Any) -> None:
    model = small()
    model[0].register_forward_hook(hook)
    program = export_program(model, IMAGES)
    assert not program.notes
    found = execute(program.graph, [state_of(program, small())], [IMAGES])[0]
    torch.testing.assert_close(found, model(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_stored_feature_is_no_obstacle() -> None:
    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.seen = conv_bn(3, 6), pooled_head(6), []

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.body(x)
            self.seen.append({"x": self.features})
            return self.head(self.features)

    model = Stores()
    model(IMAGES)
    assert trace(model, IMAGES).gate_error < 1e-9
    assert len(model.seen) == 1


def test_what_cannot_be_copied_is_said() -> None:
    model = small()
    model.log = open("/dev/null")  # type: ignore[assignment]  # noqa: SIM115, PTH123
    message = r"Sequential cannot be copied, .*: TypeError: cannot pickle .* Keep what cannot be copied \(open files"
    with pytest.raises(UnsupportedModel, match=message):
        trace(model, IMAGES)
    model.log.close()  # type: ignore[union-attr, operator]
