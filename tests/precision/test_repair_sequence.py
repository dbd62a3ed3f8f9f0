"""All repairs in their order on one student, from its canonical graphs to a learned schedule."""

import torch

from edgegen.precision.plan import ComponentPlan, OpPlan
from edgegen.precision.repair.sequence import learn_schedule, repair_component
from edgegen.precision.repair.tensors import apply, quantized_db
from edgegen.precision.sites import sites
from edgegen.students.sample import sampler_table
from edgegen.students.sampler import moment


def test_a_student_in_four_bits_is_repaired_and_its_schedule_learned(tiny, tiny_programs):
    programs = tiny_programs
    program = programs["denoiser"]
    plan = ComponentPlan(
        float_precision="fp32",
        ops={
            key: OpPlan(op=site.kind, precision="w4") for key, site in sites(program).items() if site.kind != "matmul"
        },
    )
    names = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    samples = []
    for step in sampler_table(tiny, 2):
        for _ in range(2):
            given = {"latent": torch.randn(1, 4, 8, 8), "context": torch.randn(1, 16, 32)}
            samples.append(given | {name: torch.from_numpy(v) for name, v in moment(step, names).items()})
    tensors, records = repair_component(program, plan, samples)
    assert [record.name for record in records] == ["round-weights", "bias-correction"]
    repaired = apply(program, tensors)
    ops = {sites(program)[key].node: op for key, op in plan.ops.items()}
    before, after = (quantized_db(program, one, ops, samples) for one in (program, repaired))
    assert before == records[0].before_db and after == records[-1].after_db and after > before + 1.5

    prompts = [f"a small {colour} circle" for colour in ("red", "green", "blue", "yellow", "purple", "orange")]
    found = learn_schedule(tiny, programs, {"denoiser": repaired}, {"denoiser": plan}, prompts, 2)
    assert found.after_db >= found.before_db and len(found.factors) in (0, 2)
    same = learn_schedule(tiny, programs, {}, {}, prompts, 2)
    assert same.before_db == float("inf") and same.factors == ()


def test_a_plan_of_floats_needs_no_repair(tiny_programs):
    assert repair_component(tiny_programs["decoder"], ComponentPlan(float_precision="fp32"), []) == ({}, ())
