"""Run in a process of its own, inside ComfyUI's code: `python run_in_comfyui.py COMFYUI EXPORT LATENTS FRAMES`.

Loads what `export -t comfyui` wrote, as ComfyUI does, decodes with its own nodes and saves their pictures.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    comfyui, export, latents, frames = (Path(given) for given in sys.argv[1:])
    sys.argv = sys.argv[:1]
    sys.path.insert(0, str(comfyui))
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args  # type: ignore[import-not-found]

    args.cpu = True
    import comfy.sd  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]
    import comfyui_version  # type: ignore[import-not-found]
    import nodes  # type: ignore[import-not-found]

    samples = {"samples": load_file(latents)["latents"]}
    if export.is_dir():
        assert asyncio.run(nodes.load_custom_node(str(export)))
        workflow = json.loads((export / "workflow.json").read_text())
        assert {entry["class_type"] for entry in workflow.values()} <= set(nodes.NODE_CLASS_MAPPINGS)
        loader = nodes.NODE_CLASS_MAPPINGS[workflow["1"]["class_type"]]
        (vae,) = getattr(loader(), loader.FUNCTION)()
    else:
        state, metadata = comfy.utils.load_torch_file(str(export), return_metadata=True)
        vae = comfy.sd.VAE(sd=state, metadata=metadata)
    with torch.no_grad():
        (whole,) = nodes.VAEDecode().decode(vae, samples)
        (tiled,) = nodes.VAEDecodeTiled().decode(vae, samples, tile_size=64, overlap=16, temporal_size=8)
    saved = {"whole": whole.float().contiguous(), "tiled": tiled.float().contiguous()}
    try:
        vae.encode(torch.rand(5, 32, 32, 3))
        encodes = "yes"
    except Exception as error:
        encodes = str(error)
    save_file(saved, frames, {"version": comfyui_version.__version__, "encodes": encodes})


if __name__ == "__main__":
    main()
