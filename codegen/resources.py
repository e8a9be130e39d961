"""What a compiled Triton kernel uses, found out with no GPU on the machine.

Triton compiles for a target by name and carries the tools that read the machine code, so registers, spills, shared memory
and the instructions of the time loop are known before any card is seen. Two cautions. The compiler unrolls loops: counts
are per pass of the loop as it stands in machine code, and the number of steps in one pass shows in `Loop.opcodes` (the
stores there over the stores of one step). And `bound` is a lower bound on time, not a forecast.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqparc.errors import ToolchainError

KB = 1024


@dataclass(frozen=True)
class Target:
    """A card a kernel is compiled for. Rates are lanes per clock and multiprocessor; a fused multiply-add counts as one."""

    name: str
    card: str
    backend: str  # as triton calls it: "cuda" or "hip"
    arch: int | str
    warp: int  # lanes
    registers_per_thread: int
    registers_per_multiprocessor: int
    shared_per_block: int  # bytes, the most a block may ask for
    shared_per_multiprocessor: int
    shared_reserved: int  # bytes the system adds to each block
    shared_granule: int
    warps_per_multiprocessor: int
    blocks_per_multiprocessor: int
    multiprocessors: int
    clock: float  # GHz, the highest
    bandwidth: float  # bytes per second
    rates: Mapping[str, float]


#: Lanes per clock of a multiprocessor by unit, "double" being the fma unit at double precision.
#: NVIDIA: the CUDA C++ programming guide, "throughput of native arithmetic instructions", 8.0 and 9.0; issue is four warps.
#: AMD: the CDNA 3 architecture paper (four units of 16 lanes, special functions at a quarter of that) and its instruction
#: set guide (per clock one instruction of each of up to five types). Where units overlap this is too high, never too low.
_RATES: dict[str, dict[str, float]] = {
    "sm_80": {"fma": 64, "double": 32, "special": 16, "integer": 64, "convert": 64, "shuffle": 32, "load/store": 32, "issue": 128},
    "sm_90": {"fma": 128, "double": 64, "special": 16, "integer": 64, "convert": 64, "shuffle": 32, "load/store": 32, "issue": 128},
    "gfx942": {"fma": 64, "double": 64, "special": 16, "integer": 64, "convert": 64, "shuffle": 64, "load/store": 64, "issue": 320},
}

#: Limits: the CUDA C++ programming guide, "technical specifications per compute capability"; LLVM's AMDGPU usage guide.
#: Multiprocessors, clock and bandwidth: the makers' data sheets of A100 80 GB SXM, H100 SXM and MI300X.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", "A100 80 GB SXM", "cuda", 80, 32, 255, 65536, 163 * KB, 164 * KB, KB, 128, 64, 32, 108, 1.41, 2.039e12,
               _RATES["sm_80"]),
        Target("sm_90", "H100 SXM", "cuda", 90, 32, 255, 65536, 227 * KB, 228 * KB, KB, 128, 64, 32, 132, 1.98, 3.35e12,
               _RATES["sm_90"]),
        # a register file of 512 KB; accumulation registers count, as they come from the same 512 per lane
        Target("gfx942", "MI300X", "hip", "gfx942", 64, 512, 131072, 64 * KB, 64 * KB, 0, 512, 32, 32, 304, 2.1, 5.3e12,
               _RATES["gfx942"]),
    )
}  # fmt: skip

THREADS_PER_BLOCK = 1024
SCHEDULERS = 4  # parts of a multiprocessor, each with its own registers, on all targets
REGISTER_GRANULE = 8  # registers are given to a lane eight at a time, on all targets

KINDS = ("fma", "special", "memory", "shuffle", "tensor", "integer", "compare", "control", "convert", "other")

#: Kinds by the name of an instruction up to its first dot, first match wins. "fma" holds floating point of every width;
#: "compare" holds comparing and choosing, which NVIDIA does on the integer unit.
_NVIDIA_KINDS = (
    ("tensor", r"[A-Z]*MMA|UTC\w+"),
    ("special", r"MUFU"),
    ("control", r"BRA|BRX|BRXU|JM[PX]|JMXU|EXIT|CALL|RET|B?SSY|B?SYNC|BREAK|BAR|B2R|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|NOP|YIELD|BMOV|BPT"
                r"|KILL|NANOSLEEP|MEMBAR|ERRBAR|FENCE|SYNCS|ARRIVES|UCGABAR\w*|ELECT|ENDCOLLECTIVE|ACQBULK|PREEXIT|CCTL\w*"),
    ("shuffle", r"SHFL|REDUX|CREDUX|VOTEU?|MATCH"),
    ("memory", r"LD|LD[GSL]|LDSM|LDGSTS|LDGMC|ST|ST[GSL]|STSM|STAS|ATOM[GS]?|RED|REDG|REDAS|UBLK\w+|UTMA\w+|SULD|SUST|TLD|TEX"),
    ("compare", r"[FDHIU]?SETP2?|U[FI]SETP|HSETP2|[FDHI]SET2?|U?[FU]?SEL|[FDHIV]MNMX[23]?|VIMNMX\w*|U?PLOP3|FCHK|U?P2U?R|R2U?P"),
    ("fma", r"U?[FDH](FMA|ADD|MUL)2?(_?32I)?|FSWZADD"),
    ("convert", r"[FIU]2[FIU]P?|F2FP|I2FP|I2IP|F2IP|FRND"),
    ("integer", r"U?(IADD\w*|IMAD\w*|IMUL\w*|LEA|SHF|SHL|SHR|LOP3?|LOP32I|PRMT|POPC|FLO|SGXT|IABS|BREV|BMSK|BFE|BFI|IDP\w*|ISCADD|ISAD"
                r"|VIADD\w*|VABSDIFF\w*|VIADDMNMX)"),
)  # fmt: skip
_AMD_KINDS = (
    ("tensor", r"v_s?mfmac?_.*"),
    ("shuffle", r"ds_(b?permute|swizzle).*|v_(permlane|readlane|readfirstlane|writelane).*|.*_dpp"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_.*"),
    ("memory", r"(global|flat|buffer|scratch|ds|tbuffer)_.*|s_(load|buffer_load|store|scratch_load|dcache).*"),
    ("control", r"s_(c?branch|waitcnt|barrier|endpgm|nop|sleep|setprio|setpc|swappc|getpc|sethalt|trap|set_gpr|setreg|icache|sched).*"
                r"|s_\w+_saveexec.*"),
    ("convert", r"v_cvt_.*|v_(rndne|trunc|ceil|floor|fract)_f.*"),
    ("compare", r"v_cmpx?_.*|v_cndmask_.*|v_(pk_)?(max|min|med)(imum)?3?_.*|s_(cmp|bitcmp|cselect|max|min).*"),
    ("fma", r"v_(pk_)?(fma|fmac|fmaak|fmamk|mad|mac|add|sub|subrev|mul|ldexp)_(mix\w*_|legacy_)?f(16|32|64).*"
            r"|v_div_(scale|fmas|fixup)_.*|v_dot\w+_f32_.*"),
    ("other", r"[sv]_c?mov.*|v_accvgpr.*|v_nop|v_swap.*|s_memtime.*|s_getreg.*"),
    ("integer", r"[sv]_.*"),
)  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code: how deep it lies (1 is outermost) and its instructions, loops inside counted once."""

    depth: int
    instructions: dict[str, int]  # by kind
    opcodes: dict[str, int]  # by name, as the disassembler writes it
    own: dict[str, int]  # by kind, without loops inside


@dataclass(frozen=True)
class Resources:
    """What a kernel uses.

    The hottest loop is the one with the most floating-point instructions (fma, special, tensor) of its own, those of loops
    inside it left out, so that a small loop inside a step does not stand for the step. Trip counts are not known here; where
    a step has a long loop inside, choose from `loops`.
    """

    registers: int  # per lane
    spills: int  # bytes of local memory per lane: spilled registers, and arrays that found no registers
    shared: int  # bytes per block
    instructions: dict[str, int]  # the whole kernel by kind
    loop: dict[str, int]  # the hottest loop by kind; all zero if there is none
    loop_opcodes: dict[str, int]  # the hottest loop by name
    loops: tuple[Loop, ...]  # hottest first


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    kind: str
    follow: tuple[int, ...]  # where control can go from here, as positions in the list


def find_target(name: str | Target) -> Target:
    """A row of `TARGETS` by its name; a `Target` of one's own passes through."""
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise ToolchainError(f"No target is called {name!r}. Choose one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def compile_for(
    jit_function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    target: str | Target,
    warps: int,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a `triton.jit` function for a target, with no such card needed; gives triton's `CompiledKernel`.

    A type in `signature` may end in ":16" (as in "*fp32:16"): the value is a multiple of 16, as triton finds at a launch.
    """
    card = find_target(target)
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise ToolchainError("Triton is not installed, and GPU kernels need it. Install it with `pip install triton`.") from error
    if not isinstance(jit_function, triton.JITFunction):
        raise ToolchainError(
            f"{jit_function!r} is not a compiled triton function. Decorate it with @triton.jit, and unset TRITON_INTERPRET before "
            "triton is imported: an interpreted kernel has no machine code."
        )
    names: list[str] = list(jit_function.arg_names)
    if wrong := sorted(set(names) ^ {*signature, *constants}):
        raise ToolchainError(f"{jit_function.__name__} has arguments {names}; the signature and constants differ in {wrong}.")
    types = {n: signature[n].partition(":")[0] if n in signature else "constexpr" for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature.get(n, "").endswith(":16")}
    source = ASTSource(fn=jit_function, signature=types, constexprs=constants, attrs=attributes)
    try:
        return triton.compile(source, target=GPUTarget(card.backend, card.arch, card.warp), options={"num_warps": warps, **(options or {})})
    except Exception as error:  # triton, LLVM and ptxas each raise their own
        raise ToolchainError(
            f"Triton {triton.__version__} cannot compile {jit_function.__name__} for {card.name}: {type(error).__name__}: {error}. "
            "If it compiles for other targets, try smaller blocks or fewer stages; if not, the kernel is at fault.",
            ("triton.compile", jit_function.__name__, card.name),
            str(error),
        ) from error


def measure(compiled: Any, target: str | Target) -> Resources:
    """Read the machine code of a kernel that `compile_for` gave for the same target."""
    card = find_target(target)
    kind, read = _READERS[card.backend]
    if kind not in compiled.asm:
        raise ToolchainError(f"The kernel holds {sorted(compiled.asm)} and no {kind}. Compile it for {card.name} first.")
    registers, spills, shared, code = read(compiled.asm[kind], compiled.metadata.name, card)
    loops = _loops(code)
    hottest = loops[0] if loops else Loop(0, _by_kind(()), {}, {})
    total = int(compiled.metadata.shared) + shared
    return Resources(registers, spills, total, _by_kind(code), hottest.instructions, hottest.opcodes, loops)


def occupancy(resources: Resources, target: str | Target, warps: int) -> int:
    """Warps that reside on a multiprocessor at once, with blocks of `warps` warps; 0 if not even one block fits."""
    card = find_target(target)
    if warps * card.warp > THREADS_PER_BLOCK or resources.shared > card.shared_per_block or resources.registers > card.registers_per_thread:
        return 0
    per_warp = _round_up(max(resources.registers, 1), REGISTER_GRANULE) * card.warp
    by_registers = SCHEDULERS * (card.registers_per_multiprocessor // SCHEDULERS // per_warp) // warps
    block = _round_up(resources.shared, card.shared_granule) + card.shared_reserved
    by_shared = card.shared_per_multiprocessor // block if block else card.blocks_per_multiprocessor
    return warps * min(by_registers, by_shared, card.blocks_per_multiprocessor, card.warps_per_multiprocessor // warps)


def check(resources: Resources, target: str | Target, warps: int) -> list[str]:
    """What stands against launching this kernel, in words; empty if nothing does."""
    card = find_target(target)
    r, threads = resources, warps * card.warp
    problems = (
        (r.shared > card.shared_per_block, f"needs {r.shared} bytes of shared memory per block, {card.card} has {card.shared_per_block}"),
        (r.registers > card.registers_per_thread, f"needs {r.registers} registers per lane, {card.card} has {card.registers_per_thread}"),
        (r.spills > 0, f"keeps {r.spills} bytes per lane in local memory: registers ran out, or an array is indexed at run time"),
        (threads > THREADS_PER_BLOCK, f"asks for {threads} lanes per block, the most is {THREADS_PER_BLOCK}"),
    )
    said = [words for wrong, words in problems if wrong]
    if not occupancy(r, card, warps) and not any(wrong for wrong, words in problems if "local memory" not in words):
        said.append(f"needs {r.registers} registers in {threads} lanes, more than a multiprocessor of {card.card} has")
    return said


#: The instruction kinds each unit works through; "issue" takes all, and tensor cores are left out: their rate is per shape.
_UNITS: dict[str, tuple[str, ...]] = {
    "fma": ("fma",),
    "special": ("special",),
    "integer": ("integer", "compare"),
    "convert": ("convert",),
    "shuffle": ("shuffle",),
    "load/store": ("memory",),
    "issue": KINDS,
}


def bound(
    loop_counts: Mapping[str, int], elements_per_thread: float, bytes_per_element: float, target: str | Target, double: bool = False
) -> tuple[str, float]:
    """The unit that limits a loop, and the seconds per element which that unit needs with the whole card at work.

    `loop_counts` is one pass of the loop for one thread, `elements_per_thread` the state elements it advances by one step
    (after unrolling by four, four times as many), `bytes_per_element` what each moves to and from memory: unit "memory".
    """
    card = find_target(target)
    lanes = card.multiprocessors * card.clock * 1e9 * elements_per_thread
    rates = {**card.rates, "fma": card.rates["double"]} if double else card.rates
    seconds = {unit: sum(loop_counts.get(kind, 0) for kind in kinds) / (rates[unit] * lanes) for unit, kinds in _UNITS.items()}
    seconds["memory"] = bytes_per_element / card.bandwidth
    unit = max(seconds, key=lambda u: seconds[u])
    return unit, seconds[unit]


def _read_nvidia(cubin: bytes, name: str, card: Target) -> tuple[int, int, int, list[_Instruction]]:
    text = _cuobjdump(cubin)
    use = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    body = re.search(rf"Function : {re.escape(name)}\n(.*?)(?=\n\s*Function : |\Z)", text, re.DOTALL)
    if use is None or body is None:
        raise ToolchainError(f"cuobjdump's output has no kernel {name}: its format is not known here. Try another triton.", (), text)
    registers, stack, shared, local = map(int, use.groups())
    if isinstance(card.arch, int) and card.arch >= 90 and shared >= card.shared_reserved:
        shared -= card.shared_reserved  # from Hopper on the system's share is counted in
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);")
    rows = [m.groups() for m in line.finditer(body[1])]
    at = {int(address, 16): i for i, (address, *_) in enumerate(rows)}
    code: list[_Instruction] = []
    region: dict[str, int] = {}  # where threads that parted at BSSY meet again, which is where BSYNC goes on
    for i, (_, guard, opcode, operands) in enumerate(rows):
        base = opcode.partition(".")[0]
        jump = re.search(r"0x([0-9a-f]+)\s*$", operands) if base in ("BRA", "JMP", "BSSY") else None
        goal = at.get(int(jump[1], 16)) if jump else None
        goes_on = base not in ("EXIT", "RET", "BRA", "JMP", "BRX", "KILL") or bool(guard) or "," in operands
        barrier = operands.split(",")[0].strip()
        if base == "BSSY" and goal is not None:
            region[barrier], goal = goal, None
        elif base == "BSYNC":
            goal = region.get(barrier)
        follow = {g for g in (goal, i + 1 if goes_on and i + 1 < len(rows) else None) if g is not None}
        # constants come in by these two, which are moves in all but name
        move = opcode.startswith("IMAD.MOV") or (base == "HFMA2" and "-RZ, RZ," in operands)
        code.append(_Instruction(opcode, "other" if move else _kind(base, _NVIDIA_KINDS), tuple(sorted(follow))))
    while code and code[-1].opcode == "NOP":
        code.pop()  # fills up the last line of the instruction cache
    return registers, stack + local, shared, code


def _cuobjdump(cubin: bytes) -> str:
    try:
        from triton import knobs

        tool: str = knobs.nvidia.cuobjdump.path
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ToolchainError(
            f"cuobjdump, which reads the machine code, is not to be found: {error}. Triton's packages carry it; reinstall triton, or "
            "set TRITON_CUOBJDUMP_PATH to the one of a CUDA toolkit."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = (tool, "-sass", "--dump-resource-usage", str(path))
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ToolchainError(f"{tool} cannot be run: {error}. Reinstall triton.", command) from error
    if done.returncode:
        raise ToolchainError(f"{tool} failed: {done.stderr.strip()}. Reinstall triton.", command, done.stdout + done.stderr)
    return done.stdout


def _read_amd(text: str, name: str, card: Target) -> tuple[int, int, int, list[_Instruction]]:
    about = re.search(r"\.amdgpu_metadata\n(.*?)\.end_amdgpu_metadata", text, re.DOTALL)
    body = re.search(rf"^{re.escape(name)}:.*?\n(.*?)^\.Lfunc_end", text, re.DOTALL | re.MULTILINE)
    if about is None or body is None:
        raise ToolchainError(f"The assembler text has no kernel {name}: its format is not known here. Try another triton.", (), text)
    # one kernel of triton's is one entry of the metadata
    use = {key: int(number) for key, number in re.findall(r"\.(\w+):\s+(\d+)\s*$", about[1], re.MULTILINE)}
    labels: dict[str, int] = {}
    rows: list[tuple[str, str]] = []
    for line in body[1].splitlines():
        if label := re.match(r"([.\w$]+):", line):
            labels[label[1]] = len(rows)
        elif instruction := re.match(r"\s+([a-z]\w*)([^;]*)", line):
            rows.append((instruction[1], instruction[2].strip()))
    code: list[_Instruction] = []
    for i, (opcode, operands) in enumerate(rows):
        goal = labels.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
        goes_on = opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")
        follow = {g for g in (goal, i + 1 if goes_on else None) if g is not None and g < len(rows)}
        code.append(_Instruction(opcode, _kind(opcode, _AMD_KINDS), tuple(sorted(follow))))
    spills = max(use.get("private_segment_fixed_size", 0), 4 * use.get("vgpr_spill_count", 0))
    return use["vgpr_count"], spills, use.get("group_segment_fixed_size", 0), code


#: By backend: the form of the machine code, and its reader, which gives registers, spills, static shared memory and the code.
_READERS: dict[str, tuple[str, Callable[[Any, str, Target], tuple[int, int, int, list[_Instruction]]]]] = {
    "cuda": ("cubin", _read_nvidia),
    "hip": ("amdgcn", _read_amd),
}


def _loops(code: list[_Instruction]) -> tuple[Loop, ...]:
    """Loops, hottest first: parts of the flow in which every place reaches every other, then the same without their heads."""
    import networkx as nx

    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(code)))
    flow.add_edges_from((i, to) for i, instruction in enumerate(code) for to in instruction.follow)
    found: list[tuple[int, set[int]]] = []
    # only what the entry reaches: the trap behind the last instruction is a loop too
    pending = [(1, flow.subgraph({0, *nx.descendants(flow, 0)}))] if code else []
    while pending:
        depth, graph = pending.pop()
        for part in nx.strongly_connected_components(graph):
            inner = nx.DiGraph(graph.subgraph(part))
            if not inner.number_of_edges():
                continue
            found.append((depth, part))
            heads = {n for n in part if n == 0 or any(p not in part for p in flow.predecessors(n))}
            inner.remove_edges_from([edge for edge in inner.edges if edge[1] in heads])
            pending.append((depth + 1, inner))
    loops = []
    for depth, part in found:
        inside: set[int] = set().union(*(other for deeper, other in found if deeper > depth and other < part))
        members = [code[i] for i in sorted(part)]
        own = _by_kind(code[i] for i in part - inside)
        loops.append(Loop(depth, _by_kind(members), dict(Counter(m.opcode for m in members)), own))
    return tuple(sorted(loops, key=lambda loop: (-sum(loop.own[k] for k in ("fma", "special", "tensor")), -sum(loop.own.values()))))


def _by_kind(code: Iterable[_Instruction]) -> dict[str, int]:
    counts = Counter(instruction.kind for instruction in code)
    return {kind: counts[kind] for kind in KINDS}


def _kind(opcode: str, table: tuple[tuple[str, str], ...]) -> str:
    return next((kind for kind, pattern in table if re.fullmatch(pattern, opcode)), "other")


def _round_up(number: int, granule: int) -> int:
    return math.ceil(number / granule) * granule
