"""Train the demo student `shapes` from scratch: autoencoder, teacher, pairs, student.

    python tools/train_shapes.py --out runs/shapes

Four stages, each resumable: killed at any moment, the same command goes on from the last checkpoint. Seeds are fixed
and drawn from the step number, so a resumed run sees the same batches as one that was never stopped.

1. autoencoder  TAESD-style, L1 on drawn scenes, latents disturbed so that the decoder forgives a denoiser's errors.
2. teacher      text encoder and UNet together, flow matching (Lipman et al. 2022, arXiv 2210.02747) with prompt
                dropout.
3. pairs        the teacher's own pictures: noise -> 10 Euler steps, half of them guided, -> latent. What the judge
                rejects is dropped (only prompts that training may see are drawn), so the student copies successes.
4. student      one to four steps from the teacher's weights: reflow (Liu et al. 2022, arXiv 2209.03003; InstaFlow,
                arXiv 2309.06380) on the pairs at the sampler's own sigmas, half of the batches starting from the
                student's own partial trajectories, so that later steps learn to mend what earlier ones left.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from edgegen.students.networks.clip_text import ClipTextEncoder
from edgegen.students.networks.tiny_decoder import TinyDecoder, TinyEncoder
from edgegen.students.networks.unet import UNet
from edgegen.students.shapes import family
from edgegen.students.shapes.grammar import Scene, held_back, training_scenes
from edgegen.students.shapes.judge import alignment, shows
from edgegen.students.shapes.render import render_batch

SIGMAS = (1.0, 0.75, 0.5, 0.25)
TWO_OBJECT_SHARE = 0.8
PROMPT_DROPOUT = 0.1
PAIRS_A_CHUNK = 128
ONE_FIRST, EARLY_FIRST = 500, 1500
"""The teacher's curriculum: one-object scenes alone up to the first of these steps, mostly high noise up to the second.
Which side is left is the product of a word and a place: until a network has found it, whatever else varies hides its
gradient."""
ONE_OBJECT_WORDS = 9  # with the start token; two objects take ten or more


@dataclass(frozen=True)
class Crew:
    """The processes that train together: each takes every `size`-th row of a batch, gradients are averaged."""

    rank: int = 0
    size: int = 1

    def share(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.size]

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient) / self.size)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def save_atomic(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def learning_rate(step: int, total: int, peak: float, warmup: int = 100, decay: float = 0.3) -> float:
    """Warm-up, constant, then linear decay over the last `decay` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, max(0.02, (total - step) / (decay * total)))


def train(
    name: str,
    modules: nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    peak: float,
    out: Path,
    crew: Crew,
    ema_decay: float,
    report: Callable[[], str] | None = None,
    every: int = 500,
) -> dict[str, Tensor]:
    """Run or resume one training stage; returns the averaged weights."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
    checkpoint, start = out / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=crew.rank > 0)
    smooth = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        crew.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in modules.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        smooth = loss.item() if step == start else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        done = step + 1
        if crew.rank == 0 and (done % 100 == 0 or done == steps):
            save_atomic(
                {
                    "weights": modules.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": done,
                },
                checkpoint,
            )
        if crew.rank == 0 and report and (done % every == 0 or done == steps):
            live = {k: v.clone() for k, v in modules.state_dict().items()}
            modules.load_state_dict(average)
            tqdm.write(f"{name} {done}: loss {smooth:.4f}, {report()}")
            modules.load_state_dict(live)
    return average


def draw_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    one, two = training_scenes()
    pools = [two if rng.random() < TWO_OBJECT_SHARE else one for _ in range(count)]
    return [pool[rng.integers(len(pool))] for pool in pools]


def say(scene: Scene, rng: np.random.Generator) -> str:
    """The scene's prompt, now and then with a word less than the full grammar, as users type."""
    prompt = scene.prompt()
    if scene.place and rng.random() < 0.1:
        prompt = prompt.removesuffix(f" {scene.place}")
    if rng.random() < 0.06:
        size = scene.things[rng.integers(len(scene.things))].size
        prompt = prompt.replace(f" {size}", "", 1)
    return prompt.replace("a orange", "an orange")


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def stage_autoencoder(out: Path, steps: int, crew: Crew) -> tuple[TinyEncoder, TinyDecoder, float, float]:
    config = family.DECODER
    nets = nn.ModuleDict({"encoder": TinyEncoder(config), "decoder": TinyDecoder(config)})
    nets.to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((1, step))
        torch.manual_seed(step)
        picture = crew.share(torch.from_numpy(render_batch(draw_scenes(rng, 32), rng)))
        picture = picture.to(memory_format=torch.channels_last)
        with autocast():
            latent = nets["encoder"](picture)
            drawn = nets["decoder"](latent + 0.1 * torch.randn_like(latent))
        error = drawn.float() - picture
        return error.abs().mean() + error.square().mean() + 1e-3 * latent.float().square().mean()

    def report() -> str:
        scenes, picture = probe_pictures(200)
        with torch.no_grad():
            drawn = nets["decoder"](nets["encoder"](picture))
        psnr = 10 * torch.log10(4 / (drawn - picture).square().mean()).item()
        return f"{psnr:.1f} dB, {alignment(drawn.numpy(), scenes):.3f} of decoded truths judged right"

    nets.load_state_dict(
        train(
            "autoencoder",
            nets,
            loss_at,
            steps=steps,
            peak=2e-3,
            out=out,
            crew=crew,
            ema_decay=0.995,
            report=report,
            every=200,
        )
    )
    nets.eval().requires_grad_(False)
    _, picture = probe_pictures(400)
    with torch.no_grad():
        latent = nets["encoder"](picture)
    return nets["encoder"], nets["decoder"], latent.mean().item(), latent.std().item()


def probe_pictures(count: int) -> tuple[list[Scene], Tensor]:
    rng = np.random.default_rng(99)
    scenes = draw_scenes(rng, count)
    return scenes, torch.from_numpy(render_batch(scenes, rng))


def make_latents(encoder: TinyEncoder, count: int, out: Path) -> tuple[Tensor, Tensor]:
    """Draw and encode a training set once -> latents [N, 4, 16, 16] fp16, ids [N, L] int16."""
    path = out / "latents.pt"
    if path.exists():
        data = torch.load(path, weights_only=True)
        return data["latents"], data["ids"]
    tokenizer = family.tokenizer()
    latents, ids = [], []
    for chunk in tqdm(range(0, count, 256), desc="latents"):
        rng = np.random.default_rng((2, chunk))
        scenes = draw_scenes(rng, 256)
        with torch.no_grad(), autocast():
            latents.append(encoder(torch.from_numpy(render_batch(scenes, rng))).half())
        ids += [e.ids for e in tokenizer.encode_batch([say(scene, rng) for scene in scenes])]
    data = {"latents": torch.cat(latents), "ids": torch.tensor(ids, dtype=torch.int16)}
    save_atomic(data, path)
    return data["latents"], data["ids"]


def null_ids() -> Tensor:
    return torch.tensor(family.tokenizer().encode("").ids)


def new_networks() -> nn.ModuleDict:
    torch.manual_seed(0)
    nets = nn.ModuleDict({"text_encoder": ClipTextEncoder(family.TEXT_ENCODER), "denoiser": UNet(family.DENOISER)})
    for module in nets.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    nn.init.zeros_(nets["denoiser"].conv_out.weight)
    return nets


def velocity(nets: nn.ModuleDict, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # at 64 tokens the flash kernel's backward costs twice as much on a CPU
        return nets["denoiser"](x, sigma * 1000, context)


@torch.no_grad()
def guided_euler(nets: nn.ModuleDict, noise: Tensor, ids: Tensor, steps: int, guidance: float) -> Tensor:
    """Euler from noise to data, guided (Ho & Salimans 2022, arXiv 2207.12598) while the layout is decided."""
    x, n = noise, len(noise)
    with autocast():
        context = nets["text_encoder"](torch.cat([ids, null_ids().expand(n, -1)]))
        sigmas = torch.linspace(1, 0, steps + 1)
        sigmas = 2 * sigmas / (1 + sigmas)  # more of the steps at high noise
        for index, (now, after) in enumerate(pairwise(sigmas)):
            if 2 * index >= steps:
                v = velocity(nets, x, now.expand(n), context[:n]).float()
            else:
                both = velocity(nets, torch.cat([x, x]), now.expand(2 * n), context).float()
                v = both[n:] + guidance * (both[:n] - both[n:])
            x = x + (after - now) * v
    return x


@torch.no_grad()
def partial_trajectory(nets: nn.ModuleDict, noise: Tensor, context: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """The student's own latent on arrival at the last of `sigmas`."""
    x = noise
    for now, after in pairwise(sigmas):
        x = x + (after - now) * velocity(nets, x, torch.full((len(x),), now), context).float()
    return x


def held_back_probe(count: int) -> tuple[list[Scene], Tensor, Tensor]:
    """Every n-th held-back scene, to watch training by; nothing is chosen by it."""
    scenes = list(held_back()[:: max(1, len(held_back()) // count)])
    ids = torch.tensor([e.ids for e in family.tokenizer().encode_batch([s.prompt() for s in scenes])])
    return scenes, ids, torch.randn(len(scenes), 4, 16, 16, generator=torch.Generator().manual_seed(7))


def split_alignment(pictures: Tensor, scenes: list[Scene]) -> str:
    parts = []
    for count in (1, 2):
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) == count]
        parts.append(f"{count}-object {alignment([pictures[i].numpy() for i in rows], [scenes[i] for i in rows]):.3f}")
    return ", ".join(parts)


def stage_teacher(
    out: Path, steps: int, crew: Crew, decoder: TinyDecoder, latents: Tensor, ids: Tensor, mean: float, std: float
) -> nn.ModuleDict:
    nets, empty = new_networks(), null_ids()
    words = (ids != empty[-1]).sum(1)
    single = (words <= ONE_OBJECT_WORDS).float()
    weights = 1.0 + single  # places take longer to learn than relations

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_000 + step)
        rows = torch.multinomial(single if step < ONE_FIRST else weights, 64, generator=generator)
        x0, tokens = (latents[rows].float() - mean) / std, ids[rows].long()
        dropped = torch.rand(64, 1, generator=generator) < PROMPT_DROPOUT
        tokens = torch.where(dropped, empty, tokens)
        noise = torch.randn(x0.shape, generator=generator)
        # Half at any noise, half where place and order are decided: there no layout shows through the noise yet.
        anywhere = torch.sigmoid(torch.randn(64, generator=generator) + 0.8)
        early = 1 - 0.2 * torch.rand(64, generator=generator)
        sigma = torch.where(torch.rand(64, generator=generator) < (0.8 if step < EARLY_FIRST else 0.5), early, anywhere)
        x0, tokens, noise, sigma = (crew.share(rows) for rows in (x0, tokens, noise, sigma))
        s = sigma[:, None, None, None]
        with autocast():
            v = velocity(nets, (1 - s) * x0 + s * noise, sigma, nets["text_encoder"](tokens))
        return F.mse_loss(v.float(), noise - x0)

    def report() -> str:
        scenes, tokens, noise = held_back_probe(144)
        drawn = decoder(guided_euler(nets, noise, tokens, 8, 2.0) * std + mean)
        return split_alignment(drawn, scenes)

    nets.load_state_dict(
        train("teacher", nets, loss_at, steps=steps, peak=1e-3, out=out, crew=crew, ema_decay=0.998, report=report)
    )
    return nets


def draw_pairs(chunk: int, nets: nn.ModuleDict, decoder: TinyDecoder, mean: float, std: float, path: Path) -> None:
    """Noise, ids and the teacher's latent for each picture of one chunk that the judge accepts."""
    tokenizer, rng = family.tokenizer(), np.random.default_rng((3, chunk))
    scenes = draw_scenes(rng, PAIRS_A_CHUNK)
    said = [say(scene, rng) for scene in scenes]
    tokens = torch.tensor([e.ids for e in tokenizer.encode_batch(said)])
    generator = torch.Generator().manual_seed(5_000_000 + chunk)
    noise = torch.randn(PAIRS_A_CHUNK, 4, 16, 16, generator=generator)
    latent = guided_euler(nets, noise, tokens, 10, 2.0)
    with torch.no_grad():
        pictures = decoder(latent * std + mean).numpy()
    # A prompt that leaves a word out cannot be judged by its scene: it is kept as it is.
    keep = torch.tensor(
        [text != scene.prompt() or shows(p, scene) for text, p, scene in zip(said, pictures, scenes, strict=True)]
    )
    save_atomic({"noise": noise[keep].half(), "ids": tokens[keep].short(), "latent": latent[keep].half()}, path)


def stage_pairs(
    out: Path, count: int, crew: Crew, nets: nn.ModuleDict, decoder: TinyDecoder, mean: float, std: float
) -> dict[str, Tensor]:
    """All chunks, written one by one so that a kill loses at most those under way."""
    nets.eval()
    folder = out / "pairs"
    folder.mkdir(exist_ok=True)
    paths = {chunk: folder / f"{chunk:05d}.pt" for chunk in range(count // PAIRS_A_CHUNK)}
    todo = [(chunk, path) for chunk, path in paths.items() if not path.exists()]
    crew.wait()
    for chunk, path in tqdm(todo[crew.rank :: crew.size], desc="pairs", disable=crew.rank > 0):
        draw_pairs(chunk, nets, decoder, mean, std, path)
    crew.wait()
    parts = [torch.load(path, weights_only=True) for path in paths.values()]
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if crew.rank == 0:
        print(f"pairs: {len(data['noise'])} of {len(parts) * PAIRS_A_CHUNK} teacher pictures kept")
    return data


def stage_student(
    out: Path,
    steps: int,
    crew: Crew,
    nets: nn.ModuleDict,
    decoder: TinyDecoder,
    pairs: dict[str, Tensor],
    mean: float,
    std: float,
) -> nn.ModuleDict:
    nets.train()

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(9_000_000 + step)
        rows = crew.share(torch.randint(len(pairs["noise"]), (64,), generator=generator))
        noise, x0 = pairs["noise"][rows].float(), pairs["latent"][rows].float()
        level = int(torch.multinomial(torch.tensor([0.4, 0.2, 0.2, 0.2]), 1, generator=generator))
        own = torch.rand((), generator=generator) < 0.5
        sigma = SIGMAS[level]
        with autocast():
            context = nets["text_encoder"](pairs["ids"][rows].long())
            if level and own:
                path = SIGMAS[: level + 1] if level != 2 or torch.rand((), generator=generator) < 0.5 else (1.0, 0.5)
                x = partial_trajectory(nets, noise, context.detach(), path)
            else:
                x = (1 - sigma) * x0 + sigma * noise
            v = velocity(nets, x, torch.full((len(x),), sigma), context)
        end = x - sigma * v.float()
        return torch.sqrt((end - x0).square() + 0.03**2).mean()

    def report() -> str:
        scenes, tokens, noise = held_back_probe(216)
        parts = []
        with torch.no_grad():
            context = nets["text_encoder"](tokens)
        for sigmas in ((1.0,), (1.0, 0.5), SIGMAS):
            drawn = decoder(partial_trajectory(nets, noise, context, (*sigmas, 0.0)) * std + mean)
            parts.append(f"{len(sigmas)} steps: {split_alignment(drawn, scenes)}")
        return "; ".join(parts)

    nets.load_state_dict(
        train("student", nets, loss_at, steps=steps, peak=5e-4, out=out, crew=crew, ema_decay=0.998, report=report)
    )
    return nets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"), help="checkpoints, and the finished weights")
    parser.add_argument("--processes", type=int, default=2, help="one core each; the result does not depend on it")
    parser.add_argument("--autoencoder-steps", type=int, default=1200)
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--latents", type=int, default=40_960)
    parser.add_argument("--pairs", type=int, default=8_192)
    parser.add_argument("--student-steps", type=int, default=1500)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(run, (args, f"file://{meeting}/crew"), nprocs=args.processes)


def run(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One process of the crew: all stages in order, each from where it was left."""
    torch.set_num_threads(1)
    crew = Crew(rank, args.processes)
    if crew.size > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=crew.size)
    encoder, decoder, mean, std = stage_autoencoder(args.out, args.autoencoder_steps, crew)
    if crew.rank == 0:
        print(f"latent mean {mean:.4f}, std {std:.4f}")
        make_latents(encoder, args.latents, args.out)
    crew.wait()
    latents, ids = make_latents(encoder, args.latents, args.out)
    nets = stage_teacher(args.out, args.teacher_steps, crew, decoder, latents, ids, mean, std)
    pairs = stage_pairs(args.out, args.pairs, crew, nets, decoder, mean, std)
    nets = stage_student(args.out, args.student_steps, crew, nets, decoder, pairs, mean, std)
    if crew.rank == 0:
        modules = {"text_encoder": nets["text_encoder"], "denoiser": nets["denoiser"], "decoder": decoder}
        family.write_weights(args.out / "weights", modules, mean, std)
        print(f"weights in {args.out / 'weights'}")


if __name__ == "__main__":
    main()
