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


def category(clip) -> str:
    """What a clip counts as: its category or, where the table has none, its first caption."""
    return clip.category or clip.captions[0]


def by_category(clips, names) -> dict[str, list]:
    """The clips of each of these categories."""
    return {name: [clip for clip in clips if category(clip) == name] for name in names}


def gather(groups: dict, counts: dict):
    """So many clips of each category, from their beginning: waves (n, LENGTH), and their categories. They are
    evenly spaced; where there are fewer, some come again."""
    pairs = [(groups[name][i * len(groups[name]) // n], name) for name, n in counts.items() for i in range(n)]
    return torch.stack([D.read_crop(clip, LENGTH) for clip, _ in pairs]), [name for _, name in pairs]


def prompt(clips: list) -> str:
    """The shortest caption of a category's clips. UserError: there are no clips."""
    if not clips:
        raise D.UserError("a word has no training clip: name others with --words")
    return min((caption for clip in clips for caption in clip.captions), key=lambda text: (len(text), text))


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
    for word in words:
        if not (train[word] and val[word]):
            raise D.UserError(f"--words {word}: {args.data} lacks validation or training clips of it")
    real, prompts = gather(val, dict.fromkeys(words, 1))[0], [prompt(train[word]) for word in words]
    made = from_words(lm, codec, prompts, guidance=args.guidance)
    return codec, prompts, (real, through(codec, real), made)
