"""Train `builtin:tiny-wan`: data, held-out measurement and the files that come out.

`python -m tests.teacher --data DIR --hold-out NAME --minutes 85 --work-dir DIR --output PATH`;
the same command continues a run that was killed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.artifact.checkpoint import save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.families.wan21.spec import wan_decoder_spec, wan_encoder_spec
from flashvaed_cli.media.frames.container import is_still
from flashvaed_cli.media.procedural import render_frames
from flashvaed_cli.media.sources import find_clips
from flashvaed_cli.media.video import iter_frames, read_clip, scaled_size
from flashvaed_cli.metrics.quality import psnr_db
from tests.teacher.linear_start import start_linear
from tests.teacher.training import Autoencoder, RunState, TrainingPlan, start_state, train

NUM_EVAL_FRAMES = 17
EVAL_MAX_SIDE, CROP_MAX_SIDE, CROP = 256, 512, 64
LEVELS = (640, 448, 320, 224)  # longest sides at which every source is sampled
MAX_FRAMES_PER_CLIP = 96
PROCEDURAL_SEEDS = (101, 102, 103)
NUM_START_CLIPS = 40
IMAGE_PHASE_FRAC = 0.2
# Frames per sample: (samples per batch, odds). Until IMAGE_PHASE_FRAC mostly images, later more long clips.
BATCHES = {1: 16, 5: 4, 9: 2, 17: 2}
EARLY_ODDS = {1: 0.5, 5: 0.5, 9: 0.0, 17: 0.0}
LATE_ODDS = {1: 0.3, 5: 0.2, 9: 0.15, 17: 0.35}

Clip = Float[Tensor, "C T H W"]


@dataclass(frozen=True)
class Source:
    """One video or photo in memory at several sizes."""

    name: str
    levels: tuple[UInt8[Tensor, "T C H W"], ...]

    @property
    def num_frames(self) -> int:
        """Frames that were read."""
        return self.levels[0].shape[0]


class CropSampler:
    """Draws augmented crops of random sources, at random scale; the schedule's `BatchSource`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)

    def draw(self, progress: float, rng: torch.Generator) -> Float[Tensor, "B C T H W"]:
        """A batch in [-1, 1]; early in the schedule mostly single images."""
        odds = EARLY_ODDS if progress < IMAGE_PHASE_FRAC else LATE_ODDS
        num_frames = list(odds)[_pick(list(odds.values()), rng)]
        return self.clips(BATCHES[num_frames], num_frames, rng)

    def clips(self, count: int, num_frames: int, rng: torch.Generator) -> Float[Tensor, "B C T H W"]:
        """Crops of that many frames, each of another random place."""
        return torch.stack([self._sample(num_frames, rng) for _ in range(count)])

    def _sample(self, num_frames: int, rng: torch.Generator) -> Clip:
        fitting = [s for s in self._sources if s.num_frames >= num_frames]
        weights = [0.6 if s.num_frames == 1 else 1.0 for s in fitting]
        source = fitting[_pick(weights, rng)]
        frames = source.levels[_below(len(source.levels), rng)]
        stride = 2 if _below(8, rng) == 0 and source.num_frames >= 2 * num_frames else 1
        span = stride * (num_frames - 1) + 1
        first = _below(source.num_frames - span + 1, rng)
        top, left = (_below(side - CROP + 1, rng) for side in frames.shape[-2:])
        crop = frames[first : first + span : stride, :, top : top + CROP, left : left + CROP]
        return _augment(crop.permute(1, 0, 2, 3).float() / 127.5 - 1, rng)


def _augment(clip: Clip, rng: torch.Generator) -> Clip:
    """Flips, transposition, time reversal, and mild changes of gain, offset and colour order."""
    flips = [axis for axis in (1, 2, 3) if _below(2, rng)]
    clip = clip.flip(flips)
    if _below(4, rng) == 0:
        clip = clip.transpose(2, 3)
    if _below(8, rng) == 0:
        clip = clip[torch.randperm(3, generator=rng)]
    if _below(2, rng):
        jitter = torch.rand(3, 2, generator=rng) * 0.12 - 0.06 + torch.rand(1, 2, generator=rng) * 0.3 - 0.15
        clip = clip * (1 + jitter[:, :1, None, None]) + 0.5 * jitter[:, 1:, None, None]
    return clip.clamp(-1, 1)


def _below(end: int, rng: torch.Generator) -> int:
    return int(torch.randint(end, (1,), generator=rng))


def _pick(weights: Sequence[float], rng: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights), 1, generator=rng))


def load_sources(paths: Sequence[Path], cache: Path) -> list[Source]:
    """Read every file once, with the procedural clips; kept in `cache`, so that a resumed run starts at once."""
    if cache.exists():
        return [Source(name, tuple(levels)) for name, levels in torch.load(cache, weights_only=True)]
    sources = []
    for path in paths:
        stop = 1 if is_still(path) else MAX_FRAMES_PER_CLIP
        sources.append(_source(path.name, torch.stack(list(iter_frames(path, stop=stop, max_side=LEVELS[0])))))
    for seed in PROCEDURAL_SEEDS:
        frames = torch.stack(list(render_frames(24, 256, 256, seed)))
        sources.append(_source(f"procedural {seed}", ((frames + 1) * 127.5).round().clamp(0, 255).byte()))
    with atomic_path(cache) as sibling:
        torch.save([(s.name, list(s.levels)) for s in sources], sibling)
    return sources


def _source(name: str, frames: UInt8[Tensor, "T C H W"]) -> Source:
    levels = [frames]
    for side in LEVELS[1:]:
        size = scaled_size(frames.shape[2], frames.shape[3], side)
        if size != tuple(frames.shape[2:]) and min(size) >= CROP:
            levels.append(F.interpolate(frames, size=size, mode="bicubic", antialias=True))
    return Source(name, tuple(levels))


def held_out_clips(path: Path) -> dict[str, Float[Tensor, "B C T H W"]]:
    """The first 17 frames: whole at longest side 256, and a 3x3 grid of 64x64 crops at longest side 512."""
    whole = read_clip(path, num_frames=NUM_EVAL_FRAMES, max_side=EVAL_MAX_SIDE)
    whole = whole[:, :, : whole.shape[2] // 8 * 8, : whole.shape[3] // 8 * 8]
    large = read_clip(path, num_frames=NUM_EVAL_FRAMES, max_side=CROP_MAX_SIDE)
    tops, lefts = ([round(i * (side - CROP) / 2) for i in range(3)] for side in large.shape[2:])
    crops = [large[:, :, top : top + CROP, left : left + CROP] for top in tops for left in lefts]
    return {"whole": whole[None], "crops": torch.stack(crops)}


@torch.no_grad()
def measure(
    encoder: Encoder, decoder: Decoder, held_out: dict[str, dict[str, Tensor]], protocols: Sequence[str]
) -> dict[str, dict[str, float]]:
    """PSNR of each held-out clip by protocol, and the `mean` over clips."""
    table: dict[str, dict[str, float]] = {}
    for protocol in protocols:
        rows = {
            name: psnr_db(decode(decoder, encode(encoder, clips[protocol])), clips[protocol])
            for name, clips in held_out.items()
        }
        table[protocol] = rows | {"mean": sum(rows.values()) / len(rows)}
    return table


@torch.no_grad()
def latent_statistics(encoder: Encoder, sources: Sequence[Source]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel over the first 17 frames of the training clips, side 320."""
    latents = []
    for source in sources:
        if source.num_frames < NUM_EVAL_FRAMES:
            continue
        frames = min(source.levels, key=lambda f: abs(max(f.shape[2:]) - 320))[:NUM_EVAL_FRAMES]
        clip = frames[:, :, : frames.shape[2] // 8 * 8, : frames.shape[3] // 8 * 8].permute(1, 0, 2, 3)
        latents.append(encode(encoder, clip[None].float() / 127.5 - 1)[0].flatten(1))
    joined = torch.cat(latents, dim=1)  # [C, N]
    return joined.mean(1).tolist(), joined.std(1).tolist()


def averaged(state: RunState, base_width: int) -> tuple[Encoder, Decoder]:
    """Fresh modules with the averaged weights, rounded to fp16 as they ship."""
    model = Autoencoder(Encoder(wan_encoder_spec(base_width)), Decoder(wan_decoder_spec(base_width)))
    model.load_state_dict({name: value.half().float() for name, value in state.ema.items()})
    model.eval()
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, Encoder) and isinstance(decoder, Decoder)
    return encoder, decoder


def save_weights(path: Path, encoder: Encoder, decoder: Decoder) -> None:
    """fp16 safetensors, names prefixed `encoder.` and `decoder.`, replaced atomically."""
    tensors = {f"encoder.{k}": v.half().contiguous() for k, v in encoder.state_dict().items()}
    tensors |= {f"decoder.{k}": v.half().contiguous() for k, v in decoder.state_dict().items()}
    with atomic_path(path) as sibling:
        save_file(tensors, sibling)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.teacher", description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="videos, photos or folders of them")
    parser.add_argument("--hold-out", nargs="+", default=[], help="file names never trained on, measured instead")
    parser.add_argument("--minutes", type=float, default=85.0, help="wall clock of training")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoint, cache and snapshots; continued")
    parser.add_argument("--output", type=Path, required=True, help="VAE artifact to write")
    parser.add_argument("--base-width", type=int, default=16)
    parser.add_argument("--matrix-lr", type=float, default=TrainingPlan.matrix_lr)
    parser.add_argument("--vector-lr", type=float, default=TrainingPlan.vector_lr)
    parser.add_argument("--snapshot-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and write."""
    args = _parse(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    paths = find_clips(args.data)
    missing = set(args.hold_out) - {path.name for path in paths}
    if missing:
        raise SystemExit(f"--hold-out names no file of --data: {', '.join(sorted(missing))}")
    held_out = {path.name: held_out_clips(path) for path in paths if path.name in args.hold_out}
    sources = load_sources([p for p in paths if p.name not in args.hold_out], args.work_dir / "sources.pt")
    print(f"{len(sources)} sources, held out: {', '.join(held_out) or 'none'}", flush=True)

    plan = TrainingPlan(budget_s=60 * args.minutes, matrix_lr=args.matrix_lr, vector_lr=args.vector_lr, seed=args.seed)
    torch.manual_seed(args.seed)
    encoder, decoder = Encoder(wan_encoder_spec(args.base_width)), Decoder(wan_decoder_spec(args.base_width))
    sampler, checkpoint = CropSampler(sources), args.work_dir / "checkpoint.pt"
    if not checkpoint.exists():
        start_linear(encoder, decoder, sampler.clips(NUM_START_CLIPS, 9, torch.Generator().manual_seed(args.seed)))
        print("linear start done", flush=True)
    state = start_state(encoder, decoder, plan)

    def snapshot(state: RunState) -> None:
        due_minutes = int(state.elapsed_s / 60 // args.snapshot_minutes * args.snapshot_minutes)
        path = args.work_dir / f"snapshot-{due_minutes:03}min.safetensors"
        if due_minutes == 0 or path.exists():
            return
        models = averaged(state, args.base_width)
        save_weights(path, *models)
        if held_out:
            print(f"held-out {_show(measure(*models, held_out, ['crops']))}", flush=True)

    train(
        state, sampler, plan, checkpoint=checkpoint,
        log=lambda line: print(line, flush=True), on_checkpoint=snapshot,
    )  # fmt: skip
    encoder, decoder = averaged(state, args.base_width)
    psnr = measure(encoder, decoder, held_out, ["whole", "crops"]) if held_out else {}
    write_teacher(
        args.output, encoder, decoder, latent_statistics(encoder, sources), _facts(state, plan, sources, psnr)
    )
    print(f"{args.output}: held-out {_show(psnr)}", flush=True)


def write_teacher(
    path: Path,
    encoder: Encoder,
    decoder: Decoder,
    statistics: tuple[Sequence[float], Sequence[float]],
    facts: Mapping[str, object],
) -> None:
    """Write the VAE as an fp16 artifact, with the latent statistics and how it was trained in the header."""
    mean, std = (tuple(round(value, 5) for value in values) for values in statistics)
    header = ArtifactHeader(
        kind="vae", family=decoder.spec.family, latent_mean=mean, latent_std=std, measured=dict(facts)
    )
    save_checkpoint(path, header, decoder=decoder, encoder=encoder, dtype=torch.float16, force=True)


def _facts(
    state: RunState, plan: TrainingPlan, sources: Sequence[Source], psnr: Mapping[str, Mapping[str, float]]
) -> dict[str, object]:
    return {
        "held_out_psnr_db": psnr,
        "protocols": {
            "whole": f"first {NUM_EVAL_FRAMES} frames, longest side {EVAL_MAX_SIDE}, mean over clips of PSNR",
            "crops": f"first {NUM_EVAL_FRAMES} frames, longest side {CROP_MAX_SIDE}, 3x3 grid of {CROP}x{CROP} crops",
        },
        "num_steps": state.step,
        "training_s": round(state.elapsed_s),
        "matrix_lr": plan.matrix_lr,
        "vector_lr": plan.vector_lr,
        "seed": plan.seed,
        "sources": [source.name for source in sources],
    }


def _show(psnr: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{protocol}: " + ", ".join(f"{name} {value:.2f} dB" for name, value in rows.items())
        for protocol, rows in psnr.items()
    )


if __name__ == "__main__":
    main()
