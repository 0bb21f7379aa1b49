"""Sounds and words: from files and tables to batches of crops with their captions.

    sound files ------- load_audio ---\
                                       prepare --> clips in one memory map --> AudioData.batch --> crops
    tables, folders --- read_entries --/           captions ---------------> Tokenizer ---------> text ids

AudioGen (arXiv 2209.15352): the sentence made of tags is section 4.1, the mixing augmentation section 3.2.
This file needs the five packages alone and can be copied into another project.

The rooms, in the order in which data flows: audio files; tables and folders; preparation; crops and mixing;
the tokenizer; and what the three scripts share.
"""

import argparse
import ast
import collections
import contextlib
import csv
import datetime
import functools
import gc
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import sentencepiece
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

SAMPLE_RATE = 16000
SILENCE = 1e-3  # a sound whose peak is below this (-60 dB of full scale) teaches nothing but silence


class UserError(ValueError):
    """What whoever typed the command can mend: the scripts print it as one line. Other errors are bugs.

    The line names the thing, what was expected, and what to type."""

    def __init__(self, message: str):
        line = " ".join(printable(message).split())
        super().__init__(line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}")


# ----------------------------------------------------------------------------------------------------------
# Audio files: any sample rate and number of channels in, 16 kHz mono out, block by block.

ZERO_CROSSINGS = 45  # of the sinc, on either side: flat up to .9 of the lower Nyquist, -70 dB from 1.0 on
KAISER_BETA = 6.76  # Kaiser's window for 70 dB


@functools.lru_cache(maxsize=16)
def sinc_bank(orig: int, new: int) -> tuple[torch.Tensor, int]:
    """Windowed-sinc filters for a resampler that makes `new` outputs from every `orig` inputs.

    Returns the filters (new, 1, taps), one for each output, and how many samples before the first of the
    `orig` inputs they begin."""
    slower = min(1.0, new / orig)  # the lower of the two rates decides where to cut
    half = math.ceil(ZERO_CROSSINGS / slower)
    phase = torch.arange(new)
    tap = (phase * orig // new)[:, None] + torch.arange(-half, half + 1)  # the samples around each output
    t = tap - (phase * orig).double()[:, None] / new
    kaiser = torch.i0(KAISER_BETA * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / float(np.i0(KAISER_BETA))
    filters = 0.95 * slower * torch.sinc(0.95 * slower * t) * kaiser * (t.abs() < half)
    bank = torch.zeros(new, orig + 2 * half).scatter_(1, tap + half, filters.float())
    return bank[:, None], half


def resample_blocks(blocks: Iterable[torch.Tensor], rate_in: int, rate_out: int) -> Iterator[torch.Tensor]:
    """Resample a stream of blocks (B, T); together they give ceil(T * rate_out / rate_in) samples.

    How the stream is cut into blocks makes no difference. UserError: a rate that no recording has."""
    for rate in (rate_in, rate_out):
        if not 1000 <= rate <= 768000:
            raise UserError(f"a sample rate of {rate} Hz; expected 1000 to 768000, is the header damaged?")
    if rate_in == rate_out:
        yield from blocks
        return

    # Exact for the usual rates, and to a tenth of a cent for odd ones such as 44101 Hz.
    new, orig = Fraction(rate_out, rate_in).limit_denominator(2500).as_integer_ratio()
    bank, half = sinc_bank(orig, new)
    buffer: torch.Tensor | None = None
    samples_in = samples_out = 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            buffer = F.pad(block, (half, 0)) if buffer is None else torch.cat([buffer, block], 1)
            samples_in += block.shape[1]
        elif buffer is not None:  # the end: silence, until no filter lacks a sample
            buffer = F.pad(buffer, (0, bank.shape[-1]))
        if buffer is None or buffer.shape[1] < bank.shape[-1]:
            continue
        frames = F.conv1d(buffer[:, None], bank.to(buffer), stride=orig)  # (B, new, frames)
        buffer = buffer[:, frames.shape[2] * orig :]  # what the next block still needs
        missing = math.ceil(Fraction(samples_in * rate_out, rate_in)) - samples_out
        samples_out += min(missing, frames[0].numel())
        yield frames.transpose(1, 2).flatten(1)[:, :missing]


def resample(x: torch.Tensor, rate_in: int, rate_out: int) -> torch.Tensor:
    """Windowed-sinc resampling of float audio (T,) or (B, T); T becomes ceil(T * rate_out / rate_in)."""
    rows = x if x.dim() == 2 else x[None]
    y = torch.cat([rows[:, :0], *resample_blocks([rows], rate_in, rate_out)], 1)
    return y if x.dim() == 2 else y[0]


def to_mono(block: np.ndarray) -> np.ndarray:
    """Samples (T, channels) to their mean (T,), or to the first channel where the mean cancels out."""
    mono = block.mean(1, dtype=np.float32)
    cancelled = np.square(mono).mean() < 1e-4 * np.square(block).mean()  # two channels of opposite sign
    return block[:, 0].copy() if cancelled else mono


def decode_blocks(file: soundfile.SoundFile) -> Iterator[torch.Tensor]:
    """An open sound file as mono blocks (1, T) at its own rate; blocks, since a header may lie on length."""
    while True:
        block = file.read(2**21 // file.channels, dtype="float32", always_2d=True)  # (T, channels)
        if not len(block):
            return
        if not np.isfinite(block).all():
            raise UserError("contains NaN or infinite samples")
        yield torch.from_numpy(to_mono(block))[None]


def read_blocks(path: str) -> Iterator[torch.Tensor]:
    """The sound in `path` as float32 blocks (T,) at 16 kHz mono. UserError: it cannot be decoded."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; check its path, or where the table lies")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # a name need not be text
            if file.frames == 0:
                raise UserError("holds no samples")
            for block in resample_blocks(decode_blocks(file), file.samplerate, SAMPLE_RATE):
                yield block[0]
    except (UserError, soundfile.LibsndfileError, OSError) as error:
        why = " ".join(str(error).replace(f"Error opening {os.fsencode(path)!r}: ", "").split())
        raise UserError(f"{path}: cannot be read ({why}); export it again as WAV, FLAC or OGG") from None


def load_audio(path: str) -> torch.Tensor:
    """The sound in `path`, whatever its rate and channels: (T,) float32, 16 kHz. Errors: `read_blocks`."""
    return torch.cat(list(read_blocks(path)))


def wav_bytes(wave: torch.Tensor) -> bytes:
    """A WAV file of 16 bits that holds wave (T,). Louder than full scale it is turned down, not clipped."""
    buffer = io.BytesIO()
    samples = wave.float() / wave.abs().max().clamp(min=1)
    soundfile.write(buffer, samples.cpu().numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def save_wav(wave: torch.Tensor, path: str):
    """Write wave (T,) to `path`. OSError: what is wrong with the disk, which libsndfile would not say."""
    with open(path, "wb") as file:
        file.write(wav_bytes(wave))


# ----------------------------------------------------------------------------------------------------------
# Captions: tables and folders. Data sets agree on nothing, so we decide from what the cells hold: a column
# names files if sounds of these names exist, and holds words if its cells can be read aloud. What columns are
# called only breaks ties. Every guess is logged; where none can be made, one line says what to type.

AUDIO = {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf"}
OTHER_MEDIA = {".m4a", ".aac", ".wma", ".mp4", ".webm", ".mkv", ".mov", ".avi"}  # not for libsndfile
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz")
NO_TABLES = {".parquet", ".xlsx", ".xls", ".ods", ".pkl", ".yaml", ".yml", ".tar", ".tgz", ".zip"}

# Of several columns of words the first of these decides: captions as they are, else tags as a sentence.
CAPTION_NAMES = ["(main_)?captions?", ".*captions?.*", "sentences?", "text", "transcri.*", "descriptions?"]
CAPTION_NAMES += ["prompts?", "summary", "words"]
CLASS_NAMES = ["category", "class(_name|_string)?|classname", "labels?"]
TAG_NAMES = ["(common|display)_name", *CLASS_NAMES, ".*(category|class|label).*", "tags?", "keywords?"]
TAG_NAMES += [".*(event|scene).*", "choice", "name", "species|genre|title"]
SPLIT_NAMES = r"((data_?|dataset_)?(split|subset|set|partition|fold)s?|is_(train|test|val|valid|eval)\w*)"
SPLIT_WORDS = {"train": "train", "training": "train", "dev": "dev", "development": "dev"}
SPLIT_WORDS |= dict.fromkeys(["val", "valid", "validation", "validate", "validating"], "val")
SPLIT_WORDS |= dict.fromkeys(["test", "testing", "eval", "evaluation", "evaluate"], "test")
# Folders that are called so are no class of sounds.
STRUCTURE = {"audio", "wav", "wavs", "flac", "mp3", "ogg", "clip", "clips", "sound", "sounds", "data", "raw"}
STRUCTURE |= {"dataset", "file", "files", "fold", "folder", "subfolder", "recording", "recordings", "samples"}

Flags = collections.namedtuple("Flags", "files words split_column")  # names of columns that the user gave


class NoSounds(UserError):
    """A table none of whose columns names a sound: it may be about something else."""


@dataclass
class Entry:
    path: str
    captions: list[str]
    split: str = ""  # 'train', 'val', or '': the source does not say
    category: str = ""  # the class of the sound in words, where the source names exactly one


def printable(text: str) -> str:
    """Names of files may hold bytes that are no text: they are shown as \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(map(repr, names)), 110, placeholder=" ...")


# Words: what a cell says, and whether that can be a caption.


def clean_caption(text: str) -> str:
    """One line of text that no later step stumbles over: no half emojis, control or zero-width characters."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    if not text.isprintable():
        for char in set(text):
            kind = unicodedata.category(char)
            if kind[0] == "C":
                text = text.replace(char, " " if kind == "Cc" else "")
    return " ".join(text.split())


def cell_texts(cell: object) -> list[str]:
    """The texts in a cell, cleaned: of a string, of a list of strings, or of a list written as a string."""
    if isinstance(cell, str) and cell[:1] == "[" and cell[-1:] == "]":
        commas = re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", cell)  # NumPy writes lists without them
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            cell = ast.literal_eval(commas)
    if isinstance(cell, list):
        return [text for item in cell if isinstance(item, str) for text in cell_texts(item)]
    text = clean_caption(cell) if isinstance(cell, str) else ""
    return [text] if text else []


NOTHING = "nan|none|null|n/a|"  # as pandas and others write an empty cell
NO_WORDS = re.compile(
    NOTHING + r"true|false|(/[mgt]/\w+[ ,;]*)+"  # the last are AudioSet's ids
    r"|\w+://\S+|www\.\S+|/\S*|\S+\.[a-z]\w{1,3}"  # addresses, paths, names of files
    r"|[0-9a-f-]{16,}|(?-i:(?=[\w-]{11}\Z)(?=.*\d)(?=.*[A-Z]).*[a-z].*)",  # hashes, and YouTube's ids
    re.IGNORECASE,
)
A_WORD = re.compile(r"(?<![^\W_])([^\W\d_]{2,}|[^\W\d_a-zA-Z])(?![^\W_])")  # letters that touch no digit


def is_words(text: str) -> bool:
    """Can this be read aloud? Ids, numbers, times, hashes, addresses and names of files cannot."""
    return bool(A_WORD.search(text)) and not NO_WORDS.fullmatch(text) and stem(text) == text


def pseudo_sentence(tags: str | list) -> str:
    """The paper's sentence of tags: 'dog, bark, park' -> 'dog bark park', '001 - Dog_bark' -> 'dog bark'."""
    text = " ".join(cell_texts(tags)).lower().replace("’", "'")
    # Letters, digits and marks: Hindi and Thai write vowels as marks, which \w would take for gaps.
    kept = "".join(char if char == "'" or unicodedata.category(char)[0] in "LNM" else " " for char in text)
    words = [word.strip("'") for word in kept.split()]
    return " ".join(word for word in words if word and not word.isdecimal())


# Splits: what trains and what validates, as columns, names of files, and folders say it.


def split_word(name: str) -> str:
    """'train', 'dev', 'val' or 'test' if a name such as 'test-clean' or 'FSD50K.dev_audio' says so, or ''."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def side(word: str, others: Iterable[str]) -> str:
    """'train', 'val' or '' for a split word. 'dev' validates beside 'train', and trains beside 'test' alone."""
    if word == "dev":
        return "val" if "train" in others else "train"
    return "val" if word == "test" else word


def column_splits(name: str, cells: list) -> list[str]:
    """'train', 'val' or '' for each cell of a column. Of numbered folds the last validates, as with ESC-50."""
    texts = ["" if cell is None else str(cell).strip().lower() for cell in cells]
    words = {text: split_word(text) for text in set(texts)}
    splits = {text: side(word, words.values()) for text, word in words.items()}
    folds = {text: re.fullmatch(r"(?:fold|set|split)?[ _-]?(\d+)(?:\.0)?", text) for text in words}
    numbers = {text: int(match[1]) for text, match in folds.items() if match}
    if name.lower().startswith("is_"):  # is_train, is_test: yes or no
        yes = side(split_word(name), ())
        splits |= dict.fromkeys(["1", "1.0", "true", "yes"], yes)
        splits |= dict.fromkeys(["0", "0.0", "false", "no"], "val" if yes == "train" else "train")
    elif len(numbers) > 1 or any(words.values()):
        last = max(numbers.values(), default=0)
        splits |= {text: "val" if number == last else "" for text, number in numbers.items()}
    return [splits[text] for text in texts]


def folders_of(path: str) -> list[str]:
    """'a/b/c.wav' -> ['a', 'a/b']"""
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def folder_splits(paths: Iterable[str]) -> dict[str, str]:
    """{folder: 'train' or 'val'} for the folders in relative paths that are splits, and so are their siblings:
    ESC-50 has a class called 'train', but beside it are other classes."""
    siblings: dict[str, set] = {}
    for folder in {folder for path in paths for folder in folders_of(path)}:
        siblings.setdefault(folder.rpartition("/")[0], set()).add(folder)
    splits = {}
    for folders in siblings.values():
        words = {folder: split_word(os.path.basename(folder)) for folder in folders}
        exact = {words[folder] for folder in folders if os.path.basename(folder).lower() in SPLIT_WORDS}
        # Not so are 'train horn' and 'train station'.
        clear = len(exact) == len(folders) or len(set(words.values())) > 1
        if (all(words.values()) and clear) or ("train" in exact and len(exact) > 1):
            splits |= {folder: side(word, words.values()) for folder, word in words.items() if word}
    return splits


def split_of(path: str, splits: dict[str, str]) -> str:
    """What the folders of a relative path say, by the dictionary of `folder_splits`."""
    return next((splits[folder] for folder in folders_of(path) if folder in splits), "")


def name_split(path: str) -> str:
    """What the name of a source says: of a file always, of a folder if its siblings are splits, too."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isfile(path):
        return side(split_word(name), map(split_word, os.listdir(folder))) or name_split(folder)
    folders = [f"{entry.name}/" for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    return folder_splits(folders).get(name, "") if len(folders) > 1 else ""


# Tables: CSV with any delimiter and JSON of any shape become columns of cells.


@dataclass
class Table:
    path: str
    columns: dict[str, list]  # of equal length: a cell for each row
    delimiter: str = ""  # '' if it was JSON
    headless: bool = False  # its columns are called '1', '2', ...

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read_text(path: str, notes: list) -> str:
    """The text of a table or of a caption's file, gzipped or not. UserError: it is none, or of what letters?"""
    kind = os.path.splitext(path.lower())[1]
    if kind in NO_TABLES:
        raise UserError(f"{path}: {kind} is not read; unpack an archive and give the folder, save the rest as CSV, for "
                        "instance with pandas.read_parquet(...).to_csv('clips.csv'), and give that")  # fmt: skip
    if kind in AUDIO | OTHER_MEDIA:
        raise UserError(f"{path}: is one recording; give the folder it lies in, or a table")
    try:
        with (gzip.open if kind == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as why:
        raise UserError(f"{path}: cannot be unpacked ({why}); get this file again") from None
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    if b"\0" in data and not wide:
        raise UserError(f"{path}: is not text; expected a table as CSV, TSV, JSON or JSON lines")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
        # Western languages have few letters beyond ASCII. If many are, it is another alphabet.
        letters = [char for char in text if char.isalpha()]
        if wide or 3 * sum(not char.isascii() for char in letters) > len(letters):
            raise UserError(f"{path}: its letters are in an unknown encoding; save it as UTF-8") from None
        notes.append(("", f"{path}: is not UTF-8; its letters are read as Windows-1252"))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_table(path: str, notes: list) -> Table:
    """A CSV, TSV or JSON table, gzipped or not. UserError: it is none, has no rows, or is damaged."""
    text = read_text(path, notes)
    try:
        table = json_table(path, text) if text.lstrip()[:1] in ("{", "[") else csv_table(path, text)
    except csv.Error as why:
        raise UserError(f"{path}: {why}; close that quote, or double it inside a cell") from None
    except (json.JSONDecodeError, RecursionError) as why:
        raise UserError(f"{path}: is no JSON ({why}); expected a list of objects, or one a line") from None
    if len(table) == 0:
        raise UserError(f"{path}: holds no usable row; expected a column of files and one of captions")
    return table


def csv_rows(text: str, delimiter: str, strict: bool, quoting: int = csv.QUOTE_MINIMAL) -> list[list[str]]:
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=strict)
    try:
        return [row for row in reader if row]
    except csv.Error as why:
        raise csv.Error(f"line {reader.line_num}: {why}") from None


def csv_table(path: str, text: str) -> Table:
    """Lines of text as a table, with or without comments above, with or without a header. UserError: a row has
    more cells than the header."""
    comments = re.match(r"((#|sep=).*\n|\n)*", text)[0]
    text = text[len(comments) :]
    head = "\n".join(text.split("\n", 200)[:200])

    def fit(delimiter: str) -> float:  # the share of lines with as many cells as the first
        widths = [len(row) for row in csv_rows(head, delimiter, strict=False)]
        return widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0

    delimiter = max(",\t;|", key=fit)
    try:
        rows = csv_rows(text, delimiter, strict=True)
    except csv.Error:
        if delimiter in ",;":
            raise
        rows = csv_rows(text, delimiter, True, csv.QUOTE_NONE)  # between tabs a quote is often just a quote
    above = csv_rows(comments.strip("\n").rpartition("\n")[2].lstrip("# "), delimiter, strict=False)
    if rows and above and not comments.startswith("sep=") and len(above[0]) == len(rows[0]) > 1:
        rows = above + rows  # AudioSet's header is its last comment
    if headless := looks_headless(rows[:50]):
        widths = collections.Counter(map(len, rows))
        rows.insert(0, [str(i + 1) for i in range(max(widths, key=lambda width: (widths[width], -width)))])
    width = len(rows[0]) if rows else 0
    for number, row in enumerate(rows):
        while len(row) > width and not row[-1]:
            row.pop()
        if len(row) > width > 2:
            raise UserError(f"{path}: row {number} has {len(row)} cells, expected {width} ({' | '.join(row)[:80]}); "
                            f"put quotes around cells that contain {delimiter!r}")  # fmt: skip
        if len(row) > width:  # a caption with unquoted commas
            row[width - 1 :] = [f"{delimiter} ".join(row[width - 1 :])]
        row += [""] * (width - len(row))
    columns: dict[str, list] = {}
    for name, *cells in zip(*rows):
        name = clean_caption(name)
        columns[f"{name}_{len(columns)}" if name in columns else name] = cells
    return Table(path, columns, delimiter, headless)


def looks_headless(rows: list[list[str]]) -> bool:
    """Is the first row data already? Then it holds a number, a file, a sentence, or an id like those below."""
    if not rows or rows[0] == [str(i) for i in range(len(rows[0]))]:  # pandas numbers nameless columns
        return False
    shapes = {re.sub(r"\d", "0", cell) for row in rows[1:] for cell in row}
    for cell in rows[0]:
        alike = re.search(r"\d", cell) and re.sub(r"\d", "0", cell) in shapes
        if alike or re.fullmatch(r"-?\d+(\.\d+)?", cell) or stem(cell) != cell or len(cell) > 60:
            return True
    return False


def json_table(path: str, text: str) -> Table:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as why:
        if "Extra data" not in why.msg:
            raise
        data = [json.loads(line) for line in text.split("\n") if line.strip()]  # one object a line
    rows = [flat(row) for row in json_rows(path, data)]
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names})


def flat(row: dict, above: str = "") -> dict:
    """{'audio': {'path': 'a.wav'}} -> {'audio.path': 'a.wav'}"""
    cells: dict = {}
    for name, cell in row.items():
        cells |= flat(cell, f"{above}{name}.") if isinstance(cell, dict) else {f"{above}{name}": cell}
    return cells


def json_rows(path: str, data: list | dict) -> list[dict]:
    """The rows in JSON of any shape: a list, or a list under any key, by split, by file, or by column."""
    if isinstance(data, list):
        rows = []
        for row in data:
            cells = row if isinstance(row, list) else [row]
            rows.append(row if isinstance(row, dict) else {str(i): cell for i, cell in enumerate(cells, 1)})
        return rows
    lists = {key: x for key, x in data.items() if isinstance(x, list) and dict in map(type, x[:1])}
    dicts = {key: x for key, x in data.items() if isinstance(x, dict)}
    parts, cells = lists or dicts, list(data.values())
    first = next(iter(parts.values()), None)
    if parts and all(map(split_word, parts)):
        return [{**row, "split": key} for key, part in parts.items() for row in json_rows(path, part)]
    if len(lists) > 1:
        raise UserError(f"{path}: holds several tables ({listed(lists)}); save the one of files and captions")
    if first and len(parts) == 1 and (lists or all(isinstance(row, dict) for row in first.values())):
        return json_rows(path, first)
    if dicts and len(dicts) == len(data):
        numbered = all(key.isdecimal() and set(part) == set(cells[0]) for part in cells for key in part)
        if numbered:  # pandas writes {'path': {'0': 'a.wav'}}
            return [{name: column[key] for name, column in data.items()} for key in cells[0]]
        return [{"key": key, **row} for key, row in dicts.items()]
    named = all(stem(key) != key or re.search(r"\d", key) for key in data)
    if named and all(isinstance(cell, (str, list)) for cell in cells):
        return [{"key": key, "caption": cell} for key, cell in data.items()]
    if all(isinstance(column, list) and len(column) == len(cells[0]) for column in cells):
        return [dict(zip(data, row)) for row in zip(*cells)]
    return [data]


# Sounds: one walk of a folder, an index of what it holds, and what of that a column names.


def stem(name: str) -> str:
    """A name without its extension, if that is one of sounds or films: other dots belong to the name."""
    base, kind = os.path.splitext(name)
    return base if kind.lower() in AUDIO or kind.lower() in OTHER_MEDIA else name


def name_key(name: str) -> str:
    """Names to compare by: without extension, an accent and its letter as one, odd bytes as Windows-1252."""
    if not name.isascii():
        name = re.sub("[\udc80-\udcff]", lambda byte: os.fsencode(byte[0]).decode("cp1252", "replace"), name)
        name = unicodedata.normalize("NFC", name)
    return stem(name)


CLIP_NAME = re.compile(
    r"\[?Y?(?P<id>[\w-]{11})\]?([-_ .]+\[?(?P<start>\d+(\.\d+)?)([-_]\d+(\.\d+)?)?\]?)?"  # of a YouTube film
    r"|(?P<number>\d+)__.+"  # as Freesound names its downloads
)


class Sounds:
    """Sounds below a folder, by their relative paths with /, and what else lies there."""

    def __init__(self, root: str, paths: list[str], others: list[str]):
        self.root, self.paths, self.others = root, paths, others
        self.sizes = collections.Counter(path.rpartition("/")[0] for path in paths)  # of the folders
        self.index: dict[str, list[str]] = {}
        for path in paths:
            key = name_key(path.rpartition("/")[2])
            for one in {key, key.casefold()}:
                self.index.setdefault(one, []).append(path)

    @functools.cached_property
    def clips(self) -> dict[str, list[tuple[str, str]]]:
        """Of each id that a name begins with, the sounds, and the second of a film at which they begin."""
        clips: dict[str, list[tuple[str, str]]] = {}
        for key, paths in self.index.items():
            if match := CLIP_NAME.fullmatch(key):
                clips.setdefault(match["id"] or match["number"], []).append((paths[0], match["start"]))
        return clips

    def find(self, name: str, table: Table, i: int) -> list[str]:
        """The sounds of this name. Of clips from one film, row i of the table holds where they begin."""
        key = name_key(name)
        for one in (key, key.casefold(), "Y" + key):  # AudioCaps puts a Y before each id on disk
            if one in self.index:
                return self.index[one]
        found = []
        for path, start in self.clips.get(key, []):
            cells = (str(column[i]).strip() for column in table.columns.values())
            numbers = {float(cell) for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)}
            if not start or not numbers or {float(start), float(start) / 1000} & numbers:
                found.append(path)
        return found

    def share(self, paths: set[str]) -> float:
        """The share that these sounds are of all in their folders."""
        return len(paths) / sum(self.sizes[folder] for folder in {path.rpartition("/")[0] for path in paths})


def walk(root: str, only: Iterable[str] | None = None) -> Sounds:
    """All that lies in a folder and below, or all that lies in `only` some folders of it."""
    paths, others, visited = [], [], set()
    there = [os.path.join(root, folder) for folder in only or []]
    looks = [(folder, [], os.listdir(folder)) for folder in there if os.path.isdir(folder)]
    for where, below, names in os.walk(root, followlinks=True) if only is None else looks:
        real = os.path.realpath(where)
        if real in visited:  # a link to a folder above would lead in circles
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        folder = os.path.relpath(where, root).replace(os.sep, "/")
        for name in sorted(names):
            if not name.startswith("."):  # macOS puts a ._a.wav beside a.wav, which is no sound
                kept = paths if os.path.splitext(name)[1].lower() in AUDIO else others
                kept.append(name if folder == "." else f"{folder}/{name}")
    return Sounds(root, paths, others)


@dataclass
class Match:
    """The sounds that a column names."""

    column: str
    sounds: Sounds
    paths: list[str]  # for each row, relative to the folder of the sounds; '' where there is none
    exact: int  # how many rows give the name with its extension
    distinct: int  # how many sounds are named
    certain: bool  # or do a few names agree by chance?


def split_path(cell: object) -> tuple[str, str]:
    """The folder and the name in a cell, ('', '') if it is no name. Addresses and backslashes are understood."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if not isinstance(cell, (str, int)) or isinstance(cell, bool):
        return "", ""
    text = str(cell).strip().replace("\\", "/")
    if "://" in text:
        text = urllib.parse.unquote(re.sub(r"\w+://|[?#].*", "", text))
    folder, _, name = text.rpartition("/")
    return folder.removeprefix("./").strip("/"), name


Place = tuple[int, str, str]  # how many folders of a cell are ignored, the base below which it is right, path


def places_of(cell: tuple[str, str], table: Table, i: int, sounds: Sounds) -> tuple[Place, ...]:
    """Where the sound in a cell of row i may be. If there is a sounds/dog/1.wav, 'x/dog/1' may mean that: one
    folder of the cell is ignored, and its base is sounds."""
    folder, name = cell
    paths = sounds.find(name, table, i) if name else []
    if not folder:
        return tuple([(0, path.rpartition("/")[0], path) for path in paths])
    wanted, places = folder.split("/"), []
    for path in paths:
        there = path.split("/")[:-1]
        pairs = zip(reversed(wanted), reversed(there))
        same = len(list(itertools.takewhile(lambda pair: name_key(pair[0]) == name_key(pair[1]), pairs)))
        places.append((len(wanted) - same, "/".join(there[: len(there) - same]), path))
    least = min((ignored for ignored, _, _ in places), default=0)
    return tuple(place for place in places if place[0] == least)


def below_one_base(table: Table, places: list[tuple], sounds: Sounds) -> list[list[str]]:
    """For each row those of its places that lie where the table's sounds do: in the folder that a column
    names, else below one base for all rows. So a missing file is never taken from a neighbour's folder.
    UserError: two folders hold the same names."""
    used = collections.defaultdict(set)
    for place in places:
        for _, base, path in place:
            used[base].add(path)

    def plain(cell: object) -> str:  # fold 5 is fold5/
        return re.sub(r"^fold[_ -]*|\.0$", "", str(cell).lower().rpartition("/")[2]).replace(" ", "_")

    for cells in table.columns.values() if len(used) > 1 else []:
        fitting = [[path for _, base, path in place if plain(base) == plain(cell)]
                   for cell, place in zip(cells, places)]  # fmt: skip
        if sum(map(bool, fitting)) > 0.9 * sum(map(bool, places)):
            return fitting
    said = split_word(os.path.basename(table.path))
    words = {base: split_word(" ".join(reversed(base.split("/")))) for base in used}
    # What is called train.csv has nothing in a folder called test.
    ranked = [base for base in used if not said or words[base] in ("", said)]
    ranked.sort(key=lambda base: (words[base] == said, len(used[base]), base == ""), reverse=True)
    share = {base: sounds.share(used[base]) for base in ranked}
    kept = [base for base in ranked if share[base] >= 0.8 * share[ranked[0]]]  # they may lie in many folders
    both = kept[:2] if len(kept) > 1 and kept[0] and len(used[kept[0]]) == len(used[kept[1]]) else []
    rank, result = {base: i for i, base in enumerate(kept)}, []
    for place in places:
        bases = {base for _, base, _ in place}
        if both and bases.issuperset(both):
            raise UserError(f"{table.path}: its sounds lie in {both[0]!r} and in {both[1]!r} of {sounds.root}; "
                            "write these folders into the column of files")  # fmt: skip
        best = min([rank[base] for base in bases if base in rank], default=-1)
        result.append([path for _, base, path in place if rank.get(base) == best])
    return result


def match_column(table: Table, column: str, sounds: Sounds) -> Match | None:
    """Which sounds a column names; None: not one. Errors: `below_one_base`."""
    few = 100 * len(sounds.paths) < len(table)  # then a sample may miss them
    sample = range(0, len(table), 1 if few else max(1, len(table) // 1000))
    cells = table.columns[column]
    if not sounds.paths or not any(places_of(split_path(cells[i]), table, i, sounds) for i in sample):
        return None
    cells = list(map(split_path, cells))
    places = [places_of(cell, table, i, sounds) for i, cell in enumerate(cells)]
    ignored = sorted(place[0][0] for place in places if place)
    usual = ignored[len(ignored) // 2]  # of all rows as many folders are ignored as the usual one needs
    places = [place if place and place[0][0] <= usual else () for place in places]
    paths, exact = [], 0
    for (_, name), fitting in zip(cells, below_one_base(table, places, sounds)):
        same = [path for path in fitting if path.rpartition("/")[2] == name]
        exact += len(same) > 0
        paths.append((same or fitting or [""])[0])
    found = set(paths) - {""}
    if not found:
        return None
    certain = 2 * sum(map(bool, paths)) >= sum(bool(name) for _, name in cells)  # most rows have their sound
    if not all(stem(os.path.basename(path)).isdecimal() for path in found):  # or, but for mere numbers, most
        certain |= sounds.share(found) >= 0.5  # sounds that lie there have a row
    return Match(column, sounds, paths, exact, len(found), certain)


def likely_folders(table: Table, written: set[str]) -> Iterator[Sounds]:
    """Where the sounds may lie: at paths as they are written, below the table's folder, below the two above."""
    here = os.path.dirname(os.path.abspath(table.path))
    folders = {(path.startswith("/"), split_path(path)[0]) for path in written}
    yield walk("/", [folder for absolute, folder in folders if absolute])
    own = walk(here)
    yield own
    yield walk(os.getcwd(), [folder for _, folder in folders])
    home = os.path.expanduser("~") + "/"
    for root in (os.path.dirname(here), os.path.dirname(os.path.dirname(here))):
        # If it has sounds, those further up belong to a neighbour. Never walk a whole disk, nor all of a home.
        if own.paths or home.startswith(root.rstrip("/") + "/"):
            return
        own = walk(root)
        yield own


def find_files(table: Table, files: str | None) -> Match:
    """The column that names sounds, and which. UserError: there is none, or two disagree, or it may be chance."""
    names, kinds = [files] if files else list(table.columns), tuple(AUDIO | OTHER_MEDIA)
    written = {name: {cell for cell in table.columns[name] if isinstance(cell, str) and cell.lower().endswith(kinds)}
               for name in names}  # fmt: skip
    most_written, paths = max(map(len, written.values())), set().union(*written.values())
    hint = f", such as {min(paths)!r}" if paths else ""
    for sounds in likely_folders(table, paths):
        matches = []
        for name in names:
            match = match_column(table, name, sounds)
            # Beside a column of file names, one whose few cells happen to be names of sounds is not it.
            if match and (match.exact or len(set(map(str, table.columns[name]))) >= most_written):
                matches.append(match)
        sure = [match for match in matches if match.certain or files]
        most = max((match.distinct for match in sure), default=0)
        sure = [match for match in sure if 2 * match.distinct > most]
        sure.sort(key=lambda match: (match.exact, match.distinct), reverse=True)
        for other in sure[1:]:
            differ = any(a and b and a != b for a, b in zip(sure[0].paths, other.paths))
            if differ and (other.exact, other.distinct) == (sure[0].exact, sure[0].distinct):
                raise UserError(f"{table.path}: columns {sure[0].column!r} and {other.column!r} both name sounds, "
                                "but not the same; say which with --files COLUMN")  # fmt: skip
        if sure:
            return sure[0]
        if matches:
            hint = f", but for a few in {matches[0].column!r} (--files {matches[0].column} if it is right)"
        elif any(os.path.splitext(path)[1].lower() in OTHER_MEDIA for path in sounds.others):
            hint = ": there are .m4a or films, which ffmpeg -i X.m4a X.wav makes readable"
    raise NoSounds(f"{table.path}: no column names sounds that exist, of {listed(names)}{hint}; put the table "
                   "beside its sounds, or write their paths into it")  # fmt: skip


# Which columns hold words and splits.


def family(name: str) -> str:
    """'Caption-2' and 'captions[2]' are one family of columns each, 'caption' and 'captions'."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return re.sub(r"[\W_]+", "_", re.sub(r"[\W_\d]+$", "", name)).strip("_")


def holds_words(cells: list) -> bool:
    """Are most cells of a column words, and not just a numbering such as clip_1, clip_2?"""
    texts = [text for cell in cells[:: max(1, len(cells) // 1000)] for text in cell_texts(cell)]
    texts = [text for text in texts if text.lower() not in NOTHING.split("|")]
    kinds = {re.sub(r"\d+", "", text) for text in texts}
    numbering = len(kinds) == 1 < len(set(texts)) and " " not in texts[0]
    return texts != [] and not numbering and 2 * sum(map(is_words, texts)) >= len(texts)


def find_words(table: Table, taken: set) -> tuple[list[str], list[str]]:
    """The columns of captions, and those of tags for rows without one, best first; none if no column holds
    words. UserError: several do, and nothing says which."""
    names = [name for name in table.columns if name not in taken and holds_words(table.columns[name])]
    ranked: list[tuple[bool, list[str]]] = []
    for pattern in CAPTION_NAMES + TAG_NAMES:
        found = [name for name in names if re.fullmatch(pattern, family(name))]
        names = [name for name in names if name not in found]
        if len(set(map(family, found))) > 1 and not ranked:
            names, ranked = found, []
            break
        if found:
            ranked.append((pattern in CAPTION_NAMES, found))
    tags = [name for is_caption, found in ranked if not is_caption for name in found]
    if ranked:
        return (ranked[0][1], tags) if ranked[0][0] else ([], tags)
    rows = list(zip(*(table.columns[name] for name in names)))
    twice = table.headless and 2 * sum(len(set(map(str, row))) == 1 for row in rows) >= len(rows)
    if len(names) > 1 and not twice:  # as LJSpeech has each sentence, the second time with numbers in words
        raise UserError(f"{table.path}: columns {listed(names)} all hold words; choose with --words COLUMN")
    sentences = any(" " in str(cell) for row in rows for cell in row)
    return (names, []) if sentences else ([], names)


def find_splits(table: Table, taken: set) -> str:
    """The column that says what trains and what validates, or ''. Words count for more than numbers of folds."""
    found = ""
    for name, cells in table.columns.items():
        named = re.fullmatch(SPLIT_NAMES, family(name))
        plain = all(str(cell or "train").strip().lower() in SPLIT_WORDS for cell in cells)
        if name in taken or not (named or plain):
            continue
        values = {str(cell).strip().lower() for cell in cells if cell}
        if not named and len(values) < (1 if table.headless else 2):
            continue
        useful = name == "split" or any(column_splits(name, cells))
        if useful and (not found or any(map(split_word, values))):
            found = name
    return found


# The entries of a table.


def row_captions(table: Table, i: int, captions: list[str], tags: list[str]) -> list[str]:
    """The captions of row i; if it has none, its first tags as one sentence."""
    texts = [text for name in captions for text in cell_texts(table.columns[name][i]) if is_words(text)]
    if texts:
        return list(dict.fromkeys(text if " " in text else text.replace("_", " ") for text in texts))
    words = ([text for text in cell_texts(table.columns[name][i]) if is_words(text)] for name in tags)
    return list(filter(None, map(pseudo_sentence, words)))[:1]


def class_column(table: Table) -> str:
    """The column that gives exactly one class for each row, or ''."""
    for pattern in CLASS_NAMES:
        for name, cells in table.columns.items():
            named = re.fullmatch(pattern, family(name)) and holds_words(cells)
            if named and not any(re.search(r"[,;\[]", str(cell)) for cell in cells):
                return name
    return ""


def refuse_moments(table: Table, match: Match):
    """UserError: several rows tell of moments in one file, so that none is about the whole sound."""
    for name, cells in table.columns.items():
        if re.search("onset|offset|start|begin|end|stop", family(name)):
            first: dict[str, object] = {}
            if any(path and first.setdefault(path, cell) != cell for path, cell in zip(match.paths, cells)):
                raise UserError(f"{table.path}: its rows are about moments in the files (column {name!r}); expected one "
                                "caption for a whole sound: cut them there, or drop that column")  # fmt: skip


def refuse_swallowed(table: Table, match: Match):
    """UserError: a quote that is not closed has made other rows a part of one cell."""
    place = list(table.columns).index(match.column)
    cells = [cell for cells in table.columns.values() for cell in cells if table.delimiter and "\n" in cell]
    for line in [line for cell in cells for line in cell.split("\n")[1:]]:
        name = split_path((line.split(table.delimiter) + [""] * place)[place])[1]
        if stem(name) != name or name_key(name) in match.sounds.index:
            raise UserError(f"{table.path}: a quote is not closed before the row of {name!r}; close it")


def table_entries(path: str, flags: Flags, notes: list) -> list[Entry]:
    """The entries of a table. UserError: it cannot be understood. What is left out, and why, goes to notes."""
    table = read_table(path, notes)
    said = [name.strip() for name in (flags.words or "").split(",") if name]
    for name in filter(None, [flags.files, flags.split_column, *said]):
        if name not in table.columns:
            raise UserError(f"{path}: has no column {name!r}, it has {listed(table.columns)}")
    match = find_files(table, flags.files)
    refuse_swallowed(table, match)
    refuse_moments(table, match)
    split_name = flags.split_column or find_splits(table, {match.column, *said})
    captions, tags = (said, []) if said else find_words(table, {match.column, split_name})
    beside = {} if captions or tags else sidecars(match.sounds, set(match.paths), notes)
    if not (captions or tags or beside):
        raise UserError(f"{path}: no column holds words, of {listed(table.columns)}; choose with --words COLUMN "
                        "(the names of ids such as /m/0abc are in class_labels_indices.csv)")  # fmt: skip
    if split_name:
        splits = column_splits(split_name, table.columns[split_name])
    else:
        by_folder, by_name = folder_splits(filter(None, match.paths)), name_split(path)
        splits = [by_name or split_of(sound, by_folder) for sound in match.paths]
    if flags.split_column and not any(splits):
        raise UserError(f"{path}: column {split_name!r} has no train, val or test, and no folds")
    classes = table.columns.get(class_column(table)) or [""] * len(table)
    entries: dict[str, Entry] = {}
    for i, (sound, split) in enumerate(zip(match.paths, splits)):
        full = os.path.join(match.sounds.root, sound)
        if not sound:
            notes.append(("no such sound", str(table.columns[match.column][i])))
        elif not (texts := beside.get(sound) or row_captions(table, i, captions, tags)):
            notes.append(("no words", full))
        else:  # several rows may caption one sound
            entry = entries.setdefault(full, Entry(full, [], split, pseudo_sentence(classes[i])))
            entry.captions += [text for text in texts if text not in entry.captions]
    if not entries:
        raise UserError(f"{path}: no usable row among {len(table)}: none has a sound and words")
    where = os.path.commonpath([os.path.dirname(full) for full in entries])
    words = listed(captions or tags[:1]) if captions or tags else "the files beside them"
    told = repr(split_name) if split_name else "names" if any(splits) else "nothing"
    where = f"{match.column!r} in {where}"
    notes.append(("", f"{path}: files from {where}, words from {words}, splits from {told}"))
    return list(entries.values())


# Folders: words beside each sound, a table inside, or folders that are classes.


def sidecars(sounds: Sounds, wanted: Iterable[str], notes: list) -> dict[str, list[str]]:
    """{sound: captions} where a .txt (a caption a line) or .json of the same name lies beside the sound."""
    captions, rows, others = {}, [], set(sounds.others)
    for path in filter(None, wanted):
        base = os.path.join(sounds.root, stem(path))
        try:
            lines = read_text(base + ".txt", notes).split("\n") if stem(path) + ".txt" in others else []
            moments = any(re.match(r"[\d.]+\t[\d.]+\t", line) for line in lines)  # Audacity's labels
            if not moments:
                captions[path] = [text for line in lines if is_words(text := clean_caption(line))]
            if stem(path) + ".json" in others and not captions.get(path):
                rows.append({"path": path, **flat(json.loads(read_text(base + ".json", notes)))})
        except (UserError, json.JSONDecodeError, AttributeError) as why:
            notes.append(("the text beside it cannot be read", f"{path} ({why})"))
    names = dict.fromkeys(name for row in rows for name in row)
    table = Table(f"{sounds.root}/*.json", {name: [row.get(name) for row in rows] for name in names})
    columns = find_words(table, {"path"}) if rows else ([], [])
    captions |= {row["path"]: row_captions(table, i, *columns) for i, row in enumerate(rows)}
    return {path: texts for path, texts in captions.items() if texts}


def class_of(path: str, splits: dict[str, str]) -> str:
    """The deepest folder of a relative path that is called by a word, and not train/, audio/ or fold1/."""
    for folder in reversed(folders_of(path)):
        words = pseudo_sentence(name_key(os.path.basename(folder))).split()
        spoken = [word for word in words if not re.search(r"\d", word) and word not in STRUCTURE]
        if spoken and folder not in splits:
            return " ".join(words)
    return ""


def tables_entries(folder: str, tables: list[str], flags: Flags, notes: list) -> list[Entry]:
    """The entries of those tables in a folder that name sounds: of one, or of a table for each split, or of
    all that are called metadata. UserError: there are others, or one cannot be understood."""
    read: dict[str, list[Entry]] = {}
    for path in tables:
        with contextlib.suppress(NoSounds):  # it is about something else
            own: list = []
            read[path] = table_entries(os.path.join(folder, path), flags, own)
            notes += own
    words = set(map(split_word, read))
    official = all(os.path.basename(path).startswith("metadata.") for path in read)
    if len(read) > 1 and not official and ("" in words or len(words) < len(read)):
        raise UserError(f"{folder}: holds {len(read)} tables of sounds, {listed(read)}; give one of them")
    return [entry for entries in read.values() for entry in entries]


def listed_splits(sounds: Sounds, notes: list) -> dict[str, str]:
    """{sound: 'train' or 'val'} from lists of sounds such as the testing_list.txt of Speech Commands."""
    splits: dict[str, str] = {}
    for path in sounds.others:
        if split_word(os.path.basename(path)) and path.endswith(".txt"):
            lines = read_text(os.path.join(sounds.root, path), notes).split()
            if lines and set(lines) <= set(sounds.paths):
                splits |= dict.fromkeys(lines, side(split_word(os.path.basename(path)), ()))
    return splits


def folder_entries(folder: str, flags: Flags, notes: list) -> list[Entry]:
    """The entries of a folder. Words beside the sounds and tables count for more than names of folders."""
    sounds = walk(folder)
    described = set(map(stem, sounds.paths))
    tables = [path for path in sounds.others if path.lower().endswith(TABLES)]
    tables = [path for path in tables if path.rpartition(".")[0] not in described]
    metadata = [path for path in tables if os.path.basename(path).startswith("metadata.")]
    beside = {} if metadata else sidecars(sounds, sounds.paths, notes)
    entries = [] if beside else tables_entries(folder, metadata or tables, flags, notes)
    if entries:
        return entries
    splits, lists, by_name = folder_splits(sounds.paths), listed_splits(sounds, notes), name_split(folder)
    with_words = {os.path.dirname(path) for path in beside}  # there a sound without is no example of a class
    for path in sounds.paths:
        category = class_of(path, splits)
        captions = beside.get(path) or [category]
        if not captions[0] or (path not in beside and os.path.dirname(path) in with_words):
            notes.append(("no words", path))
            continue
        split = by_name or lists.get(path) or split_of(path, splits)
        entries.append(Entry(os.path.join(folder, path), captions, split, category))
    for path in sounds.others:
        kind = os.path.splitext(path)[1].lower()
        if kind in OTHER_MEDIA:
            notes.append(("not read; ffmpeg -i X.m4a X.wav makes it readable", path))
        if kind in NO_TABLES and (not entries or os.path.basename(path).startswith("metadata.")):
            read_text(os.path.join(folder, path), notes)  # says what to do with it
    if not entries:
        above = glob.escape(os.path.dirname(folder))
        near = glob.glob(f"{above}/*") + glob.glob(f"{above}/*/*")
        near = [path for path in near if path.lower().endswith(TABLES)]
        raise UserError(f"{folder}: no usable sound among {len(sounds.paths)}; expected clip.txt beside clip.wav, "
                        f"folders named by class, or a table{f': give {min(near)}?' if near else ''}")  # fmt: skip
    words = f"the texts beside {len(beside)} sounds" if beside else "the names of folders"
    told = "names" if any(entry.split for entry in entries) else "nothing"
    notes.append(("", f"{folder}: words from {words}, splits from {told}"))
    return entries


def read_entries(source: str, log: Callable = print, files: str | None = None, words: str | None = None,
                 split_column: str | None = None) -> list[Entry]:  # fmt: skip
    """What a table or folder holds, with every guess and all that is left out told to `log`. The names of
    columns overrule guesses. UserError: it cannot be understood; FileNotFoundError: it is not there."""
    if not os.path.exists(source):
        raise UserError(f"{source}: does not exist; expected a table or a folder")
    understand = folder_entries if os.path.isdir(source) else table_entries
    notes: list[tuple[str, str]] = []  # (why something is left out, or '', and what)
    gc.disable()  # a long table is many small objects and no cycles: looking for these takes a third of the time
    try:
        entries = understand(os.path.abspath(source), Flags(files, words, split_column), notes)
    finally:
        gc.enable()
    left_out = collections.Counter(why for why, _ in notes)
    for reason in sorted(left_out):
        lines = [f"  {what}" if reason else what for why, what in notes if why == reason]
        if reason:
            log(f"{source}: left out {len(lines)}: {reason}")
        for line in lines[:10]:
            log(printable(line))
        if len(lines) > 10:
            log(f"  ... and {len(lines) - 10} more")
    return entries


def read_captions(source: str) -> list[tuple[str, list[str]]]:
    """[(path, [caption, ...]), ...] of a table or folder."""
    return [(entry.path, entry.captions) for entry in read_entries(source)]


# ----------------------------------------------------------------------------------------------------------
# Preparation: decode everything once into one file of int16 samples that training maps into memory.

FORMAT = 5  # raise it when what is written changes: everything is then prepared anew
SHOWN = 10  # lines of one kind that are printed; the rest is counted, and all of them are in left_out.txt


@dataclass
class Clip:
    """One prepared recording and what is known of it."""

    name: str  # its path, seen from the source's folder
    captions: list[str]
    category: str  # the class of its sound, or '' where the source does not say
    split: str  # 'train', 'val', or '' where the source does not say; see `choose_splits`
    length: int  # samples
    peak: float  # of the whole clip, 0 to 1
    samples: np.ndarray  # (T,) int16, a part of the memory map: read from disk when it is used


def prepare(source: str, folder: str, log: Callable = print, **columns) -> list[Clip]:
    """Decode `source` into a folder of its own below `folder`, or find it there if nothing has changed since.

    `columns` are the options of `read_entries`. UserError: nothing can be read, or there is no space."""
    entries = read_entries(source, log, **columns)
    name = f"{os.path.basename(os.path.abspath(source)).split('.')[0][:40]}-{fingerprint(entries)}"
    final, part = os.path.join(folder, name), os.path.join(folder, name + ".part")
    if not os.path.exists(final):
        began = time.time()
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        try:
            os.makedirs(part)
            decode_all(entries, part, source)
            os.rename(part, final)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{folder}: {why}; make space or choose another --out") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        log(f"{source}: prepared in {time.time() - began:.0f} s")
    report, clips = read_prepared(final)
    log("\n".join(report))
    return clips


def fingerprint(entries: list[Entry]) -> str:
    """A hash of all that preparation depends on: the entries, and size and time of every file."""
    stats = [os.stat(entry.path) if os.path.exists(entry.path) else None for entry in entries]
    files = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
    return hashlib.sha256(ascii((FORMAT, entries, files)).encode()).hexdigest()[:12]


def write_samples(path: str, file) -> tuple[int, float]:
    """Append the sound in `path` to an open binary file as int16; returns its length and its peak.

    Some float files are louder than full scale: these are turned down as a whole, not clipped, for which
    they are decoded a second time. UserError: it cannot be decoded, or is silent."""
    begin, gain = file.tell(), 1.0
    while True:
        peak = 0.0
        for block in read_blocks(path):
            peak = max(peak, block.abs().max().item())
            file.write((gain * block).clamp(-1, 1).mul(32767).round().short().numpy())
        if gain * peak <= 1:
            break
        gain = 1 / peak
        file.truncate(file.seek(begin))
    if peak < SILENCE:
        raise UserError(f"{path}: silent")
    return (file.tell() - begin) // 2, peak


def decode_all(entries: list[Entry], folder: str, source: str) -> None:
    """Write the samples of all clips, their index and a report for the reader into `folder`."""
    root = os.path.dirname(os.path.abspath(source))
    clips: list[dict] = []
    left_out, loud = [], []
    with open(os.path.join(folder, "audio.i16"), "wb") as audio:
        for entry in tqdm(entries, f"preparing {source}", unit="clip", disable=None):
            begin = audio.tell()
            try:
                length, peak = write_samples(entry.path, audio)
            except UserError as error:  # a full disk is none: it ends the loop
                left_out.append(str(error))
                audio.truncate(audio.seek(begin))
                continue
            if peak > 1.12:  # by more than 1 dB: decoded MP3 and Ogg files often exceed it by a little
                loud.append(f"{entry.path}: {20 * math.log10(peak):.1f} dB above full scale")
            about = {"name": os.path.relpath(entry.path, root), "captions": entry.captions}
            about |= {"category": entry.category, "split": entry.split}
            clips.append(about | {"length": length, "peak": min(1, peak)})
    if not clips:
        raise UserError(f"{source}: none of its {len(entries)} sounds can be used; the first: {left_out[0]}")
    report = [summary(source, clips), *shortened("left out", left_out), *shortened("turned down", loud)]
    with open(os.path.join(folder, "left_out.txt"), "w", encoding="utf-8", errors="replace") as file:
        file.writelines(line + "\n" for line in left_out + loud)
    with open(os.path.join(folder, "index.json"), "w") as file:
        json.dump({"report": report, "clips": clips}, file)


def summary(source: str, clips: list[dict]) -> str:
    """One line: how much there is, and how long the clips are."""
    seconds = sorted(clip["length"] / SAMPLE_RATE for clip in clips)
    captions = {caption for clip in clips for caption in clip["captions"]}
    return (
        f"{source}: {sum(seconds) / 3600:.2f} hours, {len(clips)} clips, {len(captions)} distinct captions, "
        f"{seconds[0]:.1f} / {seconds[len(clips) // 2]:.1f} / {seconds[-1]:.1f} s shortest / median / longest"
    )


def shortened(what: str, lines: list[str]) -> list[str]:
    """The first lines of a kind, indented, and a count of the others."""
    shown = [f"  {what}: {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  {what}: {len(lines) - SHOWN} more, see left_out.txt beside the prepared data")
    return shown


def read_prepared(folder: str) -> tuple[list[str], list[Clip]]:
    """The report and the clips of a prepared folder. UserError: something has damaged it since."""
    try:
        with open(os.path.join(folder, "index.json")) as file:
            index = json.load(file)
        ends = np.cumsum([clip["length"] for clip in index["clips"]])
        samples = np.asarray(np.memmap(os.path.join(folder, "audio.i16"), np.int16, "r"))
        if len(samples) != ends[-1]:
            raise ValueError("the length of audio.i16 is not the sum of its clips")
    except (OSError, KeyError, ValueError):
        raise UserError(f"{folder}: was damaged; delete this folder, and it is prepared anew") from None
    parts = np.split(samples, ends[:-1])
    return index["report"], [Clip(**clip, samples=part) for clip, part in zip(index["clips"], parts)]


# ----------------------------------------------------------------------------------------------------------
# Crops and mixing: what training hears.

# Eight pairs of everyday sounds that no training example joins: a model that can play them together has
# learnt to compose. Each of these categories has plenty of clips in sounds/ to be learnt from alone.
HELD_OUT_PAIRS = {
    frozenset(pair)
    for pair in (
        ("dog", "clock tick"),
        ("dog", "sea waves"),
        ("rain", "baby cry"),
        ("fire", "helicopter"),
        ("bird", "chainsaw"),
        ("rooster", "sea waves"),
        ("rooster", "helicopter"),
        ("sneeze", "footsteps"),
    )
}


def mix(a: torch.Tensor, b: torch.Tensor, snr_db: float, offset: int) -> torch.Tensor:
    """Lay b over a, `offset` samples later (or earlier), scaled so that a's mean power is snr_db above b's.

    Waves (T,) in [-1, 1]; the result is as long as a. What b has before and after a is cut off; a sum beyond
    [-1, 1] is turned down as a whole (section 3.2)."""
    power_a, power_b = a.square().mean(), b.square().mean()
    if power_a > 0 and power_b > 0:  # silence has no SNR
        b = b * (power_a / power_b * 10 ** (-snr_db / 10)).sqrt()
    y, start, end = a.clone(), max(0, offset), min(len(a), offset + len(b))
    if end > start:
        y[start:end] += b[start - offset : end - offset]
    return y / y.abs().max().clamp(min=1)


def may_mix(a: Clip, b: Clip) -> bool:
    """Not a clip with itself, and not the categories of HELD_OUT_PAIRS."""
    return a is not b and frozenset((a.category, b.category)) not in HELD_OUT_PAIRS


@dataclass
class Crop:
    """A piece of a clip, as training hears it."""

    clip: Clip
    begin: int  # sample of the clip at which it begins; below 0 where silence comes first
    wave: torch.Tensor  # (T,) float32
    caption: str


def read_crop(clip: Clip, length: int, begin: int = 0) -> torch.Tensor:
    """(length,) float32 of a clip from sample `begin` on; zeros lie before and after it."""
    samples = clip.samples[max(0, begin) : max(0, begin + length)]
    front = min(length, max(0, -begin))
    wave = np.pad(samples, (front, length - front - len(samples)))
    return torch.from_numpy(wave.astype(np.float32)).div_(32767)


class AudioData:
    """All sources as one list of clips, from which training draws crops.

    Of 'a.csv:2' and 'b.csv' the first is drawn twice as often; without weights, each by its length. Within
    a source, clips are drawn by their length."""

    def __init__(self, sources: list[str], folder: str, log: Callable = print, **columns):
        parts, weights = [], []
        for source in sources:
            source, weight = split_weight(source)
            parts.append(prepare(source, folder, log, **columns))
            weights.append(weight)
        choose_splits(parts)
        self.clips = [clip for part in parts for clip in part]
        self.train = [clip for clip in self.clips if clip.split != "val"]
        self.val = [clip for clip in self.clips if clip.split != "train"]
        if not self.train:
            raise UserError(
                f"{' '.join(sources)}: all clips are for testing; name the training clips as well"
            )
        log(f"training on {len(self.train)} clips, validating on {len(self.val)}")
        chance = []
        for part, weight in zip(parts, weights):
            sizes = np.array([clip.length for clip in part if clip.split != "val"], float)
            chance.append((weight or 1.0) * sizes / max(1, sizes.sum()) if any(weights) else sizes)
        self.cumulative = np.cumsum(np.concatenate(chance) / np.concatenate(chance).sum())

    @classmethod
    def from_flags(cls, args, log: Callable = print) -> "AudioData":
        """What `add_data_flags` asked for, prepared below --out."""
        columns = {"files": args.files, "words": args.words, "split_column": args.split_column}
        return cls(args.data, args.out, log, **columns)

    def draw(self, length: int, rng: np.random.Generator, min_level: float = 0.0, partner=None) -> Crop:
        """A random crop of a random training clip, and one of the clip's captions.

        It is drawn again, at most 20 times, while it is silent, may not be mixed with the clip `partner`, or
        stays below `min_level` times the peak of its clip: it would lack what the caption speaks of."""
        for _ in range(20):
            clip = self.train[np.searchsorted(self.cumulative[:-1], rng.random(), "right")]
            spare = clip.length - length
            begin = int(np.sign(spare) * rng.integers(abs(spare) + 1))  # a short clip lies anywhere in it
            wave = read_crop(clip, length, begin)
            allowed = partner is None or may_mix(clip, partner)
            if allowed and wave.abs().max() >= max(SILENCE, min_level * clip.peak):
                break
        return Crop(clip, begin, wave, clip.captions[int(rng.integers(len(clip.captions)))])

    def batch(self, n: int, length: int, rng: np.random.Generator, mix_share: float = 0.0, min_level=0.0):
        """n random crops of `length` samples as a list of `Crop`; a share of them is mixed in pairs.

        The paper's augmentation (section 3.2): at a random offset, at least half overlapping, at an SNR of -5
        to 5 dB, with the captions joined."""
        crops = []
        for _ in range(n):
            crop = self.draw(length, rng, min_level)
            if rng.random() < mix_share:
                other = self.draw(length, rng, min_level, partner=crop.clip)
                if may_mix(crop.clip, other.clip):  # else there is no other clip
                    offset = int(rng.integers(-(length // 2), length // 2 + 1))
                    wave = mix(crop.wave, other.wave, rng.uniform(-5, 5), offset)
                    crop = replace(crop, wave=wave, caption=f"{crop.caption} and {other.caption}")
            crops.append(crop)
        return crops

    def held_out(self, length: int, limit: int | None = None) -> tuple[torch.Tensor, list[Clip]]:
        """The same validation clips at every call, from their beginning: waves (n, length), and the clips.

        With a limit that many of them, evenly spaced."""
        n = min(limit or len(self.val), len(self.val))
        clips = [self.val[i * len(self.val) // n] for i in range(n)]
        return torch.stack([read_crop(clip, length) for clip in clips]), clips


def choose_splits(parts: list[list[Clip]]) -> None:
    """Say of every clip of every source whether it trains or validates ('both', of a single clip), in place.

    Where a source does not say it, a tenth of it validates; likewise where it says that all of it trains,
    unless another source validates. The tenth is drawn by the clips' names alone, never by --seed: codec and
    language model must not validate on what the other one trains on."""
    validates = [any(clip.split == "val" for clip in part) for part in parts]
    for part, said in zip(parts, validates):
        by_lot = sorted(part, key=lambda clip: hashlib.sha256(ascii(clip.name).encode()).digest())
        all_train = all(clip.split == "train" for clip in part)
        tenth = 0 if said or (all_train and any(validates)) else max(1, round(len(part) / 10))
        for i, clip in enumerate(by_lot):
            clip.split = "val" if clip.split == "val" or i < tenth else "train"
        if tenth == len(part):
            part[0].split = "both"


def split_weight(source: str) -> tuple[str, float | None]:
    """'a.csv:2' to ('a.csv', 2.0); without a weight, or where a file of that whole name exists, None."""
    match = re.fullmatch(r"(.+):(\d*\.?\d+)", source)
    if match and float(match[2]) > 0 and not os.path.exists(source):
        return match[1], float(match[2])
    return source, None


def mixtures(clips: list[Clip], length: int, held_out: bool, n: int, seed: int = 0) -> list[tuple]:
    """Test of composition: n mixtures of two validation clips whose categories are in HELD_OUT_PAIRS or not.

    Returns [(wave (length,), true caption, wrong caption), ...]; the wrong caption names another sound in
    place of one of the two. Fewer or none, where there are no such clips."""
    names = sorted({name for pair in HELD_OUT_PAIRS for name in pair})
    by_name = {name: [clip for clip in clips if clip.category == name] for name in names}
    names = [name for name in names if by_name[name]]
    pairs = [p for p in itertools.permutations(names, 2) if (frozenset(p) in HELD_OUT_PAIRS) == held_out]
    rng, made = np.random.default_rng(seed), []
    for _ in range(n if pairs and len(names) > 2 else 0):
        pair = pairs[rng.integers(len(pairs))]
        absent = [name for name in names if name not in pair]
        first, second, wrong = (pick(by_name[name], rng) for name in (*pair, pick(absent, rng)))
        offset = int(rng.integers(-(length // 4), length // 4 + 1))
        wave = mix(read_crop(first, length), read_crop(second, length), rng.uniform(-5, 5), offset)
        spoken, exchanged = [first, second], [first, second]
        exchanged[rng.integers(2)] = wrong
        made.append((wave, *(" and ".join(c.captions[0] for c in two) for two in (spoken, exchanged))))
    return made


def pick(items: list, rng: np.random.Generator):
    """One of the items, all as likely."""
    return items[rng.integers(len(items))]


# ----------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """Captions to ids: SentencePiece's BPE, lower case, bytes for what it has never seen; 0 is padding.

    BPE, since SentencePiece's unigram model never grows to whole words on a few captions."""

    def __init__(self, model: bytes | torch.Tensor):
        """model: what `train` made, or the uint8 tensor of `to_tensor`. UserError: it is damaged."""
        self.model = bytes(model.tolist()) if isinstance(model, torch.Tensor) else model
        # SentencePiece may crash over damaged bytes instead of complaining: a checksum goes before the model.
        if len(self.model) < 5 or zlib.crc32(self.model[4:]) != int.from_bytes(self.model[:4], "little"):
            raise UserError("the tokenizer's model is damaged; take the checkpoint from its source again")
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model[4:])
        self.vocab_size, self.encode = self.pieces.vocab_size(), self.pieces.encode

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn about `vocab_size` pieces from captions: fewer if these are few, but always all 256 bytes."""
        lines = sorted({" ".join(caption.split())[:1000] for caption in captions})
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=max(vocab_size, 300),
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,
            minloglevel=2,
        )
        return cls(zlib.crc32(model.getvalue()).to_bytes(4, "little") + model.getvalue())

    def batch(self, captions: list[str], max_len: int) -> torch.Tensor:
        """Captions -> (B, max_len) int64 ids, padded with 0; what is longer than that is cut."""
        rows = [self.encode(caption)[:max_len] for caption in captions]
        return torch.tensor([row + [0] * (max_len - len(row)) for row in rows])

    def to_tensor(self) -> torch.Tensor:
        """The model as bytes in a tensor, which a checkpoint can hold: (bytes,) uint8."""
        return torch.tensor(list(self.model), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------
# What the three scripts share. It lives here because nothing imports a script.

SOUNDS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sounds", "clips.csv")  # the default data


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message}; type python {self.prog} --help for all flags")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what to train on, the same in all scripts."""
    parser.add_argument(
        "--data", nargs="+", default=[SOUNDS], help="table or folder, each with an optional :WEIGHT"
    )
    add_column_flags(parser)


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that overrule what is guessed of a table."""
    add = parser.add_argument
    add("--files", metavar="COLUMN", help="column that names the sound files (default: found by content)")
    add("--words", metavar="COLUMN[,COLUMN]", help="columns of captions (default: found by name and content)")
    add("--split-column", metavar="COLUMN", help="column that says train, val or test (default: found)")


def file_name(text: str) -> str:
    """A text as part of a file's name: letters and digits, at most 60."""
    return "".join(c if c.isalnum() else "_" for c in text)[:60]


def shell_quote(text: str) -> str:
    """A word as it has to be typed."""
    return shlex.quote(text) if os.name == "posix" else f'"{text}"'


def whole_number(text: str, least: int = 0) -> int:
    """An argparse type: a whole number from `least` to 2^62."""
    if not text.isdecimal() or not least <= int(text) < 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} and below 2^62")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return whole_number(text, 1)


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Around main(): what the user can mend ends in one line and exit code 2; a bug keeps its traceback.

    The user's are UserError, the `kinds` given, a lack of memory, and errors of files that have a name."""
    try:
        yield
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, *kinds) as error:
        text = " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        text = "out of memory; halve --batch (train_lm.py: --micro), or take a smaller --size"
    except OSError as error:
        if not error.filename:
            raise
        text = f"{error.filename}: {error.strerror}"
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun, every process has the same to say
        print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def pick_device(name: str = "auto") -> torch.device:
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' -> a device that exists here. UserError: it does not."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        there.append("cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        name = "cuda" if "cuda" in there else "cpu"
    if name not in there:
        raise UserError(f"--device {name}: not a device of this machine; it has {', '.join(there)}")
    return torch.device(name)


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on processors that multiply it natively, else float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if device.type == "cuda" or (device.type == "cpu" and native and native()):
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Around a model's forward pass: the fast number format for what tolerates it."""
    return torch.autocast(device.type, fast_dtype(device), enabled=fast_dtype(device) != torch.float32)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices: momentum, then a step of the same size in all its directions.

        m = .95 m + .05 g;    w = (1 - lr * weight_decay) w - lr * .2 sqrt(max(rows, columns)) * U V^T

    where U S V^T is the nesterov momentum .95 m + .05 g. The factor gives the step the size of Adam's
    (arXiv 2502.16982). Written out, for PyTorch's own (torch.optim.Muon) always multiplies in bfloat16, which
    takes 80 times as long on a processor that cannot: a step of the codec took 9.5 s there instead of 2."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every matrix (rows, columns) that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                direction = orthogonalize(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """About U V^T of g = U S V^T (rows, columns), by five Newton-Schulz steps: singular values near 1."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = (x / x.norm().clamp(min=1e-7)).to(fast_dtype(g.device))
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give all groups of all optimizers the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def lock_folder(folder: str):
    """Make `folder` and hold it for as long as what is returned is kept: two runs would undo each other.

    UserError: another run holds it, or it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115 (it stays open)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another --out") from None
    try:
        import fcntl  # not on Windows, where nobody is stopped

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing there; wait, or choose another --out") from None
    except (ImportError, OSError):  # some network drives cannot lock: nobody is stopped there either
        pass
    return file


def save_atomic(obj: object, path: str) -> None:
    """torch.save by way of a temporary file: whatever happens, `path` holds the old or the new, and whole.

    UserError: the disk is full, or may not be written to."""
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
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path}: cannot save ({why}); free some space or choose another --out") from None


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world size): this process among those that torchrun started, or (device, 0, 1)."""
    device, world_size = pick_device(device_name), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while the first one prepares the data, however long that takes.
    patience = datetime.timedelta(days=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device, dist.get_rank(), world_size


def first_then_all(make: Callable):
    """make() in process 0 and only then in the others, which find on disk what it prepared.

    If it fails by the user's fault, process 0 says so, and the others end without a word."""
    if not dist.is_initialized():
        return make()
    result, failed = None, None
    if dist.get_rank() == 0:
        try:
            result = make()
        except UserError as error:
            failed = error
    outcome = [failed is not None]
    dist.broadcast_object_list(outcome, 0)
    if failed:
        raise failed
    if outcome[0]:
        sys.exit(2)
    return result or make()


class Stopper:
    """Turns Ctrl-C and SIGTERM into a flag: the loop ends its step, saves, says where. A second one kills."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        """The signal handler."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def asked(self, device: torch.device) -> bool:
        """Has any process been asked to stop? All must know, or they would wait for the one that left."""
        flag = torch.tensor(float(self.signal is not None), device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def count_bad_steps(bad: int, step: int, resume_path: str, say: Callable) -> int:
    """One more step whose gradient was not finite: how many in a row. UserError: ten are enough."""
    if bad + 1 == 10:
        then = f"--resume from {resume_path}" if os.path.exists(resume_path) else "start again"
        raise UserError(f"{bad + 1} steps in a row were not finite: lower lr in RECIPES and {then}")
    say(f"step {step}: the gradient is not finite; step skipped ({bad + 1} in a row)")
    return bad + 1


class Clock:
    """Measures the speed of training; evaluation and saving are left out."""

    def __init__(self, step: int):
        self.step, self.began = step, time.time()

    def steps_per_second(self, step: int) -> float:
        """Since the last call."""
        speed = (step - self.step) / (time.time() - self.began)
        self.step, self.began = step, time.time()
        return speed

    @contextlib.contextmanager
    def paused(self):
        """Around what is not training."""
        paused_at = time.time()
        yield
        self.began += time.time() - paused_at


class Log:
    """A CSV with one row per logged step. A resumed run first drops the rows later than its checkpoint."""

    def __init__(self, path: str, from_step: int = 0):
        self.path, kept = path, []
        if from_step and os.path.exists(path):
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= from_step]
        open(path, "w").close()
        for row in kept:
            self.write(row)

    def write(self, row: dict) -> None:
        """Append a row; the first one names the columns."""
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


# ----------------------------------------------------------------------------------------------------------
# python data.py SOURCE: what training would read, before anyone waits for it.


def save_entries(entries: list[Entry], path: str):
    """A plain table that `read_entries` reads back as these entries: what cannot be guessed is mended there."""
    folder = os.path.dirname(os.path.abspath(path))
    most = max(len(entry.captions) for entry in entries)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "category", "split", *(f"caption_{i + 1}" for i in range(most))])
        for entry in entries:
            inside = entry.path.startswith(os.path.join(folder, ""))
            name = os.path.relpath(entry.path, folder) if inside else entry.path
            if not name.isprintable():
                name = name_key(name) + os.path.splitext(name)[1]
            captions = entry.captions + [""] * (most - len(entry.captions))
            writer.writerow([name, entry.category, entry.split, *captions])


def show_entries(entries: list[Entry]):
    """Print the clips of each split, hours, the commonest and the longest captions, and five pairs."""
    captions = collections.Counter(caption for entry in entries for caption in entry.captions)
    splits = collections.Counter(entry.split or "not said" for entry in entries)
    print(f"{len(entries)} clips ({', '.join(f'{n} {split}' for split, n in sorted(splits.items()))}), "
          f"{captions.total()} captions, {len(captions)} of them distinct")  # fmt: skip
    sample = entries[:: -(-len(entries) // 2000)]
    seconds, broken = 0.0, []
    for entry in sample:
        try:
            seconds += soundfile.info(os.fsencode(entry.path)).duration
        except (RuntimeError, OSError) as why:
            broken.append(f"  {why}")
    if len(sample) < len(entries):
        print(
            f"about {seconds / len(sample) * len(entries) / 3600:.1f} hours, as {len(sample)} of them have it"
        )
    else:
        print(f"{seconds / 3600:.2f} hours")
    if broken:
        print(f"{len(broken)} of these cannot be opened:", *broken[:10], sep="\n")
    print("commonest captions:", *(f"  {n:6} {caption}" for caption, n in captions.most_common(10)), sep="\n")
    print("longest captions:")
    for caption in sorted(captions, key=len, reverse=True)[:3]:
        print(f"  {len(caption.split()):6} words: {textwrap.shorten(caption, 90, placeholder=' ...')}")
    print("for example:")
    for entry in entries[:: -(-len(entries) // 5)]:
        print(printable(f"  {entry.path}: {' | '.join(entry.captions)}"))


def main():
    """Show what training would read, and save it as a plain table if asked to."""
    parser = Parser(description="Shows what training would read from a table or a folder.")
    parser.add_argument("source", help="CSV, TSV, JSON (lines), or a folder with a table, texts, or classes")
    add_column_flags(parser)
    parser.add_argument("--save", metavar="CSV", help="write it down as a plain table, to be mended by hand")
    args = parser.parse_args()
    entries = read_entries(args.source, print, args.files, args.words, args.split_column)
    show_entries(entries)
    if args.save:
        save_entries(entries, args.save)
        print(f"saved as {args.save}; train on it with --data {args.save}")


if __name__ == "__main__":
    with one_line_errors():
        main()
