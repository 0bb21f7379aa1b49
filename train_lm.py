"""Train the language model on the codec's codes: the second of the three commands.

    python train_lm.py --streams 4                           the built-in sound world and the codec in --out
    python train_lm.py --data clips.csv more/:2              your own clips; `more/` is drawn twice as often
    python train_lm.py --data mine/ --finetune pretrained    teach a trained model your own clips
    python train_lm.py --data clips.csv --resume             go on after an interruption
    python train_lm.py --data clips.csv --eval_only          measure the model in --out on the held-out clips
    torchrun --nproc_per_node=8 train_lm.py --size base ...  several GPUs (add --nnodes for several machines)

Reads codec.pt from --out. Writes there: lm.pt (what sample.py loads), lm_train.pt (what --resume loads),
lm.csv (the log) and lm_wavs/ (a sound for each of a few held-out captions).
AudioGen (arXiv 2209.15352) section 3.2; sizes and schedule from its section 4.
"""

import contextlib
import copy
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as D
from codec import Codec, MelLoss, load_checkpoint
from lm import AudioLM, LMConfig

# `tiny` comes from short runs (assets/measured.md); `base` and `large` follow the paper, but for the steps of
# `base`, which are meant for hours of sound, not for thousands of hours: about 80 minutes of an H200.
# `micro` clips go through a model of that size at once for every 24 GiB of a GPU.
RECIPES = {
    "tiny": {"steps": 2600, "batch": 4, "micro": 4, "lr": 4e-3, "vocab": 512},
    "base": {"steps": 5000, "batch": 256, "micro": 16, "lr": 5e-4, "vocab": 8000},
    "large": {"steps": 50000, "batch": 256, "micro": 8, "lr": 5e-4, "vocab": 8000},
}
WINDOW = {"tiny": 32, "base": 64, "large": 64}  # text tokens per caption: each costs as much as a frame
DROPOUT = {"tiny": 0.1, "base": 0.0, "large": 0.0}
WARMUP = 3000  # steps, and at most a tenth of the run
SECONDS = 5  # of every training example
LOUD = 0.2  # a crop quieter than this share of its clip's peak lacks what the caption speaks of: draw again
CAPTION_DROPOUT = 0.1  # captions ignored in training, so that guidance has something to lean away from
DEAF = 0.1  # clips whose past is not heard, so that words alone must tell what sounds: they are learnt sooner
WRONGS = 4  # captions of other clips that the true one is compared with at the end
COOLDOWN = 0.3  # share of the run at whose end the learning rate falls to zero

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def get_args():
    parser = D.Parser(description="Train the language model.")
    add = parser.add_argument
    add("--data", nargs="+", default=["world"], help="CSV, JSONL or folder, each with an optional :WEIGHT")
    add("--out", default="out", help="folder with codec.pt, for checkpoints, log and prepared data")
    add("--codec", help="codec checkpoint (default: codec.pt in --out)")
    add("--finetune", metavar="FOLDER", help="start from lm.pt and codec.pt there instead of from nothing")
    add("--streams", type=int, help="must be the codec's (default: the codec's)")
    add("--size", choices=sorted(RECIPES), help="default: base with CUDA, tiny without")
    add("--steps", type=D.positive, help="training steps (default: by size)")
    add("--batch", type=D.positive, help="clips per step, over all processes (default: by size)")
    add("--micro", type=D.positive, help="clips per forward pass and process; lower it when memory runs out")
    add("--mix", type=float, default=0.5, help="share of examples that mix two clips; 0 is faster")
    add("--guidance", type=float, default=3.0, help="of the sounds made for evaluation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=D.whole, default=0)
    add("--resume", action="store_true", help="go on from lm_train.pt in --out")
    add("--eval_only", action="store_true", help="measure lm.pt in --out and stop")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------
# Evaluation


def wrong_captions(captions, pool, seed=0):
    """For every caption one of the pool that says something else."""
    rng, wrong = np.random.default_rng(seed), []
    for caption in captions:
        others = [c for c in pool if c != caption]
        wrong.append(others[rng.integers(len(others))])
    return wrong


def frechet(x, y):
    """Fréchet distance of two clouds (N, D) taken as Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    x, y = x.cpu().double(), y.cpu().double()
    A, B = x.T.cov(), y.T.cov()
    cross = torch.linalg.eigvals(A @ B).sqrt().real.sum()  # none is negative, but for rounding
    distance = (x.mean(0) - y.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding can put it below


class ClassCentres:
    """Nearest class centre in the codec's latent space: mean and spread over time of every latent, whitened
    by the scatter within classes of the real training clips (linear discriminant analysis)."""

    def __init__(self, latents, captions):
        self.names = sorted(set(captions))
        x = self.features(latents)
        label = torch.tensor([self.names.index(c) for c in captions], device=x.device)
        centres = torch.stack([x[label == i].mean(0) for i in range(len(self.names))])
        within = (x - centres[label]).T.cov()
        within += 0.1 * within.diagonal().mean() * torch.eye(len(within)).to(x)  # there may be few clips
        values, vectors = torch.linalg.eigh(within)
        self.whiten = vectors / values.sqrt()
        self.centres = centres @ self.whiten

    def features(self, latents):
        return torch.cat((latents.mean(1), latents.std(1).clamp(min=1e-4).log()), 1).cpu().double()

    def accuracy(self, latents, captions):
        nearest = torch.cdist(self.features(latents) @ self.whiten, self.centres).argmin(1)
        return float(np.mean([self.names[i] == c for i, c in zip(nearest.tolist(), captions)]))


@torch.no_grad()
def measure(lm, tokenizer, held_out, device, wrongs=1):
    """Numbers by name: loss per stream, and how often a clip's caption beats so many wrong ones."""
    codes, captions, pairs, pool = held_out

    def losses(captions):
        """Cross-entropy of each clip and stream (B, K), in nats per code."""
        text, parts = tokenizer.batch(captions, lm.cfg.window).to(device), []
        for c, t in zip(codes.split(8), text.split(8)):
            logits = lm.predict(lm.text_encoder(t), c).float()  # (b, K, F, V)
            parts.append(F.cross_entropy(logits.permute(0, 3, 1, 2), c, reduction="none").mean(2))
        return torch.cat(parts)

    true = losses(captions)
    result = {"loss": true.mean().item()} | {f"loss{k}": x for k, x in enumerate(true.mean(0).tolist())}
    if len(set(pool)) == 1:  # there is no wrong caption
        return result
    right = [true.mean(1) < losses(wrong_captions(captions, pool, seed)).mean(1) for seed in range(wrongs)]
    right = torch.stack(right).float().mean(0)  # (B,)
    result["caption_accuracy"] = right.mean().item()
    if pairs.any():
        result["held_out_pairs"] = right[pairs].mean().item()
        result["seen"] = right[~pairs].mean().item()
    return result


@torch.no_grad()
def make_sounds(lm, codec, tokenizer, prompts, guidance):
    """A wave for every prompt (n, T), the first with seed 0, the second with seed 1, and so on."""
    text, waves = tokenizer.batch(prompts, lm.cfg.window).to(lm.start.device), []
    for part, seeds in zip(text.split(20), torch.arange(len(text)).split(20)):
        waves.append(codec.decode(lm.generate(part, lm.cfg.frames, seeds=seeds, guidance=guidance)))
    return torch.cat(waves)


def colour(waves):
    """What "high" and "low" change: the mean log-mel spectrum of waves (n, T), without its level (n, 64)."""
    mel = (MelLoss([10], n_mels=64).mel(waves.cpu(), 1024).mean(1) + 1e-4).log()
    return mel - mel.mean(1, keepdim=True)


def pulse(waves):
    """What "fast" and "slow" change: the log spectrum of the loudness of waves (n, T), in eight bands from
    .3 to 30 Hz, without its level (n, 8)."""
    loudness = waves.cpu().unfold(1, 160, 160).square().mean(2).sqrt()  # (n, frames), 100 a second
    loudness = loudness / loudness.mean(1, keepdim=True).clamp(min=1e-6) - 1
    power = torch.fft.rfft(loudness * torch.hann_window(loudness.shape[1])).abs().square()
    f = 100 * torch.arange(power.shape[1]) / loudness.shape[1]
    edges = torch.logspace(math.log10(0.3), math.log10(30), 9)
    power = torch.stack([power[:, (edges[i] <= f) & (f < edges[i + 1])].mean(1) for i in range(8)], 1)
    power = (power + 1e-3 * power.mean(1, keepdim=True) + 1e-9).log()
    return power - power.mean(1, keepdim=True)


def check_words(lm, codec, tokenizer, guidance, say):
    """Does the sound world's model do what a word says? "A high siren" must be nearer to the high sirens that
    the world itself makes than to its low ones; "a siren, then a dog" must begin as a siren."""
    def real(name, seed, **how):
        sounds = [D.synth(name, np.random.default_rng([seed, i]), SECONDS, **how) for i in range(4)]
        return torch.from_numpy(np.stack(sounds))

    for word, values, feature in (("pitch", ("high", "low"), colour), ("rate", ("fast", "slow"), pulse)):
        names = [name for name in D.SOURCES if word in D.SOURCES[name][3]]
        prompts = [D.phrase(name, value) for name in names for value in values]
        made, hits, references = make_sounds(lm, codec, tokenizer, prompts, guidance), [], []
        for name, waves in zip(names, made.split(2)):
            centres = torch.stack([feature(real(name, 0, **{word: value})).mean(0) for value in values])
            hits += (torch.cdist(feature(waves), centres).argmin(1) == torch.arange(2)).tolist()
            for i, value in enumerate(values):
                x = feature(real(name, 1, **{word: value}))
                references += (torch.cdist(x, centres).argmin(1) == i).tolist()
        say(f'"{values[0]}" or "{values[1]}" is heard as asked in {np.mean(hits):.2f} of {len(hits)} sounds, '
            f"in {np.mean(references):.2f} of the world's own")
    names, hits = list(D.SOURCES), []
    centre = {name: colour(real(name, 0)).mean(0) for name in names}
    pairs = list(zip(names, names[5:] + names[:5]))
    prompts = [f"{D.phrase(a)}, then {D.phrase(b)}" for a, b in pairs]
    for pair, wave in zip(pairs, make_sounds(lm, codec, tokenizer, prompts, guidance)):
        centres = torch.stack([centre[name] for name in pair])
        distance = torch.cdist(colour(wave.view(2, -1)), centres)  # of either half to either sound
        hits.append((distance.diagonal().sum() < distance.flip(1).diagonal().sum()).item())
    say(f'", then" is heard in its order in {np.mean(hits):.2f} of {len(hits)} sounds')


@torch.no_grad()
def listen(lm, codec, tokenizer, data, device, guidance, folder, say, each=4):
    """Generate, and place the sounds beside real ones: the table of rows that gives the numbers a meaning."""
    length = SECONDS * D.SAMPLE_RATE
    train, train_captions, _ = data.clips("train", length, limit=400)
    real, captions, _ = data.clips("val", length, limit=80)
    decoded = torch.cat([codec.decode(codec.encode(w)) for w in real.to(device).split(8)])
    classes = sorted(set(train_captions))
    judged = len(classes) <= 50 and len(train_captions) >= 4 * len(classes)
    prompts = [c for c in classes for _ in range(each)] if judged else captions[:40]
    waves = make_sounds(lm, codec, tokenizer, prompts, guidance)
    os.makedirs(folder, exist_ok=True)
    for i, (wave, prompt) in enumerate(zip(waves, prompts)):
        name = "".join(c if c.isalnum() else "_" for c in prompt)[:60]
        D.save_wav(wave, os.path.join(folder, f"{i:03d}_{name}.wav"))
    rows = {"real, training": (train, train_captions), "real, held out": (real, captions),
            "codec resynthesis": (decoded, captions), f"generated at {guidance:g}": (waves, prompts)}
    z = {}  # the codec's latents (n, F, D): the space in which sounds are compared here
    for name, (sounds, _) in rows.items():
        z[name] = torch.cat([codec.latents(part.to(device)) for part in sounds.split(8)])
    centres = ClassCentres(z["real, training"], train_captions) if judged else None
    say(f"{'':24}{'Fréchet distance':>18}{'nearest class':>15}")
    for name, (_, names) in rows.items():
        distance = frechet(z["real, held out"].flatten(0, 1), z[name].flatten(0, 1))
        accuracy = f"{centres.accuracy(z[name], names):.3f}" if judged else "n/a"
        say(f"{name:24}{distance:18.3f}{accuracy:>15}")
    if any(D.WORLD_NAME.fullmatch(name) for name in data.names):
        check_words(lm, codec, tokenizer, guidance, say)


def as_text(measures):
    return "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in measures.items())


# ----------------------------------------------------------------------------------------------------------
# Training


class CachedCodes:
    """Codes of every training clip, computed once and kept on disk: where nothing is mixed, no step
    has to wait for the codec. The file's name holds the hashes of codec and data."""

    def __init__(self, codec, data, folder, say):
        self.hop = codec.cfg.hop
        path = os.path.join(folder, f"codes-{codec.hash()}-{data.key}.pt")
        if os.path.exists(path):
            self.codes = load_checkpoint(path, "nanoaudiogen codes")["codes"]
            return
        device, self.codes = next(codec.parameters()).device, {}
        for k in tqdm(data.order["train"].tolist(), "codes of all clips", unit="clip", disable=None):
            wave = data.read(k, max(len(data.sounds[k]), SECONDS * D.SAMPLE_RATE))
            pieces = [codec.encode(piece[None].to(device)) for piece in wave.split(60 * D.SAMPLE_RATE)]
            self.codes[k] = torch.cat(pieces, 2)[0].short().cpu()  # (K, F)
        D.save_atomic({"kind": "nanoaudiogen codes", "codes": self.codes}, path)
        say(f"codes of {len(self.codes)} clips are kept in {path}")

    def crops(self, places, length):
        """Codes (n, K, F) of what `AudioData.batch` took from there; a short clip comes first in its crop."""
        crops, frames = [], -(-length // self.hop)
        for k, begin in places:
            first = min(max(0, begin) // self.hop, self.codes[k].shape[1] - frames)
            crops.append(self.codes[k][:, first : first + frames])
        return torch.stack(crops).long()


def lr_factor(step, steps):
    """Linear warm-up, inverse square root, and a linear cool-down to zero over the end of the run."""
    warmup = min(WARMUP, max(1, steps // 10))
    decay = min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
    return decay * min(1, (steps - step) / (COOLDOWN * steps))


def make_optimizers(lm, lr, cuda, shard):
    """Muon for the matrices of the blocks, AdamW for tables, heads and vectors, as a dict.

    Muon (Jordan et al. 2024) takes the same step in all directions of a matrix, be their gradient large or
    small, scaled to the size of AdamW's (arXiv 2502.16982). Vectors do not decay. Sharded, a process keeps
    the state of its part only; AdamW is then not fused, for its count of steps resumes on the CPU."""
    matrices = [p for name, p in lm.named_parameters() if p.dim() == 2 and "blocks" in name]
    tables = [p for name, p in lm.named_parameters() if p.dim() == 2 and "blocks" not in name]
    vectors = [p for p in lm.parameters() if p.dim() == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    muon = {"lr": lr, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"lr": lr, "betas": (0.9, 0.95), "fused": cuda and not shard}
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import, and rarely needed

        return {"muon": ZeroRedundancyOptimizer(matrices, torch.optim.Muon, **muon),
                "adamw": ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw)}
    return {"muon": torch.optim.Muon(matrices, **muon), "adamw": torch.optim.AdamW(groups, **adamw)}


def main():
    args = get_args()
    device, rank, world = D.start_processes(args.device)
    cuda, first = device.type == "cuda", rank == 0
    say = tqdm.write if first else lambda *_: None
    path, resume_path, wavs = (os.path.join(args.out, name) for name in ("lm.pt", "lm_train.pt", "lm_wavs"))
    if first:
        lock = D.lock_folder(args.out)  # noqa: F841 (held until the process ends)

    codec_path = args.codec or os.path.join(args.finetune or args.out, "codec.pt")
    codec = Codec.load(codec_path, device)
    streams = args.streams or codec.cfg.streams
    if streams != codec.cfg.streams:
        raise ValueError(f"--streams {streams}, but {codec_path} has {codec.cfg.streams}: "
                         f"type python train_codec.py --streams {streams} first")
    trained = None
    if args.finetune:
        if args.size:
            raise ValueError("--size is that of the model in --finetune: leave it out")
        trained = AudioLM.load(os.path.join(args.finetune, "lm.pt"), device, codec.hash())

    args.size = trained.cfg.size if trained else args.size or ("base" if cuda else "tiny")
    recipe = RECIPES[args.size]
    if not 0 <= args.mix <= 1:
        raise ValueError(f"--mix {args.mix}: expected a share from 0 to 1")
    steps, batch = args.steps or recipe["steps"], args.batch or recipe["batch"]
    if batch % world:
        raise ValueError(f"--batch {batch}: cannot be shared by {world} processes, type a multiple of that")
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else 0
    most = args.micro or recipe["micro"] * max(1, int(gib / 24))
    micro = max(n for n in range(1, most + 1) if batch // world % n == 0)
    accumulate = batch // (world * micro)

    # Data, and the held-out clips as codes: they do not change.
    data = D.first_then_all(lambda: D.AudioData(args.data, args.out, args.seed, log=say))
    length = SECONDS * D.SAMPLE_RATE
    waves, captions, names = data.clips("val", length, limit=120)
    codes = torch.cat([codec.encode(wave) for wave in waves.to(device).split(8)])
    pairs = [bool(D.WORLD_NAME.fullmatch(name)) and D.is_held_out(c) for name, c in zip(names, captions)]
    pool = captions + [data.words[k][0] for k in data.order["train"]]  # of which wrong captions are drawn
    held_out = codes, captions, torch.tensor(pairs, device=device), pool

    if args.eval_only:
        lm = AudioLM.load(path, device, codec.hash())
        tokenizer = D.Tokenizer(lm.tokenizer)
        say(as_text(measure(lm, tokenizer, held_out, device, WRONGS)))
        return listen(lm, codec, tokenizer, data, device, args.guidance, wavs, say)

    beside = os.path.join(args.out, "codec.pt")
    if first and not os.path.exists(beside):
        D.save_atomic(codec.checkpoint(), beside)  # sample.py looks for it where lm.pt is
    elif first and not os.path.samefile(beside, codec_path) and Codec.load(beside).hash() != codec.hash():
        raise ValueError(f"{beside}: is another codec than {codec_path}: choose another --out")
    cached = args.mix == 0 and D.first_then_all(lambda: CachedCodes(codec, data, args.out, say))
    torch.manual_seed(args.seed)
    if trained:
        lm, tokenizer = trained, D.Tokenizer(trained.tokenizer)
    else:
        words = [caption for k in data.order["train"] for caption in data.words[k]]
        tokenizer = D.Tokenizer.train(words, recipe["vocab"])
        sizes = {"vocab": tokenizer.vocab_size, "window": WINDOW[args.size], "dropout": DROPOUT[args.size]}
        lm = AudioLM(LMConfig(streams, args.size, **sizes))
        lm.start_from(torch.stack([book.embed for book in codec.quantizer.books]).cpu())
        lm.tokenizer, lm.codec_hash = tokenizer.to_tensor(), codec.hash()
    config, lm = lm.cfg, lm.to(device).train()
    average = copy.deepcopy(lm).eval().requires_grad_(False)
    optimizers = make_optimizers(lm, recipe["lr"], cuda, shard=world > 1 and args.size == "large")
    state, start = {"lm": lm, "average": average} | optimizers, 0
    if args.resume:
        saved = load_checkpoint(resume_path, "nanoaudiogen lm training")
        if (saved["config"], saved["steps"], saved["codec_hash"]) != (vars(config), steps, lm.codec_hash):
            raise ValueError(f"{resume_path}: was started with other settings or another codec (--steps "
                             f"{saved['steps']}, {saved['config']}): repeat those, or leave out --resume")
        for name, thing in state.items():
            thing.load_state_dict(saved[name])
        start = saved["step"]
        torch.set_rng_state(saved["rng"])
        lm.tokenizer = average.tokenizer = saved["tokenizer"]  # that of today's captions may be another
        tokenizer = D.Tokenizer(lm.tokenizer)
    log = D.Log(os.path.join(args.out, "lm.csv"), start) if first else None
    if cuda:  # block by block: what one compiles to serves all the others
        for block in [*lm.text_encoder.blocks, *lm.blocks]:
            block.compile(dynamic=False)
    model = lm
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if cuda else None)

    def save(step):
        if world > 1 and args.size == "large":
            for optimizer in optimizers.values():
                optimizer.consolidate_state_dict(0)
        if first:
            D.save_atomic(average.checkpoint(), path)
            training = {"kind": "nanoaudiogen lm training", "config": vars(config), "steps": steps}
            training |= {"step": step, "rng": torch.get_rng_state()}
            training |= {"codec_hash": lm.codec_hash, "tokenizer": lm.tokenizer}
            D.save_atomic(training | {k: thing.state_dict() for k, thing in state.items()}, resume_path)

    frames_per_step = world * accumulate * micro * config.frames
    say(f"language model {args.size}, {sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M parameters, text "
        f"vocabulary {config.vocab}; {steps} steps of {world} x {accumulate} x {micro} clips of {SECONDS} s "
        f"({frames_per_step} frames) on {device}; {100 * args.mix:.0f} % of them mixed")
    peak = next((v for k, v in PEAK_FLOPS.items() if cuda and k in torch.cuda.get_device_name(device)), None)
    log_every, eval_every = max(1, steps // 100), max(50, steps // 5)
    stopper, bad, encoding, clock, clock_step = D.Stopper(), 0, 0.0, time.time(), start
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=not first, smoothing=0.05):
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = recipe["lr"] * lr_factor(step, steps)
        # Words say most about how a sound begins, later the sound itself does. So most examples are short: a
        # step takes clips of 5 s, or twice as many of half, or four times as many of a quarter of that.
        parts = 2 ** int(np.random.default_rng((args.seed, step)).integers(3))
        done, stream_losses = step + 1, 0.0
        logging = done % log_every == 0
        for i in range(accumulate):
            rng = np.random.default_rng((args.seed, step, rank, i))
            began = D.now(device) if logging else 0.0  # it waits for the GPU: not at every step
            wave, captions, places = data.batch(micro * parts, length // parts, rng, args.mix, LOUD)
            if cached:
                codes = cached.crops(places, length // parts).to(device)  # (B, K, F)
            else:
                codes = codec.encode(wave.to(device))  # (B, K, F)
            captions = ["" if rng.random() < CAPTION_DROPOUT else c for c in captions]
            text = tokenizer.batch(captions, config.window).to(device)
            heard = torch.from_numpy(rng.random(len(codes)) >= DEAF).to(device)
            begin = torch.tensor([begin for _, begin in places]) // codec.cfg.hop
            begin = begin.clamp(0, config.frames - codes.shape[2]).to(device)  # later than that is its end
            encoding += D.now(device) - began if logging else 0.0
            last = i == accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else model.no_sync():  # sync gradients once
                with D.autocast(device):
                    logits, loss = model(codes, text, heard, begin)
                (loss / accumulate).backward()
            if logging:
                nll = F.cross_entropy(logits.detach().float().permute(0, 3, 1, 2), codes, reduction="none")
                stream_losses = stream_losses + nll.mean((0, 2)) / accumulate  # (K,)
        grad_norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        bad = D.count_bad(bad, grad_norm, step, resume_path, say)
        if not bad:
            for optimizer in optimizers.values():
                optimizer.step()
            D.update_ema(average, lm, step)
        lm.zero_grad()

        stopping = stopper.asked(device)
        if logging and first:
            elapsed = time.time() - clock
            speed = (done - clock_step) * frames_per_step / elapsed
            mfu = f"{100 * speed * lm.flops_per_frame() / world / peak:.1f} %" if peak else "n/a"
            share = encoding * (done - clock_step) / elapsed  # of this step, in an average one
            clock, clock_step, encoding = time.time(), done, 0.0
            row = {"step": done, "loss": stream_losses.mean().item(), "grad_norm": grad_norm.item()}
            row |= {f"loss{k}": value for k, value in enumerate(stream_losses.tolist())}
            log.write([row])
            each = " ".join(f"{v:.2f}" for v in stream_losses.tolist())
            minutes = (steps - done) * frames_per_step / speed / 60
            memory = f" | {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if cuda else ""
            say(f"{done} loss {row['loss']:.3f} | streams {each} | grad {row['grad_norm']:.2f} | {speed:.0f} "
                f"frames/s, codec {100 * share:.0f} % | MFU {mfu} | {minutes:.0f} min left" + memory)
        evaluating = done % eval_every == 0 or done == steps
        if evaluating or stopping:
            save(done)
        if stopping:
            return say(f"{stopper.signal}: saved step {done} to {resume_path}; go on with --resume")
        if evaluating and first:
            say(as_text(measure(average, tokenizer, held_out, device, WRONGS if done == steps else 1)))
    if first:
        listen(average, codec, tokenizer, data, device, args.guidance, wavs, say)
    say(f'language model saved to {path}; next: python sample.py --prompt "{pool[0]}"')


if __name__ == "__main__":
    with D.one_line_errors():
        main()
