"""Presets: published sizes, initialisation from the seed, cost per token."""

import pytest
import torch

from simreg.recipe import models
from simreg.recipe.config import from_dict
from simreg.recipe.errors import UserError

# Millions at vocabulary 32,000: GaLore's and LLaMA's models, Mixtral 8x7B v0.1 (46.7B and 12.9B).
PUBLISHED = {
    "llama-60m": (58.07, 58.07),
    "llama-130m": (134.11, 134.11),
    "llama-350m": (367.97, 367.97),
    "llama-1b": (1339.08, 1339.08),
    "llama-7b": (6738.42, 6738.42),
    "mixtral-8x7b": (46702.79, 12879.93),
}


def sized(preset: str, **kwargs: object) -> tuple[int, int]:
    config = models.model_config(preset, vocab_size=32_000, seq_len=256, **kwargs)  # type: ignore[arg-type]
    return models.count_parameters(config)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_sizes(preset: str) -> None:
    total, active = sized(preset)
    assert (round(total / 1e6, 2), round(active / 1e6, 2)) == PUBLISHED[preset]


@pytest.mark.parametrize("size", ["tiny", "60m", "130m"])
def test_mixtral_is_the_llama_with_eight_experts_of_which_two_work(size: str) -> None:
    shape = models.PRESETS[f"llama-{size}"]
    llama, _ = sized(f"llama-{size}")
    total, active = sized("mixtral-tiny" if size == "tiny" else f"mixtral-8x{size}")
    mlp = 3 * shape.hidden * shape.intermediate * shape.layers
    router = 8 * shape.hidden * shape.layers
    assert total == llama + 7 * mlp + router
    assert active == llama + mlp + router


def test_tying_saves_one_embedding() -> None:
    untied, _ = sized("llama-tiny")
    assert untied - sized("llama-tiny", tie_embeddings=True)[0] == 32_000 * 128


def test_counting_allocates_nothing_and_matches_the_real_model() -> None:
    config = from_dict({"model": {"preset": "mixtral-tiny"}})
    model = models.build(config, tokenizer_size=300, eos_token_id=0)
    total, _ = models.count_parameters(model.config)
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", ["llama-tiny", "mixtral-tiny"])
def test_weights_follow_from_the_seed_alone(preset: str) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        config = from_dict({"model": {"preset": preset}, "train": {"seed": seed}})
        model = models.build(config, tokenizer_size=300, eos_token_id=0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return [p.detach() for p in model.parameters() if p.dim() > 1]

    first = weights(1)
    torch.manual_seed(5)
    torch.rand(7)
    state = torch.get_rng_state()
    again = weights(1)
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's generator is left alone
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, weights(2), strict=True))


def test_flops_per_token_by_hand() -> None:
    d, ff, layers, vocab, length = 128, 344, 4, 1000, 64
    matrices = layers * (4 * d * d + 3 * d * ff) + vocab * d
    norms = (2 * layers + 1) * d
    expected = 6 * (matrices + norms) + 12 * layers * d * length
    for tie in (False, True):  # tied or not, the head multiplies once and the lookup never
        config = models.model_config(
            "llama-tiny", vocab_size=vocab, seq_len=length, tie_embeddings=tie
        )
        active = models.count_parameters(config)[1]
        assert models.flops_per_token(config, active, length) == expected


@pytest.mark.parametrize(("preset", "theta"), [("llama-7b", 1e4), ("mixtral-8x7b", 1e6)])
def test_the_published_angles_of_positions(preset: str, theta: float) -> None:
    config = models.model_config(preset, vocab_size=300, seq_len=16)
    assert config.rope_parameters["rope_theta"] == theta


def test_positions_reach_the_row_length() -> None:
    long = models.model_config("llama-tiny", vocab_size=300, seq_len=5000)
    assert long.max_position_embeddings == 5000


def test_router_logits_are_on_and_experts_are_grouped() -> None:
    config = from_dict({"model": {"preset": "mixtral-tiny"}})
    model = models.build(config, tokenizer_size=300, eos_token_id=0)
    assert model.config.output_router_logits
    assert model.config._experts_implementation == "grouped_mm"  # batched_mm needs gigabytes


def test_vocabulary_can_be_padded_but_not_too_small() -> None:
    config = from_dict({"model": {"vocab_size": 320}})
    model = models.build(config, tokenizer_size=300, eos_token_id=0)
    assert model.get_input_embeddings().weight.shape == (320, 128)
    with pytest.raises(UserError, match=r"tokenizer has 321 tokens but model\.vocab_size is 320"):
        models.build(config, tokenizer_size=321, eos_token_id=0)


def test_embedding_std_scales_the_input_embedding_alone() -> None:
    def built(**model: object) -> dict[str, torch.Tensor]:
        config = from_dict({"model": model})
        return dict(models.build(config, tokenizer_size=300, eos_token_id=0).named_parameters())

    plain, scaled = built(), built(embedding_std=0.5)
    embedding = scaled.pop("model.embed_tokens.weight")
    torch.testing.assert_close(embedding, plain.pop("model.embed_tokens.weight") * 25)
    assert embedding.std().item() == pytest.approx(0.5, rel=0.02)
    assert all(torch.equal(scaled[name], value) for name, value in plain.items())


def test_embedding_std_of_tied_embeddings_is_refused() -> None:
    with pytest.raises(UserError, match=r"embedding_std would change the LM head"):
        from_dict({"model": {"embedding_std": 1.0, "tie_embeddings": True}})


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(UserError, match=r"no preset 'gpt-5'.*llama-tiny.*mixtral-8x7b"):
        models.model_config("gpt-5", vocab_size=10, seq_len=10)


def test_another_width_and_depth_keep_the_proportions() -> None:
    built = models.of_run(
        from_dict({"model": {"preset": "llama-60m", "hidden_size": 256, "layers": 3}}),
        vocab_size=100,
    )
    assert (built.hidden_size, built.intermediate_size, built.num_hidden_layers) == (256, 688, 3)
    assert built.num_attention_heads == built.num_key_value_heads == 4
    plain, same = (
        models.of_run(from_dict({"model": {"preset": "llama-60m", **shape}}), vocab_size=100)
        for shape in ({}, {"hidden_size": 512, "layers": 8})
    )
    assert plain.to_dict() == same.to_dict()
    grouped = models.of_run(
        from_dict({"model": {"preset": "mixtral-8x7b", "hidden_size": 1024}}), vocab_size=100
    )
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (8, 2)


@pytest.mark.parametrize(
    ("preset", "hidden"), [("llama-tiny", 100), ("mixtral-8x7b", 128), ("mixtral-8x7b", 1408)]
)
def test_a_width_that_heads_do_not_fit_is_named(preset: str, hidden: int) -> None:
    config = from_dict({"model": {"preset": preset, "hidden_size": hidden}})
    with pytest.raises(UserError, match=rf"model.hidden_size={hidden}: expected a multiple of"):
        models.of_run(config, vocab_size=100)


@pytest.mark.parametrize("preset", ["mixtral-tiny", "mixtral-8x7b"])
def test_the_router_loss_counts_as_published(preset: str) -> None:
    assert models.model_config(preset, vocab_size=64, seq_len=16).router_aux_loss_coef == 0.02
