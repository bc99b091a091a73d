"""The zoo: for every architecture all units permuted at once leave the outputs unchanged, and no op lacks a rule."""

from __future__ import annotations

import pytest
import timm
from torchvision import models

from pleas.errors import UnsupportedModel
from pleas.symmetry import trace
from tests.pleas.symmetry.zoo import REFUSED, SHARES, TIMM, TORCHVISION, UNLISTED, ZOO

FAMILIES = """
    resnet resnetv2 resnetblur regnet res2net ecaresnet seresnext densenet vgg inception mobilenetv1 mobilenetv2
    mobilenetv3 mobilenetv4 efficientnet efficientnetv2 mnasnet ghostnet hardcorenas convnext convnextv2 vit deit beit
    eva swin swinv2 cait xcit mixer resmlp gmlp pit levit mobilevit efficientformer edgenext poolformer convformer
    caformer coatnet maxvit davit twins hrnet dla dpn nfnet rexnet tresnet visformer
"""


# One small member of each is in every test run; the others are slow together, and run by `make test-all`.
KINDS = """
    alexnet resnet resnetv2 resnetblur ecaresnet seresnext res2net densenet dla squeezenet googlenet shufflenet regnet
    efficientnet nfnet convnext convformer mixer gmlp resmlp vit deit cait xcit beit pit visformer swin twins
    efficientformer edgenext
"""


def test_the_zoo_has_every_torchvision_builder_and_every_main_family() -> None:
    assert set(TORCHVISION) == set(models.list_models(module=models))
    assert len(TIMM) >= 120
    assert set(TIMM) <= {f"timm:{name}" for name in timm.list_models()}
    names = [name.removeprefix("timm:") for name in TIMM]
    missing = [family for family in FAMILIES.split() if not any(family in name for name in names)]
    assert missing == []


def test_every_kind_of_structure_is_in_every_test_run() -> None:
    quick = [name for name, entry in ZOO.items() if entry.quick]
    assert [kind for kind in KINDS.split() if not any(kind in name for name in quick)] == []
    assert len(quick) <= 40


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if entry.quick else pytest.mark.slow) for name, entry in ZOO.items()],
)
def test_permuting_all_units_changes_nothing(name: str) -> None:
    model, example = ZOO[name].build(), ZOO[name].example()
    if name in REFUSED:
        with pytest.raises(UnsupportedModel, match=REFUSED[name]):
            trace(model, example)
        return
    symmetry = trace(model, example)
    assert symmetry.gate_error < 1e-9
    assert {op.op for op in symmetry.unlisted} == UNLISTED.get(name, set())
    assert symmetry.permutable_share() > SHARES.get(name, 0.99)
    assert len(symmetry.output) > 0
