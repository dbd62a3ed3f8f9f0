"""From graphs and a target's ceiling to what is tiled, what is cut, and what is loaded when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgegen.build.graphs import Graphs
from edgegen.build.recipe import BackendRecipe, Recipe
from edgegen.build.residency import Need, TooLarge, share_memory
from edgegen.build.tiled import choose_tiling, tile_component
from edgegen.bundle.memory import MemoryPlan
from edgegen.graph.capture import capture
from edgegen.graph.liveness import Footprint, footprint
from edgegen.graph.tiles import Tiling
from edgegen.lower.backend import get_backend
from edgegen.lower.chain import FILE_LIMITS
from edgegen.precision.plan import ComponentPlan
from edgegen.rewrite.pipeline import Pipeline
from edgegen.students.student import Component, Student
from edgegen.verify.trajectory import Reference

BITS = {"fp32": 32, "fp16": 16, "w8a8": 8, "w8a8-dynamic": 8, "w8": 8, "w6": 6, "w4": 4}
"""Of one weight in the file."""
TILED = "decoder"
"""The component that may be run in tiles."""
SAMPLES = 2
"""Pictures on which seams are measured."""


@dataclass(frozen=True)
class Memory:
    """`plans`: backend -> how its artifacts share memory; `components`: the student's, with the decoder's tile in its
    place where `tilings` has it."""

    components: Mapping[str, Component]
    plans: dict[str, MemoryPlan] = field(default_factory=dict)
    tilings: dict[str, Tiling] = field(default_factory=dict)

    def parts(self, backend: str, component: str) -> int:
        """Into how many files a component is cut."""
        return self.plans[backend].components[component].parts


def decide(
    student: Student, recipe: Recipe, graphs: Graphs, canonical: Mapping[str, Pipeline], truth: Reference
) -> Memory:
    """How the components of `recipe` fit below its ceiling, by estimates over their canonical graphs.

    A decoder whose values do not fit is tiled, one tiling for all backends, by what its seams measure on `truth`.
    EdgegenError when something does not fit at all.
    """
    found = {name: footprint(graphs.canonical(student.components[name], canonical[name]).program) for name in canonical}
    components = {name: student.components[name] for name in canonical}
    tilings: dict[str, Tiling] = {}
    plans: dict[str, MemoryPlan] = {}
    for backend in recipe.backends:
        try:
            plans[backend.name] = _share(recipe, backend, found, tilings)
        except TooLarge as error:
            if error.component != TILED or TILED in tilings or not truth.trajectories or error.spare <= 0:
                raise
            half = _float_bits(recipe, backend, TILED) / 32
            latents = [one.decoder_input for one in truth.trajectories[:SAMPLES]]
            decoder = components[TILED]
            tiling = choose_tiling(decoder, latents, int(error.spare / half), _activations)
            tilings[TILED] = tiling
            components[TILED] = tile_component(decoder, tiling)
            found[TILED] = footprint(capture(components[TILED]))
            # Backends before this one had room for the whole; one bundle has one decoder's signature.
            plans = {one.name: _share(recipe, one, found, tilings) for one in recipe.backends if one.name in plans}
            plans[backend.name] = _share(recipe, backend, found, tilings)
    return Memory(components, plans, tilings)


def foreseen_parts(
    student: Student, recipe: Recipe, graphs: Graphs, canonical: Mapping[str, Pipeline]
) -> dict[str, dict[str, int]]:
    """Backend -> component -> into how many files it will be cut, as far as that is known before any picture is drawn:
    1 where the decoder has to be tiled first."""
    return {
        backend: dict.fromkeys(canonical, 1)
        if isinstance(plan, TooLarge)
        else {name: one.parts for name, one in plan.components.items()}
        for backend, plan in foreseen(student, recipe, graphs, canonical).items()
    }


def foreseen(
    student: Student, recipe: Recipe, graphs: Graphs, canonical: Mapping[str, Pipeline]
) -> dict[str, MemoryPlan | TooLarge]:
    """Backend -> how its artifacts will share memory without tiles, or what does not fit then."""
    found = {name: footprint(graphs.canonical(student.components[name], canonical[name]).program) for name in canonical}
    plans: dict[str, MemoryPlan | TooLarge] = {}
    for backend in recipe.backends:
        try:
            plans[backend.name] = _share(recipe, backend, found, {})
        except TooLarge as error:
            plans[backend.name] = error
    return plans


def _share(
    recipe: Recipe, backend: BackendRecipe, found: Mapping[str, Footprint], tilings: Mapping[str, Tiling]
) -> MemoryPlan:
    needs = {name: _need(recipe, backend, name, one) for name, one in found.items()}
    plan = share_memory(needs, recipe.memory, splittable=not backend.functions)
    notes = tuple(
        f"`{name}` draws {tiling.count} tiles of {tiling.tile[0]}x{tiling.tile[1]} of a {tiling.latent[0]}x"
        f"{tiling.latent[1]} latent, {tiling.halo} of each side shared; its values did not fit otherwise; largest "
        f"difference to the whole {tiling.seam:.2f} of 255 grey levels"
        for name, tiling in tilings.items()
    )
    return plan.model_copy(update={"why": plan.why + notes})


def _need(recipe: Recipe, backend: BackendRecipe, name: str, one: Footprint) -> Need:
    bits = _float_bits(recipe, backend, name)
    plan = None if recipe.plan is None else recipe.plan.components.get(name)
    stored = 16 if recipe.precision(backend, name) == "fp16" else 32
    return Need(
        weights=_weights(one.weights, stored, plan),
        activations=one.activations * bits // 32,
        file_limit=FILE_LIMITS.get(backend.name),
    )


def _weights(float_bytes: int, stored_bits: int, plan: ComponentPlan | None) -> int:
    """Bytes of weights that take `float_bytes` in fp32."""
    saved = 0
    for op in {} if plan is None else plan.ops.values():
        saved += max(0, stored_bits - BITS[op.precision]) * op.weights // 8
    return max(0, float_bytes * stored_bits // 32 - saved)


def _float_bits(recipe: Recipe, backend: BackendRecipe, name: str) -> int:
    """Of one value while it is computed with."""
    stored = get_backend(backend.name).half == "storage"
    return 16 if recipe.precision(backend, name) == "fp16" and not stored else 32


def _activations(component: Component) -> int:
    return footprint(capture(component)).activations
