"""Stage "text": both text encoders and the image tower, contrastively (InfoNCE, Radford et al. 2021).

Each picture also meets a caption that is wrong in one thing (two colours swapped, "above" for "below"): among
random scenes the set of colours alone tells captions apart, and who is above whom would never be learnt.

The UNet reads the penultimate layer of both encoders, which the contrastive loss shapes only through the last
one. Throwaway probes on that layer keep it readable: the last token of a shape's name tells its colour, shape
and size, and the end token what lies where.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..quality import ImageTower, as_input
from . import data, scenes
from .loop import Run, Stage, console, train
from .tokenizer import DEMO, MAX_LENGTH

PICTURES = 10_000
BATCH = 64
SEEN_LENGTH = 32  # tokens; captions are shorter, and causal attention makes the rest unreachable
WIDTHS = (96, 128)
PROBE_WEIGHT = 1.0
NOT_SAID = -100

ENTITY_TARGETS = (len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.SIZES))
SCENE_TARGETS = (
    len(scenes.COLOURS),  # colour and shape of the upper or left thing, then of the other, then none
    len(scenes.SHAPES),
    len(scenes.COLOURS) + 1,
    len(scenes.SHAPES) + 1,
    3,  # one thing, one above the other, side by side
    len(scenes.BACKGROUNDS),
)


def text_config(width: int, *, projection: int, activation: str, vocabulary: int) -> CLIPTextConfig:
    """Three layers, heads of 32; start, end and padding ids are the tokenizer's."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=projection,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=1,
    )


def text_targets(words: str, scene: scenes.Scene) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """What a caption tells: (end of a shape's name in characters, its targets) for each thing, and the scene's."""
    colours, shapes, sizes = list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.SIZES)
    entities = []
    for thing in scene.things:
        name = f"{thing.colour} {thing.shape}"
        start = words.index(name)
        said = words[:start].endswith(f"{thing.size} ")
        size = sizes.index(thing.size) if said else NOT_SAID
        entities.append(
            (start + len(name) - 1, [colours.index(thing.colour), shapes.index(thing.shape), size])
        )
    background = list(scenes.BACKGROUNDS).index(scene.background) if scene.background in words else NOT_SAID
    if scene.relation is None:
        (thing,) = scene.things
        layout = [colours.index(thing.colour), shapes.index(thing.shape), len(colours), len(shapes), 0]
    elif any(f" {word} " in words for said in scenes.RELATION_WORDS.values() for word in said):
        first, second = scene.things if scene.relation in ("above", "left of") else scene.things[::-1]
        layout = [colours.index(first.colour), shapes.index(first.shape)]
        layout += [colours.index(second.colour), shapes.index(second.shape)]
        layout += [1 if scene.relation in ("above", "below") else 2]
    else:
        layout = [NOT_SAID] * 5
    return entities, [*layout, background]


class Probes(nn.Module):
    """Linear readings of the penultimate layer; they are not kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entity = nn.Linear(width, sum(ENTITY_TARGETS))
        self.scene = nn.Linear(width, sum(SCENE_TARGETS))

    def loss(
        self, hidden: Tensor, rows: Tensor, columns: Tensor, entity: Tensor, end: Tensor, scene: Tensor
    ) -> Tensor:
        """Cross entropy averaged over the targets said; hidden is [B, L, C]."""
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        losses = _split_loss(self.entity(hidden[rows, columns]), entity, ENTITY_TARGETS)
        ends = hidden[torch.arange(len(end), device=end.device), end]
        losses += _split_loss(self.scene(ends), scene, SCENE_TARGETS)
        return torch.stack(losses).mean()


def _split_loss(logits: Tensor, targets: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    parts = logits.float().split(sizes, dim=1)
    return [
        F.cross_entropy(part, targets[:, k], ignore_index=NOT_SAID, reduction="sum")
        / (targets[:, k] != NOT_SAID).sum().clamp_min(1)
        for k, part in enumerate(parts)
    ]


def stage_text(run: Run) -> None:
    """Train and write `out/text_encoder`, `out/text_encoder_2` and `out/image_tower`."""
    torch.manual_seed(run.seed)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    vocabulary = len(tokenizer)
    first = CLIPTextModel(
        text_config(WIDTHS[0], projection=128, activation="quick_gelu", vocabulary=vocabulary)
    )
    second = CLIPTextModelWithProjection(
        text_config(WIDTHS[1], projection=128, activation="gelu", vocabulary=vocabulary)
    )
    modules: dict[str, nn.Module] = {
        "first": first,
        "second": second,
        "tower": ImageTower(embedding=128),
        "first_projection": nn.Linear(WIDTHS[0], 128, bias=False),
        "temperature": nn.ParameterDict({"log": nn.Parameter(torch.tensor(math.log(1 / 0.07)))}),
    }
    probes_of = {name: Probes(width) for name, width in zip(("probes_1", "probes_2"), WIDTHS, strict=True)}
    modules |= probes_of
    for module in modules.values():
        module.to(run.device)
    pooled_probe = nn.Linear(WIDTHS[1], sum(SCENE_TARGETS))
    modules["pooled_probe"] = pooled_probe
    tower, temperature = modules["tower"], modules["temperature"].get_parameter("log")
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.02)
    examples = [
        e
        for e in data.examples(range(run.seed * PICTURES, (run.seed + 1) * PICTURES), damaged=0.05)
        if e.crop == (0, 0)
    ]
    size = run.batch_of(BATCH)
    by_canvas = [[e for e in examples if e.pixels.shape[:2] == canvas] for canvas in scenes.CANVASES]
    console.log(
        f"text: {len(examples)} pictures, {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters"
    )

    def step(progress: float, generator: torch.Generator) -> dict[str, float]:
        rng = random.Random(int(torch.randint(2**40, (1,), generator=generator)))
        chosen = rng.sample(by_canvas[rng.choice((0, 0, 0, 1, 2))], size)
        pixels, ids, rows, columns, entity, end, scene = (
            t.to(run.device) for t in _batch(tokenizer, rng, chosen)
        )
        with run.autocast():
            one = first(ids, output_hidden_states=True)
            two = second(ids, output_hidden_states=True)
            image = F.normalize(tower(pixels).float(), dim=-1)
            texts = (modules["first_projection"](one.pooler_output), two.text_embeds)
            scale = temperature.clamp(max=math.log(100.0)).exp()
            contrast = torch.stack([_info_nce(image, F.normalize(t.float(), dim=-1), scale) for t in texts])
            layout = _split_loss(pooled_probe(F.layer_norm(two.text_embeds, (128,))), scene, SCENE_TARGETS)
            probes = [
                probes_of[name].loss(out.hidden_states[-2], rows, columns, entity, end, scene)
                for name, out in (("probes_1", one), ("probes_2", two))
            ]
        loss = contrast.sum() + PROBE_WEIGHT * (probes[0] + probes[1] + torch.stack(layout).mean())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        accuracy = (image @ F.normalize(texts[1].float(), dim=-1).T).argmax(1) == torch.arange(
            size, device=ids.device
        )
        return {
            "nce1": float(contrast[0].detach()),
            "nce2": float(contrast[1].detach()),
            "probe": float(probes[1].detach()),
            "layout": float(torch.stack(layout).mean().detach()),
            "right": float(accuracy.float().mean()),
        }

    train(run, Stage("text", modules, optimiser, step, 2.0e-3))
    for name, encoder in (("text_encoder", first), ("text_encoder_2", second)):
        save_text_encoder(encoder.eval(), run.out / name)
    assert isinstance(tower, ImageTower)
    tower.save(run.out / "image_tower")


def _info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Row k of a belongs to row k of b; b's further rows belong to none."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(a)].T, target))


def wrong_in_one_thing(rng: random.Random, scene: scenes.Scene) -> scenes.Scene:
    """A scene that a picture of `scene` does not show: one relation, exchange or attribute is different."""
    if scene.relation is not None:
        first, second = scene.things
        ways = (
            ["relation"]
            + ["colours"] * (first.colour != second.colour)
            + ["shapes"] * (first.shape != second.shape)
        )
        way = rng.choice(ways)
        if way == "relation":
            return replace(scene, relation=scenes.INVERSE[scene.relation])
        a, b = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        if way == "shapes":
            a, b = (replace(first, shape=second.shape), replace(second, shape=first.shape))
        return replace(scene, things=(a, b))
    (thing,) = scene.things
    if rng.random() < 0.5:
        other = rng.choice([c for c in scenes.COLOURS if c != thing.colour])
        return replace(scene, things=(replace(thing, colour=other),))
    other = rng.choice([s for s in scenes.SHAPES if s != thing.shape])
    return replace(scene, things=(replace(thing, shape=other),))


def _batch(tokenizer: CLIPTokenizer, rng: random.Random, chosen: list[data.Example]) -> tuple[Tensor, ...]:
    described = [e.scene for e in chosen]
    described += [wrong_in_one_thing(rng, scene) for scene in described]
    said = [None] * len(chosen) + [True] * len(chosen)
    captions = [scenes.caption(rng, s, say_relation=r) for s, r in zip(described, said, strict=True)]
    tokens = tokenizer(
        captions, padding="max_length", max_length=SEEN_LENGTH, truncation=True, return_tensors="pt"
    )
    ids = tokens["input_ids"]
    rows, columns, entity, scene = [], [], [], []
    for k, (words, depicted) in enumerate(zip(captions, described, strict=True)):
        entities, layout = text_targets(words, depicted)
        scene.append(layout)
        for place, targets in entities:
            rows.append(k)
            columns.append(tokens.char_to_token(k, place))
            entity.append(targets)
    end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    pixels = as_input([e.pixels for e in chosen])
    listed = (rows, columns, entity)
    return pixels, ids, *(torch.tensor(values) for values in listed), end, torch.tensor(scene)


def save_text_encoder(encoder: CLIPTextModel | CLIPTextModelWithProjection, folder: Path) -> None:
    """Write fp16 weights under the key names that published checkpoints use.

    The config says float32: transformers loads what it says, and diffusers loads the UNet in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**encoder.config.to_dict(), "architectures": [type(encoder).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    state = {}
    for key, value in encoder.state_dict().items():
        if key.endswith("position_ids"):
            continue
        prefixed = key.startswith(("text_model.", "text_projection."))
        state[key if prefixed else f"text_model.{key}"] = value.detach().half().contiguous().cpu()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
