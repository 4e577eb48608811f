"""A ComfyUI node for decoders that ComfyUI's own loader does not know. Imports ComfyUI only when a node is used."""

from flashvaed_cli.comfyui.node import node_mappings

__all__ = ["node_mappings"]
