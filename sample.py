"""Turn words into sound: the third of the three commands.

    python sample.py --prompt "a dog barks in the rain"                   a WAV and a page to listen to
    python sample.py --prompt "rain" --prompt "a bell" --num_samples 3    several prompts, three sounds each
    python sample.py --prompts prompts.txt --seconds 10                   longer than trained
    python sample.py --prompt "footsteps" --continue_from start.wav       go on from a recording
    python sample.py --prompt "sea waves" --stream | aplay                hear it while it is made

Weights: the newest pair in out/, else the ones in pretrained/; or name them with --lm and --codec.
Writes to --out one WAV per sound and index.html, a page with players and spectrograms that works offline.
"""

import base64
import html
import os
import struct
import sys
import tempfile
import timeit
import zlib

import numpy as np
import torch

import data as D
from codec import Codec, MelLoss
from lm import AudioLM


def get_args():
    parser = D.Parser(description="Turn words into sound.")
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="what to hear; may be given several times")
    add("--prompts", help="text file with a prompt per line")
    add("--seconds", type=float, default=5.0)
    add("--num_samples", type=D.positive, default=1, help="sounds per prompt, each with the next seed")
    add("--seed", type=D.whole, default=0)
    add("--guidance", type=float, default=3.0, help="how strongly words weigh: 1 as learnt")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 likeliest")
    add("--top_k", type=int, default=0, help="choose among the k likeliest codes; 0 among all")
    add("--top_p", type=float, default=0.0, help="choose among codes that make up p; 0 among all")
    add("--negative", default="", help="what not to hear")
    add("--continue_from", help="audio file whose end is continued")
    add("--stream", nargs="?", const="-", help="write one sound as it is made, to a file or (-) to stdout")
    add("--out", default="samples", help="folder for WAVs and index.html")
    add("--codec", help="codec checkpoint (default: beside the language model)")
    add("--lm", help="language model checkpoint (default: the newest in out/, else pretrained/)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if args.prompts:
        try:
            with open(args.prompts, encoding="utf-8") as f:
                args.prompt += [line.strip() for line in f if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{args.prompts}: not UTF-8 text: save it as UTF-8") from None
    if not all(p.strip() for p in args.prompt) or not (args.prompt or args.continue_from):
        raise ValueError('a prompt is empty or missing: type --prompt "a dog barks in the rain"')
    limits = {"seconds": (0.01, 600), "num_samples": (1, 1000), "guidance": (-100, 100)}
    limits |= {"temperature": (0, 10), "top_p": (0, 1), "top_k": (0, 2048)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number from {low} to {high}")
    args.prompt = args.prompt or [""]  # a continuation needs no words
    if args.stream and len(args.prompt) * args.num_samples > 1:
        raise ValueError("--stream plays one sound: give one --prompt and leave out --num_samples")
    return args


def find_weights(args):
    """(lm path, codec path): as named, else the newest lm.pt below out/, else pretrained/."""
    made = [os.path.join(d, "lm.pt") for d, _, files in os.walk("out") if "lm.pt" in files]
    shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pretrained", "lm.pt")
    lm = args.lm or max(made, key=os.path.getmtime, default=shipped)
    if not os.path.exists(lm):
        raise FileNotFoundError(f"{lm}: no such checkpoint: type python train_codec.py && python train_lm.py "
                                "--streams 4, or name others with --lm and --codec")
    return lm, args.codec or os.path.join(os.path.dirname(lm), "codec.pt")


# ----------------------------------------------------------------------------------------------------------
# Pictures of sound


def spectrogram(wave, width=600):
    """Wave (T,) to a log-mel picture (64, width) in [0, 1], low frequencies first; it spans 80 dB."""
    mel = MelLoss([10], n_mels=64).mel(wave[None].cpu().float(), 1024)[0].T  # (64, frames)
    mel = torch.nn.functional.interpolate(mel[None], size=width, mode="linear", align_corners=False)[0]
    db = 20 * mel.clamp(min=1e-5).log10()
    return ((db - db.max()) / 80 + 1).clamp(0, 1).numpy()


def png(picture) -> bytes:
    """A picture (H, W) in [0, 1], bottom row first, as a PNG in the colours black, violet, orange, yellow."""
    anchors = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
    places = np.linspace(0, 1, len(anchors))
    rgb = np.stack([np.interp(picture[::-1], places, anchors[:, c]) for c in range(3)], -1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)

    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def in_characters(wave, width=72, height=10) -> str:
    """A spectrogram for the terminal, high frequencies on top."""
    picture = spectrogram(wave, width)
    bands = np.stack([band.mean(0) for band in np.array_split(picture, height)])[::-1]
    shades = " .:-=+*#%@"
    return "\n".join("".join(shades[int(v * 9.99)] for v in row) for row in bands)


def page(title, clips) -> str:
    """A self-contained HTML page: clips are (caption, settings, wave)."""
    parts = [
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title>",
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}",
        "figure{margin:2rem 0}img{width:100%;height:12rem;display:block;border-radius:6px 6px 0 0}",
        "audio{width:100%}h2{font-size:1.1rem;margin:0}small{color:#666}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for caption, settings, wave in clips:
        picture = base64.b64encode(png(spectrogram(wave))).decode()
        sound = base64.b64encode(D.wav_bytes(wave)).decode()
        parts += [f"<figure><h2>{html.escape(caption)}</h2>",
                  f"<img alt='spectrogram' src='data:image/png;base64,{picture}'>",
                  f"<audio controls src='data:audio/wav;base64,{sound}'></audio>",
                  f"<small>{html.escape(settings)}</small></figure>"]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------


def main():
    args = get_args()
    device = D.pick_device(args.device)
    say = lambda *words: print(*words, file=sys.stderr if args.stream == "-" else sys.stdout, flush=True)
    lm_path, codec_path = find_weights(args)
    codec = Codec.load(codec_path, device)
    lm = AudioLM.load(lm_path, device, codec.hash())
    tokenizer = D.Tokenizer(lm.tokenizer)
    for prompt in args.prompt + [args.negative]:
        if (tokens := len(tokenizer.encode(prompt))) > lm.cfg.window:
            raise ValueError(f"the prompt {prompt[:40]!r}... has {tokens} tokens, the model reads "
                             f"{lm.cfg.window}: use fewer words")
    lm = lm.to(D.fast_dtype(device))  # a frame costs what it takes to read the weights once: halve them
    weights = sum(p.numel() * p.element_size() for p in [*lm.blocks.parameters(), lm.heads.weight])
    lm.pack()
    say(f"{lm_path} and {codec_path} on {device}, {str(next(lm.parameters()).dtype)[6:]}")
    os.makedirs(args.out, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # where it cannot write, say so before the work

    prompts = [p for p in args.prompt for _ in range(args.num_samples)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.num_samples)]
    text = tokenizer.batch(prompts, lm.cfg.window).to(device)
    frames = max(1, round(args.seconds * codec.cfg.frame_rate))
    options = {k: getattr(args, k) for k in ("guidance", "temperature", "top_k", "top_p")}
    options["negative"] = tokenizer.batch([args.negative] * len(prompts), lm.cfg.window).to(device)
    if args.continue_from:
        heard = D.load_audio(args.continue_from)[-lm.cfg.frames * codec.cfg.hop :]  # more is never looked at
        start = codec.encode(heard[None].to(device))
        options["prefix"] = start.expand(len(prompts), -1, -1)

    began, first_sound = D.now(device), None
    blocks = lm.generate_stream(text, frames, seeds=seeds, **options)
    if args.stream:
        waves = [[]]
        target = sys.stdout.buffer if args.stream == "-" else open(args.stream, "wb")  # noqa: SIM115
        # A WAV header that promises the greatest length: players read on until the stream ends.
        target.write(b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
                     + b"data\xff\xff\xff\xff")
        for wave in codec.decode_stream(blocks):
            first_sound = first_sound or D.now(device) - began
            target.write((wave[0].clamp(-1, 1) * 32767).short().cpu().numpy().astype("<i2").tobytes())
            target.flush()
            waves[0].append(wave[0])
        waves = [torch.cat(waves[0])]
    else:
        codes = torch.cat(list(blocks), 2)
        made = D.now(device) - began
        waves = codec.decode(codes)
    spent = D.now(device) - began

    clips = []
    for i, (prompt, seed, wave) in enumerate(zip(prompts, seeds, waves)):
        name = "".join(c if c.isalnum() else "_" for c in prompt)[:60] or "continued"
        path = os.path.join(args.out, f"{i:03d}_{name}_{seed}.wav")
        D.save_wav(wave, path)
        settings = ", ".join(f"{k} {v}" for k, v in options.items() if not torch.is_tensor(v))
        clips.append((prompt, f"seed {seed}, {settings}", wave))
        say(f"\n{prompt} (seed {seed})\n{in_characters(wave)}\n{path}")
    with open(os.path.join(args.out, "index.html"), "w", encoding="utf-8") as f:
        f.write(page("nanoAudioGen: " + ", ".join(dict.fromkeys(prompts))[:80], clips))
    seconds = frames / codec.cfg.frame_rate * len(prompts)
    say(f"\n{seconds:.1f} s of sound in {spent:.1f} s, {seconds / spent:.1f} x real time, "
        f"{1000 * spent / frames:.1f} ms per frame; page: {os.path.join(args.out, 'index.html')}")
    if not args.stream:
        big = torch.ones(1 << 26, device=device)
        bandwidth = big.numel() * 4 / min(timeit.repeat(lambda: big.sum().item(), number=1, repeat=4))
        floor = weights / bandwidth / (made / frames)
        say(f"language model {1000 * made / frames:.1f} ms per frame, of which reading its weights once "
            f"({weights / 1e6:.0f} MB at {bandwidth / 1e9:.0f} GB/s) is {100 * floor:.0f} %; "
            f"codec {100 * (spent - made) / spent:.0f} % of the time")
    elif first_sound:
        say(f"first sound after {first_sound:.2f} s")


if __name__ == "__main__":
    with D.one_line_errors():
        main()
