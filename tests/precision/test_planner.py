"""Plans of a tiny student, made and read by the real stages."""

import re

import pytest

from edgegen.cache import Cache
from edgegen.errors import GateError, UsageError
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.file import PlanFileError, write_plan
from edgegen.precision.options import PlanOptions
from edgegen.precision.planner import make_plan, read_plan
from edgegen.targets import load_target
from tests.silent import Silent

QUICK = {"samples": 2, "judged": 6, "projections": 2, "confirmed": 3, "spread": 5}


@pytest.fixture(scope="module")
def programs(tiny):
    return canonical_programs(tiny, ("tflite",))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plan_with(tiny, programs, cache):
    def make(backends=("tflite",), target="linux-x86", **options):
        return make_plan(
            tiny, load_target(target), backends, PlanOptions(**QUICK, **options), cache, Silent(), programs
        )

    return make


@pytest.fixture(scope="module")
def planned(plan_with):
    return plan_with(min_psnr=45.0, precisions=("w8a8", "w8"))


@pytest.fixture
def written(planned, tiny, programs, tmp_path):
    """A function that writes the plan with a replacement made, and reads it."""
    path = tmp_path / "plan.toml"

    def read(old="", new="", student=tiny, target="linux-x86"):
        write_plan(path, planned.plan, planned.notes)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1) if old else text)
        return read_plan(path, student, load_target(target), programs)

    return read


def test_outputs_have_codes_unless_every_backend_gives_float(plan_with, tiny, programs, tmp_path):
    asked = {"max_size_ratio": 0.35, "precisions": ("w8a8",)}
    alone = plan_with(("onnx",), **asked)
    ops = [op for part in alone.plan.components.values() for op in part.ops.values() if op.precision == "w8a8"]
    linears = [op for op in ops if op.op == "linear"]
    assert linears and all(op.output is None for op in linears)
    assert all(op.output is not None for op in ops if op.op != "linear")
    both = plan_with(("onnx", "tflite"), **asked)
    assert all(op.output is not None for part in both.plan.components.values() for op in part.ops.values())
    path = tmp_path / "plan.toml"
    write_plan(path, alone.plan, alone.notes)
    assert read_plan(path, tiny, load_target("linux-x86"), programs) == alone.plan
    text = path.read_text()
    path.write_text(text.replace('backends = ["onnx"]', 'backends = ["onnx", "tflite"]'))
    with pytest.raises(PlanFileError, match=r"w8a8 without a range `output`.* and `tflite` does not"):
        read_plan(path, tiny, load_target("linux-x86"), programs)


def test_a_plan_keeps_to_its_budget_and_says_what_it_expects(planned):
    said = planned.plan.predicted
    assert said["picture_psnr_db"] >= 45.0
    assert said["conditioning_change"] <= said["conditioning_change_sure"] <= 0.05 and said["conditioning_pairs"] == 6
    assert 45.0 <= said["picture_psnr_db_sure"] < said["picture_psnr_db"]
    assert 0.2 < said["latency_ratio_estimated.tflite"] < 1.0
    assert planned.rank_correlation > 0.5 and planned.confirmed == 8
    assert len(planned.plan.front) > 3
    counts = planned.counts()
    assert set(counts) == {"text_encoder", "denoiser", "decoder"}
    assert sum(counts["decoder"].values()) == len(planned.plan.components["decoder"].ops)


def test_bytes_are_those_of_the_encoded_weights(planned, programs):
    from edgegen.graph.edit import weights
    from edgegen.precision.encode import encode_weight
    from edgegen.precision.plan import COMPRESSED
    from edgegen.precision.sites import sites

    total = 0
    for name, program in programs.items():
        held, known = weights(program), sites(program)
        quantized = {site.weight for site in known.values()}
        total += sum(value.nbytes for key, value in held.items() if key not in quantized)
        for key, op in planned.plan.components[name].ops.items():
            site = known[key]
            if site.weight is None:
                continue
            weight = held[site.weight]
            compressed = op.precision in COMPRESSED
            total += encode_weight(weight, op, site.axis).stored_bytes if compressed else weight.nbytes
    assert planned.plan.predicted["bytes"] == total


def test_what_was_done_is_not_done_again(plan_with, cache, planned):
    before = cache.statistics.built
    again = plan_with(min_psnr=45.0, precisions=("w8a8", "w8"))
    assert cache.statistics.built == before
    assert again.plan == planned.plan and again.notes == planned.notes


def test_the_file_of_a_plan_is_read_again(written, planned):
    assert written() == planned.plan


def test_one_line_changed_is_a_plan(written, planned):
    changed = written('precision = "w8a8"', 'precision = "fp32"')
    before = [op.precision for part in planned.plan.components.values() for op in part.ops.values()]
    after = [op.precision for part in changed.components.values() for op in part.ops.values()]
    assert [a != b for a, b in zip(before, after, strict=True)].count(True) == 1
    back = written('precision = "w8a8"', 'precision = "w8"')
    assert "w8" in {op.precision for part in back.components.values() for op in part.ops.values()}


def test_a_plan_of_another_model_or_target_is_refused(written, shapes):
    with pytest.raises(PlanFileError, match=r"made for `tiny` \([0-9a-f]{12}\), not for [0-9a-f]{12}"):
        written(student=shapes)
    with pytest.raises(PlanFileError, match="made for target `linux-x86`, not for `rpi5`") as caught:
        written(target="rpi5")
    assert "--target linux-x86" in caught.value.hint


CHANGES = [
    ('ops."layers.0"]', 'ops."layer.0"]', r"decoder\.ops\.layer\.0: the student has no such op; nearest: `layers\.0`"),
    (
        "[components.decoder]",
        "[components.encoder]\nfloat_precision = 'fp32'\n[components.decoder]",
        r"components\.encoder: the student has no such component; nearest: .*`text_encoder`",
    ),
    ('op = "linear"', 'op = "conv"', r"\.op: it is a linear, not a conv"),
    ("weights = ", "weights = 9", r"\.weights: it has \d+ in the graph of the plan's backends"),
    ('precision = "w8a8"', 'precision = "w4"', r"w4 is refused: `tflite` executes fp32, fp16, w8a8"),
    ('backends = ["tflite"]', 'backends = ["coreml"]', "target `linux-x86` does not run `coreml`"),
    ('precision = "w8a8"', 'precision = "w8"\ngroup = 7', r"group: groups of 7 do not divide \d+ input channels"),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_a_plan_that_does_not_fit_is_refused_with_the_key(written, old, new, message):
    with pytest.raises(PlanFileError) as caught:
        written(old, new)
    assert any(re.search(message, line) for line in caught.value.problems), caught.value.problems


def test_what_a_delegate_denies_is_in_no_plan(plan_with, programs, tiny, tmp_path):
    from edgegen.precision.cost import places
    from edgegen.precision.sites import sites

    plan = plan_with(("executorch",)).plan
    at = {name: places(program, sites(program)) for name, program in programs.items()}
    for name, part in plan.components.items():
        for key, op in part.ops.items():
            if op.op == "conv":
                assert op.precision != "w8a8-dynamic"
                assert op.precision == "fp32" or not {"first", "strided"} & set(at[name][key]), key
    assert "first" in at["denoiser"]["conv_in"] and "last" in at["denoiser"]["conv_out"]
    assert "strided" in at["denoiser"]["down_blocks.0.downsamplers.0.conv"]
    path = tmp_path / "plan.toml"
    ops = dict(plan.components["denoiser"].ops)
    ops["conv_in"] = ops["conv_in"].model_copy(update={"precision": "w8a8"})
    denoiser = plan.components["denoiser"].model_copy(update={"ops": ops})
    write_plan(path, plan.model_copy(update={"components": {**plan.components, "denoiser": denoiser}}))
    with pytest.raises(PlanFileError, match=r"conv_in\.precision: w8a8 is refused: `executorch`: .*fail at execution"):
        read_plan(path, tiny, load_target("linux-x86"), programs)


def test_a_cap_on_bytes_is_kept_with_the_least_loss(plan_with):
    half = plan_with(max_size_ratio=0.5)
    assert half.plan.predicted["bytes_ratio"] <= 0.5
    tight = plan_with(max_size_ratio=0.45)
    assert tight.plan.predicted["bytes"] < half.plan.predicted["bytes"]
    assert tight.plan.predicted["picture_psnr_db_estimated"] <= half.plan.predicted["picture_psnr_db_estimated"]


def test_only_what_is_allowed_is_used(plan_with):
    found = plan_with(precisions=("w8",), max_size_ratio=0.6)
    used = {precision for counts in found.counts().values() for precision in counts}
    assert used == {"fp32", "w8"}


def test_a_budget_that_cannot_be_kept_says_what_binds(plan_with):
    with pytest.raises(GateError) as caught:
        plan_with(max_size=1000, min_psnr=30.0)
    assert caught.value.exit_code == 3
    assert re.search(
        r"size <= 1,000 bytes binds: with the others kept, the best is size [\d,]+ bytes", str(caught.value)
    )
    assert "the nearest plan: size" in str(caught.value)
    size = int(re.search(r"`--max-size (\d+)`", caught.value.hint)[1])
    assert plan_with(max_size=size, min_psnr=30.0).plan.predicted["bytes"] <= size


def test_milliseconds_want_a_target_that_was_measured(plan_with):
    limited = plan_with(max_latency_ms=1.0)
    assert limited.plan.predicted["latency_ms_estimated.tflite"] <= 1.0
    with pytest.raises(UsageError, match="nobody has measured how fast target `rpi5`"):
        plan_with(target="rpi5", max_latency_ms=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("w9",)}, "precision `w9` is unknown"),
        ({"precisions": ("w4",)}, "does not execute w4 with `tflite`"),
        (
            {"backends": ("coreml",), "target": "iphone17", "precisions": ("w8a8-dynamic",)},
            "does not execute w8a8-dynamic with `coreml`: scales .* constants of the file",
        ),
        ({"backends": ("coreml",)}, "does not run `coreml`"),
        ({"min_alignment": 0.9}, "only pictures of `shapes` can"),
        ({"steps": 3}, "not distilled for 3 steps"),
    ],
)
def test_what_cannot_be_asked_is_refused(plan_with, options, message):
    with pytest.raises(UsageError, match=message):
        plan_with(**options)


def test_palettes_where_the_runtime_has_them(plan_with):
    found = plan_with(("coreml",), target="iphone15", max_size_ratio=0.15)
    assert {part.float_precision for part in found.plan.components.values()} == {"fp16"}
    small = [op for part in found.plan.components.values() for op in part.ops.values() if op.precision in ("w4", "w6")]
    assert small and all(op.form == "palette" for op in small)
