"""diffusers' pipelines of tiny random parts, and the calls that each is checked with."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.kl_toys import kl_config, random_kl
from tests.ltx_configs import ltx_config, random_ltx

# Untyped: toys stand where released parts are declared.
diffusers: Any = importlib.import_module("diffusers")

FRAMES, HEIGHT, WIDTH = 9, 32, 48
_TEXT = 16  # width of the text embeddings


def drawn(vae: nn.Module) -> nn.Module:
    """Norms and biases are drawn too, and few pixels are clamped."""
    vae.eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return vae


def embeddings() -> Tensor:
    return torch.randn(1, 4, _TEXT, generator=torch.Generator().manual_seed(0))


def text_encoder() -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    sizes = {"d_model": _TEXT, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).eval()


def t5_encoder() -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    sizes = {"d_model": _TEXT, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def wan_transformer(in_channels: int = 16, out_channels: int = 16) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=_TEXT,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    ).eval()


def wan_vae() -> nn.Module:
    return drawn(diffusers.AutoencoderKLWan(base_dim=4))


def wan22_vae() -> nn.Module:
    patched = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    return drawn(diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, **patched, **statistics))


def qwen_vae() -> nn.Module:
    return drawn(diffusers.AutoencoderKLQwenImage(base_dim=4))


def sd_vae() -> nn.Module:
    return random_kl(kl_config("stable-diffusion"))


def ltx_vae(version: str) -> nn.Module:
    vae = random_ltx(ltx_config(version, 4, 8))
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.zero_()  # the decoder's own noise, which is drawn anew in every call
    return vae


def wan(vae: Any) -> Any:
    width = vae.config.z_dim
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=text_encoder(),
        vae=vae,
        scheduler=scheduler,
        transformer=wan_transformer(width, width),
    )


def wan_i2v(vae: nn.Module) -> Any:
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=text_encoder(),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=wan_transformer(36),
    )


def wan_v2v(vae: nn.Module) -> Any:
    return diffusers.WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=text_encoder(),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=wan_transformer(),
    )


def stable_diffusion(vae: nn.Module) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ltx(vae: nn.Module) -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=_TEXT,
    )
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=None,
        transformer=transformer.eval(),
    )


def qwen(vae: nn.Module) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_TEXT,
        axes_dims_rope=(8, 4, 4),
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=None,
        transformer=transformer.eval(),
    )


def ltx2(vae: nn.Module) -> Any:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=_TEXT,
        rope_double_precision=False,
    )
    parts: Any = importlib.import_module("diffusers.pipelines.ltx2")
    heads = {f"{kind}_connector_num_attention_heads": 2 for kind in ("video", "audio")}
    heads |= {f"{kind}_connector_attention_head_dim": 8 for kind in ("video", "audio")}
    heads |= {f"{kind}_connector_num_layers": 1 for kind in ("video", "audio")}
    heads |= {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
    connectors = parts.LTX2TextConnectors(
        caption_channels=_TEXT, text_proj_in_factor=1, rope_double_precision=False, **heads
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = parts.LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=audio_vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=transformer.eval(),
        vocoder=vocoder.eval(),
    )


@dataclass(frozen=True)
class Case:
    """A family in a pipeline, with the arguments of its call."""

    vae: Callable[[], nn.Module]
    build: Callable[[nn.Module], Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    def pipeline(self) -> Any:
        torch.manual_seed(0)
        pipe = self.build(self.vae())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def call(self, pipe: Any, output_type: str = "pt") -> Tensor:
        """The frames, or the latents, of one seeded call of two steps."""
        given = {"prompt_embeds": embeddings(), "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipe(**given, **self.arguments, output_type=output_type, return_dict=False)[0]


_VIDEO = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
_WAN = {**_VIDEO, "guidance_scale": 1.0}
_MASKED = {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.long)}
_LTX = {**_VIDEO, "height": 64, "width": 96, "guidance_scale": 1.0, **_MASKED}


def _picture(height: int, width: int) -> Any:
    from PIL import Image

    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 20).convert("RGB")


CASES: dict[str, Case] = {
    "wan2.1": Case(wan_vae, wan, _WAN),
    "wan2.2": Case(wan22_vae, wan, {**_WAN, "width": 64}),
    "wan2.1-i2v": Case(wan_vae, wan_i2v, {**_WAN, "image": _picture(HEIGHT, WIDTH)}),
    "wan2.1-v2v": Case(
        wan_vae,
        wan_v2v,
        {"height": HEIGHT, "width": WIDTH, "guidance_scale": 1.0, "video": [_picture(HEIGHT, WIDTH)] * FRAMES},
    ),
    "ltx-0.9.0": Case(lambda: ltx_vae("0.9.0"), ltx, _LTX),
    "ltx-0.9.1": Case(lambda: ltx_vae("0.9.1"), ltx, {**_LTX, "decode_timestep": 0.03, "decode_noise_scale": 0.025}),
    "ltx-0.9.5": Case(lambda: ltx_vae("0.9.5"), ltx, {**_LTX, "decode_timestep": 0.05, "decode_noise_scale": 0.025}),
    "ltx-2": Case(
        lambda: ltx_vae("2"),
        ltx2,
        {
            **_LTX,
            "height": 128,
            "width": 192,
            "num_frames": 17,
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
        },
    ),
    "stable-diffusion": Case(sd_vae, stable_diffusion, {"height": HEIGHT, "width": WIDTH, "guidance_scale": 1.0}),
    "qwen-image": Case(
        qwen_vae,
        qwen,
        {
            "height": HEIGHT,
            "width": WIDTH,
            "true_cfg_scale": 1.0,
            "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long),
        },
    ),
}
