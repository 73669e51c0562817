"""TitanMAC: shapes, loss, initialisation, sparse layers, state, compilation."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from cms_topology import CMSBlockLinear
from titanmac_integration import TitanMAC, TitanMACConfig, TitanMLP, create_titanmac_model

Make = Callable[..., TitanMACConfig]


def test_parameter_count_of_titanmac_163m() -> None:
    """81.92M embedding, 16 layers of 4.92M; learned positions would add the missing 2.6M."""
    config = TitanMACConfig.preset("titanmac-163m")
    dense = create_titanmac_model(config, device="meta")
    layer = 4 * 640 * 640 + 2 * 640 * 2560 + (3 * 640 + 640 + 2560 + 640) + 2 * 640
    assert dense.num_parameters == 128_000 * 640 + 16 * layer + 16 * 640 + 640
    assert dense.num_parameters == pytest.approx(163.4e6, rel=0.02)
    assert all(parameter.is_meta for parameter in dense.parameters())
    sparse = create_titanmac_model(config.replace(use_block_sparse=True), device="meta")
    assert dense.num_parameters - sparse.num_parameters == 5 * 640 * 2560
    assert len(sparse.block_sparse_layers) == 10


def test_parameter_counts_of_the_other_presets() -> None:
    """titanmac-237m is 237 million to within 1%; small is a language model of over 10 million."""
    large = create_titanmac_model(TitanMACConfig.preset("titanmac-237m"), device="meta")
    assert large.num_parameters == pytest.approx(237e6, rel=0.01)
    assert large.config.n_layers == 16
    assert all(size % 128 == 0 for size in (large.config.d_model, large.config.d_ff))
    small = create_titanmac_model(TitanMACConfig.preset("small"), device="meta")
    assert small.num_parameters == 14_135_112
    assert small.config.use_neural_memory
    demo = create_titanmac_model(TitanMACConfig.preset("demo"), device="meta")
    assert demo.num_parameters == 174_432


@pytest.mark.parametrize("components", [("mlp",), ("attention",), ("mlp", "attention")])
def test_only_the_chosen_layers_are_sparse(tiny_config: Make, components: tuple[str, ...]) -> None:
    config = tiny_config(
        n_layers=3,
        use_block_sparse=True,
        block_sparse_layers=(0, 2),
        block_sparse_density={0: 0.25, 2: 0.75},
        block_sparse_components=components,
    )
    model = create_titanmac_model(config)
    names = {"mlp": ("mlp.fc1", "mlp.fc2"), "attention": ("attention.qkv", "attention.out")}
    expected = {f"blocks.{i}.{name}": i for i in (0, 2) for c in components for name in names[c]}
    assert set(model.block_sparse_layers) == set(expected)
    for name, layer in model.block_sparse_layers.items():
        assert isinstance(layer, CMSBlockLinear)
        assert layer is model.get_submodule(name)
        assert layer.density == {0: 0.25, 2: 0.75}[expected[name]]
        assert layer.B == 8
        assert layer.row_group == 1
        assert layer.scorer.config.candidate_score == "gradient"
    assert isinstance(model.blocks[1].mlp, TitanMLP)
    assert isinstance(model.blocks[1].mlp.fc1, nn.Linear)


def test_a_dense_model_has_no_sparse_layers(tiny_config: Make) -> None:
    assert create_titanmac_model(tiny_config()).block_sparse_layers == {}


@pytest.mark.parametrize("tie", [True, False])
def test_loss_is_the_shifted_cross_entropy(tiny_config: Make, tie: bool) -> None:
    model = create_titanmac_model(tiny_config(tie_weights=tie))
    tokens = torch.randint(256, (3, 11))
    labels = tokens.clone()
    labels[:, :4] = -100
    output = model(tokens, labels)
    assert output["logits"].shape == (3, 11, 256)
    expected = functional.cross_entropy(
        output["logits"][:, 3:-1].reshape(-1, 256), tokens[:, 4:].reshape(-1)
    )
    torch.testing.assert_close(output["loss"], expected)
    assert set(model(tokens)) == {"logits"}
    output["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tying_shares_the_embedding(tiny_config: Make) -> None:
    tied = create_titanmac_model(tiny_config())
    free = create_titanmac_model(tiny_config(tie_weights=False))
    assert free.num_parameters - tied.num_parameters == 256 * 32
    assert not any(name.startswith("head") for name in tied.state_dict())


def test_same_seed_same_model(tiny_config: Make) -> None:
    config = tiny_config(use_block_sparse=True)
    state = torch.random.get_rng_state()
    one, two, other = (create_titanmac_model(config, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state()), "global randomness was touched"
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    columns = "blocks.0.mlp.fc2.col_indices"
    assert not torch.equal(one[columns], other[columns])


def test_positions_matter_and_only_relatively(tiny_config: Make) -> None:
    """Rotary: without persistent tokens, a shifted window has the same logits."""
    model = create_titanmac_model(tiny_config(n_persistent=0, window_size=4, n_layers=1)).eval()
    tokens = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, shifted = model(tokens)["logits"], model(tokens[:, 5:])["logits"]
        torch.testing.assert_close(whole[:, 8:], shifted[:, 3:])
        swapped = tokens[:, [0, 2, 1, *range(3, 16)]]
        assert not torch.allclose(model(swapped)["logits"][:, 3], whole[:, 3])


def test_persistent_tokens_are_seen_from_everywhere(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(window_size=2)).eval()
    tokens = torch.randint(256, (1, 40))
    with torch.no_grad():
        before = model(tokens)["logits"]
        model.persistent.add_(1.0)
        assert ((model(tokens)["logits"] - before).abs().amax(-1) > 1e-5).all()


def test_empty_batch_and_single_token(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    assert model(torch.zeros(0, 5, dtype=torch.long))["logits"].shape == (0, 5, 256)
    assert model(torch.zeros(2, 1, dtype=torch.int32))["logits"].shape == (2, 1, 256)


def test_bad_input_is_explained(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    long = torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match=r"65 tokens\) must not be longer than max_seq_len \(=64"):
        model(long)
    for wrong in (
        torch.zeros(5, dtype=torch.long),
        torch.zeros(1, 5),
        torch.zeros(1, 5, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"must be an int64 or int32 tensor \[batch, sequenc"):
            model(wrong)
    with pytest.raises(ValueError, match=r"input_ids \(contains 256\) must be in \[0, vocab_size"):
        model(torch.tensor([[1, 256]]))
    with pytest.raises(ValueError, match=r"input_ids \(contains -100\)"):
        model(torch.tensor([[1, -100]]))
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels \(contains 300\)"):
        model(tokens, torch.full_like(tokens, 300))
    with pytest.raises(ValueError, match=r"labels \(shape \(1, 4\), torch.int64\) must be int64"):
        model(tokens, tokens[:, 1:])


def test_dropout_acts_in_training_only(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(dropout=0.5))
    tokens = torch.randint(256, (1, 8))
    assert not torch.equal(model(tokens)["logits"], model(tokens)["logits"])
    model.eval()
    assert torch.equal(model(tokens)["logits"], model(tokens)["logits"])


def test_state_dict_loads_strictly_into_another_topology(tiny_config: Make) -> None:
    config = tiny_config(use_block_sparse=True)
    one, two = (create_titanmac_model(config, seed=s).eval() for s in (0, 1))
    tokens = torch.randint(256, (2, 9))
    assert not torch.equal(one(tokens)["logits"], two(tokens)["logits"])
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(tokens)["logits"], two(tokens)["logits"])
    assert torch.equal(copy.deepcopy(one)(tokens)["logits"], one(tokens)["logits"])


def test_compiles_without_graph_breaks(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    tokens = torch.randint(256, (2, 12))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, got = model(tokens, tokens), compiled(tokens, tokens)
    torch.testing.assert_close(got["logits"], expected["logits"])
    got["loss"].backward()
    assert model.blocks[0].mlp.fc1.values.grad is not None


# compiling, torch looks at .grad of tensors that are no leaves; it hides the warning, not an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_in_pieces_it_computes_the_same(tiny_config: Make) -> None:
    """Block by block, and as a whole whose loss without logits is left to run by itself."""
    config = tiny_config(use_block_sparse=True)
    tokens = torch.randint(256, (2, 12))
    by_block, whole, plain = (create_titanmac_model(config) for _ in range(3))
    for block in by_block.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    by_block(tokens, tokens)["loss"].backward()
    compiled = torch.compile(whole, backend="aot_eager")
    compiled(tokens, tokens, return_logits=False)["loss"].backward()
    plain(tokens, tokens)["loss"].backward()
    for name, parameter in plain.named_parameters():
        for model in (by_block, whole):
            got = model.get_parameter(name).grad
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)


def test_autocast_and_double(tiny_config: Make) -> None:
    config = tiny_config(use_block_sparse=True)
    tokens = torch.randint(256, (2, 12))
    model = create_titanmac_model(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, tokens)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens, tokens)["loss"], rtol=0.02, atol=0.02)
    double = create_titanmac_model(config, dtype=torch.float64)
    assert double(tokens)["logits"].dtype == torch.float64


def test_without_generator_torch_seeds(tiny_config: Make) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(TitanMAC(tiny_config()).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
