"""The public Python API: a decoder to call, and diffusers pipelines that decode with it."""
