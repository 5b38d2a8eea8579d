"""Caption files: what is written is read back, and nothing else passes for a caption."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pixeldiff.text import bake_caption, load_caption, save_captions

NULL_SHA256 = hashlib.sha256(b"").hexdigest()


def embeddings(batch=1, tokens=6, dim=16, dtype=torch.bfloat16):
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "caption.safetensors"


class LengthEncoder:
    """Embeds a caption by its length; the smallest encoder that tells captions apart."""

    encoder_id = "length"
    prefix_sha256 = "ab" * 32

    def encode(self, captions):
        return torch.stack([torch.full((4, 8), len(c) + 1.0) for c in captions])


@pytest.mark.parametrize("captions", [["a fox"], ["a fox", "", "ein Füchslein 🦊"]])
def test_round_trip(path, captions):
    y = embeddings(len(captions))
    saved = save_captions(path, y, captions, encoder_id="gemma", prefix_sha256="ab" * 32)
    loaded = load_caption(path, expected_embed_dim=16)
    for result in (saved, loaded):
        assert torch.equal(result.embedding, y)
        assert result.embedding.dtype == torch.bfloat16
        assert result.captions == tuple(captions)
        assert result.caption_sha256 == tuple(
            hashlib.sha256(c.encode()).hexdigest() for c in captions
        )
        assert result.is_null == tuple(c == "" for c in captions)
        assert result.encoder_id == "gemma"
        assert result.prefix_sha256 == "ab" * 32


def test_file_layout(path):
    """Hosts that know nothing of pixeldiff find one tensor and plain metadata."""
    save_captions(path, embeddings(), "", prefix_sha256="ab" * 32, encoder_id="gemma")
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["embedding"]
        metadata = file.metadata()
    assert metadata == {
        "format": "pixeldiff.caption",
        "format_version": "1",
        "captions": '[""]',
        "caption_sha256": json.dumps([NULL_SHA256]),
        "null_caption": "[true]",
        "encoder": "gemma",
        "prefix_sha256": "ab" * 32,
    }


def test_text_can_stay_private(path):
    saved = save_captions(path, embeddings(), "a secret", store_text=False)
    assert saved.captions is None
    assert b"secret" not in path.read_bytes()
    loaded = load_caption(path)
    assert loaded.captions is None
    assert loaded.caption_sha256 == (hashlib.sha256(b"a secret").hexdigest(),)
    assert loaded.is_null == (False,)
    assert loaded.encoder_id is None


def test_dtype_and_views(path):
    y = embeddings(dtype=torch.float32).transpose(1, 2).requires_grad_()
    saved = save_captions(path, y, "a", dtype=torch.float32)
    assert not saved.embedding.requires_grad
    assert torch.equal(load_caption(path).embedding, y.detach())
    save_captions(path, y, "a")
    assert torch.equal(load_caption(path).embedding, y.detach().bfloat16())


def test_write_is_whole_or_not_at_all(path, monkeypatch):
    save_captions(path, embeddings(), "old")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_captions(path, embeddings(), "new")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    monkeypatch.undo()
    save_captions(path, embeddings(), "new")
    assert load_caption(path).captions == ("new",)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permission bits")
def test_permissions_are_those_of_any_new_file(path, tmp_path):
    save_captions(path, embeddings(), "a")
    (tmp_path / "other").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("name", ["null.safetensors", "null.pt", "null.pth", "dict.pt"])
def test_bare_tensor(tmp_path, name):
    """The baked null caption as others ship it: one tensor, any name, no metadata."""
    y = embeddings(1, 300, 2304)
    if name.endswith(".safetensors"):
        save_file({"caption_embs": y}, tmp_path / name, {"format": "pt", "captions": "other"})
    elif name == "dict.pt":
        torch.save({"caption_embs": y, "caption": ""}, tmp_path / name)
    else:
        torch.save(y, tmp_path / name)
    loaded = load_caption(tmp_path / name, expected_embed_dim=2304)
    assert torch.equal(loaded.embedding, y)
    assert loaded.captions is None
    assert loaded.is_null is None


def test_wrong_width(path):
    save_captions(path, embeddings(), "a", encoder_id="tiny")
    with pytest.raises(
        ValueError, match=r"width 2304, got 16 \(shape \(1, 6, 16\)\).*encoder \(tiny\)"
    ):
        load_caption(path, expected_embed_dim=2304)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.ones(6, 16), ValueError, r"must be \(B, T, E\), none of them 0, got \(6, 16\)"),
        (torch.ones(1, 0, 16), ValueError, r"got \(1, 0, 16\)"),
        (torch.ones(1, 6, 16).int(), TypeError, r"float64, got torch\.int32"),
        (torch.tensor([[[1.0, float("nan")]]]), ValueError, "finite, got 1 NaN of 2 values"),
        (
            torch.tensor([[[1.0]], [[float("inf")]]]),
            ValueError,
            "finite, got 1 infinite of 2",
        ),
        (torch.tensor([[[1.0]], [[0.0]]]), ValueError, "zero throughout embedding 1"),
    ],
    ids=["rank", "empty", "integer", "nan", "inf", "zeros"],
)
def test_bad_tensors(tmp_path, path, tensor, error, message):
    save_file({"x": tensor}, path)
    torch.save(tensor, tmp_path / "x.pt")
    for file in (path, tmp_path / "x.pt"):
        with pytest.raises(error, match=message):
            load_caption(file)
    captions = ["a"] * tensor.shape[0]
    with pytest.raises(error, match=message):
        save_captions(tmp_path / "y.safetensors", tensor, captions)
    assert not (tmp_path / "y.safetensors").exists()


def test_overflow_on_writing_is_seen(path):
    with pytest.raises(ValueError, match=r"embedding as torch\.float16 must be finite"):
        save_captions(path, torch.full((1, 2, 4), 1e6), "a", dtype=torch.float16)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated(tmp_path, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(embeddings(), whole)
    else:
        save_captions(whole, embeddings(), "a")
    data = whole.read_bytes()
    for size in [*range(0, len(data), 37), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="or is cut off"):
            load_caption(cut)


class Unsafe:
    def __reduce__(self):
        return (os.mkdir, ("never-made",))


def test_foreign_files(tmp_path, path, monkeypatch):
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="must hold one tensor, got 2: a, b; this is not a capt"):
        load_caption(path)
    save_file({}, path)
    with pytest.raises(ValueError, match="must hold one tensor, got 0; this"):
        load_caption(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_caption(path)

    pickled = tmp_path / "x.pt"
    pickled.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="is not a PyTorch file"):
        load_caption(pickled)
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, pickled)
    with pytest.raises(ValueError, match="got a dict with 2"):
        load_caption(pickled)
    torch.save(["a"], pickled)
    with pytest.raises(ValueError, match="dict with one tensor, got list"):
        load_caption(pickled)
    torch.save(Unsafe(), pickled)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a PyTorch file of plain tensors"):
        load_caption(pickled)
    assert not (tmp_path / "never-made").exists()

    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt"):
        load_caption(__file__)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_caption(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "2"}, "format version '2', this pixeldiff reads 1; update"),
        ({"captions": '["b"]'}, "the SHA-256 sums do not belong to the captions"),
        ({"caption_sha256": "[]", "captions": "[]"}, "got 0 captions and 1 embeddings"),
        ({"captions": "a"}, "entry 'captions' must be a list of texts"),
        ({"caption_sha256": "[1]"}, "entry 'caption_sha256' must be a list of texts"),
    ],
    ids=["version", "other-text", "count", "no-json", "no-text"],
)
def test_edited_metadata(path, change, message):
    save_captions(path, embeddings(), "a")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensor = file.get_tensor("embedding").clone()
    save_file({"embedding": tensor}, path, {**metadata, **change})
    with pytest.raises(ValueError, match=message):
        load_caption(path)


def test_save_errors(tmp_path, path):
    with pytest.raises(ValueError, match=r"must be a \.safetensors file, got .x.pt"):
        save_captions(tmp_path / "x.pt", embeddings(), "a")
    with pytest.raises(FileNotFoundError, match="output directory does not exist"):
        save_captions(tmp_path / "none" / "x.safetensors", embeddings(), "a")
    with pytest.raises(ValueError, match=r"one text per embedding, B = 2, got 1"):
        save_captions(path, embeddings(2), "a")
    with pytest.raises(TypeError, match="captions must be a str or a sequence of str"):
        save_captions(path, embeddings(), [b"a"])
    with pytest.raises(TypeError, match=r"dtype must be one of bfloat16.*got torch\.int8"):
        save_captions(path, embeddings(), "a", dtype=torch.int8)
    with pytest.raises(TypeError, match="embedding must be a tensor, got list"):
        save_captions(path, [1.0], "a")
    assert os.listdir(tmp_path) == []


def test_bake(path):
    result = bake_caption(path, ["a fox", ""], LengthEncoder())
    loaded = load_caption(path, expected_embed_dim=8)
    assert torch.equal(result.embedding, loaded.embedding)
    assert loaded.embedding[:, 0, 0].tolist() == [6.0, 1.0]
    assert loaded.captions == ("a fox", "")
    assert loaded.encoder_id == "length"
    assert loaded.prefix_sha256 == "ab" * 32


def test_bake_null_caption(path):
    bake_caption(path, None, LengthEncoder())
    loaded = load_caption(path)
    assert loaded.embedding.shape == (1, 4, 8)
    assert loaded.embedding.unique().tolist() == [1.0]
    assert loaded.captions == ("",)
    assert loaded.is_null == (True,)


def test_bake_checks_the_path_before_encoding(tmp_path):
    class Costly:
        def encode(self, captions):
            raise AssertionError("encoded although the path is bad")

    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        bake_caption(tmp_path / "x.pt", None, Costly())
    with pytest.raises(FileNotFoundError, match="output directory does not exist"):
        bake_caption(tmp_path / "none" / "x.safetensors", None, Costly())
    with pytest.raises(TypeError, match="bake_caption: captions must be"):
        bake_caption(tmp_path / "x.safetensors", 3, Costly())


# ---- A negative caption, and which encoder -----------------------------------------------------


class RaggedEncoder:
    """One tensor a caption, as long as it is, plus one; as the encoder of L2P."""

    encoder_id, family = "some/qwen3", "Qwen3"

    def encode(self, captions):
        return [torch.full((len(c) + 1, 8), len(c) + 1.0) for c in captions]


def test_a_negative_caption_in_the_same_file(path):
    saved = bake_caption(path, "a fox", RaggedEncoder(), negative="blurry")
    loaded = load_caption(path, expected_embed_dim=8)
    for result in (saved, loaded):
        assert (result.captions, result.encoder_id, result.family) == (
            *(("a fox",), "some/qwen3", "Qwen3"),
        )
        assert torch.equal(result.embedding, torch.full((1, 6, 8), 6.0).bfloat16())
        negative = result.negative
        assert (negative.captions, negative.family) == (("blurry",), "Qwen3")
        assert torch.equal(negative.embedding, torch.full((1, 7, 8), 7.0).bfloat16())
        assert negative.negative is None
    empty = bake_caption(path, "a fox", RaggedEncoder(), negative="").negative
    assert empty.is_null == (True,)
    secret = bake_caption(path, "a fox", RaggedEncoder(), negative="secret", store_text=False)
    assert secret.negative.captions is None
    assert b"secret" not in path.read_bytes()
    assert load_caption(path).negative.caption_sha256 == secret.negative.caption_sha256


def test_captions_of_different_lengths(path):
    assert bake_caption(path, ["ab", "cd"], RaggedEncoder()).embedding.shape == (2, 3, 8)
    with pytest.raises(ValueError, match=r"have 3, 4 tokens, and a file holds .* its own file"):
        bake_caption(path, ["ab", "abc"], RaggedEncoder())


def test_negatives_that_are_none(path):
    y = embeddings()
    with pytest.raises(ValueError, match=r"negative must have the width of embedding, 16, got \("):
        save_captions(path, y, "a", negative=(embeddings(dim=8), ""))
    with pytest.raises(ValueError, match=r"negative must be finite, got 96 NaN"):
        save_captions(path, y, "a", negative=(y / 0 * 0, ""))
    with pytest.raises(ValueError, match=r"one text per embedding, B = 2, got 1"):
        save_captions(path, y, "a", negative=(embeddings(2), ""))
    assert not path.exists()
    save_captions(path, y, "a", negative=(y, "b"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["negative_captions"] = json.dumps(["c"])
    save_file({"embedding": y, "negative_embedding": y.clone()}, path, metadata=metadata)
    with pytest.raises(ValueError, match="sums do not belong to the captions"):
        load_caption(path)
    metadata.pop("negative_captions")
    save_file({"embedding": y, "negative_embedding": y * torch.inf}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"negative of .* must be finite"):
        load_caption(path)
    save_file({"embedding": y, "negative_embedding": y.clone()}, path)
    with pytest.raises(ValueError, match=r"must hold one tensor, got 2"):
        load_caption(path)


def test_embeddings_of_another_encoder_are_refused(path):
    ours = bake_caption(path, "a fox", RaggedEncoder())
    ours.check_family("caption", "Qwen3")
    save_captions(path, embeddings(), "a")
    load_caption(path).check_family("caption", "Gemma-2")  # nothing is known of it
    with pytest.raises(ValueError, match=r"^fox must hold embeddings of a Gemma-2, which this mo"):
        ours.check_family("fox", "Gemma-2")
    other = save_captions(path, embeddings(), "a", family="Gemma-2", encoder_id="google/gemma")
    text = (
        r"^fox must hold embeddings of a Qwen3, .* got those of a Gemma-2 \(google/gemma\); "
        r"`pixeldiff bake-caption --for l2p` writes the right ones$"
    )
    with pytest.raises(ValueError, match=text):
        other.check_family("fox", "Qwen3")
