"""Weights that visit the device: order of copies and uses, files, and what goes wrong."""

from __future__ import annotations

import gc
import threading
import time
import types

import pytest
import torch
from torch import nn

from pixeldiff.models.offload import Offload, Part, check_offload, visiting
from pixeldiff.models.offload import networks as offload_networks
from pixeldiff.models.offload.lanes import CudaLane, ThreadLane, lane_for, pinned_sizes
from pixeldiff.models.offload.layout import Layout
from pixeldiff.models.offload.sources import InFile, InMemory, MappedFiles
from pixeldiff.models.packing import follows
from tests.streams import Streams, WatchedLane
from tests.tiny_pid import tiny_caption, tiny_latent, tiny_net


class Block(nn.Module):
    def __init__(self, value: float, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def stack(count: int = 5, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(Block(1.0 + i, width) for i in range(count)).requires_grad_(False)


def offload(blocks, lane, *, slots: int = 2, **options) -> Offload:
    halves = [
        Part("first", blocks, lambda name: name.startswith("first"), "all"),
        Part("all", blocks, lambda name: not name.startswith("first"), "all"),
    ]
    whole = [Part("all", blocks, lambda name: True, "all")]
    how = {"dtype": torch.float32, "adjacent": True, "slots": slots, **options}
    return Offload(halves if how.pop("halves", False) else whole, lane, **how)


def run(away: Offload, name: str = "all") -> list[float]:
    """What each block's first weight is, read by an operation on tensors."""
    found = []
    with away.visit(name) as blocks:
        for block in blocks:
            weight = (block.first if name == "first" else block.second).weight
            found.append(weight.add(0)[0, 0])
    return [float(v) for v in found]


# ---- Copies and uses, in order -----------------------------------------------------------------


def no_wait(lane):
    lane.wait = lambda sent, buffer: buffer.record_stream(lane.streams.current)


def copy_at_once(lane):
    send = lane.send
    lane.send = lambda kept, buffer, after: send(kept, buffer, ())


def last_stream_alone(lane):
    lane.mark = lambda: (0, lane.streams.current.record_event())


def memory_in_use(lane):
    def buffer(nbytes):
        made = lane.streams.watch(torch.empty(nbytes, dtype=torch.uint8))
        made.record_stream(lane._stream)
        return made

    lane.buffer = buffer


def side_not_told(lane):
    wait = lane._stream.wait_stream

    def buffer(nbytes):
        made = lane.streams.watch(torch.empty(nbytes, dtype=torch.uint8))
        wait(lane.streams.current)
        return made

    lane.buffer = buffer


def caller_not_told(lane):
    lane.wait = lambda sent, buffer: lane.streams.current.wait_event(sent)


FAULTS = [
    no_wait,
    copy_at_once,
    last_stream_alone,
    memory_in_use,
    side_not_told,
    caller_not_told,
]


def two_streams(monkeypatch, fault=None, *, slots: int = 2) -> WatchedLane:
    """Passes from two streams, whose buffers are freed once in between."""
    with Streams(monkeypatch) as streams:
        lane = WatchedLane(streams)
        if fault is not None:
            fault(lane)
        blocks = stack()
        away = offload(blocks, lane, slots=slots)
        other = torch.cuda.Stream()
        for _ in range(2):
            assert run(away) == [1, 2, 3, 4, 5]
            with torch.cuda.stream(other):
                assert run(away) == [1, 2, 3, 4, 5]
            with away.visit("all") as several:  # stopped half way
                next(several).second.weight.add(0)
            with torch.cuda.stream(other):
                with away.visit("all") as several:  # what the first stream used, and may still
                    next(several).second.weight.add(0)
                assert run(away) == [1, 2, 3, 4, 5]
            away.release()
            gc.collect()
        assert run(away) == [1, 2, 3, 4, 5]
        away.release()
        del away, several
        gc.collect()
        assert streams.freed_early == []
    return lane


@pytest.mark.parametrize("slots", [2, 3, 4, 7])
def test_every_use_comes_after_its_copy_and_every_copy_after_the_uses_before(monkeypatch, slots):
    two_streams(monkeypatch, slots=slots)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_shows(monkeypatch, fault):
    with pytest.raises(AssertionError, match=r"race|told of"):
        two_streams(monkeypatch, fault)


@pytest.mark.parametrize("slots", [2, 3])
def test_copies_run_ahead(monkeypatch, slots):
    """All of the next blocks' are on their way before the host asks for this one."""
    with Streams(monkeypatch) as streams:
        lane = WatchedLane(streams)
        away = offload(stack(), lane, slots=slots)
        run(away), run(away)
    sent = waited = 0
    for kind, _ in lane.events:
        sent, waited = sent + (kind == "send"), waited + (kind == "wait")
        if kind == "wait":
            assert sent == waited + slots - 1
    assert waited == 10
    assert len({what for kind, what in lane.events if kind == "send"}) == 5


def test_a_copy_waits_for_no_more_than_it_must(monkeypatch):
    """That of the next block knows nothing of this one's work."""
    with Streams(monkeypatch) as streams:
        lane = WatchedLane(streams)
        away = offload(stack(), lane)
        known = []
        with away.visit("all") as blocks:
            for block in blocks:
                block.second.weight.add(0)
                known.append(lane._stream.knows.get(0, 0) < streams.current.knows[0])
    assert all(known)


def test_uses_of_what_was_there_before_are_forgotten(monkeypatch):
    with Streams(monkeypatch) as streams:
        away, other = offload(stack(), WatchedLane(streams)), torch.cuda.Stream()
        run(away)
        with torch.cuda.stream(other):
            run(away), run(away)
        assert all(set(slot.uses) <= {other.cuda_stream} for slot in away._slots)


def test_capture_is_refused(monkeypatch):
    with Streams(monkeypatch) as streams:
        away = offload(stack(), WatchedLane(streams))
        run(away)
        streams.capturing = True
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            run(away)
        streams.capturing = False
        assert run(away) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", [None, no_wait, copy_at_once])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_decode_in_streams(monkeypatch, fault, chunk):
    from pixeldiff.models.pid.samplers import network_time

    net, whole = tiny_net(), tiny_net()
    given = (tiny_latent(), tiny_caption(), torch.zeros(1))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def decoded(net):
        taus = [network_time(t) for t in (0.8, 0.5)]
        how = {"size": (64, 64), "timesteps": taus, "pixel_chunk": chunk}
        condition = net.prepare(*given, **how)
        out, _ = net.student_step(condition, x, 0.8, 0.5, torch.ones)
        return net.student_step(condition, out, 0.5, 0.0, None)[0]

    with Streams(monkeypatch) as streams, torch.inference_mode():
        lane = WatchedLane(streams)
        if fault is not None:
            fault(lane)
        monkeypatch.setattr(offload_networks, "lane_for", lambda device: lane)
        net.offload_()
        if fault is not None:
            with pytest.raises(AssertionError, match="race"):
                decoded(net)
            return
        found = decoded(net)
    with torch.no_grad():
        expected = decoded(whole)
    assert torch.equal(found, expected)


def test_pinned_memory_is_not_rounded_up():
    for nbytes in (1, 255, 1 << 20, (1 << 20) + 256, 354_418_688, 113_246_208):
        sizes = pinned_sizes(nbytes)
        assert sum(sizes) == nbytes
        assert all(size & (size - 1) == 0 for size in sizes[:-1])
        assert sizes[-1] < 1 << 20 or sizes[-1] & (sizes[-1] - 1) == 0
    assert pinned_sizes(0) == []


def test_devices():
    assert isinstance(lane_for(torch.device("cpu")), ThreadLane)
    with pytest.raises(ValueError, match="cuda or cpu, not mps"):
        lane_for(torch.device("mps"))


# ---- The layout of a buffer --------------------------------------------------------------------


def layout_of(adjacent: bool, **shapes: tuple[int, ...]) -> tuple[Layout, dict[str, torch.Tensor]]:
    weights = {
        name.replace("_", "."): torch.empty(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    layout = Layout.of(weights, adjacent=adjacent)
    views = layout.views(torch.empty(layout.nbytes + 100, dtype=torch.uint8))
    return layout, {e.name: v for e, v in zip(layout.entries, views, strict=True)}


def test_weights_of_one_input_lie_side_by_side():
    shapes = {"w1_weight": (64, 32), "w1_bias": (5,), "w3_weight": (64, 32), "w2_weight": (32, 64)}
    layout, views = layout_of(True, **shapes)
    assert follows(views["w1.weight"], views["w3.weight"])
    assert views["w1.bias"].shape == (5,)
    assert all(e.offset % 256 == 0 for e in layout.entries)
    _, apart = layout_of(False, **shapes)
    assert not follows(apart["w1.weight"], apart["w3.weight"])


def test_no_two_weights_overlap():
    for adjacent in (True, False):
        layout, views = layout_of(adjacent, a=(3,), b=(1,), c=(129, 7), d=(0, 4), e=())
        for i, view in enumerate(views.values()):
            view.fill_(i)
        assert all((view == i).all() for i, view in enumerate(views.values()))
        assert layout.nbytes % 256 == 0


# ---- Weights in files --------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randn(1_500_000, generator=generator),  # more than is read at a time
        "half": torch.randn(7, 5, generator=generator).bfloat16(),
        "one": torch.randn(1, generator=generator),
    }
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    with safe_open(path, "pt") as file:
        views = {name: file.get_tensor(name) for name in tensors}
    return types.SimpleNamespace(path=path, tensors=tensors, views=views)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_is_read_from_its_file(mapped, dtype):
    for name, t in mapped.tensors.items():
        source = MappedFiles().source_of(mapped.views[name])
        assert isinstance(source, InFile)
        out = torch.full_like(t, -7, dtype=dtype)
        source.write(out)
        assert torch.equal(out, t.to(dtype))


def test_of_a_pickle_too(tmp_path, mapped):
    torch.save(mapped.tensors, tmp_path / "weights.pth")
    loaded = torch.load(tmp_path / "weights.pth", mmap=True, weights_only=True)
    for name, t in mapped.tensors.items():
        source = MappedFiles().source_of(loaded[name])
        assert isinstance(source, InFile)
        source.write(out := torch.empty_like(t))
        assert torch.equal(out, t)


def test_part_of_a_weight(mapped):
    source = MappedFiles().source_of(mapped.views["half"][2:4])
    assert isinstance(source, InFile)
    source.write(out := torch.empty(2, 5))
    assert torch.equal(out, mapped.tensors["half"][2:4].float())


def test_values_that_were_changed_are_not_those_of_the_file(mapped):
    mapped.views["long"][-1] = 42  # the view is private: the file stays
    source = MappedFiles().source_of(mapped.views["long"])
    assert isinstance(source, InMemory)
    source.write(out := torch.empty_like(mapped.tensors["long"]))
    assert out[-1] == 42
    assert torch.equal(out[:-1], mapped.tensors["long"][:-1])


def test_a_file_that_is_replaced_is_still_read(mapped):
    source = MappedFiles().source_of(mapped.views["half"])
    mapped.path.unlink()
    mapped.path.write_bytes(b"something else")
    source.write(out := torch.empty_like(mapped.tensors["half"]))
    assert torch.equal(out, mapped.tensors["half"])


def test_a_file_that_was_deleted_before_stays_mapped(mapped):
    mapped.path.unlink()
    source = MappedFiles().source_of(mapped.views["half"])
    assert isinstance(source, InMemory)
    assert source.tensor.data_ptr() == mapped.views["half"].data_ptr()


def test_a_file_cut_short_is_an_error_and_no_signal(mapped):
    blocks = stack(2)
    weight = mapped.views["long"][:64].view(8, 8)
    blocks[0].second.weight = nn.Parameter(weight, requires_grad=False)
    away = offload(blocks, ThreadLane())
    content = mapped.path.read_bytes()
    with mapped.path.open("r+b") as file:
        file.truncate(20)
    for _ in range(2):
        with pytest.raises(OSError, match=r"weights.safetensors has become shorter"):
            run(away)
        assert not away._slots
    with mapped.path.open("r+b") as file:  # the same file, whole again
        file.write(content)
    assert run(away) == [float(mapped.tensors["long"][0]), 2]


def test_what_is_in_no_file():
    t = torch.randn(4, 4)
    files = MappedFiles()
    for tensor in (t, t.t(), t[:, 1], torch.empty(0)):
        assert isinstance(files.source_of(tensor), InMemory)
        assert not files.holds(tensor)


# ---- Visits ------------------------------------------------------------------------------------


def test_parts_of_blocks():
    away = offload(stack(3), ThreadLane(), halves=True)
    for _ in range(2):
        assert run(away, "first") == [1, 2, 3]
        assert run(away, "all") == [1, 2, 3]
    assert away.device_bytes == 2 * (256 + 256)
    assert away.host_bytes == 6 * (256 + 256)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_blocks_than_buffers(count):
    away = offload(stack(count), ThreadLane(), slots=3)
    for _ in range(3):
        assert run(away) == [1 + i for i in range(count)]
    assert all(len(slot.uses) <= 1 for slot in away._slots)


def test_no_blocks_in_a_part():
    blocks = stack(2)
    parts = [
        Part("none", [], lambda name: True, "all"),
        Part("all", blocks, lambda name: True, "none"),
    ]
    away = Offload(parts, ThreadLane(), dtype=torch.float32, adjacent=True)
    assert run(away) == run(away) == [1, 2]
    with away.visit("none") as found:
        assert list(found) == []


def test_the_network_keeps_the_shapes_alone():
    blocks = stack(3)
    away = offload(blocks, ThreadLane(), dtype=torch.bfloat16)
    assert {p.device.type for p in blocks.parameters()} == {"meta"}
    assert {p.dtype for p in blocks.parameters()} == {torch.bfloat16}
    assert all(p.shape == (8, 8) for n, p in blocks.named_parameters() if n.endswith("weight"))
    with away.visit("all") as found:
        block = next(found)
        assert block is not blocks[0]
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in block.parameters())


def test_an_error_frees_the_buffers():
    away = offload(stack(), ThreadLane())

    class Boom(Exception):
        pass

    def work():
        with away.visit("all") as blocks:
            next(blocks)
            assert len(away._slots) == 2
            raise Boom

    with pytest.raises(Boom):
        work()
    assert not away._slots
    assert run(away) == [1, 2, 3, 4, 5]
    away.release()
    assert not away._slots


def test_an_error_of_the_lane_frees_them_too():
    lane = ThreadLane()
    away = offload(stack(), lane)
    send, left = lane.send, [3]

    def failing(kept, buffer, after):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("no more")
        return send(kept, buffer, after)

    lane.send = failing
    with pytest.raises(RuntimeError, match="no more"):
        run(away)
    assert not away._slots
    assert run(away) == [1, 2, 3, 4, 5]


def test_after_an_error_nothing_is_being_read(monkeypatch):
    reading, write = [], InMemory.write

    def slow(self, out):
        reading.append(1)
        time.sleep(0.2)
        write(self, out)
        reading.pop()

    monkeypatch.setattr(InMemory, "write", slow)
    away = offload(stack(), ThreadLane())

    def work():
        with away.visit("all") as blocks:
            next(blocks)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not reading


def test_buffers_serve_in_any_mode():
    away = offload(stack(), ThreadLane())
    with torch.inference_mode():
        assert run(away) == [1, 2, 3, 4, 5]
    assert run(away) == [1, 2, 3, 4, 5]
    with torch.no_grad():
        assert run(away) == [1, 2, 3, 4, 5]


def test_blocks_of_any_mode_serve_in_all():
    away = offload(stack(), ThreadLane())
    with torch.inference_mode():
        run(away)
    x = torch.ones(8, requires_grad=True)
    with away.visit("all") as blocks:
        block = next(blocks)
        assert not any(p.is_inference() for p in block.parameters())
        block(x).sum().backward()
    assert torch.equal(x.grad, torch.full((8,), 64.0))


def test_one_thread_at_a_time():
    away, found = offload(stack(40), ThreadLane()), []

    def often():
        for _ in range(10):
            found.append(run(away))

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1.0 + i for i in range(40)]] * 40


def test_blocks_that_are_on_the_device_are_their_own():
    blocks = stack(2)
    with visiting(None, "all", blocks) as found:
        assert [a is b for a, b in zip(found, blocks, strict=True)] == [True, True]


@pytest.mark.parametrize("value", [True, "block", "model", 1])
def test_bad_values(value):
    with pytest.raises(ValueError, match='offload must be False or "blocks", got'):
        check_offload(value)
    assert check_offload("blocks")
    assert not check_offload(False)
    assert not check_offload(None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    """Buffers that are filled while the device is busy: a missing wait would show as old values."""
    device = torch.device("cuda")
    blocks = stack(6, 1024).to(device)
    away = offload(blocks, CudaLane(device))
    assert {p.device.type for p in blocks.parameters()} == {"meta"}
    x = torch.ones(4096, 1024, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for stream in (torch.cuda.current_stream(), side) * 3:
        sums = []
        with torch.cuda.stream(stream), away.visit("all") as found:
            for block in found:
                x @ block.first.weight
                sums.append(block.second.weight.sum())
        torch.cuda.synchronize()
        assert [float(s) / 1024**2 for s in sums] == [1, 2, 3, 4, 5, 6]
    held = torch.cuda.memory_allocated()
    away.release()
    assert held - torch.cuda.memory_allocated() == away.device_bytes
