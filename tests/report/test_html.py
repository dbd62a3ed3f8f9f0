import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from edgegen.bundle.manifest import Artifact, ComponentIO, FileEntry, Manifest, NoiseSpec, SamplerTable
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Delegation
from edgegen.profile.host import ComponentProfile, Host, ProfileReport, Timing
from edgegen.report.html import human_ms, human_size, render, verdict
from edgegen.report.summary import summarise, summary_table
from edgegen.students.sampler import SamplerConfig
from edgegen.verify.gates import check, default_gates
from edgegen.verify.outcome import (
    AlsoMeasured,
    ComponentParity,
    Outcome,
    OutputParity,
    ParityReport,
    PictureParity,
    SensitivityStep,
)

HOSTILE = "<script>document.title='owned'</script>\"><img src=x onerror=\"document.title='owned'\"> & 'quotes'"
COMPONENTS = ("text_encoder", "denoiser", "decoder")
PROMPTS = ("a small red circle left of a large blue square", "a large yellow triangle in the center")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def picture(seed, size=64):
    y, x = np.mgrid[:size, :size]
    made = np.full((size, size, 3), 245, np.uint8)
    made[(x - 16) ** 2 + (y - 32) ** 2 < 90] = (210, 50, 50)
    made[np.maximum(abs(x - 44), abs(y - 32)) < 13] = (50, 90, 200 - seed)
    return made


def artifact(backend, component, executed=True, note="", undelegated=None):
    known = backend != "coreml"
    delegation = Delegation(
        delegate={"onnx": "CPUExecutionProvider", "executorch": "XNNPACK", "coreml": "Core ML"}[backend],
        known=known,
        delegated_ops=100 if known else None,
        total_ops=100 + sum((undelegated or {}).values()) if known else None,
        pieces=(3 if undelegated else 1) if known else None,
        undelegated=undelegated or {},
        note="" if known else "the device decides where each op runs",
    )
    return Artifact(
        backend=backend,
        component=component,
        path=f"components/{backend}/{component}.bin",
        precision="fp16" if backend == "coreml" else "fp32",
        bytes=4_321_000,
        delegation=delegation,
        details={"opset": "20"} if backend == "onnx" else {},
        notes=(note,) if note else (),
        executed=executed,
        not_executed_because=None if executed else "Core ML runs on macOS only",
    )


def manifest(name_of_prompt=PROMPTS[0], **changes):
    latent = TensorSpec(name="latent", shape=(1, 4, 16, 16))
    io = ComponentIO(inputs=(latent,), outputs=(latent,))
    config = SamplerConfig(
        scheduler="flow_match_euler", prediction_type="velocity", times={4: (1.0, 0.75, 0.5, 0.25)}, default_steps=4
    )
    artifacts = [artifact("onnx", c) for c in COMPONENTS]
    artifacts += [artifact("executorch", c, undelegated={"aten.group_norm": 7, "aten.split": 2}) for c in COMPONENTS]
    artifacts += [artifact("coreml", c, executed=False, note="the timestep stays in fp32") for c in COMPONENTS]
    fields = {
        "name": "shapes",
        "task": "text-to-image",
        "student_sha256": "a" * 64,
        "target": "iphone15",
        "target_sha256": "b" * 64,
        "options": {"precision": "fp16", "steps": "4"},
        "tool_versions": {"edgegen": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1", "coremltools": "9.0"},
        "components": dict.fromkeys(COMPONENTS, io),
        "artifacts": tuple(artifacts),
        "backends": ("coreml", "onnx", "executorch"),
        "declined": {"coreai": "needs iOS 27, and the target's floor is iOS 17"},
        "sampler": SamplerTable(config=config, default_steps=4, tables={4: config.table(4)}),
        "noise": NoiseSpec(),
        "gates": default_gates(),
        "files": {"components/onnx/decoder.bin": FileEntry(sha256="c" * 64, bytes=4_321_000)},
    }
    return Manifest(**{**fields, **changes})


def report(backend, sqnr=112.3, psnr=98.7, ratio=1.0004, precision="fp32", prompts=PROMPTS):
    gates = default_gates()
    parts = tuple(
        ComponentParity(
            component=name,
            outcome=Outcome.SUCCESS if sqnr >= gates.sqnr_db[precision] else Outcome.MISMATCH,
            sqnr_db=sqnr,
            outputs=(OutputParity(output="x", sqnr_db=sqnr, worst_at=f"“{prompts[0]}”, step 4 of 4", samples=19),),
            blame=None if sqnr >= 60 else f"`{name}` first parts ways at `conv2d_3` (aten.conv2d in `{prompts[0]}`)",
        )
        for name in COMPONENTS
    )
    pictures = tuple(
        PictureParity(prompt=p, seed=0, steps=4, psnr_db=psnr, latent_sqnr_db=(120.0, 118.0, 115.0, math.inf))
        for p in prompts
    )
    moves = tuple(
        SensitivityStep(
            prompt_a=prompts[0],
            prompt_b=prompts[1],
            step=k,
            steps=4,
            reference_std=0.2,
            compiled_std=0.2 * ratio,
            output_std=1.0,
            ratio=ratio,
            cosine=0.99999,
            degenerate=False,
        )
        for k in range(1, 5)
    )
    failed = check(gates, precision, parts, pictures, moves)
    return ParityReport(
        backend=backend, precision=precision, status="failed" if failed else "passed", components=parts,
        pictures=pictures, sensitivity=moves, gates=gates, failed=failed,
    )  # fmt: skip


def absent(backend="coreml"):
    parts = tuple(
        ComponentParity(component=c, outcome=Outcome.NOT_EXECUTED, reason="Core ML runs on macOS only")
        for c in COMPONENTS
    )
    return ParityReport(
        backend=backend, precision="fp16", status="not_executed", components=parts, gates=default_gates()
    )


def timings(backend, load=0.4):
    def timing(ms):
        return Timing(median_ms=ms, p10_ms=ms * 0.95, p90_ms=ms * 1.2, samples=20, warm_up=2)

    host = Host(
        cpu="Example CPU at 2.5 GHz", machine="x86_64", os="Debian GNU/Linux 12", python="3.11.2", cpus_usable=2,
        threads="OMP_NUM_THREADS=1", load_average=load,
    )  # fmt: skip
    parts = tuple(
        ComponentProfile(
            component=c, first_load_ms=41.5, load=timing(30.0), run=timing(7.25), runs={f"“{PROMPTS[0]}”": timing(7.25)}
        )
        for c in COMPONENTS
    )
    return ProfileReport(
        backend=backend, measured_on=host, runtimes={"onnxruntime": "1.31.1"}, components=parts, picture=timing(51.0),
        picture_steps=4,
    )  # fmt: skip


def page(parity=None, **changes):
    parity = parity or {"coreml": absent(), "onnx": report("onnx"), "executorch": report("executorch", 104.1, 91.2)}
    rows = [(p, picture(0), {"onnx": picture(1), "executorch": picture(2)}) for p in PROMPTS]
    arguments = {
        "manifest": manifest(),
        "parity": parity,
        "profile": {"onnx": timings("onnx"), "executorch": timings("executorch")},
        "pictures": rows,
        "logs": ["onnx-denoiser.log", "coreml-denoiser.log"],
    }
    return render(**{**arguments, **changes})


def hostile_page():
    prompts = (HOSTILE, HOSTILE)
    spoiled = report("onnx", 12.0, 9.0, ratio=0.5, prompts=prompts)
    parts = (spoiled.components[0].model_copy(update={"reason": HOSTILE}), *spoiled.components[1:])
    one = artifact("onnx", "decoder", note=HOSTILE, undelegated={HOSTILE: 3})
    return page(
        parity={HOSTILE: spoiled.model_copy(update={"components": parts, "notes": (HOSTILE,)})},
        manifest=manifest(
            name=HOSTILE, target=HOSTILE, options={HOSTILE: HOSTILE}, declined={HOSTILE: HOSTILE},
            artifacts=(one.model_copy(update={"path": HOSTILE, "component": HOSTILE, "details": {HOSTILE: HOSTILE}}),),
            files={HOSTILE: FileEntry(sha256=HOSTILE, bytes=1)}, tool_versions={HOSTILE: HOSTILE, "edgegen": HOSTILE},
        ),
        profile={HOSTILE: timings("onnx").model_copy(update={"runtimes": {HOSTILE: HOSTILE}})},
        pictures=[(HOSTILE, picture(0), {HOSTILE: picture(1)})],
        logs=[HOSTILE],
    )  # fmt: skip


class Reader(HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.stack, self.unbalanced = [], [], [], [], []
        self.feed(text)
        self.unbalanced += self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("made", [page, hostile_page])
def test_nothing_is_fetched_and_nothing_runs(made):
    html = made()
    reader = Reader(html)
    assert not reader.unbalanced
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(reader.tags)
    for tag, key, value in reader.attributes:
        assert not key.startswith("on"), (tag, key)
        if key in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith("data:image/png;base64,")
    assert not re.search(r"https?://|@import|url\(", html)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in reader.attributes


def test_hostile_names_are_shown_as_text():
    html = hostile_page()
    assert "<script" not in html and "<img src=x" not in html
    text = "".join(Reader(html).text)
    assert text.count("<script>document.title='owned'</script>") >= 12


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_runs_nothing_of_a_hostile_page(tmp_path):
    file = tmp_path / "report.html"
    file.write_text(hostile_page(), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None and title.group(1) != "owned" and "edgegen" in title.group(1)


def test_every_section_is_there_with_its_facts():
    text = " ".join(" ".join(Reader(page()).text).split())
    for heading in ("Pictures", "Parity", "listen to the prompt", "Artifacts", "Timings", "Declined, and why"):
        assert heading in text
    for fact in (
        "The compiled pictures match the student",
        "112.3 dB",
        "≥ 60 dB",
        "1.0004",
        "4.3 MB",
        "aten.group_norm × 7",
        "100 of 109 ops, 3 pieces",
        "Example CPU at 2.5 GHz",
        "7.25 ms",
        "needs iOS 27",
        "Core ML runs on macOS only",
        "the timestep stays in fp32",
        "2.13.0",
        "opset 20",
        "c" * 64,
        "coreml-denoiser.log",
        "equal",
    ):
        assert fact in text, fact


def test_pictures_are_png_of_the_pixels_given():
    import base64
    import io

    from PIL import Image

    sources = [value for tag, key, value in Reader(page()).attributes if (tag, key) == ("img", "src")]
    assert len(sources) == 2 * 3
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources[1].partition(",")[2]))))
    assert np.array_equal(decoded, picture(1))


def test_accessible_by_structure():
    reader = Reader(page())
    values = {(tag, key) for tag, key, _ in reader.attributes}
    assert ("html", "lang") in values
    assert reader.tags.count("h1") == 1
    alts = [value for tag, key, value in reader.attributes if (tag, key) == ("img", "alt")]
    assert len(alts) == reader.tags.count("img") and all(alts)
    heads = sum(1 for tag, key, _ in reader.attributes if (tag, key) == ("th", "scope"))
    assert heads == reader.tags.count("th")


def test_the_verdict_says_what_failed_before_anything_else():
    parity = {"onnx": report("onnx"), "executorch": report("executorch", sqnr=12.0), "coreml": absent()}
    line = verdict(manifest(), parity)
    assert line.tone == "bad" and line.headline == "3 gates were not met"
    assert "executorch: sqnr of text_encoder is 12.0 dB" in line.detail
    html = page(parity=parity)
    assert "match the student" not in html
    assert "first parts ways at `conv2d_3`" in html


def test_the_verdict_never_calls_what_did_not_run_proven():
    line = verdict(manifest(), {"coreml": absent()})
    assert line.tone == "warn" and "not proven" in line.headline and "coreml" in line.detail
    line = verdict(manifest(), {"onnx": report("onnx"), "coreml": absent()})
    assert line.tone == "ok" and "1 of 2 backends" in line.detail
    assert "not proven here: coreml" in line.detail
    assert verdict(manifest(), {}).tone == "warn"


def test_a_busy_machine_is_said():
    assert "these times are too long" not in page()
    assert "these times are too long" in page(profile={"onnx": timings("onnx", load=3.5)})


def test_a_student_of_one_network_has_a_report_without_pictures_or_timings():
    html = page(
        manifest=manifest(task="single", sampler=None, noise=None), parity={"coreml": absent()}, profile={}, pictures=[]
    )
    text = " ".join(Reader(html).text)
    assert "Pictures" not in text and "Timings" not in text and "not proven on this machine" in text


def test_not_finite_numbers_are_words():
    html = page(parity={"onnx": report("onnx", sqnr=-math.inf, psnr=-math.inf)})
    assert "not finite or no signal" in html
    assert not re.search(r"-?inf\b|\bnan\b", html)


def test_sizes_and_times_read_well():
    assert [human_size(n) for n in (870, 12_400, 8_300_000, 1_200_000_000)] == ["870 B", "12.4 kB", "8.3 MB", "1.2 GB"]
    assert [human_ms(t) for t in (0.512, 12.34, 123.4, 1234.0)] == ["0.51 ms", "12.3 ms", "123 ms", "1.23 s"]


def test_who_executed_in_place_of_the_runtime_is_said_wherever_a_number_stands():
    evaluator = "an abacus, not by Core ML"
    also = AlsoMeasured(what="with sums kept in float16", sqnr_db=51.25)
    stood_in = report("coreml", 61.0, 55.0).model_copy(update={"executed_by": evaluator})
    parts = tuple(one.model_copy(update={"predicted_db": 58.5, "also": (also,)}) for one in stood_in.components)
    stood_in = stood_in.model_copy(update={"components": parts})
    rows = [(p, picture(0), {"coreml": picture(1)}) for p in PROMPTS]
    html = page({"coreml": stood_in}, profile={}, pictures=rows)
    line = verdict(manifest(), {"coreml": stood_in})
    assert line.tone == "ok" and f"Executed here: coreml by {evaluator}." in line.detail
    assert html.count(evaluator) == 3 + len(PROMPTS)  # the verdict, the table, what was done differently, pictures
    assert "float16 predicts 58.5 dB" in html and "with sums kept in float16: 51.2 dB" in html
    said = summary_table(manifest(), [stood_in])
    assert f"coreml was executed by {evaluator}; no latency was measured" in said
    assert "coreml denoiser: with sums kept in float16: 51.2 dB" in said
    assert summarise(manifest(), stood_in)["executed_by"] == evaluator
    assert summarise(manifest(), report("onnx"))["executed_by"] is None
