"""`edgegen student new`: every family's tiny size is written, read back and the same for the same seed."""

import json

import pytest
import torch

from edgegen.cli.main import main
from edgegen.errors import UsageError
from edgegen.students.checkpoint import save_pt
from edgegen.students.families.registry import FAMILIES, Family, families, new, parameters
from edgegen.students.load import load
from edgegen.students.shapes.family import WEIGHTS
from edgegen.students.shrink import smoke_copy
from edgegen.students.stand_in_tokenizer import END_ID, START_ID, stand_in_tokenizer


def test_families_are_found_by_being_there():
    assert {"mobilei2v", "sdxs-512"} <= families().keys()
    assert FAMILIES is families() and list(FAMILIES) == sorted(FAMILIES)
    for name, one in FAMILIES.items():
        assert isinstance(one, Family) and one.name == name
        assert {"full", "tiny"} <= one.sizes.keys() and one.sources and "\n" not in one.summary


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_tiny_one_is_written_and_read_back(name, tmp_path):
    made = new(name, "tiny", seed=3)
    save_pt(made, tmp_path / "tiny.pt")
    read = load(tmp_path / "tiny.pt")
    assert read.fingerprint == made.fingerprint
    for part, one in made.components.items():  # what a network computes for itself is no weight, and not in the file
        found, wanted = dict(read.components[part].module.named_buffers()), dict(one.module.named_buffers())
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert "random, from seed 3" in read.config.notes[-1 if read.tokenizer_json is None else -2]
    assert (read.tokenizer_json is None) == (made.config.conditioning != "text_encoder")
    counted = {part: sum(p.numel() for p in one.module.parameters()) for part, one in made.components.items()}
    assert parameters(made.config) == counted
    for one in smoke_copy(made).components.values():
        found = one.call(dict(zip([spec.name for spec in one.inputs], one.example_inputs(), strict=True)))
        assert [tuple(value.shape) for value in found.values()] == [spec.shape for spec in one.outputs]


def test_the_seed_alone_decides(tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = new("mobilei2v", "tiny", 0), new("mobilei2v", "tiny", 0), new("mobilei2v", "tiny", 1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mobile-i2v"], "did you mean `mobilei2v`"),
        (["zzz"], "edgegen student families"),
        (["mobilei2v", "--size", "huge"], "--size tiny"),
        (["sdxs-512", "--size", "tiny", "--tokenizer", "none.json"], "none.json"),
        (["mobilei2v", "--size", "tiny", "--tokenizer", str(WEIGHTS.with_name("tokenizer.json"))], "reads no text"),
    ],
)
def test_what_there_is_not(arguments, said, tmp_path, capsys):
    assert main(["student", "new", *arguments, "-o", str(tmp_path / "m.pt"), "-q"]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m.pt").exists()


def test_sizes_that_do_not_exist_are_usage_errors():
    with pytest.raises(UsageError):
        new("mobilei2v", "huge")


def test_new_says_what_is_not_the_published_student(tmp_path, capsys):
    assert main(["student", "new", "sdxs-512", "--size", "tiny", "-o", str(tmp_path / "m.pt"), "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "nothing was trained" in said.err and "stand-in" in said.err
    assert report["notes"] == list(load(tmp_path / "m.pt").config.notes)
    assert report["parameters"]["denoiser"] > 0


def test_a_real_tokenizer_takes_the_place_of_the_stand_in(tmp_path, capsys):
    length = FAMILIES["sdxs-512"].sizes["tiny"]().components["text_encoder"].inputs[0].shape[-1]
    (tmp_path / "tokenizer.json").write_text(stand_in_tokenizer(length).replace(" ", "  "))
    path = tmp_path / "m.pt"
    arguments = ["student", "new", "sdxs-512", "--size", "tiny", "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*arguments, "-o", str(path), "-q"]) == 0
    read = load(path)
    assert read.tokenizer_json == (tmp_path / "tokenizer.json").read_text()
    assert not any("stand-in" in note for note in read.config.notes)
    wrong = WEIGHTS.with_name("tokenizer.json")
    if length != 16:
        assert main([*arguments[:-1], str(wrong), "-o", str(path), "-q"]) == 1
        assert "ids where the text encoder takes" in capsys.readouterr().err


def test_families_command_counts_without_memory(capsys):
    assert main(["student", "families", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["families"]}
    assert sum(found["mobilei2v"]["sizes"]["full"].values()) > 250e6
    assert main(["student", "families"]) == 0
    assert "--size full" in capsys.readouterr().out


def test_stand_in_tokenizer_has_clips_ids():
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(stand_in_tokenizer(12))
    ids = made.encode("A  cat, ü").ids
    # CLIP's ids of single letters: `a` at a word's end is 320, `c` inside one 66.
    assert ids[:4] == [START_ID, 320, 66, 64] and len(ids) == 12
    assert ids[-1] == END_ID == made.token_to_id("<|endoftext|>")
    assert max(made.encode("".join(map(chr, range(1, 400)))).ids) <= END_ID
    assert len(made.encode("word " * 50).ids) == 12


@pytest.mark.parametrize(("size", "padding"), [(32128, 0), (49408, 49407), (151936, 151643), (1000, None), (1000, 999)])
def test_stand_in_tokenizer_keeps_to_the_table(size, padding):
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(stand_in_tokenizer(20, size, padding))
    ids = made.encode("a red cat!").ids
    assert max(ids) < size and len(ids) == 20
    assert ids[-1] == (min(size - 1, END_ID) if padding is None else padding)
    if padding is not None:
        assert ids.index(padding) == len(ids) - ids.count(padding), "nothing else has the id of padding"


def test_a_table_too_small_for_bytes():
    with pytest.raises(UsageError, match="no room"):
        stand_in_tokenizer(20, 500)
