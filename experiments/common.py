"""What the scripts in this folder share; it prints no table of its own."""

import os
import sys

import torch

# Whoever imports this file first finds the project's own files, too.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data as D
from codec import Codec
from lm import AudioLM

LENGTH = 5 * D.SAMPLE_RATE  # of a sound that is judged: a clip from its beginning, with silence after it


def new_folder(path: str) -> None:
    """Make a folder for a pair of models. UserError: it holds weights already."""
    os.makedirs(path, exist_ok=True)
    if not {"codec.pt", "lm.pt"}.isdisjoint(os.listdir(path)):
        raise D.UserError(f"{path}: holds weights, which would be lost: name another folder")


def category(clip) -> str:
    """What a clip counts as: its category or, where the table has none, its first caption."""
    return clip.category or clip.captions[0]


def by_category(clips, names) -> dict[str, list]:
    """The clips of each of these categories."""
    return {name: [clip for clip in clips if category(clip) == name] for name in names}


def clips_of(groups: dict, name: str) -> list:
    """The clips of a category. UserError: there are none."""
    if not groups[name]:
        raise D.UserError(f"{name}: has no training clip, or no validation clip: name others with --words")
    return groups[name]


def gather(groups: dict, counts: dict):
    """So many clips of each category, from their beginning: waves (n, LENGTH), and their categories. They are
    evenly spaced; where there are fewer, some come again. UserError: of one there are none."""
    waves, names = [], []
    for name, n in counts.items():
        clips = clips_of(groups, name) if n else []
        waves += [D.read_crop(clips[i * len(clips) // n], LENGTH) for i in range(n)]
        names += n * [name]
    return torch.stack(waves), names


def prompt(groups: dict, name: str) -> str:
    """The shortest caption of a category's clips. UserError: there are none."""
    captions = [caption for clip in clips_of(groups, name) for caption in clip.captions]
    return min(captions, key=lambda text: (len(text), text))


def through(codec, waves):
    """Waves (n, T), encoded and decoded."""
    return torch.cat([codec.decode(codec.encode(part))[:, : waves.shape[1]] for part in waves.split(8)])


def from_words(lm, codec, prompts: list[str], **options):
    """5 s of sound for each prompt (n, LENGTH), the i-th with seed i; options of `AudioLM.generate`."""
    text = D.Tokenizer(lm.tokenizer).batch(prompts, lm.cfg.max_text_len).to(lm.bos.device)
    made = []
    for part, seeds in zip(text.split(20), torch.arange(len(text)).split(20)):
        codes = lm.generate(part, lm.cfg.max_frames, seeds=seeds, **options)
        made.append(codec.decode(codes)[:, :LENGTH].cpu())
    return torch.cat(made)


def three_versions(args):
    """The codec, a prompt for each of --words, and 5 s of it as recorded, through the codec, and from words:
    three times (n, LENGTH). UserError: a word has no validation clip, or no training clip."""
    codec = Codec.load(args.codec)
    lm = AudioLM.load(args.lm, codec_hash=codec.hash())
    data = D.AudioData([args.data], "out")
    words = [word.strip() for word in args.words.split(",")]
    train, val = by_category(data.train, words), by_category(data.val, words)
    real, prompts = gather(val, dict.fromkeys(words, 1))[0], [prompt(train, word) for word in words]
    made = from_words(lm, codec, prompts, guidance=args.guidance)
    return codec, prompts, (real, through(codec, real), made)
