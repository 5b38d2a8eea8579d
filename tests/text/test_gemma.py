"""The Gemma-2 adapter against the same steps done with transformers' own padding and truncation."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
import weakref

import pytest
import torch

from pixeldiff.text import GemmaCaptionEncoder

transformers = pytest.importorskip("transformers", minversion="4.45")
tokenizers = pytest.importorskip("tokenizers")

HIDDEN = 32
MAX_LENGTH = 12
PREFIX = "Describe the picture in more detail.\nUser text: "
CAPTIONS = ["a red fox", "", "a busy street at dusk, seen from above"]


def make_tokenizer():
    """BPE that treats spaces as Gemma's does: a leading space belongs to the word after it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=160, special_tokens=special)
    tokenizer.train_from_iterator([PREFIX, *CAPTIONS] * 4, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=64,
    )


def make_config(**changes):
    settings = {
        "vocab_size": 160,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 512,
        "sliding_window": 512,
        # Tight enough to matter: an attention without it gives other embeddings.
        "attn_logit_softcapping": 0.5,
        "attn_implementation": "eager",
    }
    return transformers.Gemma2Config(**{**settings, **changes})


def make_model(seed=0, cls=None, **changes):
    torch.manual_seed(seed)
    model = (cls or transformers.Gemma2Model)(make_config(**changes)).eval()
    with torch.no_grad():
        # Fresh weights are so small that position and attention hardly show in the output.
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


def make_encoder(model, tokenizer, **changes):
    settings = {"prefix": PREFIX, "max_length": MAX_LENGTH, "embed_dim": HIDDEN}
    return GemmaCaptionEncoder(model, tokenizer, **{**settings, **changes})


def oracle(model, caption, max_length=MAX_LENGTH):
    tokenizer = make_tokenizer()
    count = len(tokenizer(PREFIX)["input_ids"])
    batch = tokenizer(
        PREFIX + caption,
        padding="max_length",
        truncation=True,
        max_length=count + max_length - 2,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        ).hidden_states[-1]
    keep = [0, *range(count - 1, count + max_length - 2)]
    return torch.stack([hidden[0, i] for i in keep])[None]


def test_tokenizer_is_like_gemmas(tokenizer):
    """The prefix ends in a space that joins the caption's first word, so c - 1 is that word."""
    prefix = tokenizer(PREFIX)["input_ids"]
    text = tokenizer(PREFIX + "a red fox")["input_ids"]
    assert prefix[0] == text[0] == tokenizer.bos_token_id
    assert prefix[:-1] == text[: len(prefix) - 1]
    assert prefix[-1] != text[len(prefix) - 1]


@pytest.mark.parametrize("max_length", [2, 3, 12, 300])
@pytest.mark.parametrize("caption", CAPTIONS, ids=["short", "null", "long"])
def test_against_transformers(model, tokenizer, caption, max_length):
    encoder = make_encoder(model, tokenizer, max_length=max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embeddings = encoder.encode(caption)
    assert embeddings.shape == (1, max_length, HIDDEN)
    torch.testing.assert_close(embeddings, oracle(model, caption, max_length), rtol=1e-4, atol=1e-5)


def test_batch_equals_single(model, tokenizer):
    encoder = make_encoder(model, tokenizer, max_length=40)
    batch = encoder.encode(CAPTIONS)
    assert batch.shape == (3, 40, HIDDEN)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(
            batch[i : i + 1], encoder.encode([caption]), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(encoder.encode(tuple(CAPTIONS)), batch, rtol=0, atol=0)


def test_settings_of_the_tokenizer_do_not_matter(model, tokenizer):
    expected = make_encoder(model, tokenizer, max_length=40).encode(CAPTIONS)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    result = make_encoder(model, tokenizer, max_length=40).encode(CAPTIONS)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_long_caption_warns_with_the_number_of_lost_tokens(model, tokenizer):
    count = len(tokenizer(PREFIX)["input_ids"])
    text = len(tokenizer(PREFIX + CAPTIONS[2])["input_ids"])
    fits = make_encoder(model, tokenizer, max_length=text - count + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits.encode(CAPTIONS)
    cut = make_encoder(model, tokenizer, max_length=text - count - 1)
    with pytest.warns(UserWarning, match=r"caption 2 is 3 tokens too long") as record:
        cut.encode(CAPTIONS)
    assert len(record) == 1
    assert record[0].filename == __file__


def test_language_model_is_taken_without_its_head(tokenizer):
    model = make_model(cls=transformers.Gemma2ForCausalLM)
    embeddings = make_encoder(model, tokenizer).encode("a red fox")
    torch.testing.assert_close(embeddings, oracle(model.model, "a red fox"), rtol=1e-4, atol=1e-5)


def test_dropout_is_off(tokenizer):
    model = make_model(attention_dropout=0.9).train()
    encoder = make_encoder(model, tokenizer)
    assert torch.equal(encoder.encode("a red fox"), encoder.encode("a red fox"))


def test_grad_and_inference_mode(model, tokenizer):
    encoder = make_encoder(model, tokenizer)
    embeddings = encoder.encode("a red fox")
    assert not embeddings.requires_grad
    assert not embeddings.is_inference()
    with torch.inference_mode():
        assert encoder.encode("a red fox").is_inference()
    assert torch.is_grad_enabled()


def test_default_device_is_ignored(model, tokenizer):
    encoder = make_encoder(model, tokenizer)
    with torch.device("meta"):
        embeddings = encoder.encode("a red fox")
    assert embeddings.device.type == "cpu"
    assert torch.equal(embeddings, encoder.encode("a red fox"))


def test_release_frees_the_model(tokenizer):
    model = make_model()
    weight = weakref.ref(model.layers[0].mlp.up_proj.weight)
    model.forward = functools.partial(type(model).forward, model)  # a cycle, as hooks make it
    encoder = make_encoder(model, tokenizer)
    del model
    encoder.release()
    assert weight() is None
    encoder.release()
    with pytest.raises(RuntimeError, match="this encoder was released"):
        encoder.encode("a red fox")
    with make_encoder(make_model(), tokenizer) as encoder:
        encoder.encode("a red fox")
    with pytest.raises(RuntimeError, match="this encoder was released"):
        encoder.encode("a red fox")


def test_constructor_errors(model, tokenizer):
    with pytest.raises(ValueError, match="hidden size must be embed_dim = 2304, got 32"):
        GemmaCaptionEncoder(model, tokenizer, prefix=PREFIX)
    for length in (1, 0, True, 300.0):
        with pytest.raises(ValueError, match="max_length must be an integer >= 2"):
            make_encoder(model, tokenizer, max_length=length)
    with pytest.raises(ValueError, match="prefix must not be empty"):
        make_encoder(model, tokenizer, prefix="")
    with pytest.raises(TypeError, match="prefix must be a str, got NoneType"):
        make_encoder(model, tokenizer, prefix=None)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="tokenizer must have a bos_token_id"):
        make_encoder(model, tokenizer)


def test_release_hands_cuda_memory_back(tokenizer):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with make_encoder(make_model(hidden_size=1024).cuda(), tokenizer, embed_dim=1024) as encoder:
        assert encoder.device.type == "cuda"
        embeddings = encoder.encode(CAPTIONS[:2])
        assert embeddings.is_cuda
        embeddings = embeddings.cpu()
    assert torch.cuda.memory_allocated() == before[0]
    # Libraries keep work space of their own; the 30 MB of weights must be gone.
    assert torch.cuda.memory_reserved() <= before[1] + 2**20 * 12
    expected = make_encoder(make_model(hidden_size=1024), tokenizer, embed_dim=1024)
    torch.testing.assert_close(embeddings, expected.encode(CAPTIONS[:2]), rtol=1e-2, atol=1e-3)


def test_encode_errors(model, tokenizer):
    encoder = make_encoder(model, tokenizer)
    with pytest.raises(ValueError, match="captions is empty"):
        encoder.encode([])
    with pytest.raises(TypeError, match="sequence of str, got list of NoneType, str"):
        encoder.encode(["a", None])
    with pytest.raises(TypeError, match="got int"):
        encoder.encode(3)
    small = make_encoder(make_model(vocab_size=8), tokenizer)
    with pytest.raises(ValueError, match=r"token id \d+, but the model has 8 tokens"):
        small.encode("a red fox")
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"not finite in torch\.float32"):
        encoder.encode("a red fox")


def rounded_model():
    """fp32 with values that bf16 holds; `.to(bfloat16)` would round the rotary buffers too."""
    model = make_model(cls=transformers.Gemma2ForCausalLM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture
def folder(tmp_path, tokenizer):
    rounded_model().to(torch.bfloat16).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def test_from_a_folder(folder):
    encoder = GemmaCaptionEncoder.from_pretrained(
        folder, dtype=torch.float32, prefix=PREFIX, max_length=MAX_LENGTH, embed_dim=HIDDEN
    )
    expected = oracle(rounded_model().model, "a red fox")
    torch.testing.assert_close(encoder.encode("a red fox"), expected, rtol=1e-4, atol=1e-5)
    assert encoder.encoder_id == "gemma"
    assert encoder.device == torch.device("cpu")
    settings = {"prefix": PREFIX, "max_length": MAX_LENGTH, "embed_dim": HIDDEN}
    half = GemmaCaptionEncoder.from_pretrained(folder, **settings).encode("a red fox")
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), expected, dim=-1).min() > 0.95


def test_from_a_bad_folder(folder, tmp_path):
    settings = {"prefix": PREFIX, "embed_dim": HIDDEN}
    with pytest.raises(ValueError, match="hidden size must be embed_dim = 2304, got 32"):
        GemmaCaptionEncoder.from_pretrained(folder, prefix=PREFIX)
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(OSError, match=r"cannot load .*give a local folder"):
        GemmaCaptionEncoder.from_pretrained(empty, **settings)

    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 are missing, first (model\.)?layers\.1\.mlp\.up_proj\.weight"
    ):
        GemmaCaptionEncoder.from_pretrained(folder, **settings)


def test_from_another_model(tmp_path):
    config = transformers.LlamaConfig(hidden_size=HIDDEN)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be a Gemma-2 .*got llama"):
        GemmaCaptionEncoder.from_pretrained(tmp_path, prefix=PREFIX, embed_dim=HIDDEN)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_loads_no_text_library():
    run = run_python(
        "import sys, pixeldiff.text; print([m for m in ('transformers', 'tokenizers', 'diffusers',"
        " 'huggingface_hub', 'sentencepiece') if m in sys.modules])"
    )
    assert run.stdout.strip() == "[]"


def test_without_transformers_the_error_names_the_extra():
    run = run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "from pixeldiff.text import GemmaCaptionEncoder\n"
        "try: GemmaCaptionEncoder.from_pretrained(prefix='x: ')\n"
        "except ImportError as error: print(error)"
    )
    assert "install the extra pixeldiff[text]" in run.stdout
