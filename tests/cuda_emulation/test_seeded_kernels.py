"""The kernels of a step with one mistake each, seeded into their very source: the emulation or a formula finds it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyft.core.cache import cache_root

FOLDER = Path(__file__).resolve().parent
CSRC = FOLDER.parents[1] / "csrc"
FLAGS = ("-std=c++20", "-O1", "-w", "-ffp-contract=off", "-DPYFT_CUDA_EMULATION", f"-I{FOLDER}")
ORDERS = (("ascending",), ("descending",), ("random", "1"))
DRIVERS = ("update", "decision", "grad_norm", "row_norms", "masked_rows", "bit_masks", "max_pool")
pytestmark = pytest.mark.build


@dataclass(frozen=True)
class Bug:
    """One change of a source.

    Attributes:
        file: of csrc.
        after: what stands before `right`, so that the place is the only one of its kind.
        right, broken: a statement, or an expression; what takes its place.
        caught: a regular expression of what must be said of it.
    """

    file: str
    after: str
    right: str
    broken: str
    caught: str

    def seeded(self, number: int) -> str:
        """Both, of which the program takes one as it runs: so all bugs of a source are compiled once."""
        if self.right.endswith(";"):
            return f"if (::seeded({number})) {{ {self.broken} }} else {{ {self.right} }}"
        return f"(::seeded({number}) ? ({self.broken}) : ({self.right}))"


BARRIER = "__syncthreads();"
TAIL = "left < kFour ? static_cast<int>(left) : kFour"
ALIGNED = "reinterpret_cast<uintptr_t>(data) % (kFour * bytes) == 0"
UPDATE, BLOCK, TENSOR = "update_kernel_cuda.h", "update_block_cuda.h", "update_tensor_cuda.h"
DECISION, NORM = "step_decision_cuda.cu", "grad_norm_cuda.cu"
MASKED = "masked_rows_cuda.cu"
BITS, BITS_MATH = "bit_masks_cuda.cu", "bit_masks_math.h"
POOL, POOL_MATH = "max_pool_cuda.cu", "max_pool_math.h"
ROWS, SUMS, FOUR = "row_norms_cuda.cu", "block_sums_cuda.h", "four_elements_cuda.h"

BUGS: dict[str, dict[str, Bug]] = {
    "update": {
        "record is overwritten while warps read it": Bug(
            UPDATE, "tensor = chunk.tensor;\n      ", BARRIER, ";", "race: .* of record"
        ),
        "record is read before all of it is there": Bug(
            UPDATE, "+ threadIdx.x);\n      }\n      ", BARRIER, ";", "array record is read before|race: .* of record"
        ),
        "constants are read before they are computed": Bug(
            UPDATE,
            "known, floats, numbers);\n      }\n      ",
            BARRIER,
            ";",
            "array floats is read before|race: .* of floats",
        ),
        "the last block is asked for while warps still work": Bug(
            UPDATE, "finish_step(const UpdateWork& work, Numbers numbers) {\n  ", BARRIER, ";", "race"
        ),
        "nothing is released before a block says it is done": Bug(
            UPDATE, "if (threadIdx.x == 0) {\n    ", "__threadfence();", ";", "race: .* global memory"
        ),
        "nothing is acquired by the last block": Bug(
            UPDATE, "== gridDim.x - 1;\n    ", "__threadfence();", ";", "race: .* global memory"
        ),
        "the block after the last one moves the counters on": Bug(
            UPDATE, "&work.decision->done, 1u) == ", "gridDim.x - 1", "gridDim.x", "wrong: count"
        ),
        "the tail is a whole vector": Bug(BLOCK, "left < 0 ? 0 : ", "static_cast<int>(left)", "kFour", "wrong|race"),
        "the second half is read where the first is": Bug(
            BLOCK, "more = read_elements<kWhole>(layout, t, grad, false, ", "second", "first", "wrong: param"
        ),
        "a step that was refused is taken": Bug(UPDATE, "", "load(&work.decision->skip) != 0", "false", "wrong: param"),
        "every lane reads the scale that one lane writes": Bug(
            BLOCK, "const float scale = ", "lane == 0", "true", "race: .* global memory"
        ),
        "constants of another group are kept": Bug(
            TENSOR, "if (", "number_of_group != known.group", "false", "wrong: param"
        ),
        "warps take each other's blocks": Bug(
            UPDATE, "begin += ", "kUpdateWarps * kBlock", "kBlock", "race: .* global memory"
        ),
        "a row is one element longer": Bug(
            "row_norms_cuda.h",
            "left = ",
            "row_length - place % row_length",
            "row_length - place % row_length + 1",
            "wrong: param",
        ),
        "vectors begin at any element": Bug(FOUR, "return ", ALIGNED, "true", "misaligned"),
    },
    "decision": {
        "the decision comes before the sums it is made of": Bug(
            DECISION,
            "stage != DecisionStage::sums) {\n    ",
            "fill_part(work, scratch);",
            "decide(work, scratch); __syncthreads(); fill_part(work, scratch); return;",
            "wrong|race",
        ),
        "sums of tensors are read before they are there": Bug(
            DECISION, "work.sums, scratch);\n  ", BARRIER, ";", "race: .* global memory"
        ),
        "two sums share their scratch": Bug(
            DECISION, "store(to + 1, sum.low);\n  }\n  ", BARRIER, ";", "race: .* of scratch"
        ),
        "the part is read before it is there": Bug(
            DECISION, "store_group_sums(work, part);\n  }\n  ", BARRIER, ";", "race: .* global memory"
        ),
        "factors of groups are read before they are there": Bug(
            DECISION, "work.group_limit));\n    }\n    ", BARRIER, ";", "race: .* global memory"
        ),
        "the largest of all warps in place of the smallest": Bug(
            DECISION, "i < kWarps; ++i) {\n    x = ", "scratch[i] < x", "scratch[i] > x", "wrong: (bad|smallest)"
        ),
        "a step that is not refused counts as skipped": Bug(
            DECISION, "", "store(&decision->skipped, load(&decision->skipped) + 1);", ";", "wrong: skipped"
        ),
        "a tensor of just so many parts is nobody's": Bug(
            SUMS, "if (", "last - first <= kFewChunks", "last - first < kFewChunks", "wrong"
        ),
        "warps leave out the last part": Bug(SUMS, "c = first + lane; ", "c < last", "c < last - 1", "wrong"),
        "the tensor after one of many parts is added": Bug(
            SUMS, "t = ", "start + __ffs(left) - 1", "start + __ffs(left) % count", "wrong|race"
        ),
        "half a warp is not added": Bug(
            SUMS, "double warp_sum(double x) {\n  for (int width = ", "kWarp / 2", "kWarp / 4", "wrong"
        ),
        "sums of warps are read before they are there": Bug(
            SUMS,
            "scratch[2 * warp + 1] = x.low;\n  }\n  ",
            BARRIER,
            ";",
            "array scratch is read before|race: .* of scratch",
        ),
    },
    "grad_norm": {
        "the next chunk's sums come while these are read": Bug(
            NORM, "store(partial + c, sum);\n    }\n    ", BARRIER, ";", "race: .* of of_warps"
        ),
        "the next chunk's magnitudes come while these are read": Bug(
            NORM, "store(partial + c, static_cast<double>(largest));\n    }\n    ", BARRIER, ";", "race: .* of of_warps"
        ),
        "magnitudes of warps are read before they are there": Bug(
            NORM,
            "of_warps[threadIdx.x / kWarp] = largest;\n    }\n    ",
            BARRIER,
            ";",
            "array of_warps is read before|race: .* of of_warps",
        ),
        "sums of tensors are read before they are there": Bug(
            NORM, "sums, of_warps);\n  ", BARRIER, ";", "race: .* global memory"
        ),
        "the tail is a whole vector": Bug(NORM, "left < 0 ? 0 : ", "left < kFour ? left : kFour", "kFour", "wrong"),
        "every chunk begins where its tensor does": Bug(NORM, "", "chunk.offset + place", "place", "wrong"),
        "the clamp hides NaN": Bug("grad_norm_math.h", "return ", "inside + (x - x)", "inside", "wrong: partial"),
        "sums of warps are read before they are there": Bug(
            SUMS, "scratch[warp] = x;\n  }\n  ", BARRIER, ";", "array of_warps is read before|race: .* of of_warps"
        ),
        "vectors begin at any element": Bug(FOUR, "return ", ALIGNED, "true", "misaligned"),
    },
    "row_norms": {
        "two sums share their scratch": Bug(
            ROWS, "block_sum(mine.param, ", "of_param", "of_grad", "race: .* of of_grad"
        ),
        "nothing is released before a piece is said to be done": Bug(
            ROWS, "task.first, sums);\n    ", "__threadfence();", ";", "race: .* global memory"
        ),
        "nothing is acquired by the last block of a row": Bug(
            ROWS, "== count - 1;\n    ", "__threadfence();", ";", "race: .* global memory"
        ),
        "warps do not wait to hear whether theirs is the last": Bug(
            ROWS, "__threadfence();\n  }\n  ", BARRIER, ";", "array is_last is read before|race: .* of is_last"
        ),
        "the block before the last one adds the pieces": Bug(
            ROWS, "atomicAdd(done, 1u) == ", "count - 1", "count - 2", "wrong|race"
        ),
        "the count of pieces is left for the next launch": Bug(
            ROWS, "row, all);\n    ", "store(done, 0u);", ";", "wrong: (sums|bits|factors)"
        ),
        "the last piece is as long as the others": Bug(
            ROWS, "", "left < kRowPiece ? left : kRowPiece", "kRowPiece", "wrong"
        ),
        "every piece begins where its row does": Bug(
            ROWS, "", "row * rows.length + begin", "row * rows.length", "wrong"
        ),
        "the tail is a whole vector": Bug(ROWS, "begin + i, ", TAIL, "kFour", "wrong"),
        "lanes of other warps write the row": Bug(ROWS, "if (", "lane == 0", "lane < 2", "race|wrong"),
        "vectors begin at any element": Bug(FOUR, "return ", ALIGNED, "true", "misaligned"),
    },
    "bit_masks": {
        "a tile that is begun is packed whole": Bug(
            BITS,
            "Element* y, uint8_t* bits, int64_t length, bool aligned, Rule rule) {\n"
            "  constexpr int kLength = kVectorLength<Element>;\n  const int lane = lane_of_thread();\n"
            "  for_each_tile<Element>(length, [&](int64_t first) {\n    if (aligned && ",
            "first + kTile<Element> <= length",
            "first + kTile<Element> <= length + 4",
            "wrong|race",
        ),
        "warps take each other's tiles": Bug(
            BITS,
            "step = ",
            "static_cast<int64_t>(gridDim.x) * kWarps * kTile<Element>",
            "kWarps * kTile<Element>",
            "race: .* global memory",
        ),
        "lanes of fp32 keep the half that they should give": Bug(
            BITS, "taken = ", "__shfl_xor_sync(kAllLanes, given, 1)", "given", "wrong: bits"
        ),
        "lanes of fp32 read the half of the other": Bug(
            BITS, "parts[j] = odd ? ", "other >> 4", "other & 15u", "wrong: y"
        ),
        "two bytes of bits are written at an odd place": Bug(
            BITS,
            "even = kVectorLength<Element> <= 8 || ",
            "reinterpret_cast<uintptr_t>(bits) % 2 == 0",
            "true",
            "misaligned",
        ),
        "x is read in vectors wherever it begins": Bug(
            BITS, "length, even && ", "vector_aligned(x, y)", "true", "misaligned"
        ),
        "lanes without an element leave before the ballot": Bug(
            BITS,
            "words[j] = ",
            "__ballot_sync(kAllLanes, bit)",
            "(i < end ? __ballot_sync(kAllLanes, bit) : 0u)",
            "lane",
        ),
        "the last byte is written only if it is full": Bug(
            BITS, "lane < 4 * kLoads && ", "begin + 8 * lane < end", "begin + 8 * lane + 8 <= end", "wrong: bits"
        ),
        "bits of the end are those of another byte": Bug(
            BITS, "bytes[j] = ", "load(bits + i / 8)", "load(bits + i / 9)", "wrong"
        ),
        "only a byte of 1 is true": Bug(
            BITS_MATH, "set = ", "(((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7", "word", "wrong: bits"
        ),
        "bytes of a word are in the reverse order": Bug(
            BITS_MATH, "return ", "(set * 0x01020408u) >> 24", "(set * 0x08040201u) >> 24", "wrong: bits"
        ),
        "a channel ends one element late": Bug(BITS, "other = ", "left == 0", "left == 1", "wrong"),
        "the scale of the first channel serves the vector": Bug(
            BITS, "float next(float x, bool& bit) {\n      if (", "place.step()", "false", "wrong: y"
        ),
    },
    "max_pool": {
        "the last of equal values wins": Bug(
            POOL_MATH, "return (", "value > to_fp32(largest)", "value >= to_fp32(largest)", "wrong: at"
        ),
        "NaN is passed over": Bug(POOL_MATH, "to_fp32(largest)) | (", "value != value", "false", "wrong: y"),
        "a row below the image is read": Bug(
            POOL, "if (row >= 0 && ", "row < w.height.in", "row <= w.height.in", "wrong: (y|at|dx)"
        ),
        "the first place of a window may lie outside": Bug(
            POOL,
            "largest(",
            "w.height.first(place.row) * w.width.kernel + w.width.first(place.column)",
            "0",
            "wrong: at",
        ),
        "threads take the channels of their neighbours": Bug(
            POOL, "image = x + place.part * plane + ", "place.group * kLength", "place.group", "wrong|misaligned"
        ),
        "vectors begin at any element": Bug(
            POOL, "channels % kTogether<Element> == 0 && ", "vector_aligned(one, other)", "true", "misaligned"
        ),
        "vectors of more channels than there are": Bug(
            POOL,
            "return ",
            "channels % kTogether<Element> == 0",
            "channels % (kTogether<Element> / 2) == 0",
            "misaligned|wrong",
        ),
        "the last window over a row is left out": Bug(
            POOL,
            "backward_last_kernel(const Element* grad, const uint8_t* at, Element* dx, int64_t channels, Windows w, "
            "Grid grid) {\n  const auto by_height = [&](int32_t n) { return ",
            "w.height_stride.quotient(n)",
            "w.height_stride.quotient(n > 2 ? n - 2 : n)",
            "wrong: dx",
        ),
        "windows beyond the last one are looked at": Bug(
            POOL_MATH, "return ", "last < out ? last : out - 1", "last", "wrong"
        ),
        "the end of a row is written whole": Bug(POOL, "if (", "c < count", "true", "wrong|race"),
        "rows of any length end with a vector": Bug(
            POOL, "aligned = ", "w.width.in % kQuad == 0", "true", "misaligned|wrong|race"
        ),
        "sums are cut off to 16 bits and not rounded": Bug(
            "float_formats.h", "size + ", "0x7fffu + ((bits >> 16) & 1u)", "0u", "wrong: dx"
        ),
    },
}


BUGS["masked_rows"] = {
    "a plane's vectors begin at any element": Bug(
        MASKED, "return ", "planes_aligned<Element>(gather)", "gather.size % 4 == 0", "misaligned|wrong"
    ),
    "the last vector of a plane goes beyond it": Bug(
        MASKED, "return ", "gather.size % kN == 0", "true", "misaligned|wrong|race"
    ),
    "planes beyond the last image are read": Bug(
        MASKED, "step < tiling.steps && ", "plane < tiling.planes", "true", "wrong|race"
    ),
    "lanes beyond the plane move elements": Bug(
        MASKED, "plane < tiling.planes && ", "at < gather.size", "true", "wrong|race"
    ),
    "a plane is looked up by its place in the part": Bug(
        MASKED, "const int64_t channel = ", "load(gather.channels + place.channel)", "place.channel", "wrong: compact"
    ),
    "steps of other warps are done again": Bug(
        MASKED, "const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp) * ", "kSteps", "1", "race"
    ),
    "lanes leave before the shuffle": Bug(
        MASKED, "for (int width = tiling.across / 2; ", "width > 0", "to[u] >= 0 && width > 0", "shuffle|lanes|shfl"
    ),
    "half of the lanes are not added": Bug(
        MASKED, "for (int width = ", "tiling.across / 2", "tiling.across / 4", "wrong: sums"
    ),
    "every lane writes the sum": Bug(MASKED, "slot[u] >= 0 && ", "lane % tiling.across == 0", "true", "race|wrong"),
    "a slab is the image alone": Bug(MASKED, "(place.image * tiling.tiles + ", "place.tile", "0", "race|wrong: sums"),
    "the rest of the slabs is left out": Bug(
        MASKED, "const int64_t end = ", "(group + 1) * each < slabs", "true", "race|wrong: sums"
    ),
    "sums of threads are read before they are there": Bug(
        MASKED,
        "void sum_down(const Tiling& tiling, Sums& sums, int length) {\n  ",
        BARRIER,
        ";",
        "race: .* of sums|read before",
    ),
    "columns that are no neighbours move together": Bug(
        MASKED, "together = together && ", "at[i] == at[0] + i", "true", "wrong"
    ),
    "rows of a part are not looked up": Bug(MASKED, "to.write(full + (", "job.rows == nullptr", "true", "wrong: full"),
    "columns of a part are not looked up": Bug(
        MASKED, "to(tiling, tile, vector, ", "job.columns", "nullptr", "wrong: full"
    ),
}


def seed(driver: str, folder: Path) -> None:
    """Copies of csrc's headers and kernels, with the bugs of `driver` in them.

    Raises:
        AssertionError: the text to replace is not there, or more than once: the bug must follow its source.
    """
    found: dict[str, list[tuple[int, int, str]]] = {}
    for number, bug in enumerate(BUGS[driver].values()):
        source, text = (CSRC / bug.file).read_text(), bug.after + bug.right
        assert source.count(text) == 1, f"{bug.file} holds {source.count(text)} times: {text}"
        place = source.index(text) + len(bug.after)
        found.setdefault(bug.file, []).append((place, place + len(bug.right), bug.seeded(number)))
    for path in [*CSRC.glob("*.h"), *CSRC.glob("*_cuda.cu")]:
        source = path.read_text()
        for begin, end, text in sorted(found.get(path.name, []), reverse=True):
            source = source[:begin] + text + source[end:]
        # Where seeded() is declared.
        before = '#include "seeded_driver.h"\n#line 1\n' if path.name in found else ""
        (folder / path.name).write_text(before + source)


def build(driver: str, folder: Path) -> Path:
    """The program that runs the kernels of `driver` with a bug of choice, compiled once for its content."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler here")
    folder = folder / driver
    folder.mkdir()
    seed(driver, folder)
    source = FOLDER / f"seeded_{driver}.cu"
    digest = hashlib.sha256("\n".join(FLAGS).encode())
    for path in sorted([*FOLDER.glob("*.h"), source, *folder.iterdir()]):
        digest.update(path.read_bytes())
    program = cache_root() / "cuda_emulation" / f"seeded_{driver}-{digest.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        temporary = program.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, f"-I{folder}", "-x", "c++", str(source), "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(temporary, program)
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeded")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(DRIVERS, pool.map(lambda driver: build(driver, folder), DRIVERS), strict=True))


def run(program: Path, bug: int, order: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), str(bug), *order], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("driver", DRIVERS)
def test_kernels_without_a_bug_are_right(programs: dict[str, Path], driver: str, order: tuple[str, ...]) -> None:
    done = run(programs[driver], -1, order)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("driver", "bug"), [(driver, bug) for driver in DRIVERS for bug in BUGS[driver]])
def test_a_seeded_bug_is_found_in_every_order(programs: dict[str, Path], driver: str, bug: str) -> None:
    for order in ORDERS:
        done = run(programs[driver], list(BUGS[driver]).index(bug), order)
        assert done.returncode in (1, 2), f"not found, {'-'.join(order)}"
        assert re.search(BUGS[driver][bug].caught, done.stderr), done.stderr
