"""
Sound and words for AudioGen (Kreuk et al., "AudioGen: Textually Guided Audio Generation", arXiv 2209.15352).

Audio is read and resampled, its captions found, all of it prepared once into a memory map, and random crops
drawn from that, mixed in pairs (section 4). A source is 'world' (built in), a folder, or a table:
    folder     clip.wav + clip.txt (one caption a line), class folders (dog_bark/1.wav), or a metadata.csv
    .csv .tsv  ESC-50, Clotho, FSD50K, AudioCaps, ..., or any table with a column of files and one of captions
    .json(l)   the same as objects, also gzipped; AudioCraft manifests with their .json beside each sound
"""
import argparse
import contextlib
import csv
import datetime
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import sentencepiece
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

SAMPLE_RATE = 16000
SILENCE = 1e-3  # a crop whose peak is below this (-60 dB of full scale) teaches nothing but silence

# ----------------------------------------------------------------------------------------------------------
# Reading audio: any rate and channel count in, 16 kHz mono out, block by block.
ZEROS = 45  # zero crossings of the sinc on either side: flat to .9 of the lower Nyquist, -70 dB from 1.0 on
BETA = 6.76  # Kaiser's window for 70 dB

@functools.lru_cache(maxsize=16)
def sinc_bank(orig: int, new: int) -> tuple[torch.Tensor, int]:
    """Windowed sincs (new, 1, taps) for `new` outputs from `orig` samples; they begin `half` before these."""
    slow = min(1.0, new / orig)  # the lower of the two rates decides where to cut
    half = math.ceil(ZEROS / slow)
    phase = torch.arange(new)
    tap = (phase * orig // new)[:, None] + torch.arange(-half, half + 1)  # the samples around each output
    t = tap - (phase * orig).double()[:, None] / new
    window = torch.i0(BETA * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / float(np.i0(BETA))
    filters = 0.95 * slow * torch.sinc(0.95 * slow * t) * window * (t.abs() < half)
    bank = torch.zeros(new, orig + 2 * half).scatter_(1, tap + half, filters.float())
    return bank[:, None], half

def resample_blocks(blocks: Iterable[torch.Tensor], rate_in: int, rate_out: int) -> Iterator[torch.Tensor]:
    """Resample a stream of blocks (B, T) to ceil(T * rate_out / rate_in) samples, however it is cut."""
    for rate in (rate_in, rate_out):
        if not 1000 <= rate <= 768000:
            raise ValueError(f"a sample rate of {rate} Hz; expected 1000 to 768000, is the header damaged?")
    if rate_in == rate_out:
        yield from blocks
        return
    # Exact for the usual rates, and to a tenth of a cent for odd ones such as 44101 Hz.
    new, orig = Fraction(rate_out, rate_in).limit_denominator(2500).as_integer_ratio()
    bank, half = sinc_bank(orig, new)
    buffer: torch.Tensor | None = None
    seen = made = 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            buffer = F.pad(block, (half, 0)) if buffer is None else torch.cat([buffer, block], 1)
            seen += block.shape[1]
        elif buffer is not None:  # the end: silence, until no filter lacks a sample
            buffer = F.pad(buffer, (0, bank.shape[-1]))
        if buffer is not None and buffer.shape[1] >= bank.shape[-1]:
            frames = F.conv1d(buffer[:, None], bank.to(buffer), stride=orig)  # (B, new, frames)
            buffer = buffer[:, frames.shape[2] * orig :]  # what the next block still needs
            missing = -(-seen * rate_out // rate_in) - made  # rounded up
            made += min(missing, frames[0].numel())
            yield frames.transpose(1, 2).flatten(1)[:, :missing]

def resample(x: torch.Tensor, rate_in: int, rate_out: int) -> torch.Tensor:
    """Windowed-sinc resampling of float audio (T,) or (B, T); T becomes ceil(T * rate_out / rate_in)."""
    rows = x if x.dim() == 2 else x[None]
    y = torch.cat([rows[:, :0], *resample_blocks([rows], rate_in, rate_out)], 1)
    return y if x.dim() == 2 else y[0]

def read_blocks(path: str) -> Iterator[torch.Tensor]:
    """The sound in `path` as float32 blocks (T,) at 16 kHz mono. ValueError: it cannot be decoded."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; check its path, or where the table lies")
    def decoded(file):  # by a fixed size, for a header may lie about its length
        while len(block := file.read(2**21 // file.channels, dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                raise ValueError("contains NaN or infinite samples")
            yield torch.from_numpy(block.mean(1, dtype=np.float32))[None]  # (1, T)

    try:
        with soundfile.SoundFile(path) as file:
            if file.frames == 0:
                raise ValueError("holds no samples")
            for block in resample_blocks(decoded(file), file.samplerate, SAMPLE_RATE):
                yield block[0]
    except (RuntimeError, TypeError, ValueError, OSError) as error:  # libsndfile raises RuntimeErrors
        why = " ".join(str(error).replace(f"Error opening {path!r}: ", "").split())
        raise ValueError(f"{path}: cannot be read ({why}); export it again as WAV, FLAC or OGG") from None

def load_audio(path: str) -> torch.Tensor:
    """The sound in `path`, whatever its rate and channels: (T,) float32, 16 kHz. Errors: `read_blocks`."""
    return torch.cat(list(read_blocks(path)))

def wav_bytes(wave: torch.Tensor) -> bytes:
    """A WAV file of 16 bits that holds wave (T,). Louder than full scale it is turned down, not clipped."""
    samples, buffer = (wave.float() / wave.abs().max().clamp(min=1)).cpu().numpy(), io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()

def save_wav(wave: torch.Tensor, path: str):
    with open(path, "wb") as file:  # says what is wrong with a disk, which libsndfile does not
        file.write(wav_bytes(wave))

# ----------------------------------------------------------------------------------------------------------
# Captions. Data sets agree on nothing: we look for a column that can name a file and for columns of words.
AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
PATHS = ["path", "file_name", "filename", "file", "audio", "audio_path", "audio_file", "wav", "location",
         "fname", "slice_file_name", "youtube_id", "ytid", "audiocap_id", "id"]
WORDS = re.compile(r"(raw_)?(captions?|text|description|sentence|prompt)(_?\d+)?")
TAGS = ["category", "class_name", "class", "labels", "label", "tags", "keywords"]
TRAIN = {"train", "training", "dev", "development"}
VAL = {"val", "valid", "validation", "test", "eval", "evaluation"}

@dataclass
class Entry:
    path: str
    captions: list[str]
    split: str  # 'train', 'val', or '': not said

def split_named(name: str) -> str:
    return "val" if name.lower() in VAL else "train" if name.lower() in TRAIN else ""

def pseudo_sentence(tags: str | list) -> str:
    """The paper's sentence of tags: 'dog, bark, park' -> 'dog bark park', '001 - Dog_bark' -> 'dog bark'."""
    tags = tags if isinstance(tags, list) else [tags]
    return " ".join(re.sub(r"[^\w']|[\d_]", " ", " ".join(map(str, tags))).lower().split())

def row_captions(row: dict) -> list[str]:
    """Every caption in a row, as written; if it has none, the first column of tags that contains a word."""
    cells = [row[key] for key in row if WORDS.fullmatch(key)]
    texts = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    captions = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    tags = [sentence for key in TAGS if (sentence := pseudo_sentence(row.get(key) or ""))]
    return captions or tags[:1]

def read_rows(path: str) -> Iterator[dict]:
    """Rows of a CSV, TSV, JSON or JSON-lines file as dictionaries, lower-case keys. ValueError: not one."""
    rows: Iterable[dict]
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
        if not re.search(r"\.jsonl?(\.gz)?$", path.lower()):
            delimiter = max(",\t;", key=text.split("\n")[0].count)
            rows = csv.DictReader(io.StringIO(text, ""), delimiter=delimiter)
        else:
            try:
                rows = json.loads(text)
            except json.JSONDecodeError:  # one object a line, then
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if isinstance(rows, dict):  # {"data": [{...}, ...]}, or a single object
                rows = rows.get("data", [rows])
        for row in rows:
            yield {re.sub("[ -]", "_", str(key).strip().lower()): row[key] for key in row if key}
    except (csv.Error, TypeError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as why:
        raise ValueError(f"{path}: cannot read this table ({why}); export it again as UTF-8 text") from None

def stem(name: str) -> str:
    """A name without its audio extension, if it has one: the ids of videos may contain dots, too."""
    return os.path.splitext(name)[0] if os.path.splitext(name)[1].lower() in AUDIO else name

def audio_below(folder: str) -> dict[str, list[str]]:
    """The sounds in and below a folder by their names without extension; never those of a whole disk."""
    found: dict[str, list[str]] = {}
    for where, _, names in os.walk(folder) if folder != os.path.dirname(folder) else []:
        for name in names:
            if stem(name) != name:
                found.setdefault(stem(name), []).append(os.path.join(where, name))
    return found

def find(names: list[str], root: str, index: Callable) -> str:
    """The file that a table in `root` means: where it says, or below `root` or the folder around that."""
    for name in names:
        if os.path.isfile(path := os.path.join(root, name)):
            return path
    for folder in (root, os.path.dirname(root)):
        for name in names:
            if hits := index(folder).get(stem(os.path.basename(name))):
                # Of several, the one whose folders agree with the table's for longest.
                return max(sorted(hits), key=lambda hit: len(os.path.commonprefix([hit[::-1], name[::-1]])))
    return os.path.join(root, names[0])  # it does not exist: whoever opens it will say so

def folder_rows(folder: str) -> Iterator[dict]:
    """A folder as the rows of a table: the lines of a .txt beside each sound or else its class."""
    for path in sorted(itertools.chain(*audio_below(folder).values())):
        *parts, _ = os.path.relpath(path, folder).split(os.sep)
        row: dict = {"path": path, "split": parts[0] if parts and split_named(parts[0]) else None}
        try:
            with open(stem(path) + ".txt", encoding="utf-8-sig") as file:
                row["captions"] = list(file)
        except FileNotFoundError:  # the deepest folder names the class, unless it names the split
            row["class"] = [part for part in parts if not split_named(part)][-1:]
        except UnicodeDecodeError:
            pass  # counted with the rows that have no caption
        yield row

def read_entries(source: str, log: Callable = print) -> list[Entry]:
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: does not exist; --data takes 'world', a folder or a table")
    tables = [os.path.join(source, f"metadata.{kind}") for kind in ("csv", "jsonl", "tsv")]
    table = source if os.path.isfile(source) else next(filter(os.path.isfile, tables), None)
    rows = list(read_rows(table) if table else folder_rows(os.path.abspath(source)))
    root = os.path.dirname(os.path.abspath(table or source))
    index = functools.cache(audio_below)  # walks a folder once, if need be
    entries: dict[str, Entry] = {}
    used = 0
    for row in rows:
        cells = [str(row[key]).strip().replace("\\", "/") for key in PATHS if row.get(key)]
        names = [name for cell in cells if cell for name in (cell, "Y" + cell)]  # as AudioCaps does it
        path, captions = find(names, root, index) if names else "", row_captions(row)
        if not captions and os.path.isfile(beside := stem(path) + ".json"):  # AudioCraft
            with contextlib.suppress(ValueError):  # counted with the rows that have no caption
                captions = [text for words in read_rows(beside) for text in row_captions(words)]
        if names and captions:
            split = str(row.get("split") or row.get("fold") or "").strip()
            entry = entries.setdefault(path, Entry(path, [], split))  # several rows may caption one file
            entry.captions = list(dict.fromkeys(entry.captions + captions))
            used += 1
    if not entries:
        columns = ", ".join(dict.fromkeys(key for row in rows for key in row)) or "none"
        raise ValueError(f"{source}: no usable row among {len(rows)}, columns {columns}; expected files "
                         "(path, ...) and words (caption, category, ...), or clip.wav beside clip.txt")
    if used < len(rows):
        log(f"{source}: skipped {len(rows) - used} of {len(rows)}: no file, or no caption in UTF-8")
    folds = {entry.split for entry in entries.values() if entry.split.isdecimal()}
    last = max(folds, key=int) if len(folds) > 1 else None  # as with ESC-50, the last fold validates
    for entry in entries.values():
        entry.split = "val" if entry.split == last else split_named(entry.split)
    return list(entries.values())

def read_captions(source: str) -> list[tuple[str, list[str]]]:
    """[(path, [caption, ...]), ...] of a folder or table; a path need not exist."""
    return [(entry.path, entry.captions) for entry in read_entries(source)]

# ----------------------------------------------------------------------------------------------------------
# The sound world: nineteen sources, put together from noise, tones and struck resonances. A source is a
# function of (rng, n, high, fast): n samples, pitch and speed as factors around 1. New ones go into SOURCES.

def noise(rng, n, low, high):
    """Noise between two frequencies, unit power."""
    f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE) + 1e-3
    x = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) / (1 + (low / f) ** 4) / (1 + (f / high) ** 4), n)
    return x / (x.std() + 1e-9)
def drift(rng, n, rate):
    """A smooth random curve between 0 and 1 that turns about `rate` times a second."""
    points = rng.random(int(n / SAMPLE_RATE * rate) + 3)
    where = np.linspace(0, len(points) - 1.001, n)
    k = where.astype(int)
    return points[k] + (points[k + 1] - points[k]) * (1 - np.cos(np.pi * (where - k))) / 2
def tone(f, weights, n):
    """A harmonic tone of frequency f, a number or a curve (n,), without what 16 kHz audio cannot hold."""
    f = np.broadcast_to(f, n)
    phase = 2 * np.pi * np.cumsum(f) / SAMPLE_RATE
    return sum(w * np.sin(k * phase) * (k * f < 7500) for k, w in enumerate(weights, 1))
def ring(modes, seconds=0.5):
    """What a struck thing does: decaying sinusoids, modes = [(Hz, decay in seconds, amplitude), ...]."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return sum(a * np.exp(-t / decay) * np.sin(2 * np.pi * f * t) for f, decay, a in modes)
def puff(rng, seconds, low, high):
    """A short burst of noise that decays within `seconds`."""
    n = int(seconds * SAMPLE_RATE)
    return noise(rng, n, low, high) * np.exp(-np.arange(n) * 5 / n)
def every(rng, n, rate, jitter=0.0):
    """Times in samples of events that come `rate` times a second, each off by a share of the interval."""
    at = (np.arange(0.1 + 0.3 * rng.random(), n / SAMPLE_RATE * rate) + jitter * rng.standard_normal()) / rate
    return np.clip((at + jitter / rate * rng.standard_normal(len(at))) * SAMPLE_RATE, 0, n - 1).astype(int)
def anywhen(rng, n, rate):
    """Times in samples of events that know nothing of each other, such as drops of rain."""
    return rng.integers(0, n, 1 + rng.poisson(rate * n / SAMPLE_RATE))
def place(n, at, loud, grain):
    """The sound `grain` at each of the times `at`: one convolution, however many there are."""
    x = np.zeros(n)
    np.add.at(x, at, loud)
    size = 2 ** math.ceil(math.log2(n + len(grain)))
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(grain, size), size)[:n]
def gate(n, rate, share, edge=0.005):
    """On and off `rate` times a second, on for `share` of the time, with soft edges (in seconds)."""
    phase = np.arange(n) / SAMPLE_RATE * rate % 1 / rate
    return np.clip(np.minimum(phase, share / rate - phase) / edge, 0, 1)
def voice(f0, seconds, formants, rng):
    """A throat: pulses at f0 = (from, to) Hz through resonances [(Hz, strength), ...], with some breath."""
    n = int(seconds * SAMPLE_RATE)
    x = tone(np.linspace(*f0, n), 1 / np.arange(1, 25), n) + 0.1 * rng.standard_normal(n)
    f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    shape = 0.05 + sum(a / (1 + ((f - centre) / (60 + 0.1 * centre)) ** 2) for centre, a in formants)
    return np.fft.irfft(np.fft.rfft(x) * shape, n) * np.sin(np.pi * np.linspace(0, 1, n) ** 0.6) ** 0.7

# Nature.
def rain(rng, n, high, fast):
    drops = sum(place(n, at := anywhen(rng, n, 30), rng.random(len(at)), ring([(f, 0.003, 1)], 0.03))
                for f in rng.uniform(1500, 5500, 6))
    return noise(rng, n, 600, 6000) * (0.7 + 0.3 * drift(rng, n, 1)) + 3 * drops
def wind(rng, n, high, fast):
    bands = [(120, 350, 1), (250, 600, 0.8), (450, 900, 0.6), (700, 1300, 0.5)]
    return sum(a * noise(rng, n, low * high, top * high) * drift(rng, n, 0.8) ** 3 for low, top, a in bands)
def thunder(rng, n, high, fast):
    start = int(n * rng.uniform(0.02, 0.15))
    t = np.maximum(np.arange(n) - start, 0) / SAMPLE_RATE
    rumble = noise(rng, n, 35, 160) * np.exp(-t / 1.3) * (0.2 + drift(rng, n, 7)) * (1 - np.exp(-t / 0.08))
    at = np.minimum(start + (rng.random(12) * 0.35 * SAMPLE_RATE).astype(int), n - 1)
    return 4 * rumble + 0.4 * place(n, at, rng.random(12), puff(rng, 0.5, 80, 1500))
def waves(rng, n, high, fast):
    swell = (0.5 + 0.5 * np.sin(2 * np.pi * (np.arange(n) / SAMPLE_RATE * 0.35 * fast + rng.random()))) ** 2
    foam = noise(rng, n, 900, 5000) * np.roll(swell, n // 25) ** 3
    return noise(rng, n, 80, 700) * (0.1 + swell) + 0.8 * foam
def fire(rng, n, high, fast):
    cracks = sum(place(n, at := anywhen(rng, n, 5), rng.exponential(1, len(at)), puff(rng, 0.012, low, 6000))
                 for low in (500, 1000, 1500, 2500))
    return cracks + 0.5 * noise(rng, n, 60, 400) * (0.3 + drift(rng, n, 6))
def bird(rng, n, high, fast):
    x, m = np.zeros(n), int(0.09 * SAMPLE_RATE)
    for start in every(rng, n, 1.1 * fast, 0.1):
        low, bend = rng.uniform(2600, 3200) * high, rng.uniform(0.15, 0.5)
        chirp = tone(low * (1 + bend * np.sin(np.linspace(0, np.pi, m) ** 1.3)), [1, 0.15], m) * np.hanning(m)
        at = start + np.arange(rng.integers(2, 5)) * int(0.12 / fast * SAMPLE_RATE)
        x += place(n, at[at < n], 1.0, chirp)
    return x
def cricket(rng, n, high, fast):
    return tone(4200 * high**0.7, [1], n) * gate(n, 34, 0.6, 0.006) * gate(n, 2.4 * fast, 0.45)
def dog(rng, n, high, fast):
    bark = voice((520 * high, 300 * high), 0.2, [(750, 1), (1300, 0.8), (2600, 0.4)], rng)
    return place(n, at := every(rng, n, 1.5 * fast, 0.08), rng.uniform(0.7, 1, len(at)), bark)
def frog(rng, n, high, fast):
    croak = voice((95 * high, 80 * high), 0.35, [(500 * high, 0.7), (1300 * high, 1), (2100, 0.3)], rng)
    croak *= gate(len(croak), 28, 0.7)
    return place(n, at := every(rng, n, 1.1 * fast, 0.06), rng.uniform(0.7, 1, len(at)), croak)

# Things.
def siren(rng, n, high, fast):
    wail = np.sin(2 * np.pi * (np.arange(n) / SAMPLE_RATE * 0.4 * fast + rng.random()))
    return tone(750 * high * 2 ** (0.55 * wail), [1, 0.5, 0.35, 0.15, 0.1], n)
def alarm(rng, n, high, fast):
    return tone(1100 * high, [1, 0, 0.4, 0, 0.2], n) * gate(n, 2 * fast, 0.5)
def phone(rng, n, high, fast):
    clapper = gate(n, 20, 0.5, 0.008)  # swings between two bells
    trill = tone(1250 * high, [1, 0.3], n) * clapper + tone(1560 * high, [1, 0.3], n) * (1 - clapper)
    return trill * gate(n, 0.55, 0.6, 0.02)
def engine(rng, n, high, fast):
    f = 42 * high * (1 + 0.06 * (drift(rng, n, 2) - 0.5))
    weights = rng.uniform(0.3, 1, 24) / np.arange(1, 25) ** 0.6
    return tone(f, weights, n) + 0.5 * noise(rng, n, 100, 1500) * (1 + 0.8 * tone(f, [1], n))
def helicopter(rng, n, high, fast):
    chop = np.exp(-(np.arange(n) / SAMPLE_RATE * 11 * fast % 1) * 4)
    thump = place(n, every(rng, n, 11 * fast), 1.0, ring([(70, 0.02, 1), (110, 0.015, 0.6)], 0.15))
    return noise(rng, n, 80, 900) * chop + 2 * thump
def clock(rng, n, high, fast):
    at = every(rng, n, 2 * fast)
    tick, tock = (ring([(f, 0.006, 1), (1.8 * f, 0.004, 0.6)], 0.06) for f in (2900, 2300))
    return place(n, at[::2], 1.0, tick) + place(n, at[1::2], 0.8, tock)
def bell(rng, n, high, fast):
    partials = [(0.5, 1.2, 0.4), (1, 0.9, 1), (1.2, 0.7, 0.6), (1.5, 0.5, 0.4), (2, 0.5, 1), (2.7, 0.3, 0.4)]
    strike = ring([(520 * high * f, decay, a) for f, decay, a in partials], 3)
    return place(n, at := every(rng, n, 0.9 * fast, 0.02), rng.uniform(0.8, 1, len(at)), strike)
def knocking(rng, n, high, fast):
    at = (every(rng, n, 0.6, 0.05)[:, None] + np.arange(3) * int(SAMPLE_RATE / 4 / fast)).ravel()
    knock = ring([(170, 0.03, 1), (330, 0.025, 0.8), (620, 0.015, 0.5), (1400, 0.004, 0.5)], 0.25)
    return place(n, (at := at[at < n]), rng.uniform(0.7, 1, len(at)), knock)
def footsteps(rng, n, high, fast):
    at, heel = every(rng, n, 1.8 * fast, 0.05), ring([(95, 0.03, 1), (170, 0.02, 0.7), (420, 0.01, 0.4)], 0.2)
    left, right = (place(n, at[foot::2], 0.25, puff(rng, 0.07, 400, 3000)) for foot in (0, 1))
    return place(n, at, rng.uniform(0.8, 1, len(at)), heel) + left + 0.8 * right
def whistle(rng, n, high, fast):
    trill = 2300 * high * (1 + 0.03 * np.sin(2 * np.pi * 28 * np.arange(n) / SAMPLE_RATE))
    return (tone(trill, [1, 0.1], n) + 0.05 * noise(rng, n, 1500, 6000)) * gate(n, 0.9 * fast, 0.6, 0.03)

SOURCES = {  # name: (function, article, verb, the attributes that change it)
    "rain": (rain, "", "falls", ""), "wind": (wind, "", "blows", "pitch"),
    "thunder": (thunder, "", "rumbles", ""), "waves": (waves, "", "roll in", "rate"),
    "fire": (fire, "a", "crackles", ""), "bird": (bird, "a", "chirps", "pitch rate"),
    "cricket": (cricket, "a", "chirps", "pitch rate"), "dog": (dog, "a", "barks", "pitch rate"),
    "frog": (frog, "a", "croaks", "pitch rate"), "siren": (siren, "a", "wails", "pitch rate"),
    "alarm": (alarm, "a", "beeps", "pitch rate"), "phone": (phone, "a", "rings", "pitch"),
    "engine": (engine, "a", "runs", "pitch"), "helicopter": (helicopter, "a", "flies", "rate"),
    "clock": (clock, "a", "ticks", "rate"), "bell": (bell, "a", "rings", "pitch rate"),
    "knocking": (knocking, "", "is heard", "rate"), "footsteps": (footsteps, "", "pass", "rate"),
    "whistle": (whistle, "a", "blows", "pitch rate"),
}

# Training never hears these two together: a model that can play them has learnt to compose.
HELD_OUT_PAIRS = [{"siren", "rain"}, {"dog", "clock"}, {"bell", "wind"}, {"bird", "engine"},
                  {"footsteps", "fire"}, {"alarm", "waves"}, {"frog", "thunder"}, {"phone", "helicopter"}]

def is_held_out(caption: str) -> bool:
    return any(pair <= set(re.findall(r"[a-z]+", caption)) for pair in HELD_OUT_PAIRS)

def phrase(name: str, *attributes: str | None) -> str:
    """A source and what is said of it: 'a fast high siren', 'an alarm', 'slow footsteps'."""
    words = " ".join(word for word in (*attributes, name) if word)
    return f"{SOURCES[name][1] and ('an' if words[0] in 'aeiou' else 'a')} {words}".strip()

def synth(name: str, rng, seconds: float = 5.0, pitch=None, rate=None, distance=None) -> np.ndarray:
    """One source, float32 (T,): pitch 'high' or 'low', rate 'fast' or 'slow', distance 'near' or 'far'."""
    n = int(seconds * SAMPLE_RATE)
    factors = {"low": 0.6, "high": 1.6, "slow": 0.55, "fast": 1.9, None: 1.0}
    high, fast = (factors[word] * rng.uniform(0.93, 1.07) for word in (pitch, rate))
    x = SOURCES[name][0](rng, n, high, fast)
    if distance == "far":  # air takes the treble and the walls give an echo
        echo, f = 0.03 * puff(rng, 0.9, 50, 8000), np.fft.rfftfreq(2 * n, 1 / SAMPLE_RATE)
        echo[0] = 1
        x = np.fft.irfft(np.fft.rfft(x, 2 * n) * np.fft.rfft(echo, 2 * n) / (1 + (f / 1000) ** 2))[:n]
    edge = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * SAMPLE_RATE))
    level = {"near": 0.9, None: 0.45, "far": 0.12}[distance] / max(np.abs(x).max(), 4 * x.std(), 1e-9)
    return (x * edge * level).astype(np.float32)

def make_world(n: int, seconds: float = 5.0, seed: int = 0) -> Iterator[tuple[np.ndarray, str, str]]:
    """Yield n times (wave (T,) float32, caption, split): one source, or two together or in turn."""
    for i in range(n):
        rng = np.random.default_rng([seed, i])  # a clip does not depend on how many come before it
        held, pick = i % 24 == 23, lambda items, rng=rng: items[rng.integers(len(items))]
        pool = sorted(pick(HELD_OUT_PAIRS)) if held else list(SOURCES)
        names = rng.permutation(pool)[: 2 if held or rng.random() < 0.5 else 1].tolist()
        if set(names) in HELD_OUT_PAIRS and not held:
            names.pop()
        how = pick([" and ", " while ", ", then ", " followed by "]) if len(names) == 2 else ""
        length = seconds / 2 if how in (", then ", " followed by ") else seconds
        sounds, phrases = [], []
        for name in names:
            _, _, verb, follows = SOURCES[name]
            pitch = pick([None, "high", "low"]) if "pitch" in follows else None
            rate = pick([None, "fast", "slow"]) if "rate" in follows else None
            distance, behind = pick([None, None, "near", "far"]), rng.random() < 0.4
            sounds.append(synth(name, rng, length, pitch, rate, distance))
            words = phrase(name, None if behind else distance, rate, pitch)
            if how == " while " or (how != " followed by " and rng.random() < 0.5):
                words += f" {verb}"
            phrases.append(words + {"far": " far away", "near": " close by"}.get(distance, "") * behind)
        wave = sum(sounds) if length == seconds else np.concatenate(sounds)
        yield wave / max(1, np.abs(wave).max()), how.join(phrases), "val" if i % 6 == 5 else "train"

# ----------------------------------------------------------------------------------------------------------
# Preparation: decode everything once into one file of int16 that training maps into memory, and an index.
FORMAT = 4  # raise it when what is written changes, the sound world included, and everything is prepared anew
WORLD_NAME = re.compile(r"world/\d{4}")  # of its clips, which are no files
WORLD_CLIPS = 720  # an hour of 5 s clips: 600 to train on and 120 to validate on, 30 of these held-out pairs

def prepare(source: str, folder: str, seed: int = 0, log: Callable = print) -> SimpleNamespace:
    """Decode `source` into `folder`, unless that was done and nothing changed since; report what it holds.
    Returns `audio`, the samples of all clips in a row, and length, name, captions, split and peak of each."""
    entries = [] if source == "world" else read_entries(source, log)
    stats = [os.stat(entry.path) if os.path.exists(entry.path) else None for entry in entries]
    state = FORMAT, seed, entries, [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
    name, digest = os.path.basename(os.path.abspath(source)), hashlib.sha256(ascii(state).encode())
    final = os.path.join(folder, f"{name.split('.')[0][:40]}-{digest.hexdigest()[:12]}")
    if not os.path.exists(final):
        for stale in glob.glob(glob.escape(folder) + "/*.part-*"):  # whoever still writes one holds its lock
            with contextlib.suppress(OSError):
                lock_folder(stale).close()
                shutil.rmtree(stale)
        part, began = f"{final}.part-{os.getpid()}", time.time()
        try:
            with lock_folder(part), open(f"{part}/audio.i16", "wb") as audio:
                index = decode_all(entries, audio, source, seed)
            with open(f"{part}/index.json", "wb") as file:
                text = json.dumps(index).encode()
                file.write(b"%08x\n" % zlib.crc32(text) + text)
            if not os.path.exists(final):  # else another process was faster
                os.rename(part, final)
            with contextlib.suppress(ImportError):  # not on Windows
                import resource

                unit = 1e6 if sys.platform == "darwin" else 1e3
                most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
                log(f"{source}: prepared in {time.time() - began:.0f} s, {most:.0f} MB of memory at most")
        except OSError as error:
            raise OSError(f"{folder}: {error.strerror or error}; make space or use another --out") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    try:
        with open(f"{final}/index.json", "rb") as file:
            checksum, _, text = file.read().partition(b"\n")
        if checksum != b"%08x" % zlib.crc32(text):
            raise ValueError("index.json is not as it was written")
        index = json.loads(text)
        if os.path.getsize(f"{final}/audio.i16") != 2 * sum(index["length"]):
            raise ValueError("audio.i16 is not as long as its clips")
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{final}: was damaged; delete this folder, and it is prepared anew") from None
    log("\n".join(index["report"]))
    index |= {key: np.array(index[key]) for key in ("length", "split")}
    samples = np.asarray(np.memmap(f"{final}/audio.i16", np.int16, "r"))
    return SimpleNamespace(name=os.path.basename(final), audio=samples, **index)

def decode_all(entries: list[Entry], audio, source: str, seed: int) -> dict:
    """Write every clip to the open file `audio`; return the index, with the report that `prepare` prints."""
    sounds: Iterable[tuple[Entry, Iterable[torch.Tensor]]]
    sounds = ((entry, read_blocks(entry.path)) for entry in entries)
    if source == "world":
        sounds = ((Entry(f"world/{i:04d}", [caption], split), [torch.from_numpy(wave)])
                  for i, (wave, caption, split) in enumerate(make_world(WORLD_CLIPS, seed=seed)))
    total, root = len(entries) or WORLD_CLIPS, os.path.dirname(os.path.abspath(source))
    clips, skipped = [], []
    for entry, blocks in tqdm(sounds, f"preparing {source}", total, unit="clip", disable=None):
        begin, peak = audio.tell(), 0
        try:
            for block in blocks:
                peak = max(peak, block.abs().max().item())
                audio.write((block.clamp(-1, 1) * 32767).round().short().numpy())
            if peak < SILENCE:
                raise ValueError(f"{entry.path}: silent")
            name, length = os.path.relpath(entry.path, root), (audio.tell() - begin) // 2
            clips.append((length, name, entry.captions, entry.split, min(1, peak)))
        except (ValueError, FileNotFoundError) as error:  # a full disk is neither: it ends the loop
            skipped.append(str(error))
            audio.truncate(audio.seek(begin))
    n = len(clips)
    if n == 0:
        raise ValueError(f"{source}: none of its {total} sounds can be used; the first: {skipped[0]}")
    index = dict(zip(("length", "names", "captions", "split", "peak"), map(list, zip(*clips))))
    val = {i for i in range(n) if index["split"][i] == "val"}
    if len(val) in (0, n):  # the source does not say what validates: a tenth, drawn by name
        lot = [hashlib.sha256(ascii((seed, name)).encode()).digest() for name in index["names"]]
        val = set(sorted(range(n), key=lot.__getitem__)[: max(1, round(n / 10))])
    index["split"] = ["both"] if n == 1 else ["val" if i in val else "train" for i in range(n)]
    length, count = np.sort(index["length"]) / SAMPLE_RATE, index["split"].count
    distinct = {caption for captions in index["captions"] for caption in captions}
    report = [(
        f"{source}: {length.sum() / 3600:.2f} hours, {n} clips ({count('train')} train, {count('val')} val"
        f"{', its only clip is both' * (n == 1)}), {len(distinct)} distinct captions, "
        f"{length[0]:.1f} / {length[n // 2]:.1f} / {length[-1]:.1f} s shortest / median / longest")]
    return index | {"report": report + [f"  left out {line}" for line in skipped]}

# ----------------------------------------------------------------------------------------------------------
# What training reads.

def mix(a: torch.Tensor, b: torch.Tensor, snr_db: float, offset: int) -> torch.Tensor:
    """Lay b over a, `offset` samples later (or earlier), scaled so that a's mean power is snr_db above b's.
    What b has before and after a is cut off; a sum beyond [-1, 1] is turned down (section 4)."""
    power_a, power_b = a.square().mean(), b.square().mean()
    if power_a > 0 and power_b > 0:  # silence has no SNR
        b = b * (power_a / power_b * 10 ** (-snr_db / 10)).sqrt()
    y, start, end = a.clone(), max(0, offset), min(len(a), offset + len(b))
    if end > start:
        y[start:end] += b[start - offset : end - offset]
    return y / y.abs().max().clamp(min=1)

class AudioData:
    """Sources as one. Of 'a.csv:2' and 'b.csv' the first is drawn twice as often, else each by its length."""
    def __init__(self, sources: list[str], folder: str, seed: int = 0, log: Callable = print):
        weights, parts = [], []
        for source in sources:
            match = re.fullmatch(r"(.+):(?=[\d.]*[1-9])(\d*\.?\d+)", source)  # a weight, and not zero
            weights.append(float(match[2]) if match else None)
            parts.append(prepare(match[1] if match else source, folder, seed, log))
        seconds = [part.length.sum() / SAMPLE_RATE for part in parts]
        self.key = hashlib.sha256(ascii([part.name for part in parts]).encode()).hexdigest()[:12]
        shares = [w or 1.0 for w in weights] if any(weights) else seconds
        # All clips in one row, those of each split, and the cumulative chance to be drawn for training: by
        # weight, then by length.
        self.sounds = [x for part in parts for x in np.split(part.audio, np.cumsum(part.length)[:-1])]
        self.names = [name for part in parts for name in part.names]
        self.words = [captions for part in parts for captions in part.captions]
        self.peaks = [peak for part in parts for peak in part.peak]
        splits = np.concatenate([part.split for part in parts])
        self.order = {name: np.flatnonzero(np.isin(splits, (name, "both"))) for name in ("train", "val")}
        sizes = [np.isin(part.split, ("train", "both")) * part.length for part in parts]
        chance = np.concatenate([w * size / size.sum() for w, size in zip(shares, sizes)])
        self.chance = np.cumsum(chance[self.order["train"]] / sum(shares))

    def read(self, k: int, length: int, begin: int = 0) -> torch.Tensor:
        """(length,) float32 of clip k from sample `begin` on; zeros lie before and after it."""
        sound, front = self.sounds[k][max(0, begin) : max(0, begin + length)], min(length, max(0, -begin))
        wave = np.pad(sound, (front, length - front - len(sound)))
        return torch.from_numpy(wave.astype(np.float32)).div_(32767)

    def draw(self, rng, length, loud=0.0, but=-1) -> tuple[int, int, torch.Tensor, str]:
        """A training clip by weight and length, where a random crop of it begins, the crop, a caption. If it
        can be helped, it is neither `but`, nor silent, nor below `loud` times the clip's peak."""
        for _ in range(20):
            k = np.searchsorted(self.chance[:-1], rng.random(), "right")  # the last takes what is left
            k = int(self.order["train"][k])
            spare = len(self.sounds[k]) - length
            begin = int(np.sign(spare) * rng.integers(abs(spare) + 1))  # a short clip lies anywhere in it
            wave = self.read(k, length, begin)
            if k != but and wave.abs().max() >= max(SILENCE, loud * self.peaks[k]):
                break
        return k, begin, wave, self.words[k][int(rng.integers(len(self.words[k])))]

    def batch(self, n: int, length: int, rng, mix_share: float = 0.0, loud: float = 0.0) -> tuple:
        """(n, length) float32 random crops of training clips, their captions, and of each the clip and the
        sample it begins at. A share is mixed in pairs (section 4). Crops reach `loud` times its peak."""
        waves, captions, places = [], [], []
        for _ in range(n):
            k, begin, wave, words = self.draw(rng, length, loud)
            if rng.random() < mix_share:
                other, _, second, more = self.draw(rng, length, loud, but=k)
                if other != k:
                    offset = int(rng.integers(-(length // 2), length // 2 + 1))  # half overlaps at the least
                    wave, words = mix(wave, second, rng.uniform(-5, 5), offset), f"{words} and {more}"
            waves.append(wave)
            captions.append(words)
            places.append((k, begin))
        return torch.stack(waves), captions, places

    def clips(self, split: str, length: int, limit: int | None = None) -> tuple[torch.Tensor, list, list]:
        """Always the same clips, from their beginning: (n, length) float32, first captions, names. With a
        limit that many of them, evenly spaced."""
        order = self.order[split]
        limit = min(limit or len(order), len(order))
        ks = order[np.arange(limit) * len(order) // limit]
        waves = torch.stack([self.read(k, length) for k in ks])
        return waves, [self.words[k][0] for k in ks], [self.names[k] for k in ks]

class Tokenizer:
    """Words to ids: SentencePiece BPE (its unigrams never grow to whole words on a few captions), lower case,
    bytes for what it has never seen. 0 is padding."""
    def __init__(self, model: bytes | torch.Tensor):
        """model: what `train` made, or the uint8 tensor of `to_tensor`. ValueError if it is damaged."""
        self.model = bytes(model.tolist()) if isinstance(model, torch.Tensor) else model
        # SentencePiece itself may crash, not complain, over damaged bytes: a checksum goes before the model.
        if len(self.model) < 5 or zlib.crc32(self.model[4:]) != int.from_bytes(self.model[:4], "little"):
            raise ValueError("the tokenizer's model is damaged; take the checkpoint from its source again")
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model[4:])
        self.vocab_size, self.encode = self.pieces.vocab_size(), self.pieces.encode

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn about `vocab_size` pieces from captions: fewer if these are few, but always all 256 bytes."""
        lines, out = sorted({" ".join(caption.split())[:1000] for caption in captions}), io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, model_type="bpe", byte_fallback=True,
            vocab_size=max(vocab_size, 300), hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf",
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, num_threads=1, minloglevel=2)
        return cls(zlib.crc32(out.getvalue()).to_bytes(4, "little") + out.getvalue())

    def batch(self, captions: list[str], window: int) -> torch.Tensor:
        """Captions -> (B, window) int64 ids, padded with 0; what is longer than the window is cut."""
        rows = [self.encode(caption)[:window] for caption in captions]
        return torch.tensor([row + [0] * (window - len(row)) for row in rows])

    def to_tensor(self) -> torch.Tensor:
        return torch.tensor(list(self.model), dtype=torch.uint8)

# ----------------------------------------------------------------------------------------------------------
# Manners that the three scripts share. They live here because nothing imports a script.

@contextlib.contextmanager
def one_line_errors():
    """Around main(): what the user can mend ends in one line and exit code 2, a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
            text = ("out of memory; halve --batch (of train_lm.py --micro, of sample.py --num_samples), or "
                    "take a smaller --size")
        elif isinstance(error, RuntimeError):
            raise
        elif isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)

def pick_device(name: str = "auto") -> torch.device:
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' -> a device that exists here. ValueError: it does not."""
    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if "cuda" in there else "cpu"
    if name not in there:
        raise ValueError(f"--device {name}: not a device of this machine; it has {', '.join(there)}")
    return torch.device(name)

def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on processors that multiply it natively (a third faster there), else float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # bool() is False: unknown to PyTorch
    fast = device.type == "cuda" or (device.type == "cpu" and native())
    return torch.bfloat16 if fast else torch.float32

def autocast(device: torch.device) -> torch.autocast:
    """Around a model's forward pass: the fast number format for what tolerates it."""
    return torch.autocast(device.type, fast_dtype(device), enabled=fast_dtype(device) != torch.float32)

@torch.no_grad()
def update_ema(average, model, step: int):
    """The weights that are kept follow those that learn, quicker while the run is young. Buffers are copied:
    codebooks are averages already."""
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers()):
        a.copy_(b)

def lock_folder(folder: str):
    """Make `folder` and hold it, for as long as what is returned is kept: two runs would undo each other."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115 (it stays open)
        with contextlib.suppress(ImportError):  # Windows has no fcntl, and there nobody is stopped
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{folder}: another run is writing there; wait, or choose another --out") from None
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror}); choose another --out") from None
    return file

def save_atomic(obj: object, path: str) -> None:
    """torch.save by way of a temporary file: whatever happens, `path` holds the old or the new, and whole."""
    part = path + ".tmp"
    try:
        with open(part, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(part)
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path}: cannot save ({why}); free some space or choose another --out") from None

def start_processes(device_name: str):
    """(device, rank, world): this process's place among those that torchrun started, or (device, 0, 1)."""
    device, world = pick_device(device_name), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while the first prepares the data, however long that takes.
    patience = datetime.timedelta(days=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device, dist.get_rank(), world

def first_then_all(make: Callable):
    """make() in process 0 and only then in the others, which find on disk what it prepared."""
    if not dist.is_initialized():
        return make()
    result = make() if dist.get_rank() == 0 else None
    dist.barrier()
    return result or make()

class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, like all others
        raise ValueError(f"{message}; type python {self.prog} --help for all flags")

def whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} and below 2^62")
    return int(text)

def positive(text: str) -> int:
    return whole(text, 1)

class Stopper:
    """Turns Ctrl-C and SIGTERM into a flag: the loop ends its step, saves, says where. A second one kills."""
    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def asked(self, device: torch.device) -> bool:
        """Has any process been asked to stop? All must know, or they would wait for the one that left."""
        flag = torch.tensor(float(self.signal is not None), device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

def count_bad(bad: int, grad_norm: torch.Tensor, step: int, path: str, say: Callable) -> int:
    """How many steps in a row, this one included, had no finite gradient and are skipped; ten are enough."""
    if torch.isfinite(grad_norm):
        return 0
    if bad + 1 == 10:
        then = f"--resume from {path}" if os.path.exists(path) else "start again"
        raise ValueError(f"{bad + 1} steps in a row were not finite: lower lr in RECIPES and {then}")
    say(f"step {step}: the gradient is not finite; step skipped ({bad + 1} in a row)")
    return bad + 1


class Log:
    """A CSV with one row per logged step. A resumed run first drops the rows later than its checkpoint."""
    def __init__(self, path: str, from_step: int = 0):
        self.path, kept = path, []
        if from_step and os.path.exists(path):
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= from_step]
        open(path, "w").close()
        self.write(kept)

    def write(self, rows):
        with open(self.path, "a", newline="") as file:
            for row in rows:
                writer = csv.DictWriter(file, row)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
