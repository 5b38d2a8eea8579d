"""Where caption embeddings come from, and when a text encoder may be loaded for them."""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref

import pytest
import torch
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

from pixeldiff.models.pid import captions as captions_module
from pixeldiff.models.pid.captions import CaptionSource
from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.text import CaptionFile, save_captions
from pixeldiff.text.tiny import TinyTextEmbedder

E = CONFIG.txt_embed_dim


class Lengths:
    """Embeds a caption by its length; counts its calls."""

    def __init__(self, shape=(6, E)):
        self.shape, self.calls = shape, []

    def encode(self, captions):
        self.calls.append(captions)
        return torch.stack([torch.full(self.shape, len(c) + 1.0) for c in captions])


class Refuses:
    def encode(self, captions):
        raise AssertionError(f"the text encoder was used for {captions}")


def test_embeddings_and_files_never_touch_the_text_encoder():
    null = tiny_caption(seed=2)
    captions = CaptionSource(E, null_caption=null, text_encoder=Refuses())
    decoder = PiDDecoder(tiny_net(), captions=captions)
    for caption in (None, tiny_caption(), CaptionFile(tiny_caption())):
        decoder.decode(tiny_latent(), caption=caption, steps=1)
    assert torch.equal(decoder.null_caption(), null)
    with pytest.raises(AssertionError, match="was used for"):
        decoder.decode(tiny_latent(), caption="a fox")


def test_a_folder_is_not_read_before_a_text_is_given(tmp_path):
    """A path is a str, and a str has an `encode` of its own."""
    for location in (str(tmp_path), tmp_path, "no/such-model"):
        source = CaptionSource(E, null_caption=tiny_caption(), text_encoder=location)
        assert source.embeddings("caption", None).shape == (1, 6, E)
        assert source.embeddings("caption", tiny_caption(2)).shape == (2, 6, E)
    pytest.importorskip("diffusers")  # the prefix is read first
    with pytest.raises(OSError, match="GemmaCaptionEncoder: cannot load"):
        CaptionSource(E, text_encoder=tmp_path).encode("a fox")


def test_null_caption_loads_an_encoder_only_on_request(tmp_path):
    source = CaptionSource(E, text_encoder=str(tmp_path))
    with pytest.raises(ValueError, match=r"bake-caption.*--caption-file"):
        source.embeddings("caption", None)
    pytest.importorskip("diffusers")
    with pytest.raises(OSError, match="cannot load"):
        source.null(load=True)


def test_null_caption_is_the_encoding_of_the_empty_text_made_once():
    encoder = Lengths()
    source = CaptionSource(E, text_encoder=encoder)
    first = source.embeddings("caption", None)
    assert source.null(load=False) is first
    assert encoder.calls == [[""]]
    assert torch.equal(first, torch.ones(1, 6, E))


def test_texts():
    encoder = Lengths()
    source = CaptionSource(E, text_encoder=encoder)
    assert source.encode("abc")[0, 0, 0] == 4
    assert source.encode(("a", "ab")).shape == (2, 6, E)
    assert encoder.calls == [["abc"], ["a", "ab"]]


@pytest.mark.parametrize("text", [5, [1], ["a", None], {"a": 1}, b"a fox", torch])
def test_what_is_no_text(text):
    with pytest.raises(TypeError, match=r"^caption must be a text, a list of texts, embeddings"):
        CaptionSource(E, text_encoder=Lengths()).embeddings("caption", text)


def test_no_texts():
    with pytest.raises(ValueError, match="negative_caption is an empty list"):
        CaptionSource(E, text_encoder=Lengths()).embeddings("negative_caption", [])


def nan_caption():
    y = tiny_caption()
    y[0, 0, :2] = float("nan")
    return y


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (torch.zeros(1, 6, E + 1), rf"\(B, T, {E}\), got \(1, 6, {E + 1}\); they come from"),
        (torch.zeros(6, E), rf"\(B, T, {E}\), got \(6, {E}\)"),
        (torch.zeros(1, 0, E), "got"),
        (torch.zeros(1, 6, E, dtype=torch.int64), "floating-point embeddings, got torch.int64"),
        (nan_caption(), rf"finite, got 2 NaN of {6 * E} values"),
    ],
)
def test_bad_embeddings(y, words):
    source = CaptionSource(E)
    with pytest.raises(ValueError, match=f"^caption must.*{words}"):
        source.embeddings("caption", y)
    with pytest.raises(ValueError, match=f"^null_caption must.*{words}"):
        CaptionSource(E, null_caption=y)


def test_zeros_are_taken_but_not_silently():
    with pytest.warns(UserWarning, match="caption is all zeros.*caption=None"):
        CaptionSource(E).embeddings("caption", torch.zeros(1, 6, E))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaptionSource(E).embeddings("caption", tiny_caption())


def test_null_caption_holds_one_caption(tmp_path):
    with pytest.raises(ValueError, match="null_caption must hold one caption, got 2"):
        CaptionSource(E, null_caption=tiny_caption(2))
    path = tmp_path / "wide.safetensors"
    save_captions(path, torch.ones(1, 6, 8), "")
    with pytest.raises(ValueError, match=f"width {E}, got 8"):
        CaptionSource(E, null_caption=path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CaptionSource(E, null_caption=tmp_path / "nowhere.safetensors")
    with pytest.raises(TypeError, match="null_caption must be a tensor"):
        CaptionSource(E, null_caption=3)


def test_what_is_no_text_encoder():
    with pytest.raises(TypeError, match=r"text_encoder must be a folder or hub id.*got int"):
        CaptionSource(E, text_encoder=5)


def test_an_encoder_that_does_not_fit():
    with pytest.raises(
        ValueError, match=rf"caption, encoded, must.*\(B, T, {E}\), got \(1, 6, 8\)"
    ):
        CaptionSource(E, text_encoder=Lengths((6, 8))).encode("a")

    class Drops:
        def encode(self, captions):
            return tiny_caption(1)

    with pytest.raises(ValueError, match="1 embeddings of 2 captions"):
        CaptionSource(E, text_encoder=Drops()).encode(["a", "b"])


def test_release_lets_a_given_encoder_go():
    encoder = Lengths()
    decoder = PiDDecoder(tiny_net(), captions=CaptionSource(E, text_encoder=encoder))
    null = decoder.null_caption()
    alive = weakref.ref(encoder)
    del encoder
    decoder.release_text_encoder()
    gc.collect()
    assert alive() is None, "something still holds the encoder"
    decoder.release_text_encoder()
    with pytest.raises(ValueError, match="was released"):
        decoder.encode_caption("a fox")
    assert torch.equal(decoder.null_caption(), null)
    decoder.decode(tiny_latent(), steps=1)


def test_release_of_nothing():
    source = CaptionSource(E)
    source.release()
    with pytest.raises(ValueError, match="has no text encoder"):
        source.encode("a fox")


class Loadable(Lengths):
    """Stands in for a Gemma-2 of gigabytes behind `from_pretrained`."""

    loaded: list = []  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, location, **options):
        time.sleep(0.05)
        cls.loaded.append((location, options, encoder := cls()))
        return encoder

    def release(self):
        self.calls.append("released")


@pytest.fixture
def loadable(monkeypatch):
    monkeypatch.setattr(Loadable, "loaded", [])
    monkeypatch.setattr("pixeldiff.text.GemmaCaptionEncoder", Loadable)
    return Loadable.loaded


def test_a_released_folder_is_loaded_again(loadable):
    source = CaptionSource(E, max_length=6, text_encoder="org/gemma", device="cpu")
    assert loadable == []
    source.encode("a")
    source.encode("b")
    assert [(where, options) for where, options, _ in loadable] == [
        ("org/gemma", {"device": "cpu", "max_length": 6, "embed_dim": E})
    ]
    source.release()
    assert loadable[0][2].calls[-1] == "released"
    source.encode("c")
    assert len(loadable) == 2


def test_two_threads_load_one_encoder(loadable):
    source = CaptionSource(E, text_encoder="org/gemma")
    threads = [threading.Thread(target=source.encode, args=("a",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loadable) == 1


def test_default_encoder_of_a_checkpoint():
    class Loaded:
        def __init__(self, backbone, width):
            self.backbone = backbone
            self.config = type(CONFIG)(txt_embed_dim=width, txt_max_length=6)

    def source(backbone, width, **options):
        options = {"null_caption": None, "text_encoder": None, "device": "cpu", **options}
        return CaptionSource.for_checkpoint(Loaded(backbone, width), **options)

    demo = source("demo", 24)
    assert demo.encode("a fox").shape == (1, 6, 24)
    assert demo.null(load=False).shape == (1, 6, 24)
    released = source("flux", 2304)
    assert (released._location, released.max_length) == (captions_module.GEMMA, 6)
    with pytest.raises(ValueError, match="no text encoder"):
        source("flux", 24).encode("a fox")
    mine = Lengths((6, 24))
    assert source("demo", 24, text_encoder=mine).encode("a")[0, 0, 0] == 2


def test_tiny_embedder_is_a_caption_encoder():
    embedder = TinyTextEmbedder(E, 6)
    assert torch.equal(embedder.encode(["a fox"]), embedder.encode("a fox"))
    assert torch.equal(embedder.null(), embedder.encode([""]))
