"""How fast everything is on this machine: every row of the table of speeds.

    python experiments/speed.py                 run nothing else meanwhile
    python experiments/speed.py --quick         some of the rows; two minutes of a core without bfloat16
    peer/bin/python experiments/speed.py        with AudioCraft beside it: see peer.py

A column `floor` stands beside sampling: the time it takes this machine to read as many bytes as the weights
have that a frame needs, from memory, or from a cache where they fit. Ours and theirs are measured in turns.
"""

import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data as D
import lm
import train_codec
import train_lm
from codec import CodecConfig

try:
    import peer
except ImportError:
    peer = None

lm.SIZES |= {"36 M": (8, 8, 512, 2), "407 M": (24, 16, 1024, 2)}
train_lm.RECIPES |= {"36 M": train_lm.RECIPES["tiny"], "407 M": train_lm.RECIPES["tiny"]}


def seconds(run, device, n: int = 1, warm_up=None) -> float:
    """How long one of n calls takes, after a first one to warm up."""
    (warm_up or run)()
    began = D.now(device)
    for _ in range(n):
        run()
    return (D.now(device) - began) / n


def show(row: str, ours: float, theirs: float | None = None, floor: float | None = None) -> None:
    """Print a line of the table."""
    cells = ["" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in (theirs, ours, floor)]
    print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


def codec_rows(streams: int, device, n: int) -> None:
    """Training without and with the discriminator, encoding and decoding, of the size `paper`."""
    batch = 64 if device.type == "cuda" else 8
    recipe = train_codec.RECIPES["paper"] | {"steps": 1000, "batch": batch, "disc_start": 0.5}
    t = train_codec.Training(CodecConfig(streams, "paper"), recipe, device, {})
    wave = 0.1 * torch.randn(batch, D.SAMPLE_RATE, device=device)
    name = f"codec `paper`, {streams} stream{'s' if streams > 1 else ''}"
    ours = batch / seconds(lambda: train_codec.train_step(t, wave, 0), device, n)
    show(f"{name}: training without its discriminator, s of sound per s", ours)
    theirs = peer and batch / seconds(peer.codec_step(streams, wave), device, n)
    ours = batch / seconds(lambda: train_codec.train_step(t, wave, 999), device, n)
    show(f"{name}: training with it", ours, theirs)
    wave, codec = 0.1 * torch.randn(1, 10 * D.SAMPLE_RATE, device=device), t.codec.eval()
    codes, z = codec.encode(wave), codec.latents(wave).detach()
    rows = [
        ("encodes, times faster than it plays", lambda: codec.encode(wave)),
        ("decodes", lambda: codec.decode(codes)),
    ]
    encode, decode = peer.coder(streams, device) if peer else (None, None)
    for (title, ours), theirs in zip(rows, (lambda: encode(wave), lambda: decode(z))):
        theirs = peer and 10 / seconds(theirs, device, n)
        show(f"{name}: {title}", 10 / seconds(ours, device, n), theirs)


def flops_per_frame(model) -> float:
    """Of training, roughly: 6 per weight of the decoder, and 12 d per frame that attention looks at."""
    cfg = model.cfg
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.lm_heads.weight.numel()
    seen = (cfg.max_text_len + cfg.max_frames) / 2 + cfg.max_text_len  # by self- and by cross-attention
    decoder = 6 * weights + 12 * cfg.n_layer * cfg.n_embd * seen
    text_per_frame = cfg.max_text_len / cfg.max_frames
    text = 6 * sum(p.numel() for p in model.text_encoder.blocks.parameters()) * text_per_frame
    return decoder * (1 + text_per_frame) + text  # the decoder runs over the text, too


def lm_step(size: str, device):
    """A function that does one training step, optimizers included, with codes at hand; how many frames that
    are, and how many floating point operations a frame takes."""
    args = argparse.Namespace(steps=None, batch=None, micro=None)
    recipe = train_lm.choose_recipe(args, size, argparse.Namespace(saved={}, device=device, world_size=1))
    model = lm.AudioLM(lm.LMConfig(4, size, vocab_size=512, max_text_len=16)).to(device)
    optimizers = train_lm.make_optimizers(model, 1e-4, device.type == "cuda", False)
    for block in [*model.text_encoder.blocks, *model.blocks] if device.type == "cuda" else ():
        block.compile(dynamic=False)
    codes = torch.randint(0, 512, (recipe["micro"], 4, 625), device=device)
    text = torch.randint(1, 500, (recipe["micro"], 16), device=device)

    def step():
        for _ in range(recipe["accumulate"]):
            with D.autocast(device):
                loss = model(codes, text)[1]
            loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()

    return step, recipe["accumulate"] * recipe["micro"] * 625, flops_per_frame(model)


def lm_training_rows(size: str, device, n: int) -> None:
    """Frames per second, and what that is in TFLOP/s."""
    step, frames, flops = lm_step(size, device)
    speed = frames / seconds(step, device, n)
    del step  # its memory is needed
    theirs, clips = None, 16 if device.type == "cuda" else 4
    if peer:
        theirs = clips * 625 / seconds(peer.lm_step(lm.SIZES[size][:3], clips, device), device, n)
    show(f"language model `{size}`: training, frames per s", speed, theirs)
    show(f"language model `{size}`: training, TFLOP/s", speed * flops / 1e12)


def sampling_row(size: str, streams: int, frames: int, device, against_peer: bool) -> None:
    """One sound at a time, guidance on, and the time that reading the weights takes."""
    model = lm.AudioLM(lm.LMConfig(streams, size, vocab_size=512, max_text_len=16)).to(device).eval()
    model, text = model.to(D.fast_dtype(device)).pack(), torch.randint(1, 500, (1, 16), device=device)
    read = [(name, t) for part in (model.blocks, model.lm_heads) for name, t in part.state_dict().items()]
    n_bytes = sum(t.numel() * t.element_size() for name, t in read if "c_kv" not in name)
    weights, sample = torch.ones(n_bytes // 4, device=device), model.generate
    floor = seconds(lambda: weights.sum(), device, 20)
    ours = seconds(lambda: sample(text, frames, top_k=250), device, warm_up=lambda: sample(text, 8)) / frames
    theirs = None
    if peer and against_peer:
        sample = peer.sampler(lm.SIZES[size][:3], device)
        theirs = 1000 * seconds(lambda: sample(frames), device, warm_up=lambda: sample(8)) / frames
    times = f"{streams / 500 / ours:.2g} x real time"
    row = f"language model `{size}`, {streams} streams: sampling, ms per frame (ours: {times})"
    show(row, 1000 * ours, theirs, 1000 * floor)


def main():
    """Print the table."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some of the rows, each measured once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    device, n = D.pick_device(args.device), 1 if args.quick else 3
    gpu = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads"
    print(f"{what}, {str(D.fast_dtype(device))[6:]}, PyTorch {torch.__version__}\n")
    print("| | AudioCraft | here | floor |\n|--|--|--|--|")
    for streams in (4,) if args.quick else (1, 4):
        codec_rows(streams, device, n)
    for size in ("base", "large") if gpu else ("36 M",):
        lm_training_rows(size, device, n)
    for size in ["36 M"] + ["407 M"] * (not args.quick) + ["base", "large"] * gpu:
        sampling_row(size, 4, 625 if gpu else 100, device, True)
    for streams in (4,) if args.quick else (1, 2, 4):
        sampling_row("tiny", streams, 500 // streams, device, False)


if __name__ == "__main__":
    with D.one_line_errors():
        main()
