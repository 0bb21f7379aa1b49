"""Turn words into sound: the third of the three commands.

    python sample.py --prompt "a dog barks in the rain"                   a WAV and a page to listen to
    python sample.py --prompt "rain" --prompt "a bird" --num_samples 3    several prompts, three sounds each
    python sample.py --prompts prompts.txt --seconds 10                   longer than trained
    python sample.py --prompt "a dog" --best_of 8                         of eight sounds the one most like it
    python sample.py --prompt "footsteps" --continue_from start.wav       go on from a recording
    python sample.py --prompt "sea waves" --stream | aplay                hear it while it is made

Weights: the newest pair below out/, else the ones in pretrained/; or name them with --lm and --codec.
Writes to --out one WAV per sound, as each is done, and index.html, a page with players and spectrograms of
this run's sounds that works offline.
"""

import base64
import contextlib
import difflib
import html
import itertools
import os
import re
import signal
import struct
import sys
import tempfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

import data as D
from codec import Codec, CodecError, MelLoss
from lm import AudioLM, LMError

LIMITS = {"seconds": (0.01, 600), "num_samples": (1, 1000), "guidance": (-100, 100)}
LIMITS |= {"temperature": (0, 10), "top_p": (0, 1), "top_k": (0, 2048), "best_of": (1, 32)}
CACHE_BYTES = 2**30  # for keys and values; it limits how many sounds are made at once


def get_args():
    """The flags, and the prompts of --prompts among those of --prompt."""
    parser = D.Parser(description="Turn words into sound.")
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="what to hear; may be given several times")
    add("--prompts", help="text file with a prompt per line")
    add("--seconds", type=float, default=5.0)
    add("--num_samples", type=D.positive, default=1, help="sounds per prompt, each with the next seed")
    add("--best_of", type=int, default=1, help="make so many per sound, keep what its words explain best")
    add("--seed", type=D.whole_number, default=0)
    add("--guidance", type=float, default=3.0, help="how strongly words weigh: 1 as learnt")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 likeliest")
    add("--top_k", type=int, default=0, help="choose among the k likeliest codes; 0 among all")
    add("--top_p", type=float, default=0.0, help="choose among codes that make up p; 0 among all")
    add("--negative", default="", help="what not to hear (needs a --guidance other than 1)")
    add("--continue_from", help="audio file whose end is continued")
    add("--keep_prefix", action="store_true", help="write that file's sound, too, before its continuation")
    add("--stream", nargs="?", const="-", help="write one sound as it is made, to a file or (-) to stdout")
    add("--out", default="samples", help="folder for WAVs and index.html")
    add("--codec", help="codec checkpoint (default: beside the language model)")
    add("--lm", help="language model checkpoint (default: the newest in out/, else pretrained/)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=D.positive, help="of a CPU (default: all, or one where that is faster)")
    args = parser.parse_args()
    if args.prompts:
        args.prompt += read_prompts(args.prompts)
    args.prompt, args.negative = list(map(D.clean_caption, args.prompt)), D.clean_caption(args.negative)
    if not all(args.prompt) or not (args.prompt or args.continue_from is not None):
        raise D.UserError('a prompt is empty or missing: type --prompt "a dog barks in the rain"')
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            raise D.UserError(f"--{name} {getattr(args, name)}: expected a number from {low} to {high}")
    args.prompt = args.prompt or [""]  # a continuation needs no words
    if args.stream and len(args.prompt) * args.num_samples * args.best_of > 1:
        raise D.UserError("--stream plays one sound: give one --prompt, no --num_samples and no --best_of")
    if args.stream == "-" and sys.stdout.isatty():
        raise D.UserError("--stream - writes a WAV to stdout: pipe it into a player, such as | aplay")
    if args.stream and os.path.isfile(args.stream):
        raise D.UserError(f"--stream {args.stream}: exists already; name another file, or delete it")
    if args.negative and args.guidance == 1:
        raise D.UserError("--negative does nothing at --guidance 1: give another guidance, such as 3")
    if args.best_of > 1 and not (args.prompt[0] or args.negative):
        raise D.UserError("--best_of keeps what the words explain best: give a --prompt")
    if args.keep_prefix and args.continue_from is None:
        raise D.UserError("--keep_prefix goes with --continue_from: name the recording to continue")
    return args


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty. UserError: it is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise D.UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None


def find_weights(args) -> tuple[str, str]:
    """(lm path, codec path): as named, else the newest lm.pt below out/, else pretrained/."""
    folders = D.walk_links("out") if not args.lm else ()
    made = [os.path.join(folder, "lm.pt") for folder, _, files in folders if "lm.pt" in files]
    lm = D.file_in(args.lm or max(made, key=os.path.getmtime, default="pretrained"), "lm.pt")
    if not os.path.exists(lm):
        raise D.UserError(
            f"{lm}: no such checkpoint: type python train_codec.py && python train_lm.py "
            "--streams 4, or name others with --lm and --codec"
        )
    codec = D.file_in(args.codec or os.path.dirname(lm) or ".", "codec.pt")
    if not os.path.exists(codec):
        raise D.UserError(
            f"{codec}: no such checkpoint: name the codec of {lm} with --codec, or type --lm pretrained for "
            "the pair that ships"
        )
    return lm, codec


# ----------------------------------------------------------------------------------------------------------
# Pictures of sound


def spectrogram(wave, width: int = 600):
    """Wave (T,) to a log-mel picture (64, width) in [0, 1], low frequencies first; it spans 80 dB."""
    mel = MelLoss([10], n_mels=64).mel(wave[None].cpu().float(), 1024)[0].T  # (64, frames)
    mode = "area" if mel.shape[1] > width else "linear"  # a short event shows in a picture of a minute, too
    mel = torch.nn.functional.interpolate(mel[None], size=width, mode=mode)[0]
    db = 20 * mel.clamp(min=1e-5).log10()  # -100 at least
    loudest = db.max().clamp(min=-20)  # so that a quiet sound stays dark and silence is black
    return ((db - loudest) / 80 + 1).clamp(0, 1).numpy()


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


def in_characters(wave, width: int = 72, height: int = 10) -> str:
    """A spectrogram for the terminal, high frequencies on top."""
    picture = spectrogram(wave, width)
    bands = np.stack([band.mean(0) for band in np.array_split(picture, height)])[::-1]
    shades = " .:-=+*#%@"
    return "\n".join("".join(shades[int(v * 9.99)] for v in row) for row in bands)


STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 2rem 0 }
img { width: 100%; height: 12rem; display: block; border-radius: 6px 6px 0 0 }
audio { width: 100% }
h2 { font-size: 1.1rem; margin: 0 }
small { color: #666 }
</style>"""


def page(title: str, clips: list[tuple]) -> str:
    """A self-contained HTML page: clips are (caption, settings, wave)."""
    parts = ["<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"]
    parts += [f"<title>{html.escape(title)}</title>", STYLE, f"<h1>{html.escape(title)}</h1>"]
    for caption, settings, wave in clips:
        picture = base64.b64encode(png(spectrogram(wave))).decode()
        sound = base64.b64encode(D.wav_bytes(wave)).decode()
        parts += [
            f"<figure><h2>{html.escape(caption)}</h2>",
            f"<img alt='spectrogram' src='data:image/png;base64,{picture}'>",
            f"<audio controls src='data:audio/wav;base64,{sound}'></audio>",
            f"<small>{html.escape(settings)}</small></figure>",
        ]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------
# Making sounds


def load_prefix(path: str, codec, lm, device):
    """The recording to continue: its wave (T,), and the codes (1, K, P) of its last whole frames, at most
    `max_frames`, which end where the recording ends. The language model reads the later half of `max_frames`
    of them; the codec decodes them all, so that the sound goes on without a step."""
    wave, hop = D.turned_down(D.load_audio(path)), codec.cfg.hop
    whole = torch.nn.functional.pad(wave, (max(0, hop - len(wave)), 0))
    frames = min(len(whole) // hop, lm.cfg.max_frames)
    return wave, codec.encode(whole[None, -frames * hop :].to(device))


def load_models(args, device, say):
    """The codec, the language model, ready for sampling, and its tokenizer."""
    lm_path, codec_path = find_weights(args)
    codec = Codec.load(codec_path, device)
    try:
        lm = AudioLM.load(lm_path, device, codec.hash())
    except LMError as error:
        raise LMError(f"{error}{'' if args.lm else '; --lm pretrained names the pair that ships'}") from None
    tokenizer = D.Tokenizer(lm.tokenizer)
    # A frame takes as long as reading the weights once. On a GPU bfloat16 halves them, and on a CPU `pack`
    # rounds them to 8 bits.
    lm = lm.to(D.fast_dtype(device)).pack()
    nothing = tokenizer.batch([""], lm.cfg.max_text_len).to(device)
    D.choose_threads(args.threads, device, lambda: lm.generate(nothing, 2), say)
    weights = "" if isinstance(lm.lm_heads, torch.nn.Linear) else " with weights of 8 bits"
    say(f"{lm_path} and {codec_path} on {device}, {str(lm.bos.dtype)[6:]}{weights}")
    return codec, lm, tokenizer


def check_words(prompts: list[str], negative: str, tokenizer, lm, say) -> None:
    """Say which words no caption had, and which are spelled like them. UserError: a prompt is longer than
    the model reads."""
    for prompt in [*prompts, negative]:
        tokens = len(tokenizer.encode(prompt))
        if tokens > lm.cfg.max_text_len:
            raise D.UserError(
                f"the prompt {prompt[:40]!r}... has {tokens} tokens, the model reads {lm.cfg.max_text_len}: "
                "use fewer words"
            )
    for word in D.words_of(" ".join([*prompts, negative])):
        if word not in lm.words:
            nearest = difflib.get_close_matches(word, lm.words, n=3)
            like = f"the nearest are {', '.join(nearest)}" if nearest else "none is spelled like it"
            say(f"! no caption of the training data had the word {word!r}: {like}")
    for prompt in prompts:
        if prompt and not set(D.words_of(prompt)) & set(lm.words):
            say(f"! {prompt!r} has no word that the model knows: expect any sound")


def with_progress(blocks, frames: int):
    """Blocks of codes (B, K, f), `frames` in all, under a progress bar where there is a terminal."""
    with tqdm(total=frames, desc="sampling", unit=" frames", disable=None, leave=False) as bar:
        for block in blocks:
            bar.update(block.shape[2])
            yield block


def decode_after(codec, heard, prefix, blocks):
    """Blocks of codes (1, K, f) to pieces of the wave (1, t): first what was `heard` (T,), then the codes as
    they sound after the prefix (1, K, P): the decoder knows what came before.

    Block by block, ten minutes need no more memory than ten seconds."""
    if len(heard):
        yield heard[None]
    skip = prefix.shape[2] * codec.cfg.hop  # samples of the prefix, which are heard already
    for piece in codec.decode_stream(itertools.chain([prefix] if prefix.shape[2] else [], blocks)):
        yield piece[:, skip:]
        skip = max(0, skip - piece.shape[1])


def wav_header(n_bytes: int) -> bytes:
    """Of 16-bit mono; a length that is not known yet is the greatest there is, so that players read on."""
    form = struct.pack("<IHHIIHH", 16, 1, 1, D.SAMPLE_RATE, 2 * D.SAMPLE_RATE, 2, 16)
    size = min(n_bytes, 2**32 - 37)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size)


def write_stream(pieces, target: str):
    """Write the pieces of a wave as they come, to a file or (-) to stdout; returns the whole (T,).

    Whoever listens may go away: the sound is made to its end all the same."""
    waves = []
    with contextlib.suppress(BrokenPipeError), contextlib.ExitStack() as stack:
        file = sys.stdout.buffer if target == "-" else stack.enter_context(open(target, "wb"))
        with contextlib.suppress(BrokenPipeError):
            file.write(wav_header(2**32))
        try:
            for wave in pieces:
                wave = wave[0].cpu()
                samples = (wave.clamp(-1, 1) * 32767).round().short().numpy().astype("<i2")
                with contextlib.suppress(BrokenPipeError):
                    file.write(samples.tobytes())
                    file.flush()
                waves.append(wave)
        finally:  # also of a sound that was stopped
            if target != "-" and file.seekable():  # a pipe is left with its promise of the greatest length
                file.seek(0)
                file.write(wav_header(2 * sum(map(len, waves))))
    return torch.cat(waves)


def next_number(folder: str) -> int:
    """The first number that no sound in the folder has: what was made before is not overwritten."""
    matches = [re.match(r"(\d{3,6})_.*\.wav$", name) for name in os.listdir(folder)]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def save_new(wave, folder: str, prompt: str, seed: int) -> str:
    """Write wave (T,) under a name of its own, which no other sampler in the folder may take; its path."""
    while True:
        name = f"{next_number(folder):03d}_{D.file_name(prompt) or 'continued'}_{seed}.wav"
        path = os.path.join(folder, name)
        with contextlib.suppress(FileExistsError):
            open(path, "x").close()  # an empty file holds the name
            break
    try:
        D.save_wav(wave, path)
    except BaseException:
        os.remove(path)
        raise
    return path


def batch_size(lm, device) -> int:
    """How many sounds are made at once."""
    cfg = lm.cfg
    number_bytes = 4 if device.type == "cpu" else D.fast_dtype(device).itemsize
    frame_bytes = 2 * 2 * cfg.n_layer * cfg.n_embd * number_bytes  # keys and values, with and without text
    return max(1, min(32, CACHE_BYTES // (frame_bytes * (cfg.max_text_len + cfg.max_frames))))


def main():
    """Read the flags, load the models, make the sounds in batches, write them and the page."""
    args = get_args()
    device = D.pick_device(args.device)
    say = D.Say(sys.stderr if args.stream == "-" else sys.stdout)
    codec, lm, tokenizer = load_models(args, device, say)
    check_words(args.prompt, args.negative, tokenizer, lm, say)
    os.makedirs(args.out, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # where it cannot write, say so before the work

    options = {name: getattr(args, name) for name in ("guidance", "temperature", "top_k", "top_p")}
    settings = ", ".join(f"{name} {value}" for name, value in options.items())
    settings += f", without {args.negative}" if args.negative else ""
    heard, prefix = torch.zeros(0), torch.zeros(1, codec.cfg.streams, 0, dtype=torch.long, device=device)
    if args.continue_from is not None:
        heard, prefix = load_prefix(args.continue_from, codec, lm, device)
    if not args.keep_prefix:
        heard = heard[:0]
    seeds = range(args.seed, args.seed + args.num_samples * args.best_of)
    wanted = [(prompt, seed) for prompt in args.prompt for seed in seeds]
    frames = max(1, round(args.seconds * codec.cfg.frame_rate))
    n = max(1, batch_size(lm, device) // args.best_of) * args.best_of
    batches = [wanted[i : i + n] for i in range(0, len(wanted), n)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what `finally` says
    clips, began = [], D.now(device)
    try:
        for batch in batches:
            texts = [prompt for prompt, _ in batch] + [args.negative] * len(batch)
            text, negative = tokenizer.batch(texts, lm.cfg.max_text_len).to(device).chunk(2)
            before = prefix.expand(len(batch), -1, -1)  # (B, K, P)
            drawn = [seed for _, seed in batch]
            blocks = lm.generate_stream(text, frames, drawn, negative=negative, prefix=before, **options)
            blocks = with_progress(blocks, frames)
            if args.stream:
                waves = [write_stream(decode_after(codec, heard, prefix, blocks), args.stream)]
            else:
                codes = torch.cat(list(blocks), 2)  # (B, K, F)
                if args.best_of > 1:
                    evidence = lm.text_evidence(text, torch.cat((before, codes), 2), negative)
                    groups = enumerate(evidence.split(args.best_of))  # the candidates of each sound
                    best = [i * args.best_of + int(group.argmax()) for i, group in groups]
                    batch, codes = [batch[i] for i in best], codes[best]
                parts = (decode_after(codec, heard, prefix, one[None].split(500, 2)) for one in codes)
                waves = (torch.cat([piece.cpu() for piece in pieces], 1)[0] for pieces in parts)
            for (prompt, seed), wave in zip(batch, waves):
                path = save_new(wave, args.out, prompt, seed)
                clips.append((prompt, f"seed {seed}, {settings}", wave))
                say(f"\n{prompt} (seed {seed})\n{in_characters(wave)}\n{path}")
    finally:  # of what is done, even if the rest has failed
        index = os.path.join(args.out, "index.html")
        if clips:
            title = "nanoAudioGen: " + ", ".join(dict.fromkeys(prompt for prompt, _, _ in clips))[:80]
            D.write_atomic(page(title, clips).encode(errors="replace"), index)
    spent, seconds = D.now(device) - began, frames / codec.cfg.frame_rate * len(clips)
    say(
        f"\n{seconds:.1f} s of sound in {spent:.1f} s, {seconds / spent:.1f} x real time, "
        f"{1000 * spent / frames / len(batches):.1f} ms per frame; page of these: {index}"
    )


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
