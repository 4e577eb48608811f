"""How much of an untrusted file this program reads before it refuses. Every such limit is here.

Each is far above what real files need (measured on released checkpoints and on this program's largest artifacts) and
low enough that a refusal takes less than a second and less than 100 MB. Imports nothing.
"""

from __future__ import annotations

MAX_TENSORS = 10_000
"""Tensors in one checkpoint; a text-to-video model with its VAE and text encoder has about 7,000."""
MAX_INDEX_BYTES = 16_000_000
"""JSON index of a safetensors file, with its metadata: an analysis of the widest decoder takes 4 MB."""
MAX_JSON_VALUES = 600_000
"""Values of one JSON text, counted by its separators."""
MAX_JSON_DEPTH = 64
"""Nesting of brackets, in JSON and YAML alike."""
MAX_CONFIG_BYTES = 4_000_000
"""A `config.json` or shard index."""
MAX_PICKLE_BYTES = 16_000_000
"""The pickled structure of a PyTorch file, without the data of its tensors."""
MAX_PICKLE_STEPS = 600_000
"""Operations of that pickle; a tensor takes about 32."""
MAX_TUPLE_DEPTH = 64
"""Tuples inside tuples in a pickle: a state dict has 3."""
MAX_TENSOR_REUSE = 4
"""Bytes that the tensors of a file fill in memory, per byte of the file: tied weights share their data."""
MAX_SHARDS = 1_000
"""Files that hold one checkpoint."""

MAX_RECIPE_BYTES = 64_000
"""A YAML recipe; the longest that ships has 4,000."""
MAX_RECIPE_VALUES = 1_000
"""Values of a recipe after its aliases are expanded."""

MAX_STAGES = 64
MAX_STAGE_BLOCKS = 256
"""Blocks in one stage; the largest released decoder has 7."""
MAX_WIDTH = 65_536
"""Channels of one layer."""
MAX_TAPS = 63
"""Extent of a kernel along one axis."""
MAX_FACTOR = 64
"""Frames, rows or columns that one position expands to, in one block or one decoder."""

MAX_TILE_LATENTS = 4_096
"""Latent frames that are decoded at once as a clip of their own."""

MAX_LATENT = 1e6
"""Magnitude of a latent value; diffusion models give about 10. Squares of 2e19 and more overflow float32 in a norm,
which then gives zeros: a flat picture instead of an error."""
MAX_WEIGHT = 1e12
"""Magnitude of a weight, for the same reason; released ones stay below 100."""
MAX_STATISTIC = 1e6
"""Magnitude of a latent mean or deviation, and of one over a deviation; released ones lie between 0.01 and 10."""

MAX_FILES_SEARCHED = 200_000
"""Files and folders visited for one folder or pattern of clips."""
MAX_LISTED_MISTAKES = 12
"""Mistakes or names listed in one message; the rest are counted."""
MAX_MESSAGE_CHARS = 2_000
"""Length of one error message."""
MAX_QUOTED_CHARS = 80
"""Length of a wrong value quoted in a message."""
