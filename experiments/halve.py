"""A trained pair with its weights in 16 bits, half the size.

    python experiments/halve.py out half            reads codec.pt and lm.pt in out/, writes them to half/

A codec's encoder decides which codes a sound becomes. Rounded to 16 bits it chooses a few others (the
codebooks stay in 32 bits, or it would be more), and has another hash; a language model is bound to the hash
of the codec whose codes it learnt. So the script counts the codes that change, in validation clips, and gives
lm.pt the new hash only if its loss over these clips grows by less than 0.005 nats.
To lose nothing at all, halve the codec alone, and train the language model on the halved codec.
"""

import os

import torch
from common import new_folder

import data as D
import train_lm
from codec import Codec, CodecError, load_checkpoint, log_spectrum_distance, si_snr
from lm import AudioLM, LMError


def halve(source: str, target: str, kind: str, **changes) -> None:
    """Copy a checkpoint with its weights in 16 bits and a few other entries; codebooks stay as they are."""
    saved = load_checkpoint(source, kind)
    for name, tensor in saved["model"].items():
        if tensor.is_floating_point() and not name.startswith("quantizer"):
            saved["model"][name] = tensor.half()
    wanted = ("kind", "config", "model", "tokenizer", "words", "codec_hash")
    D.save_atomic({key: saved[key] for key in wanted if key in saved} | changes, target)
    print(f"{target}: {os.path.getsize(source) / 1e6:.1f} MB are now {os.path.getsize(target) / 1e6:.1f} MB")


def compare_codecs(full, half, waves) -> None:
    """Print how many codes agree, and how well both codecs do."""
    codes, changed = train_lm.encode(full, waves, "cpu"), train_lm.encode(half, waves, "cpu")
    agree = " ".join(f"{100 * share:.2f}" for share in (codes == changed).float().mean((0, 2)))
    print(f"% of the codes that are the same, stream by stream: {agree}")
    for title, codec, of in (("full", full, codes), ("halved", half, changed)):
        decoded = torch.cat([codec.decode(part)[:, : waves.shape[1]] for part in of.split(8)])
        snr, distance = si_snr(waves, decoded).median(), log_spectrum_distance(waves, decoded).mean()
        print(f"{title:8}SI-SNR {snr:.3f} dB, log-spectrum {distance:.4f}")


def main():
    """Halve the codec, compare, halve the language model."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder with codec.pt and, if it is trained already, lm.pt")
    parser.add_argument("target", help="folder to write to")
    parser.add_argument("--data", default=D.SOUNDS, help="whose validation clips are compared")
    args = parser.parse_args()
    codec_in, lm_in = (os.path.join(args.source, name) for name in ("codec.pt", "lm.pt"))
    codec_out, lm_out = (os.path.join(args.target, name) for name in ("codec.pt", "lm.pt"))
    full = Codec.load(codec_in)
    new_folder(args.target)
    waves, clips = D.AudioData([args.data], args.source).held_out(5 * D.SAMPLE_RATE, limit=60)
    halve(codec_in, codec_out, "nanoaudiogen codec")
    half = Codec.load(codec_out)
    compare_codecs(full, half, waves)
    if not os.path.exists(lm_in):
        return

    hashes, captions, losses = (full.hash(), half.hash()), [clip.captions[0] for clip in clips], []
    if AudioLM.load(lm_in).codec_hash not in hashes:
        raise D.UserError(f"{lm_in}: learnt the codes of another codec: name the folder of both")
    halve(lm_in, lm_out, "nanoaudiogen lm", codec_hash=half.hash())
    for title, codec, path in (("full", full, lm_in), ("halved", half, lm_out)):
        lm = AudioLM.load(path)
        codes = train_lm.encode(codec, waves, "cpu")
        loss = train_lm.caption_losses(lm, D.Tokenizer(lm.tokenizer), codes, captions).mean()
        losses.append(loss.item())
        print(f"{title:8}loss of the language model {loss:.4f} nats per code")
    if losses[1] > losses[0] + 0.005:
        os.remove(lm_out)
        raise D.UserError(f"{lm_out}: not written, its loss grew: train lm.pt on the codes of {codec_out}")


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
