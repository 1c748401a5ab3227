"""lora_linear and LoRALinear: against fp64, beside the same in PyTorch's operations; adapters that peft reads."""

import json

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare, run
from torch import nn

import fastllm
import fastllm.nn
from fastllm import reference
from fastllm.llm import lora
from fastllm.model import Config, Transformer
from fastllm.ops import lora as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, N, K, rank
SIZES = [(1, 1, 1, 1), (0, 3, 4, 2), (7, 65, 17, 3), (96, 17, 192, 8), (130, 129, 128, 16), (5, 7, 9, 12)]


def peer(x, weight, lora_a, lora_b, bias=None, scale=2.0):
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, lora_a), lora_b)


def ours(x, weight, lora_a, lora_b, bias=None):
    return fastllm.lora_linear(x, weight, lora_a, lora_b, bias, scale=2.0)


def truth(x, weight, lora_a, lora_b, bias=None):
    return reference.lora_linear(x, weight, lora_a, lora_b, bias, scale=2.0)


def tensors(M, N, K, rank, leading=None):
    return torch.randn(*(leading or (M,)), K), torch.randn(N, K), torch.randn(rank, K), torch.randn(N, rank)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_dtypes(size, dtype):
    dy = torch.randn(size[:2])
    compare(ours, peer, truth, [*tensors(*size), torch.randn(size[1])], [dy], dtype)
    compare(ours, peer, truth, tensors(*size), [dy], dtype)


@pytest.mark.parametrize("size", SIZES[2:5], ids=str)
def test_on_our_product(cpu_backend, size):
    compare(ours, peer, truth, [*tensors(*size), torch.randn(size[1])], [torch.randn(size[:2])], torch.float32)


def test_views_and_no_mutation():
    x, weight, a, b = tensors(0, 60, 50, 4, leading=(3, 40))
    dy = torch.randn(1, 60).expand(40, 3, 60)
    for given in (
        (x.transpose(0, 1), weight, a, b),
        (x.transpose(0, 1), weight.T.contiguous().T, a[:, ::1], b.T.contiguous().T),
        (x.transpose(0, 1), torch.randn(60, 100)[:, ::2], torch.randn(4, 100)[:, ::2], b),
    ):
        before = [t.clone() for t in (*given, dy)]
        compare(ours, peer, truth, given, [dy], torch.float32)
        assert all(torch.equal(t, kept) for t, kept in zip((*given, dy), before, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (2, 3), (0, 2, 3), (1,), (4,)], ids=str)
def test_only_the_gradients_that_are_wanted(wanted):
    given = [*tensors(30, 20, 10, 4), torch.randn(20)]
    leaves = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(given)]
    dy = torch.randn(30, 20)
    ours(*leaves).backward(dy)
    _, every = run(ours, given, [dy])
    for n, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (n not in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, every[n])


def test_nothing_is_saved_that_can_be_made_again():
    x, weight, a, b = tensors(64, 32, 48, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastllm.lora_linear(x, weight, a.requires_grad_(), b.requires_grad_(), dropout_p=0.5)
    pointers = {t.data_ptr() for t in (x, weight, a, b)}
    assert [(t.shape, t.dtype) for t in saved if t.data_ptr() not in pointers] == [(x.shape, torch.bool)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_that_of_its_mask(dtype, monkeypatch):
    """The reference with the mask that was drawn gives the same, forward and backward, and a share is dropped."""
    x, weight, a, b = tensors(200, 60, 100, 4)
    drawn = []
    apply = ops._LoRALinear.apply
    monkeypatch.setattr(ops._LoRALinear, "apply", lambda *given: drawn.append(given[5]) or apply(*given))

    def dropped(*given):
        torch.manual_seed(3)
        return fastllm.lora_linear(*given, scale=2.0, dropout_p=0.25)

    def same(*given):
        return reference.lora_linear(*given, None, drawn[-1], scale=2.0, dropout_p=0.25)

    compare(dropped, same, same, (x, weight, a, b), [torch.randn(200, 60)], dtype)
    assert abs(float(drawn[-1].float().mean()) - 0.75) < 0.02  # 6 standard deviations of 20,000 draws
    assert torch.equal(*(dropped(x, weight, a, b) for _ in range(2)))


def test_dropout_of_everything():
    def plain(x, weight, a, b):
        return F.linear(x, weight) + F.linear(F.linear(F.dropout(x, 1.0), a), b)

    def dropped(*given):
        return fastllm.lora_linear(*given, dropout_p=1.0)

    compare(dropped, plain, plain, tensors(6, 5, 7, 2), [torch.randn(6, 5)], torch.float32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    given = [t.double().requires_grad_() for t in (*tensors(5, 4, 3, 2), torch.randn(4))]

    def function(*given):
        torch.manual_seed(0)
        return fastllm.lora_linear(*given, scale=0.5, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_compiles_in_one_graph():
    given, dy = [*tensors(33, 20, 16, 4), torch.randn(20)], torch.randn(33, 20)
    compare(torch.compile(ours, fullgraph=True), peer, truth, given, [dy], torch.float32)


def test_autocast_chooses_the_dtype():
    given = [t.requires_grad_() for t in tensors(8, 6, 4, 2)]
    low = [t.detach().bfloat16().requires_grad_() for t in given]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(*given)
    assert y.dtype == torch.bfloat16 and torch.equal(y, ours(*low))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in given)


class TestModule:
    def test_starts_as_its_base_and_trains_the_update_alone(self):
        base = nn.Linear(6, 5)
        layer, x = fastllm.nn.LoRALinear(base, 2, alpha=8), torch.randn(3, 6)
        assert torch.equal(layer(x), base(x)) and layer.scale == 4.0
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        nn.init.normal_(layer.lora_B)
        compare(
            lambda x, a, b: fastllm.lora_linear(x, base.weight.to(x), a, b, base.bias.to(x), scale=4.0),
            lambda x, a, b: peer(x, base.weight.to(x), a, b, base.bias.to(x), scale=4.0),
            lambda x, a, b: reference.lora_linear(x, base.weight.to(x), a, b, base.bias.to(x), scale=4.0),
            [x, layer.lora_A.detach(), layer.lora_B.detach()],
            None,
            torch.float32,
        )
        assert torch.equal(
            layer(x), fastllm.lora_linear(x, base.weight, layer.lora_A, layer.lora_B, base.bias, scale=4.0)
        )

    def test_merge_and_unmerge(self):
        base, x = nn.Linear(6, 5), torch.randn(3, 6)
        layer = fastllm.nn.LoRALinear(base, 2)
        nn.init.normal_(layer.lora_B)
        kept, before = base.weight.detach().clone(), layer(x).detach()
        layer.merge()
        layer.merge()  # once and no more
        exact = reference.lora_linear(*(t.detach().double() for t in (x, kept, layer.lora_A, layer.lora_B, base.bias)))
        assert layer.merged and not torch.equal(base.weight, kept)
        assert_as_accurate(layer(x).half(), before.half(), exact)  # rounded elsewhere than unmerged, and no more
        layer.unmerge()
        assert torch.equal(base.weight, kept) and torch.equal(layer(x), before)

    def test_sixteen_bit_weights_train_in_fp32(self):
        layer = fastllm.nn.LoRALinear(nn.Linear(6, 5).bfloat16(), 2)
        assert layer.lora_A.dtype == torch.float32
        layer(torch.randn(3, 6).bfloat16()).sum().backward()
        assert layer.lora_B.grad.dtype == torch.float32 and layer.lora_B.grad.abs().sum() > 0

    def test_dropout_is_for_training(self):
        layer, x = fastllm.nn.LoRALinear(nn.Linear(6, 5), 2, dropout=0.5), torch.randn(30, 6)
        nn.init.normal_(layer.lora_B)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))

    def test_rank_zero_is_refused(self):
        with pytest.raises(ValueError, match="LoRALinear: rank must be at least 1, got 0"):
            fastllm.nn.LoRALinear(nn.Linear(6, 5), 0)


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2)).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()


def own():
    return Transformer(Config(vocab=61, d_model=16, heads=2, layers=2, d_ff=32, activation="swiglu")).eval()


FAMILIES = {"llama": (llama, ()), "gpt2": (gpt2, ()), "bert": (bert, ("classifier",)), "own": (own, ())}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param][0]()


def keep_of(model):
    return ("classifier",) if hasattr(model, "classifier") else ()


def randomised(model):
    """With updates, and a head, that are not what they start as."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])


def logits(model):
    found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


class TestAdapters:
    def test_all_of_attention_and_feed_forward_and_no_head(self, model):
        before = logits(model)
        names = lora.adapt(model, 4, keep=keep_of(model))
        per_layer = {"LlamaForCausalLM": 7, "GPT2LMHeadModel": 4, "Transformer": 7}.get(type(model).__name__, 6)
        assert len(names) == 2 * per_layer and not any("head" in name or "classifier" in name for name in names)
        assert torch.equal(logits(model), before)
        trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"} | ({"weight", "bias"} if keep_of(model) else set())

    def test_peft_reads_ours(self, model, tmp_path):
        peft = pytest.importorskip("peft")
        base = type(model)(model.config).eval()
        base.load_state_dict(model.state_dict())
        lora.adapt(model, 4, alpha=8, keep=keep_of(model))
        lora.save_adapter(
            tmp_path / "a",
            randomised(model),
            base="somewhere",
            task="classification" if keep_of(model) else "language-model",
        )
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
        got, peer = logits(model), logits(theirs)
        with torch.no_grad():
            exact = logits(model.double())
        assert_as_accurate(got.half(), peer.half(), exact)
        with theirs.disable_adapter():
            assert not torch.equal(logits(theirs), peer)

    def test_ours_reads_pefts(self, model, tmp_path):
        peft = pytest.importorskip("peft")
        base = type(model)(model.config).eval()
        base.load_state_dict(model.state_dict())
        names = sorted({name.rpartition(".")[2] for name in lora.projections(model) if "dense" not in name})
        options = dict(r=4, lora_alpha=6, use_rslora=True, modules_to_save=list(keep_of(model)) or None)
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **options)).eval()
        randomised(theirs).save_pretrained(tmp_path / "a")
        config = lora.load_adapter(tmp_path / "a", base)
        assert config["r"] == 4
        got, peer = logits(base), logits(theirs)
        with torch.no_grad():
            exact = logits(base.double())
        assert_as_accurate(got.half(), peer.half(), exact)

    def test_round_trip_merge_and_plain_names(self, model, tmp_path):
        base = type(model)(model.config).eval()
        base.load_state_dict(model.state_dict())
        names = list(model.state_dict())
        lora.adapt(model, 4, dropout=0.1, keep=keep_of(model))
        randomised(model)
        lora.save_adapter(tmp_path / "a", model)
        lora.load_adapter(tmp_path / "a", base)
        expected = logits(model)
        assert torch.equal(logits(base), expected)
        assert sorted(lora.plain_state(model)) == sorted(names)
        with lora.merged(model):
            inside = logits(model)
        assert torch.equal(logits(model), expected)
        assert list(lora.merge(model).state_dict()) == names and torch.equal(logits(model), inside)
        with torch.no_grad():
            exact = logits(base.double())
        assert_as_accurate(inside.half(), expected.half(), exact)

    def test_targets_choose(self):
        model = own()
        assert len(lora.adapt(model, 2, targets="query|value")) == 4
        with pytest.raises(TypeError, match="has an adapter already"):
            lora.adapt(model, 2)
        with pytest.raises(ValueError, match="no linear layer named like 'nothing'"):
            lora.adapt(own(), 2, targets="nothing")
        with pytest.raises(ValueError, match="no linear layer in a stack"):
            lora.adapt(nn.Linear(3, 3), 2)

    def test_under_accelerate(self, model):
        lora.adapt(model, 4, keep=keep_of(model))
        plain = logits(randomised(model))
        with fastllm.accelerated(model) as report:
            fast = logits(model)
        assert isinstance(model, Transformer) or report.rows
        exact = logits(model.double())
        assert_as_accurate(fast.detach().half(), plain.detach().half(), exact.detach())

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(peft_type="IA3"), "is an adapter of type IA3"),
            (dict(use_dora=True), "has use_dora=True, which is not supported"),
            (dict(bias="all"), "has bias='all'"),
        ],
    )
    def test_other_kinds_are_refused(self, tmp_path, change, message):
        model = own()
        lora.adapt(model, 2)
        lora.save_adapter(tmp_path / "a", model)
        path = tmp_path / "a" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            lora.load_adapter(tmp_path / "a", own())

    def test_damaged_and_foreign_adapters_are_one_line(self, tmp_path):
        with pytest.raises(ValueError, match="model has no adapter|has no adapter"):
            lora.save_adapter(tmp_path / "a", own())
        assert not (tmp_path / "a").exists()
        with pytest.raises(ValueError, match="holds no adapter that can be read"):
            lora.load_adapter(tmp_path, own())
        model = own()
        lora.adapt(model, 2)
        lora.save_adapter(tmp_path / "a", model)
        wider = Transformer(Config(vocab=61, d_model=32, heads=2, layers=2, d_ff=32, activation="swiglu"))
        with pytest.raises(ValueError, match="is not for this model: .* cannot take updates"):
            lora.load_adapter(tmp_path / "a", wider)
        with pytest.raises(ValueError, match="is not for this Transformer: it has no decoder.blocks.0.*gate"):
            lora.load_adapter(tmp_path / "a", Transformer(Config(vocab=61, d_model=16, heads=2, layers=2, d_ff=32)))
        path = tmp_path / "a" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="holds no adapter that can be read"):
            lora.load_adapter(tmp_path / "a", own())
