"""Weights reach a child as maps of the files they lie in; what a pass changed is written beside the graph."""

import sys

import pytest
import torch

from edgegen.lower.mapped_weights import release_pages, with_weights, without_weights

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="which file a page is of is known on Linux only")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(256, 256)
        self.tied = torch.nn.Linear(256, 256)
        self.tied.weight = self.first.weight
        self.small = torch.nn.Linear(256, 4)
        self.register_buffer("table", torch.randn(300, 256))
        self.narrow = torch.nn.Parameter(torch.randn(256, 256).half(), requires_grad=False)

    def forward(self, x):
        return self.small(self.tied(self.first(x)) + self.table[0]) @ self.narrow.float()[:4, :4]


@pytest.fixture
def mapped(tmp_path):
    """The network with the weights of a file that is mapped, but for its table, which was changed since."""
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "weights.pt")
    net = Net()
    net.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True, weights_only=True), assign=True)
    with torch.no_grad():
        net.table.add_(1)  # the pages are this process's own from now on
    return net.eval()


def through(net, folder):
    """The program as a child gets it, and where its weights are said to be."""
    given = torch.randn(2, 256)
    program = torch.export.export(net, (given,))
    light, places = without_weights(program, folder / "weights.bin")
    torch.export.save(light, str(folder / "program.pt2"))
    back = torch.export.load(str(folder / "program.pt2"))
    with_weights(back, places)
    return program, back, places, given


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_what_arrives_is_what_was_sent(mapped, tmp_path):
    program, back, places, given = through(mapped, tmp_path)
    assert set(places) == {"first.weight", "tied.weight", "table", "narrow"}
    for name, value in program.state_dict.items():
        assert torch.equal(back.state_dict[name], value) and back.state_dict[name].dtype == value.dtype
        assert type(back.state_dict[name]) is type(value)
    assert torch.equal(program.module()(given), back.module()(given))
    assert (tmp_path / "program.pt2").stat().st_size < 200_000
    release_pages()  # read again from the file
    assert torch.equal(back.state_dict["table"], mapped.table)


@LINUX
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_only_what_is_in_no_file_is_written(mapped, tmp_path):
    _, back, places, _ = through(mapped, tmp_path)
    written = {name for name, place in places.items() if place.file == str(tmp_path / "weights.bin")}
    assert written == {"table"}
    assert (tmp_path / "weights.bin").stat().st_size == 300 * 256 * 4
    assert places["first.weight"] == places["tied.weight"]
    one, other = back.state_dict["first.weight"], back.state_dict["tied.weight"]
    assert one.data_ptr() == other.data_ptr()
    # Whoever takes a weight's whole storage for the weight gets no more than it.
    assert one.untyped_storage().nbytes() == 256 * 256 * 4


@LINUX
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_a_file_that_was_replaced_is_not_trusted(mapped, tmp_path):
    torch.save({name: torch.zeros_like(value) for name, value in mapped.state_dict().items()}, tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(tmp_path / "weights.pt")
    program, back, places, given = through(mapped, tmp_path)
    assert {place.file for place in places.values()} == {str(tmp_path / "weights.bin")}
    assert torch.equal(program.module()(given), back.module()(given))
