"""Inputs with NaN or infinity: how many, where, and why, in the message."""

from __future__ import annotations

import pytest
import torch
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

from pixeldiff.errors import LatentError
from pixeldiff.finite import TOKENS, check_finite
from pixeldiff.models.pid import PiDDecoder, from_pid_latent, to_pid_latent

NAN, INF = float("nan"), float("inf")


def message(values, what="latent", **options) -> str:
    with pytest.raises(ValueError) as caught:
        check_finite(what, values, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (1,), ()])
def test_finite_values_pass(dtype, shape):
    check_finite("latent", torch.ones(shape).to(dtype))
    if dtype.itemsize > 1:
        largest = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
        check_finite("latent", largest)
        check_finite("latent", -largest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_count_kinds_share_and_place(dtype):
    x = torch.zeros(2, 3, 4, 5, dtype=dtype)
    x[1, 2, 3, 4], x[1, 0, 2, 1], x[1, 1, 0, 0] = NAN, -INF, INF
    assert message(x).startswith(
        "latent must be finite, got 1 NaN and 2 infinite of 120 values (2.5%), the first, -inf, at "
        "sample 1, channel 0, row 2, column 1; infinity is an overflow: float16 ends at 65504"
    )


def test_views_are_counted_as_they_look():
    x = torch.zeros(4, 5, 2, 3).permute(2, 3, 0, 1)
    x[1, 2, 3, 4] = NAN
    assert "at sample 1, channel 2, row 3, column 4" in message(x)
    assert "sample 0, channel 0, row 0, column 0" in message(x[1:, 2:, 3:, 4:])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda x: x[1].fill_(NAN), "it is all of sample 1 and nothing else: what made it"),
        (lambda x: x[0::2].fill_(INF), "it is all of sample 0, 2 and nothing else"),
        (lambda x: x[:, 2].fill_(NAN), "it is all of channel 2 and nothing else: it was divided"),
        (lambda x: x[:, :, 1].fill_(NAN), "it is all of row 1 and nothing else"),
        (lambda x: x.fill_(NAN), "no value is finite"),
        (lambda x: x[0, 0, 0].fill_(NAN), "NaN alone is 0/0, or an overflow further back"),
        (lambda x: (x[1].fill_(NAN), x[2, 0, 0, 0].fill_(INF)), "infinity is an overflow"),
        (lambda x: (x[1].fill_(NAN), x[2, 0, 0, 0].fill_(NAN)), "NaN alone"),
    ],
)
def test_the_likely_reason(bad, reason):
    x = torch.zeros(3, 4, 5, 6)
    bad(x)
    assert reason in message(x)


def test_other_axes_hints_and_errors():
    y = torch.zeros(2, 3, 4)
    y[1, 2, 3] = INF
    text = message(y, "caption", axes=TOKENS, hint="Gemma-2 overflows in float16")
    assert "at prompt 1, token 2, channel 3" in text
    assert text.endswith("; Gemma-2 overflows in float16")
    assert "at token 2, channel 3" in message(y[1], axes=TOKENS)
    assert "at axis 0 0, prompt 1, token 2, channel 3" in message(y[None], axes=TOKENS)
    with pytest.raises(LatentError):
        check_finite("latent", y, error=LatentError)


def test_everything_that_takes_a_latent_says_where():
    bad = tiny_latent(2)
    bad[1, 7, 1, 0] = NAN
    where = "sample 1, channel 7, row 1, column 0"
    decoder = PiDDecoder(tiny_net())
    with pytest.raises(ValueError, match=f"^latent must be finite, got 1 NaN .* {where}"):
        decoder.decode(bad, caption=tiny_caption())
    for convert in (to_pid_latent, from_pid_latent):
        with pytest.raises(LatentError, match=f"^{convert.__name__}: latent must be .* {where}"):
            convert(bad, "flux")
    tokens = torch.zeros(1, 4, 64)
    tokens[0, 3, 9] = INF
    with pytest.raises(LatentError, match="at sample 0, token 3, channel 9"):
        to_pid_latent(tokens, "flux", grid=(4, 4))
    with pytest.raises(LatentError, match="sample 1, channel 7, frame 0, row 1, column 0"):
        to_pid_latent(bad[:, :, None], "qwenimage")


def test_everything_that_takes_a_caption_says_where():
    bad = tiny_caption()
    bad[0, 2, 1] = INF
    decoder = PiDDecoder(tiny_net())
    place = rf"of {6 * CONFIG.txt_embed_dim} values .* prompt 0, token 2, channel 1; .*Gemma-2"
    with pytest.raises(ValueError, match=f"^caption must be finite, got 1 infinite {place}"):
        decoder.decode(tiny_latent(), caption=bad)
