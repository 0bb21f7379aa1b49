"""Train the neural codec: the first of the three commands.

    python train_codec.py                                  the built-in sound world, on whatever machine
    python train_codec.py --data clips.csv                 your own clips: a CSV, JSONL or folder (see README)
    python train_codec.py --data one_clip/ --out one --steps 400    learn one clip by heart: try this first
    python train_codec.py --data clips.csv --resume        go on after an interruption
    python train_codec.py --data clips.csv --eval_only     measure the codec in --out on the held-out clips
    torchrun --nproc_per_node=8 train_codec.py --data ...  several GPUs (add --nnodes for several machines)

Writes to --out: codec.pt (what sample.py and train_lm.py load), codec_train.pt (what --resume loads),
codec.csv (the log) and codec_wavs/ (held-out clips and what the codec makes of them).
AudioGen (arXiv 2209.15352) section 3.1; the balancer is EnCodec's (arXiv 2210.13438) section 3.4.
"""

import copy
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data as D
from codec import (Balancer, Codec, CodecConfig, MelLoss, STFTDiscriminator, discriminator_loss,
                   effective_codes, feature_loss, generator_loss, load_checkpoint, log_mel_distance,
                   log_spectrum_distance, perplexity, si_snr)

# Settled by runs of minutes (assets/measured.md). From the share `judge_from` of a run on, codes stay as they
# are and the decoder alone goes on, against a discriminator with `judge` channels. A step then takes 1.3 to
# 2.8 times as long, and it has to be there for long: a small budget is better spent without (1.0: it never
# comes).
RECIPES = {
    "tiny": {"steps": 2000, "batch": 8, "seconds": 1.0, "lr": 4e-3, "judge_from": 1.0, "judge": 16},
    "paper": {"steps": 10000, "batch": 64, "seconds": 1.0, "lr": 2e-3, "judge_from": 0.6, "judge": 32},
}
WEIGHTS = {"wave": 0.15, "mel": 1.0, "adversarial": 1.0, "feature": 1.0}  # shares: see codec.Balancer
JUDGE_LR = 3e-4  # constant
COMMITMENT = 0.25  # stands outside the balancer: it does not pass through the output
CLIP = 10.0  # on the norm of the gradient, which stays below 6 in a healthy run


def get_args():
    parser = D.Parser(description="Train the neural codec.")
    add = parser.add_argument
    add("--data", nargs="+", default=["world"], help="CSV, JSONL or folder, each with an optional :WEIGHT")
    add("--out", default="out", help="folder for checkpoints, log and prepared data")
    add("--streams", type=int, default=4, help="1, 2, 4 or 8 streams of codes")
    add("--size", choices=sorted(RECIPES), help="default: paper with CUDA, tiny without")
    add("--steps", type=D.positive, help="training steps (default: by size)")
    add("--batch", type=D.positive, help="crops per step, over all processes (default: by size)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=D.whole, default=0)
    add("--resume", action="store_true", help="go on from codec_train.pt in --out")
    add("--eval_only", action="store_true", help="measure codec.pt in --out and stop")
    return parser.parse_args()


@torch.no_grad()
def evaluate(codec, waves, folder) -> str:
    """Held-out measures over waves (n, T) in words, means over clips; four of the clips and what the codec
    makes of them go into the folder."""
    begin = D.now(waves.device)
    codes = torch.cat([codec.encode(wave) for wave in waves.split(8)])
    middle = D.now(waves.device)
    decoded = torch.cat([codec.decode(part)[:, : waves.shape[1]] for part in codes.split(8)])
    end = D.now(waves.device)
    os.makedirs(folder, exist_ok=True)
    for i in np.linspace(0, len(waves) - 1, min(4, len(waves))).astype(int):
        for name, wave in (("real", waves[i]), ("decoded", decoded[i])):
            D.save_wav(wave, os.path.join(folder, f"{i:03d}_{name}.wav"))
    effective, used = perplexity(codes, codec.cfg.codes)
    used = " ".join(f"{100 * u:.0f}" for u in used)
    effective = " ".join(f"{p:.0f}" for p in effective)
    seconds = waves.numel() / D.SAMPLE_RATE
    return (f"held out: {codec.cfg.kbps:.1f} kbit/s, SI-SNR {si_snr(waves, decoded).median():.2f} dB, "
            f"log-mel {log_mel_distance(waves, decoded).mean():.3f}, "
            f"log-spectrum {log_spectrum_distance(waves, decoded).mean():.3f}, "
            f"% of books used {used}, perplexity {effective}; encodes {seconds / (middle - begin):.0f} "
            f"and decodes {seconds / (end - middle):.0f} times faster than it plays")


def mean_over_processes(tensors, world):
    """In place, by hand: the balancer calls backward in ways that DistributedDataParallel does not see."""
    if world > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, mean in zip(tensors, (flat / world).split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))


def lr_factor(step, steps):
    """Linear warm-up over 100 steps, or a tenth of a short stage, and a cosine to zero."""
    warmup = min(100, max(1, steps // 10))
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def health(effective, codes, accuracy, grad_norm):
    """What a person should know about this step, as sentences."""
    for k, p in enumerate(effective):
        if p < codes / 10:
            yield (f"stream {k + 1} uses only {p:.0f} of {codes} codes: the codebook is collapsing. Early in "
                   "a run it recovers by itself; later lower lr in RECIPES, raise --batch, or add data.")
    if accuracy > 0.95:
        yield (f"the discriminator is right {100 * accuracy:.0f} % of the time: it has won, and its gradient "
               "says little. Start it later (judge_from in RECIPES) or make it smaller (judge).")
    if grad_norm > 10 * CLIP:
        yield f"the gradient's norm is {grad_norm:.0f}: training is unstable. Lower lr in RECIPES."


def make_optimizers(codec, lr):
    """Muon for the matrices, Adam for the vectors, as a dict.

    Muon (Jordan et al. 2024) takes the same step in all directions of a matrix, be their gradient large or
    small, scaled to the size of Adam's (arXiv 2502.16982)."""
    matrices = [p for p in codec.parameters() if p.dim() == 2]
    vectors = [p for p in codec.parameters() if p.dim() != 2]
    return {"muon": torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            "adam": torch.optim.Adam(vectors, lr, betas=(0.9, 0.99))}


def main():
    args = get_args()
    device, rank, world = D.start_processes(args.device)
    first = rank == 0
    args.size = args.size or ("paper" if device.type == "cuda" else "tiny")
    recipe = RECIPES[args.size]
    steps, batch = args.steps or recipe["steps"], args.batch or recipe["batch"]
    config = CodecConfig(args.streams, args.size)
    path, resume_path, wavs = (f"{args.out}/{name}" for name in ("codec.pt", "codec_train.pt", "codec_wavs"))
    say = tqdm.write if first else lambda *_: None
    if batch % world:
        raise ValueError(f"--batch {batch}: cannot be shared by {world} processes, type a multiple of that")
    if first:
        lock = D.lock_folder(args.out)  # noqa: F841 (held until the process ends)

    # Data: random crops come straight from the memory map, a function of seed and step alone.
    data = D.first_then_all(lambda: D.AudioData(args.data, args.out, args.seed, log=say))
    held_out, _, _ = data.clips("val", 5 * D.SAMPLE_RATE, limit=80)
    held_out = held_out.to(device)
    mel = MelLoss().to(device)

    if args.eval_only:
        return say(evaluate(Codec.load(path, device), held_out, wavs))

    # Models: the codec, its running average (the one that is kept), and the adversary.
    torch.manual_seed(args.seed)
    codec = Codec(config).train()
    # Copied on the CPU: on a GPU the copy's LSTM would find its weights scattered, and gather them each time.
    average = copy.deepcopy(codec).eval().requires_grad_(False).to(device)
    codec = codec.to(device)
    balancer = Balancer(WEIGHTS).to(device)
    parameters = list(codec.parameters())
    optimizers = make_optimizers(codec, recipe["lr"])
    state = {"codec": codec, "average": average, "balancer": balancer} | optimizers
    if recipe["judge_from"] < 1:
        judge = STFTDiscriminator(recipe["judge"]).to(device, memory_format=torch.channels_last)
        judge_parameters = list(judge.parameters())
        judge_optimizer = torch.optim.Adam(judge_parameters, JUDGE_LR, betas=(0.5, 0.9))
        state |= {"judge": judge, "judge_optimizer": judge_optimizer}
    start, accuracy, judging = 0, 0.5, [recipe["judge_from"], recipe["judge"]]
    if args.resume:
        saved = load_checkpoint(resume_path, "nanoaudiogen codec training")
        if [saved["config"], saved["steps"], saved.get("judging")] != [vars(config), steps, judging]:
            raise ValueError(f"{resume_path}: was started with other settings ({saved['config']}, --steps "
                             f"{saved['steps']}, discriminator {saved.get('judging')}): repeat those, or "
                             "leave out --resume")
        for name, thing in state.items():
            thing.load_state_dict(saved[name])
        start, accuracy = saved["step"], saved["accuracy"]
        torch.set_rng_state(saved["rng"])
    log = D.Log(os.path.join(args.out, "codec.csv"), start) if first else None

    def save(step):
        if first:
            D.save_atomic(average.checkpoint(), path)
            training = {"kind": "nanoaudiogen codec training", "config": vars(config), "steps": steps}
            training |= {"judging": judging, "step": step, "accuracy": accuracy, "rng": torch.get_rng_state()}
            D.save_atomic(training | {k: thing.state_dict() for k, thing in state.items()}, resume_path)

    crop = int(recipe["seconds"] * D.SAMPLE_RATE)
    judge_from = max(1, int(recipe["judge_from"] * steps))  # the first step starts the books
    say(f"codec {args.size}, {config.streams} streams of {config.codes} codes, {config.kbps} kbit/s, "
        f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters; {steps} steps of {batch} x "
        f"{recipe['seconds']} s on {device}, "
        + (f"from step {judge_from} on with a discriminator" if judge_from < steps else "no discriminator"))
    log_every, eval_every = max(1, steps // 100), max(100, steps // 10)
    stopper, bad, warned = D.Stopper(), 0, {}
    clock, clock_step = time.time(), start
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=not first, smoothing=0.05):
        wave, _, _ = data.batch(batch, crop, np.random.default_rng((args.seed, step)))
        wave = wave.chunk(world)[rank].to(device)
        judged, weights = step >= judge_from, WEIGHTS
        stage = (step - judge_from, steps - judge_from) if judged else (step, judge_from)
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = recipe["lr"] * lr_factor(*stage)

        if not judged:
            with D.autocast(device):
                wave_hat, codes, commitment = codec(wave)
        else:
            codes, commitment = average.encode(wave), torch.zeros((), device=device)
            with D.autocast(device):
                wave_hat = codec.decoder(average.quantizer.decode(codes))[:, :crop, 0].float()
        losses = {"wave": (wave_hat - wave).abs().mean(), "mel": mel(wave, wave_hat)}
        if judged:
            # One forward of D serves both sides; real and decoded clips pass apart, so that what goes back to
            # the codec does not run through the real half (a third of the time). D hears every clip at the
            # same loudness (quiet ones would be nothing to it), and what it says counts only as far as it
            # does better than guessing: a balancer gives a term its full share however meaningless it is.
            loudness = wave.std(1, keepdim=True) + 1e-3
            with D.autocast(device):
                real, real_features = judge(wave / loudness)
                fake, fake_features = judge(wave_hat / loudness)
            judge_loss = discriminator_loss(real, fake)
            gradients = torch.autograd.grad(judge_loss, judge_parameters, retain_graph=True)
            for p, g in zip(judge_parameters, gradients):
                p.grad = g
            hits = sum((r > 0).float().mean() + (f < 0).float().mean() for r, f in zip(real, fake))
            mean_over_processes([hits], world)  # all must agree on whether D has a say
            accuracy += 0.02 * (hits.item() / (2 * len(real)) - accuracy)
            losses["adversarial"] = generator_loss(fake)
            losses["feature"] = feature_loss(real_features, fake_features)
            edge = max(0.0, 2 * accuracy - 1)
            weights = WEIGHTS | {name: WEIGHTS[name] * edge for name in ("adversarial", "feature")}
        gradient = balancer(losses, weights, wave_hat)
        codec.zero_grad()
        ((wave_hat * gradient).sum() + COMMITMENT * commitment).backward()
        trained = [p for p in parameters if p.grad is not None]
        mean_over_processes([p.grad for p in trained], world)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)

        bad = D.count_bad(bad, grad_norm, step, resume_path, say)
        if not bad:
            for optimizer in optimizers.values():
                optimizer.step()
            if judged:
                mean_over_processes([p.grad for p in judge_parameters], world)
                judge_optimizer.step()
            D.update_ema(average.decoder if judged else average, codec.decoder if judged else codec, step)

        done, stopping = step + 1, stopper.asked(device)
        if done % log_every == 0:
            means = {name: value.detach() for name, value in (losses | {"commitment": commitment}).items()}
            mean_over_processes(means.values(), world)
        if done % log_every == 0 and first:
            # One batch may be all silence: its use of the books is shown, but they are judged over a hundred.
            _, used = perplexity(codes, config.codes)
            effective = [effective_codes(book.count) for book in codec.quantizer.books]
            speed = (done - clock_step) * batch * recipe["seconds"] / (time.time() - clock)
            clock, clock_step = time.time(), done
            row = {"step": done} | dict.fromkeys(WEIGHTS, "") | {k: mean.item() for k, mean in means.items()}
            row |= {"accuracy": accuracy, "grad_norm": grad_norm.item()}
            row |= {f"perplexity{k}": p for k, p in enumerate(effective)}
            row |= {f"used{k}": u for k, u in enumerate(used)}
            log.write([row])
            terms = " ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            books = " ".join(f"{p:.0f}" for p in effective)
            share = " ".join(f"{100 * u:.0f}" for u in used)
            right = f" | D right {100 * accuracy:.0f} %" if judged else ""
            minutes = (steps - done) * batch * recipe["seconds"] / speed / 60
            say(f"{done} {terms} | perplexity {books} | % used {share}{right}"
                f" | grad {grad_norm.item():.2f} | {speed:.1f} audio-s/s, {minutes:.0f} min left")
            for sentence in health(effective, config.codes, accuracy, grad_norm):
                if done - warned.get(sentence[:12], -steps) >= eval_every:
                    warned[sentence[:12]] = done
                    say("! " + sentence)
        if done % eval_every == 0 or done == steps or stopping:
            save(done)
        if stopping:
            return say(f"{stopper.signal}: saved step {done} to {resume_path}; go on with --resume")
        if (done % eval_every == 0 or done == steps) and first:
            say(evaluate(average, held_out, wavs))
    say(f"codec saved to {path}; next: python train_lm.py --streams {config.streams}")


if __name__ == "__main__":
    with D.one_line_errors():
        main()
