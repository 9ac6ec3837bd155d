"""The recipes: what a run is made of, and that it can stop and go on at any checkpoint without changing a bit."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.noise import generator
from tsdiff.worlds.shapes.geometry import COLORS, SHAPES
from tsdiff.worlds.shapes.grammar import KINDS, VOCABULARY, read
from tsdiff.worlds.shapes.heldout import holds_held_out
from tsdiff.worlds.shapes.render import render_batch
from tsdiff.worlds.shapes.scenes import draw_scene, every_prompt
from tsdiff.worlds.shapes.train.__main__ import main
from tsdiff.worlds.shapes.train.autoencoder import Autoencoder
from tsdiff.worlds.shapes.train.contrast import Contrast
from tsdiff.worlds.shapes.train.denoiser import SCHEDULER, Denoiser
from tsdiff.worlds.shapes.train.features import Classifier, labels
from tsdiff.worlds.shapes.train.layout import COVERED, cover, map_head, map_loss, places, places_loss, things, things_loss
from tsdiff.worlds.shapes.train.loop import Training, finish, read_losses, train
from tsdiff.worlds.shapes.train.pictures import draw_pictures
from tsdiff.worlds.shapes.train.text import LENGTH, known_tokens, tokenizer, vocabulary

prepare_torchvision()

SHORT = Training(steps=4, batch=4, rate=1e-3, warmup=1, cooldown=0.25, average=0.9)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an autoencoder with random weights."""
    recipe = Autoencoder(training=SHORT)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    recipe.export(recipe.build().eval(), folder)
    return folder


@pytest.fixture
def recipes(autoencoder: Path) -> dict[str, object]:
    return {
        "autoencoder": Autoencoder(training=SHORT),
        "denoiser": Denoiser("tiny", (8, 16, 16), autoencoder, SHORT),
        "contrast": Contrast("contrast", training=SHORT),
        "features": Classifier(training=SHORT),
    }


def states_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autoencoder", "denoiser", "contrast", "features"])
def test_a_run_that_stopped_ends_in_the_same_bits(name, recipes, tmp_path):
    recipe = recipes[name]
    whole = train(recipe, tmp_path / "whole", quiet=True)
    train(recipe, tmp_path / "parts", quiet=True, every=1, until=1)
    train(recipe, tmp_path / "parts", quiet=True, every=2, until=3)
    parts = train(recipe, tmp_path / "parts", quiet=True)
    assert states_equal(whole, parts)
    assert read_losses(tmp_path / "whole") == read_losses(tmp_path / "parts")
    assert states_equal(whole, finish(recipe, tmp_path / "whole"))


def test_losses_that_outran_their_checkpoint_are_dropped(tmp_path):
    recipe = Classifier(training=SHORT)
    train(recipe, tmp_path, quiet=True, until=2)
    with open(tmp_path / "losses.csv", "a", newline="") as file:
        csv.writer(file).writerows([(2, 99.0), (3, 99.0)])  # a kill between the two files
    train(recipe, tmp_path, quiet=True)
    rows = read_losses(tmp_path)
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    assert all(loss < 99 for _, loss in rows)
    assert (tmp_path / "losses.png").exists()


@pytest.mark.parametrize("change", [{"rate": 2e-3}, {"batch": 5}, {"seed": 1}, {"average": 0.5}])
def test_other_numbers_are_refused(change, tmp_path):
    train(Classifier(training=SHORT), tmp_path, quiet=True, until=1)
    with pytest.raises(UsageError, match=f"{next(iter(change))} was .* another folder"):
        train(Classifier(training=replace(SHORT, **change)), tmp_path, quiet=True)


def test_a_run_can_be_lengthened_before_its_rate_falls(tmp_path):
    plan = replace(SHORT, steps=8)
    train(Classifier(training=plan), tmp_path / "short", quiet=True, until=4)
    longer = Classifier(training=replace(plan, steps=12))
    assert states_equal(train(longer, tmp_path / "short", quiet=True), train(longer, tmp_path / "long", quiet=True))
    train(Classifier(training=plan), tmp_path / "late", quiet=True, until=8)
    with pytest.raises(UsageError, match="had begun to fall"):
        train(longer, tmp_path / "late", quiet=True)
    with pytest.raises(UsageError, match="already taken"):
        train(Classifier(training=replace(plan, steps=6)), tmp_path / "late", quiet=True)


@given(steps=st.integers(1, 10_000), warmup=st.integers(0, 500), cooldown=st.floats(0.0, 1.0))
def test_the_rate_rises_stays_and_falls(steps, warmup, cooldown):
    plan = Training(steps=steps, batch=1, rate=3.0, warmup=warmup, cooldown=cooldown)
    rates = [plan.rate_at(step) for step in range(0, steps, max(1, steps // 50))]
    assert all(0 < rate <= 3.0 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_rate_at_its_corners():
    plan = Training(steps=100, batch=1, rate=1.0, warmup=9, cooldown=0.2)
    assert [plan.rate_at(step) for step in (0, 4, 9, 50, 79)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert plan.rate_at(99) == pytest.approx(1 / 21)


def test_training_learns(tmp_path):
    """Sixty steps take the classifier well below the loss of knowing nothing but the base rates."""
    recipe = Classifier(training=Training(steps=60, batch=32, rate=3e-3, warmup=10))
    train(recipe, tmp_path, quiet=True)
    losses = [loss for _, loss in read_losses(tmp_path)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


# Data ----------------------------------------------------------------------------------------------------------------


def test_data_depend_on_seed_and_place_alone():
    one, same, parts = draw_pictures(3, 10, 6), draw_pictures(3, 10, 6), [draw_pictures(3, 10, 2), draw_pictures(3, 12, 4)]
    assert torch.equal(one.pixels, same.pixels)
    assert torch.equal(one.pixels, torch.cat([part.pixels for part in parts]))
    assert one.captions == parts[0].captions + parts[1].captions
    assert not torch.equal(one.pixels, draw_pictures(4, 10, 6).pixels)
    assert one.pixels.shape == (6, 3, 64, 64)
    assert one.pixels.is_contiguous(memory_format=torch.channels_last)
    assert one.pixels.amin() >= -1
    assert one.pixels.amax() <= 1


def test_labels_say_what_was_drawn():
    pictures = draw_pictures(5, 0, 20)
    things, count = labels(pictures.scenes)
    for row, scene in enumerate(pictures.scenes):
        assert things[row].sum() == len({(thing.color, thing.shape) for thing in scene.things})
        assert count[row] == len(scene.things) - 1


def test_near_misses_belong_to_their_own_pictures_alone():
    recipe = Contrast("contrast", training=replace(SHORT, batch=60))
    for caption in (prompt.text for kind in KINDS for prompt in every_prompt(kind)[:6] if prompt.kind != "single_object"):
        prompt = read(caption).prompt
        text, scene = recipe._miss(prompt, generator(7))
        assert read(text).prompt.judge(scene.things).satisfied
        assert not prompt.judge(scene.things).satisfied
        assert not holds_held_out([(thing.color, thing.shape) for thing in scene.things])
    captions, scenes, pixels = recipe.pairs(0)
    again = recipe.pairs(0)
    assert captions == again[0]
    assert torch.equal(pixels, again[2])
    assert len(captions) == len(scenes) == len(pixels) == 60
    assert all(read(caption).prompt.judge(scene.things).satisfied for caption, scene in zip(captions, scenes, strict=True))
    assert captions[:30] == list(draw_pictures(SHORT.seed, 0, 30).captions)


# Heads ---------------------------------------------------------------------------------------------------------------


def test_heads_are_asked_only_what_can_be_told():
    """A caption tells places by its relation and colours by naming all; a picture tells both, but not which of two circles."""
    rng = generator(11)
    prompts = [read(text).prompt for text in ("a red star left of a blue circle", "a star left of a circle", "a red star and a blue circle", "two circles")]
    scenes = [draw_scene(prompt, rng, held_out=True) for prompt in prompts]
    values, known = places(scenes, prompts)
    assert known.sum(dim=1).tolist() == [4, 4, 0, 0]
    star, circle = SHAPES.index("star"), SHAPES.index("circle")
    assert all(row[2 * star] < row[2 * circle] for row in values[:2])
    assert things(scenes, prompts)[1][:, 0].tolist() == [1, 0, 1, 0]
    seen, visible = places(scenes, [None] * 4)
    assert visible.sum(dim=1).tolist() == [4, 4, 4, 0]
    assert torch.equal(seen[:2], values[:2])
    present, all_known = things(scenes, [None] * 4)
    assert bool(all_known.all())
    assert torch.equal(present, labels(scenes)[0])
    assert places_loss(values, (values, known)) == 0
    assert places_loss(values + known, (values, known)) == 1  # one off in each that can be told, whatever their number
    assert things_loss(torch.zeros_like(present), (present, all_known)).item() == pytest.approx(len(COLORS) * math.log(2))


def test_a_second_run_begins_with_the_weights_of_the_first(autoencoder, tmp_path):
    first = Denoiser("tiny", (8, 16, 16), autoencoder, SHORT)
    trained = train(first, tmp_path / "first", quiet=True)
    second = replace(first, name="second", layout=0.5, cover=0.5, weights={"color_position": 1.0}, first=tmp_path / "first")
    begun = second.build().state_dict()
    assert all(torch.equal(begun[name], value) for name, value in trained.state_dict().items())
    assert {name.partition(".")[0] for name in begun} == {"unet", "text_encoder", "places", "things", "maps"}
    whole = train(second, tmp_path / "whole", quiet=True)
    train(second, tmp_path / "parts", quiet=True, every=1, until=2)
    assert states_equal(whole, train(second, tmp_path / "parts", quiet=True))
    with pytest.raises(UsageError, match="train nothing first"):
        replace(second, first=tmp_path / "nothing").build()
    wider = replace(second, channels=(8, 16, 24)).build()
    assert all(torch.equal(value, begun[f"text_encoder.{name}"]) for name, value in wider["text_encoder"].state_dict().items())


def test_a_second_clip_begins_with_the_towers_of_the_first(tmp_path):
    trained = train(Contrast("first", SHORT), tmp_path / "first", quiet=True)
    second = Contrast("second", SHORT, swaps=4.0, layout=0.5, first=tmp_path / "first")
    begun = second.build().state_dict()
    assert all(torch.equal(begun[name], value) for name, value in trained.state_dict().items())
    assert {name for name in begun if name not in trained.state_dict()} == {f"heads.{tower} {what}.{part}" for tower in ("image", "text") for what in ("things", "places") for part in ("weight", "bias")}
    train(second, tmp_path / "second", quiet=True)
    assert len(read_losses(tmp_path / "second")) == SHORT.steps


def test_maps_cover_what_the_renderer_draws():
    """A cell whose centre is in a thing is not background in the picture, and the thing's own maps say so and no others."""
    prompts = [read(text).prompt for text in ("a red star left of a blue circle", "three circles", "two red circles and a green square")]
    scenes = [draw_scene(prompt, generator(3), held_out=True) for prompt in prompts]
    maps = cover(scenes, 64)
    for scene, covered, picture in zip(scenes, maps, render_batch(scenes), strict=True):
        circles = [thing for thing in scene.things if thing.shape == "circle"]
        assert covered[SHAPES.index("circle")].sum() == pytest.approx(sum(math.pi * thing.radius**2 for thing in circles), rel=0.1)
        inside = covered[SHAPES.index("circle")].bool().numpy()
        assert (abs(picture[inside] - scene.background).max(axis=-1) > 0.02).mean() > 0.97  # but for a rim
        assert torch.equal(covered[: len(SHAPES)].amax(0), covered[len(SHAPES) :].amax(0))  # with colours and without
        assert int(covered[len(SHAPES) :].amax((1, 2)).sum()) == len({thing.item for thing in scene.things})
    assert cover(scenes, 16).shape == (3, COVERED, 16, 16)
    grid = (torch.arange(64) + 0.5) / 32 - 1
    known = torch.stack((grid.expand(64, 64), grid[:, None].expand(64, 64))).expand(3, 2, 64, 64)  # x along a row, y down a column
    assert map_loss(torch.cat((200 * maps - 100, known), 1), scenes).item() == 0
    assert map_loss(torch.cat((torch.zeros_like(maps), known), 1), scenes).item() == pytest.approx(COVERED * math.log(2))
    assert map_loss(torch.cat((200 * maps - 100, known + 1), 1), scenes).item() == pytest.approx(1)
    rare = map_head(7)(torch.randn(3, 7, 16, 16))
    assert map_loss(rare, scenes) < 0.05 * COVERED * math.log(2) + 1  # a head begins with nothing being anywhere


# Text ----------------------------------------------------------------------------------------------------------------


def test_every_word_of_the_grammar_is_one_token(tmp_path):
    words = tokenizer()
    words.save_pretrained(tmp_path)
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    numbers = vocabulary()
    assert sorted(numbers.values()) == list(range(len(numbers)))
    for word in VOCABULARY:
        start, number, end = loaded(word).input_ids
        assert (start, end) == (0, 1)
        assert number == numbers[f"{word}</w>"] < known_tokens()


def test_no_prompt_is_too_long():
    words = tokenizer()
    for kind in KINDS:
        for prompt in every_prompt(kind)[:200]:
            assert all(len(words(text).input_ids) <= LENGTH for text in prompt.phrasings)


def test_fragments_of_unknown_words_mean_nothing(autoencoder):
    model = Denoiser("tiny", (8, 16, 16), autoencoder, SHORT).build()
    embedding = model["text_encoder"].get_input_embeddings().weight
    assert embedding[known_tokens() :].abs().max() == 0
    assert embedding[: known_tokens()].abs().amax(dim=1).min() > 0


# The denoiser's loss -------------------------------------------------------------------------------------------------


def test_the_denoiser_learns_the_velocity_of_diffusers(autoencoder):
    """What the UNet is shown, and what it should say, are the scheduler's own `add_noise` and `get_velocity`."""
    from diffusers import AutoencoderKL, DDIMScheduler

    recipe = Denoiser("tiny", (8, 16, 16), autoencoder, replace(SHORT, batch=8))
    seen = {}

    class Unet(torch.nn.Module):
        def forward(self, noisy, timesteps, embeddings):
            seen.update(noisy=noisy, timesteps=timesteps)
            return SimpleNamespace(sample=torch.zeros_like(noisy))

    model = {"unet": Unet(), "text_encoder": lambda tokens: SimpleNamespace(last_hidden_state=tokens)}
    loss = recipe.loss(model, 5, torch.Generator().manual_seed(0))
    vae = AutoencoderKL.from_pretrained(autoencoder).eval()
    with torch.inference_mode():
        latents = vae.encode(draw_pictures(SHORT.seed, 40, 8).pixels).latent_dist.mean * vae.config.scaling_factor
    assert latents.std() == pytest.approx(1.0, abs=0.1)
    scheduler = DDIMScheduler(**SCHEDULER)
    alpha_bar = scheduler.alphas_cumprod[seen["timesteps"]][:, None, None, None]
    epsilon = (seen["noisy"] - alpha_bar.sqrt() * latents) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(scheduler.add_noise(latents, epsilon, seen["timesteps"]), seen["noisy"])
    expected = scheduler.get_velocity(latents, epsilon, seen["timesteps"]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_noise_levels_are_stratified(autoencoder):
    recipe = Denoiser("tiny", (8, 16, 16), autoencoder, SHORT)
    alpha, sigma, timesteps = recipe._noise_levels(50, torch.Generator().manual_seed(1))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    edges = (1000 * (torch.arange(51) / 50) ** 0.7).long()
    for number, timestep in enumerate(timesteps.sort().values):
        assert edges[number] <= timestep <= min(edges[number + 1], 999)
    assert timesteps.tolist() != timesteps.sort().values.tolist()


def test_some_pictures_are_shown_early(autoencoder):
    recipe = Denoiser("tiny", (8, 16, 16), autoencoder, SHORT, early=0.75)
    _, _, timesteps = recipe._noise_levels(400, torch.Generator().manual_seed(0))
    assert ((timesteps[:300] >= 850) & (timesteps[:300] <= 999)).all()
    assert timesteps[300:].min() < 100
    assert timesteps[:300].unique().numel() > 85


def test_some_captions_are_dropped_and_become_the_empty_prompt(autoencoder):
    recipe = Denoiser("tiny", (8, 16, 16), autoencoder, replace(SHORT, batch=64))
    seen = []
    model = {
        "unet": lambda noisy, timesteps, embeddings: SimpleNamespace(sample=noisy),
        "text_encoder": lambda tokens: seen.append(tokens) or SimpleNamespace(last_hidden_state=tokens),
    }
    for step in range(10):
        recipe.loss(model, step, torch.Generator().manual_seed(step))
    tokens = torch.cat(seen)
    empty = tokenizer()("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids[0]
    share = (tokens == empty).all(dim=1).float().mean().item()
    assert share == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / 640) ** 0.5)


# Exports -------------------------------------------------------------------------------------------------------------


def test_an_exported_denoiser_is_an_ordinary_pipeline(autoencoder, tmp_path):
    """The adapter of Stable Diffusion loads it, and its weights are what training left, rounded to float16."""
    from tsdiff.diffusion.loading import load_model

    recipe = Denoiser("tiny", (8, 16, 16), autoencoder, SHORT)
    model = train(recipe, tmp_path, quiet=True, until=1)
    recipe.export(model, tmp_path / "model")
    trained = {name: value.clone() for name, value in model["unet"].state_dict().items()}
    loaded = load_model(str(tmp_path / "model"), device="cpu", dtype="float32")
    for name, value in loaded.pipeline.unet.state_dict().items():
        assert torch.equal(value, trained[name].half().float())
    assert loaded.size(None, None) == (64, 64)
    assert loaded.latent_shape(None) == (4, 16, 16)


def test_an_exported_clip_is_loaded_by_open_clip(tmp_path):
    import open_clip

    recipe = Contrast("contrast", training=SHORT)
    torch.manual_seed(0)
    model = recipe.build().eval()
    recipe.export(model, tmp_path)
    loaded, _, _preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    texts = ["a red star", "three circles"]
    assert torch.equal(words(texts), recipe._tokens(texts))
    _, _, pixels = recipe.pairs(0)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval().encode_image(pixels), model.encode_image(pixels), rtol=0, atol=2e-2)
        torch.testing.assert_close(loaded.encode_text(words(texts)), model.encode_text(recipe._tokens(texts)), rtol=0, atol=2e-2)


# The command ---------------------------------------------------------------------------------------------------------


def test_wrong_commands_say_what_is_allowed(tmp_path):
    unknown = CliRunner().invoke(main, ["shape", "--runs", str(tmp_path)])
    assert unknown.exit_code == 2
    assert "autoencoder, shapes-first, shapes-second, shapes-third, shapes, shapes-small, shapes-clip-first, shapes-clip-second, shapes-clip, shapes-features" in unknown.output
    early = CliRunner().invoke(main, ["shapes-first", "--runs", str(tmp_path), "--until", "1", "--threads", "1"])
    assert early.exit_code == 1
    assert "train `autoencoder` first" in early.output
