"""The architectures on which the symmetry stage is held to account.

Every torchvision classification builder, and at least one timm model of every main family, at the smallest size that
keeps its structure: few blocks of each kind where the constructor allows it, small images where the network does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """One architecture; `quick` ones run in every test run, the others are marked slow."""

    name: str
    pixels: int = 64
    arguments: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def source(self) -> str:
        return "torchvision" if self.name in TORCHVISION else "timm"

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        if self.source == "torchvision":
            from torchvision.models import get_model

            return get_model(self.name, weights=None, **self.arguments).eval()
        import timm

        return timm.create_model(self.name.removeprefix("timm:"), pretrained=False, **self.arguments).eval()

    def example(self) -> Tensor:
        return torch.randn(2, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(1))


def _entries(names: str, pixels: int = 64, **arguments: Any) -> list[Entry]:
    """`*` in front of a name: quick; `name@pixels`: another image size."""
    found = []
    for word in names.split():
        name, _, size = word.lstrip("*").partition("@")
        found.append(Entry(name, int(size or pixels), arguments, word.startswith("*")))
    return found


_TORCHVISION = [
    *_entries("alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn"),
    *_entries("*resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2"),
    *_entries("resnext50_32x4d resnext101_32x8d resnext101_64x4d *squeezenet1_0 *squeezenet1_1"),
    *_entries("densenet121 densenet161 densenet169 densenet201"),
    *_entries("googlenet inception_v3", 96, init_weights=False),
    *_entries(
        "*mobilenet_v2 *mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3"
    ),
    *_entries("*shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0"),
    *_entries(
        "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5"
    ),
    *_entries("efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l"),
    *_entries(
        "*regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf"
    ),
    *_entries("regnet_y_128gf *regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf"),
    *_entries("regnet_x_16gf regnet_x_32gf *convnext_tiny convnext_small convnext_base convnext_large"),
    *_entries("vit_b_16 vit_b_32 vit_l_16 vit_l_32", 64, image_size=64),
    *_entries("vit_h_14", 56, image_size=56),
    *_entries("swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b maxvit_t@224", 64),
]
TORCHVISION: dict[str, Entry] = {entry.name: entry for entry in _TORCHVISION}

_SHALLOW: dict[str, Any] = {"layers": (1, 1, 1, 1)}
_ATTENTION: dict[str, Any] = {"depth": 2}
_TIMM = [
    # residual networks and their kin
    *_entries("*timm:resnet10t timm:test_resnet"),
    *_entries(
        "timm:resnet18d timm:resnet26t timm:resnet50_gn timm:resnetaa50d timm:resnetblur50", **_SHALLOW
    ),
    *_entries(
        "timm:seresnet50 timm:seresnext26d_32x4d timm:ecaresnet26t timm:ecaresnext26t_32x4d", **_SHALLOW
    ),
    *_entries("timm:resnetrs50 timm:wide_resnet50_2 timm:res2net50_14w_8s timm:res2next50", **_SHALLOW),
    *_entries(
        "*timm:resnetv2_18 timm:resnetv2_50d_gn timm:resnetv2_50d_frn timm:resnetv2_50d_evos", **_SHALLOW
    ),
    *_entries("timm:resnetv2_50x1_bit *timm:resnest14d timm:resnest50d_4s2x40d timm:skresnet18", **_SHALLOW),
    *_entries("timm:skresnext50_32x4d", **_SHALLOW),
    *_entries("timm:legacy_seresnet18 timm:legacy_seresnext26_32x4d"),
    *_entries("timm:inception_resnet_v2@96 timm:inception_v3@96 timm:inception_v4@96"),
    *_entries(
        "timm:densenet121 timm:densenetblur121d timm:vgg11 timm:vgg11_bn timm:dla34 timm:dla46x_c timm:dla60_res2net"
    ),
    *_entries(
        "*timm:dpn48b timm:dpn68b timm:hrnet_w18_small timm:selecsls42 timm:cspresnet50 timm:cspresnext50"
    ),
    *_entries("timm:cspdarknet53 timm:darknet17 timm:cs3darknet_s timm:cs3sedarknet_xdw timm:cspnext_tiny"),
    *_entries(
        "timm:vovnet39a *timm:ese_vovnet19b_dw timm:eca_vovnet39b timm:legacy_xception timm:xception41"
    ),
    *_entries(
        "timm:tresnet_m timm:tresnet_v2_l timm:nasnetalarge@96 timm:pnasnet5large@96 timm:convmixer_768_32"
    ),
    *_entries(
        "timm:hgnet_tiny timm:hgnetv2_b0 timm:repvgg_a0 timm:repvgg_b1g4 timm:repvgg_d2se *timm:mobileone_s0"
    ),
    *_entries(
        "timm:gernet_s timm:resnet32ts timm:gcresnet33ts timm:bat_resnext26ts timm:eca_resnet33ts timm:resnet50_clip"
    ),
    *_entries(
        "timm:resnet50_mlp timm:rdnet_tiny timm:starnet_s050 timm:lcnetv2_small timm:regnetz_b16 timm:regnetz_b16_evos"
    ),
    # normaliser-free
    *_entries(
        "*timm:test_nfnet timm:nfnet_l0 timm:eca_nfnet_l0 timm:dm_nfnet_f0 timm:nf_resnet26 timm:nf_regnet_b0"
    ),
    *_entries("timm:nf_seresnet26 timm:nf_ecaresnet26"),
    # regnets and mobile networks
    *_entries("*timm:regnetx_002 timm:regnety_002 timm:regnetv_040 timm:regnetz_005 timm:regnetz_040_h"),
    *_entries(
        "timm:mobilenetv1_100 *timm:mobilenetv2_035 timm:mobilenetv3_small_050 *timm:mobilenetv4_conv_small_035"
    ),
    *_entries(
        "timm:mobilenetv4_conv_aa_medium timm:mobilenetv4_hybrid_medium_075 timm:mobilenetv5_base timm:lcnet_035"
    ),
    *_entries(
        "timm:fbnetv3_b timm:fbnetc_100 timm:spnasnet_100 timm:mnasnet_small timm:semnasnet_075 timm:hardcorenas_a"
    ),
    *_entries(
        "timm:efficientnet_b0 timm:efficientnet_b0_g8_gn timm:efficientnet_b0_g16_evos timm:efficientnet_blur_b0"
    ),
    *_entries(
        "timm:efficientnet_es timm:efficientnet_lite0 timm:efficientnetv2_rw_t timm:tf_efficientnetv2_b0"
    ),
    *_entries(
        "timm:efficientnet_cc_b0_4e timm:mixnet_s timm:tinynet_e timm:rexnet_100 timm:rexnetr_100 timm:ghostnet_050"
    ),
    *_entries(
        "timm:ghostnetv2_100 timm:ghostnetv3_050 timm:repghostnet_050 timm:repvit_m0_9 timm:fasternet_t0"
    ),
    # convolutional with layer norm
    *_entries(
        "*timm:test_convnext timm:test_convnext2 timm:test_convnext3 timm:convnext_atto timm:convnext_atto_ols"
    ),
    *_entries(
        "*timm:convnextv2_atto timm:convnext_atto_rms timm:inception_next_atto timm:mambaout_femto *timm:test_mambaout"
    ),
    *_entries(
        "timm:focalnet_tiny_srf timm:poolformer_s12 timm:poolformerv2_s12 timm:convformer_s18 timm:caformer_s18"
    ),
    # attention over the whole image
    *_entries(
        "*timm:test_vit *timm:test_vit2 timm:test_vit3 timm:test_vit4 timm:test_efficientnet timm:test_byobnet"
    ),
    *_entries("timm:vit_tiny_patch16_224 timm:vit_medium_patch16_gap_240", 64, img_size=64, **_ATTENTION),
    *_entries(
        "timm:vit_small_patch16_18x2_224 timm:vit_base_patch16_siglip_224", 64, img_size=64, **_ATTENTION
    ),
    *_entries(
        "timm:vit_small_patch14_dinov2 timm:vit_small_patch14_reg4_dinov2", 56, img_size=56, **_ATTENTION
    ),
    *_entries(
        "timm:vit_base_patch16_clip_224 timm:flexivit_small timm:vit_wee_patch16_reg1_gap_256",
        64,
        img_size=64,
        **_ATTENTION,
    ),
    *_entries(
        "timm:vit_relpos_small_patch16_224 timm:vit_srelpos_small_patch16_224", 64, img_size=64, **_ATTENTION
    ),
    *_entries(
        "timm:deit_tiny_patch16_224 timm:deit_tiny_distilled_patch16_224 timm:deit3_small_patch16_224",
        64,
        img_size=64,
        **_ATTENTION,
    ),
    *_entries(
        "*timm:beit_base_patch16_224 timm:beitv2_base_patch16_224",
        64,
        img_size=64,
        embed_dim=48,
        num_heads=4,
        **_ATTENTION,
    ),
    *_entries("*timm:eva02_tiny_patch14_224 timm:eva02_small_patch14_224", 56, img_size=56, **_ATTENTION),
    *_entries(
        "timm:eva02_base_patch16_clip_224 timm:vit_base_patch16_dinov3 timm:vit_base_patch16_rope_224",
        64,
        img_size=64,
        **_ATTENTION,
    ),
    *_entries(
        "timm:vit_base_patch16_rope_mixed_224 timm:vit_base_patch16_rope_reg1_gap_256",
        64,
        img_size=64,
        **_ATTENTION,
    ),
    *_entries("timm:aimv2_large_patch14_224", 56, img_size=56, embed_dim=64, num_heads=4, **_ATTENTION),
    *_entries("timm:cait_xxs24_224", 64, img_size=64, depth=2),
    *_entries("*timm:xcit_nano_12_p16_224", 64, img_size=64, depth=2),
    *_entries("timm:tnt_s_patch16_224", 64, img_size=64, depth=2),
    *_entries("timm:convit_tiny", 64, img_size=64, depth=4, local_up_to_layer=2),
    *_entries(
        "timm:crossvit_9_240@240 timm:crossvit_9_dagger_240@240 timm:pit_ti_224@224 timm:pit_ti_distilled_224@224"
    ),
    *_entries("timm:vit_tiny_r_s16_p8_224", 64, img_size=64, depth=2),
    *_entries("timm:vit_small_resnet26d_224", 64, img_size=64, depth=2),
    *_entries("timm:volo_d1_224@224 timm:coat_lite_tiny@224 timm:coat_tiny@224 timm:visformer_tiny@224"),
    *_entries("timm:naflexvit_base_patch16_gap", 64, depth=2, embed_dim=64, num_heads=4),
    *_entries(
        "timm:samvit_base_patch16_224@224", 224, depth=2, embed_dim=64, num_heads=4, global_attn_indexes=(1,)
    ),
    # windows and hierarchies
    *_entries(
        "timm:swin_tiny_patch4_window7_224@224 timm:swinv2_tiny_window8_256@256 timm:swinv2_cr_tiny_ns_224@224"
    ),
    *_entries(
        "timm:swin_s3_tiny_224@224 timm:twins_pcpvt_small@224 timm:twins_svt_small@224 timm:nest_tiny@224"
    ),
    *_entries(
        "timm:pvt_v2_b0@64 timm:pvt_v2_b2_li@64 timm:davit_tiny@64 timm:gcvit_xxtiny@224 timm:hiera_tiny_224@224"
    ),
    *_entries(
        "timm:mvitv2_tiny@224 timm:mvitv2_small_cls@224 timm:maxvit_nano_rw_256@256 timm:maxvit_rmlp_pico_rw_256@256"
    ),
    *_entries("timm:coatnet_nano_rw_224@224 timm:coatnet_rmlp_nano_rw_224@224 timm:coatnext_nano_rw_224@224"),
    *_entries("timm:coatnet_nano_cc_224@224 timm:maxvit_tiny_tf_224@224 timm:sam2_hiera_tiny@224"),
    # light attention
    *_entries(
        "timm:levit_128s@224 timm:levit_conv_128s@224 timm:efficientformer_l1@224 timm:efficientformerv2_s0@224"
    ),
    *_entries("timm:tiny_vit_5m_224@224 timm:mobilevit_xxs *timm:mobilevitv2_050 timm:edgenext_xx_small"),
    *_entries(
        "timm:fastvit_t8 timm:fastvit_sa12 timm:efficientvit_b0 timm:efficientvit_m0@224 timm:shvit_s1"
    ),
    *_entries(
        "timm:swiftformer_xs timm:nextvit_small timm:iformer_t@224 timm:lowformer_b0 timm:cpubone_nano"
    ),
    *_entries("timm:efficientvim_m1@224 timm:vitamin_small_224@224 timm:csatv2@512"),
    *_entries(
        "timm:botnet26t_256@256 timm:halonet26t@256 timm:lambda_resnet26t@256 timm:lambda_resnet26rpt_256@256"
    ),
    *_entries("timm:eca_halonext26ts@256 timm:sebotnet33ts_256@256"),
    # mixers
    *_entries(
        "timm:mixer_s32_224 timm:gmixer_12_224 timm:gmlp_ti16_224 timm:resmlp_12_224",
        64,
        img_size=64,
        num_blocks=2,
    ),
    *_entries("timm:sequencer2d_s@224"),
]
TIMM: dict[str, Entry] = {entry.name: entry for entry in _TIMM}
ZOO: dict[str, Entry] = TORCHVISION | TIMM
