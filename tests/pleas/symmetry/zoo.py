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
    source: str
    pixels: int = 64
    arguments: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        if self.source == "torchvision":
            from torchvision.models import get_model

            return get_model(self.name, weights=None, **self.arguments).eval()
        import timm

        return timm.create_model(self.name.removeprefix("timm:"), pretrained=False, **self.arguments).eval()

    def example(self) -> Tensor:
        return torch.randn(2, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(1))


TORCHVISION: dict[str, Entry] = {}
TIMM: dict[str, Entry] = {}


def torchvision(names: str, pixels: int = 64, **arguments: Any) -> None:
    """Enter names; `*` in front of a name: quick."""
    for word in names.split():
        name = word.lstrip("*")
        TORCHVISION[name] = Entry(name, "torchvision", pixels, arguments, word.startswith("*"))


def timm_models(names: str, pixels: int = 64, **arguments: Any) -> None:
    """Enter names, which get the prefix `timm:`."""
    for word in names.split():
        name = "timm:" + word.lstrip("*")
        TIMM[name] = Entry(name, "timm", pixels, arguments, word.startswith("*"))


torchvision("""
    *alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
    *resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2
    resnext50_32x4d resnext101_32x8d resnext101_64x4d squeezenet1_0 *squeezenet1_1
    densenet121 densenet161 densenet169 densenet201
    mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
    *shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
    efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l
    regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf
    regnet_y_128gf regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf
    regnet_x_16gf regnet_x_32gf convnext_tiny convnext_small convnext_base convnext_large
    swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b
""")
torchvision("*googlenet inception_v3", 96, init_weights=False)
torchvision("vit_b_16 vit_b_32 vit_l_16 vit_l_32", image_size=64)
torchvision("vit_h_14", 56, image_size=56)
torchvision("maxvit_t", 224)

# Residual networks and their kin.
timm_models("resnet10t *test_resnet")
timm_models("resnet18d resnet26t resnet50_gn resnetaa50d *resnetblur50 seresnet50", layers=(1, 1, 1, 1))
timm_models(
    "*seresnext26d_32x4d *ecaresnet26t ecaresnext26t_32x4d resnetrs50 wide_resnet50_2", layers=(1, 1, 1, 1)
)
timm_models("*res2net50_14w_8s res2next50 resnest14d resnest50d_4s2x40d skresnet18", layers=(1, 1, 1, 1))
timm_models("skresnext50_32x4d resnetv2_18 *resnetv2_50d_gn resnetv2_50d_frn", layers=(1, 1, 1, 1))
timm_models("resnetv2_50d_evos", layers=(1, 1, 1, 1))
timm_models("resnetv2_50x1_bit")
timm_models("*densenet121", block_config=(2, 2, 2, 2))
timm_models("bat_resnext26ts", 256)
timm_models("inception_resnet_v2 inception_v3 inception_v4 nasnetalarge pnasnet5large", 96)
timm_models("""
    legacy_seresnet18 legacy_seresnext26_32x4d densenetblur121d vgg11 vgg11_bn
    *dla34 dla46x_c dla60_res2net dpn48b dpn68b hrnet_w18_small selecsls42 cspresnet50 cspresnext50
    cspdarknet53 darknet17 cs3darknet_s cs3sedarknet_xdw cspnext_tiny vovnet39a ese_vovnet19b_dw eca_vovnet39b
    legacy_xception xception41 tresnet_m tresnet_v2_l convmixer_768_32 hgnet_tiny hgnetv2_b0
    repvgg_a0 repvgg_b1g4 repvgg_d2se mobileone_s0 gernet_s resnet32ts gcresnet33ts eca_resnet33ts
    resnet50_clip resnet50_mlp rdnet_tiny starnet_s050 lcnetv2_small regnetz_b16 regnetz_b16_evos test_byobnet
""")
# Normaliser-free.
timm_models(
    "*test_nfnet nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 nf_resnet26 nf_regnet_b0 nf_seresnet26 nf_ecaresnet26"
)
# Regnets and mobile networks.
timm_models("""
    *regnetx_002 regnety_002 regnetv_040 regnetz_005 regnetz_040_h *test_efficientnet
    mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_conv_aa_medium
    mobilenetv4_hybrid_medium_075 mobilenetv5_base lcnet_035 fbnetv3_b fbnetc_100 spnasnet_100 mnasnet_small
    semnasnet_075 hardcorenas_a efficientnet_b0 efficientnet_b0_g8_gn efficientnet_b0_g16_evos efficientnet_blur_b0
    efficientnet_es efficientnet_lite0 efficientnetv2_rw_t tf_efficientnetv2_b0 efficientnet_cc_b0_4e mixnet_s
    tinynet_e rexnet_100 rexnetr_100 ghostnet_050 ghostnetv2_100 ghostnetv3_050 repghostnet_050 repvit_m0_9
    fasternet_t0
""")
# Convolutional, with layer norm; token mixers without attention.
timm_models("""
    test_convnext test_convnext2 *test_convnext3 convnext_atto convnext_atto_ols convnextv2_atto convnext_atto_rms
    focalnet_tiny_srf poolformer_s12 poolformerv2_s12 *convformer_s18 caformer_s18 test_mambaout
""")
timm_models("inception_next_atto mambaout_femto", depths=(1, 1, 1, 1))
timm_models("*mixer_s32_224 gmixer_12_224 *gmlp_ti16_224 *resmlp_12_224", img_size=64)
timm_models("sequencer2d_s", img_size=64, layers=(1, 1, 1, 1))
timm_models("efficientvim_m1", depths=(1, 1, 1))
# Attention over the whole image.
timm_models("test_vit test_vit2 test_vit4")
timm_models("test_vit3", 160)
timm_models(
    """
    *vit_tiny_patch16_224 vit_medium_patch16_gap_240 vit_small_patch16_18x2_224 vit_base_patch16_siglip_224
    vit_base_patch16_clip_224 flexivit_small vit_wee_patch16_reg1_gap_256 vit_relpos_small_patch16_224
    vit_srelpos_small_patch16_224 deit_tiny_patch16_224 *deit_tiny_distilled_patch16_224 deit3_small_patch16_224
    eva02_base_patch16_clip_224 vit_base_patch16_dinov3 vit_base_patch16_rope_224 vit_base_patch16_rope_mixed_224
    vit_base_patch16_rope_reg1_gap_256 *cait_xxs24_224 *xcit_nano_12_p16_224 tnt_s_patch16_224
    vit_tiny_r_s16_p8_224 vit_small_resnet26d_224
    """,
    img_size=64,
    depth=2,
)
timm_models("vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2", 56, img_size=56, depth=2)
timm_models("eva02_tiny_patch14_224 eva02_small_patch14_224", 56, img_size=56, depth=2, num_classes=10)
timm_models("*beit_base_patch16_224 beitv2_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4)
timm_models("aimv2_large_patch14_224", 56, img_size=56, depth=2, embed_dim=64, num_heads=4)
timm_models("naflexvit_base_patch16_gap", depth=2, embed_dim=64, num_heads=4)
timm_models("samvit_base_patch16_224", 224, depth=2, embed_dim=64, num_heads=4, global_attn_indexes=(1,))
timm_models("convit_tiny", img_size=64, depth=4, local_up_to_layer=2)
timm_models("crossvit_9_240 crossvit_9_dagger_240")
timm_models(
    "pit_ti_224 *pit_ti_distilled_224 volo_d1_224 coat_lite_tiny coat_tiny *visformer_tiny", img_size=64
)
# Windows and hierarchies.
timm_models("swin_tiny_patch4_window7_224 swin_s3_tiny_224", img_size=64, depths=(2, 1, 1, 1))
timm_models("swinv2_tiny_window8_256 *swinv2_cr_tiny_ns_224", img_size=64, depths=(2, 1, 1, 1))
timm_models("*twins_pcpvt_small twins_svt_small", img_size=64, depths=(1, 1, 2, 1))
timm_models("nest_tiny gcvit_xxtiny hiera_tiny_224 mvitv2_tiny mvitv2_small_cls", img_size=64)
timm_models("pvt_v2_b0 pvt_v2_b2_li davit_tiny tiny_vit_5m_224", depths=(1, 1, 1, 1))
timm_models("maxvit_nano_rw_256 maxvit_rmlp_pico_rw_256", 256)
timm_models("coatnet_nano_rw_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224 coatnet_nano_cc_224", 224)
timm_models("maxvit_tiny_tf_224 vitamin_small_224", 224)
timm_models("sam2_hiera_tiny")
# Light attention, and attention over neighbourhoods.
timm_models("levit_128s levit_conv_128s efficientvit_m0", img_size=64)
timm_models("*efficientformer_l1", 224, depths=(1, 1, 2, 1))
timm_models("efficientformerv2_s0", img_size=64, depths=(1, 1, 2, 1))
timm_models("*edgenext_xx_small efficientvit_b0", depths=(1, 1, 1, 1))
timm_models("fastvit_t8 fastvit_sa12 swiftformer_xs", layers=(1, 1, 1, 1))
timm_models("mobilevit_xxs mobilevitv2_050 shvit_s1 nextvit_small iformer_t lowformer_b0 cpubone_nano csatv2")
timm_models(
    "botnet26t_256 halonet26t lambda_resnet26t lambda_resnet26rpt_256 eca_halonext26ts sebotnet33ts_256", 256
)

ZOO: dict[str, Entry] = TORCHVISION | TIMM

# Where less than 0.99 of the parameter elements stand on a permutable axis: name -> a lower bound. Efficient channel
# attention convolves over neighbouring channels, whose order is part of the network.
SHARES: dict[str, float] = {
    "timm:ecaresnet26t": 0.72,
    "timm:ecaresnext26t_32x4d": 0.70,
    "timm:eca_vovnet39b": 0.86,
    "timm:eca_nfnet_l0": 0.86,
    "timm:nf_ecaresnet26": 0.82,
    "timm:coat_tiny": 0.96,
}
# Ops without a rule, which keep what they read in place.
UNLISTED: dict[str, set[str]] = {"timm:volo_d1_224": {"index_put"}}
# What is refused, and the reason that is given.
REFUSED: dict[str, str] = {
    "timm:efficientnet_cc_b0_4e": "has as many groups as the batch has images",
}
