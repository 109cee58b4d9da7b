"""Stage "text": both text encoders and the image tower, contrastively (InfoNCE, Radford et al. 2021).

Each picture also meets a caption that is wrong in one thing (two colours swapped, "above" for "below"): among
random scenes the set of colours alone tells captions apart, and who is above whom would never be learnt.

The UNet reads the penultimate layer of both encoders, which the contrastive loss shapes only through the last
one. Throwaway probes on that layer keep it readable: the last token of a shape's name tells its colour, shape
and size, and the end token what lies where. The stage begins with captions and probes alone: on them an encoder learns
the order of a relation in a few hundred quick steps, where contrast with pictures had not taught it in a thousand.
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
# Share of the stage before pictures come in: grammar is learnt from captions alone, and quickly.
WORDS_ONLY = 0.2
NOT_SAID = -100

ENTITY_TARGETS = (len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.SIZES))
SCENE_TARGETS = (
    len(scenes.COLOURS),  # colour and shape of the upper or left thing, then of the other, then none
    len(scenes.SHAPES),
    len(scenes.COLOURS) + 1,
    len(scenes.SHAPES) + 1,
    3,  # one thing, one above the other, side by side
    len(scenes.SIZES),  # of the upper or left thing, of the other
    len(scenes.SIZES),
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
        targets = [colours.index(thing.colour), shapes.index(thing.shape), size]
        entities.append((start + len(name) - 1, targets))
    background = list(scenes.BACKGROUNDS).index(scene.background) if scene.background in words else NOT_SAID
    layout = [NOT_SAID] * 7
    if scene.relation is None:
        ((_, (colour, shape, size)),) = entities
        layout = [colour, shape, len(colours), len(shapes), 0, size, NOT_SAID]
    elif any(f" {word} " in words for said in scenes.RELATION_WORDS.values() for word in said):
        (_, first), (_, second) = entities if scene.relation in ("above", "left of") else entities[::-1]
        axis = 1 if scene.relation in ("above", "below") else 2
        layout = [*first[:2], *second[:2], axis, first[2], second[2]]
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
    pooled_probe = nn.Linear(WIDTHS[1], sum(SCENE_TARGETS))
    modules["pooled_probe"] = pooled_probe
    for module in modules.values():
        module.to(run.device)
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
        words_only = progress < WORDS_ONLY
        if words_only:
            described, said = [scenes.random_scene(rng) for _ in range(2 * size)], None
        else:
            chosen = rng.sample(by_canvas[rng.choice((0, 0, 0, 1, 2))], size)
            described = [e.scene for e in chosen]
            described += [wrong_in_one_thing(rng, scene) for scene in described]
            said = [None] * size + [True] * size
        ids, rows, columns, entity, end, scene = (
            t.to(run.device) for t in _captions(tokenizer, rng, described, said)
        )
        with run.autocast():
            one = first(ids, output_hidden_states=True)
            two = second(ids, output_hidden_states=True)
            pooled = F.layer_norm(two.text_embeds, two.text_embeds.shape[-1:])
            probes = [
                probes_of[name].loss(out.hidden_states[-2], rows, columns, entity, end, scene)
                for name, out in (("probes_1", one), ("probes_2", two))
            ]
            probes.append(torch.stack(_split_loss(pooled_probe(pooled), scene, SCENE_TARGETS)).mean())
            loss = PROBE_WEIGHT * torch.stack(probes).sum()
            figures = {"probe": float(probes[1].detach()), "pooled": float(probes[2].detach())}
            if not words_only:
                image = F.normalize(
                    tower(as_input([e.pixels for e in chosen]).to(run.device)).float(), dim=-1
                )
                texts = [
                    F.normalize(t.float(), dim=-1)
                    for t in (modules["first_projection"](one.pooler_output), two.text_embeds)
                ]
                scale = temperature.clamp(max=math.log(100.0)).exp()
                contrast = torch.stack([_info_nce(image, t, scale) for t in texts])
                loss = loss + contrast.sum()
                right = (image @ texts[1].T).argmax(1) == torch.arange(size, device=ids.device)
                figures |= {
                    "nce1": float(contrast[0].detach()),
                    "nce2": float(contrast[1].detach()),
                    "right": float(right.float().mean()),
                }
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return figures

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
    """A scene that a picture of `scene` does not show: one relation, exchange or attribute is different.

    It shows no pairing that is held out, and no two things alike.
    """
    while True:
        wrong = _with_one_change(rng, scene)
        alike = len({(thing.colour, thing.shape) for thing in wrong.things}) < len(wrong.things)
        if not alike and not scenes.held_out(wrong):
            return wrong


def _with_one_change(rng: random.Random, scene: scenes.Scene) -> scenes.Scene:
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    ways = ["colour", "shape"]
    if scene.relation is not None:
        first, second = scene.things
        ways += ["relation"] * 2 + ["colours"] * (first.colour != second.colour)
        ways += ["shapes"] * (first.shape != second.shape)
    match rng.choice(ways):
        case "relation":
            assert scene.relation is not None
            return replace(scene, relation=scenes.INVERSE[scene.relation])
        case "colours":
            return replace(
                scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour))
            )
        case "shapes":
            return replace(
                scene, things=(replace(first, shape=second.shape), replace(second, shape=first.shape))
            )
        case "colour":
            other = replace(thing, colour=rng.choice([c for c in scenes.COLOURS if c != thing.colour]))
        case _:
            other = replace(thing, shape=rng.choice([s for s in scenes.SHAPES if s != thing.shape]))
    return replace(scene, things=(*scene.things[:index], other, *scene.things[index + 1 :]))


def _captions(
    tokenizer: CLIPTokenizer,
    rng: random.Random,
    described: list[scenes.Scene],
    said: list[bool | None] | None,
) -> tuple[Tensor, ...]:
    """Token ids [B, L] of a caption for each scene, and what they tell.

    Returns (ids, rows and columns of the shapes' last tokens, their targets, columns of the end tokens, the
    scenes' targets). `said[k]` is whether caption k names the relation; None leaves it to chance.
    """
    said = said or [None] * len(described)
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
    return ids, *(torch.tensor(values) for values in (rows, columns, entity)), end, torch.tensor(scene)


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
