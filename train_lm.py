"""Train the language model on the codec's codes: the second of the three commands.

    python train_lm.py --streams 4                           the recordings in sounds/, the codec in --out
    python train_lm.py --data clips.csv more/:2              your own clips; `more/` is drawn twice as often
    python train_lm.py --data mine/ --finetune pretrained    teach a trained model your own clips
    python train_lm.py --data clips.csv --resume             go on after an interruption
    python train_lm.py --data clips.csv --resume --steps 20000   go on for longer than was planned
    python train_lm.py --data clips.csv --eval_only          measure the model in --out on the held-out clips
    torchrun --nproc_per_node=8 train_lm.py --size base ...  several GPUs (or machines that share --out)

Reads codec.pt from --out. Writes there: lm.pt (what sample.py loads), lm_train.pt (what --resume loads),
lm.csv (the log) and lm_wavs/ (sounds for held-out captions).
AudioGen (arXiv 2209.15352) section 3.2; sizes and learning rate from its section 4, the cool-down is ours.
"""

import contextlib
import copy
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as D
from codec import Codec, CodecError
from lm import AudioLM, LMConfig, LMError, cross_entropy, load_checkpoint

# A size is one entry here and one in lm.SIZES. `tiny` is settled by short runs (experiments/README.md);
# `base` and `large` follow the paper, but for Muon and fewer steps: for hours of sound, not thousands.
# `micro` clips of 5 s, or as many seconds of shorter ones, go through the model at once for every 24 GiB of
# a GPU. `text_len` is the least and the most tokens of text; `text_window` takes as few as the captions need,
# for each costs as much as a frame.
RECIPES = {
    "tiny": dict(steps=2600, batch=4, micro=4, lr=4e-3, dropout=0.1, vocab_size=512, text_len=(32, 128)),
    "base": dict(steps=5000, batch=256, micro=16, lr=5e-4, dropout=0.0, vocab_size=8000, text_len=(64, 256)),
    "large": dict(steps=50000, batch=256, micro=8, lr=5e-4, dropout=0.0, vocab_size=8000, text_len=(64, 256)),
}
RECIPES["large"]["shard"] = True  # each process keeps the optimizers' state for a part of the weights only

SECONDS = 5  # of the longest training examples; `train_step` also takes halves and quarters of it
WARMUP = 3000  # steps, and at most a tenth of the run
COOLDOWN = 0.3  # share of the run at whose end the learning rate falls to zero
MIN_LEVEL = 0.2  # a crop must reach this share of its clip's peak, or it lacks what the caption speaks of
CAPTION_DROPOUT = 0.1  # share of examples without caption: guidance needs a model of sound without words
CODE_ERRORS = 0.075  # share of input codes replaced at random: in sampling it reads its own mistakes
HISTORY_DROPOUT = 0.1  # share of examples predicted without their past: words are then learnt sooner


def get_args():
    """The flags. The default of --size depends on the device; what a size means stands in RECIPES."""
    parser = D.Parser(description="Train the language model.")
    add = parser.add_argument
    D.add_training_flags(parser)
    add("--out", default="out", help="folder with codec.pt, for checkpoints, log and prepared data")
    add("--codec", help="codec checkpoint (default: codec.pt in --out)")
    add("--finetune", metavar="FOLDER", help="start from lm.pt and codec.pt there instead of from nothing")
    add("--streams", type=int, help="must be the codec's (default: the codec's)")
    add("--size", choices=sorted(RECIPES), help="default: base with CUDA, tiny without")
    add("--batch", type=D.positive, help="clips of 5 s per step; shorter ones fill as many seconds")
    add("--micro", type=D.positive, help="of these, how many at once in a process; less if memory runs out")
    add("--mix", type=float, help="share of examples that mix two clips (default: 0.5)")
    args = parser.parse_args()
    if not 0 <= (args.mix or 0) <= 1:
        raise D.UserError(f"--mix {args.mix}: expected a share from 0 to 1")
    if args.finetune and args.size:
        raise D.UserError("--size is that of the model in --finetune: leave it out")
    if args.finetune and os.path.isfile(args.finetune):  # pretrained/lm.pt means pretrained
        folder, name = os.path.split(args.finetune)
        if name != "lm.pt":
            raise D.UserError(f"--finetune {args.finetune}: expected a folder that holds lm.pt and codec.pt")
        args.finetune = folder or "."
    if args.finetune and os.path.realpath(args.finetune) == os.path.realpath(args.out):
        raise D.UserError(f"--finetune {args.finetune}: would be overwritten, choose another --out")
    return args


# ----------------------------------------------------------------------------------------------------------
# One step


class Training:
    """All that changes while the language model is trained: it is what a resumed run reads."""

    def __init__(self, lm: AudioLM, recipe: dict, run: D.Run):
        self.lm, self.recipe = lm.train(), recipe
        self.device, self.rank, self.world_size = run.device, run.rank, run.world_size
        self.tokenizer = D.Tokenizer(lm.tokenizer)
        self.flags = run.flags  # what it trains on, see `D.recall_flags`
        cuda = run.device.type == "cuda"
        self.sharded = recipe.get("shard", False) and run.world_size > 1
        self.optimizers = make_optimizers(lm, recipe["lr"], cuda, self.sharded)
        if D.can_compile(run.device):  # block by block: what one compiles to serves all the others
            for block in [*lm.text_encoder.blocks, *lm.blocks]:
                block.compile(dynamic=False)
        self.model = lm
        if run.world_size > 1:
            self.model = DistributedDataParallel(lm, device_ids=[run.device.index] if cuda else None)

    def save(self, path: str, resume_path: str, step: int) -> None:
        """Write both checkpoints; to be called in all processes, which send their part to the first."""
        if self.sharded:
            for optimizer in self.optimizers.values():
                optimizer.consolidate_state_dict(0)
        if self.rank == 0:
            training = {"kind": "nanoaudiogen lm training", "steps": self.recipe["steps"], "step": step}
            training |= {"flags": self.flags, "rng": torch.get_rng_state()}
            training |= {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            D.save_atomic(self.lm.checkpoint() | training, resume_path)
            D.save_atomic(self.lm.checkpoint(), path)

    def load(self, saved: dict) -> int:
        """Go on from a checkpoint; returns the step it had reached."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        return saved["step"]


def draw_batch(data, codec, tokenizer, cfg: LMConfig, n: int, samples: int, mix: float, rng):
    """n training examples of `samples` samples each, as `AudioLM.forward` takes them: codes (n, K, F), text
    ids (n, N), history_mask (n,), first_frame (n,), input_codes (n, K, F).

    All that is random comes from rng."""
    device = codec.quantizer.codebooks[0].embed.device
    crops = data.batch(n, samples, rng, mix, MIN_LEVEL)
    codes = codec.encode(torch.stack([crop.wave for crop in crops]).to(device))  # (n, K, F)
    captions = ["" if rng.random() < CAPTION_DROPOUT else crop.caption for crop in crops]
    text = tokenizer.batch(captions, cfg.max_text_len)
    history_mask = torch.from_numpy(rng.random(n) >= HISTORY_DROPOUT)
    first_frame = torch.tensor([crop.begin for crop in crops]) // codec.cfg.hop
    first_frame = first_frame.clamp(0, cfg.max_frames - codes.shape[2])  # what comes later counts as the end
    is_wrong = torch.from_numpy(rng.random(codes.shape) < CODE_ERRORS).to(device)
    others = torch.from_numpy(rng.integers(cfg.codebook_size, size=codes.shape)).to(device)
    input_codes = torch.where(is_wrong, others, codes)
    return codes, text.to(device), history_mask.to(device), first_frame.to(device), input_codes


def train_step(t: Training, data, codec, step: int, args):
    """One step. Returns the cross-entropy of each stream (K,), the norm of the gradient, and whether it was
    applied.

        L_LM = - mean over streams i, frames j of log p(c_j^i | u, c_1 .. c_{j-1}), c the codes  (section 3.2)

    Words matter most where a sound begins; later frames can be predicted from earlier ones. So most examples
    are short: a step takes clips of 5 s, or twice as many of 2.5 s, or four times as many of 1.25 s."""
    D.set_lr(t.optimizers.values(), learning_rate(t.recipe["lr"], step, t.recipe["steps"]))
    # The leading 1 or 2 makes this generator differ from those below: NumPy pads seeds with zeros, so that
    # (seed, step) and (seed, step, 0, 0) would be the same.
    parts = 2 ** int(np.random.default_rng((1, args.seed, step)).integers(3))
    n, samples = t.recipe["micro"] * parts, SECONDS * D.SAMPLE_RATE // parts
    stream_losses = 0.0
    for i in range(t.recipe["accumulate"]):
        rng = np.random.default_rng((2, args.seed, step, t.rank, i))
        batch = draw_batch(data, codec, t.tokenizer, t.lm.cfg, n, samples, args.mix, rng)
        is_last = i == t.recipe["accumulate"] - 1  # only then do the processes average their gradients
        alone = t.model is t.lm
        with contextlib.nullcontext() if is_last or alone else t.model.no_sync():
            with D.autocast(t.device):
                logits, loss = t.model(*batch)
            (loss / t.recipe["accumulate"]).backward()
        nll = cross_entropy(logits.detach(), batch[0])  # (n, K, F)
        stream_losses = stream_losses + nll.mean((0, 2)) / t.recipe["accumulate"]  # (K,)
    grad_norm = torch.nn.utils.clip_grad_norm_(t.lm.parameters(), 1.0)
    finite = bool(torch.isfinite(grad_norm))
    if finite:
        for optimizer in t.optimizers.values():
            optimizer.step()
    t.lm.zero_grad()
    return stream_losses, grad_norm, finite


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up, inverse square root, and a linear cool-down to zero over the end of the run."""
    warmup = min(WARMUP, max(1, steps // 10))
    decay = min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
    return peak * decay * min(1, (steps - step) / (COOLDOWN * steps))


def make_optimizers(lm, lr: float, cuda: bool, shard: bool) -> dict:
    """Muon for the matrices of the blocks, AdamW for tables, heads and vectors; vectors do not decay.

    Sharded AdamW is not fused, for its count of steps is kept on the CPU when it resumes."""
    matrices = [p for name, p in lm.named_parameters() if p.dim() == 2 and "blocks" in name]
    tables = [p for name, p in lm.named_parameters() if p.dim() == 2 and "blocks" not in name]
    vectors = [p for p in lm.parameters() if p.dim() == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    muon = {"lr": lr, "weight_decay": 0.1}
    adamw = {"lr": lr, "betas": (0.9, 0.95), "fused": cuda and not shard}
    if not shard:
        return {"muon": D.Muon(matrices, **muon), "adamw": torch.optim.AdamW(groups, **adamw)}
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import, and rarely needed

    return {
        "muon": ZeroRedundancyOptimizer(matrices, D.Muon, **muon),
        "adamw": ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw),
    }


# ----------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class HeldOut:
    """What the model is measured on: validation clips, and mixtures of two of them to test composition."""

    clips: list[D.Clip]
    codes: torch.Tensor  # (n, K, F)
    pool: list[D.Clip]  # whose captions serve as wrong ones
    mixtures: dict  # 'seen pairs' and 'held-out pairs': codes (n, K, F), true captions, wrong captions


def make_held_out(data, codec, device) -> HeldOut:
    """Everything that does not change from one evaluation to the next, as codes."""
    waves, clips = data.held_out(SECONDS * D.SAMPLE_RATE, limit=120)
    pool = clips + data.train[:: math.ceil(len(data.train) / 1000)]
    mixtures = {}
    for name, held_out in (("seen pairs", False), ("held-out pairs", True)):
        made = D.mixtures(data.val, SECONDS * D.SAMPLE_RATE, held_out, n=64)
        if made:
            mixed, true, wrong = zip(*made)
            mixtures[name] = encode(codec, torch.stack(mixed), device), list(true), list(wrong)
    return HeldOut(clips, encode(codec, waves, device), pool, mixtures)


def encode(codec, waves, device):
    """Waves (n, T) to codes (n, K, F), a few at a time."""
    return torch.cat([codec.encode(part.to(device)) for part in waves.split(8)])


def wrong_captions(clips: list, pool: list) -> list[str] | None:
    """For every clip the caption of one that sounds like something else; None if any has no such other."""
    rng, wrong = np.random.default_rng(0), []
    for clip in clips:
        same = set(clip.captions)
        others = [other for other in pool if not same & set(other.captions)]
        others = [other for other in others if other.category != clip.category or not clip.category]
        if not others:
            return None
        wrong.append(D.pick(others, rng).captions[0])
    return wrong


@torch.no_grad()
def caption_losses(lm, tokenizer, codes, captions: list[str]):
    """Cross-entropy of each clip and stream given its caption (n, K), in nats per code."""
    text, parts = tokenizer.batch(captions, lm.cfg.max_text_len).to(codes.device), []
    for c, t in zip(codes.split(8), text.split(8)):
        parts.append(cross_entropy(lm.predict(lm.text_encoder(t), c), c).mean(2))
    return torch.cat(parts)


def caption_accuracy(lm, tokenizer, codes, loss, wrong: list[str]) -> float:
    """How often a clip is likelier given its true caption, by its `loss` (n, K), than given a wrong one."""
    is_better = loss.mean(1) < caption_losses(lm, tokenizer, codes, wrong).mean(1)  # (n,)
    return is_better.float().mean().item()


def evaluate(lm, tokenizer, held_out: HeldOut, final: bool = False) -> dict:
    """Held-out loss, per stream and in all, and caption accuracy: how often a clip is likelier given
    its true caption than given a wrong one (chance .5). At the end also that of mixtures, whose wrong caption
    exchanges one of the two sounds: of pairs that training has heard together, and of D.HELD_OUT_PAIRS."""
    codes, true = held_out.codes, [clip.captions[0] for clip in held_out.clips]
    loss = caption_losses(lm, tokenizer, codes, true)  # (n, K)
    measures = {"loss": loss.mean().item()} | {f"loss{k}": x for k, x in enumerate(loss.mean(0).tolist())}
    wrong = wrong_captions(held_out.clips, held_out.pool)
    if wrong is None:
        return measures
    measures["caption accuracy"] = caption_accuracy(lm, tokenizer, codes, loss, wrong)
    if final:
        for name, (codes, true, wrong) in held_out.mixtures.items():
            loss = caption_losses(lm, tokenizer, codes, true)
            measures[f"caption accuracy of {name}"] = caption_accuracy(lm, tokenizer, codes, loss, wrong)
    return measures


def as_text(measures: dict) -> str:
    """One line."""
    return "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in measures.items())


@torch.no_grad()
def save_samples(lm, codec, tokenizer, clips: list[D.Clip], folder: str) -> None:
    """Make a sound for the caption of each held-out clip, and save it."""
    captions = [clip.captions[0] for clip in clips]
    text = tokenizer.batch(captions, lm.cfg.max_text_len).to(lm.bos.device)
    waves = codec.decode(lm.generate(text, lm.cfg.max_frames))
    os.makedirs(folder, exist_ok=True)
    for i, (caption, wave) in enumerate(zip(captions, waves)):
        D.save_wav(wave, os.path.join(folder, f"{i:03d}_{D.file_name(caption)}.wav"))


# ----------------------------------------------------------------------------------------------------------
# Setting up


def load_models(args, device):
    """The codec, its path, and the model to start from where --finetune names one.

    UserError: codec and flags, or codec and model, do not belong together."""
    codec_path = D.file_in(args.codec or args.finetune or args.out, "codec.pt")
    if not os.path.exists(codec_path):
        remedy = f"one with --codec, or type python train_codec.py{D.data_command(args)}"
        if args.finetune:
            remedy = "the folder of a trained pair, such as pretrained"
        raise D.UserError(f"{codec_path}: no codec there: name {remedy}")
    codec = Codec.load(codec_path, device)
    if args.streams not in (None, codec.cfg.streams):
        raise D.UserError(
            f"--streams {args.streams}, but {codec_path} has {codec.cfg.streams}: type --streams "
            f"{codec.cfg.streams}, or train another codec in another --out"
        )
    trained = None
    if args.finetune:
        trained = AudioLM.load(D.file_in(args.finetune, "lm.pt"), device, codec.hash())
    return codec, codec_path, trained


def choose_recipe(args, size: str, run: D.Run) -> dict:
    """The recipe of the size, with what the flags, or a run to be resumed, say in its place; and the micro
    batches of a step."""
    recipe = dict(RECIPES[size])
    recipe["steps"] = args.steps or run.saved.get("steps", recipe["steps"])
    mine = D.share_of(args.batch or recipe["batch"], run.world_size)  # clips of this process
    cuda = run.device.type == "cuda"
    gib = torch.cuda.get_device_properties(run.device).total_memory / 2**30 if cuda else 0
    most = args.micro or recipe["micro"] * max(1, int(gib / 24))
    recipe["micro"] = max(n for n in range(1, min(most, mine) + 1) if mine % n == 0)
    recipe["accumulate"] = mine // recipe["micro"]
    return recipe


def captions_of(clips: list[D.Clip]) -> list[str]:
    """All captions of all clips."""
    return [caption for clip in clips for caption in clip.captions]


def token_counts(tokenizer, data, mix: float) -> torch.Tensor:
    """How many text tokens each training caption has, twice over where clips are mixed: (captions,)."""
    spoken = [f"{caption} and {caption}" if mix else caption for caption in captions_of(data.train)]
    return torch.tensor([len(tokenizer.encode(caption)) for caption in spoken])


def text_window(counts, least: int, most: int) -> int:
    """How many tokens the model reads: as many as the longest caption has, as a multiple of 8."""
    return min(most, max(least, math.ceil(counts.max().item() / 8) * 8))


def warn_of_cut_captions(counts, max_text_len: int, say) -> None:
    """Say what share of the training captions does not fit."""
    share = (counts > max_text_len).float().mean().item()
    if share:
        say(
            f"! {100 * share:.1f} % of the captions, as long as mixing makes them, have more than "
            f"{max_text_len} text tokens, and are cut: shorten them, or train anew with a larger text_len"
        )


def warn_of_silence(clips: list[D.Clip], say) -> None:
    """Say what share of the held-out examples is silence after short clips."""
    length = SECONDS * D.SAMPLE_RATE
    share = 1 - np.mean([min(clip.length, length) for clip in clips]) / length
    if share > 0.1:
        say(
            f"{100 * share:.0f} % of the held-out examples of {SECONDS} s is silence after shorter clips, "
            "which is easy to predict and makes their loss low"
        )


def new_model(args, recipe: dict, codec, data, size: str, device) -> AudioLM:
    """A model and its tokenizer, made for these captions and this codec."""
    tokenizer = D.Tokenizer.train(captions_of(data.train), recipe["vocab_size"])
    max_text_len = text_window(token_counts(tokenizer, data, args.mix), *recipe["text_len"])
    fit = {"vocab_size": tokenizer.vocab_size, "max_text_len": max_text_len, "dropout": recipe["dropout"]}
    lm = AudioLM(LMConfig(codec.cfg.streams, size, **fit))
    lm.init_from_codebooks(torch.stack([codebook.embed for codebook in codec.quantizer.codebooks]).cpu())
    lm.tokenizer, lm.codec_hash = tokenizer.to_tensor(), codec.hash()
    return lm.to(device)


def put_codec_beside(codec, codec_path: str, out: str) -> None:
    """Copy the codec to --out, where sample.py looks for it. UserError: there is another one."""
    beside = os.path.join(out, "codec.pt")
    if not os.path.exists(beside):
        D.save_atomic(codec.checkpoint(), beside)
    elif not os.path.samefile(beside, codec_path) and Codec.load(beside).hash() != codec.hash():
        raise D.UserError(f"{beside}: is another codec than {codec_path}: choose another --out")


def log_step(t: Training, done: int, stream_losses, grad_norm, steps_per_second: float, log, say) -> None:
    """One line for people, one row for programs."""
    losses = stream_losses.tolist()
    row = {"step": done, "loss": float(np.mean(losses)), "grad_norm": grad_norm.item()}
    log.write(row | {f"loss{k}": loss for k, loss in enumerate(losses)})
    cuda = t.device.type == "cuda"
    memory = f" | {torch.cuda.max_memory_allocated(t.device) / 2**30:.1f} GiB" if cuda else ""
    say(
        f"{done} loss {row['loss']:.3f} | streams {' '.join(f'{loss:.2f}' for loss in losses)} | "
        f"grad {row['grad_norm']:.2f} | {steps_per_second * frames_per_step(t):.0f} frames/s, "
        f"{(t.recipe['steps'] - done) / steps_per_second / 60:.0f} min left{memory}"
    )


def frames_per_step(t: Training) -> int:
    """Over all processes."""
    return t.world_size * t.recipe["accumulate"] * t.recipe["micro"] * t.lm.cfg.max_frames


def train(t: Training, run: D.Run, data: D.AudioData, codec, held_out: HeldOut, start: int, args) -> None:
    """From step `start` to the last: learn, log, and now and then save and measure."""
    steps = t.recipe["steps"]
    log_every, save_every, eval_every = max(1, steps // 100), max(50, steps // 20), max(50, steps // 5)
    log = D.Log(run.log_path, start) if run.is_main else None
    stopper, clock, bad = D.Stopper(), D.Clock(start), 0
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=not run.is_main, smoothing=0.1):
        done = step + 1
        logging = done % log_every == 0
        losses, grad_norm, finite = train_step(t, data, codec, step, args)
        bad = 0 if finite else D.count_bad_steps(bad, step, run.resume_path, run.say)
        stopping = stopper.asked(run.device) and done < steps
        if logging:
            D.mean_over_processes([losses])
        if logging and run.is_main:
            log_step(t, done, losses, grad_norm, clock.steps_per_second(done), log, run.say)
        evaluating = done % eval_every == 0 or done == steps
        if not (evaluating or done % save_every == 0 or stopping):
            continue
        with clock.paused():
            t.save(run.path, run.resume_path, done)
            if stopping:
                stopper.end(done, run.resume_path, run.say)
            if run.is_main and evaluating:
                # A copy, for it is not compiled: the shapes of evaluation are others.
                final = done == steps
                run.say(as_text(evaluate(copy.deepcopy(t.lm).eval(), t.tokenizer, held_out, final)))


def main():
    """Read the flags, prepare the data, train, and make sounds at the end; or only measure."""
    args = get_args()
    run = D.Run(args, "lm", load_checkpoint)
    device, say = run.device, run.say
    codec, codec_path, lm = load_models(args, device)
    one_second = torch.zeros(1, D.SAMPLE_RATE, device=device)
    D.choose_threads(args.threads, device, lambda: codec.encode(one_second), say)

    # Data, and the held-out clips as codes: they do not change.
    data = D.first_then_all(lambda: D.AudioData.from_flags(args, log=say))
    held_out = make_held_out(data, codec, device)
    if args.eval_only:
        lm = AudioLM.load(run.path, device, codec.hash())
        return say(as_text(evaluate(lm, D.Tokenizer(lm.tokenizer), held_out, final=True)))

    # The model: new, trained before, or that of a stopped run; and its optimizers.
    torch.manual_seed(args.seed)
    if run.is_main:
        put_codec_beside(codec, codec_path, args.out)
    if run.saved:
        lm = AudioLM.from_checkpoint(run.saved, run.resume_path, codec.hash()).to(device)
        if args.size not in (None, lm.cfg.size):
            raise D.UserError(f"{run.resume_path}: was started with --size {lm.cfg.size}: leave --size out")
    size = lm.cfg.size if lm else args.size or ("base" if device.type == "cuda" else "tiny")
    recipe = choose_recipe(args, size, run)
    lm = lm or new_model(args, recipe, codec, data, size, device)
    said = [*captions_of(data.train), "and" if args.mix else ""]
    lm.words = sorted({*lm.words, *D.words_of(" ".join(said))})
    t = Training(lm, recipe, run)
    start = t.load(run.saved) if run.saved else 0
    run.saved.clear()  # or weights and optimizer of `large` would stay in the memory of every process
    if D.is_done(run.resume_path, start, recipe["steps"], say):
        return
    warn_of_silence(held_out.clips, say)
    warn_of_cut_captions(token_counts(t.tokenizer, data, args.mix), lm.cfg.max_text_len, say)
    say(
        f"language model {size}, {sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M parameters, text "
        f"vocabulary {lm.cfg.vocab_size}, up to {lm.cfg.max_text_len} text tokens; {recipe['steps']} steps "
        f"of {frames_per_step(t)} frames, {recipe['micro']} clips of {SECONDS} s at a time on {device}; "
        f"{100 * args.mix:.0f} % of them mixed"
    )
    train(t, run, data, codec, held_out, start, args)
    if run.is_main:
        some = held_out.clips[:: math.ceil(len(held_out.clips) / 10)]
        save_samples(copy.deepcopy(lm).eval(), codec, t.tokenizer, some, run.wavs)
    prompt = min(captions_of(held_out.pool), key=len)
    where = "" if args.out == "out" else f"--lm {D.shell_quote(run.path)} "
    say(f"language model saved to {run.path}; next: python sample.py {where}--prompt {D.shell_quote(prompt)}")


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
