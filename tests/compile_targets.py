"""Compiles every kernel ahead of time for four chips, and writes what came out as a table.

No GPU is needed. Run by ``make kernels`` and by test_compile_targets.py, as a process of its own: in the test's own
process the kernels belong to Triton's interpreter::

    python tests/compile_targets.py docs/kernels.md
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DTYPES = ("fp32", "bf16", "fp16")
CHIPS = {
    # name: (backend, architecture, threads of a warp, bytes of shared memory that a program may use)
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


@dataclass
class Result:
    family: str
    name: str
    chip: str
    dtype: str
    registers: int = 0
    shared: int = 0
    instructions: int = 0
    spills: int = 0
    bytes: int = 0
    """Of global memory, loaded or stored by a thread's instructions (each counted once, loops or not)."""
    wide_bytes: int = 0
    """Those of accesses 16 bytes wide or wider."""
    wide_accesses: bool = False
    """Whether TARGETS promises wide accesses."""
    error: str = ""


def modules(package: str = "targets") -> list[Any]:
    """Those of a package: of the lists of targets, one for each layer."""
    names = [found.name for found in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    return [importlib.import_module(f"{package}.{name}") for name in sorted(names)]


def compile_one(job: tuple[str, int, str, str]) -> Result:
    module, index, dtype, chip = job
    target = importlib.import_module(module).TARGETS[index]
    family = module.rpartition(".")[2]
    name = target["name"].removeprefix(family).lstrip(" .")
    result = Result(family, name, chip, dtype, wide_accesses=target["wide_accesses"])
    try:
        _compile(target, result)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"[-2000:]
    return result


def _compile(target: dict[str, Any], result: Result) -> None:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.compilation.always_compile = True  # the log of an earlier run is not kept
    knobs.compilation.disable_line_info = True  # no paths in what is generated
    knobs.nvidia.dump_ptxas_log = True
    backend, arch, warp, _ = CHIPS[result.chip]
    kernel, constants = target["kernel"], target["constants"]
    types = {name: kind.format(dtype=result.dtype) for name, kind in target["types"].items()}
    missing = set(kernel.arg_names) - set(types) - set(constants)
    assert not missing, f"TARGETS gives neither type nor value for {missing}"
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # What Triton finds out at a launch: torch's pointers are multiples of 16, and so are the sizes that are meant here.
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i"]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    # As launch.warps_of: the same number of threads on both.
    options = {"num_warps": max(1, target["num_warps"] * 32 // warp), **target.get("options", {})}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    result.shared = compiled.metadata.shared
    (_read_nvidia if backend == "cuda" else _read_amd)(compiled.asm, log.getvalue(), result)


def _read_nvidia(asm: dict[str, Any], log: str, result: Result) -> None:
    (registers,) = re.findall(r"Used (\d+) registers", log)
    result.registers = int(registers)
    result.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    # "@%p1 ld.global.v4.b32 {...}, [...];" or "add.f32 ...;": predicate, name, operands.
    lines = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)+|ret|bra)\s[^;]*;", asm["ptx"], re.MULTILINE)
    result.instructions = len(lines)
    for name in lines:
        parts = name.split(".")
        # The table of constants behind sin and cos, which is cached, is read by ld.global.nc.
        if parts[0] in ("ld", "st") and parts[1] == "global" and "nc" not in parts:
            vector = next((int(part[1]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            _count(result, vector * int(re.sub(r"\D", "", parts[-1])) // 8)


def _read_amd(asm: dict[str, Any], log: str, result: Result) -> None:
    text = asm["amdgcn"]
    counts = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    result.registers = counts["vgpr_count"]
    result.spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    names = re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+)", text, re.MULTILINE)
    result.instructions = len(names)
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    for name in names:
        access = re.fullmatch(r"(?:global|buffer)_(?:load|store)_(\w+)", name)
        if access:
            _count(result, next(size for suffix, size in sizes.items() if suffix in access[1]))


def _count(result: Result, size: int) -> None:
    result.bytes += size
    result.wide_bytes += size if size >= 16 else 0


def dtypes_of(target: dict[str, Any]) -> tuple[str, ...]:
    """Those to put for ``{dtype}``; the one dtype of a target that names its own."""
    own = [kind for kind in target["types"].values() if kind.startswith("*") and kind[1:] in DTYPES]
    if any("{dtype}" in kind for kind in target["types"].values()):
        return target.get("dtypes", DTYPES)
    return (own[0][1:],) if own else ("-",)


def problems(result: Result) -> list[str]:
    """What is wrong with one kernel on one chip."""
    if result.error:
        return [result.error]
    found = []
    if result.spills:
        found.append(f"{result.spills} bytes or registers are spilled")
    limit = CHIPS[result.chip][3]
    if result.shared > limit:
        found.append(f"{result.shared} bytes of shared memory, {limit} are there")
    if result.wide_accesses and not is_wide(result):
        found.append(f"{result.wide_bytes} of {result.bytes} bytes are accessed 16 at a time")
    return found


def digest() -> str:
    """Of what decides on the compiled code, beside Triton's version: kernels, their constants, the targets.

    Neither the rest of their files nor which file holds them counts, nor comments and docstrings.
    """
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    targets = [target for module in modules() for target in module.TARGETS]
    parts = {repr(target | {"kernel": target["kernel"].__name__}) for target in targets}
    for module in modules("bp_torch.triton_kernels"):
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                parts.add(_bare(value.src))
            elif isinstance(value, tl.constexpr):
                parts.add(f"{name} = {value.value}")
    return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:16]


def _bare(source: str) -> str:
    """A function's source without comments and docstring."""
    tree = ast.parse(source)
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return ast.unparse(tree)


def compile_all(names: str = "", briefly: bool = False) -> list[Result]:
    """Every target whose name contains ``names``, in two processes.

    The first target of each kernel is compiled in every dtype for every chip. The further ones, which are its options,
    are compiled in one 16-bit dtype for every chip, and in the other dtypes for one chip: that is half the time.
    ``briefly``, the first target alone, in one dtype.
    """
    jobs = []
    for module in modules():
        seen = set()
        for index, target in enumerate(module.TARGETS):
            if names in f"{module.__name__}.{target['name']}":
                dtypes = dtypes_of(target)
                if briefly:
                    dtypes = () if target["kernel"] in seen else dtypes[:2][-1:]  # bfloat16, where there is a choice
                everywhere = dtypes if target["kernel"] not in seen or len(dtypes) == 1 else ("bf16",)
                chips = {dtype: CHIPS if dtype in everywhere else ("sm_90",) for dtype in dtypes}
                possible = target.get("chips", CHIPS)  # where the kernel is used
                jobs += [(module.__name__, index, d, chip) for d in dtypes for chip in chips[d] if chip in possible]
                seen.add(target["kernel"])
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        return pool.map(compile_one, jobs, chunksize=4)


def is_wide(result: Result) -> bool:
    """Whether two thirds of the bytes are accessed 16 at a time; seeds, targets and partial sums are the rest."""
    return 3 * result.wide_bytes >= 2 * result.bytes


def table(results: list[Result]) -> str:
    import triton

    spilling = [f"{r.family} {r.name} ({r.dtype}, {r.chip})" for r in results if r.spills]
    lines = [
        "# Kernels",
        "",
        "Written by `make kernels`, not by hand: what the kernels compile to ahead of time, without a GPU, by Triton",
        f"{triton.__version__} from sources whose digest is {digest()}. Each cell has four numbers, for",
        f"{', '.join(CHIPS)} (a dot where an option of a kernel was not compiled for that chip in that dtype).",
        "Registers are those of a thread (vector registers on gfx942); shared memory is that of a program, in bytes;",
        "instructions are PTX's (on gfx942 the machine's own). *wide*: global memory is accessed 16 bytes at a time.",
        "None of this is a measurement of speed.",
        "",
        f"Kernels that spill registers: {', '.join(spilling) or 'none'}.",
    ]
    for family in sorted({result.family for result in results}):
        lines += ["", f"## {family}", "", "| kernel | dtype | registers | shared | instructions | wide |"]
        lines += ["|---|---|---|---|---|---|"]
        rows: dict[tuple[str, str], dict[str, Result]] = {}
        for r in results:
            if r.family == family:
                rows.setdefault((r.name, r.dtype), {})[r.chip] = r
        for (name, dtype), chips in rows.items():
            columns = [
                " / ".join(str(getattr(chips[chip], what)) if chip in chips else "·" for chip in CHIPS)
                for what in ("registers", "shared", "instructions")
            ]
            wide = "yes" if all(is_wide(r) for r in chips.values()) else "no"
            lines.append(f"| {name} | {dtype} | {' | '.join(columns)} | {wide} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """[--briefly] [--may-spill] FILE: the table to FILE if nothing is wrong; the results as JSON to standard output."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: the kernels would not be compiled")
    *options, file = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # nothing is taken from an earlier run
        results = compile_all(briefly="--briefly" in options)
    may = ("are spilled", "are accessed") if "--may-spill" in options else ()
    wrong = [
        f"{r.family} {r.name} {r.dtype} {r.chip}: {problem}"
        for r in results
        for problem in problems(r)
        if not any(slow in problem for slow in may)
    ]
    json.dump([asdict(r) for r in results], sys.stdout)
    if wrong:
        sys.exit("\n".join(wrong))
    Path(file).write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
