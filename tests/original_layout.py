"""A small model under the names of Stable Diffusion's first release, as single files have them."""

import re


def original_layout(pipe):
    """The weights of `tiny_sd` under the names that Stable Diffusion's first release gave them."""
    unet = {f"model.diffusion_model.{_unet_name(name)}": value for name, value in pipe.unet.state_dict().items()}
    vae = {f"first_stage_model.{_vae_name(name)}": value for name, value in pipe.vae.state_dict().items()}
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in pipe.text_encoder.state_dict().items()
    }
    return {name: value.contiguous() for name, value in {**unet, **vae, **text}.items()}


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = {
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def _unet_name(name):
    """For one layer a block: input block 2b+1 is the layer of block b and 2b+2 its down-sampling."""
    for new, old in _UNET_ENDS.items():
        name = re.sub(rf"^{new}\b", old, name)
    name = re.sub(r"(?<=resnets\.\d\.)\w+", lambda found: _UNET_RESNET[found[0]], name)

    def place(found):
        side, block, kind, layer = found[1], int(found[2] or 0), found[3], int(found[4])
        is_attention = int(kind == "attentions")
        if side == "mid_block":
            return f"middle_block.{1 if is_attention else 2 * layer}"
        if kind == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0"
        if kind == "upsamplers":  # after the attention, if the block has one
            return f"output_blocks.{2 * block + 1}.{1 if block == 0 else 2}"
        first = f"input_blocks.{2 * block + 1}" if side == "down_blocks" else f"output_blocks.{2 * block + layer}"
        return f"{first}.{is_attention}"

    kinds = "resnets|attentions|downsamplers|upsamplers"
    name = re.sub(rf"^(down_blocks|mid_block|up_blocks)(?:\.(\d))?\.({kinds})\.(\d)", place, name)
    return re.sub(r"^(input_blocks\.\d\.0)\.conv\b", r"\1.op", name)


def _vae_name(name):
    """For four blocks: the original counts the decoder's from the other end."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{3 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for new, old in _VAE_PARTS.items():
        name = name.replace(new, old)
    return name
