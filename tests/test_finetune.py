"""Fine-tuning: what every task reads and learns, what is frozen, and what a run leaves."""

import json

import pytest
import torch
from check import assert_as_accurate
from finetune_models import own, write

from fastllm.llm import evaluate, finetune
from fastllm.llm.checkpoint import load_model, save_model
from fastllm.llm.prompts import ChatTemplate
from fastllm.llm.tasks import TASKS
from fastllm.llm.tokens import Tokenizer

pytest_plugins = ["finetune_models"]
FAST = dict(lr=2e-2, epochs=4, batch=16)


class TestClassification:
    @pytest.mark.parametrize("options", [dict(), dict(lora=4), dict(freeze=1, layer_decay=0.8)], ids=str)
    @pytest.mark.parametrize("base", ["encoder", "bert"])
    def test_learns_and_leaves_a_model(self, request, reviews, tmp_path, base, options):
        base, out = request.getfixturevalue(base), tmp_path / "run"
        slower = dict(lr=5e-3, evaluations=1) if base.name == "bert" else {}
        result = finetune.run("classification", base, reviews, out, **FAST | slower | options)
        losses = result["history"]["loss"]
        assert sum(losses[-6:]) < sum(losses[:6])
        assert result["test"]["accuracy"] > 0.9 or base.name == "bert"  # which needs more than a few steps
        assert json.loads((out / "result.json").read_text())["test"] == json.loads(json.dumps(result["test"]))
        loaded = load_model(out, task="classification")
        assert loaded.meta["classes"] == ["bad", "good"] and not any("lora" in n for n in loaded.model.state_dict())
        again = evaluate.run(out, reviews, batch=16)["scores"]
        assert again["confusion"] == result["test"]["confusion"]
        if base.name != "bert" or "lora" not in options:  # whose products are PyTorch's while it has adapters
            assert again["loss"] == result["test"]["loss"]
        assert (out / "adapter" / "adapter_config.json").exists() == bool(options.get("lora"))
        total = sum(p.numel() for p in loaded.model.parameters())
        assert (result["trained"] < total) == bool(options)

    @pytest.mark.parametrize("base", ["encoder", "bert"])
    def test_an_adapter_has_its_head_and_names_its_classes(self, request, reviews, tmp_path, base):
        """Of a base without a head, and, of BERT, without a pooler, which is drawn anew and so learns as a whole."""
        base, out, data = request.getfixturevalue(base), tmp_path / "run", tmp_path / "three"
        if base.name == "bert":
            plain = load_model(base, accelerate=False)
            plain.model.pooler = None
            save_model(base, plain.model, plain.tokenizer)
        for split in ("train", "valid", "test"):
            head, *lines = (reviews / f"{split}.tsv").read_text().splitlines()
            lines = [f"{line} 3" if n % 3 else line for n, line in enumerate(lines)]
            write(data / f"{split}.tsv", head.split("\t"), [line.split("\t") for line in lines])
        finetune.run("classification", base, data, out, lora=2, epochs=1, lr=1e-2, max_len=64)
        whole, found = load_model(out), load_model(out / "adapter")
        assert found.meta["classes"] == ["bad", "bad 3", "good", "good 3"] and found.meta["max_len"] == 64
        assert found.meta["task"] == "classification" and "lora" not in found.meta
        state = whole.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
        scores = [evaluate.run(path, data, batch=16)["scores"] for path in (out, out / "adapter")]
        assert scores[0] == scores[1] and list(scores[0]["classes"]) == found.meta["classes"]
        assert {example["answer"] for example in scores[1]["examples"]} <= set(found.meta["classes"])
        with pytest.raises(ValueError, match="is an adapter for classification, one for language-model is needed"):
            load_model(out / "adapter", task="language-model")
        if base.name == "bert":
            peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
            plain = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=4)
            theirs = peft.PeftModel.from_pretrained(plain, out / "adapter").merge_and_unload().eval()
            ids = torch.tensor([[5, 6, 7, 8]])
            with torch.no_grad():
                got, peer = found.model(ids).logits, theirs(ids).logits
                truth = found.model.double()(ids).logits
            assert_as_accurate(got, peer, truth)

    @pytest.mark.parametrize("names", [None, ["low", "middle", "high"]], ids=["no names", "names of the base"])
    def test_an_adapter_of_pefts_own(self, bert, tmp_path, names):
        """Without our file beside it: the head says how many classes there are, the base what they are called."""
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        if names:
            config = json.loads((bert / "config.json").read_text())
            (bert / "config.json").write_text(json.dumps(config | dict(id2label=dict(enumerate(names)))))
        plain = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=3)
        options = dict(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
        theirs = peft.get_peft_model(plain, peft.LoraConfig(**options)).eval()
        theirs.peft_config["default"].base_model_name_or_path = str(bert)
        theirs.save_pretrained(tmp_path / "adapter")
        found = load_model(tmp_path / "adapter")
        assert finetune.task_for(found).classes == (names or ["LABEL_0", "LABEL_1", "LABEL_2"])
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            got, peer = found.model(ids).logits, theirs(ids).logits
            truth = theirs.double()(ids).logits
        assert_as_accurate(got, peer, truth)
        with pytest.raises(ValueError, match="is an adapter for classification, one for language-model is needed"):
            load_model(tmp_path / "adapter", task="language-model")
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
        with pytest.raises(ValueError, match="holds no adapter that can be read"):
            load_model(tmp_path / "adapter")

    def test_a_run_in_two_pieces_is_the_run_in_one(self, reviews, encoder, tmp_path, monkeypatch):
        options = FAST | dict(lora=4, lora_dropout=0.1, epochs=2)
        whole = finetune.run("classification", encoder, reviews, tmp_path / "whole", **options)
        kind, taken = TASKS["classification"], []
        loss = kind.loss

        def killed(self, model, batch):
            taken.append(1)
            if len(taken) == 8:
                raise MemoryError("killed")
            return loss(self, model, batch)

        monkeypatch.setattr(kind, "loss", killed)
        with pytest.raises(MemoryError):
            finetune.run("classification", encoder, reviews, tmp_path / "two", **options)
        with pytest.raises(ValueError, match="a LoRA run that has not ended"):
            load_model(tmp_path / "two")
        monkeypatch.setattr(kind, "loss", loss)
        for name in (".merged.killed_1", ".adapter.killed_1.replaced", ".result.json.killed_1"):  # kill -9 leaves these
            (tmp_path / "two" / name).mkdir()
        pieces = finetune.run("classification", encoder, reviews, tmp_path / "two", resume=True, **options)
        assert pieces["history"]["loss"] == whole["history"]["loss"] and pieces["test"] == whole["test"]
        names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("whole", "two")]
        assert names[0] == names[1]
        states = [load_model(tmp_path / run).model.state_dict() for run in ("whole", "two")]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_a_model_goes_on_with_its_head_and_other_classes_get_a_new_one(self, reviews, encoder, tmp_path):
        finetune.run("classification", encoder, reviews, tmp_path / "first", **FAST)
        head = load_model(tmp_path / "first").model.head.weight
        same = finetune.prepare(tmp_path / "first", "classification", dict(classes=["bad", "good"]))
        other = finetune.prepare(tmp_path / "first", "classification", dict(classes=["bad", "good", "so so"]))
        assert torch.equal(same.model.head.weight, head) and other.model.head.weight.shape == (3, 16)
        assert torch.equal(same.model.embedding.weight, other.model.embedding.weight)

    def test_what_is_frozen_stays(self, reviews, bert, tmp_path):
        finetune.run("classification", bert, reviews, tmp_path / "run", freeze=1, lr=1e-2, epochs=1)
        before, after = (load_model(f).model.state_dict() for f in (bert, tmp_path / "run"))
        changed = {n for n, value in before.items() if not torch.equal(value, after[f"bert.{n}"])}
        assert changed and all(n.startswith(("encoder.layer.1.", "pooler.")) for n in changed)


def test_depths_and_rates(bert):
    model = finetune.prepare(bert, "classification", dict(classes=["a", "b"])).model
    depth, top = finetune.depths(model)
    assert top == 3 and depth["bert.embeddings.LayerNorm.bias"] == 0 and depth["classifier.weight"] == 3
    assert depth["bert.encoder.layer.0.output.dense.weight"] == 1 and depth["bert.pooler.dense.bias"] == 3
    found = finetune.groups(model, 0.1, 0.5)
    rates = {id(p): group["lr_scale"] for group in found for p in group["params"]}
    assert all(rates[id(p)] == 0.5 ** (3 - depth[name]) for name, p in model.named_parameters())
    decays = {id(p): group["weight_decay"] for group in found for p in group["params"]}
    assert decays[id(model.classifier.weight)] == 0.1 and decays[id(model.classifier.bias)] == 0.0


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "On the log."},
]


class TestLanguage:
    def task(self, tokenizer, source=None, max_len=256):
        return TASKS["language-model"](tokenizer, max_len, dict(template=ChatTemplate(tokenizer, source)))

    def learnt(self, tokenizer, labels):
        """The pieces of text that count."""
        pieces, open_ = [], False
        for label in labels:
            if label != -100 and not open_:
                pieces.append([])
            open_ = label != -100
            if open_:
                pieces[-1].append(label)
        return [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]

    def test_prompts_are_masked(self):
        tokenizer = Tokenizer.bytes()
        ids, labels = self.task(tokenizer).conversation(CHAT)
        assert len(ids) == len(labels) and all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
        assert tokenizer.decode(ids).startswith("System: Be brief.\nUser: Where")
        assert self.learnt(tokenizer, labels) == [" On the mat.\n", " On the log.\n<eos>"]

    def test_the_template_of_the_tokenizer_is_taken(self):
        tokenizer = Tokenizer.bytes(special=("<|im_start|>", "<|im_end|>"))
        source = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        ids, labels = self.task(tokenizer, source).conversation(CHAT)
        assert ids[0] == tokenizer.id("<|im_start|>")
        assert self.learnt(tokenizer, labels) == ["On the mat.<|im_end|>\n", "On the log.<|im_end|>\n"]

    def test_an_answer_behind_the_limit_is_an_error(self):
        with pytest.raises(ValueError, match="begins behind max-len 20"):
            self.task(Tokenizer.bytes(), max_len=20).conversation(CHAT)
        with pytest.raises(ValueError, match="no turn of the assistant"):
            self.task(Tokenizer.bytes()).conversation(CHAT[:2])

    def test_conversations(self, decoder, tmp_path):
        for split in ("train", "valid", "test"):
            path = tmp_path / "chat" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(dict(messages=CHAT)) + "\n" for _ in range(8)))
        result = finetune.run("language", decoder, tmp_path / "chat", tmp_path / "run", lr=3e-2, epochs=20, batch=8)
        assert result["test"]["perplexity"] < 3 < 100 < result["history"]["loss"][0] ** 3
        made = finetune.task_for(load_model(tmp_path / "run"))
        batch = made.collate(made.encode(next(iter(made.rows(tmp_path / "chat" / "test.jsonl")))))
        model = load_model(tmp_path / "run", accelerate=False).model.double()
        exact = float(made.loss(model, batch).detach())
        assert abs(result["test"]["loss"] - exact) < 1e-5 * exact + 1e-5

    def test_prompts_with_responses_and_hugging_face(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        tokenizer = Tokenizer.bytes()
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
        sizes |= dict(num_key_value_heads=1, max_position_embeddings=96, sliding_window=16, initializer_range=0.2)
        config = transformers.Gemma3TextConfig(vocab_size=tokenizer.size, **sizes)
        save_model(tmp_path / "gemma", transformers.Gemma3ForCausalLM(config), tokenizer)
        for split in ("train", "valid", "test"):
            write(tmp_path / "pairs" / f"{split}.tsv", ("prompt", "response"), [("2 + 2", "4"), ("1 + 1", "2")] * 4)
        options = dict(lr=3e-2, epochs=15, batch=8, lora=4)
        result = finetune.run("language", tmp_path / "gemma", tmp_path / "pairs", tmp_path / "run", **options)
        assert result["test"]["loss"] < result["history"]["evaluations"][0]["loss"]
        assert evaluate.run(tmp_path / "run", tmp_path / "pairs")["scores"]["loss"] < result["history"]["loss"][0]
        # The adapter's folder is the model that it was trained on with the updates, which is what the run left.
        whole, made = (load_model(tmp_path / "run" / name) for name in ("best", "adapter"))
        states = whole.model.state_dict(), made.model.state_dict()
        assert states[0].keys() == states[1].keys() and made.meta["task"] == "language-model"
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        with pytest.raises(ValueError, match="adapter is a LoRA adapter, not a whole model"):
            finetune.run("language", tmp_path / "run" / "adapter", tmp_path / "pairs", tmp_path / "again")
        (tmp_path / "gemma").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="is a LoRA adapter for .*gemma, which is no folder here: start where"):
            load_model(tmp_path / "run" / "adapter")

    def test_plain_text_is_read_once(self, decoder, tmp_path):
        text = "the cat sat on the mat;\n\n\nthe dog lay on the log.\n" * 30
        path = tmp_path / "text" / "test.txt"
        path.parent.mkdir()
        path.write_text(text)
        made = finetune.task_for(load_model(decoder), 50)
        found = list(made.rows(path))
        ids = [i for n, row in enumerate(found) for i in row["tokens"][1 if n else 0 :]]
        assert made.tokenizer.decode(ids) == text
        assert sum(row["bytes"] for row in found) == len(text) and max(len(row["tokens"]) for row in found) == 51
        scores = evaluate.run(decoder, path.parent)["scores"]
        assert scores["tokens"] == len(text) - 1 and scores["bytes"] == len(text)


def pairs(folder, count=32):
    colours = ("red", "blue", "green")
    table = [(f"a {colours[n % 3]} cat", f"the cat is {colours[n % 3]}") for n in range(count)]
    for split in ("train", "valid", "test"):
        write(folder / f"{split}.tsv", ("source", "target"), table)
    return folder


class TestSeq2Seq:
    def test_ours(self, words, tmp_path):
        base = own(tmp_path / "base", words, kind="encoder-decoder")
        options = dict(lr=2e-2, epochs=20, batch=16, patience=0)
        result = finetune.run("seq2seq", base, pairs(tmp_path / "pairs"), tmp_path / "run", **options)
        assert result["test"]["rougeL"] > 0.9 and result["test"]["bleu"] > 50 and result["test"]["perplexity"] < 1.5
        assert result["test"]["examples"][0].keys() == {"source", "target", "answer"}

    def test_transformers(self, words, tmp_path):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        special = dict(pad_token_id=words.pad, eos_token_id=words.eos, decoder_start_token_id=words.pad)
        config = transformers.T5Config(vocab_size=words.size, **sizes, **special)
        save_model(tmp_path / "t5", transformers.T5ForConditionalGeneration(config), words)
        options = dict(lr=2e-2, epochs=10, batch=16, max_len=32)
        result = finetune.run("seq2seq", tmp_path / "t5", pairs(tmp_path / "pairs"), tmp_path / "run", **options)
        assert result["test"]["loss"] < result["history"]["loss"][0] and "bleu" in result["test"]


CONTEXT = "on a mat a red cat lay on a log where a blue dog is on the green mat"


def questions(folder):
    table = [("where is the cat", CONTEXT, "mat"), ("where is the dog", CONTEXT, "green mat"), ("a log", CONTEXT, "")]
    for split in ("train", "valid"):
        write(folder / f"{split}.tsv", ("question", "context", "answer"), table * 8)
    qas = [
        dict(question=q, id=n, is_impossible=not a, answers=[dict(text=a, answer_start=CONTEXT.find(a))] if a else [])
        for n, (q, _, a) in enumerate(table)
    ]
    (folder / "test.json").write_text(json.dumps(dict(data=[dict(paragraphs=[dict(context=CONTEXT, qas=qas)])])))
    return folder


class TestQuestions:
    @pytest.mark.parametrize("base", ["encoder", "bert"])
    def test_learns(self, request, tmp_path, base):
        base, data = request.getfixturevalue(base), questions(tmp_path / "data")
        options = dict(lr=2e-2, epochs=40, batch=24, patience=0)
        result = finetune.run("questions", base, data, tmp_path / "run", **options)
        assert result["test"]["exact_match"] == result["test"]["f1"] == 1.0
        scores = evaluate.run(tmp_path / "run", data / "test.json")["scores"]
        assert scores["rows"] == 3 and scores["exact_match"] == 1.0

    def test_a_long_context_is_read_in_windows(self, words):
        made = TASKS["question-answering"](words, 14)
        text = "mat log " * 10 + "red cat " + "dog on " * 10
        row = dict(question="where is the cat", context=text, answers=["red cat"], start=text.find("red cat"))
        windows = made.encode(row)
        assert len(windows) > 3 and {w["windows"] for w in windows} == {len(windows)}
        assert all(len(w["tokens"]) <= 14 and len(w["spans"]) == len(w["tokens"]) for w in windows)
        whole = [w for w in windows if w["span"] != (0, 0)]
        assert whole
        for w in whole:
            first, last = w["span"]
            assert text[w["spans"][first][0] : w["spans"][last][1]] == "red cat"
        seen = {span for w in windows for span in w["spans"] if span is not None}
        assert len(seen) == len(text.split())  # every word of the context is in a window
