"""Train the neural codec: the first of the three commands.

    python train_codec.py                                  the recordings in sounds/, on whatever machine
    python train_codec.py --data clips.csv                 your own clips: a table or a folder (see README)
    python train_codec.py --data one_clip/ --out one --steps 400    learn one clip by heart: try this first
    python train_codec.py --data clips.csv --resume        go on after an interruption
    python train_codec.py --data clips.csv --resume --steps 20000   go on for longer than was planned
    python train_codec.py --data clips.csv --eval_only     measure the codec in --out on the held-out clips
    torchrun --nproc_per_node=8 train_codec.py --data ...  several GPUs (add --nnodes for several machines)

Writes to --out: codec.pt (what sample.py and train_lm.py load), codec_train.pt (what --resume loads),
codec.csv (the log) and codec_wavs/ (held-out clips and what the codec makes of them).

Two stages: first encoder, codebooks and decoder are trained together, without a discriminator; then the
codebooks are frozen, and encoder and decoder go on against one. The size `tiny` skips the second stage.

AudioGen (arXiv 2209.15352) section 3.1; the balancer is EnCodec's (arXiv 2210.13438) section 3.4.
"""

import copy
import math
import os
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

import data as D
from codec import (
    Balancer,
    Codec,
    CodecConfig,
    CodecError,
    MelLoss,
    MultiScaleSTFTDiscriminator,
    code_counts,
    discriminator_loss,
    feature_loss,
    generator_loss,
    load_checkpoint,
    log_mel_distance,
    log_spectrum_distance,
    perplexity,
    si_snr,
)

# A size is one line here and one in codec.CHANNELS. Settled by runs of minutes (experiments/README.md).
# `seconds` is the length of a crop; `disc_start` the share of the steps after which the second stage begins
# (1.0: never). A step of that stage takes about twice as long: a small budget is better spent without.
RECIPES = {
    "tiny": {"steps": 2000, "batch": 8, "seconds": 1.0, "lr": 4e-3, "disc_start": 1.0, "disc_filters": 16},
    "paper": {"steps": 10000, "batch": 64, "seconds": 1.0, "lr": 2e-3, "disc_start": 0.6, "disc_filters": 32},
}
WEIGHTS = {"wave": 0.15, "mel": 1.0, "adversarial": 1.0, "feature": 1.0}  # shares: see codec.Balancer
# Outside the balancer, since this loss does not pass through the output. Against a discriminator it weighs
# less: at 0.25 the latents then shrink, and the perplexity falls from 310 codes to 135.
COMMITMENT_WEIGHT, COMMITMENT_WEIGHT_ADVERSARIAL = 0.25, 0.04
DISC_LR = 4e-3  # constant
MAX_GRAD_NORM = 10.0  # the first steps exceed it (silence meets LayerNorms with biases of 0), later few


def get_args():
    """The flags. The default of --size depends on the device; what a size means stands in RECIPES."""
    parser = D.Parser(description="Train the neural codec.")
    add = parser.add_argument
    D.add_training_flags(parser)
    add("--out", default="out", help="folder for checkpoints, log and prepared data")
    add("--streams", type=int, help="1, 2, 4 or 8 streams of codes (default: 4)")
    add("--size", choices=sorted(RECIPES), help="default: paper with CUDA, tiny without")
    add("--batch", type=D.positive, help="crops per step, over all processes (default: by size)")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------
# One step


def make_optimizers(model, lr: float, betas: tuple):
    """Muon for the matrices, Adam for the vectors."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return D.Muon(matrices, lr), torch.optim.Adam(vectors, lr, betas=betas)


class Training:
    """All that changes while the codec is trained: it is what a resumed run reads."""

    def __init__(self, config: CodecConfig, recipe: dict, device: torch.device, flags: dict):
        self.config, self.recipe, self.device = config, recipe, device
        self.flags = flags  # what it trains on, see `D.recall_flags`
        # The share becomes a step number. Step 0 starts the codebooks: the second stage cannot begin there.
        self.disc_start = max(1, int(recipe["disc_start"] * recipe["steps"]))
        codec = Codec(config).train()
        # Copied before it goes to the GPU: of a copy made there, cuDNN would gather the LSTM's scattered
        # weights at every call.
        self.ema = copy.deepcopy(codec).eval().requires_grad_(False).to(device)  # the codec that is kept
        self.codec = codec.to(device)
        self.mel = MelLoss().to(device)
        self.balancer = Balancer(WEIGHTS).to(device)
        self.muon, self.adam = make_optimizers(codec, recipe["lr"], betas=(0.9, 0.99))
        self.parts = {name: getattr(self, name) for name in ("codec", "ema", "balancer", "muon", "adam")}
        if recipe["disc_start"] < 1:
            self.disc = MultiScaleSTFTDiscriminator(recipe["disc_filters"]).to(device)
            self.disc_muon, self.disc_adam = make_optimizers(self.disc, DISC_LR, betas=(0.5, 0.9))
            self.parts |= {name: getattr(self, name) for name in ("disc", "disc_muon", "disc_adam")}
        self.disc_accuracy = 0.5  # moving average of how often the discriminator is right
        # Moving average of how often each code is used (K, V).
        self.usage = torch.zeros(config.streams, config.codebook_size, device=device)

    def checkpoint(self, step: int) -> dict:
        """What `load` reads."""
        plain = {"kind": "nanoaudiogen codec training", "config": asdict(self.config), "flags": self.flags}
        plain |= {"step": step, "steps": self.recipe["steps"], "disc_start": self.disc_start}
        plain |= {"disc_accuracy": self.disc_accuracy, "usage": self.usage, "rng": torch.get_rng_state()}
        return plain | {name: part.state_dict() for name, part in self.parts.items()}

    def load(self, saved: dict, path: str) -> int:
        """Go on from the checkpoint of this path; returns the step it had reached."""
        other = f"{path}: of another version, or of other RECIPES; choose another --out for a new run"
        if saved["config"] != asdict(self.config) or ("disc" in saved) != ("disc" in self.parts):
            raise D.UserError(other)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except (KeyError, ValueError, RuntimeError):
            raise D.UserError(other) from None
        if saved["step"] > saved["disc_start"]:  # the second stage does not go back to the first
            self.disc_start = saved["disc_start"]
        self.disc_accuracy, self.usage = saved["disc_accuracy"], saved["usage"].to(self.device)
        torch.set_rng_state(saved["rng"])
        return saved["step"]


def train_step(t: Training, wave, step: int):
    """One step on waves (B, T), of this process's part of the batch. Returns the losses by name, the norm of
    the gradient, and whether it was applied.

        L_G = lambda_t l_t + lambda_f l_f + lambda_g l_g + lambda_feat l_feat         (section 3.1)

    In the code l_t is "wave", l_f "mel", l_g "adversarial", l_feat "feature". The balancer sets the lambdas:
    it turns WEIGHTS into shares of the gradient at the output. The commitment loss is added beside it. In the
    second stage the discriminator takes its own step with l_d.

    The share of l_t falls to 0 over the first stage. At the start the codec needs it to find the phase of the
    wave. Later it only makes sounds quieter: the samples of noise cannot be predicted, the guess with the
    smallest expected error is silence, and loud bands come out 4 dB too quiet."""
    adversarial = step >= t.disc_start
    D.set_lr((t.muon, t.adam), learning_rate(t, step))
    t.codec.quantizer.train(not adversarial)  # in the second stage the codebooks stand still
    with D.autocast(t.device):
        wave_hat, codes, commitment = t.codec(wave)  # (B, T), (B, K, F), ()
    losses = {"wave": (wave_hat - wave).abs().mean(), "mel": t.mel(wave, wave_hat)}
    weights = WEIGHTS | {"wave": WEIGHTS["wave"] * max(0.0, 1 - step / t.disc_start)}
    if adversarial:
        # The discriminator judges every second clip only, which saves time. The other clips have no gradient
        # from its losses: over the batch, these have half of the shares in WEIGHTS.
        losses |= adversarial_losses(t, wave[::2], wave_hat[::2])
        # The balancer would give these losses their share even while the discriminator only guesses. So it is
        # scaled by how much better than guessing it is: 0 at an accuracy of .5, 1 at 1.
        trust = max(0.0, 2 * t.disc_accuracy - 1)
        weights |= {name: trust * WEIGHTS[name] for name in ("adversarial", "feature")}

    gradient = t.balancer(losses, weights, wave_hat)  # (B, T)
    t.codec.zero_grad()
    # The gradient of this sum at wave_hat is `gradient`: so it goes back into the codec.
    commitment_weight = COMMITMENT_WEIGHT_ADVERSARIAL if adversarial else COMMITMENT_WEIGHT
    ((wave_hat * gradient).sum() + commitment_weight * commitment).backward()
    # By hand: DistributedDataParallel does not support autograd.grad, which the balancer uses.
    D.mean_over_processes([p.grad for p in t.codec.parameters()])
    grad_norm = torch.nn.utils.clip_grad_norm_(t.codec.parameters(), MAX_GRAD_NORM)
    t.usage.lerp_(code_counts(codes, t.config.codebook_size), 0.02)
    finite = bool(torch.isfinite(grad_norm))
    if finite:
        t.muon.step()
        t.adam.step()
        if adversarial:  # `adversarial_losses` has left the gradients of l_d
            D.mean_over_processes([p.grad for p in t.disc.parameters()])
            t.disc_muon.step()
            t.disc_adam.step()
        update_ema(t.ema, t.codec, step)
    losses["commitment"] = commitment
    return {name: loss.detach() for name, loss in losses.items()}, grad_norm, finite


def adversarial_losses(t: Training, wave, wave_hat) -> dict:
    """l_g and l_feat of waves (B, T) for the codec; the gradients of l_d are left at the discriminator.

    The same two forward passes, of real and of decoded clips, serve both losses; in one joint batch the
    codec's gradient would run through the real half as well, for nothing. Each pair is divided by the
    loudness of the real clip first, or the discriminator would hardly notice quiet clips."""
    loudness = wave.std(1, keepdim=True) + 1e-3
    with D.autocast(t.device):
        real, real_features = t.disc(wave / loudness)
        fake, fake_features = t.disc(wave_hat / loudness)
    parameters = list(t.disc.parameters())
    gradients = torch.autograd.grad(discriminator_loss(real, fake), parameters, retain_graph=True)
    for p, g in zip(parameters, gradients):
        p.grad = g
    right = [(r > 0).float().mean() + (f < 0).float().mean() for r, f in zip(real, fake)]
    accuracy = torch.stack(right).mean() / 2
    D.mean_over_processes([accuracy])  # all must agree on how far to trust it
    t.disc_accuracy += 0.02 * (accuracy.item() - t.disc_accuracy)
    return {"adversarial": generator_loss(fake), "feature": feature_loss(real_features, fake_features)}


def learning_rate(t: Training, step: int) -> float:
    """In each stage a linear warm-up over 100 steps, or a tenth of a short stage, and a cosine to zero."""
    first, last = (0, t.disc_start) if step < t.disc_start else (t.disc_start, t.recipe["steps"])
    step, steps = step - first, last - first
    warmup = min(100, max(1, steps // 10))
    return t.recipe["lr"] * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(ema, model, step: int) -> None:
    """The weights that are kept follow those that learn, more quickly while the run is young.

    Buffers are copied: codebooks are averages already."""
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


# ----------------------------------------------------------------------------------------------------------
# Evaluation and the log


def held_out_waves(data: D.AudioData, device: torch.device) -> list[torch.Tensor]:
    """The beginnings of validation clips (1, T), of 1 to 5 s: more silence after short ones would make every
    measure look better, and the codes look collapsed."""
    waves, clips = data.held_out(5 * D.SAMPLE_RATE, limit=80)
    lengths = [max(D.SAMPLE_RATE, clip.length) for clip in clips]
    return [wave[None, :length].to(device) for wave, length in zip(waves, lengths)]


@torch.no_grad()
def evaluate(codec, waves, folder: str) -> str:
    """One line of measures over held-out waves, each (1, T): SI-SNR is the median over clips, both distances
    are means. Four of the clips and what the codec makes of them go into the folder."""
    codes = [codec.encode(wave) for wave in waves]  # (1, K, F) each
    decoded = [codec.decode(c)[:, : wave.shape[1]] for c, wave in zip(codes, waves)]
    os.makedirs(folder, exist_ok=True)
    for i in np.linspace(0, len(waves) - 1, min(4, len(waves))).astype(int):
        D.save_wav(waves[i][0], os.path.join(folder, f"{i:03d}_real.wav"))
        D.save_wav(decoded[i][0], os.path.join(folder, f"{i:03d}_decoded.wav"))
    si_snrs, log_mels, log_spectra = (
        torch.cat([measure(wave, wave_hat) for wave, wave_hat in zip(waves, decoded)])
        for measure in (si_snr, log_mel_distance, log_spectrum_distance)
    )
    counts = code_counts(torch.cat(codes, 2), codec.cfg.codebook_size)  # (K, V)
    used = " ".join(f"{100 * share:.0f}" for share in (counts > 0).float().mean(1).tolist())
    effective = " ".join(f"{perplexity(c):.0f}" for c in counts)
    return (
        f"held out: {codec.cfg.kbps:.1f} kbit/s, SI-SNR {si_snrs.median():.2f} dB, "
        f"log-mel {log_mels.mean():.3f}, log-spectrum {log_spectra.mean():.3f}, "
        f"% of codes used {used}, perplexity {effective}"
    )


def log_step(t: Training, done: int, losses: dict, grad_norm: float, speed: float, log: D.Log, say) -> None:
    """One line for people, one row for programs."""
    effective = [perplexity(counts) for counts in t.usage]
    row = {"step": done} | dict.fromkeys(WEIGHTS, "") | losses
    row |= {"disc_accuracy": t.disc_accuracy, "grad_norm": grad_norm}
    log.write(row | {f"perplexity{k}": p for k, p in enumerate(effective)})
    terms = " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    codes = " ".join(f"{p:.0f}" for p in effective)
    disc = f" | discriminator right {100 * t.disc_accuracy:.0f} %" if "adversarial" in losses else ""
    seconds = t.recipe["batch"] * t.recipe["seconds"] * speed  # of audio, in a second
    minutes = (t.recipe["steps"] - done) / speed / 60
    say(
        f"{done} {terms} | perplexity {codes}{disc} | grad {grad_norm:.2f} "
        f"| {seconds:.1f} audio-s/s, {minutes:.0f} min left"
    )


def health(t: Training, done: int, grad_norm: float):
    """What a person should know about this step, in sentences."""
    low = [k for k, counts in enumerate(t.usage) if perplexity(counts) < len(counts) / 10]
    if low:
        yield (
            f"streams {low} (the first is 0) use less than a tenth of their codes: the codebook is "
            "collapsing. Early in a run it recovers by itself; later lower lr in RECIPES, raise --batch, or "
            "add data."
        )
    if t.disc_accuracy > 0.98:
        yield (
            f"the discriminator is right {100 * t.disc_accuracy:.0f} % of the time: it has won, and its "
            "gradient says little. In a new run, start it later (disc_start in RECIPES) or make it smaller "
            "(disc_filters)."
        )
    if grad_norm > 10 * MAX_GRAD_NORM and done > 100:
        yield f"the gradient's norm is {grad_norm:.0f}: training is unstable. Lower lr in RECIPES."


# ----------------------------------------------------------------------------------------------------------


def choose_config(args, run: D.Run) -> CodecConfig:
    """What the flags say, or the run that is resumed. UserError: they contradict it."""
    if not run.saved:
        size = args.size or ("paper" if run.device.type == "cuda" else "tiny")
        return CodecConfig(4 if args.streams is None else args.streams, size)
    config = run.saved["config"]
    for name in ("streams", "size"):
        if getattr(args, name) not in (None, config[name]):
            was = f"was started with --{name} {config[name]}: leave --{name} out"
            raise D.UserError(f"{run.resume_path}: {was}, or choose another --out for a new run")
    return CodecConfig(config["streams"], config["size"])


def choose_recipe(args, size: str, run: D.Run) -> dict:
    """The recipe of the size, with what the flags, or a run to be resumed, say in its place."""
    recipe = dict(RECIPES[size])
    recipe["steps"] = args.steps or run.saved.get("steps", recipe["steps"])
    recipe["batch"] = args.batch or recipe["batch"]
    D.share_of(recipe["batch"], run.world_size)
    return recipe


def protect_language_model(out: str) -> None:
    """UserError where a language model in the folder would lose the codec whose codes it learnt."""
    for name in ("lm.pt", "lm_train.pt"):
        path = os.path.join(out, name)
        if os.path.exists(path):
            raise D.UserError(
                f"{path}: learnt the codes of the codec in {out}, which would be overwritten: "
                "choose another --out, or move it away first"
            )


def train(t: Training, run: D.Run, data: D.AudioData, held_out: list, start: int, seed: int) -> None:
    """From step `start` to the last: learn, log, and now and then save, measure, and say how it goes."""
    steps, crop_length = t.recipe["steps"], int(t.recipe["seconds"] * D.SAMPLE_RATE)
    log_every, eval_every = max(1, steps // 100), max(100, steps // 10)
    log = D.Log(run.log_path, start) if run.is_main else None
    stopper, clock, bad = D.Stopper(), D.Clock(start), 0
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=not run.is_main, smoothing=0.1):
        # Random crops come straight from the memory map, a function of seed and step alone.
        crops = data.batch(t.recipe["batch"], crop_length, np.random.default_rng((seed, step)))
        wave = torch.stack([crop.wave for crop in crops]).chunk(run.world_size)[run.rank].to(run.device)
        losses, grad_norm, finite = train_step(t, wave, step)
        bad = 0 if finite else D.count_bad_steps(bad, step, run.resume_path, run.say)

        done = step + 1
        logging = done % log_every == 0
        stopping = stopper.asked(run.device) and done < steps
        if logging:
            D.mean_over_processes(list(losses.values()))
        if logging and run.is_main:
            means = {name: loss.item() for name, loss in losses.items()}
            log_step(t, done, means, grad_norm.item(), clock.steps_per_second(done), log, run.say)
        if (done % eval_every == 0 or done == steps or stopping) and run.is_main:
            with clock.paused():
                D.save_atomic(t.checkpoint(done), run.resume_path)
                D.save_atomic(t.ema.checkpoint(), run.path)
                if not stopping:
                    run.say(evaluate(t.ema, held_out, run.wavs))
                    for sentence in health(t, done, grad_norm.item()):
                        run.say("! " + sentence)
        if stopping:
            stopper.end(done, run.resume_path, run.say)


def main():
    """Read the flags, prepare the data, and train; or only measure."""
    args = get_args()
    run = D.Run(args, "codec", load_checkpoint)
    device, say = run.device, run.say
    config = choose_config(args, run)
    recipe = choose_recipe(args, config.size, run)

    data = D.first_then_all(lambda: D.AudioData.from_flags(args, log=say))
    held_out = held_out_waves(data, device)
    one_second = torch.zeros(1, D.SAMPLE_RATE, device=device)
    if args.eval_only:
        codec = Codec.load(run.path, device)
        D.choose_threads(args.threads, device, lambda: codec.encode(one_second), say)
        if run.is_main:
            say(evaluate(codec, held_out, run.wavs))
        return

    torch.manual_seed(args.seed)
    t = Training(config, recipe, device, run.flags)
    start = t.load(run.saved, run.resume_path) if args.resume else 0
    if D.is_done(run.resume_path, start, recipe["steps"], say):
        return
    protect_language_model(args.out)
    D.choose_threads(args.threads, device, lambda: t.ema.encode(one_second), say)
    parameters, never = sum(p.numel() for p in t.codec.parameters()), t.disc_start >= recipe["steps"]
    disc = "no discriminator" if never else f"from step {t.disc_start} on with a discriminator"
    say(
        f"codec {config.size}, {config.streams} streams of {config.codebook_size} codes, "
        f"{config.kbps} kbit/s, {parameters / 1e6:.1f} M parameters; {recipe['steps']} steps of "
        f"{recipe['batch']} clips of {recipe['seconds']} s on {device}, {disc}"
    )
    train(t, run, data, held_out, start, args.seed)
    following = f"python train_lm.py --streams {config.streams}{D.data_command(args)}"
    say(f"codec saved to {run.path}; next: {following}")


if __name__ == "__main__":
    with D.one_line_errors(CodecError):
        main()
