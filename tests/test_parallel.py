"""Several processes learn what one learns; recomputation and compilation change nothing; names stay."""

import re

import pytest
import torch
from decoder_cases import make_ours
from parallel_cases import CASES, Case, Sums, labelled_batch, mean_loss, spawn, train

from higgs import UserError
from higgs.train import parallel
from higgs.train.distributed import World
from higgs.train.parallel import ParallelConfig, autocast, make_mesh, parallelize

TWO = [name for name in CASES if name != "plain" and "hsdp" not in name]
FOUR = ["fsdp", "hsdp", "hsdp, full", "hsdp, rows"]


def alone(name: str) -> dict:
    """The same model, data and freezing in one process without any of it."""
    return train(Case(freeze=CASES[name].freeze, model=CASES[name].model), World())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return spawn(2, TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return spawn(4, FOUR, tmp_path_factory.mktemp("four"))


def check_same(ours: dict, theirs: dict) -> None:
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    for kind in ("gradients", "weights"):
        assert ours[kind].keys() == theirs[kind].keys()
        for name, tensor in theirs[kind].items():
            # Adam divides by the gradient's own size, so an entry of 1e-7 may go either way after a step.
            difference = (ours[kind][name] - tensor).abs().max().item()
            assert difference < (1e-6 if kind == "gradients" else 1e-4) * max(1.0, tensor.abs().max().item()), name


@pytest.mark.parametrize("name", [name for name in TWO if "bf16" not in name])
def test_two_processes_learn_what_one_learns(two: dict, name: str):
    check_same(two[name], alone(name))


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_learn_what_one_learns(four: dict, name: str):
    check_same(four[name], alone(name))


def test_bf16_is_close(two: dict):
    ours, theirs = two["fsdp, bf16"], alone("fsdp, bf16")
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-2)
    assert ours["losses"][0] != theirs["losses"][0]
    assert all(weight.dtype == torch.float32 for weight in ours["weights"].values()), "what is trained stays wide"
    cast = train(Case(precision="bf16"), World())
    assert cast["losses"] == pytest.approx(theirs["losses"], rel=1e-2) and cast["losses"] != theirs["losses"]


def test_the_first_rows_stay_to_the_last_bit(two: dict, four: dict):
    begun = {f"decoder.{name}": weight for name, weight in make_ours(use_text_head=True).state_dict().items()}
    for results in (two["fsdp, rows"], four["hsdp, rows"]):
        for table in ("decoder.model.embed_tokens.weight", "decoder.text_lm_head.weight"):
            ours = results["weights"][table]
            assert torch.equal(ours[:61], begun[table][:61])
            assert not torch.equal(ours[61:], begun[table][61:])
    backbone = two["fsdp, backbone"]["weights"]
    assert torch.equal(backbone["decoder.model.norm.weight"], begun["decoder.model.norm.weight"])


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_gives_the_same_bits(how: str):
    plain = train(Case(), World())
    ours = train(Case(ParallelConfig(activation_checkpointing=how)), World())
    assert ours["losses"] == plain["losses"]
    assert ours["weights"].keys() == plain["weights"].keys()
    for name, weight in plain["weights"].items():
        assert torch.equal(ours["weights"][name], weight), name


def test_recomputation_keeps_less():
    """Bytes that forward keeps for backward: full recomputation keeps a layer's input alone."""
    kept = {}
    for how in parallel.CHECKPOINTING:
        decoder = make_ours(use_text_head=True, num_hidden_layers=4).train()
        module = Sums(decoder)
        parallelize(module, decoder.model.layers, ParallelConfig(activation_checkpointing=how), "fp32", World())
        batch, sizes = labelled_batch(decoder), {}
        weights = {p.data_ptr() for p in decoder.parameters()}

        def keep(tensor: torch.Tensor, sizes=sizes, weights=weights) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = mean_loss(module(batch), batch)
        kept[how] = sum(sizes.values())
        loss.backward()
    assert kept["full"] < 0.7 * kept["none"]


def test_compiled_layers_learn_the_same(monkeypatch):
    """One compilation serves all layers, and sizes that change become symbols. (A backend without a C++ compiler.)"""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_as_it_is = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_as_it_is(function, backend=backend))
    torch.compiler.reset()
    plain = train(Case(), World())
    ours = train(Case(ParallelConfig(compile=True), accumulate=2), World(), steps=3)
    assert ours["losses"][:2] == pytest.approx(plain["losses"], rel=1e-5)
    assert 0 < len(graphs) <= 3
    assert all(not re.search("_orig_mod|_checkpoint", name) for name in ours["weights"])


def test_generation_takes_the_plain_path(monkeypatch):
    """Without gradients neither recomputation nor compilation runs: a cache that grows would compile anew each step."""
    model = make_ours()
    monkeypatch.setattr(torch, "compile", lambda function: pytest.fail)
    parallelize(
        model, model.model.layers, ParallelConfig(activation_checkpointing="full", compile=True), "fp32", World()
    )
    model.generate(input_ids=torch.tensor([[1, 2, 83]]), max_new_tokens=4)


def test_mistakes_are_told():
    for wrong in ({"strategy": "dp"}, {"activation_checkpointing": "some"}, {"replicate": 2}, {"replicate": 0}):
        with pytest.raises(UserError, match="parallel"):
            ParallelConfig(**wrong)
    with pytest.raises(UserError, match="fp32, bf16"):
        autocast("fp16", torch.device("cpu"))
    with pytest.raises(UserError, match="divisor"):
        make_mesh(ParallelConfig("fsdp", replicate=2), World(0, 3))
