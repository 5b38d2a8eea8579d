"""The watch on an image's state: told in the step it happens, and nobody waits for a device."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from pixeldiff.errors import NonFiniteError
from pixeldiff.models.guards import Inspection, Place, Watch
from pixeldiff.models.guards import watch as watch_module

NAN, INF = float("nan"), float("inf")
GOOD = torch.ones(1, 3, 4, 6)


def bad(value: float) -> torch.Tensor:
    x = GOOD.clone()
    x[0, 2, 3, 5] = value
    return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.SiLU()))


def watched(net, work, precision="bf16", **options) -> None:
    with Watch(net, precision, **options) as watch:
        work(watch)


def failure(*args, **options) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        watched(*args, **options)
    return caught.value


@pytest.mark.parametrize(("value", "what"), [(NAN, "NaN"), (INF, "infinity"), (-INF, "infinity")])
def test_told_in_its_step(net, value, what):
    def work(watch):
        watch.begin(1, 3, 0.999)
        watch.made(GOOD)
        watch.begin(2, 3, 0.5)
        watch.made(bad(value))
        pytest.fail("the step after it was begun")

    error = failure(net, work)
    assert error.step == 2
    assert isinstance(error, ArithmeticError)
    assert str(error).startswith(
        f"the network returned {what} at 4 x 6 in bf16, first in step 2 of 3 (t = 0.5); run it "
        'again with debug=True (--debug) to learn which layer made it; try precision="fp32", '
    )


def test_advice_fits(net):
    text = str(failure(net, lambda watch: watch.made(bad(NAN)), "fp32"))
    assert "fp32," in text
    assert 'precision="fp32"' not in text


def test_finite_and_empty_states_pass(net):
    largest = torch.finfo(torch.float32).max
    with Watch(net, "fp32") as watch:
        for x in (GOOD, GOOD * largest, -GOOD * largest, GOOD[:0], GOOD.bfloat16(), GOOD * 1e-45):
            watch.made(x)
        watch.made(torch.empty(1, 3, 4, 4, device="meta"))


class Queue:
    """Stands for a device: what is on its way arrives when `finished` says so."""

    def __init__(self, monkeypatch) -> None:
        self.finished, self.waits = False, 0
        made = watch_module._Reading

        def reading(place, size, values, arrived):
            return made(place, size, values, self)

        monkeypatch.setattr(watch_module, "_Reading", reading)

    def query(self):
        return self.finished

    def synchronize(self):
        self.waits += 1


def test_a_device_is_not_waited_for_before_the_end(net, monkeypatch):
    device = Queue(monkeypatch)

    def work(watch):
        for step in (1, 2, 3):
            watch.begin(step, 3, 1 - step / 10)
            watch.made(bad(NAN) if step == 2 else GOOD)
        assert device.waits == 0

    assert failure(net, work).step == 2
    assert device.waits == 2  # the third is not read any more


def test_what_has_arrived_is_read_in_a_later_step(net, monkeypatch):
    device = Queue(monkeypatch)

    def work(watch):
        watch.begin(1, 9, 0.9)
        watch.made(bad(INF))
        watch.begin(2, 9, 0.8)
        device.finished = True
        watch.made(bad(NAN))
        pytest.fail("it went on")

    assert failure(net, work).step == 1


def test_another_error_is_not_hidden(net, monkeypatch):
    Queue(monkeypatch)

    def work(watch):
        watch.made(bad(NAN))
        raise KeyError

    with pytest.raises(KeyError):
        watched(net, work)


def test_places():
    assert str(Place()) == "before the first step"
    assert str(Place(2, 4, 0.866025, (3, 9))) == "in step 2 of 4 (t = 0.866), tile 3 of 9"


# --- debug


def inspected(net, work, precision="fp32"):
    def begun(watch):
        watch.begin(1, 2, 0.5)
        work()

    return failure(net, begun, precision, debug=True)


def test_the_module_its_input_and_the_count(net):
    net[1][0].bias.data[2] = INF
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    error = inspected(net, lambda: net(x))
    assert (error.module, error.step) == ("1.0", 1)
    text = str(error)
    assert text.startswith("1.0 (addmm) made 2 infinite of 8 values in float32, in step 1 of 2 (t ")
    assert "its input is (2, 4) float32 in [-" in text
    assert "its parameter 1.0.bias holds 1 infinite of 4 values: the weights are bad" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_overflow(net, dtype):
    net.to(dtype)
    for parameter in net[1].parameters():
        parameter.data.fill_(torch.finfo(dtype).max / 2)
    error = inspected(net, lambda: net(torch.full((1, 4), 50.0, dtype=dtype)))
    assert error.module == "1.0"
    advice = f'{str(dtype)[6:]} overflowed: try precision="fp32"'
    assert (advice in str(error)) == (dtype != torch.float32)
    assert "weights are bad" not in str(error)


def test_ops_without_parameters_are_their_modules(net):
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    net[1][1] = Log()
    error = inspected(net, lambda: net[1][1](torch.tensor([0.0, 1.0])))
    assert error.module == "1.1"
    assert "1.1 (log) made 1 infinite of 2 values" in str(error)
    assert "in [0, 1]" in str(error)
    error = inspected(net, lambda: torch.tensor([-1.0]).sqrt())
    assert error.module is None
    assert str(error).startswith("the sampler (sqrt) made 1 NaN")


def test_what_is_not_written_yet_is_no_result(net):
    def work():
        for _ in range(20):
            x = torch.empty(4096)
            x.view(64, 64).t()
            torch.empty_like(x)
            x.new_empty(64)
            x.resize_(8)

    poison = [torch.full((4096,), NAN) for _ in range(20)]
    del poison
    with Watch(net, "fp32", debug=True):
        work()


def test_callbacks_are_not_inspected(net):
    with Watch(net, "fp32", debug=True) as watch:
        callback = watch.around(lambda x: x / 0)
        assert callback(GOOD).isinf().all()
        assert watch.around(None) is None
        with pytest.raises(NonFiniteError):
            torch.div(GOOD, 0)
    torch.div(GOOD, 0)


def test_other_threads_and_the_network_are_left_alone(net):
    def has_hooks():
        return any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

    results = []
    with Watch(net, "fp32", debug=True):
        assert not has_hooks()
        other = threading.Thread(target=lambda: results.append(net(torch.full((1, 4), NAN))))
        other.start()
        other.join()
    assert results[0].isnan().all()


def test_views_of_parameters_are_named(net):
    net[0].weight.data[3, 3] = NAN
    error = inspected(net, lambda: torch.ones(1, 2) @ net[0].weight[:, 2:].t())
    assert error.module == "0"
    assert "parameter 0.weight holds 1 NaN" in str(error)


def test_debug_is_a_bool(net):
    with pytest.raises(TypeError, match="debug must be True or False, got 'yes'"):
        Watch(net, "fp32", debug="yes")


def test_pauses_nest(net):
    inspection = Inspection(net, "fp32", Place)
    with inspection, inspection.paused():
        with inspection.paused():
            torch.div(GOOD, 0)
        torch.div(GOOD, 0)


def test_a_state_that_came_from_elsewhere(net):
    x = bad(NAN)

    def work(watch):
        watch.begin(1, 2, 0.5)
        watch.made(x)

    error = failure(net, work, debug=True)
    assert error.module is None
    assert str(error).startswith("the network returned NaN at 4 x 6 in bf16, first in step 1 of 2")
    assert "debug=True" not in str(error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_not_waited_for(net):
    """PyTorch itself raises at whatever would wait."""
    good, spoiled = GOOD.cuda(), bad(NAN).cuda()

    def work(watch):
        watch.made(good)  # takes the pinned memory, which waits the first time
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 9):
                watch.begin(step, 8, 0.5)
                watch.made(good)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watch.begin(9, 9, 0.1)
        watch.made(spoiled)

    assert failure(net, work).step == 9
