"""The Qwen3 adapter against the steps of diffusers' Z-Image pipeline, and against a golden."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pixeldiff.text import Qwen3PromptEncoder

transformers = pytest.importorskip("transformers", minversion="4.51")
tokenizers = pytest.importorskip("tokenizers")

HIDDEN = 32
PROMPTS = ["a red fox", "", "a busy street at dusk, seen from above"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_tokenizer(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*PROMPTS, "user\n", "assistant\n"] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[-1]
    )
    fast.chat_template = TEMPLATE
    return fast


def make_config(**changes):
    settings = {
        "vocab_size": 310,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    return transformers.Qwen3Config(**{**settings, **changes})


def make_model(cls=None, **changes):
    torch.manual_seed(0)
    model = (cls or transformers.Qwen3Model)(make_config(**changes)).eval()
    with torch.no_grad():
        # Fresh weights are so small that position and attention hardly show in the output.
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.3).bfloat16())
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_encoder(model, tokenizer, **changes):
    return Qwen3PromptEncoder(model, tokenizer, **{"embed_dim": HIDDEN, **changes})


def oracle(model, tokenizer, prompts, max_length=64):
    """What diffusers does: chat template, padding to a fixed length, the last but one state."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        for prompt in prompts
    ]
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        states = model(
            input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True
        ).hidden_states[-2]
    return [row[own] for row, own in zip(states, mask, strict=True)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_against_the_padded_batch_of_diffusers(model, tokenizer):
    got = make_encoder(model, tokenizer).encode(PROMPTS)
    assert_same(got, oracle(model, tokenizer, PROMPTS))
    assert len({len(y) for y in got}) == 3  # no padding


def test_a_long_prompt_is_cut_at_its_end(model, tokenizer):
    encoder = make_encoder(model, tokenizer, max_length=12)
    whole = len(make_encoder(model, tokenizer).encode(PROMPTS[2])[0])
    with pytest.warns(UserWarning, match=f"caption 2 is {whole - 12} tokens too long") as record:
        got = encoder.encode([PROMPTS[1], PROMPTS[1], PROMPTS[2]])
    assert [len(y) for y in got[2:]] == [12]
    assert_same(got[2:], oracle(model, tokenizer, PROMPTS[2:], max_length=12))
    assert record[0].filename == __file__


def test_one_token_too_many_is_told_and_none_is_not(model, tokenizer):
    whole = len(make_encoder(model, tokenizer).encode(PROMPTS[2])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_encoder(model, tokenizer, max_length=whole).encode(PROMPTS[2])
    with pytest.warns(UserWarning, match="caption 0 is 1 tokens too long"):
        make_encoder(model, tokenizer, max_length=whole - 1).encode(PROMPTS[2])


def test_512_tokens_unless_said_otherwise(model, tokenizer):
    with pytest.warns(UserWarning, match=r"too long for max_length = 512;"):
        (embedding,) = make_encoder(model, tokenizer).encode("xyz " * 300)
    assert len(embedding) == 512


def test_spaces_about_a_prompt_stay(model, tokenizer):
    prompts = ["  a red fox\n", "\ta red fox "]
    assert_same(make_encoder(model, tokenizer).encode(prompts), oracle(model, tokenizer, prompts))


def test_golden(golden_dir, tokenizer):
    path = golden_dir / "l2p" / "text_encoder_tiny.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    config = transformers.Qwen3Config(**json.loads(meta["config"]))
    model = transformers.Qwen3Model(config)
    weights = {k[2:]: t.float() for k, t in tensors.items() if k.startswith("w.")}
    model.load_state_dict({k.removeprefix("model."): t for k, t in weights.items()})
    encoder = make_encoder(model, tokenizer, embed_dim=config.hidden_size)
    bound = json.loads(meta["tolerance"])["max_abs_rel_to_peak"]
    for i in range(2):
        ids = tensors["input_ids"][i][tensors["mask"][i]].tolist()
        encoder._ids = lambda texts, ids=ids: [ids]
        got, expected = encoder.encode("")[0], tensors[f"embedding.{i}"]
        assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_language_model_is_taken_without_its_head(tokenizer):
    model = make_model(cls=transformers.Qwen3ForCausalLM)
    got = make_encoder(model, tokenizer).encode("a red fox")
    assert_same(got, oracle(model.model, tokenizer, ["a red fox"]))


def test_settings_of_the_tokenizer_do_not_matter(model):
    expected = make_encoder(model, make_tokenizer()).encode(PROMPTS)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.model_max_length = 5
    for a, b in zip(make_encoder(model, tokenizer).encode(PROMPTS), expected, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_and_default_device(model, tokenizer):
    encoder = make_encoder(model, tokenizer)
    with torch.device("meta"):
        embedding = encoder.encode("a red fox")[0]
    assert embedding.device.type == "cpu"
    assert_same([embedding], oracle(model, tokenizer, ["a red fox"]))
    assert not embedding.requires_grad
    assert not embedding.is_inference()


def test_release_frees_the_model(tokenizer):
    model = make_model()
    weight = weakref.ref(model.layers[0].mlp.up_proj.weight)
    encoder = make_encoder(model, tokenizer)
    del model
    encoder.release()
    assert weight() is None
    encoder.release()
    with pytest.raises(RuntimeError, match="Qwen3PromptEncoder: this encoder was released"):
        encoder.encode("a red fox")


def test_errors(model, tokenizer):
    with pytest.raises(ValueError, match="hidden size must be embed_dim = 2560, got 32"):
        Qwen3PromptEncoder(model, tokenizer)
    for length in (0, True, 512.0):
        with pytest.raises(ValueError, match="max_length must be an integer >= 1"):
            make_encoder(model, tokenizer, max_length=length)
    with pytest.raises(ValueError, match=r"must have <\|im_start\|> as one token, got \d+; use"):
        make_encoder(model, make_tokenizer(("<pad>", "<eos>")))
    encoder = make_encoder(model, tokenizer)
    with pytest.raises(ValueError, match='captions is empty; the empty negative prompt is ""'):
        encoder.encode([])
    with pytest.raises(TypeError, match=r"Qwen3PromptEncoder: captions .* got list of NoneType"):
        encoder.encode([None])
    with pytest.raises(ValueError, match=r"token id \d+, but the model has 8 tokens"):
        make_encoder(make_model(vocab_size=8), tokenizer).encode("a red fox")
    larger = make_tokenizer()
    known = len(larger)
    larger.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=rf"token id {known}, but the model has {known} tokens"):
        make_encoder(make_model(vocab_size=known), larger).encode(["a red fox", "a zebra"])
    broken = make_model()
    with torch.no_grad():
        broken.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"not finite in torch\.float32.*Qwen3 overflows"):
        make_encoder(broken, tokenizer).encode("a red fox")


@pytest.mark.parametrize("published", [False, True], ids=["plain", "text_encoder+tokenizer"])
def test_from_a_folder(tmp_path, tokenizer, published):
    folder = tmp_path / "qwen"
    make_model(cls=transformers.Qwen3ForCausalLM).save_pretrained(
        folder / "text_encoder" if published else folder
    )
    tokenizer.save_pretrained(folder / "tokenizer" if published else folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = Qwen3PromptEncoder.from_pretrained(folder, dtype=torch.float32, embed_dim=HIDDEN)
    model = make_model(cls=transformers.Qwen3ForCausalLM)
    assert_same(encoder.encode(PROMPTS), oracle(model.model, tokenizer, PROMPTS))
    assert encoder.encoder_id == "qwen"
    half = Qwen3PromptEncoder.from_pretrained(folder, embed_dim=HIDDEN).encode("a red fox")[0]
    assert half.dtype == torch.bfloat16


def test_from_another_model(tmp_path):
    transformers.LlamaConfig(hidden_size=HIDDEN).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"must be a Qwen3 .*got llama; the releases use Qwen/"):
        Qwen3PromptEncoder.from_pretrained(tmp_path / "llama", embed_dim=HIDDEN)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(OSError, match=r"cannot load .*give a local folder .* Qwen/Qwen3-4B"):
        Qwen3PromptEncoder.from_pretrained(tmp_path / "nothing", embed_dim=HIDDEN)


def test_without_transformers_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from pixeldiff.text import Qwen3PromptEncoder\n"
        "try: Qwen3PromptEncoder.from_pretrained()\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "transformers >= 4.51 is needed" in run.stdout
    assert "install the extra pixeldiff[text]" in run.stdout
