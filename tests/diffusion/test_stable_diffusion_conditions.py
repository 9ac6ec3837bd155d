"""What Stable Diffusion is conditioned on, and that a caller's pipeline is left as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipeline_state import state_of
from tiny_sd import tiny_stable_diffusion

from tsdiff.diffusion.loading import load_model
from tsdiff.diffusion.pipelines import lora_scales_kept
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Guidance, StepState

TEXT = "encoder_hidden_states"


@pytest.fixture(scope="module")
def model(tiny_pipe: Any) -> Any:
    return load_model(tiny_pipe)


def test_rows_equal_the_pipelines_embeddings(tiny_pipe: Any, model: Any) -> None:
    prompts = ["a cat", "a dog"]
    encoded = model.encode([Condition(prompt, negative_prompt="bad") for prompt in prompts], guided=True)
    for prompt, one in zip(prompts, encoded, strict=True):
        positive, negative = tiny_pipe.encode_prompt(prompt, "cpu", 1, True, "bad")
        assert torch.equal(one.rows[0][TEXT], positive[0])
        assert torch.equal(one.rows[1][TEXT], negative[0])


def test_embeddings_of_another_length_are_another_bucket(model: Any) -> None:
    short = Condition(tensors={"prompt_embeds": torch.zeros(5, 32), "negative_prompt_embeds": torch.zeros(5, 32)})
    a, b = model.encode([Condition("a"), short], guided=True)
    assert a.bucket != b.bucket
    with pytest.raises(UsageError, match="must agree"):
        model.encode([Condition(tensors={"prompt_embeds": torch.zeros(5, 32)})], guided=True)


@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip_takes_an_earlier_layer(tiny_pipe: Any, model: Any, skip: int) -> None:
    (encoded,) = model.encode([Condition("a cat", extra={"clip_skip": skip})], guided=True)
    encoder = copy.deepcopy(tiny_pipe.text_encoder)
    ids = tiny_pipe.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = encoder(ids, output_hidden_states=True).hidden_states[-(skip + 1)]
    body = getattr(encoder, "text_model", encoder)
    torch.testing.assert_close(encoded.rows[0][TEXT], body.final_layer_norm(states)[0])
    (plain,) = model.encode([Condition("a cat")], guided=True)
    assert torch.equal(encoded.rows[0][TEXT], plain.rows[0][TEXT]) == (skip == 0)
    assert torch.equal(encoded.rows[1][TEXT], plain.rows[1][TEXT])


def test_a_prompt_that_just_fits_is_not_noted(tiny_pipe: Any) -> None:
    model = load_model(tiny_pipe)
    model.encode([Condition("a" * 75)], guided=True)
    assert model.notices == ()
    model.encode([Condition("a" * 76)], guided=True)
    assert len(model.notices) == 1


def test_attention_options_reach_the_network_and_split_buckets(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_pipe)
    options = [{"scale": 0.5}, {"scale": 0.5}, {"scale": 0.25}, None]
    conditions = [Condition("a", extra={} if option is None else {"cross_attention_kwargs": option}) for option in options]
    encoded = model.encode(conditions, guided=True)
    assert encoded[0].bucket == encoded[1].bucket
    assert len({one.bucket for one in encoded}) == 3
    seen = []
    forward = tiny_pipe.unet.forward
    monkeypatch.setattr(tiny_pipe.unet, "forward", lambda *args, **kwargs: seen.append(kwargs["cross_attention_kwargs"]) or forward(*args, **kwargs))
    for one in encoded:
        model.forward(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, 2.0]), one.rows)
    assert seen == options


class LoraLayer(torch.nn.Module):
    """Stands for a LoRA layer of peft: scales by adapter name."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling = {"style": 0.8}


def test_a_lora_scale_leaves_nothing_behind() -> None:
    pipe = SimpleNamespace(components={"unet": LoraLayer(), "tokenizer": object()})
    scaling = pipe.components["unet"].scaling

    def disturb() -> None:
        with lora_scales_kept(pipe):
            pipe._lora_scale = 0.0
            scaling["style"] = 1.0
            raise RuntimeError("the call failed")

    with pytest.raises(RuntimeError):
        disturb()
    assert not hasattr(pipe, "_lora_scale")
    assert pipe.components["unet"].scaling is scaling
    assert scaling == {"style": 0.8}
    pipe._lora_scale = 0.3
    with pytest.raises(RuntimeError):
        disturb()
    assert pipe._lora_scale == 0.3


def test_lora_scales_act_as_in_the_pipeline_and_are_put_back() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    pipe = tiny_stable_diffusion()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), "style")
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]), "style")
    pipe.set_adapters("style", 0.7)
    pipe.unet.eval()
    pipe.text_encoder.eval()
    layers = [layer for part in (pipe.unet, pipe.text_encoder) for layer in part.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    before = [dict(layer.scaling) for layer in layers]
    model = load_model(pipe)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    outputs = []
    scales = (0.0, 1.0, 0.5)  # 0 first: what it leaves behind would show in the others
    conditions = [Condition("a cat", extra={"cross_attention_kwargs": {"scale": scale}}) for scale in scales]
    for scale, encoded in zip(scales, model.encode(conditions, guided=False), strict=True):
        outputs.append(model.forward(latents, torch.tensor([5.0]), encoded.rows))
        assert [layer.scaling for layer in layers] == before
        assert not hasattr(pipe, "_lora_scale")
        embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=scale)
        expected = pipe.unet(latents, 5.0, encoder_hidden_states=embeds, cross_attention_kwargs={"scale": scale}).sample
        torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=1e-6)
        del pipe._lora_scale
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-5)


def with_ip_adapter(image_width: int = 24) -> Any:
    """A tiny pipeline with a random IP adapter: 4 image tokens, linear projection."""
    generator = torch.Generator().manual_seed(3)
    pipe = tiny_stable_diffusion()
    weights: dict[str, torch.Tensor] = {}
    number = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{key}.weight"] = torch.randn(attention.to_k.weight.shape, generator=generator)
            number += 2
    projection = {
        "proj.weight": torch.randn((4 * 32, image_width), generator=generator),
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    pipe.unet.eval()
    return pipe


def test_ip_adapters_are_conditioned_on_images() -> None:
    pipe = with_ip_adapter()
    model = load_model(pipe)
    with pytest.raises(UsageError, match="unload_ip_adapter"):
        model.check(Condition("a cat"))
    embeds = torch.randn((2, 1, 24), generator=torch.Generator().manual_seed(4))
    condition = Condition("a cat", negative_prompt="bad", extra={"ip_adapter_image_embeds": [embeds]})
    (encoded,) = model.encode([condition], guided=True)
    assert {key: tuple(tensor.shape) for key, tensor in encoded.rows[0].items()} == {TEXT: (77, 32), "image_embeds.0": (1, 24)}
    solver = model.solver("ddim")
    schedule = model.schedule(solver, 3, None)
    sampler = model.sampler(schedule, solver)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    state = StepState(noise)
    for level in range(3):
        cond, uncond = sampler.evaluate(torch.cat([state.latents] * 2), [level] * 2, encoded.rows).chunk(2)
        state = sampler.advance(state, 0, [level], [level + 1], sampler.guide(cond, uncond, [5.0], [0.0]), None)
    theirs = pipe(
        "a cat", negative_prompt="bad", ip_adapter_image_embeds=[embeds], latents=noise, num_inference_steps=3, guidance_scale=5.0,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(state.latents, theirs, rtol=0, atol=1e-4)
    assert model.encode([condition], guided=False)[0].rows[0]["image_embeds.0"].equal(embeds[1])
    with pytest.raises(UsageError, match="2 images are given for 1 IP adapters"):
        model.encode([Condition(extra={"ip_adapter_image_embeds": [embeds, embeds]})], guided=True)
    with pytest.raises(UsageError, match=r"needs shape \(2, images"):
        model.encode([Condition(extra={"ip_adapter_image_embeds": [embeds[:1]]})], guided=True)


def test_a_pipeline_object_is_never_changed(tiny_pipe: Any) -> None:
    before = state_of(tiny_pipe)
    model = load_model(tiny_pipe)
    extra = {"clip_skip": 1, "cross_attention_kwargs": {"scale": 0.5}}
    encoded = model.encode([Condition("a cat " * 30, negative_prompt="bad", extra=extra)], guided=True)
    for name in model.solvers:
        solver = model.solver(name)
        sampler = model.sampler(model.schedule(solver, 4, None), solver)
        latents = sampler.draw(torch.ones(2, 4, 8, 8))
        output = sampler.evaluate(latents, [0, 2], encoded[0].rows)
        sampler.advance(StepState(latents), 0, [0, 2], [1, 3], output, torch.zeros(1, 2, 4, 8, 8))
        assert not output.requires_grad
    pixels = model.decode(latents).pixels
    model.encode_images(pixels, torch.zeros(2, 4, 8, 8))
    assert model.fingerprint
    assert state_of(tiny_pipe) == before


def test_libraries_are_as_talkative_afterwards_as_before(tiny_pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    load_model(tiny_pipe).encode([Condition("long " * 100)], guided=True)
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before
    assert capfd.readouterr() == ("", "")


def test_float16_autoencoders_that_say_so_are_upcast_beside_the_original() -> None:
    for config, expected in (({"force_upcast": True}, torch.float32), ({"force_upcast": False}, torch.float16), ({}, torch.float16)):
        pipe = tiny_stable_diffusion(vae_config=config)
        reference = load_model(tiny_stable_diffusion(vae_config=config))
        pipe.vae.half()
        model = load_model(pipe)
        assert model._vae.dtype == expected
        assert pipe.vae.dtype == torch.float16
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.decode(latents).pixels, reference.decode(latents).pixels, rtol=0, atol=5e-3)


def test_fingerprints_name_weights_configs_and_adapters(tiny_pipe: Any, model: Any) -> None:
    assert load_model(tiny_stable_diffusion()).fingerprint == model.fingerprint
    seen = {model.fingerprint, load_model(tiny_stable_diffusion(seed=1)).fingerprint}
    seen.add(load_model(tiny_stable_diffusion(vae_config={"scaling_factor": 0.5})).fingerprint)
    nudged = tiny_stable_diffusion()
    with torch.no_grad():
        nudged.unet.conv_in.bias += 1e-3
    seen.add(load_model(nudged).fingerprint)
    nudged.unet.conv_in.register_module("lora", LoraLayer())
    nudged.unet.eval()
    seen.add(load_model(nudged).fingerprint)
    assert len(seen) == 5


def test_without_a_text_encoder_guidance_needs_negative_embeddings() -> None:
    model = load_model(tiny_stable_diffusion(text_encoder=None, tokenizer=None))
    embeds = {"prompt_embeds": torch.zeros(5, 32)}
    with pytest.raises(UsageError, match="guidance_scale=1"):
        model.encode([Condition(tensors=embeds)], guided=True)
    assert model.encode([Condition(tensors=embeds)], guided=False)[0].rows[0][TEXT].shape == (5, 32)
    assert not Guidance(1.0).on
