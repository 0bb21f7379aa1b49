"""A page to listen to: for each word a real recording, the same through the codec, and what the model makes.

    python experiments/listen.py --out assets/listen.html
    python experiments/listen.py --words "dog,rain,bell" --lm out/lm.pt --codec out/codec.pt --out listen.html

The page needs no other file. Its sounds are MP3s, a tenth of the size of WAVs; those made from words also lie
beside it, in a folder of its name: listen/dog_bark.mp3.
"""

import base64
import html
import io
import os

import soundfile
from common import three_versions

import data as D
from codec import CodecError
from lm import LMError
from sample import png, spectrogram

WORDS = "dog,rain,sea waves,baby cry,clock tick,fire,helicopter,chainsaw,rooster,bird,thunder,laugh"
COLUMNS = ("a real recording", "through the codec", "from the words alone")
STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { width: 100%; border-spacing: .5rem; table-layout: fixed }
th { text-align: left; font-weight: 600 }
th:first-child { width: 7rem }
img { width: 100%; height: 5rem; display: block; border-radius: 6px 6px 0 0 }
audio { width: 100%; height: 2rem }
@media (max-width: 40rem) { /* phones: the columns below each other, each with its name */
  tr:first-child { display: none }
  th, td { display: block; width: auto }
  th { font-size: 1.25rem; margin-top: 1.5rem }
  td::before { content: attr(title) }
}
</style>"""


def mp3(wave) -> bytes:
    """Wave (T,) as an MP3."""
    file = io.BytesIO()
    soundfile.write(file, wave.clamp(-1, 1).numpy(), D.SAMPLE_RATE, format="MP3")
    return file.getvalue()


def cell(words: str, column: str, wave) -> str:
    """A spectrogram with a player below it."""
    picture = base64.b64encode(png(spectrogram(wave, 240))).decode()
    sound = base64.b64encode(mp3(wave)).decode()
    return (
        f"<td title='{column}'>"
        f"<img alt='spectrogram of {html.escape(words)}, {column}' src='data:image/png;base64,{picture}'>"
        f"<audio controls preload=metadata src='data:audio/mpeg;base64,{sound}'></audio></td>"
    )


def page(rows: list[tuple], note: str) -> str:
    """Rows are (words, waves of the three columns)."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8>"]
    parts += ["<meta name=viewport content='width=device-width'>", "<title>nanoAudioGen</title>", STYLE]
    parts += [f"<h1>nanoAudioGen</h1><p>{html.escape(note)}</p><table>"]
    parts.append("<tr><th>" + "".join(f"<th>{column}" for column in COLUMNS))
    for words, waves in rows:
        cells = [cell(words, column, wave) for column, wave in zip(COLUMNS, waves)]
        parts += [f"<tr><th>{html.escape(words)}", *cells]
    parts.append("</table><p>Authors and licences of the recordings: sounds/CREDITS.csv.</p></html>\n")
    return "\n".join(parts)


def main():
    """Read the flags, make the sounds, write the page."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", required=True, help="an HTML file")
    add("--words", default=WORDS, help="categories")
    add("--data", default=D.SOUNDS, help="table or folder with the real clips")
    add("--codec", default="pretrained/codec.pt")
    add("--lm", default="pretrained/lm.pt")
    add("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    folder = os.path.splitext(args.out)[0]  # of the MP3s
    os.makedirs(folder, exist_ok=True)
    codec, prompts, versions = three_versions(args)
    note = (
        "5 s at 16 kHz. The recordings are validation clips; the codec makes "
        f"{codec.cfg.kbps} kbit/s of them. On the right, the first sound made of each word, at guidance "
        f"{args.guidance:g}."
    )
    D.write_atomic(page(list(zip(prompts, zip(*versions))), note).encode(), args.out)
    for words, wave in zip(prompts, versions[-1]):
        D.write_atomic(mp3(wave), os.path.join(folder, f"{D.file_name(words)}.mp3"))
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
